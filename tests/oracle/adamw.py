"""AdamW (arXiv 1711.05101, algorithm 2, decoupled decay on matrices only) as a plain loop over autograd's gradients."""

import torch


def run(model, loss, batches, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """Weights after each step."""
    parameters = dict(model.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    history = []
    for step, batch in enumerate(batches, start=1):
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            first[name] = betas[0] * first[name] + (1 - betas[0]) * gradient
            second[name] = betas[1] * second[name] + (1 - betas[1]) * gradient**2
            mean = first[name] / (1 - betas[0] ** step)
            deviation = (second[name] / (1 - betas[1] ** step)).sqrt()
            decay = lr * weight_decay if parameter.dim() > 1 else 0.0
            with torch.no_grad():
                parameter.copy_(parameter - lr * mean / (deviation + eps) - decay * parameter)
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history
