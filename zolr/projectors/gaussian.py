"""Independent Gaussian entries: the law of FLORA, RSO and LOZO."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from zolr.keys import Key
from zolr.projectors import (
    Fixed,
    Side,
    check_rank,
    check_side,
    gaussian_basis,
    one_sided,
    projected_length,
)
from zolr.subspaces import Subspace


@dataclass(frozen=True)
class Gaussian(Fixed):
    """Independent `N(0, c / r)` entries.

    `E[P Pᵀ] = c I`, but `PᵀP` is the identity only on average: at `c = 1` the relative error is `(n + 1) / r`, against
    `n / r − 1` for `stiefel`.

    Args:
        rank: r, at least 1; capped at the projected dimension.
        side: "right", "left" or "short".
        c: isotropy constant. LOZO's released code draws entries of variance 1, which is `c = rank` here.

    Raises:
        UsageError: rank below 1, unknown side, or c not positive.

    Reference: FLORA arXiv 2402.03293, RSO arXiv 2502.07222, LOZO (paper's scale).
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
        return one_sided(self.side, shape, gaussian_basis(n, min(self.rank, n), key, like, self.c))
