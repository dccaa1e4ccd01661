"""A linear map whose weight is put together from stored weight and coordinates, in place of two products beside it.

Beside the stored weight, backprop through `x Wᵀ + (x P) Bᵀ` takes `T r (2n + 3m)` multiplications for `T` tokens. With the
weight `W + B Pᵀ` put together it takes `T r (n + m)` for the gradient in `B`, and `m n r` each time it is put together: once a
step where every step is folded into the weight at once (the coordinates are zero then, and no copy is made), or in forward and
again in backward. What is kept for backward is the same `x P`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zolr.subspaces import Left, Right, Subspace


def pays(subspace: Subspace, tokens: int, folded: bool = False) -> bool:
    """Whether putting the weight together is the cheaper way for so many tokens.

    Args:
        folded: each step is folded into the weight; otherwise a copy is made, which has to stay below the output too.
    """
    if not isinstance(subspace, (Left, Right)):
        return False
    m, n = subspace.shape
    inner, outer = (n, m) if isinstance(subspace, Right) else (m, n)
    saved = tokens * (inner + 2 * outer)
    return saved > m * n if folded else tokens >= n and saved > 2 * m * n


def linear(
    x: Tensor, weight: Tensor, decay: float, subspace: Left | Right, coords: Tensor, zero: bool = False
) -> Tensor:
    """`x (decay W + lift(coords))ᵀ`, differentiable in `x` and `coords`.

    Args:
        x: inputs `(..., n)`.
        weight: stored weight `(m, n)`, of the type of `x`.
        decay: factor on it.
        subspace: of the weight.
        coords: coordinates in it.
        zero: the coordinates are zero, so that the stored weight is all there is.
    """
    right = isinstance(subspace, Right)
    return _Merged.apply(x, coords, weight, subspace.basis, decay, right, zero and decay == 1.0)


def _put_together(weight: Tensor, coords: Tensor, basis: Tensor, decay: float, right: bool) -> Tensor:
    left, other = (coords, basis.mT) if right else (basis, coords)
    return torch.addmm(weight, left, other, beta=decay)  # (m, n)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        coords: Tensor,
        weight: Tensor,
        basis: Tensor,
        decay: float,
        right: bool,
        zero: bool,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (T, n)
        ctx.decay, ctx.right, ctx.zero, ctx.shape = decay, right, zero, x.shape
        # of the input side only x P is needed again; the other side needs all of x
        ctx.save_for_backward(rows @ basis if right else rows, coords, weight, basis)
        # what is returned is no view: a model may write into it
        return F.linear(x, weight if zero else _put_together(weight, coords, basis, decay, right))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept, coords, weight, basis = ctx.saved_tensors
        rows = grads[0].reshape(-1, grads[0].shape[-1])  # (T, m)
        of_x = of_coords = None
        if ctx.needs_input_grad[1]:
            of_coords = rows.mT @ kept if ctx.right else (rows @ basis).mT @ kept
        if ctx.needs_input_grad[0]:
            whole = weight if ctx.zero else _put_together(weight, coords, basis, ctx.decay, ctx.right)
            of_x = (rows @ whole).view(ctx.shape)
        return of_x, of_coords, None, None, None, None, None
