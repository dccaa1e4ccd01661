"""Forget what the subspace does not hold."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zolr.residuals import Plain, State, Step, Window, add_lifted


@dataclass(frozen=True)
class Drop(Plain):
    """`W += scale * lift(step(project(G)))`: a dense method then equals one that never forms dense gradients.

    Reference: GaLore arXiv 2403.03507.
    """

    dense: ClassVar[bool] = False

    def __call__(self, weight: Tensor, gradient: Tensor, window: Window, step: Step, state: State) -> None:
        """Move the weight; see `Residual`."""
        change = step(window.subspace.project(gradient))
        add_lifted(weight, window.subspace, change, window.scale)
