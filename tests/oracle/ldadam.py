"""LDAdam (arXiv 2410.16103, algorithm 1) as a plain loop."""

import torch


def run(
    model,
    loss,
    batches,
    *,
    lr,
    rank,
    rho,
    projected,
    betas=(0.908, 0.99),
    eps=1e-8,
    feedback=True,
    weight_decay=0.0,
):
    """Weights after each step; matrices are written wide, tall and square ones are transposed."""
    parameters = dict(model.named_parameters())
    bases, first, second, error = {}, {}, {}, {}
    history = []
    for step, batch in enumerate(batches):
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        before1, before2 = 1 - betas[0] ** step, 1 - betas[1] ** step
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            tall = gradient.dim() == 2 and gradient.shape[0] >= gradient.shape[1]
            r = gradient
            if name in projected:
                a = (gradient.T if tall else gradient) + error.get(name, 0)
                if step == 0:
                    p = torch.linalg.svd(a.T, full_matrices=False)[2][:rank].T
                    kept = torch.zeros_like(a)
                else:
                    old, m = bases[name], first[name]
                    b = rho * old @ (m / before1) + (1 - rho) * a
                    q, upper = torch.linalg.qr(b @ b.T @ old)
                    p = q * upper.diagonal().sign()
                    c = p.T @ old
                    mean, square = m / before1, second[name] / before2
                    first[name] = c @ m
                    second[name] = before2 * abs((c * c) @ (square - mean * mean) + (c @ mean) ** 2)
                    kept = old @ m - p @ first[name]
                r = p.T @ a
                bases[name] = p
                if feedback:
                    error[name] = a - p @ r + betas[0] / (1 - betas[0]) * kept
            first[name] = betas[0] * first.get(name, 0) + (1 - betas[0]) * r
            second[name] = betas[1] * second.get(name, 0) + (1 - betas[1]) * r**2
            mean = first[name] / (1 - betas[0] ** (step + 1))
            update = mean / ((second[name] / (1 - betas[1] ** (step + 1))).sqrt() + eps)
            if name in projected:
                update = (bases[name] @ update).T if tall else bases[name] @ update
            decay = lr * weight_decay if parameter.dim() > 1 else 0.0
            with torch.no_grad():
                parameter.copy_(parameter - lr * update - decay * parameter)
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history
