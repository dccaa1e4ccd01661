"""One optimizer made of several, each for its own shapes of tensors."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch


class ByShape(torch.optim.Optimizer):
    """Several torch optimizers that look like one: shared groups, shared state, one `step`.

    Args:
        parts: optimizers over disjoint parameters.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        # no defaults: a scheduler takes those for settings that every group has
        super().__init__([p for part in parts for g in part.param_groups for p in g["params"]], {})
        self.parts = list(parts)
        self.param_groups = [{**g, "part": i} for i, part in enumerate(self.parts) for g in part.param_groups]
        self.state = defaultdict(dict)
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every part."""
        if closure is not None:
            raise ValueError("ByShape takes no closure; compute gradients before the step")
        for i, part in enumerate(self.parts):
            part.param_groups = [group for group in self.param_groups if group["part"] == i]
            part.step()
