"""Random coordinate axes, drawn without replacement."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from zolr.keys import Key
from zolr.projectors import OneSided, working_dtype


@dataclass(frozen=True)
class Coordinate(OneSided):
    """`P = sqrt(c n / r) [e_j]` for a uniform r-subset of axes.

    Has the same mean squared error as `stiefel` for every gradient, but heavier tails where a few input features carry
    the gradient (arXiv 2603.20632 allows the whole class with `PᵀP = (c n / r) I`).

    Args:
        rank: r, at least 1; capped at the projected dimension.
        side: "right", "left" or "short".
        c: isotropy constant; 1 is unbiased.

    Raises:
        UsageError: rank below 1, unknown side, or c not positive.
    """

    def _basis(self, n: int, r: int, key: Key, like: Tensor) -> Tensor:
        basis = torch.zeros(n, r, dtype=working_dtype(like))
        basis[key.permutation(n)[:r], torch.arange(r)] = sqrt(self.c * n / r)
        return basis
