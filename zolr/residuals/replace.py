"""Move by the gradient itself, at the rate that the optimizer has shown in the subspace."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zolr.residuals import Level, Limited, State, Step, Window, check_level, length


@dataclass(frozen=True)
class Replace(Limited):
    """`W −= lr scale phi G`: the subspace gives the size of a step alone, the gradient its direction.

    `phi_j = ‖N_j‖ / ‖R_j‖` over channels `j` of the coordinates (a row or a column, whichever goes along the side that
    was not projected), with `R` the gradient in the coordinates and `N` the optimizer's step. The norm of the
    step may grow by the factor `growth` at most; whether that is asked before or after `scale` makes no difference, as
    `scale` is constant. The published `alpha` stands under a root: `scale` is that root.

    Args:
        level: "channel", or "tensor" for one `phi` of the whole matrix, which subspaces on two sides always have.
        growth: of the norm of the step from one to the next; None for no limit.
        released: follow the released code in limiting norms that have no bias correction yet.

    Raises:
        UsageError: an unknown level, or a growth below 1.

    Reference: APOLLO arXiv 2412.05270.
    """

    level: Level = "channel"
    growth: float | None = 1.01
    released: bool = False
    dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_level(self.level, self.growth)

    def __call__(self, weight: Tensor, gradient: Tensor, window: Window, step: Step, state: State) -> None:
        """Move the weight; see `Residual`."""
        axis = window.subspace.channel if self.level == "channel" else None
        coords = window.subspace.project(gradient)
        change = step(coords)
        factor = length(change, axis) / window.lr / (length(coords, axis) + 1e-8)
        gradient.mul_(factor * window.scale)
        self.limit(gradient, window, state)
        weight.add_(gradient, alpha=-window.lr)
