"""Laws of the rows that stream dense gradients: equal to loops written from their papers, and to one another at the edges."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import adafactor, flora, gum, lomo, mofasgd, plumage, vlorp
from test_methods import BATCHES, WINDOW, distance, little, loss, trained
from torch import Tensor

from zolr.keys import Key
from zolr.methods import Method, compose
from zolr.optim import OptimizerRule
from zolr.projectors.viewed import View
from zolr.residuals.compensate import Compensate

F64 = torch.float64
KEY = Key(4)
MATRICES = [f"{name}.weight" for name in ("query", "value", "up", "down", "head")]
PROJECTED = {"rank": 3, "every": WINDOW, "projected": MATRICES}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def with_rank(name: str, **settings: Any) -> Method:
    return compose(name, rank=3, refresh_every=WINDOW, **settings)


# ---- M1: rows and their oracles ----------------------------------------------------------------------------------------

MOFASGD = {"rank": 3, "beta": 0.95, "factored": MATRICES}
EQUAL: dict[str, tuple[Method, Callable[..., list[dict[str, Tensor]]], dict[str, Any]]] = {
    "galore, adafactor": (
        with_rank("galore", optimizer="adafactor"),
        adafactor.run,
        {**PROJECTED, "scale": 0.25},
    ),
    "galore, adafactor, both sides": (
        with_rank("galore", optimizer="adafactor", side="both"),
        adafactor.run,
        {**PROJECTED, "scale": 0.25, "both": True},
    ),
    "plumage": (with_rank("plumage"), plumage.run, PROJECTED),
    "gum": (
        replace(with_rank("gum"), residual=Compensate(q=0.4)),
        gum.run,
        {**PROJECTED, "q": 0.4},
    ),
    "mofasgd": (compose("mofasgd", rank=3), mofasgd.run, MOFASGD),
    "mofasgd, released": (
        replace(compose("mofasgd"), optimizer=OptimizerRule("mofasgd", {"rank": 3, "released": True})),
        mofasgd.run,
        {**MOFASGD, "released": True},
    ),
    "lomo": (compose("lomo"), lomo.run, {}),
    "adalomo": (compose("adalomo"), lomo.run, {"adaptive": True}),
    "vlorp": (
        replace(with_rank("vlorp"), projector=View(rank=2, granularity=4)),
        vlorp.run,
        {**PROJECTED, "rank": 2, "parts": 4},
    ),
    "flora": (with_rank("flora"), flora.run, PROJECTED),
}


@pytest.mark.parametrize("realization", ["side", "rebuild"])
@pytest.mark.parametrize("case", EQUAL)
def test_m1_a_row_equals_the_loop_written_from_its_paper(case, realization):
    method, oracle, constants = EQUAL[case]
    expected = oracle(little(), loss, BATCHES, lr=1e-2, **constants)
    assert distance(trained(method, realization=realization), expected[4::5]) < 1e-10
    start = {name: p.detach() for name, p in little().named_parameters()}
    moved = {name: float((expected[-1][name] - start[name]).abs().max()) for name in start}
    # what starts at zero moves by a thousandth of the rate under a rate that is scaled by the weight
    assert all(size > (1e-5 if not start[name].any() else 1e-4) for name, size in moved.items()), moved
