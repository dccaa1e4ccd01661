"""Orthonormal bases on both sides: the subspace of SubZero."""

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, Literal

from torch import Tensor

from zolr.keys import Key
from zolr.projectors import Fixed, check_rank, haar
from zolr.subspaces import Subspace, TwoSided


@dataclass(frozen=True)
class TwoSidedHaar(Fixed):
    """`lift(B) = U B Vᵀ` with Haar `U (m, r)`, `V (n, r)` and scale `sqrt(c m n) / r`.

    `E[lift(project(G))] = c G`. Only `r²` coordinates a weight, at the price of a relative error of `m n / r² − 1`
    under backprop.

    Args:
        rank: r, at least 1; capped at either side.
        c: isotropy constant; 1 is unbiased.

    Raises:
        UsageError: rank below 1 or c not positive.

    Reference: SubZero arXiv 2410.08989 (norm alignment as in its released code: `sqrt(m n) / r`).
    """

    rank: int = 8
    c: float = 1.0
    needs: ClassVar[Literal["nothing", "gradient"]] = "nothing"
    unbiased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rank(self.rank, self.c)

    def draw(self, shape: tuple[int, ...], key: Key, *, like: Tensor, **_: Any) -> Subspace:
        """Draw the subspace of one weight."""
        m, n = shape
        r, s = min(self.rank, m), min(self.rank, n)
        u, v = haar(m, r, key.fold_in("left"), like), haar(n, s, key.fold_in("right"), like)
        return TwoSided((u * (self.c**0.5 * sqrt(m / r))).to(like), (v * sqrt(n / s)).to(like))
