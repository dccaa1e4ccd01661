"""Dense methods, one gradient alive: accumulation, clipping and schedules together equal plain loops."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import streamed
from torch import Tensor, nn
from transformers import AutoConfig

from zolr.engine import Engine
from zolr.errors import UsageError
from zolr.memory import predict
from zolr.methods import Method, compose
from zolr.models import build

LINEAR = ["1.weight", "3.weight"]
EVERY = 3


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Embedding(9, 8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 9), nn.LayerNorm(9)
        return nn.Sequential(*layers).double()


def loss(model: nn.Module, ids: Tensor) -> tuple[Tensor, float]:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="sum"), float(ids.numel())


def draw(rows: tuple[int, ...], steps: int = 8) -> list[list[Tensor]]:
    numbers = torch.Generator().manual_seed(1)
    return [[torch.randint(9, (n, 5), generator=numbers) for n in rows] for _ in range(steps)]


def warmup(step: int) -> float:
    return (step + 1) / 4 if step < 4 else 1.0 - (step - 4) / 20


def galore(**settings: Any) -> Method:
    return compose("galore", rank=3, refresh_every=EVERY, **settings)


def trained(method: Method, steps: list[list[Tensor]], **settings: Any) -> list[dict[str, Tensor]]:
    model = net()
    engine = Engine(model, method, lr=1e-2, loss=loss, schedule=warmup, **settings)
    history = []
    for batches in steps:
        engine.step(batches)
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return history


def distance(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> float:
    return max(float((x[n] - y[n]).abs().max()) for x, y in zip(a, b, strict=True) for n in x)


CASES = list(product(("dense", "coordinates"), (None, "last", "twice"), ((4,), (4, 2, 3))))


@pytest.mark.parametrize(("accumulate", "clipping", "rows"), CASES)
def test_m1_accumulation_clipping_and_schedule_equal_the_plain_loop(accumulate, clipping, rows):
    steps, clip = draw(rows), None if clipping is None else 0.05
    method = galore(accumulate_in=accumulate, clip_by=clipping)
    common: dict[str, Any] = dict(lr=1e-2, rank=3, every=EVERY, scale=0.25, projected=LINEAR, schedule=warmup)
    expected = streamed.run(
        net(), loss, steps, accumulate=accumulate, clip=clip, clipping=clipping or "last", **common
    )
    found = trained(method, steps, clip=clip)
    assert distance(found, expected) < 1e-10
    if clip is not None:  # and it does something
        assert distance(found, trained(method, steps)) > 1e-6


def test_m1_one_micro_batch_and_a_law_that_needs_no_gradient_know_no_difference():
    one, three = draw((4,)), draw((4, 2, 3))
    assert distance(trained(galore(), one), trained(galore(accumulate_in="coordinates"), one)) == 0.0
    assert distance(trained(galore(), three), trained(galore(accumulate_in="coordinates"), three)) > 1e-6
    gaussian = replace(galore(projector="gaussian"), dense=True)
    assert (
        distance(trained(gaussian, three), trained(replace(gaussian, accumulate="coordinates"), three))
        < 1e-12
    )
    ahead = galore(point="lookahead", reach=0.1)  # whose first pass is not gathered
    gaussian = replace(gaussian, estimator=ahead.estimator)
    assert (
        distance(trained(gaussian, three), trained(replace(gaussian, accumulate="coordinates"), three))
        < 1e-12
    )


def test_m1_clipping_twice_is_the_clipping_of_a_method_that_has_all_gradients():
    plain, steps = compose("adamw"), draw((4, 2))
    dense = replace(plain, dense=True, clipping="twice")
    assert distance(trained(plain, steps, clip=0.05), trained(dense, steps, clip=0.05)) < 1e-12
    assert (
        distance(trained(plain, steps, clip=0.05), trained(replace(dense, clipping="last"), steps, clip=0.05))
        > 1e-6
    )


@pytest.mark.parametrize("clipping", ["last", "twice"])
def test_the_passes_are_counted_and_one_gradient_is_alive(clipping):
    alive: list[int] = []

    def counted(model: nn.Module, ids: Tensor) -> tuple[Tensor, float]:
        alive.append(sum(v.value.grad is not None for v in engine.variables))
        return loss(model, ids)

    engine = Engine(
        net(), galore(accumulate_in="coordinates", clip_by=clipping), lr=1e-2, loss=counted, clip=1.0
    )
    for step, batches in enumerate(draw((4, 2))):
        alive.clear()
        info = engine.step(batches)
        assert info.forwards == 3 * len(alive) == (12 if clipping == "twice" or not step else 6)
        names = [v for v in engine.variables if v.name not in LINEAR]  # these have a dense sum all the same
        assert max(alive) == len(names)
        assert all(v.gathered is None and v.value.grad is None for v in engine.variables)


class Visited(list):
    """A list that counts how many of its items are looked at."""

    looks = 0

    def __iter__(self):
        for item in list.__iter__(self):
            self.looks += 1
            yield item

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        return list.__getitem__(self, index)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_step_looks_at_each_weight_as_often_however_many_there_are(scale):
    """On the first step values get their shapes, so that the optimizer has others; afterwards they stay where they are."""
    visits = []
    for count in (20, 40):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))
        engine = Engine(
            model, galore(scale=scale), lr=1e-2, loss=lambda model, x: model(x).square().mean(), seed=0
        )
        seen = []
        for _ in range(EVERY + 1):
            for group in engine.optimizer.param_groups:
                group["params"] = Visited(group["params"])
            engine.step([torch.ones(2, 4)])
            seen.append(sum(getattr(g["params"], "looks", 0) for g in engine.optimizer.param_groups) / count)
        visits.append(seen)
    assert max(visits[0] + visits[1]) <= 6


def test_a_gradient_that_is_not_finite_in_any_micro_batch_drops_the_step():
    for bad in range(2):
        model = net()
        engine = Engine(model, galore(accumulate_in="coordinates"), lr=1e-2, loss=cusp, clip=1.0)
        engine.step([(ids, False) for ids in draw((4, 2))[0]])
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        info = engine.step([(ids, i == bad) for i, ids in enumerate(draw((4, 2))[1])])
        assert info.skipped and engine.step_count == 1
        kept = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
        assert set(LINEAR) <= set(kept)
        assert not engine.step([(ids, False) for ids in draw((4, 2))[1]]).skipped


def cusp(model: nn.Module, batch: tuple[Tensor, bool]) -> tuple[Tensor, float]:
    """A finite loss whose gradient is not finite, if asked."""
    total, count = loss(model, batch[0])
    return (total + (model(batch[0]).sum() * 0).sqrt(), count) if batch[1] else (total, count)


def test_the_sums_are_where_they_were_asked_to_be():
    numbers = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    config = AutoConfig.for_model("llama", vocab_size=31, num_key_value_heads=2, **numbers)
    peaks = {}
    for where in ("dense", "coordinates"):
        method = compose("galore", accumulate_in=where, rank=4)
        peaks[where] = predict(config, method, batch_size=1, max_length=4, accumulation=3).peak_bytes
    weights = 4 * sum(p.numel() for n, p in build(config).named_parameters() if "proj" in n)
    assert peaks["dense"] - peaks["coordinates"] > 0.5 * weights


def test_what_cannot_be_is_refused_with_a_way_out():
    with pytest.raises(
        UsageError, match="accumulate 'coordinates' is for methods that project dense gradients"
    ):
        compose("stiefel", "fo", accumulate_in="coordinates")
    with pytest.raises(UsageError, match="accumulate 'sum' is not known"):
        compose("galore", accumulate_in="sum")
    with pytest.raises(UsageError, match="clip_by 'twice' is for dense methods"):
        compose("adamw", clip_by="twice")
    with pytest.raises(UsageError, match="clipping 'thrice' is not known; use 'last' or 'twice'"):
        compose("galore", clip_by="thrice")

    class Whole(type(galore().residual)):
        dense = True

    with pytest.raises(UsageError, match="needs the dense gradient of a step"):
        replace(galore(accumulate_in="coordinates"), residual=Whole())
