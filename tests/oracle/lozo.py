"""LOZO (arXiv 2410.07698, algorithm 1) as a plain loop, and the two defects of its released code behind flags.

W <- W - lr c U Vᵀ / sqrt(r) with c the slope along U Vᵀ / sqrt(r); V is drawn every `interval` steps, U every step,
vectors move along a full Gaussian. Nothing of zolr is used but the numbers, by name.
"""

from math import sqrt

import torch
from oracle.mezo import gaussian, loss_at

from zolr.keys import Key


def run(
    model,
    loss,
    batches,
    *,
    lr,
    eps,
    rank,
    interval,
    seed=0,
    released_refresh_defect=False,
    released_scale=False,
    seen=None,
):
    """Weights after each step.

    Args:
        released_refresh_defect: at a refresh V and U come interleaved from one stream for the probe, and only U from
            the same stream, begun again, for the update.
        released_scale: no 1/r: the direction is U Vᵀ.
        seen: a list that receives `(probed, applied)` directions, dicts by name.
    """
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    scale = 1.0 if released_scale else 1 / sqrt(rank)
    history, v = [], {}

    def direction(factors):
        return {n: factors[n] @ v[n].T * scale if n in v else factors[n] for n in weights}

    for step, batch in enumerate(batches):
        if step % interval == 0:
            window = Key(seed).fold_in("subspace", step // interval)
            v = {
                n: window.fold_in(n).normal((w.shape[1], rank)).double()
                for n, w in weights.items()
                if w.dim() == 2
            }
        factors = gaussian(
            {n: (w.shape[0], rank) if n in v else w.shape for n, w in weights.items()}, seed, step
        )
        probed = applied = direction(factors)
        if released_refresh_defect and step % interval == 0:
            probe_stream = torch.Generator().manual_seed(step)
            for n in weights:
                if n in v:
                    v[n] = torch.randn(v[n].shape, generator=probe_stream).double()
                factors[n] = torch.randn(factors[n].shape, generator=probe_stream).double()
            probed = direction(factors)
            update_stream = torch.Generator().manual_seed(step)
            applied = direction(
                {n: torch.randn(f.shape, generator=update_stream).double() for n, f in factors.items()}
            )
        plus = loss_at(model, loss, {n: w + eps * probed[n] for n, w in weights.items()}, batch)
        minus = loss_at(model, loss, {n: w - eps * probed[n] for n, w in weights.items()}, batch)
        slope = (plus - minus) / (2 * eps)
        weights = {n: w - lr * slope * applied[n] for n, w in weights.items()}
        history.append(dict(weights))
        if seen is not None:
            seen.append((probed, applied))
    return history
