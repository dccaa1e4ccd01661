"""Zeroth-order ascent, first-order descent (AdaZo-SAM, and LORENZA in the range of a gradient, arXiv 2502.19571) as a loop.

SAM (arXiv 2010.01412) takes the gradient at W + rho A / |A|, A the gradient; here A is estimated by central differences along
random signs. Nothing of zolr is used but the numbers, by name.
"""

import torch
from oracle.mezo import loss_at

from zolr.keys import Key
from zolr.probes import Layout, Probe, Space


def signs(shapes, seed, step, probe):
    """One direction, by name."""
    key = Key(seed).fold_in("step", step).fold_in("ascent").fold_in("probe", probe)
    drawn = Probe(Layout([Space(name, tuple(shape)) for name, shape in shapes.items()]), "rademacher", key)
    return {name: drawn(name).double() for name in shapes}


def range_of(gradient, rank, seed, window, name):
    """Orthonormal columns (on the shorter side) that span a random product of the gradient, positive on R's diagonal."""
    oriented = gradient if gradient.shape[0] >= gradient.shape[1] else gradient.T
    omega = Key(seed).fold_in("subspace", window, name).normal((oriented.shape[0], rank)).double()
    q, r = torch.linalg.qr(oriented.T @ omega)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def run(
    model, loss, batches, *, lr, rho, probes, eps=1e-3, seed=0, betas=(0.9, 0.999), floor=1e-8, weight_decay=0.0,
    rank=None, every=None, scale=1.0, projected=(),
):  # fmt: skip
    """Weights after each step; with `projected` names, only these climb and they do so and step inside their range."""
    parameters = dict(model.named_parameters())
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    bases, first, second, history = {}, {}, {}, []

    def down(name, g):
        if name not in bases:
            return g
        return g @ bases[name] if g.shape[0] >= g.shape[1] else bases[name].T @ g

    def up(name, c):
        if name not in bases:
            return c
        m, n = weights[name].shape
        return c @ bases[name].T if m >= n else bases[name] @ c

    for step, batch in enumerate(batches):
        climbing = [n for n in weights if rank is None or n in bases]
        shapes = {n: down(n, weights[n]).shape for n in climbing}
        ascent = {n: torch.zeros_like(weights[n]) for n in climbing}
        for probe in range(probes if climbing else 0):
            z = {n: up(n, c) for n, c in signs(shapes, seed, step, probe).items()}
            plus = loss_at(model, loss, {n: w + eps * z.get(n, 0) for n, w in weights.items()}, batch)
            minus = loss_at(model, loss, {n: w - eps * z.get(n, 0) for n, w in weights.items()}, batch)
            for n in climbing:
                ascent[n] += (plus - minus) / (2 * eps) * z[n] / probes
        size = sum(float(a.square().sum()) for a in ascent.values()) ** 0.5
        loss_at(
            model,
            loss,
            {n: w + rho * ascent[n] / size if n in ascent else w for n, w in weights.items()},
            batch,
        )
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        for (name, w), gradient in zip(weights.items(), gradients, strict=True):
            if name in projected and step % every == 0:
                bases[name] = range_of(gradient, rank, seed, step // every, name)
            g = down(name, gradient)
            first[name] = betas[0] * first.get(name, 0) + (1 - betas[0]) * g
            second[name] = betas[1] * second.get(name, 0) + (1 - betas[1]) * g**2
            update = first[name] / (1 - betas[0] ** (step + 1))
            update = update / ((second[name] / (1 - betas[1] ** (step + 1))).sqrt() + floor)
            update = (scale if name in bases else 1.0) * up(name, update)
            decay = lr * weight_decay if w.dim() > 1 else 0.0
            weights[name] = w - lr * update - decay * w
        history.append(dict(weights))
    return history
