"""Core: what a dense method keeps beside one weight, whose gradients come whole and one at a time."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zolr.residuals import Residual, State, Step, Window
from zolr.subspaces import Full, Subspace, rebuild
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
        whole: the coordinates are the weight's whole space in this window (see `residuals.Residual.whole`).
        age: steps of this window so far.
        kept: what the residual keeps from step to step.
        gap: windows of the method that one of its subspaces lasts (see `projectors.Patient`).
        likeness: of consecutive subspaces, for a law that asks.
    """

    def __init__(self, variable: Variable) -> None:
        self.variable = variable
        self.value = nn.Parameter(variable.value.new_zeros(0, 0), requires_grad=False)
        self.subspace: Subspace | None = None
        self.window = -1
        self.due = True
        self.whole = False
        self.age = 0
        self.kept: State = {}
        self.gap = 1
        self.likeness: list[float] = []

    @property
    def space(self) -> Subspace | None:
        """What the coordinates are coordinates of."""
        return Full(self.variable.shape) if self.whole else self.subspace

    def open(self, subspace: Subspace, whole: bool = False) -> None:
        """Begin a window; `value` stays the same Parameter where its shape does."""
        self.subspace, self.whole = self.variable.without_frozen_row(subspace), whole
        shape = self.variable.shape if whole else subspace.coords_shape
        if self.value.shape != shape:
            self.value = nn.Parameter(self.variable.value.new_zeros(shape), requires_grad=False)
        self.window += 1
        self.age = 0
        self.due = False

    @torch.no_grad()
    def move(
        self,
        gradient: Tensor,
        residual: Residual,
        step: Step,
        lr: float,
        scale: float,
        settings: Mapping[str, Any],
    ) -> None:
        """Move the weight by its gradient `(m, n)`; `value` is zero before and after.

        Args:
            step: see `residuals.Residual`.
            settings: the optimizer's.
        """
        assert self.subspace is not None  # the engine opens a window before the first use
        if lr:
            window = Window(self.subspace, self.whole, lr, scale, self.age, settings)
            residual(self.variable.value.data, gradient, window, step, self.kept)
        self.value.data.zero_()
        self.age += 1

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and strings from which `load` continues."""
        subspace = self.subspace
        return {
            "subspace": type(subspace).__name__,
            "tensors": {} if subspace is None else subspace.tensors(),
            "kept": {name: tensor.clone() for name, tensor in self.kept.items()},
            **self.numbers(),
        }

    def numbers(self) -> dict[str, Any]:
        """Its state but for tensors."""
        own = {"window": self.window, "due": self.due, "whole": self.whole, "age": self.age}
        return {**own, "gap": self.gap, "likeness": list(self.likeness)}

    def put_back(self, numbers: Mapping[str, Any]) -> None:
        """Have these numbers again, of which `subspace` is already; the coordinates are zero, as between two steps."""
        self.window, self.due, self.whole = numbers["window"], numbers["due"], numbers["whole"]
        self.age, self.gap, self.likeness = numbers["age"], numbers["gap"], list(numbers["likeness"])
        space = self.space
        shape = (0, 0) if space is None else space.coords_shape
        if self.value.shape != shape:
            self.value = nn.Parameter(self.variable.value.new_zeros(shape), requires_grad=False)
        self.value.data.zero_()

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        device = self.variable.value.device
        tensors = {k: t.to(device) for k, t in state["tensors"].items()}
        self.subspace = rebuild(state["subspace"], tensors) if tensors else None
        self.put_back(state)
        self.kept = {name: tensor.to(device, copy=True) for name, tensor in state["kept"].items()}
