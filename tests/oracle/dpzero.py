"""DPZero (arXiv 2310.09639, with a noise multiplier) as a plain loop.

W <- W - lr (1/n) (sum_j clip(c_j, -C, C) + sigma C N(0, 1)) Z, c_j the slope of example j along Gaussian Z. Nothing of zolr
is used but the numbers, by name.
"""

import torch
from oracle.mezo import gaussian, loss_at

from zolr.keys import Key


@torch.no_grad()
def run(model, loss, batches, *, lr, eps, limit, noise, seed=0):
    """Weights after each step; `loss` is one number an example."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    history = []
    for step, batch in enumerate(batches):
        z = gaussian({name: w.shape for name, w in weights.items()}, seed, step)
        plus = loss_at(model, loss, {name: w + eps * z[name] for name, w in weights.items()}, batch)
        minus = loss_at(model, loss, {name: w - eps * z[name] for name, w in weights.items()}, batch)
        slopes = [(a - b) / (2 * eps) for a, b in zip(plus.tolist(), minus.tolist(), strict=True)]
        generator = Key(seed).fold_in("step", step).fold_in("noise").generator()
        total = sum(max(-limit, min(limit, c)) for c in slopes)
        total += noise * limit * float(torch.randn(1, generator=generator, dtype=torch.float64))
        weights = {name: w - lr * total / len(slopes) * z[name] for name, w in weights.items()}
        history.append(dict(weights))
    return history
