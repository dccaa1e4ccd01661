"""The instance-dependent law (arXiv 2603.20632) as plain loops: Adam by backprop, and descent along probes.

W moves along B Pᵀ, P = [sqrt(1/pi_i) q_i] for r directions drawn with probabilities pi_i = min(1, sqrt(sigma_i) / lambda) that
sum to r, mixed with the uniform ones; q and sigma are eigenpairs of an estimate of Sigma = E[GᵀG] that is a dense matrix
here. It names its leading `named * r` eigenpairs and gives all others their mean. By backprop each window's gradients in the
coordinates are a block of Sigma that the estimate is moved to agree with; without, Sigma is that of the layer's inputs on the
first batch of each window. Nothing of zolr is used but the numbers, by name.
"""

from math import sqrt

import torch
from oracle.mezo import loss_at
from oracle.plumage import wheel
from oracle.subzero import orthonormal
from oracle.zo_adam import basis, draws

from zolr.keys import Key

KNOWN = 1e-6  # eigenvalues closer than this part of the largest count as equal


def probabilities(sigma, rank, alpha):
    """min(1, sqrt(sigma / lambda²)) with sum r by bisection; what no direction takes is shared by those with none."""
    root, low, high = sigma.clamp(min=0).sqrt(), 0.0, float(sigma.clamp(min=0).sqrt().sum())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (root / middle).clamp(max=1).sum() > rank else (low, middle)
    pi = (root / high).clamp(max=1) if high else root
    if rank - pi.sum() > 0.5:
        pi = torch.where(pi == 0, (rank - pi.sum()) / (pi == 0).sum(), pi)
    return (1 - alpha) * pi + alpha * rank / len(sigma)


def drawn(values, vectors, rest, rank, alpha, key):
    """P of one draw; `values (k,)`, `vectors (n, k)` have names, all other directions the eigenvalue `rest`."""
    n, k = vectors.shape
    pi = probabilities(torch.cat((values, torch.full((n - k,), rest, dtype=values.dtype))), rank, alpha)
    chosen = wheel([float(x) for x in pi], key.fold_in("sample"))
    vectors = torch.stack([v * v[v.abs().argmax()].sign() for v in vectors.T], dim=1)  # probes see the sign
    apart = [i for i in range(k) if values[i] != rest]
    columns = [vectors[:, i] / sqrt(pi[i]) for i in chosen if i in apart]
    others = [i for i in chosen if i not in apart]
    if others:
        q = vectors[:, apart]
        gauss = key.fold_in("rest").normal((n, len(others))).double()
        left = orthonormal(gauss - q @ torch.linalg.lstsq(q, gauss).solution if apart else gauss)
        columns += [left[:, j] / sqrt(pi[i]) for j, i in enumerate(others)]
    return torch.stack(columns, dim=1)


def learned(values, vectors, rest, p, seen, named, rate):
    """Eigenpairs after a window that saw the mean `Pᵀ E[GᵀG] P`."""
    n = len(p)
    u = torch.linalg.qr(p)[0]
    inverse = torch.linalg.inv(u.T @ p)  # P = U (Uᵀ P)
    block = inverse.T @ seen @ inverse
    if values is None:
        values, vectors, rest = p.new_zeros(0), p.new_zeros(n, 0), float(block.trace()) / len(block)
    eye = torch.eye(n, dtype=p.dtype)
    sigma = rest * eye + vectors * (values - rest) @ vectors.T
    sigma = sigma + rate * u @ (block - u.T @ sigma @ u) @ u.T
    shift, axes = torch.linalg.eigh(sigma - rest * eye)
    pairs = sorted(((float(s), axes[:, i]) for i, s in enumerate(shift)), key=lambda pair: -pair[0])
    largest = max(abs(s) for s, _ in pairs)
    pairs = [pair for pair in pairs if abs(pair[0]) > KNOWN * largest]
    kept, cut = pairs[:named], pairs[named:]
    total = sum(max(s + rest, 0.0) for s, _ in cut) + (n - len(pairs)) * rest
    values = torch.tensor([max(s + rest, 0.0) for s, _ in kept], dtype=p.dtype)
    rest = total / (n - len(kept)) if cut else rest
    return values, torch.stack([v for _, v in kept], dim=1), rest


