"""GaLore (arXiv 2403.03507) with micro-batches, clipping and a schedule, as a plain loop over dense gradients.

Micro-batches are summed dense, or each is projected and the projections are summed; then the basis of a window comes from the
first micro-batch of its step. Clipping is that of torch's `clip_grad_norm_`, by the norm of the step's gradients or by that of
the step before.
"""

import torch


def run(
    model, loss, steps, *, lr, rank, every, scale, projected, schedule, accumulate="dense", clip=None, clipping="last",
    betas=(0.9, 0.999), eps=1e-8,
):  # fmt: skip
    """Weights after each step; each of `steps` is a list of micro-batches, `loss` gives a sum and a count."""
    parameters = dict(model.named_parameters())
    bases, first, second, norm, history = {}, {}, {}, None, []

    def down(name, g):
        if name not in projected:
            return g
        return g @ bases[name] if g.shape[0] >= g.shape[1] else bases[name].T @ g

    for step, batches in enumerate(steps):
        parts, counts = [], []
        for batch in batches:
            total, count = loss(model, batch)
            gradients = torch.autograd.grad(total, list(parameters.values()))
            parts.append(dict(zip(parameters, gradients, strict=True)))
            counts.append(count)
        mean = {n: sum(part[n] for part in parts) / sum(counts) for n in parameters}
        if step % every == 0:
            for name in projected:
                g = mean[name] if accumulate == "dense" else parts[0][name]
                oriented = g if g.shape[0] >= g.shape[1] else g.T
                bases[name] = torch.linalg.svd(oriented, full_matrices=False)[2][:rank].T
        coords = {n: sum(down(n, part[n]) for part in parts) / sum(counts) for n in parameters}
        measured = coords if accumulate == "coordinates" and len(batches) > 1 else mean
        own = torch.stack([g.square().sum() for g in measured.values()]).sum().sqrt()
        by = own if clipping == "twice" or norm is None else norm
        factor = 1.0 if clip is None else min(1.0, clip / (float(by) + 1e-6))
        norm = own
        for name, parameter in parameters.items():
            g = factor * coords[name]
            first[name] = betas[0] * first.get(name, 0) + (1 - betas[0]) * g
            second[name] = betas[1] * second.get(name, 0) + (1 - betas[1]) * g**2
            update = first[name] / (1 - betas[0] ** (step + 1))
            update = update / ((second[name] / (1 - betas[1] ** (step + 1))).sqrt() + eps)
            if name in projected:
                m, n = parameter.shape
                update = scale * (update @ bases[name].T if m >= n else bases[name] @ update)
            with torch.no_grad():
                parameter.copy_(parameter - lr * schedule(step) * update)
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history
