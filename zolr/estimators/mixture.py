"""Two estimates of one gradient, averaged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from zolr.errors import UsageError
from zolr.estimators import BySlopes, Found, Guided, Loss, Measuring, Repeatable, setting
from zolr.keys import Key
from zolr.variables import Variable


@dataclass(frozen=True)
class Mixture(BySlopes):
    """`w g_random + (1 - w) g_guided`, the second estimator guided by what the first has found.

    Both are unbiased and the second is so for every guide, hence the mixture is unbiased, and its second moment is
    `w² E‖g_random‖² + (1 - w)² E‖g_guided‖² + 2 w (1 - w) ‖g‖²`. With `share = 1` it is the first one alone.

    Args:
        random: measures everywhere a little.
        guided: measures few places, chosen by what `random` has found.
        share: w, in [0, 1].

    Raises:
        UsageError: a share out of range, or a first estimate that has not the gradient's length.

    Reference: ZO-HGD arXiv 2012.11518.
    """

    random: Measuring
    guided: Guided
    share: float = 0.5
    paradigm: ClassVar[Literal["fo", "zo", "fwd"]] = "zo"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError(f"share = {self.share} of a mixture is outside [0, 1]; use 0.5")
        if setting(self.random, "normalize", False):
            raise UsageError(
                "a normalized estimate has not the gradient's length, so it cannot be mixed with one that has; "
                "use normalize False"
            )

    def forwards(self, batches: int) -> int:
        """Forwards of both."""
        guided = self.guided.forwards(batches) if self.share < 1 else 0
        return self.random.forwards(batches) + guided

    @torch.no_grad()
    def measure(self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], key: Key) -> Found:
        """Measure the slopes; see `Measuring`. Those of the first estimator stand for the step."""
        first = self.random.measure(loss, batches, variables, key)
        if self.share == 1:
            return first
        return self._mixed(first, self.guided.measure(loss, batches, variables, key.fold_in("guided"), first))

    @torch.no_grad()
    def from_slopes(self, loss: Tensor, slopes: Tensor, variables: Sequence[Variable], key: Key) -> Found:
        """The step again; see `Repeatable`."""
        random, guided = cast(Repeatable, self.random), cast(Any, self.guided)
        if self.share == 1:
            return random.from_slopes(loss, slopes, variables, key)
        count = setting(self.random, "probes", 1)
        first = random.from_slopes(loss, slopes[:count], variables, key)
        return self._mixed(
            first, guided.from_slopes(loss, slopes[count:], variables, key.fold_in("guided"), first)
        )

    def _mixed(self, first: Found, second: Found) -> Found:
        def gradient(variable: Variable) -> Tensor:
            return (
                first.gradient(variable)
                .mul_(self.share)
                .add_(second.gradient(variable), alpha=1 - self.share)
            )

        # a slope that is not finite must show, whichever of them it is
        both = torch.cat([first.recorded, second.recorded])
        return Found(first.loss, first.slopes + 0.0 * second.slopes.sum(), gradient, both)
