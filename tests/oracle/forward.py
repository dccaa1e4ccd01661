"""Forward mode in random subspaces (directional derivatives, Baydin et al. 2022; law of arXiv 2603.20632) as a plain loop.

W moves along B Pᵀ, P as in `zo_adam`; g = <grad, Z> Z with Z of fair signs and the derivative taken by backprop here; Adam on
B from moments of zero at every new P. Nothing of zolr is used but the numbers, by name.
"""

import torch
from oracle.zo_adam import basis, draws


def run(model, loss, batches, *, lr, rank, every, seed=0, betas=(0.9, 0.99), eps=1e-8):
    """Weights after each step."""
    parameters = dict(model.named_parameters())
    history, bases, moments = [], {}, {}
    for step, batch in enumerate(batches):
        if step % every == 0:
            for n, p in parameters.items():
                if p.dim() == 2:
                    bases[n] = basis(n, p.shape[1], rank, seed, step // every)
                    moments.pop(n, None)
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        seen = {n: g @ bases[n] if n in bases else g for n, g in zip(parameters, gradients, strict=True)}
        z = draws({n: g.shape for n, g in seen.items()}, seed, step)
        slope = sum((g * z[n]).sum() for n, g in seen.items())
        for n, p in parameters.items():
            g = slope * z[n]
            age, first, second = moments.get(n, (0, 0 * g, 0 * g))
            age, first, second = (
                age + 1,
                betas[0] * first + (1 - betas[0]) * g,
                betas[1] * second + (1 - betas[1]) * g**2,
            )
            moments[n] = age, first, second
            change = first / (1 - betas[0] ** age) / ((second / (1 - betas[1] ** age)).sqrt() + eps)
            with torch.no_grad():
                p -= lr * (change @ bases[n].T if n in bases else change)
        history.append({n: p.detach().clone() for n, p in parameters.items()})
    return history
