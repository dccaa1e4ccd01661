"""LOZO-M (arXiv 2410.07698, algorithm 2) as a plain loop, with an exact projection of the momentum where the paper has 1/n.

N <- b N + (1 - b) c U, W <- W - lr N Vᵀ / sqrt(r); c and the draws as in `lozo`; when V is drawn anew N becomes the least-squares
solution of N' V_newᵀ = N V_oldᵀ read in the old span, so that momentum is carried along what both hold. Vectors have plain
momentum. The first gradient starts the buffer. Nothing of zolr is used but the numbers, by name.
"""

from math import sqrt

import torch
from oracle.mezo import gaussian, loss_at

from zolr.keys import Key


def run(model, loss, batches, *, lr, eps, rank, interval, momentum, seed=0):
    """Weights after each step."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    history, v, n_of = [], {}, {}
    for step, batch in enumerate(batches):
        if step % interval == 0:
            for n, w in weights.items():
                if w.dim() == 2:
                    key = Key(seed).fold_in("subspace", step // interval, n)
                    new = key.normal((w.shape[1], rank)).double() / sqrt(rank)
                    if n in n_of:
                        n_of[n] = n_of[n] @ torch.linalg.pinv(v[n]) @ new
                    v[n] = new
        u = gaussian({n: (len(w), rank) if n in v else w.shape for n, w in weights.items()}, seed, step)
        z = {n: x @ v[n].T if n in v else x for n, x in u.items()}
        plus = loss_at(model, loss, {n: w + eps * z[n] for n, w in weights.items()}, batch)
        minus = loss_at(model, loss, {n: w - eps * z[n] for n, w in weights.items()}, batch)
        slope = (plus - minus) / (2 * eps)
        for n, w in weights.items():
            g = slope * u[n]
            n_of[n] = momentum * n_of[n] + (1 - momentum) * g if n in n_of else g
            weights[n] = w - lr * (n_of[n] @ v[n].T if n in v else n_of[n])
        history.append(dict(weights))
    return history
