"""Divide the dense gradient first, and let only the memory of what comes out live in the subspace."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zolr.errors import UsageError
from zolr.factored import clipped, divide, observe, rms
from zolr.residuals import Plain, State, Step, Window, counted


@dataclass(frozen=True)
class Precondition(Plain):
    """`W -= lr s clip(lift(M) + fresh (U - lift(project(U))))`, `U = G / sqrt(V)`, M the optimizer's mean of `project(U)`.

    V is the factored second moment of the whole gradient. The subspace holds the memory alone: this step's own share of
    the mean is applied as it is, not as its projection, when `fresh` is the weight that the optimizer gives it.

    Args:
        fresh: weight of the newest update in the optimizer's mean (`1 - beta` of optimizer 'averaged'); 0 lets
            nothing of an update past the subspace.
        decay: the second moment forgets as `1 - t^-decay`.
        threshold: largest root mean square of what the weight is moved by, before the rate.
        scaled: `s = max(floor, rms(W))`; otherwise 1.
        floor: least factor s.

    Raises:
        UsageError: a share or exponent out of range.

    Reference: FLORA arXiv 2402.03293.
    """

    fresh: float = 0.1
    decay: float = 0.8
    threshold: float = 1.0
    scaled: bool = True
    floor: float = 1e-3
    normalizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.fresh <= 1 or not 0 < self.decay <= 1:
            raise UsageError(
                f"fresh = {self.fresh}, decay = {self.decay} are out of range; use fresh in [0, 1], decay in (0, 1]"
            )

    def __call__(self, weight: Tensor, gradient: Tensor, window: Window, step: Step, state: State) -> None:
        """Move the weight; see `Residual`."""
        steps = counted(state, weight, weight.dtype)
        observe(state, gradient, steps**-self.decay)
        update = divide(gradient, state)
        coords = window.subspace.project(update)
        # in coordinates the share of this step is known before the optimizer takes the gradient for its own
        past = step(coords) / -window.lr - self.fresh * coords
        update.mul_(self.fresh).add_(window.subspace.lift(past))
        update = clipped(update, self.threshold)
        if self.scaled:
            update.mul_(rms(weight).clamp_min_(self.floor))
        weight.sub_(update, alpha=window.lr * window.scale)
