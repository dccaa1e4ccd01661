"""One step of subspace iteration from the subspace before."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from zolr.errors import UsageError
from zolr.factorizations import orthonormal
from zolr.keys import Key
from zolr.projectors import (
    Fixed,
    Side,
    basis_before,
    check_rank,
    check_side,
    demanded,
    is_right,
    one_sided,
    oriented,
    start,
)
from zolr.subspaces import Subspace


@dataclass(frozen=True)
class PowerIteration(Fixed):
    """The leading directions of a mix of momentum and gradient, by one step of power iteration.

    `P' = QR(BᵀB P)` with `B = rho M Pᵀ + (1 − rho) G`, where `M` is the mean gradient that the optimizer keeps in the
    coordinates of `P`; `B` itself is never formed. The first subspace is that of the leading singular vectors of the
    first gradient.

    Args:
        rank: r, at least 1; capped at the shorter side.
        side: "right", "left", or "short" (the smaller one, as published).
        rho: weight of the momentum, from 0 to below 1.

    Raises:
        UsageError: rank below 1, unknown side, or rho out of range.

    Reference: LDAdam arXiv 2410.16103 (rho 0.908 as in its released code).
    """

    rank: int = 8
    side: Side = "short"
    rho: float = 0.908
    needs: ClassVar[Literal["nothing", "gradient"]] = "gradient"
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_side(self.side)
        if not 0 <= self.rho < 1:
            raise UsageError(f"rho = {self.rho} is no weight of the momentum; use at least 0 and less than 1")

    def draw(
        self,
        shape: tuple[int, ...],
        key: Key,
        *,
        like: Tensor,
        gradient: Tensor | None = None,
        previous: Subspace | None = None,
        momentum: Tensor | None = None,
        **_: Any,
    ) -> Subspace:
        """Take the subspace of one weight from its gradient and momentum.

        Raises:
            UsageError: no gradient.
        """
        gradient = demanded(gradient, self)
        rank = min(self.rank, *shape)
        basis = basis_before(self.side, shape, rank, previous)  # (n, r)
        if basis is None or previous is None:
            return one_sided(self.side, shape, start(self.side, shape, rank, key, like, gradient).to(like))
        grad = oriented(self.side, gradient, like)  # (m, n)
        share = 0.0 if momentum is None else self.rho
        product = (1 - share) * grad @ basis  # (m, r), of B P
        if momentum is not None:
            product = product + share * self._turned(momentum, shape).to(grad)
        turned = (1 - share) * grad.mT @ product  # (n, r), of Bᵀ B P
        if momentum is not None:
            mean = self._turned(previous.dual(momentum), shape).to(grad)
            turned = turned + share * basis @ (mean.mT @ product)
        return one_sided(self.side, shape, orthonormal(turned).to(like))

    def _turned(self, coords: Tensor, shape: tuple[int, ...]) -> Tensor:
        return coords if is_right(self.side, shape) else coords.mT
