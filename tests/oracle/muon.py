"""Muon (Jordan et al. 2024) as a plain loop: Nesterov momentum, orthogonalized, as long as a step of AdamW.

M <- b M + (1 - b) G, U = b M + (1 - b) G, W <- W - lr 0.2 sqrt(max(m, n)) msign(U) for matrices between hidden states; embedding
and vectors by Adam.
"""

from math import sqrt

import torch
from oracle.zo_muon import msign


def run(model, loss, batches, *, lr, tables, momentum=0.95):
    """Weights after each step."""
    parameters = dict(model.named_parameters())
    history, buffers, moments = [], {}, {}
    for step, batch in enumerate(batches, start=1):
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        for (name, p), g in zip(parameters.items(), gradients, strict=True):
            if p.dim() == 2 and name not in tables:
                buffers[name] = momentum * buffers.get(name, 0) + (1 - momentum) * g
                update = momentum * buffers[name] + (1 - momentum) * g
                change = 0.2 * sqrt(max(p.shape)) * msign(update).double()
            else:
                b1, b2 = (0.9, 0.95) if name in tables else (0.9, 0.999)
                first, second = moments.get(name, (0, 0))
                first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
                moments[name] = first, second
                change = first / (1 - b1**step) / ((second / (1 - b2**step)).sqrt() + 1e-8)
            with torch.no_grad():
                p -= lr * change
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history
