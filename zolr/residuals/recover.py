"""Move by what the subspace does not hold, at the rate that the optimizer has shown inside of it."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zolr.residuals import (
    Level,
    Limited,
    State,
    Step,
    Window,
    add_lifted,
    check_level,
    length,
)


@dataclass(frozen=True)
class Recover(Limited):
    """`W += scale * lift(−lr N) − lr phi (G − G_P)`, with `G_P` the orthogonal projection of `G` on the span.

    `phi_j = ‖N_j‖ / ‖G_P,j‖` is how much the optimizer enlarges channel `j` of the gradient inside the subspace: a row or
    a column of the coordinates, whichever goes along the side that was not projected. The scale of a basis counts as part of
    `scale`, which `phi` leaves out. The norm of the added part may grow by the factor `growth` a step at most.

    Args:
        level: "channel", or "tensor" for one `phi` of the whole matrix, which subspaces on two sides always have.
        growth: of the norm of the added part from one step to the next; None for no limit.
        released: follow the released code in subtracting `scale * G_P` (so that the added part keeps `1 − scale` of the
            gradient inside the subspace), and in limiting norms that have no bias correction yet.

    Raises:
        UsageError: an unknown level, or a growth below 1.

    Reference: Fira arXiv 2410.01623.
    """

    level: Level = "channel"
    growth: float | None = 1.01
    released: bool = False
    dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_level(self.level, self.growth)

    def __call__(self, weight: Tensor, gradient: Tensor, window: Window, step: Step, state: State) -> None:
        """Move the weight; see `Residual`."""
        subspace = window.subspace
        axis = subspace.channel if self.level == "channel" else None
        coords = subspace.project(gradient)
        change = step(coords)
        inside = subspace.dual(coords)
        seen = (
            (coords * inside).sum(axis, keepdim=axis is not None).clamp_min(0).sqrt()
        )  # ‖G_P,j‖, without forming it
        factor = length(change, axis) / window.lr / (seen + 1e-8)
        add_lifted(gradient, subspace, inside, -window.scale if self.released else -1.0)
        self.limit(gradient.mul_(factor), window, state)
        add_lifted(weight, subspace, change, window.scale)
        weight.add_(gradient, alpha=-window.lr)
