"""Orthonormal and singular vectors, the same bits for any number of threads."""

import torch
from torch import Tensor

from zolr.probes import one_thread

_BLOCK = 1 << 18  # entries of a matrix that are turned into float64 at once


def orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal columns spanning those of `matrix (n, r)`; Haar-distributed if its entries are Gaussian."""
    with one_thread():
        q, upper = torch.linalg.qr(matrix)  # (n, r), (r, r)
    sign = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(q)
    # QR alone is not Haar: fix the signs (Mezzadri 2007). Row-major, as it comes back from a file: products round by layout
    return (q * sign).contiguous()


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading singular values, descending, and right singular vectors: `(r,)` and `(n, r)`, as many as there are.

    What is below float64 is not given to an SVD. The eigenvectors of the shorter Gram matrix, `GᵀG` or `GGᵀ`, summed in
    float64, have all the digits that float32 has, which an SVD in float32 has not, for less time and with no copy of the
    matrix. In float64 the Gram matrix would lose half of them.

    Args:
        matrix: `G (m, n)`, finite.
        rank: r; capped at the shorter side.

    Returns:
        Both in float64 for a float64 matrix, else in float32.
    """
    m, n = matrix.shape
    if m < n or matrix.dtype == torch.float64:
        _, values, right = triples(matrix, rank)
        return values, right
    values, right = _of_columns(matrix, rank)
    return values.float(), right.float()


def triples(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples `(m, r)`, `(r,)`, `(n, r)`, so that `left * values @ right.T` is close to the matrix.

    See `leading`.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = triples(matrix.mT, rank)
        return left, values, right
    if matrix.dtype == torch.float64:
        with one_thread():
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return _copy(left[:, :rank]), _copy(values[:rank]), _copy(right.mT[:, :rank])
    values, right = _of_columns(matrix, rank)
    # a QR, not a division by the values: where one is zero any direction will do, but it must be orthogonal to the others
    with one_thread():
        left = orthonormal(torch.cat([rows.double() @ right for rows in _blocks(matrix)]))
    return left.float(), values.float(), right.float()


@one_thread()
def _of_columns(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading singular values `(r,)` and right vectors `(n, r)` of `(m, n)` with `n <= m`, in float64."""
    n = matrix.shape[1]
    gram = matrix.new_zeros((n, n), dtype=torch.float64)
    for rows in _blocks(matrix):
        block = rows.double()
        gram.addmm_(block.mT, block)
    squares, vectors = torch.linalg.eigh(gram)  # ascending
    return _copy(squares[-rank:].flip(0).clamp_min(0).sqrt()), _copy(vectors[:, -rank:].flip(1))


def _blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Rows that are worked on together: a copy of all in float64 would be twice the gradient."""
    return matrix.split(max(1, _BLOCK // matrix.shape[1]))


def _copy(part: Tensor) -> Tensor:
    """A copy, or the whole of a factor would live as long as a part of it; row-major, as it comes back from a file."""
    return part.clone(memory_format=torch.contiguous_format)
