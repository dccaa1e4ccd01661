"""MoFaSGD (arXiv 2507.08091) as a plain loop that forms every matrix; AdamW for vectors, embedding and head."""

import torch


def truncated(matrix, rank):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank].T


def run(
    model, loss, batches, *, lr, rank, beta, factored, released=False, limit=5.0, share=0.25, outside=0.0
):
    """Weights after each step; `factored` names the matrices with a factored momentum."""
    parameters = dict(model.named_parameters())
    others = [p for name, p in parameters.items() if name not in factored]
    adams = [
        torch.optim.AdamW([p for p in others if p.dim() == 1], lr=lr, weight_decay=0.0),
        torch.optim.AdamW([p for p in others if p.dim() == 2], lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    triples = {n: truncated(parameters[n].detach(), rank) for n in factored} if released else {}
    history = []
    for batch in batches:
        loss(model, batch).backward()
        with torch.no_grad():
            for name in factored:
                w, g = parameters[name], parameters[name].grad
                if name in triples:
                    u, s, v = triples[name]
                    inside = u @ u.T @ g + g @ v @ v.T - u @ u.T @ g @ v @ v.T
                    triples[name] = truncated(beta * u @ torch.diag(s) @ v.T + inside, rank)
                else:
                    triples[name] = truncated(g, rank)
                u, s, v = triples[name]
                w -= lr * outside * (torch.eye(len(u)) - u @ u.T) @ g @ (torch.eye(len(v)) - v @ v.T)
                if released:
                    w -= lr * share * u @ torch.diag(torch.clamp(1 / s, max=limit)) @ v.T
                else:
                    w -= lr * 0.2 * max(w.shape) ** 0.5 * u @ v.T
        for adam in adams:
            adam.step()
        model.zero_grad()
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history
