"""Another estimator's gradient at an extrapolated point."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from zolr.errors import UsageError
from zolr.estimators import (
    Elsewhere,
    Estimate,
    Estimator,
    Loss,
    check_reach,
    itself,
    ungathered,
)
from zolr.keys import Key
from zolr.probes import Probe
from zolr.variables import Variable, layout


@dataclass(frozen=True)
class Lookahead(Elsewhere):
    """The gradient of `inner` at `B - reach g`, to be applied at `B`: extragradient.

    All evaluations of a step see the same noise.

    Args:
        inner: whose gradient is taken.
        reach: factor on what is gone along, at least 0; 0 is `inner` itself.
        along: "gradient", g that of the same batches at `B`, which is kept and costs a second evaluation; or "noise", g
            standard normal in the coordinates, which costs nothing. For the gradient of the step before see optimizer
            "optimistic": it is state, which an estimator does not have.

    Raises:
        UsageError: an argument out of range.

    Reference: Korpelevich 1976; Extrapolation for large-batch training, arXiv 2006.05720.
    """

    inner: Estimator
    reach: float = 1e-2
    along: Literal["gradient", "noise"] = "gradient"

    def __post_init__(self) -> None:
        check_reach(self.reach)
        if self.along not in ("gradient", "noise"):
            raise UsageError(f"along '{self.along}' is not known; use 'gradient' or 'noise'")

    def forwards(self, batches: int) -> int:
        """Those of `inner`, twice for a gradient to go along."""
        twice = self.reach and self.along == "gradient"
        return self.inner.forwards(batches) * (2 if twice else 1)

    def way(
        self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], key: Key
    ) -> tuple[Estimate | None, dict[Variable, Callable[[], Tensor]]]:
        """What was seen on the way, and the way to go for each variable."""
        key = key.fold_in("ahead")
        if self.along == "noise":
            noise = Probe(layout(variables), "gaussian", key)
            return None, {v: partial(_scaled, noise, v, self.reach) for v in variables}
        offsets: dict[Variable, Callable[[], Tensor]] = {}

        @torch.no_grad()
        def keep(variable: Variable, gradient: Tensor) -> None:
            offsets[variable] = partial(itself, gradient.mul_(-self.reach))

        with ungathered(variables):
            return self.inner(loss, batches, variables, keep, key), offsets


def _scaled(noise: Probe, variable: Variable, reach: float) -> Tensor:
    return noise(variable.name).to(variable.value.dtype) * reach
