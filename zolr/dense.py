"""Core: what a dense method keeps beside one weight, whose gradients come whole and one at a time."""

from typing import Any

import torch
from torch import Tensor, nn

from zolr.subspaces import Subspace, rebuild
from zolr.variables import Variable


class Core:
    """The small side of one weight: a subspace, and coordinates that hold one update at a time.

    The gradient is projected, the optimizer makes a step of the coordinates from zero, the step is lifted onto the weight
    at once. That gives the weights of a run whose coordinates live for a window, at the price of a dense gradient, and lets
    a projector see one.

    Attributes:
        value: the coordinates, zero between steps; empty before the first subspace. Its optimizer state is the method's.
        subspace: None before the first gradient.
        window: subspaces before this one; -1 before the first.
        due: the next gradient begins a window.
    """

    def __init__(self, variable: Variable) -> None:
        self.variable = variable
        self.value = nn.Parameter(variable.value.new_zeros(0, 0), requires_grad=False)
        self.subspace: Subspace | None = None
        self.window = -1
        self.due = True

    def open(self, subspace: Subspace) -> None:
        """Begin a window; `value` stays the same Parameter where its shape does."""
        self.subspace = self.variable.without_frozen_row(subspace)
        if self.value.shape != subspace.coords_shape:
            zeros = self.variable.value.new_zeros(subspace.coords_shape)
            self.value = nn.Parameter(zeros, requires_grad=False)
        self.window += 1
        self.due = False

    def project(self, gradient: Tensor) -> Tensor:
        """The gradient in the coordinates."""
        assert self.subspace is not None  # the engine opens a window before the first use
        return self.subspace.project(gradient)

    @torch.no_grad()
    def fold(self, scale: float) -> None:
        """`W += scale * lift(value)`, `value <- 0`."""
        assert self.subspace is not None
        self.variable.value.data.addmm_(*self.subspace.outer(self.value.data), alpha=scale)
        self.value.data.zero_()

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and strings from which `load` continues."""
        subspace = self.subspace
        return {
            "subspace": type(subspace).__name__,
            "tensors": {} if subspace is None else subspace.tensors(),
            "window": self.window,
            "due": self.due,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        if state["tensors"]:
            tensors = {k: t.to(self.variable.value.device) for k, t in state["tensors"].items()}
            self.open(rebuild(state["subspace"], tensors))
        self.window, self.due = state["window"], state["due"]
