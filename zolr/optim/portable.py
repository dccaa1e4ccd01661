"""SGD whose bits are the same on every machine."""

from collections.abc import Callable
from typing import Any

import torch


class Portable(torch.optim.SGD):
    """`torch.optim.SGD`, with momentum or without, in products and sums of one rounding each.

    `b <- mu b + (1 - dampening) g`, `value <- value - lr b`. torch's kernels join product and sum into one instruction where
    the processor has it, and round twice where it has not; here every kernel is a product or a sum. Gradients are used
    up: they hold the step afterwards, so that no memory is taken. With other settings (nesterov) it is torch's.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step on every value that has a gradient."""
        if any(g["nesterov"] or g["weight_decay"] or g["maximize"] for g in self.param_groups):
            return super().step(closure)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            values = [p for p in group["params"] if p.grad is not None]
            if not values:
                continue
            steps = [p.grad for p in values]
            if group["momentum"]:
                self._gather(values, steps, group)
            torch._foreach_mul_(steps, group["lr"])  # pyright: ignore
            torch._foreach_sub_(values, steps)  # pyright: ignore
        return result

    def _gather(self, values: list[Any], steps: list[Any], group: dict[str, Any]) -> None:
        """Replace gradients by the momentum that they have become part of."""
        known = [i for i, p in enumerate(values) if self.state[p].get("momentum_buffer") is not None]
        buffers = [self.state[values[i]]["momentum_buffer"] for i in known]
        if known:
            own = [steps[i] for i in known]
            torch._foreach_mul_(buffers, group["momentum"])  # pyright: ignore
            torch._foreach_mul_(own, 1 - group["dampening"])  # pyright: ignore
            torch._foreach_add_(buffers, own)  # pyright: ignore
            torch._foreach_copy_(own, buffers)  # pyright: ignore
        for i in set(range(len(values))) - set(known):
            self.state[values[i]]["momentum_buffer"] = steps[i].clone()
