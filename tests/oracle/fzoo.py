"""FZOO (arXiv 2506.09034, its released rule) as a plain loop: W <- W - lr sum_i (L_i - L_0) U_i / (k std(L_1 ... L_k)).

L_i = L(W + eps U_i) with fair signs U_i, the standard deviation over k. Nothing of zolr is used but the numbers, by name.
"""

import torch
from oracle.mezo import loss_at
from oracle.zo_adam import draws


@torch.no_grad()
def run(model, loss, batches, *, lr, eps, probes, seed=0):
    """Weights after each step."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    history = []
    for step, batch in enumerate(batches):
        base = float(loss_at(model, loss, weights, batch))
        signs = [draws({n: w.shape for n, w in weights.items()}, seed, step, probe=i) for i in range(probes)]
        losses = [
            float(loss_at(model, loss, {n: w + eps * u[n] for n, w in weights.items()}, batch)) for u in signs
        ]
        mean = sum(losses) / probes
        deviation = (sum((one - mean) ** 2 for one in losses) / probes) ** 0.5
        for one, u in zip(losses, signs, strict=True):
            weights = {n: w - lr * (one - base) / (probes * deviation) * u[n] for n, w in weights.items()}
        history.append(dict(weights))
    return history
