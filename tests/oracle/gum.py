"""GUM (arXiv 2510.17802) as a plain loop over torch's Muon; AdamW for vectors, embedding and head."""

import torch

from zolr.keys import Key


def run(model, loss, batches, *, lr, rank, every, q, projected, seed=0):
    """Weights after each step; `projected` names the matrices with a subspace."""
    parameters = dict(model.named_parameters())
    plain = [p for name, p in parameters.items() if name not in projected]
    small = [p for p in plain if p.dim() == 1]
    tables = [p for p in plain if p.dim() == 2]
    others = [
        torch.optim.AdamW(small, lr=lr, weight_decay=0.0),
        torch.optim.AdamW(tables, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    branches = {}
    history = []
    for step, batch in enumerate(batches):
        gradients = dict(
            zip(parameters, torch.autograd.grad(loss(model, batch), list(parameters.values())), strict=True)
        )
        for name in projected:
            gradient = gradients[name]
            tall = gradient.shape[0] >= gradient.shape[1]
            if step % every == 0:
                left, _, right = torch.linalg.svd(gradient if tall else gradient.T, full_matrices=False)
                basis = right[:rank].T
                coin = Key(seed).fold_in("subspace", step // every, name, "whole").integer() / 2**64
                start = torch.zeros_like(gradient)
                if coin >= q:
                    start = torch.zeros_like(gradient @ basis if tall else basis.T @ gradient)
                value = torch.nn.Parameter(start)
                muon = torch.optim.Muon(
                    [value], lr=lr, weight_decay=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
                )
                branches[name] = basis, coin < q, value, muon  # momentum restarts
            basis, whole, value, muon = branches[name]
            if whole:
                seen = gradient @ basis @ basis.T if tall else basis @ (basis.T @ gradient)
                value.grad = (gradient - seen) / q
            else:
                value.grad = (gradient @ basis if tall else basis.T @ gradient) / (1 - q)
            with torch.no_grad():
                value.zero_()
                muon.step()
                move = value
                if not whole:
                    move = value @ basis.T if tall else basis @ value
                parameters[name] += move
        for optimizer in others:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = gradients[next(n for n, other in parameters.items() if other is p)]
            optimizer.step()
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history
