"""Extragradient (Korpelevich 1976; for networks arXiv 2006.05720) as a plain loop: W <- W - lr G(W - reach G(W))."""

import torch
from oracle.mezo import loss_at

from zolr.keys import Key
from zolr.probes import Layout, Probe, Space


def from_the_past(model, loss, batches, *, lr, reach):
    """Points where gradients are taken, after each step; one gradient a step, and the way ahead is that of the step before."""
    parameters = dict(model.named_parameters())
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    ahead = weights
    history = []
    for batch in batches:
        loss_at(model, loss, ahead, batch)
        found = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        gradient = dict(zip(parameters, found, strict=True))
        weights = {name: w - lr * gradient[name] for name, w in weights.items()}
        ahead = {name: w - reach * gradient[name] for name, w in weights.items()}
        history.append(dict(ahead))
    return history


def run(model, loss, batches, *, lr, reach, noise=False, seed=0):
    """Weights after each step; with `noise` the gradient is that at W + reach Z, Z standard normal."""
    parameters = dict(model.named_parameters())
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    history = []

    def gradients(at, batch):
        loss_at(model, loss, at, batch)
        found = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        return dict(zip(parameters, found, strict=True))

    for step, batch in enumerate(batches):
        if noise:
            spaces = Layout([Space(name, tuple(w.shape)) for name, w in weights.items()])
            z = Probe(spaces, "gaussian", Key(seed).fold_in("step", step).fold_in("ahead"))
            way = {name: z(name).double() for name in weights}
        else:
            way = {name: -g for name, g in gradients(weights, batch).items()}
        there = gradients({name: w + reach * way[name] for name, w in weights.items()}, batch)
        weights = {name: w - lr * there[name] for name, w in weights.items()}
        history.append(dict(weights))
    return history
