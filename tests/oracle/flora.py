"""FLORA (arXiv 2402.03293, algorithm 2 on Adafactor's updates as in its released code) as a plain loop."""

import torch

from zolr.keys import Key


def run(
    model, loss, batches, *, lr, rank, every, projected, seed=0, beta=0.9, decay=0.8, floor=1e-3, tiny=1e-30
):
    """Weights after each step; `projected` names the matrices whose momentum is compressed, others keep all of it."""
    parameters = dict(model.named_parameters())
    bases, memory, rows, columns, squares = {}, {}, {}, {}, {}
    history = []
    for step, batch in enumerate(batches):
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        for (name, w), g in zip(parameters.items(), gradients, strict=True):
            keep = 1 - (step + 1) ** -decay
            if g.dim() == 2:
                rows[name] = keep * rows.get(name, 0) + (1 - keep) * (g**2 + tiny).mean(1)
                columns[name] = keep * columns.get(name, 0) + (1 - keep) * (g**2 + tiny).mean(0)
                moment = torch.outer(rows[name], columns[name]) / rows[name].mean()
            else:
                moment = squares[name] = keep * squares.get(name, 0) + (1 - keep) * (g**2 + tiny)
            update = g / moment.sqrt()
            if name in projected:
                m, n = g.shape
                tall = m >= n
                down = lambda x, p, tall=tall: x @ p if tall else p.T @ x  # noqa: E731
                up = lambda x, p, tall=tall: x @ p.T if tall else p @ x  # noqa: E731
                if step % every == 0:
                    key = Key(seed).fold_in("subspace", step // every, name)
                    new = key.normal((min(m, n), rank)).double() / rank**0.5
                    if step:
                        memory[name] = down(up(memory[name], bases[name]), new)
                    bases[name] = new
                old = memory.get(name, torch.zeros_like(down(update, bases[name])))
                memory[name] = beta * old + (1 - beta) * down(update, bases[name])
                update = (1 - beta) * update + beta * up(old, bases[name])
            else:
                memory[name] = beta * memory.get(name, 0) + (1 - beta) * update
                update = memory[name]
            update = update / max(1.0, float(update.square().mean().sqrt()))
            with torch.no_grad():
                w -= lr * max(floor, float(w.square().mean().sqrt())) * update
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history
