"""Subsampled randomized Hadamard transform: exact on any machine where the side is a power of two."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from zolr.factorizations import orthonormal
from zolr.keys import Key
from zolr.probes import counters
from zolr.projectors import OneSided, working_dtype


def hadamard_columns(columns: Tensor, n: int) -> Tensor:
    """`(n, r)` entries +-1 of the Sylvester-Hadamard matrix of the next power of two, cut to its first n rows."""
    bits = torch.arange(n)[:, None] & columns  # (n, r)
    parity = torch.zeros_like(bits)
    for _ in range((n - 1).bit_length()):
        parity ^= bits & 1
        bits = bits >> 1
    return 1.0 - 2.0 * parity


@dataclass(frozen=True)
class Srht(OneSided):
    """Random signs times random columns of a Hadamard matrix.

    For `n` a power of two the columns are orthogonal and every entry is `+- sqrt(c / r)`: the same class, and the same
    error, as `stiefel`, from integer arithmetic. For other `n` the columns of the next power of two are cut, which are
    not orthogonal any more; they are made so again by QR and their rows permuted, which keeps `E[P Pᵀ] = c I` and
    `PᵀP = (c n / r) I` exact, but not the portability of the bits.

    Args:
        rank: r, at least 1; capped at the projected dimension.
        side: "right", "left" or "short".
        c: isotropy constant; 1 is unbiased.

    Raises:
        UsageError: rank below 1, unknown side, or c not positive.
    """

    def _basis(self, n: int, r: int, key: Key, like: Tensor) -> Tensor:
        power = 1 << (n - 1).bit_length()
        signs = key.fold_in("signs").signs(counters("srht", 0, n, torch.device("cpu")))[:n]
        columns = hadamard_columns(key.fold_in("columns").permutation(power)[:r], n).to(
            working_dtype(like)
        )  # (n, r)
        if power == n:
            basis = columns * sqrt(self.c / r)
        else:
            # cut columns are not orthogonal; a uniform permutation of the rows of an orthonormal basis of their span
            # gives E[P Pᵀ] the same diagonal everywhere, and the signs take its other entries away
            q = orthonormal(columns)
            basis = q[key.fold_in("rows").permutation(n)] * sqrt(self.c * n / r)
        return signs[:, None] * basis
