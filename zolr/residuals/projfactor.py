"""Divide what is lifted by a factored second moment of the lifted gradient."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zolr.errors import UsageError
from zolr.factored import divide, observe
from zolr.residuals import Plain, State, Step, Window, counted


@dataclass(frozen=True)
class ProjFactor(Plain):
    """`W += scale * lift(step) / (sqrt(V) + eps)`, V the factored mean of `lift(project(G))²`, corrected for its start.

    The optimizer keeps a first moment in the coordinates; the second one belongs to entries of the weight, of which it
    keeps a row and a column.

    Args:
        beta: memory of the second moment, in [0, 1).
        eps: added to its root.

    Raises:
        UsageError: a setting out of range.

    Reference: VLoRP arXiv 2505.01744.
    """

    beta: float = 0.999
    eps: float = 1e-6
    normalizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1 or not self.eps > 0:
            raise UsageError(
                f"beta = {self.beta}, eps = {self.eps} are out of range; use beta in [0, 1) and a positive eps"
            )

    def __call__(self, weight: Tensor, gradient: Tensor, window: Window, step: Step, state: State) -> None:
        """Move the weight; see `Residual`."""
        coords = window.subspace.project(gradient)
        lifted = window.subspace.lift(coords)
        steps = counted(state, weight, weight.dtype)
        observe(state, lifted, 1 - self.beta)
        change = window.subspace.lift(step(coords))
        correction = 1 - self.beta**steps
        # (sqrt(V) + eps) sqrt(correction)^-1, with eps beside the raw root as released
        weight.add_(divide(change, state, self.eps).mul_(correction.sqrt()), alpha=window.scale)
