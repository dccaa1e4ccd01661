"""A linear map with the path of its coordinates beside it, in as few operations as there can be.

As autograd sees it, `x Wᵀ + (x P) Bᵀ` has a sum in forward and another in backward, each of which reads two tensors as large as
activations and writes a third. Written by hand both sums are part of a product that is there anyway.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zolr.subspaces import Left, Right, Subspace


def covers(subspace: Subspace) -> bool:
    """Whether `linear` knows this kind of subspace."""
    return isinstance(subspace, (Left, Right))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, decay: float, subspace: Left | Right, coords: Tensor
) -> Tensor:
    """`x (decay W + lift(coords))ᵀ + bias`, differentiable in `x`, `bias` and `coords`.

    Of `x` only `x P` is kept for backward where the basis is on the input side.

    Args:
        x: inputs `(..., n)`.
        weight: stored weight `(m, n)`, of the type of `x`.
        bias: `(m,)`, of that type.
        decay: factor on the stored weight.
        subspace: of the weight, its basis of that type.
        coords: coordinates in it, of that type.
    """
    return _Beside.apply(x, coords, bias, weight, subspace.basis, decay, isinstance(subspace, Right))


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        coords: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        basis: Tensor,
        decay: float,
        right: bool,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (T, n)
        ctx.decay, ctx.right, ctx.shape = decay, right, x.shape
        # what is returned is no view, as what F.linear makes of a bias may be: a model may write into it
        out = x.new_empty(*x.shape[:-1], len(weight))
        flat, scaled = out.view(-1, len(weight)), rows if decay == 1.0 else rows * decay
        if bias is None:
            torch.mm(scaled, weight.mT, out=flat)
        else:
            torch.addmm(bias, scaled, weight.mT, out=flat)
        first, second = (basis, coords.mT) if right else (coords.mT, basis.mT)
        inner = rows @ first  # (T, r)
        # of the input side only x P is needed again; the other side needs all of x
        ctx.save_for_backward(inner if right else rows, coords, weight, basis)
        flat.addmm_(inner, second)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept, coords, weight, basis = ctx.saved_tensors
        rows = grads[0].reshape(-1, grads[0].shape[-1])  # (T, m)
        of_x = of_coords = of_bias = None
        needs_x, needs_coords, needs_bias = ctx.needs_input_grad[:3]
        inner = rows @ (coords if ctx.right else basis) if needs_x or not ctx.right else None  # (T, r)
        if needs_coords:
            of_coords = rows.mT @ kept if inner is None or ctx.right else inner.mT @ kept
        if needs_x:
            assert inner is not None
            of_x = rows @ weight
            of_x = of_x if ctx.decay == 1.0 else of_x.mul_(ctx.decay)
            of_x = of_x.addmm_(inner, basis.mT if ctx.right else coords).view(ctx.shape)
        if needs_bias:
            of_bias = rows.sum(0)
        return of_x, of_coords, of_bias, None, None, None, None
