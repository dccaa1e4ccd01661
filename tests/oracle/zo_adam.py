"""Adam and momentum on a forward-only estimate (MeZO-Adam and MeZO-momentum, arXiv 2305.17333), inside subspaces.

W moves along B Pᵀ, P = sqrt(n/r) Q with Q orthonormal, drawn every `interval` steps, with which moments start again; g is
the slope along fair signs Z times Z. Vectors have all of their space. Nothing of zolr is used but the numbers, by name.
"""

from math import sqrt

import torch
from oracle.mezo import loss_at
from oracle.subzero import orthonormal

from zolr.keys import Key
from zolr.probes import Layout, Probe, Space


def draws(shapes, seed, step, law="rademacher", probe=0):
    """The step's tensors of one probe, by name."""
    key = Key(seed).fold_in("step", step).fold_in("probe", probe)
    drawn = Probe(Layout([Space(name, tuple(shape)) for name, shape in shapes.items()]), law, key)
    return {name: drawn(name).double() for name in shapes}


def basis(name, length, rank, seed, window):
    """`(length, rank)`: scaled orthonormal columns."""
    r = min(rank, length)
    return orthonormal(Key(seed).fold_in("subspace", window, name).normal((length, r))) * sqrt(length / r)


@torch.no_grad()
def run(model, loss, batches, *, lr, eps, rank, interval, betas=(0.9, 0.99), momentum=None, seed=0):
    """Weights after each step; of heavy-ball steps `N <- b N + (1 - b) g` where momentum b is given."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    history, bases, moments = [], {}, {}
    for step, batch in enumerate(batches):
        if step % interval == 0:
            for n, w in weights.items():
                if w.dim() == 2:
                    bases[n] = basis(n, w.shape[1], rank, seed, step // interval)
                    moments.pop(n, None)
        z = draws(
            {n: (w.shape[0], bases[n].shape[1]) if n in bases else w.shape for n, w in weights.items()},
            seed,
            step,
        )
        lifted = {n: x @ bases[n].T if n in bases else x for n, x in z.items()}
        plus = loss_at(model, loss, {n: w + eps * lifted[n] for n, w in weights.items()}, batch)
        minus = loss_at(model, loss, {n: w - eps * lifted[n] for n, w in weights.items()}, batch)
        slope = (plus - minus) / (2 * eps)
        for n, w in weights.items():
            g = slope * z[n]
            if momentum is None:
                age, first, second = moments.get(n, (0, 0 * g, 0 * g))
                age, first = age + 1, betas[0] * first + (1 - betas[0]) * g
                second = betas[1] * second + (1 - betas[1]) * g**2
                moments[n] = age, first, second
                change = first / (1 - betas[0] ** age) / ((second / (1 - betas[1] ** age)).sqrt() + 1e-8)
            else:
                change = moments[n] = momentum * moments[n] + (1 - momentum) * g if n in moments else g
            weights[n] = w - lr * (change @ bases[n].T if n in bases else change)
        history.append(dict(weights))
    return history
