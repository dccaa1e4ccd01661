"""Estimate what the moments would be had every gradient been seen in the new coordinates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from zolr.errors import UsageError
from zolr.subspaces import Change
from zolr.transports import State, known_degrees


@dataclass(frozen=True)
class Aware:
    """Projection-aware moments: the first turned as gradients are, the second rebuilt from mean and variance.

    With bias-corrected moments `m`, `v` of `t` steps and the map `T` of gradients, `M' = M T` and
    `V' = (1 − b2^t) |(v − m²)(T ∘ T) + (m T)²|`: the mean is turned exactly, the variance as that of uncorrelated
    coordinates. Where the subspaces share little, little is left of either: `r / n` of the energy between independent
    ones, while new gradients come at full size (see `align` for moments that keep their mass). Counters stay.

    Reference: LDAdam arXiv 2410.16103.
    """

    needs_change: ClassVar[bool] = True

    def __call__(
        self,
        state: State,
        degrees: Mapping[str, int] | None,
        change: Change | None,
        settings: Mapping[str, Any],
    ) -> State:
        """The state in the new coordinates.

        Raises:
            UsageError: the optimizer's state tensors have no known degree, or second moments no known decay.
        """
        if change is None or not state:
            return {}
        degrees = known_degrees("aware", state, degrees)
        first: Tensor | None = next((x for name, x in state.items() if degrees[name] == 1), None)
        carried = {}
        for name, value in state.items():
            if value is None or degrees[name] == 0:
                carried[name] = value
            elif degrees[name] == 1:
                carried[name] = change.gradients(value)
            else:
                if first is None or "betas" not in settings or "step" not in state:
                    raise UsageError(
                        f"transport 'aware' needs a mean beside the second moment '{name}'; use transport 'align'"
                    )
                carried[name] = self._second(first, value, float(state["step"]), settings["betas"], change)
        return carried

    def _second(
        self, first: Tensor, second: Tensor, steps: float, betas: tuple[float, float], change: Change
    ) -> Tensor:
        seen = 1 - betas[1] ** steps
        mean = first / (1 - betas[0] ** steps)
        variance = second / seen - mean.square()
        return seen * (change.variances(variance) + change.gradients(mean).square()).abs()
