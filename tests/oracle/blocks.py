"""BAdam (arXiv 2404.02827) and LISA (arXiv 2403.17919) as a plain loop of AdamW over the blocks whose turn it is.

Blocks are the modules of the model. Nothing of zolr is used but the permutations, by name.
"""

import torch

from zolr.keys import Key


def drawn(count, key):
    """The permutation of that name: by the 64-bit hashes of its numbers."""
    return [i for _, i in sorted((key.fold_in(i).integer(), i) for i in range(count))]


def run(
    model, loss, batches, *, lr, every, count=None, seed=0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
):
    """Weights after each step; without `count` one block at a time (BAdam), with it so many drawn anew (LISA)."""
    parameters = dict(model.named_parameters())
    modules = []
    for name in parameters:
        if (module := name.split(".")[0]) not in modules:
            modules.append(module)
    state, history = {}, []
    for step, batch in enumerate(batches):
        period = step // every
        if count is None:
            turn, position = period // len(modules), period % len(modules)
            order = drawn(len(modules), Key(seed).fold_in("layers", "round", turn))
            active = {modules[order[position]]}
            if step % every == 0:
                state = {}
        else:
            order = drawn(len(modules), Key(seed).fold_in("layers", "period", period))
            active = {modules[i] for i in order[:count]}
        chosen = {n: p for n, p in parameters.items() if n.split(".")[0] in active}
        gradients = torch.autograd.grad(loss(model, batch), list(chosen.values()))
        for (name, parameter), gradient in zip(chosen.items(), gradients, strict=True):
            first, second, t = state.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient), 0))
            first, second, t = (
                betas[0] * first + (1 - betas[0]) * gradient,
                betas[1] * second + (1 - betas[1]) * gradient**2,
                t + 1,
            )
            state[name] = first, second, t
            update = first / (1 - betas[0] ** t) / ((second / (1 - betas[1] ** t)).sqrt() + eps)
            decay = lr * weight_decay if parameter.dim() > 1 else 0.0
            with torch.no_grad():
                parameter.copy_(parameter - lr * update - decay * parameter)
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history
