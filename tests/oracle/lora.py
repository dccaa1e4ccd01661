"""LoRA (arXiv 2106.09685) as a plain loop on the plain model: W + (alpha/r) B A with Adam on A and B, W fixed.

By backprop through the sum, or along the slope of a two-point difference in all of A and B. Nothing of zolr or PEFT is used but
the first A, and the numbers by name.
"""

import torch
from oracle.zo_adam import draws
from torch.func import functional_call


def run(model, loss, batches, *, lr, first, alpha, betas, probe=None, names=None, eps=1e-8, seed=0):
    """`(A, B)` by the name of the weight after each step.

    Args:
        first: A (r, n) by the name of the weight that it stands beside.
        probe: radius of the difference; by backprop without it.
        names: weight and "A" or "B" -> the name that a draw has.
    """
    fixed = {name: p.detach() for name, p in model.named_parameters()}
    factors = {(n, "A"): a.clone() for n, a in first.items()}
    factors |= {(n, "B"): a.new_zeros(len(fixed[n]), len(a)) for n, a in first.items()}

    def at(factors, batch):
        moved = {n: fixed[n] + alpha / len(first[n]) * factors[n, "B"] @ factors[n, "A"] for n in first}
        return loss(lambda **given: functional_call(model, fixed | moved, (), given), batch)

    history, moments = [], {}
    for step, batch in enumerate(batches):
        if probe is None:
            held = {k: x.requires_grad_() for k, x in factors.items()}
            gradients = dict(
                zip(held, torch.autograd.grad(at(held, batch), list(held.values())), strict=True)
            )
        else:
            z = draws({names(*k): x.shape for k, x in factors.items()}, seed, step)
            with torch.no_grad():
                plus = at({k: x + probe * z[names(*k)] for k, x in factors.items()}, batch)
                minus = at({k: x - probe * z[names(*k)] for k, x in factors.items()}, batch)
            gradients = {k: (plus - minus) / (2 * probe) * z[names(*k)] for k in factors}
        for k, g in gradients.items():
            mean, square = moments.get(k, (0, 0))
            mean, square = betas[0] * mean + (1 - betas[0]) * g, betas[1] * square + (1 - betas[1]) * g**2
            moments[k] = mean, square
            mean, square = mean / (1 - betas[0] ** (step + 1)), square / (1 - betas[1] ** (step + 1))
            factors[k] = (factors[k] - lr * mean / (square.sqrt() + eps)).detach()
        history.append(dict(factors))
    return history
