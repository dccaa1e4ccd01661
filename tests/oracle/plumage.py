"""PLUMAGE (arXiv 2505.18313) as a plain loop, from its abstract and reviews; Adam, one root of the weights on each side."""

import torch

from zolr.keys import Key


def marginals(values, rank):
    """Raise the probability of the largest direction to 1 until those of the others, shared by size, fit below it."""
    sure = 0
    while sure < rank and (rank - sure) * values[sure] >= values[sure:].sum():
        sure += 1
    rest = values[sure:].sum()
    return [1.0] * sure + [float((rank - sure) * v / rest) for v in values[sure:]]


def wheel(chances, key):
    """Items on a wheel in random order, each as wide as its chance; one spin, a pointer at every integer."""
    chosen, end = [], 0.0
    start = float(key.fold_in("start").uniform())
    for item in key.fold_in("order").permutation(len(chances)).tolist():
        begin, end = end, end + chances[item]
        if any(begin <= pointer + start < end for pointer in range(len(chances))):
            chosen.append(item)
    return chosen


def carried(first, second, old, new):
    """First moments through the old span; second ones averaged by squared cosines, in units of the columns' lengths."""
    turn = torch.linalg.solve(old.T @ old, old.T @ new)
    size = (old**2).sum(0), (new**2).sum(0)
    cosines = turn**2 * size[0][:, None] / size[1]
    mean = (second / size[0]) @ (cosines / cosines.sum(0))
    return first @ turn, mean * size[1]


def run(model, loss, batches, *, lr, rank, every, projected, seed=0, betas=(0.9, 0.999), eps=1e-8):
    """Weights after each step; `projected` names the matrices that are projected."""
    parameters = dict(model.named_parameters())
    bases, first, second = {}, {}, {}
    history = []
    for step, batch in enumerate(batches):
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            inner = name in projected
            turned = inner and gradient.shape[0] < gradient.shape[1]
            if turned:
                gradient = gradient.T
            if inner:
                if step % every == 0:
                    _, values, vectors = torch.linalg.svd(gradient, full_matrices=False)
                    chances = marginals(values, min(rank, len(values)))
                    key = Key(seed).fold_in("subspace", step // every, name)
                    chosen = wheel(chances, key.fold_in("sample"))
                    new = torch.stack([vectors[i] / chances[i] ** 0.5 for i in chosen], dim=1)
                    if step:
                        first[name], second[name] = carried(first[name], second[name], bases[name], new)
                    bases[name] = new
                gradient = gradient @ bases[name]
            first[name] = betas[0] * first.get(name, 0) + (1 - betas[0]) * gradient
            second[name] = betas[1] * second.get(name, 0) + (1 - betas[1]) * gradient**2
            mean = first[name] / (1 - betas[0] ** (step + 1))
            update = mean / ((second[name] / (1 - betas[1] ** (step + 1))).sqrt() + eps)
            if inner:
                update = update @ bases[name].T
            with torch.no_grad():
                parameter -= lr * (update.T if turned else update)
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history
