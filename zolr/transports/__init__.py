"""What optimizer state becomes when the subspace changes: the Transport protocol and the registry."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from zolr.errors import UsageError
from zolr.subspaces import Change

State = dict[str, Any]


class Transport(Protocol):
    """A frozen rule from the state of an old window to that of a new one."""

    needs_change: ClassVar[bool]  # whether the map between the two subspaces must be computed for it

    def __call__(
        self,
        state: State,
        degrees: Mapping[str, int] | None,
        change: Change | None,
        settings: Mapping[str, Any],
    ) -> State:
        """The state to start the new window with.

        Args:
            state: state of one value in the optimizer, at the end of the old window.
            degrees: homogeneity of each state tensor in the gradient (1 first moments, 2 second moments, 0 counters);
                None for an optimizer that is not in the table of `zolr.optim`.
            change: how old coordinates read in the new subspace; None when they do not.
            settings: the optimizer's settings for this value (betas and the like).

        Returns:
            The new state; an empty one makes the optimizer start afresh.
        """
        ...


def known_degrees(name: str, state: State, degrees: Mapping[str, int] | None) -> Mapping[str, int]:
    """The degrees of an optimizer's state, for a transport that must know them all.

    Raises:
        UsageError: a state tensor has no known degree.
    """
    unknown = sorted(set(state) - set(degrees or {}))
    if degrees is None or unknown:
        raise UsageError(
            f"transport '{name}' does not know the state '{', '.join(unknown)}'; use transport 'reset' or 'keep'"
        )
    return degrees


from zolr.transports.align import Align  # noqa: E402  (the files obey the protocol above)
from zolr.transports.aware import Aware  # noqa: E402
from zolr.transports.keep import Keep  # noqa: E402
from zolr.transports.reproject import Reproject  # noqa: E402
from zolr.transports.reset import Reset  # noqa: E402

TRANSPORTS: dict[str, type] = {
    "reset": Reset,
    "keep": Keep,
    "align": Align,
    "aware": Aware,
    "reproject": Reproject,
}
