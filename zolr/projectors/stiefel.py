"""Haar-Stiefel: the optimal law when nothing is known of the gradient."""

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, Literal

from torch import Tensor

from zolr.keys import Key
from zolr.projectors import (
    Side,
    Source,
    check_rank,
    check_side,
    haar,
    is_right,
    one_sided,
    orthonormal,
    projected_length,
    working_dtype,
)
from zolr.spectra import Spectrum
from zolr.subspaces import Subspace


@dataclass(frozen=True)
class Stiefel:
    """Haar-distributed subspace, scaled to be unbiased.

    Draws `Q (n, r)` uniform on the Stiefel manifold and uses `P = sqrt(c n / r) Q`, so `E[P Pᵀ] = c I` and
    `PᵀP = (c n / r) I` exactly. At `c = 1` the relative error `E‖G P Pᵀ − G‖² / ‖G‖²` is `n / r − 1` for every `G`,
    the least that a rank-r unbiased draw can promise when nothing is known of `G`.

    With `centered` the law is that of the space orthogonal to the mean input `u` of the layer: `E[P Pᵀ] = c (I − u uᵀ)`.
    A change of the weight along `u` adds the same to every token. That direction has a large part of the curvature (it
    moves the prior of the answers) and a small one of what tells examples apart, so forward-only steps, whose size the
    curvature limits, are better spent elsewhere. What is lost is the gradient along `u`: one column of n.

    Args:
        rank: r, at least 1; capped at the projected dimension.
        side: "right" projects the input dimension (under backprop only this frees activations), "left" the output
            dimension, "short" the smaller one.
        c: isotropy constant; 1 is unbiased.
        centered: leave the mean input of a layer out, measured on the first batch of each window, wherever the input
            side is projected. Weights that are looked up rather than multiplied (embeddings) are drawn as without.

    Raises:
        UsageError: rank below 1, unknown side, or c not positive.

    Reference: arXiv 2603.20632 (instance-independent optimum); Mezzadri 2007 (sampling); `centered` is ours.

    >>> import torch
    >>> s = Stiefel(rank=2).draw((3, 8), Key(0), like=torch.zeros(3, 8))
    >>> s.coords_shape, bool(torch.allclose(s.basis.T @ s.basis, 4 * torch.eye(2), atol=1e-5))
    ((3, 2), True)
    """

    rank: int = 8
    side: Side = "right"
    c: float = 1.0
    centered: bool = False
    needs: ClassVar[Literal["nothing", "gradient"]] = "nothing"
    unbiased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rank(self.rank, self.c)
        check_side(self.side)

    @property
    def learns_from(self) -> Source:
        """The inputs of each layer, if it is to be centered."""
        return "inputs" if self.centered else "nothing"

    @property
    def eigenpairs(self) -> int:
        """None: the mean is enough."""
        return 0

    def draw(
        self, shape: tuple[int, ...], key: Key, *, like: Tensor, spectrum: Spectrum | None = None, **_: Any
    ) -> Subspace:
        """Draw the subspace of one weight."""
        n = projected_length(self.side, shape)
        if spectrum is None or spectrum.mean is None or n == 1 or not is_right(self.side, shape):
            r = min(self.rank, n)
            q = haar(n, r, key, like)
            return one_sided(self.side, shape, (q * sqrt(self.c * n / r)).to(like))
        r = min(self.rank, n - 1)
        mean = spectrum.mean.cpu().to(working_dtype(like))  # (n,), of length 1
        gauss = key.normal((n, r)).to(mean)
        q = orthonormal(gauss - mean[:, None] * (mean @ gauss))
        return one_sided(self.side, shape, (q * sqrt(self.c * (n - 1) / r)).to(like))
