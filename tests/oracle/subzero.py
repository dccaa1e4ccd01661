"""SubZero (arXiv 2410.08989, algorithms 1 and 2, norm alignment of its released code) as a plain loop.

W <- W - lr c s U Z Vᵀ, s = sqrt(m n) / r, U and V the QR factors of Gaussians, drawn every `interval` steps, c the
slope along s U Z Vᵀ; vectors move along a full Gaussian. Nothing of zolr is used but the numbers, by name.
"""

from math import sqrt

import torch
from oracle.mezo import gaussian, loss_at

from zolr.keys import Key


def orthonormal(gauss):
    """The Q of a QR factorization with a positive diagonal."""
    q, upper = torch.linalg.qr(gauss.double())
    return q * upper.diagonal().sign()


def run(model, loss, batches, *, lr, eps, rank, interval, seed=0):
    """Weights after each step."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    history, bases = [], {}
    for step, batch in enumerate(batches):
        if step % interval == 0:
            window = Key(seed).fold_in("subspace", step // interval)
            for n, w in weights.items():
                if w.dim() == 2:
                    u = orthonormal(window.fold_in(n, "left").normal((w.shape[0], rank)))
                    v = orthonormal(window.fold_in(n, "right").normal((w.shape[1], rank)))
                    bases[n] = u, v, sqrt(w.shape[0] * w.shape[1]) / rank
        z = gaussian({n: (rank, rank) if n in bases else w.shape for n, w in weights.items()}, seed, step)
        for n, (u, v, scale) in bases.items():
            z[n] = scale * u @ z[n] @ v.T
        plus = loss_at(model, loss, {n: w + eps * z[n] for n, w in weights.items()}, batch)
        minus = loss_at(model, loss, {n: w - eps * z[n] for n, w in weights.items()}, batch)
        slope = (plus - minus) / (2 * eps)
        weights = {n: w - lr * slope * z[n] for n, w in weights.items()}
        history.append(dict(weights))
    return history
