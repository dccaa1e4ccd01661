"""GaLore (arXiv 2403.03507, algorithm 2 with Adam; scale and side as in its released code) as a plain loop."""

import torch


def run(
    model, loss, batches, *, lr, rank, every, scale, projected, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
):
    """Weights after each step; `projected` names the matrices that are projected."""
    parameters = dict(model.named_parameters())
    bases, first, second = {}, {}, {}
    history = []
    for step, batch in enumerate(batches):
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            rows, columns = gradient.shape if gradient.dim() == 2 else (0, 0)
            if name in projected:
                if step % every == 0:
                    # signs of singular vectors are arbitrary and kept moments see them: take those of this orientation
                    oriented = gradient if rows >= columns else gradient.T
                    bases[name] = torch.linalg.svd(oriented, full_matrices=False)[2][:rank].T
                basis = bases[name]
                gradient = gradient @ basis if rows >= columns else basis.T @ gradient
            first[name] = betas[0] * first.get(name, 0) + (1 - betas[0]) * gradient
            second[name] = betas[1] * second.get(name, 0) + (1 - betas[1]) * gradient**2
            mean = first[name] / (1 - betas[0] ** (step + 1))
            update = mean / ((second[name] / (1 - betas[1] ** (step + 1))).sqrt() + eps)
            if name in projected:
                update = scale * (update @ basis.T if rows >= columns else basis @ update)
            decay = lr * weight_decay if parameter.dim() > 1 else 0.0
            with torch.no_grad():
                parameter.copy_(parameter - lr * update - decay * parameter)
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history
