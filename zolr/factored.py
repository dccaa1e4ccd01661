"""A second moment of gradients kept as its row and column means: the factored moment of Adafactor.

For gradients `G (m, n)` with running means `r (m,)` and `c (n,)` of `G²` over rows and columns, `V = r cᵀ / mean(r)` has
those means and the least divergence from the full moment (Shazeer and Stern 2018). Vectors keep their squares as they are.
"""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

FLOOR = 1e-30  # added to squares, so that what has never met a gradient can be divided by


def observe(
    state: MutableMapping[str, Any], gradient: Tensor, fresh: float | Tensor, floor: float = FLOOR
) -> None:
    """`V <- (1 - fresh) V + fresh G²`, in the factors.

    Args:
        state: holds `rows` and `columns`, or `squares` of a vector; made at the first call.
        gradient: of any shape; the last two dimensions are factored.
        fresh: weight of this gradient, in (0, 1]; a 0-dim tensor costs no wait for the device.
        floor: added to every square.

    Reference: Adafactor arXiv 1804.04235.
    """
    if gradient.dim() < 2:
        squares = gradient.square() + floor
        _averaged(state, "squares", squares, fresh)
        return
    # a norm has no second matrix of squares on the way
    for name, dim in (("rows", -1), ("columns", -2)):
        # under fake tensors torch 2.11 keeps an axis of one entry that it was to drop
        norm = torch.linalg.vector_norm(gradient, dim=dim, keepdim=True).squeeze(dim)
        mean = norm.square() / gradient.shape[dim]
        _averaged(state, name, mean + floor, fresh)


def _averaged(state: MutableMapping[str, Any], name: str, seen: Tensor, fresh: float | Tensor) -> None:
    if name not in state:
        state[name] = torch.zeros_like(seen)
    state[name] += fresh * (seen - state[name])


def divide(
    matrix: Tensor, state: MutableMapping[str, Any], eps: float = 0.0, factor: float | Tensor = 1.0
) -> Tensor:
    """`matrix / (sqrt(factor V) + eps)` in place.

    Args:
        state: as `observe` keeps it.
        factor: on the moment, for a bias correction.
    """
    if matrix.dim() < 2:
        return matrix.div_((factor * state["squares"]).sqrt_().add_(eps))
    rows, columns = state["rows"], state["columns"]
    left = (factor * rows / rows.mean(-1, keepdim=True)).sqrt_().unsqueeze(-1)
    right = columns.sqrt().unsqueeze(-2)
    if eps:
        return matrix.div_((left * right).add_(eps))
    return matrix.div_(left).div_(right)


def clipped(update: Tensor, threshold: float) -> Tensor:
    """`update / max(1, rms(update) / threshold)` in place."""
    return update.div_((rms(update) / threshold).clamp_min_(1.0))


def rms(matrix: Tensor) -> Tensor:
    """Root mean square of the entries, shape ()."""
    return torch.linalg.vector_norm(matrix) / max(1, matrix.numel()) ** 0.5
