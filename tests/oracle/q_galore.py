"""Q-GaLore (arXiv 2407.08296) as a plain loop: GaLore whose bases are of few bits, and drawn the more rarely the less they turn."""

import torch


def few_bits(matrix, bits, group=256):
    """Uniform codes of groups of numbers with a scale and a zero point each, and back again."""
    numbers = matrix.flatten().tolist()
    most = 2**bits - 1
    found = []
    for start in range(0, len(numbers), group):
        part = numbers[start : start + group]
        low, high = min(*part, 0.0), max(*part, 0.0)
        scale = (high - low) / most
        zero = round(-low / scale)
        found += [(min(max(round(x / scale + zero), 0), most) - zero) * scale for x in part]
    return torch.tensor(found, dtype=matrix.dtype).view(matrix.shape)


def run(
    model, loss, batches, *, lr, rank, every, scale, projected, bits, threshold, memory,
    betas=(0.9, 0.999), eps=1e-8, drawn=None,
):  # fmt: skip
    """Weights after each step; `drawn` receives the steps at which each of the `projected` matrices drew a basis."""
    parameters = dict(model.named_parameters())
    bases, first, second = {}, {}, {}
    gaps, cosines = dict.fromkeys(projected, every), {name: [] for name in projected}
    history = []
    for step, batch in enumerate(batches):
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            rows, columns = gradient.shape if gradient.dim() == 2 else (0, 0)
            if name in projected:
                if step % gaps[name] == 0:  # as released: by the step, not from the last draw on
                    oriented = gradient if rows >= columns else gradient.T
                    new = torch.linalg.svd(oriented, full_matrices=False)[2][:rank].T
                    new = few_bits(new, bits) if bits else new
                    if step:
                        a, b = bases[name][:, 0], new[:, 0]
                        cosines[name].append(float(abs(a @ b) / (a.norm() * b.norm())))
                        last = cosines[name][-memory:]
                        if len(last) == memory and sum(last) / memory >= threshold:
                            gaps[name] *= 2
                    bases[name] = new
                    if drawn is not None:
                        drawn.setdefault(name, []).append(step)
                basis = bases[name]
                gradient = gradient @ basis if rows >= columns else basis.T @ gradient
            first[name] = betas[0] * first.get(name, 0) + (1 - betas[0]) * gradient
            second[name] = betas[1] * second.get(name, 0) + (1 - betas[1]) * gradient**2
            mean = first[name] / (1 - betas[0] ** (step + 1))
            update = mean / ((second[name] / (1 - betas[1] ** (step + 1))).sqrt() + eps)
            if name in projected:
                update = scale * (update @ basis.T if rows >= columns else basis @ update)
            with torch.no_grad():
                parameter.copy_(parameter - lr * update)
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history
