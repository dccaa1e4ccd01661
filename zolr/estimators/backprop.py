"""Reverse mode through the coordinates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zolr.distributed import share_of
from zolr.errors import UsageError
from zolr.estimators import Emit, Estimate, Loss, same_noise, totals
from zolr.keys import Key
from zolr.variables import Variable, narrowed


@dataclass(frozen=True)
class Backprop:
    """Exact gradient of the mean loss in the coordinates, `G P = δᵀ (x P)` for a right subspace.

    The dense `G (m, n)` is never formed and autograd saves `x P (tokens, r)` in place of `x (tokens, n)`. During the
    backward of the last micro-batch every gradient as large as a matrix is emitted as soon as it is complete, so that a caller
    that uses it at once has one alive; those of vectors and coordinates follow together. Those of earlier micro-batches are
    summed, or handed to `Variable.gathered` as they come.
    """

    paradigm: ClassVar[Literal["fo", "zo", "fwd"]] = "fo"
    exact: ClassVar[bool] = True

    def forwards(self, batches: int) -> int:
        """One forward and a backward (counted as two) a micro-batch."""
        return 3 * batches

    def __call__(
        self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], emit: Emit, key: Key
    ) -> Estimate:
        """Emit the gradients; see `Estimator`.

        Raises:
            UsageError: the loss has no derivative, or gives it in parts.
        """
        share = share_of(batches)
        emit = share.in_order(variables, emit)
        values = [v.value for v in variables]
        named = {id(v.value): v for v in variables}
        pending = dict(named)  # those whose gradient is not there yet
        # complete, and too small for the order to matter: they are divided in one call
        late: list[Variable] = []
        handles = []
        total: Tensor | None = None
        n: Tensor | float = 0.0
        count: Tensor | float = 0.0
        differentiable = False

        def gather(value: Tensor) -> None:
            gathered = named[id(value)].gathered
            if gathered is not None and value.grad is not None:
                gathered.add(value.grad, n)
                value.grad = None

        def hand_over(value: Tensor) -> None:
            if value.grad is None:  # what makes gradients of several values at once had none for this one
                return
            variable = named[id(value)]
            waits = variable.gathered is None and not (variable.space.blocked or share.split)
            if id(value) not in pending:
                if waits:  # its parts add up until then
                    return
                raise UsageError(
                    f"a weight of shape {tuple(value.shape)} got its gradient in two parts, as reentrant checkpointing of a module "
                    "that is used twice does; use checkpoint(..., use_reentrant=False)"
                )
            del pending[id(value)]
            if waits:
                late.append(variable)
                return
            if variable.gathered is not None:
                if share.split:  # then all of it goes the same way, and only coordinates travel
                    variable.gathered.add(value.grad, n)
                    value.grad.zero_()
                variable.gathered.divide(count)
            gradient, value.grad = value.grad, None
            assert gradient is not None
            emit(variable, gradient if isinstance(count, float) and count == 1.0 else gradient.div_(count))

        try:
            for value in values:
                value.requires_grad_(True)
                value.grad = None
            with same_noise(values[0].device), torch.enable_grad():
                for i, batch in enumerate(batches):
                    # around backward too: what is computed again there has to see the same
                    with narrowed(variables):
                        part, n = totals(loss(batch))
                        count = count + n
                        total = part.detach().double() if total is None else total + part.detach().double()
                        if i == len(batches) - 1:
                            total, count = share.sums(total, count)
                        if i in (0, len(batches) - 1):
                            for handle in handles:
                                handle.remove()
                            hook = hand_over if i == len(batches) - 1 else gather
                            handles = [v.register_post_accumulate_grad_hook(hook) for v in values]
                        if part.requires_grad:
                            differentiable = True
                            part.backward()
                        del part
            if total is None:  # no micro-batch here
                total, count = share.sums(values[0].new_zeros((), dtype=torch.float64), 0.0)
            elif not differentiable and float(count) > 0:  # a batch without labels has no derivative either
                raise UsageError(
                    "the loss has no derivative in any trained weight; use paradigm 'zo' (--paradigm zo), or another loss"
                )
            for variable in list(pending.values()):  # no path to the loss in the last micro-batch
                if variable.value.grad is None:
                    variable.value.grad = torch.zeros_like(variable.value)
                with torch.no_grad():
                    hand_over(variable.value)
            gradients: list[Any] = [v.value.grad for v in late]
            for variable in late:
                variable.value.grad = None
            if gradients and not (isinstance(count, float) and count == 1.0):
                torch._foreach_div_(gradients, count)  # pyright: ignore
            for variable, gradient in zip(late, gradients, strict=True):
                emit(variable, gradient)
        finally:
            for handle in handles:
                handle.remove()
            for value in values:
                value.grad = None
        return Estimate(total / count)
