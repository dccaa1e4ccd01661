"""VLoRP with ProjFactor (arXiv 2505.01744, bias corrections and eps as in its released code) as a plain loop."""

from math import gcd

import torch

from zolr.keys import Key


def run(
    model,
    loss,
    batches,
    *,
    lr,
    rank,
    parts,
    every,
    projected,
    seed=0,
    betas=(0.9, 0.999),
    eps=1e-6,
    tiny=1e-30,
):
    """Weights after each step; `projected` names the matrices that are viewed and projected; AdamW for the others."""
    parameters = dict(model.named_parameters())
    others = [p for name, p in parameters.items() if name not in projected]
    adams = [
        torch.optim.AdamW([p for p in others if p.dim() == 1], lr=lr, weight_decay=0.0),
        torch.optim.AdamW([p for p in others if p.dim() == 2], lr=lr, weight_decay=0.0),
    ]
    bases, mean, rows, columns = {}, {}, {}, {}
    history = []
    for step, batch in enumerate(batches):
        loss(model, batch).backward()
        with torch.no_grad():
            for name in projected:
                w, g = parameters[name], parameters[name].grad
                m, n = w.shape
                c = gcd(parts, n)
                if step % every == 0:
                    r = min(rank, n // c)
                    drawn = Key(seed).fold_in("subspace", step // every, name).normal((n // c, r))
                    bases[name] = drawn.double() / r**0.5  # the mean is kept as it is
                basis = bases[name]
                seen = g.reshape(m * c, n // c) @ basis
                back = (seen @ basis.T).reshape(m, n)
                mean[name] = betas[0] * mean.get(name, 0) + (1 - betas[0]) * seen
                rows[name] = betas[1] * rows.get(name, 0) + (1 - betas[1]) * (back**2 + tiny).sum(1)
                columns[name] = betas[1] * columns.get(name, 0) + (1 - betas[1]) * (back**2 + tiny).sum(0)
                moment = torch.outer(rows[name], columns[name]) / rows[name].sum()
                size = (1 - betas[1] ** (step + 1)) ** 0.5 / (1 - betas[0] ** (step + 1))
                w -= lr * size * (mean[name] @ basis.T).reshape(m, n) / (moment.sqrt() + eps)
        for adam in adams:
            adam.step()
        model.zero_grad()
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history
