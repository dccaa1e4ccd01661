"""Independent Haar subspaces after a first one that a gradient gives."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from zolr.keys import Key
from zolr.projectors import (
    Fixed,
    Side,
    check_rank,
    check_side,
    haar,
    lengthened,
    one_sided,
    projected_length,
    start,
)
from zolr.subspaces import Subspace


@dataclass(frozen=True)
class Jump(Fixed):
    """The leading singular vectors of the first gradient, then a fresh Haar subspace at every refresh.

    Two windows share `r / n` of their energy on average.

    Args:
        rank: r, at least 1; capped at the projected dimension.
        side: "right", "left", or "short" (the smaller one, as published).
        c: scale of the basis, `PᵀP = (c n / r) I`; 1 is unbiased after the first window, None for orthonormal columns.

    Raises:
        UsageError: rank below 1, unknown side, or c not positive.

    Reference: arXiv 2510.01878; Mezzadri 2007 (sampling).
    """

    rank: int = 8
    side: Side = "short"
    c: float | None = None
    needs: ClassVar[Literal["nothing", "gradient"]] = "nothing"
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_rank(self.rank, 1.0 if self.c is None else self.c)
        check_side(self.side)

    def draw(
        self,
        shape: tuple[int, ...],
        key: Key,
        *,
        like: Tensor,
        gradient: Tensor | None = None,
        previous: Subspace | None = None,
        **_: Any,
    ) -> Subspace:
        """Draw the subspace of one weight."""
        n = projected_length(self.side, shape)
        r = min(self.rank, n)
        if previous is None:
            basis = start(self.side, shape, r, key, like, gradient)
        else:
            basis = haar(n, r, key, like)
        return one_sided(self.side, shape, lengthened(basis, self.c).to(like))
