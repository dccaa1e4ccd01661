"""GrassWalk's walk (arXiv 2510.01878) without gradients, as a plain loop: descent along probes in a subspace that turns.

W moves along B Pᵀ, P = sqrt(n/r) Q; Q is Haar first and then turned every `interval` steps along a random geodesic whose largest
angle is `angle`; the slope is that of a two-point difference along fair signs. Nothing of zolr is used but the numbers, by name.
"""

from math import sqrt

import torch
from oracle.mezo import loss_at
from oracle.recovered import walked
from oracle.zo_adam import basis, draws

from zolr.keys import Key


@torch.no_grad()
def run(model, loss, batches, *, lr, eps, rank, interval, angle, seed=0):
    """Weights after each step."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    history, bases = [], {}
    for step, batch in enumerate(batches):
        if step % interval == 0:
            for n, w in weights.items():
                if w.dim() == 2 and n not in bases:
                    bases[n] = basis(n, w.shape[1], rank, seed, 0)
                elif w.dim() == 2:
                    key, scale = Key(seed).fold_in("subspace", step // interval, n), sqrt(w.shape[1] / rank)
                    bases[n] = walked(bases[n] / scale, None, angle=angle, key=key) * scale
        z = draws({n: (len(w), rank) if n in bases else w.shape for n, w in weights.items()}, seed, step)
        lifted = {n: x @ bases[n].T if n in bases else x for n, x in z.items()}
        plus = loss_at(model, loss, {n: w + eps * lifted[n] for n, w in weights.items()}, batch)
        minus = loss_at(model, loss, {n: w - eps * lifted[n] for n, w in weights.items()}, batch)
        weights = {n: w - lr * (plus - minus) / (2 * eps) * lifted[n] for n, w in weights.items()}
        history.append(dict(weights))
    return history
