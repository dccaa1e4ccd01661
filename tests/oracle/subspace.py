"""Adam in random subspaces by backprop (law and scale of arXiv 2603.20632; Gaussian as in RSO, arXiv 2502.07222) as a plain loop.

W moves along B Pᵀ; the gradient of B is G P; P is drawn every `every` steps, with which moments start again.
"""

from math import sqrt

import torch
from oracle.zo_adam import basis

from zolr.keys import Key


def run(
    model,
    loss,
    batches,
    *,
    lr,
    rank,
    every,
    gaussian=False,
    seed=0,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
):
    """Weights after each step."""
    parameters = dict(model.named_parameters())
    bases, moments = {}, {}
    history = []
    for step, batch in enumerate(batches):
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            matrix = gradient.dim() == 2
            if matrix and step % every == 0:
                n, r = gradient.shape[1], min(rank, gradient.shape[1])
                key = Key(seed).fold_in("subspace", step // every, name)
                bases[name] = (
                    key.normal((n, rank)).double() / sqrt(rank)
                    if gaussian
                    else basis(name, n, r, seed, step // every)
                )
                moments.pop(name, None)
            g = gradient @ bases[name] if matrix else gradient
            age, first, second = moments.get(name, (0, 0 * g, 0 * g))
            age, first, second = (
                age + 1,
                betas[0] * first + (1 - betas[0]) * g,
                betas[1] * second + (1 - betas[1]) * g**2,
            )
            moments[name] = age, first, second
            change = first / (1 - betas[0] ** age) / ((second / (1 - betas[1] ** age)).sqrt() + eps)
            decay = lr * weight_decay if matrix else 0.0
            with torch.no_grad():
                parameter.copy_((1 - decay) * parameter - lr * (change @ bases[name].T if matrix else change))
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history
