"""A step on the Grassmann manifold that fits the subspace to the gradient."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zolr.errors import UsageError
from zolr.factorizations import orthonormal, triples
from zolr.keys import Key
from zolr.projectors import (
    Fixed,
    Side,
    basis_before,
    check_rank,
    check_side,
    demanded,
    geodesic,
    one_sided,
    oriented,
    start,
)
from zolr.subspaces import Subspace


@dataclass(frozen=True)
class Tracking(Fixed):
    """The subspace before, turned in one plane toward what it misses of the gradient.

    The error of the fit is `F(P) = min_A ‖G − A Pᵀ‖²`, with `A = G P` for orthonormal `P`; its negative derivative
    `2 (G − A Pᵀ)ᵀ A` is a tangent, `sigma u vᵀ` the leading part of it. The direction `P v` turns toward `u` by
    `step sigma`. The first subspace is that of the leading singular vectors of the first gradient.

    Args:
        rank: r, at least 1; capped at the shorter side.
        side: "right", "left", or "short" (the smaller one, as published).
        step: angle per unit of `sigma`, which has the units of a squared gradient, as published; None turns to where
            the fit is best along the geodesic, which depends on no unit.

    Raises:
        UsageError: rank below 1, unknown side, or a step that is not positive.

    Reference: SubTrack++ arXiv 2502.01586 (the rule; in its released code bases of tall and square matrices do not move).
    """

    rank: int = 8
    side: Side = "short"
    step: float | None = None
    needs: ClassVar[Literal["nothing", "gradient"]] = "gradient"
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_side(self.side)
        if self.step is not None and not 0 < self.step < float("inf"):
            raise UsageError(
                f"step = {self.step} moves no subspace; use a positive number, or none for the best fit"
            )

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
        """Fit the subspace of one weight to its gradient.

        Raises:
            UsageError: no gradient.
        """
        gradient = demanded(gradient, self)
        rank = min(self.rank, *shape)
        basis = basis_before(self.side, shape, rank, previous)
        if basis is None:
            basis = start(self.side, shape, rank, key, like, gradient)
        elif basis.shape[0] > basis.shape[1]:
            basis = self._turned(orthonormal(basis), oriented(self.side, gradient, like))
        return one_sided(self.side, shape, basis.to(like))

    def _turned(self, basis: Tensor, grad: Tensor) -> Tensor:
        inside = grad @ basis  # (m, r)
        tangent = grad.mT @ inside  # (n, r)
        for _ in range(2):  # twice is enough for full precision
            tangent = tangent - basis @ (basis.mT @ tangent)
        u, sigma, v = triples(tangent, 1)  # (n, 1), (1,), (r, 1)
        if self.step is None:
            # |G (P v cos + u sin)|² is largest where tan(2 angle) = 2 sigma / (|G P v|² - |G u|²)
            more = (inside @ v).square().sum() - (grad @ u).square().sum()
            angle = torch.atan2(2 * sigma, more) / 2
        else:
            angle = 2 * self.step * sigma
        # a gradient inside the span has no tangent but rounding noise, which is no direction to turn to
        noise = grad.shape[1] * torch.finfo(grad.dtype).eps * inside.square().sum()
        angle = torch.where(sigma > noise, angle, torch.zeros_like(angle))
        return geodesic(basis, u, angle, v).contiguous()