def run(
    model,
    loss,
    batches,
    *,
    lr,
    rank,
    every,
    named,
    alpha,
    rate,
    seed=0,
    betas=(0.9, 0.999),
    eps=1e-8,
):
    """Weights after each step, by backprop."""
    parameters = dict(model.named_parameters())
    bases, moments, spectra, seen = {}, {}, {}, {}
    history = []
    for step, batch in enumerate(batches):
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            matrix = gradient.dim() == 2
            if matrix and step % every == 0:
                n, window = gradient.shape[1], step // every
                if step == 0:
                    bases[name] = basis(name, n, rank, seed, 0)
                else:
                    before = spectra.get(name, (None, None, None))
                    mean = torch.stack(seen[name]).mean(0)
                    spectra[name] = learned(*before, bases[name], mean, named * rank, rate)
                    key = Key(seed).fold_in("subspace", window, name)
                    bases[name] = drawn(*spectra[name], rank, alpha, key)
                seen[name] = []
                moments.pop(name, None)
            g = gradient @ bases[name] if matrix else gradient
            if matrix:
                seen[name].append(g.T @ g)
            age, first, second = moments.get(name, (0, 0 * g, 0 * g))
            age, first = age + 1, betas[0] * first + (1 - betas[0]) * g
            second = betas[1] * second + (1 - betas[1]) * g**2
            moments[name] = age, first, second
            change = first / (1 - betas[0] ** age) / ((second / (1 - betas[1] ** age)).sqrt() + eps)
            with torch.no_grad():
                parameter -= lr * (change @ bases[name].T if matrix else change)
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return history


def inputs(model, loss, batch):
    """`sum x xᵀ` over what each linear map is given, by the name of its weight."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def look(module, args, name=name):
                x = args[0].detach().reshape(-1, args[0].shape[-1])
                found[f"{name}.weight"] = found.get(f"{name}.weight", 0) + x.T @ x

            hooks.append(module.register_forward_pre_hook(look))
    loss(model, batch)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def run_forward_only(model, loss, batches, *, lr, eps, rank, interval, named, alpha, seed=0):
    """Weights after each step, along the slope of one probe of fair signs."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    history, bases = [], {}
    for step, batch in enumerate(batches):
        if step % interval == 0:
            loss_at(model, loss, weights, batch)
            sigmas, window = inputs(model, loss, batch), step // interval + 1
            for n, w in weights.items():
                if w.dim() < 2:
                    continue
                if n not in sigmas:  # looked up, not multiplied
                    bases[n] = basis(n, w.shape[1], rank, seed, window)
                    continue
                values, vectors = torch.linalg.eigh(sigmas[n])
                values, vectors = values.flip(0)[: named * rank], vectors.flip(1)[:, : named * rank]
                rest = float(sigmas[n].trace() - values.sum())
                rest = rest / (len(vectors) - len(values)) if rest > KNOWN * sigmas[n].trace() else 0.0
                values = torch.where(values > KNOWN * values[0], values, rest)
                bases[n] = drawn(values, vectors, rest, rank, alpha, Key(seed).fold_in("subspace", window, n))
        z = draws(
            {n: (w.shape[0], bases[n].shape[1]) if n in bases else w.shape for n, w in weights.items()},
            seed,
            step,
        )
        lifted = {n: x @ bases[n].T if n in bases else x for n, x in z.items()}
        plus = loss_at(model, loss, {n: w + eps * lifted[n] for n, w in weights.items()}, batch)
        minus = loss_at(model, loss, {n: w - eps * lifted[n] for n, w in weights.items()}, batch)
        weights = {n: w - lr * (plus - minus) / (2 * eps) * lifted[n] for n, w in weights.items()}
        history.append(dict(weights))
    return history
