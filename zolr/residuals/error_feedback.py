"""Remember what the subspace does not hold, and add it to the next gradient."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zolr.residuals import Plain, State, Step, Window, add_lifted
from zolr.subspaces import Subspace


@dataclass(frozen=True)
class ErrorFeedback(Plain):
    """`A = G + E`, `W += scale * lift(step(project(A)))`, `E' = A − A_P + b1 / (1 − b1) (M_P − M_P')`.

    `A_P` is the orthogonal projection of `A` on the span; the last term is what the optimizer's mean gradient loses in a
    change of subspace from `P` to `P'`, weighted as gradients that would bring it back. One buffer of the size of the
    weight is kept, and a second one lives while a step changes the subspace.

    Reference: LDAdam arXiv 2410.16103.
    """

    dense: ClassVar[bool] = True
    reads_moments: ClassVar[bool] = True

    def receive(self, gradient: Tensor, state: State) -> Tensor:
        """The gradient with what was missed before."""
        return gradient.add_(state["error"]) if "error" in state else gradient

    def __call__(self, weight: Tensor, gradient: Tensor, window: Window, step: Step, state: State) -> None:
        """Move the weight; see `Residual`."""
        subspace = window.subspace
        coords = subspace.project(gradient)
        change = step(coords)
        add_lifted(gradient, subspace, subspace.dual(coords), -1.0)
        lost = state.pop("lost", None)
        if lost is not None:
            gradient.add_(lost)
        if "error" in state:
            state["error"].copy_(gradient)
        else:
            state["error"] = gradient.clone(memory_format=torch.contiguous_format)
        add_lifted(weight, subspace, change, window.scale)

    def carried(
        self,
        state: State,
        old: tuple[Subspace, Mapping[str, Any]],
        new: tuple[Subspace, Mapping[str, Any]],
        settings: Mapping[str, Any],
    ) -> None:
        """Take what the change of subspace leaves of the mean gradient from what it was."""
        weight = _weight_of_mean(settings)
        name = next((n for n in ("exp_avg", "momentum_buffer") if old[1].get(n) is not None), None)
        if not weight or name is None:
            return
        # kept apart from the error, which the gradient at hand already has, until a step is made
        lost = state.setdefault(
            "lost", torch.zeros(old[0].shape, dtype=old[1][name].dtype, device=old[1][name].device)
        )
        add_lifted(lost, old[0], old[0].dual(old[1][name]), weight)
        if new[1].get(name) is not None:
            add_lifted(lost, new[0], new[0].dual(new[1][name]), -weight)


def _weight_of_mean(settings: Mapping[str, Any]) -> float:
    """`b1 / (1 − b1)`: the share of the mean in its next value over that of a gradient."""
    if "betas" in settings:
        return settings["betas"][0] / (1 - settings["betas"][0])
    momentum = settings.get("momentum", 0.0)
    return momentum / (1 - settings.get("dampening", momentum))
