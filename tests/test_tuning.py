"""Laws of tuning.py: a forward-only run without a learning rate neither diverges nor stalls, whatever its scales are."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from zolr.attaching import attach
from zolr.engine import Engine
from zolr.errors import NonFiniteError, UsageError
from zolr.estimators.backprop import Backprop
from zolr.keys import Key
from zolr.methods import compose
from zolr.tuning import FORWARDS, LADDER, LARGEST_STEP, PROBES, SMALLEST_STEP, share, tune
from zolr.variables import layout, shifted

Problem = tuple[nn.Module, tuple[Tensor, Tensor], Callable[[nn.Module, Any], Tensor]]


def regression(scale: float) -> Problem:
    numbers = torch.Generator().manual_seed(0)
    x, w = torch.randn(32, 10, generator=numbers), torch.randn(10, 3, generator=numbers)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3))
    return model, (scale * x, (x @ w).tanh()), lambda m, b: (m(b[0]) - b[1]).square().mean()


def classes(dtype: torch.dtype = torch.float32, errors: bool = False) -> Problem:
    ids = torch.randint(9, (32, 5), generator=torch.Generator().manual_seed(1))
    parts = [
        nn.Embedding(9, 8),
        nn.Flatten(),
        nn.Linear(40, 16),
        nn.ReLU(),
        nn.LayerNorm(16),
        nn.Linear(16, 3),
    ]
    model = nn.Sequential(*parts).to(dtype)
    if errors:
        return model, (ids, ids.sum(1) % 3), lambda m, b: (m(b[0]).argmax(-1) != b[1]).float().mean()
    return model, (ids, ids.sum(1) % 3), lambda m, b: F.cross_entropy(m(b[0]).float(), b[1])


def logistic(scale: float) -> Problem:
    """One input feature is `scale` times as large as the others."""
    numbers = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 12, generator=numbers), torch.randint(3, (32,), generator=numbers)
    x[:, 0] *= scale
    return nn.Linear(12, 3), (x, y), lambda m, b: F.cross_entropy(m(b[0]), b[1])


def multiplied(problem: Problem, factor: float) -> Problem:
    return problem[0], problem[1], lambda m, b: factor * problem[2](m, b)


# by name: the problem, and the shares of the first loss that must be left at most after 120 and after 300 steps; the
# rule goes about twice as far
PROBLEMS: dict[str, tuple[Callable[[], Problem], float, float]] = {
    "regression": (lambda: regression(1.0), 0.97, 0.9),
    "regression on large inputs": (lambda: regression(30.0), 0.9, 0.75),
    "regression on tiny inputs": (lambda: regression(0.03), 0.97, 0.95),
    "classes": (classes, 0.95, 0.85),
    "classes in bfloat16": (lambda: classes(torch.bfloat16), 0.95, 0.85),
    "classes, loss times 1e4": (lambda: multiplied(classes(), 1e4), 0.95, 0.85),
    "classes, loss times 1e-4": (lambda: multiplied(classes(), 1e-4), 0.95, 0.85),
    "classes by accuracy": (lambda: classes(errors=True), 0.95, 0.88),
    "logistic": (lambda: logistic(1.0), 0.98, 0.95),
    "logistic, one feature large": (lambda: logistic(100.0), 0.8, 0.4),
}
HARD = [
    "regression on large inputs",
    "classes in bfloat16",
    "classes by accuracy",
    "logistic, one feature large",
]


def built(problem: Callable[[], Problem]) -> Problem:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return problem()


def trained(
    name: str, optimizer: str, projector: str, eps: float | None, steps: int, seed: int = 0
) -> tuple[Engine, list[float]]:
    model, batch, loss = built(PROBLEMS[name][0])
    window = {} if projector == "identity" else {"rank": 3, "refresh_every": 50}
    method = compose("stiefel", "zo", projector=projector, optimizer=optimizer, eps=eps, **window)
    engine = Engine(model, method, lr=None, loss=loss, seed=seed)
    return engine, [engine.step([batch]).loss for _ in range(steps)]


def judge(name: str, losses: list[float]) -> None:
    start, end = losses[0], sum(losses[-20:]) / 20
    assert all(math.isfinite(value) for value in losses)
    assert max(losses) < 1.25 * start, "diverges"
    assert end < PROBLEMS[name][1 if len(losses) < 200 else 2] * start, "stalls"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", HARD)
def test_a_rate_chosen_neither_diverges_nor_stalls(name, optimizer):
    engine, losses = trained(name, optimizer, "stiefel", None, 120)
    judge(name, losses)
    assert engine.tuning is not None and engine.base_lr == engine.tuning.lr


MANY: list[Any] = [
    (name, projector, optimizer)
    for name in PROBLEMS
    for projector, optimizer in (
        ("stiefel", "sgd"),
        ("stiefel", "adamw"),
        ("two_sided", "momentum"),
    )
]
MANY += [(name, "identity", "sgd") for name in HARD]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "projector", "optimizer"), MANY)
def test_a_rate_chosen_neither_diverges_nor_stalls_in_any_subspace(name, projector, optimizer):
    judge(name, trained(name, optimizer, projector, None, 300, seed=1)[1])


@pytest.mark.parametrize(("name", "optimizer"), [("regression on large inputs", "sgd"), ("classes", "adamw")])
def test_an_eps_given_is_kept(name, optimizer):
    engine, losses = trained(name, optimizer, "stiefel", 1e-2, 120)
    judge(name, losses)
    assert engine.tuning is not None and engine.tuning.eps == 1e-2 and engine.method.estimator.eps == 1e-2  # type: ignore[attr-defined]


def test_a_rate_given_is_kept_where_eps_is_chosen():
    model, batch, loss = built(classes)
    engine = Engine(model, compose("stiefel", rank=3), lr=0.0123, loss=loss)
    info = engine.step([batch])
    assert info.lr == 0.0123 and engine.base_lr == 0.0123 and engine.tuning is not None
    assert engine.method.estimator.eps == engine.tuning.eps  # type: ignore[attr-defined]
    assert info.forwards == engine.tuning.forwards + 1 + 2  # rows are counted in a forward of their own
    assert info.forwards == (FORWARDS + 1) + 2


def test_nothing_is_tuned_where_both_are_given():
    model, batch, loss = built(classes)
    engine = Engine(model, compose("stiefel", rank=3, eps=1e-3), lr=1e-3, loss=loss)
    assert engine.step([batch]).forwards == 2 and engine.tuning is None


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": None},
        {"lr": None, "schedule": lambda optimizer: StepLR(optimizer, 2)},
        {"lr": None, "schedule": lambda step: 1 / (1 + step)},
        {"lr": 1e-2, "schedule": lambda optimizer: StepLR(optimizer, 2), "realization": "inplace"},
        {"lr": None, "signs": "together"},
    ],
    ids=["plain", "scheduler", "factor", "radius alone", "signs"],
)
def test_a_run_that_goes_back_to_before_it_chose_chooses_again(settings):
    model, batch, loss = built(classes)
    method = compose("stiefel", rank=3, refresh_every=2, signs=settings.pop("signs", "sequence"))
    engine = Engine(model, method, loss=loss, **settings)
    before = engine.state_dict()
    first = [engine.step([batch]) for _ in range(5)]
    engine.load_state_dict(before)
    assert engine.tuning is None
    assert [engine.step([batch]) for _ in range(5)] == first


def test_a_rate_given_stands_where_a_state_has_none():
    model, batch, loss = built(classes)
    state = Engine(model, compose("stiefel", rank=3), lr=None, loss=loss).state_dict()
    model, batch, loss = built(classes)
    engine = Engine(
        model, compose("stiefel", rank=3), lr=0.0123, loss=loss, schedule=lambda step: 1 / (1 + step)
    )
    first = [engine.step([batch]) for _ in range(3)]
    engine.load_state_dict(state)
    assert [engine.step([batch]) for _ in range(3)] == first and first[0].lr == 0.0123


def test_nothing_is_measured_for_an_estimator_of_one_point():
    model, batch, loss = built(classes)
    for eps, lr, missing in ((1e-1, None, "give lr"), (None, 1e-3, "give eps")):
        with pytest.raises(UsageError, match=missing):
            Engine(model, compose("stiefel", estimator="likelihood_ratio", eps=eps), lr=lr, loss=loss)
    method = compose("stiefel", rank=3, estimator="likelihood_ratio", eps=1e-1)
    assert Engine(model, method, lr=1e-3, loss=loss).step([batch]).forwards == 1


# ---- the rule itself -------------------------------------------------------------------------------------------------


def bowl(
    stiffness: float, size: int = 40, at: float = 1.0
) -> tuple[list[Any], Callable[[], Tensor], nn.Linear]:
    """`stiffness / 2 * ‖W‖²`: every probe sees the curvature `stiffness * size` exactly."""
    model = nn.Linear(size, 1, bias=False).double()
    nn.init.constant_(model.weight, at)
    variables = attach(model, lambda n, p: True)
    eye = torch.eye(size, dtype=torch.float64)
    return variables, lambda: stiffness / 2 * model(eye).square().sum(), model


@pytest.mark.parametrize("stiffness", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("probes", [1, 4, 100])
def test_on_a_quadratic_the_rate_is_the_closed_form(stiffness, probes):
    variables, loss, _ = bowl(stiffness)
    found = tune(loss, variables, Key(0), eps=1e-3, normalized=False, probes=probes)
    assert found.curvature == pytest.approx(stiffness * 40, rel=1e-4)
    gradient = stiffness * math.sqrt(40)
    assert 0.5 * gradient < found.slope < 1.6 * gradient  # a chi of 16 probes
    # lr = share k / tr H, unless that moves the weights by more than their largest step
    free = share(None) * min(probes, 8) / (stiffness * 40)
    moved = free * found.slope / math.sqrt(probes) * math.sqrt(40) / math.sqrt(40)
    assert found.lr == pytest.approx(free * min(1.0, LARGEST_STEP / moved), rel=1e-3)
    normalized = tune(loss, variables, Key(0), eps=1e-3, normalized=True, probes=probes)
    assert normalized.lr == pytest.approx(found.lr * found.slope / math.sqrt(probes), rel=1e-9)


@pytest.mark.parametrize("at", [1e-3, 1.0, 1e6])
def test_a_first_step_is_within_its_bounds(at):
    for stiffness in (1e-12, 1.0, 1e12):
        variables, loss, model = bowl(stiffness, at=at)
        found = tune(loss, variables, Key(0), eps=None, normalized=False)
        step = found.lr * found.slope * math.sqrt(40) / float(model.weight.detach().norm())
        assert SMALLEST_STEP * 0.999 <= step <= LARGEST_STEP * 1.001
        assert any(found.eps == pytest.approx(f * at, rel=1e-5) for f in LADDER)


def test_a_rate_does_not_depend_on_the_unit_of_the_loss():
    rates = []
    for factor in (1e-6, 1.0, 1e6):
        variables, loss, _ = bowl(3.0)
        found = [
            tune(lambda f=factor, g=loss: f * g(), variables, Key(0), eps=None, normalized=n)
            for n in (False, True)
        ]
        rates.append((found[0].lr * factor, found[1].lr, found[0].eps))
    for other in rates[1:]:
        assert other == pytest.approx(rates[0], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_radius_gives_slopes_that_are_derivatives(dtype):
    model, batch, loss = built(lambda: classes(dtype))
    engine = Engine(model.eval(), compose("stiefel", rank=3), lr=None, loss=loss)
    gradients: dict[str, Tensor] = {}
    emit = lambda v, g: gradients.update({v.name: g.clone()})  # noqa: E731
    Backprop()(lambda b: loss(model, b), [batch], engine.variables, emit, Key(0))
    found = tune(lambda: loss(model, batch), engine.variables, Key(1), eps=None, normalized=False)
    space, errors, sizes = layout(engine.variables), [], []
    with torch.no_grad():
        for i in range(8):
            z = {s.name: torch.sign(Key(5).fold_in(s.name, i).normal(s.shape)) for s in space.spaces}
            values = []
            for scale in (found.eps, -found.eps):
                with shifted(engine.variables, lambda name, rows=slice(None), z=z: z[name][rows], scale):
                    values.append(float(loss(model, batch)))
            exact = sum(float((gradients[v.name].double() * z[v.name]).sum()) for v in engine.variables)
            errors.append((values[0] - values[1]) / (2 * found.eps) - exact)
            sizes.append(exact)
    error = math.sqrt(sum(e * e for e in errors) / sum(s * s for s in sizes))
    assert error < {torch.float64: 2e-3, torch.float32: 0.02, torch.bfloat16: 0.3}[dtype]


@pytest.mark.parametrize("eps", [None, 1e-2])
def test_tuning_is_a_measurement_it_repeats_and_changes_nothing(eps):
    model, batch, loss = built(classes)
    calls: list[int] = []
    engine = Engine(model, compose("stiefel", rank=3), lr=None, loss=loss)
    with torch.no_grad():
        before, numbers = engine.state_dict(), torch.get_rng_state()

        def counted() -> Tensor:
            calls.append(1)
            return loss(model, batch)

        first = tune(counted, engine.variables, Key(3), eps=eps, normalized=True)
        assert first.forwards == len(calls) and first.forwards >= 1 + 2 * PROBES
        assert tune(counted, engine.variables, Key(3), eps=eps, normalized=True) == first
        assert tune(counted, engine.variables, Key(4), eps=eps, normalized=True) != first
        after = engine.state_dict()
    assert torch.equal(numbers, torch.get_rng_state())
    for name, saved in before["variables"].items():
        assert torch.equal(saved["weight"], after["variables"][name]["weight"])
    assert set(first.as_dict()) == {f.name for f in fields(first)} and first == type(first)(**first.as_dict())


def test_more_probes_allow_larger_steps():
    rates = []
    for probes in (1, 4):
        model, batch, loss = built(classes)
        engine = Engine(
            model, compose("stiefel", rank=3, optimizer="sgd", probes=probes, eps=1e-3), lr=None, loss=loss
        )
        engine.step([batch])
        rates.append(engine.base_lr)
        engine.detach()
    assert rates[0] is not None and rates[1] is not None and 1.9 < rates[1] / rates[0] < 4.1


BROKEN: dict[str, tuple[Callable[[nn.Module, Any], Tensor], str]] = {
    "not a number": (
        lambda m, b: m(b[0]).sum() * float("nan"),
        "loss is nan before training; check the model",
    ),
    "infinite": (
        lambda m, b: m(b[0]).sum() * 0 + float("inf"),
        "loss is inf before training; check the model",
    ),
    "constant": (
        lambda m, b: m(b[0]).sum() * 0 + 1,
        "does not change at probes of radius .*give a larger --eps",
    ),
    "flat here": (
        lambda m, b: F.relu(m(b[0]).square().mean() - 50),
        "does not change at probes of radius .*give a larger --eps",
    ),
}


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("case", BROKEN)
def test_a_loss_that_shows_no_slope_is_refused(case, eps):
    loss, words = BROKEN[case]
    model, batch, _ = built(lambda: logistic(1.0))
    engine = Engine(model, compose("stiefel", rank=3, eps=eps), lr=None, loss=loss)
    with pytest.raises(NonFiniteError if "before" in words else UsageError, match=words):
        engine.step([batch])


def test_a_loss_that_breaks_off_the_starting_point_is_refused():
    calls: list[int] = []

    def broken(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return model(batch[0]).sum() * (1.0 if len(calls) <= 2 else float("nan"))

    model, batch, _ = built(lambda: logistic(1.0))
    start = model.weight.detach().clone()
    words = "not finite around the starting point; give --eps and --lr"
    for eps in (None, 1e-3):
        calls.clear()
        engine = Engine(model, compose("stiefel", rank=3, eps=eps), lr=None, loss=broken)
        with pytest.raises(NonFiniteError, match=words):
            engine.step([batch])
        assert torch.equal(engine.detach().weight, start)


# ---- later steps -----------------------------------------------------------------------------------------------------


def test_a_rate_that_was_measured_falls_as_the_squared_slopes_rise(monkeypatch):
    monkeypatch.setattr("zolr.tuning.FIRST_STEPS", 4)
    monkeypatch.setattr("zolr.tuning.RUNNING_STEPS", 3)
    model, batch, loss = built(classes)
    size = [1.0]
    engine = Engine(model, compose("stiefel", rank=3), lr=None, loss=lambda m, b: size[0] * loss(m, b))
    engine._schedule = lambda step: 0.9**step
    seen, first, now = [], 0.0, 0.0
    for step in range(12):
        size[0] = 1.0 if step < 6 else 5.0  # slopes five times as large: the curvature is, too
        info = engine.step([batch])
        assert engine.base_lr is not None and info.slope is not None
        factor = 1.0 if step < 4 or now <= first else first / now
        assert info.lr == pytest.approx(engine.base_lr * 0.9**step * factor, rel=1e-9)
        seen.append(info.slope**2)
        first = sum(seen[:4]) / len(seen[:4])
        now = first if step < 4 else now + (seen[-1] - now) / 3
    assert now > 2 * first


def test_a_rate_that_was_given_and_steps_without_a_size_are_left_alone():
    for lr, optimizer in ((1e-3, "sgd"), (None, "adamw")):
        model, batch, loss = built(classes)
        engine = Engine(model, compose("stiefel", rank=3, optimizer=optimizer), lr=lr, loss=loss)
        rates = {engine.step([batch]).lr for _ in range(150)}
        assert rates == {engine.base_lr}


@pytest.mark.parametrize(
    ("count", "pair"), [(None, False), (32, False), (32, True)], ids=["mean", "per example", "pair"]
)
def test_the_share_goes_by_the_rows_that_a_loss_counts(count, pair):
    model, batch, _ = built(classes)

    def loss(m: nn.Module, b: Any) -> Any:
        losses = F.cross_entropy(m(b[0]), b[1], reduction="none")
        return losses.mean() if count is None else (losses.sum(), losses.numel()) if pair else losses

    engine = Engine(model, compose("stiefel", rank=3, eps=1e-3), lr=None, loss=loss)
    engine.step([batch, batch])
    assert engine.tuning is not None
    rows = None if count is None else 64
    expected = share(rows) / engine.tuning.curvature
    overall = math.sqrt(
        sum(float(v.weight.square().sum()) for v in engine.variables)
        / sum(v.weight.numel() for v in engine.variables)
    )
    assert engine.tuning.lr == pytest.approx(
        min(expected, LARGEST_STEP * overall / engine.tuning.slope), rel=0.02
    )


# ---- language models -------------------------------------------------------------------------------------------------


def language_model(family: str) -> nn.Module:
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        OPTConfig,
        OPTForCausalLM,
    )

    sizes: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    usual = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "bert":
        return BertForMaskedLM(BertConfig(**sizes, **usual, intermediate_size=64))
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, **usual, intermediate_size=64))
    if family == "opt":
        return OPTForCausalLM(OPTConfig(**sizes, **usual, ffn_dim=64, word_embed_proj_dim=32))
    return GPT2LMHeadModel(GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=2))


NOTHING = 0.03  # share of the loss: where no rate gains more than that in 160 steps, none of them stalls
FAMILIES = [("bert", "all"), ("gpt2", "attention"), ("llama", "all"), ("opt", "attention")]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "train"), FAMILIES)
def test_a_rate_chosen_neither_diverges_nor_stalls_against_a_grid_on_a_language_model(family, train):
    from zolr.models import prompt_loss

    numbers = torch.Generator().manual_seed(3)
    ids = torch.randint(10, 40, (64, 8), generator=numbers)
    labels = torch.arange(64) % 3
    ids[torch.arange(64), torch.randint(6, (64,), generator=numbers)] = 4 + labels  # the word that tells
    ids[:, -1] = 3
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "positions": torch.full((64,), 7),
        "labels": labels,
    }

    def losses(lr: float | None, steps: int = 160) -> tuple[list[float], float]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = language_model(family).eval()
        method = compose("stiefel", rank=8, eps=None if lr is None else 1e-3)
        engine = Engine(model, method, lr=lr, loss=prompt_loss((7, 8, 9)), select=train)
        seen = [engine.step([batch]).loss for _ in range(steps)]
        return [sum(seen[i : i + 20]) / 20 for i in range(0, steps, 20)], engine.base_lr or 0.0

    means, lr = losses(None)
    assert max(means) < 1.05 * means[0], "diverges"
    gained = means[0] - means[-1]
    others = [losses(lr * factor)[0] for factor in (1 / 8, 8)]
    best = max(means[0] - other[-1] for other in others if other[-1] == other[-1])
    assert gained > 0 and (gained > 0.4 * best or best < NOTHING * means[0]), (
        f"stalls: {gained:.4f}, a rate of the grid gains {best:.4f}"
    )
