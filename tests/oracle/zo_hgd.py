"""ZO-HGD (arXiv 2012.11518, inferred from its abstract) as a plain loop, rows of coordinates in place of coordinates.

G = w (1/k) sum_i c_i Z_i + (1 - w) sum_(b in I) c_b z_b / p_b in the coordinates of `zo_adam`'s subspaces, signs as
directions; p_b = min(1, sqrt(d_b) |G_b| / lambda), G_b from the first sum, mixed with the uniform law. Nothing of zolr is
used but the numbers, by name.
"""

import torch
from oracle.mezo import loss_at
from oracle.zo_adam import basis, draws

from zolr.keys import Key
from zolr.probes import Layout, Probe, Space


def filled(sizes, count):
    """`min(1, s_b / lambda)` that sum to `count`, by bisection."""
    low, high = 0.0, sum(sizes)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(1.0, s / middle) for s in sizes) > count else (low, middle)
    return [min(1.0, s / high) for s in sizes]


def systematic(p, key):
    """Items, in a random order, whose stretch of the cumulative sum holds a random number plus an integer."""
    order = key.fold_in("order").permutation(len(p)).tolist()
    tick, end, found = float(key.fold_in("start").uniform()), 0.0, []
    for item in order:
        end += p[item]
        if end > tick:
            found.append(item)
            tick += 1
    return found


@torch.no_grad()
def run(model, loss, batches, *, lr, eps, rank, interval, probes, blocks, share, alpha, seed=0):
    """Weights after each step."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    history, bases = [], {}

    def lift(name, coords):
        return coords @ bases[name].T if name in bases else coords

    def slope_along(moves, batch):
        plus, minus = (
            loss_at(
                model, loss, {n: w + s * moves[n] if n in moves else w for n, w in weights.items()}, batch
            )
            for s in (eps, -eps)
        )
        return (plus - minus) / (2 * eps)

    for step, batch in enumerate(batches):
        if step % interval == 0:
            for n, w in weights.items():
                if w.dim() == 2:
                    bases[n] = basis(n, w.shape[1], rank, seed, step // interval)
        shapes = {n: (w.shape[0], bases[n].shape[1]) if n in bases else w.shape for n, w in weights.items()}
        random = {n: torch.zeros(shape, dtype=torch.float64) for n, shape in shapes.items()}
        for i in range(probes):
            z = draws(shapes, seed, step, probe=i)
            slope = slope_along({n: lift(n, x) for n, x in z.items()}, batch)
            random = {n: g + slope * z[n] / probes for n, g in random.items()}
        places = [(n, row) for n in sorted(shapes) for row in range(shapes[n][0] if n in bases else 1)]
        held = [random[n][row] if n in bases else random[n] for n, row in places]
        p = filled([part.numel() ** 0.5 * float(part.norm()) for part in held], blocks)
        p = [(1 - alpha) * one + alpha * blocks / len(p) for one in p]
        key = Key(seed).fold_in("step", step).fold_in("guided")
        total = {n: share * g for n, g in random.items()}
        for item in systematic(p, key.fold_in("blocks")):
            n, row = places[item]
            space = Space(f"{n}[{row}]", tuple(held[item].shape))
            z = torch.zeros(shapes[n], dtype=torch.float64)
            part = z[row] if n in bases else z
            part += Probe(Layout([space]), "rademacher", key.fold_in("block"))(space.name)
            slope = slope_along({n: lift(n, z)}, batch)
            total[n] = total[n] + (1 - share) * slope / p[item] * z
        weights = {n: w - lr * lift(n, total[n]) for n, w in weights.items()}
        history.append(dict(weights))
    return history
