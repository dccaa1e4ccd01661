"""Lift the state and project it again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zolr.subspaces import Change
from zolr.transports import State, known_degrees


@dataclass(frozen=True)
class Reproject:
    """First moments become `project_new(lift_old(M))`; second moments and counters as in `align`.

    For bases that are unbiased rather than orthonormal (`E[P Pᵀ] = I`) the lift of a moment keeps its mean over a refresh,
    at the price of noise, where `align` keeps the part inside the old span alone, `r / n` of it. Where columns are
    orthonormal the two are one.

    Reference: FLORA arXiv 2402.03293.
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
        degrees = known_degrees("reproject", state, degrees)
        maps = {0: lambda x: x, 1: change.lifted, 2: lambda v: change.squares(v).clamp_min(0)}
        return {name: maps[degrees[name]](value) for name, value in state.items()}
