"""Gradient descent that looks ahead along the gradient of the step before: extrapolation from the past."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from zolr.errors import UsageError
from zolr.optim import Each


class Optimistic(Each):
    """`p -= lr ((1 + reach) g - reach g_before)`, with no gradient before the first.

    That is extragradient with one gradient a step, seen from the points where gradients are taken: with `w` the iterates
    and `p = w - lr reach g_before` the look-ahead points, `w -= lr g(p)` moves `p` so (up to a change of the rate). `p` is
    what the model holds; `w` is `p + lr reach g_before`, a step away.

    Args:
        lr: learning rate.
        reach: how far ahead, in steps; at least 0, which is plain descent. 1 is optimistic gradient descent.
        weight_decay: must be 0; decay is the engine's.

    Raises:
        UsageError: reach out of range.

    Reference: Popov 1980; Extrapolation for large-batch training, arXiv 2006.05720.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float | Tensor = 1e-2,
        reach: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        if not 0 <= reach < float("inf"):
            raise UsageError(f"reach = {reach} is no distance; use a number of at least 0 (1 is one step)")
        super().__init__(params, {"lr": lr, "reach": reach, "weight_decay": weight_decay})

    def _move(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        lr, reach, state = group["lr"], group["reach"], self.state[p]
        if "previous" in state:
            p.sub_((gradient * (1 + reach)).sub_(state["previous"], alpha=reach).mul_(lr))
            state["previous"].copy_(gradient)
        else:
            p.sub_(gradient * (1 + reach) * lr)
            state["previous"] = gradient.clone()
