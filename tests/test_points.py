"""Evaluation points: an estimator elsewhere leaves everything as it was, sees one noise, and outlives checkpoints."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zolr.engine import Engine
from zolr.errors import UsageError
from zolr.estimators import POINTS
from zolr.estimators.backprop import Backprop
from zolr.estimators.lookahead import Lookahead
from zolr.estimators.spsa import Spsa
from zolr.methods import Method, compose
from zolr.models import build, checkpoint_activations, lm_loss

NAMES = ("adazo-sam", "lorenza", "extrapolation")


def net(dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(9, 8, padding_idx=0),
            nn.Linear(8, 8),
            nn.Dropout(dropout),
            nn.Tanh(),
            nn.Linear(8, 9),
        ).double()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())


def batches(count: int = 3) -> list[Tensor]:
    return list(torch.randint(1, 9, (count, 4, 5), generator=torch.Generator().manual_seed(0)))


def method(name: str, **settings: Any) -> Method:
    made = compose(name, reach=0.3, **settings)
    return compose(name, reach=0.3, rank=2, refresh_every=2, **settings) if made.refresh_every else made


class Stop(Exception):
    """Raised by a loss."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_e2_a_loss_that_raises_at_any_of_the_points_leaves_everything_as_it_was(name, checkpointed):
    for call in range(4):
        calls: list[int] = []

        def breaking(model: nn.Module, batch: Tensor, call: int = call, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            if len(calls) == call + 1:
                raise Stop
            return loss(model, batch)

        engine = Engine(
            net(0.5), replace(method(name), dense=checkpointed or name == "lorenza"), lr=0.1, loss=loss
        )
        engine.step(batches()[:1])  # so that there is a subspace to probe in
        before = {v.name: v.value.detach().clone() for v in engine.variables}
        noise, engine._loss = torch.get_rng_state(), breaking
        try:
            engine.step(batches()[1:2])
            assert call >= (2 if name == "extrapolation" else 3)  # more calls than the step makes
            continue
        except Stop:
            pass
        assert torch.equal(torch.get_rng_state(), noise)
        for v in engine.variables:
            assert torch.equal(v.value.detach(), before[v.name]) and v.value.grad is None
            assert v._offset is None and v.is_full and v.window == 0


@pytest.mark.parametrize("name", NAMES)
def test_all_evaluations_of_a_step_see_the_same_noise(name):
    seen: list[Tensor] = []

    def noisy(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append(model[2](torch.ones(64, dtype=torch.float64)).detach())  # type: ignore[index]
        return loss(model, batch)

    engine = Engine(net(0.5), method(name), lr=0.1, loss=noisy)
    engine.step(batches()[:2])
    seen.clear()
    engine.step(batches()[:2])
    first, second = seen[0::2], seen[1::2]  # two micro-batches, each evaluated two or three times
    assert len(first) == len(second) == (2 if name == "extrapolation" else 3)
    assert all(torch.equal(s, first[0]) for s in first) and all(torch.equal(s, second[0]) for s in second)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_point_is_the_same_where_activations_are_recomputed(name):
    numbers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    numbers |= {"vocab_size": 31, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ends = []
    for checkpointed in (False, True):
        from transformers import AutoConfig

        model = build(AutoConfig.for_model("llama", **numbers), dtype=torch.float64, seed=0)
        if checkpointed:
            checkpoint_activations(model)
        ids = torch.randint(31, (3, 2, 6), generator=torch.Generator().manual_seed(0))
        engine = Engine(model, method(name), lr=0.05, loss=lm_loss)
        losses = [engine.step([{"input_ids": x, "labels": x}]).loss for x in ids]
        ends.append((losses, {n: p.detach() for n, p in engine.detach().named_parameters()}))
    assert ends[0][0] == pytest.approx(ends[1][0], abs=1e-12)
    assert max(float((ends[0][1][n] - p).abs().max()) for n, p in ends[1][1].items()) < 1e-12


def test_uphill_is_uphill_and_ahead_is_downhill():
    batch, rises = batches()[0], {}
    for point in POINTS:
        engine = Engine(net(), compose("adamw", point=point, reach=1e-2), lr=0.1, loss=loss)
        estimator, variables = engine.method.estimator, engine.variables
        if point == "ascent":
            estimator = replace(estimator, guess=Spsa(eps=1e-4, probes=64))  # type: ignore[type-var]
        seen: list[float] = []

        def watched(x: Tensor, engine: Engine = engine, seen: list[float] = seen) -> Tensor:
            value = loss(engine.model, x)
            seen.append(float(value.detach()))
            return value

        estimator(watched, [batch], variables, lambda *_: None, engine.key)
        rises[point] = seen[-1] - float(loss(net(), batch).detach())
    assert rises["ascent"] > 1e-4 and rises["lookahead"] < -1e-5


def test_a_padding_row_stays_where_it_is():
    for name in NAMES:
        engine = Engine(net(), method(name), lr=0.1, loss=loss)
        for batch in batches():
            engine.step([batch])
        assert not bool(engine.detach()[0].weight[0].any())  # type: ignore[index]


def test_settings_go_to_the_point_or_to_what_it_wraps():
    there = compose("adamw", point="ascent", probes=4, reach=0.2).estimator
    assert there.reach == 0.2 and there.guess.probes == 4 and there.inner == Backprop()  # type: ignore[attr-defined]
    ahead = compose("stiefel", "zo", point="lookahead", probes=4, eps=1e-3).estimator
    assert ahead == Lookahead(Spsa(eps=1e-3, probes=4)) and ahead.paradigm == "zo"
    assert compose("extrapolation", point="ascent").estimator.inner == Backprop()  # type: ignore[attr-defined]
    for choice, words in (
        ({"reach": -1.0}, "reach = -1.0 is no distance"),
        ({"point": "ahed"}, "point 'ahed' is not known; did you mean 'lookahead'"),
    ):
        with pytest.raises(UsageError, match=words):
            compose("extrapolation", **choice)
    with pytest.raises(UsageError, match="no setting 'reach'"):
        compose("adamw", reach=0.1)
    with pytest.raises(UsageError, match="along 'time' is not known"):
        Lookahead(Backprop(), along="time")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="rate of this estimator cannot be measured; give lr"):
        Engine(net(), compose("stiefel", "zo", point="lookahead", eps=1e-3), lr=None, loss=loss)
