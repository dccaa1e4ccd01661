"""Random coordinate axes, drawn without replacement."""

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zolr.keys import Key
from zolr.projectors import Fixed, Side, check_rank, check_side, one_sided, projected_length, working_dtype
from zolr.subspaces import Subspace


@dataclass(frozen=True)
class Coordinate(Fixed):
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

    rank: int = 8
    side: Side = "right"
    c: float = 1.0
    needs: ClassVar[Literal["nothing", "gradient"]] = "nothing"
    unbiased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rank(self.rank, self.c)
        check_side(self.side)

    def draw(self, shape: tuple[int, ...], key: Key, *, like: Tensor, **_: Any) -> Subspace:
        """Draw the subspace of one weight."""
        n = projected_length(self.side, shape)
        r = min(self.rank, n)
        basis = torch.zeros(n, r, dtype=working_dtype(like))
        basis[key.permutation(n)[:r], torch.arange(r)] = sqrt(self.c * n / r)
        return one_sided(self.side, shape, basis.to(like))
