"""The one-point likelihood-ratio estimator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from zolr.errors import UsageError
from zolr.estimators import (
    ByProbes,
    Found,
    Loss,
    check_eps,
    check_probes,
    mean_loss,
    same_noise,
)
from zolr.keys import Key
from zolr.variables import Variable, shifted


@dataclass(frozen=True)
class LikelihoodRatio(ByProbes):
    """`(1/k) sum_i L(B + s z_i) z_i / s`, the exact gradient of the Gaussian-smoothed loss in expectation.

    Without a baseline its variance carries `L² / s²` times the number of coordinates, which buries the slope for small
    `s`; the two-point form (`spsa`) has the same mean without it.

    Args:
        eps: s, the standard deviation of a probe's entries. Neither it nor a rate is chosen by the engine: it measures slopes
            between two points, for which a radius may be a hundred times smaller.
        probes: k, directions a step.

    Raises:
        UsageError: an argument out of range.

    Reference: arXiv 2603.20632 (LR paradigm).
    """

    eps: float | None = None
    probes: int = 1
    law = "gaussian"  # no setting: the smoothing is by that one
    paradigm: ClassVar[Literal["fo", "zo", "fwd"]] = "zo"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_eps(self.eps)
        check_probes(self.probes)

    def forwards(self, batches: int) -> int:
        """k forwards a micro-batch."""
        return batches * self.probes

    @torch.no_grad()
    def measure(self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], key: Key) -> Found:
        """Measure the losses; see `Measuring`."""
        if self.eps is None:
            raise UsageError("estimator 'likelihood_ratio' has no eps; give one")
        directions = self.draw(variables, key)
        losses = []
        with same_noise(variables[0].value.device) as rewind:
            for direction in directions:
                rewind()
                with shifted(variables, direction, self.eps):
                    losses.append(mean_loss(loss, batches))
        values = torch.stack(losses)
        return self._found(values.mean(), values / self.eps, variables, directions)
