"""Start afresh."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zolr.subspaces import Change
from zolr.transports import State


@dataclass(frozen=True)
class Reset:
    """Forget the state; bias corrections start again.

    The right choice for independent random subspaces: they share only `r / n` of their energy.
    """

    needs_change: ClassVar[bool] = False

    def __call__(
        self,
        state: State,
        degrees: Mapping[str, int] | None,
        change: Change | None,
        settings: Mapping[str, Any],
    ) -> State:
        """An empty state."""
        return {}
