"""Steps divided by a factored second moment: Adafactor and AdaLomo."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zolr.errors import UsageError
from zolr.factored import FLOOR, clipped, divide, observe, rms
from zolr.optim import Each


class Factored(Each):
    """`p -= lr s U`, `U = G / sqrt(V)` with V factored, cut to a root mean square of at most `threshold`.

    `V <- (1 - t^-decay) V + t^-decay G²` at step t, so the first step is that of the sign of the gradient's mass. Unlike
    torch's Adafactor the rate is the one given: it neither shrinks with the step nor, unless asked, grows with the
    parameter, which is zero where the coordinates of a subspace begin.

    Args:
        lr: learning rate.
        decay: exponent of the second moment's memory, in (0, 1].
        threshold: largest root mean square of an update.
        beta: memory of a running mean of the updates, from zero; 0 keeps none.
        scaled: multiply the rate by the root mean square of the parameter, `s = max(floor, rms(p))`.
        floor: least of these factors.
        eps: added to squared gradients.
        weight_decay: must be 0; decay is the engine's.

    Raises:
        UsageError: a setting out of range.

    Reference: Adafactor arXiv 1804.04235; AdaLomo arXiv 2310.10195 (`scaled`).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        decay: float = 0.8,
        threshold: float = 1.0,
        beta: float = 0.0,
        scaled: bool = False,
        floor: float = 1e-3,
        eps: float = FLOOR,
        weight_decay: float = 0.0,
    ) -> None:
        if not 0 < decay <= 1 or not threshold > 0 or not 0 <= beta < 1:
            raise UsageError(
                f"decay = {decay}, threshold = {threshold}, beta = {beta} are out of range; use decay in (0, 1], a "
                "positive threshold, beta in [0, 1)"
            )
        super().__init__(
            params,
            {
                "lr": lr,
                "decay": decay,
                "threshold": threshold,
                "beta": beta,
                "scaled": scaled,
                "floor": floor,
                "eps": eps,
                "weight_decay": weight_decay,
            },
        )

    def _move(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
        state["step"] += 1
        observe(state, gradient, float(state["step"]) ** -group["decay"], group["eps"])
        update = divide(gradient.clone(), state)
        if group["beta"]:
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(update)
            update = state["exp_avg"].lerp_(update, 1 - group["beta"]).clone()
        update = clipped(update, group["threshold"])
        if group["scaled"]:
            update.mul_(rms(p).clamp_min_(group["floor"]))
        p.sub_(update, alpha=group["lr"])
