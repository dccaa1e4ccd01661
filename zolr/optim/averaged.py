"""Steps along a running mean of the gradients that starts from zero."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zolr.errors import UsageError
from zolr.optim import Each


class Averaged(Each):
    """`M <- beta M + (1 - beta) G` from `M = 0`, `p -= lr M`.

    torch's SGD with momentum starts at the first gradient instead, which gives that one gradient the weight of many.

    Args:
        lr: learning rate.
        beta: memory, in [0, 1).
        correct: divide by `1 - beta^t`, as Adam does.
        weight_decay: must be 0; decay is the engine's.

    Raises:
        UsageError: beta out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        beta: float = 0.9,
        correct: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        if not 0 <= beta < 1:
            raise UsageError(f"beta = {beta} is no memory of a mean; use a number in [0, 1)")
        super().__init__(params, {"lr": lr, "beta": beta, "correct": correct, "weight_decay": weight_decay})

    def _move(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(p)
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - group["beta"])
        size = 1 - group["beta"] ** float(state["step"]) if group["correct"] else 1.0
        p.sub_(state["exp_avg"], alpha=group["lr"] / size)
