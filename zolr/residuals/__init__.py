"""How a dense gradient moves a weight, in its subspace and beside it: the Residual protocol and the registry.

A dense method meets each gradient whole. The optimizer steps in the coordinates; what becomes of the part of the gradient
that they do not hold is a choice of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from zolr.errors import UsageError
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
        settings: the optimizer's settings for these coordinates (betas and the like).
    """

    subspace: Subspace
    whole: bool
    lr: float
    scale: float
    age: int
    settings: Mapping[str, Any] = field(default_factory=dict)


class Residual(Protocol):
    """A frozen rule that moves one weight by its dense gradient, with the optimizer's step in the coordinates."""

    dense: ClassVar[bool]  # whether it means anything only where gradients are dense
    reads_moments: ClassVar[bool]  # whether it must know the optimizer's state by name
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
    reads_moments: ClassVar[bool] = False
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


Level = Literal["channel", "tensor"]


class Limited(Plain):
    """A residual whose part of the step may not grow faster than by a factor a step.

    The norm that is compared with is forgotten where the optimizer starts afresh: it belongs to the moments before.
    """

    growth: float | None
    released: bool

    def limit(self, update: Tensor, window: Window, state: State) -> None:
        """Shrink the update in place to at most `growth` times the norm of the one before, without asking the device."""
        if self.growth is None:
            return
        norm = update.norm()
        if self.released:
            norm = norm / _bias_correction(norm, window, state)
        if "norm" in state:
            most = self.growth * state["norm"]
            # after a gradient of zero there is nothing to compare with
            limited = (norm > most) & (state["norm"] > 0)
            update.mul_(torch.where(limited, most / norm, torch.ones_like(norm)))
            norm = torch.where(limited, most, norm)
        state["norm"] = norm

    def carried(
        self,
        state: State,
        old: tuple[Subspace, Mapping[str, Any]],
        new: tuple[Subspace, Mapping[str, Any]],
        settings: Mapping[str, Any],
    ) -> None:
        """Forget the norm where the optimizer forgets its moments."""
        if old[1] and not new[1]:  # one that keeps nothing has nothing to forget
            state.clear()


def _bias_correction(like: Tensor, window: Window, state: State) -> Tensor:
    """`sqrt(1 - b2^t) / (1 - b1^t)`, by which a step of Adam is larger than without its corrections; 1 for others."""
    betas = window.settings.get("betas")
    if betas is None:
        return torch.ones_like(like)
    # beside the optimizer's own counter, which may lie on the host or on the device
    steps = counted(state, like, torch.float64)
    return ((1 - betas[1] ** steps).sqrt() / (1 - betas[0] ** steps)).to(like)


def counted(state: State, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Steps that a weight has made with this one, shape (), on the device of `like`: a power of it asks nobody."""
    state["steps"] = state.get("steps", torch.zeros((), dtype=dtype, device=like.device)) + 1
    return state["steps"]


def length(coords: Tensor, axis: int | None) -> Tensor:
    """Norms over one axis of coordinates, which stays as an axis of one; of all of them without an axis, shape ()."""
    return coords.norm() if axis is None else coords.norm(dim=axis, keepdim=True)


def check_level(level: str, growth: float | None) -> None:
    """Refuse settings that mean nothing."""
    if level not in ("channel", "tensor"):
        raise UsageError(f"level '{level}' is not known; use 'channel' or 'tensor'")
    if growth is not None and not 1 <= growth < float("inf"):
        raise UsageError(
            f"growth = {growth} lets a norm never grow again; use at least 1, or none for no limit"
        )


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
from zolr.residuals.error_feedback import ErrorFeedback  # noqa: E402
from zolr.residuals.precondition import Precondition  # noqa: E402
from zolr.residuals.projfactor import ProjFactor  # noqa: E402
from zolr.residuals.recover import Recover  # noqa: E402
from zolr.residuals.replace import Replace  # noqa: E402

RESIDUALS: dict[str, type] = {
    "drop": Drop,
    "recover": Recover,
    "replace": Replace,
    "error_feedback": ErrorFeedback,
    "compensate": Compensate,
    "precondition": Precondition,
    "projfactor": ProjFactor,
}
