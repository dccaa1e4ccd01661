"""Keep the state as it stands."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zolr.subspaces import Change
from zolr.transports import State


@dataclass(frozen=True)
class Keep:
    """Carry the raw state over, as GaLore does; right only where the subspace moves little."""

    needs_change: ClassVar[bool] = False

    def __call__(
        self,
        state: State,
        degrees: Mapping[str, int] | None,
        change: Change | None,
        settings: Mapping[str, Any],
    ) -> State:
        """The state itself."""
        return state
