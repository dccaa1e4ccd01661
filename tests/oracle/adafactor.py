"""GaLore with Adafactor (arXiv 2403.03507; no first moment, no scale by the weight, as in its released code), one or two sides."""

import torch


def run(model, loss, batches, *, lr, rank, every, scale, projected, both=False, decay=0.8, tiny=1e-30):
    """Weights after each step; `projected` names the matrices that are projected."""
    parameters = dict(model.named_parameters())
    spans, rows, columns, squares = {}, {}, {}, {}
    history = []
    for step, batch in enumerate(batches):
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        for (name, w), g in zip(parameters.items(), gradients, strict=True):
            if name in projected:
                m, n = g.shape
                if step % every == 0:
                    left, _, right = torch.linalg.svd(g if m >= n else g.T, full_matrices=False)
                    u, v = (left, right.T) if m >= n else (right.T, left)
                    eyes = torch.eye(m, dtype=g.dtype), torch.eye(n, dtype=g.dtype)
                    spans[name] = (
                        u[:, :rank] if both or m < n else eyes[0],
                        v[:, :rank] if both or m >= n else eyes[1],
                    )
                u, v = spans[name]
                g = u.T @ g @ v
            keep = 1 - (step + 1) ** -decay
            if g.dim() == 2:
                rows[name] = keep * rows.get(name, 0) + (1 - keep) * (g**2 + tiny).mean(1)
                columns[name] = keep * columns.get(name, 0) + (1 - keep) * (g**2 + tiny).mean(0)
                moment = torch.outer(rows[name], columns[name]) / rows[name].mean()
            else:
                moment = squares[name] = keep * squares.get(name, 0) + (1 - keep) * (g**2 + tiny)
            update = g / moment.sqrt()
            update = update / max(1.0, float(update.square().mean().sqrt()))
            if name in projected:
                update = scale * spans[name][0] @ update @ spans[name][1].T
            with torch.no_grad():
                w -= lr * update
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history
