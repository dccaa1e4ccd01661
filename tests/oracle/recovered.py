"""Fira (arXiv 2410.01623) as a plain loop, and its kin that move the basis: SubTrack++ (arXiv 2502.01586), GrassWalk
and GrassJump (arXiv 2510.01878).

Written as in the papers for wide matrices, P (m, r) on the left of G (m, n) with m <= n; tall and square ones are
transposed on their way in and out. A basis is moved by one of the functions below; moments are kept as they are, or
rebuilt in the new basis (`aware`).
"""

import torch

from zolr.keys import Key


def fixed_svd(basis, gradient, **_):
    """GaLore's and Fira's: of every window's first gradient."""
    # signs of singular vectors are arbitrary and kept moments see them: take those of the transpose
    return torch.linalg.svd(gradient.T, full_matrices=False)[2].T


def tracked(basis, gradient, *, step, **_):
    """SubTrack++: A = argmin |G - P A|, R = G - P A, tangent 2 R Aᵀ (minus the derivative), rank 1, geodesic."""
    a = torch.linalg.lstsq(basis, gradient).solution
    tangent = 2 * (gradient - basis @ a) @ a.T
    u, s, vt = torch.linalg.svd(tangent, full_matrices=False)
    u, s, v = u[:, :1], s[0], vt[:1].T
    turned = basis @ v @ v.T * torch.cos(step * s) + u @ v.T * torch.sin(step * s)
    return turned + basis @ (torch.eye(len(v), dtype=v.dtype) - v @ v.T)


def walked(basis, gradient, *, angle, key, **_):
    """GrassWalk: a random horizontal direction whose largest singular value is the angle, geodesic."""
    m = basis.shape[0]
    x = key.normal(tuple(basis.shape)).double()
    d = (torch.eye(m, dtype=x.dtype) - basis @ basis.T) @ x
    u, s, vt = torch.linalg.svd(d, full_matrices=False)
    s = s * angle / s.max()
    return basis @ vt.T @ torch.diag(torch.cos(s)) @ vt + u @ torch.diag(torch.sin(s)) @ vt


def jumped(basis, gradient, *, key, **_):
    """GrassJump: the Q factor of a Gaussian matrix, with a positive diagonal in the other one."""
    q, upper = torch.linalg.qr(key.normal(tuple(basis.shape)).double())
    return q * upper.diagonal().sign()


def run(
    model,
    loss,
    batches,
    *,
    lr,
    rank,
    every,
    scale,
    projected,
    move=fixed_svd,
    aware=False,
    growth=1.01,
    tensor=False,
    released=False,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    seed=0,
    **settings,
):
    """Weights after each step; `projected` names the matrices that have a subspace.

    Args:
        tensor: one factor for a matrix instead of one for each column of the coordinates.
        released: scale * P R is subtracted, and norms are limited before bias correction.
    """
    parameters = dict(model.named_parameters())
    bases, first, second, last = {}, {}, {}, {}
    history = []
    for step, batch in enumerate(batches):
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        c1, c2 = 1 - betas[0] ** (step + 1), 1 - betas[1] ** (step + 1)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            tall = gradient.dim() == 2 and gradient.shape[0] >= gradient.shape[1]
            g = gradient.T if tall else gradient
            r = g
            if name in projected:
                if step % every == 0:
                    old = bases.get(name)
                    if old is None:
                        new = fixed_svd(None, g)[:, :rank]
                    else:
                        key = Key(seed).fold_in("subspace", step // every, name)
                        new = move(old, g, key=key, **settings)[:, :rank]
                    if aware and old is not None:
                        c = new.T @ old
                        m = first[name] / (1 - betas[0] ** step)
                        v = second[name] / (1 - betas[1] ** step)
                        first[name] = c @ first[name]
                        second[name] = (1 - betas[1] ** step) * abs((c * c) @ (v - m * m) + (c @ m) ** 2)
                    bases[name] = new
                r = bases[name].T @ g
            first[name] = betas[0] * first.get(name, 0) + (1 - betas[0]) * r
            second[name] = betas[1] * second.get(name, 0) + (1 - betas[1]) * r**2
            update = (first[name] / c1) / ((second[name] / c2).sqrt() + eps)
            if name in projected:
                p = bases[name]
                if tensor:
                    phi = update.norm() / (r.norm() + 1e-8)
                else:
                    phi = update.norm(dim=0) / (r.norm(dim=0) + 1e-8)
                rest = phi * (g - (scale if released else 1.0) * p @ r)
                uncorrected = c2**0.5 / c1 if released else 1.0
                norm = rest.norm() / uncorrected
                if name in last and norm > growth * last[name]:
                    rest = rest * growth * last[name] / norm
                    norm = growth * last[name]
                last[name] = norm
                update = scale * p @ update + rest
            decay = lr * weight_decay if parameter.dim() > 1 else 0.0
            with torch.no_grad():
                parameter.copy_(parameter - lr * (update.T if tall else update) - decay * parameter)
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history
