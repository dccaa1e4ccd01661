"""Toss a coin for every weight and window: the subspace alone, or all that it leaves out."""

from dataclasses import dataclass

from torch import Tensor

from zolr.errors import UsageError
from zolr.keys import Key
from zolr.residuals import Plain, State, Step, Window, add_lifted


@dataclass(frozen=True)
class Compensate(Plain):
    """With probability q a window has the whole space and meets `(G - lift(project(G))) / q`, else `project(G) / (1 - q)`.

    Over the coin, what the optimizer is fed has the mean G, whatever the subspace. Rules that do not see the size of a
    gradient (Muon, Adam) lose the factors, not the coin: what they make of that mean is another matter. The state is as
    large as the weight in a share q of the windows.

    Args:
        q: probability of the whole space, in [0, 1); 0 is `drop`.

    Raises:
        UsageError: q out of range.

    Reference: GUM arXiv 2510.17802.
    """

    q: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.q < 1:
            raise UsageError(
                f"q = {self.q} is no probability of a whole window; use a number in [0, 1), or projector 'identity' to "
                "have the whole space always"
            )

    def whole(self, key: Key) -> bool:
        """The coin of that window, a number of its name alone: a prediction, whose tensors have no numbers, tosses it too."""
        return key.integer() < self.q * 2**64

    def __call__(self, weight: Tensor, gradient: Tensor, window: Window, step: Step, state: State) -> None:
        """Move the weight; see `Residual`."""
        coords = window.subspace.project(gradient)
        if window.whole:
            add_lifted(gradient, window.subspace, coords, -1.0)
            weight.add_(step(gradient.div_(self.q)), alpha=window.scale)
        else:
            add_lifted(weight, window.subspace, step(coords.div_(1 - self.q)), window.scale)
