"""LOMO and AdaLomo (arXiv 2306.09782, 2310.10195) as hooks that move every weight in the middle of the backward pass."""

import torch


def run(model, loss, batches, *, lr, adaptive=False, decay=0.8, floor=1e-3, tiny=1e-30):
    """Weights after each step."""
    rows, columns, squares, step = {}, {}, {}, 0

    @torch.no_grad()
    def move(p):
        g, p.grad = p.grad, None
        if not adaptive:
            p -= lr * g
            return
        keep = 1 - step**-decay
        square = g**2 + tiny
        if p.dim() == 2:
            rows[p] = keep * rows.get(p, 0) + (1 - keep) * square.mean(1)
            columns[p] = keep * columns.get(p, 0) + (1 - keep) * square.mean(0)
            moment = torch.outer(rows[p], columns[p]) / rows[p].mean()
        else:
            moment = squares[p] = keep * squares.get(p, 0) + (1 - keep) * square
        update = g / moment.sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        p -= lr * max(floor, float(p.square().mean().sqrt())) * update

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(move)
    history = []
    for batch in batches:
        step += 1
        loss(model, batch).backward()
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return history
