"""A random walk on the Grassmann manifold."""

from dataclasses import dataclass
from math import pi
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zolr.errors import UsageError
from zolr.factorizations import orthonormal
from zolr.keys import Key
from zolr.probes import one_thread
from zolr.projectors import (
    Fixed,
    Side,
    basis_before,
    check_rank,
    check_side,
    geodesic,
    lengthened,
    one_sided,
    start,
)
from zolr.subspaces import Subspace


@dataclass(frozen=True)
class Walk(Fixed):
    """The subspace before, turned along a random geodesic by a stated angle.

    `X (n, r)` is Gaussian and `D = (I − P Pᵀ) X = U S Vᵀ`; the direction `P v_i` turns toward `u_i` by
    `angle S_i / S_1`, so that the largest principal angle between two windows is `angle` whatever the size of the
    matrix. The first subspace is that of the leading singular vectors of the gradient where one is at hand, else Haar;
    from there every subspace of the walk is Haar too.

    Args:
        rank: r, at least 1; capped at the projected dimension, where a walk has nowhere to go.
        side: "right", "left", or "short" (the smaller one, as published).
        angle: largest principal angle of a step in radians, above 0 and at most pi / 2.
        c: scale of the basis, `PᵀP = (c n / r) I`: with a Haar start 1 is unbiased; None for orthonormal columns.

    Raises:
        UsageError: rank below 1, unknown side, angle out of range, or c not positive.

    Reference: arXiv 2510.01878 (a random step on the Grassmannian; that it is stated as an angle is ours).

    >>> import torch
    >>> first = Walk(rank=2, angle=0.3).draw((9, 8), Key(0), like=torch.zeros(9, 8))
    >>> then = Walk(rank=2, angle=0.3).draw((9, 8), Key(1), like=torch.zeros(9, 8), previous=first)
    >>> round(float(torch.linalg.svdvals(first.basis.T @ then.basis)[-1].acos()), 2)
    0.3
    """

    rank: int = 8
    side: Side = "short"
    angle: float = 0.5
    c: float | None = None
    needs: ClassVar[Literal["nothing", "gradient"]] = "nothing"
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_rank(self.rank, 1.0 if self.c is None else self.c)
        check_side(self.side)
        if not 0 < self.angle <= pi / 2:
            raise UsageError(
                f"angle = {self.angle} is no step between subspaces; use radians above 0 and at most pi / 2"
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
        """Draw the subspace of one weight."""
        basis = basis_before(self.side, shape, self.rank, previous)
        if basis is None:
            basis = start(self.side, shape, self.rank, key, like, gradient)
        else:
            # on the host, as all that a key draws; made orthonormal, whatever its scale and with a padding row cut out
            basis = self._turned(orthonormal(basis.cpu()), key)
        return one_sided(self.side, shape, lengthened(basis, self.c).to(like))

    @one_thread()
    def _turned(self, basis: Tensor, key: Key) -> Tensor:
        if basis.shape[0] == basis.shape[1]:
            return basis  # there is nowhere to go
        horizontal = key.normal(basis.shape).to(basis)  # (n, r)
        for _ in range(2):  # twice is enough for full precision
            horizontal = horizontal - basis @ (basis.mT @ horizontal)
        u, s, vt = torch.linalg.svd(horizontal, full_matrices=False)  # (n, r), (r,), (r, r)
        return geodesic(basis, u, self.angle * s / s[0], vt.mT).contiguous()
