"""ZO-Muon (arXiv 2602.17155) as a plain loop: W <- W - lr 0.2 sqrt(max(r, n)) P msign((1/k) sum_i c_i U_i).

c_i = (L(W + eps P U_i) - L(W)) / eps, U_i Gaussian, P = sqrt(m/r) Q with Q Haar on the output side, drawn every `interval`
steps; msign as torch's Muon computes it, in bfloat16. Embedding, head and vectors move by Adam. Nothing of zolr is used
but the numbers, by name.
"""

from math import sqrt

import torch
from oracle.mezo import loss_at
from oracle.zo_adam import basis, draws


def msign(g):
    """Five quintic Newton-Schulz iterations on the wide form of a matrix."""
    x = g.bfloat16()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        update = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, update, x, beta=3.4445)
    return x.T if g.shape[0] > g.shape[1] else x


@torch.no_grad()
def run(model, loss, batches, *, lr, eps, rank, interval, probes, tables, seed=0):
    """Weights after each step."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    history, bases, moments = [], {}, {}
    for step, batch in enumerate(batches):
        if step % interval == 0:
            for n, w in weights.items():
                if w.dim() == 2:
                    bases[n] = basis(n, w.shape[0], rank, seed, step // interval)
                    moments.pop(n, None)
        shapes = {n: (bases[n].shape[1], w.shape[1]) if n in bases else w.shape for n, w in weights.items()}
        base = loss_at(model, loss, weights, batch)
        mean = {n: torch.zeros(shape, dtype=torch.float64) for n, shape in shapes.items()}
        for i in range(probes):
            u = draws(shapes, seed, step, "gaussian", i)
            moved = {n: w + eps * (bases[n] @ u[n] if n in bases else u[n]) for n, w in weights.items()}
            slope = (loss_at(model, loss, moved, batch) - base) / eps
            mean = {n: g + slope * u[n] / probes for n, g in mean.items()}
        for n, g in mean.items():
            if n in bases and n not in tables:
                change = 0.2 * sqrt(max(g.shape)) * msign(g).double()
            else:
                b1, b2 = (0.9, 0.95) if n in tables else (0.9, 0.999)
                age, first, second = moments.get(n, (0, 0 * g, 0 * g))
                age, first, second = age + 1, b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
                moments[n] = age, first, second
                change = first / (1 - b1**age) / ((second / (1 - b2**age)).sqrt() + 1e-8)
            weights[n] = weights[n] - lr * (bases[n] @ change if n in bases else change)
        history.append(dict(weights))
    return history
