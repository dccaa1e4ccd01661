"""How a dense gradient moves a weight, in its subspace and beside it: the Residual protocol and the registry.

A dense method meets each gradient whole. The optimizer steps in the coordinates; what becomes of the part of the gradient
that they do not hold is a choice of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from zolr.keys import Key
from zolr.subspaces import Full, Subspace, Viewed

State = dict[str, Tensor]
Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Window:
    """Where one dense gradient is met.

    Args:
        subspace: drawn for this window.
        whole: the optimizer's coordinates are the weight's whole space in this window (see `Residual.whole`).
        lr: learning rate of the step.
        scale: factor on what is lifted (`Method.scale`).
        age: optimizer steps of this window before this one.
    """

    subspace: Subspace
    whole: bool
    lr: float
    scale: float
    age: int


class Residual(Protocol):
    """A frozen rule that moves one weight by its dense gradient, with the optimizer's step in the coordinates."""

    dense: ClassVar[bool]  # whether it means anything only where gradients are dense
    normalizes: ClassVar[bool]  # whether it makes the size of a step independent of that of the gradient

    def whole(self, key: Key) -> bool:
        """Whether the optimizer has the whole space instead of the subspace in the window of that name."""
        ...

    def receive(self, gradient: Tensor, state: State) -> Tensor:
        """The gradient `(m, n)` that subspaces are drawn from and that is projected; may change it in place."""
        ...

    def __call__(self, weight: Tensor, gradient: Tensor, window: Window, step: Step, state: State) -> None:
        """Move the weight in place.

        Args:
            weight: `(m, n)`, of the dtype of the coordinates.
            gradient: `(m, n)`, as `receive` gave it; may be overwritten.
            window: where this happens; its rate is not 0.
            step: gradient in the coordinates -> change of the coordinates (`-lr N`); to be called exactly once. What it
                gives back is valid until the next call of the optimizer.
            state: tensors kept for this weight from step to step, by name; empty at first.
        """
        ...

    def carried(
        self,
        state: State,
        old: tuple[Subspace, Mapping[str, Any]],
        new: tuple[Subspace, Mapping[str, Any]],
        settings: Mapping[str, Any],
    ) -> None:
        """Told of a change of subspace: `(subspace, optimizer state)` before and after, and the optimizer's settings."""
        ...


class Plain:
    """A residual that keeps nothing and always has the drawn subspace."""

    dense: ClassVar[bool] = True
    normalizes: ClassVar[bool] = False

    def whole(self, key: Key) -> bool:
        """Never."""
        return False

    def receive(self, gradient: Tensor, state: State) -> Tensor:
        """The gradient itself."""
        return gradient

    def carried(
        self,
        state: State,
        old: tuple[Subspace, Mapping[str, Any]],
        new: tuple[Subspace, Mapping[str, Any]],
        settings: Mapping[str, Any],
    ) -> None:
        """Nothing."""


def add_lifted(weight: Tensor, subspace: Subspace, coords: Tensor, factor: float = 1.0) -> None:
    """`weight += factor * lift(coords)`, with no second matrix of that size where the lift is a thin product."""
    if isinstance(subspace, Full):
        weight.add_(coords, alpha=factor)
    elif isinstance(subspace, Viewed) and weight.is_contiguous():
        weight.view(-1, subspace.basis.shape[0]).addmm_(coords, subspace.basis.mT, alpha=factor)
    elif isinstance(subspace, Viewed):
        weight.add_(subspace.lift(coords), alpha=factor)
    else:
        weight.addmm_(*subspace.outer(coords), alpha=factor)


from zolr.residuals.compensate import Compensate  # noqa: E402  (the files obey the protocol above)
from zolr.residuals.drop import Drop  # noqa: E402
from zolr.residuals.precondition import Precondition  # noqa: E402
from zolr.residuals.projfactor import ProjFactor  # noqa: E402

RESIDUALS: dict[str, type] = {
    "drop": Drop,
    "compensate": Compensate,
    "precondition": Precondition,
    "projfactor": ProjFactor,
}
