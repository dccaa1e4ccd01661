"""APOLLO and APOLLO-Mini (arXiv 2412.05270, algorithm 1) as a plain loop; alpha stands under a root, as there."""

import torch

from zolr.keys import Key


def run(
    model,
    loss,
    batches,
    *,
    lr,
    rank,
    every,
    alpha,
    projected,
    tensor=False,
    growth=1.01,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    seed=0,
):
    """Weights after each step; matrices are written wide, tall and square ones are transposed."""
    parameters = dict(model.named_parameters())
    sketch, first, second, last = {}, {}, {}, {}
    history = []
    for step, batch in enumerate(batches):
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            tall = gradient.dim() == 2 and gradient.shape[0] >= gradient.shape[1]
            g = gradient.T if tall else gradient
            r = g
            if name in projected:
                if step % every == 0:
                    key = Key(seed).fold_in("subspace", step // every, name)
                    sketch[name] = key.normal((g.shape[0], rank)).double().T / rank**0.5
                r = sketch[name] @ g
            first[name] = betas[0] * first.get(name, 0) + (1 - betas[0]) * r
            second[name] = betas[1] * second.get(name, 0) + (1 - betas[1]) * r**2
            mean = first[name] / (1 - betas[0] ** (step + 1))
            update = mean / ((second[name] / (1 - betas[1] ** (step + 1))).sqrt() + eps)
            if name in projected:
                if tensor:
                    s = update.norm() / (r.norm() + 1e-8)
                else:
                    s = torch.diag(update.norm(dim=0) / (r.norm(dim=0) + 1e-8))
                update = g * s if tensor else g @ s
                if name in last and update.norm() > growth * last[name]:
                    update = update / update.norm() * growth * last[name]
                last[name] = update.norm()
                update = alpha**0.5 * update
            decay = lr * weight_decay if parameter.dim() > 1 else 0.0
            with torch.no_grad():
                parameter.copy_(parameter - lr * (update.T if tall else update) - decay * parameter)
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history
