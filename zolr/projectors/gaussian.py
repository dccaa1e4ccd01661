"""Independent Gaussian entries: the law of FLORA, RSO and LOZO."""

from dataclasses import dataclass

from torch import Tensor

from zolr.keys import Key
from zolr.projectors import OneSided, gaussian_basis


@dataclass(frozen=True)
class Gaussian(OneSided):
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

    def _basis(self, n: int, r: int, key: Key, like: Tensor) -> Tensor:
        return gaussian_basis(n, r, key, like, self.c)
