"""MeZO (arXiv 2305.17333, algorithm 1): W <- W - lr c Z, c = (L(W + eps Z) - L(W - eps Z)) / (2 eps), as a plain loop.

Nothing of zolr is used but the numbers: the Gaussian tensor that has the name (seed, step, weight).
"""

import torch

from zolr.keys import Key
from zolr.probes import Layout, Probe, Space


def gaussian(shapes, seed, step):
    """The step's standard normal tensors, by name."""
    key = Key(seed).fold_in("step", step).fold_in("probe", 0)
    probe = Probe(Layout([Space(name, tuple(shape)) for name, shape in shapes.items()]), "gaussian", key)
    return {name: probe(name).double() for name in shapes}


@torch.no_grad()
def loss_at(model, loss, weights, batch):
    """The loss with the weights written into the model."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    return loss(model, batch)


def run(model, loss, batches, *, lr, eps, seed=0, weight_decay=0.0):
    """Weights after each step."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    history = []
    for step, batch in enumerate(batches):
        z = gaussian({name: w.shape for name, w in weights.items()}, seed, step)
        plus = loss_at(model, loss, {name: w + eps * z[name] for name, w in weights.items()}, batch)
        minus = loss_at(model, loss, {name: w - eps * z[name] for name, w in weights.items()}, batch)
        slope = (plus - minus) / (2 * eps)
        for name, w in weights.items():
            decay = 1 - lr * weight_decay if w.dim() > 1 else 1.0
            weights[name] = decay * w - lr * slope * z[name]
        history.append(dict(weights))
    return history
