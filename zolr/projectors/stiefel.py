"""Haar-Stiefel: the optimal law when nothing is known of the gradient."""

from dataclasses import dataclass

from torch import Tensor

from zolr.keys import Key
from zolr.projectors import OneSided, haar, lengthened


@dataclass(frozen=True)
class Stiefel(OneSided):
    """Haar-distributed subspace, scaled to be unbiased.

    Draws `Q (n, r)` uniform on the Stiefel manifold and uses `P = sqrt(c n / r) Q`, so `E[P Pᵀ] = c I` and
    `PᵀP = (c n / r) I` exactly. At `c = 1` the relative error `E‖G P Pᵀ − G‖² / ‖G‖²` is `n / r − 1` for every `G`,
    the least that a rank-r unbiased draw can promise when nothing is known of `G`.

    Args:
        rank: r, at least 1; capped at the projected dimension.
        side: "right" projects the input dimension (under backprop only this frees activations), "left" the output
            dimension, "short" the smaller one.
        c: isotropy constant; 1 is unbiased.

    Raises:
        UsageError: rank below 1, unknown side, or c not positive.

    Reference: arXiv 2603.20632 (instance-independent optimum); Mezzadri 2007 (sampling).

    >>> import torch
    >>> s = Stiefel(rank=2).draw((3, 8), Key(0), like=torch.zeros(3, 8))
    >>> s.coords_shape, bool(torch.allclose(s.basis.T @ s.basis, 4 * torch.eye(2), atol=1e-5))
    ((3, 2), True)
    """

    def _basis(self, n: int, r: int, key: Key, like: Tensor) -> Tensor:
        return lengthened(haar(n, r, key, like), self.c)
