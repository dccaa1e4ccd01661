"""The range of a gradient, found by a random product."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from zolr.factorizations import orthonormal
from zolr.keys import Key
from zolr.projectors import (
    Fixed,
    Side,
    check_rank,
    check_side,
    demanded,
    one_sided,
    oriented,
)
from zolr.subspaces import Subspace


@dataclass(frozen=True)
class RangeFinder(Fixed):
    """Subspace of `orth(Gᵀ Omega)`, Omega Gaussian with r columns, of the gradient at hand when a window begins.

    Close to the leading singular directions where the spectrum falls fast, at the price of a thin product and a thin QR
    instead of an SVD. The basis `P (n, r)` is orthonormal and has no scale: biased, as `svd` is.

    Args:
        rank: r, at least 1; capped at the shorter side.
        side: "right" (input side), "left" (output side), or "short" (the smaller one).

    Raises:
        UsageError: rank below 1, or an unknown side.

    Reference: Halko, Martinsson, Tropp 2011 (algorithm 4.1, no oversampling); LORENZA arXiv 2502.19571.
    """

    rank: int = 8
    side: Side = "short"
    needs: ClassVar[Literal["nothing", "gradient"]] = "gradient"
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_side(self.side)

    def draw(
        self, shape: tuple[int, ...], key: Key, *, like: Tensor, gradient: Tensor | None = None, **_: Any
    ) -> Subspace:
        """Take the subspace of one weight from its gradient.

        Raises:
            UsageError: no gradient.
        """
        gradient = demanded(gradient, self)
        grad = oriented(self.side, gradient, like)  # (m, n), or (n, m)
        omega = key.normal((grad.shape[0], min(self.rank, *grad.shape))).to(grad)
        return one_sided(self.side, shape, orthonormal(grad.mT @ omega).to(like))
