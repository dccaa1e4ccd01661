"""Express the state in the new coordinates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zolr.subspaces import Change
from zolr.transports import State, known_degrees


@dataclass(frozen=True)
class Align:
    """Map every state tensor by its degree in the gradient.

    First moments are turned as gradients are (`M R`, `R = (VᵀV)⁻¹ Vᵀ V'`, exact for the part inside the old span); second moments are averaged with
    squared cosines as weights, which keeps their mass where plain squaring would shrink it by `r / n`. Counters stay.
    Where the subspaces have no common coordinates the state starts afresh.

    Reference: LOZO-M (first moment, as `N V_oldᵀ V_new / n`, its form for large n), LDAdam
    arXiv 2410.16103 and PLUMAGE arXiv 2505.18313 (second moments; the mass-preserving average is ours).
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
            UsageError: the optimizer's state tensors have no known degree.
        """
        if change is None or not state:
            return {}
        degrees = known_degrees("align", state, degrees)
        maps = {0: lambda x: x, 1: change.gradients, 2: lambda v: change.squares(v).clamp_min(0)}
        return {name: maps[degrees[name]](value) for name, value in state.items()}
