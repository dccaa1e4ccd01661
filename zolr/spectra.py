"""The second moment of gradients, and optimal sampling from it.

For a weight with gradients `G (m, n)` the law of a random subspace that loses least depends on `Sigma = E[GᵀG]` (on
the projected side): its eigenvectors and eigenvalues. Here live a low-memory running estimate of `Sigma`, the
water-filled inclusion probabilities, and a fixed-size sampling design that meets them exactly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from zolr.keys import Key
from zolr.probes import one_thread

# what was summed in float32 is known to this part of the largest; less than that is rounding, or nothing
_KNOWN = 1e-6


def inclusion_probabilities(sigma: Tensor, rank: int) -> Tensor:
    """Water-filled probabilities `pi_i = min(1, sqrt(sigma_i) / lambda)` that sum to `min(rank, support)`.

    They minimize `sum_i sigma_i / pi_i` over all `0 <= pi <= 1` with that sum.

    Args:
        sigma: `(n,)` eigenvalues of `E[GᵀG]`, not negative, in any order.
        rank: number of directions to draw.

    Returns:
        `(n,)` float64 on the host; 0 where sigma is 0.

    Reference: arXiv 2603.20632 (instance-dependent optimum); arXiv 2505.09647 (minimum-distortion bound).
    """
    root = sigma.detach().double().cpu().clamp_min(0).sqrt()
    s, order = root.sort(descending=True)
    suffix = s.flip(0).cumsum(0).flip(0)  # (n,): sum of s from i on
    places = torch.arange(len(s))
    # fix pi = 1 while the next root is at least its share of what is left: s[t] (rank - t) >= sum_{i >= t} s[i]
    full = (s * (rank - places) >= suffix) & (places < rank)
    # no number is read from a tensor, so that this runs in the middle of a backward pass under fake tensors too
    tau = full.long().cumprod(0).sum()
    left = suffix.gather(0, tau.clamp_max(len(s) - 1).reshape(1)).clamp_min(torch.finfo(s.dtype).tiny)
    pi = torch.where(places < tau, 1.0, (rank - tau) * s / left).clamp_max(1.0) * (s > 0)
    return torch.empty_like(pi).scatter_(0, order, pi)


def mixed_probabilities(sigma: Tensor, rank: int, alpha: float) -> Tensor:
    """`(1 - alpha)` of the water-filled probabilities and `alpha` of the uniform ones, which sum to `rank`.

    With them an estimate is unbiased whatever is wrong with `sigma`. What fewer items than `rank` leave is spent on the
    others uniformly.

    Args:
        sigma: `(n,)`, see `inclusion_probabilities`.
        rank: number to draw, at most n.
        alpha: in [0, 1].
    """
    pi = inclusion_probabilities(sigma, rank)
    spare = rank - float(pi.sum())
    if spare > 0.5:  # fewer directions carry anything than may be drawn: spend the others uniformly
        free = pi == 0
        pi = torch.where(free, spare / free.sum(), pi)
    return (1 - alpha) * pi + alpha * rank / len(pi)


def sample(pi: Tensor, key: Key, size: int | None = None) -> Tensor:
    """Draw a set of fixed size with exactly the inclusion probabilities `pi`.

    Systematic sampling in random order: one uniform number, and every item whose stretch of the cumulative sum holds
    it plus an integer. Weighted sampling without replacement as in `torch.multinomial` has other marginals.

    Args:
        pi: `(n,)` in [0, 1] with an integer sum r.
        size: r, where the caller knows it; otherwise it is read from `pi`.

    Returns:
        `(r,)` indices, int64, in random order.

    Reference: Madow 1949 (systematic sampling).
    """
    size = round(float(pi.sum())) if size is None else size
    order = key.fold_in("order").permutation(len(pi))
    ends = pi.double()[order].cumsum(0) * (size / float(pi.double().sum()))
    ends[-1] = size  # rounding must not lose or add an item
    start = key.fold_in("start").uniform()
    hits = (ends - start).floor() - torch.cat((-start.reshape(1), ends[:-1] - start)).floor()
    return picked(order, hits > 0, size)


def picked(values: Tensor, mask: Tensor, size: int) -> Tensor:
    """`values[mask]`, whose length the caller knows: so a shape depends on no value, which fake tensors do not have."""
    return values[torch.nonzero_static(mask, size=size)[:, 0]]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Running estimate of `Sigma = E[GᵀG]`: named eigenpairs and one mean eigenvalue for all other directions.

    Args:
        vectors: `(n, k)`, orthonormal columns.
        values: `(k,)` float64 on the host, not negative, descending, but those that equal `rest` come last and have arbitrary
            vectors.
        rest: mean eigenvalue of the `n - k` directions orthogonal to the named ones.
    """

    vectors: Tensor
    values: Tensor
    rest: float

    def within(self, basis: Tensor) -> Tensor:
        """`UᵀSigma U` for orthonormal `U (n, r)`: `(r, r)` float64."""
        cross = (basis.mT @ self.vectors).double().cpu()  # (r, k)
        eye = torch.eye(basis.shape[1], dtype=torch.float64)
        return cross * (self.values - self.rest) @ cross.mT + self.rest * eye

    @one_thread()
    def updated(self, basis: Tensor, moment: Tensor, named: int, rate: float = 1.0) -> "Spectrum":
        """The estimate that agrees with what was seen in a subspace, changed no more than that needs.

        `Sigma + rate * U (M - Uᵀ Sigma U) Uᵀ` is the smallest change (Frobenius) that moves the block seen in `U` to
        `M`; over random subspaces it converges to a constant `Sigma` (randomized Kaczmarz). The result is made
        positive again and cut to `named` eigenpairs, the others sharing their mean.

        Args:
            basis: orthonormal `U (n, r)`.
            moment: `M (r, r)`, the second moment of gradients seen in `U`.
            named: number of eigenpairs to keep.
            rate: in (0, 1]; smaller averages over more windows.
        """
        n = basis.shape[0]
        change = rate * (moment.double().cpu() - self.within(basis))  # (r, r)
        span = torch.linalg.qr(torch.cat((self.vectors, basis), dim=1).double().cpu())[
            0
        ]  # (n, k + r) or fewer
        named_in, basis_in = span.mT @ self.vectors.double().cpu(), span.mT @ basis.double().cpu()
        small = named_in * (self.values - self.rest) @ named_in.mT + basis_in @ change @ basis_in.mT
        shifted, rotation = torch.linalg.eigh((small + small.mT) / 2)  # eigenvalues minus rest, ascending
        values = (shifted + self.rest).clamp_min(0).flip(0)
        vectors = (span @ rotation).flip(1)
        keep = min(named, len(values))
        # what is as the rest is needs no name, and rounding alone has chosen its vectors: it gives way to all others
        apart = shifted.flip(0).abs() > _KNOWN * shifted.abs().amax()
        order = (~apart).sort(stable=True).indices
        kept = order[:keep]
        outside = n - len(values)
        left = n - keep
        total_rest = float(torch.where(apart, values, self.rest)[order[keep:]].sum()) + outside * self.rest
        rest = total_rest / left if left else self.rest
        return Spectrum(vectors[:, kept].to(basis).contiguous(), torch.where(apart, values, rest)[kept], rest)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that define it."""
        rest = torch.tensor(self.rest, dtype=torch.float64)
        return {"vectors": self.vectors, "values": self.values, "rest": rest}


def isotropic(n: int, mean: float, like: Tensor) -> Spectrum:
    """The estimate of one who has only seen the size of the gradient: all directions alike."""
    return Spectrum(like.new_zeros(n, 0), torch.zeros(0, dtype=torch.float64), mean)


class Sketch:
    """Spectrum of the second moment `sum_t x_t x_tᵀ` of vectors seen once; no `(n, n)` matrix is formed.

    Keeps `Y = sum_t x_t (x_tᵀ Ω)` for a Gaussian `Ω (n, size)` and reads the spectrum off the Nystrom approximation
    `Y (Ωᵀ Y)⁻¹ Yᵀ`.

    Args:
        n: length of the vectors.
        size: columns of the sketch; a few more than the eigenpairs wanted.
        key: name of `Ω`.
        like: its device is that of the vectors.

    Reference: Tropp et al., Fixed-rank approximation of a positive-semidefinite matrix from streaming data (2017).
    """

    def __init__(self, n: int, size: int, key: Key, like: Tensor) -> None:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.omega = torch.linalg.qr(key.normal((n, min(size, n))))[0].to(like.device, dtype)  # (n, size)
        self.seen = torch.zeros_like(self.omega)
        self.trace = torch.zeros((), device=like.device, dtype=dtype)

    def add(self, x: Tensor) -> None:
        """Add vectors `(..., n)`."""
        x = x.detach().reshape(-1, x.shape[-1]).to(self.omega)
        self.seen += x.mT @ (x @ self.omega)
        self.trace += x.square().sum()

    def spectrum(self, named: int) -> "Spectrum | None":
        """The leading eigenpairs and the mean of all other eigenvalues; None if nothing but zeros was seen."""
        seen, omega = self.seen.double().cpu(), self.omega.double().cpu()
        trace = float(self.trace)
        if not 0 < trace < float("inf"):
            return None
        core = omega.mT @ seen
        weights, axes = torch.linalg.eigh((core + core.mT) / 2)
        known = weights > _KNOWN * weights[-1]
        left = seen @ (axes * torch.where(known, weights, float("inf")).rsqrt())
        vectors, singular, _ = torch.linalg.svd(left, full_matrices=False)
        values = singular.square()
        n, keep = seen.shape[0], min(named, len(values))
        rest = trace - float(values[:keep].sum())
        rest = rest / (n - keep) if n > keep and rest > _KNOWN * trace else 0.0
        values = torch.where(values > _KNOWN * values[0], values, rest)
        return Spectrum(vectors[:, :keep].to(self.omega), values[:keep], rest)


@dataclass(frozen=True, eq=False)
class Moments:
    """What a window's gradients in the coordinates say about their second moment.

    Args:
        total: sum of the gradients, coords_shape.
        squares: sum of their second moments on the side of the basis, `(r, r)`.
        count: number of gradients.
    """

    total: Tensor
    squares: Tensor
    count: int

    def add(self, grad: Tensor, square: Tensor) -> "Moments":
        """With one more gradient and its second moment."""
        return Moments(self.total + grad, self.squares + square, self.count + 1)
