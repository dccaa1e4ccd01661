"""A model is trained as it is given: weights in any layout of memory, modules in modes of their own, schedules that move momenta."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import GPT2Config, GPT2LMHeadModel

import zolr
from zolr.cli.job import Job
from zolr.cli.pretraining import Pretraining
from zolr.cli.workload import Workload
from zolr.errors import UsageError
from zolr.estimators import totals
from zolr.memory import kept, predict

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)) + 1
Y = torch.randint(0, 3, (16,), generator=torch.Generator().manual_seed(1))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


# ---- layouts ------------------------------------------------------------------------------------------------------------------


def laid_out(weight: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The same numbers in another layout, and the memory around them."""
    if layout == "transposed":
        around = weight.t().clone()
        return around.t(), around
    around = torch.full((weight.shape[0], 3 * weight.shape[1]), 7.0)
    part = around[:, weight.shape[1] : 2 * weight.shape[1]]
    part.copy_(weight)
    return part, around


def trained(layout: str | None, method: str, **more: Any) -> tuple[Tensor, Tensor | None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    around = None
    if layout is not None:
        first: Any = net[0]
        part, around = laid_out(first.weight.detach(), layout)
        first.weight = nn.Parameter(part)
    name, _, paradigm = method.partition(":")
    run = zolr.Engine(net, zolr.compose(name, paradigm or None, **more), lr=1e-2, loss=loss)
    for _ in range(4):
        run.step([(X, Y)])
    return run.detach()[0].weight.detach().clone(), around


@pytest.mark.parametrize("layout", ["transposed", "slice"])
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("adamw:fo", {}),
        ("badam:fo", {}),
        ("muon:fo", {}),
        ("lomo:fo", {}),
        ("mezo:zo", {"optimizer": "adamw", "eps": 1e-3}),
        ("zo-adam:zo", {"projector": "identity", "eps": 1e-3}),
        ("stiefel:fwd", {"projector": "identity"}),
        ("stiefel:fo", {"rank": 2}),
    ],
)
def test_a_weight_of_any_layout_trains_as_a_row_major_one(
    layout: str, method: str, more: dict[str, Any]
) -> None:
    plain, _ = trained(None, method, **more)
    found, around = trained(layout, method, **more)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    if layout == "slice":
        assert around is not None and (around[:, :6] == 7).all() and (around[:, 12:] == 7).all()


def test_adam_moves_every_entry_of_a_weight_that_is_read_transposed_by_its_own_gradient() -> None:
    """The first step of Adam is the sign of the gradient times the rate, whatever the layout of GPT-2's weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    ids = torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(0))
    of: Callable[..., Any] = lambda model, batch: model(batch, labels=batch).loss  # noqa: E731
    before = net.transformer.h[0].attn.c_attn.weight.detach().clone()
    run = zolr.Engine(net, zolr.compose("mezo", "zo", optimizer="adamw", eps=1e-2), lr=1e-2, loss=of)
    (variable,) = (v for v in run.variables if v.name.endswith("h.0.attn.c_attn.weight"))
    estimator: Any = run.method.estimator
    direction, _ = estimator.draw(run.active, run.key.fold_in("step", 0))[0], None
    drawn = direction(variable.name, slice(0, variable.shape[0])).float()
    info = run.step([ids])
    assert info.slope is not None
    moved = (run.detach().transformer.h[0].attn.c_attn.weight.detach() - before).t()
    signs = torch.sign(moved) * torch.sign(drawn)
    assert signs.unique().numel() == 1  # all along the direction, or all against it
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-2), rtol=1e-2, atol=0)


# ---- modes and statistics -----------------------------------------------------------------------------------------------------


def normed() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.mark.parametrize("paradigm", ["fo", "zo"])
@pytest.mark.parametrize("training", [True, False])
def test_modules_are_in_their_own_mode_after_a_step(paradigm: str, training: bool) -> None:
    net = normed().train(training)
    net[1].train(not training)
    modes = [module.training for module in net.modules()]
    eps = {"eps": 1e-3} if paradigm == "zo" else {}
    run = zolr.Engine(net, zolr.compose("stiefel", paradigm, rank=2, **eps), lr=1e-3, loss=loss)
    run.step([(X, Y)])
    assert [module.training for module in net.modules()] == modes


def test_a_frozen_norm_in_a_training_model_is_used_as_it_is() -> None:
    net = normed().train()
    net[1].eval()
    net[3].eval()
    seen = float(loss(net, (X, Y)).detach())
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    run = zolr.Engine(net, zolr.compose("stiefel", "fo", rank=2), lr=1e-3, loss=loss)
    assert run.step([(X, Y)]).loss == pytest.approx(seen, rel=1e-6)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


def test_a_check_leaves_a_frozen_norm_as_it_is() -> None:
    net = normed().train()
    net[1].eval()
    method = zolr.compose("stiefel", "fo", rank=2)
    run = zolr.Engine(net, method, lr=1e-3, loss=loss, check=(X, Y))
    assert [module.training for module in net] == [True, False, True, True, True]
    run.step([(X, Y)])
    assert not any(net[1].running_mean)


@pytest.mark.parametrize("verb", ["finetune", "pretrain"])
def test_an_evaluation_leaves_modules_in_their_own_mode(
    verb: str, zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = (Workload, "predictions") if verb == "finetune" else (Pretraining, "evaluate")
    evaluate, seen = getattr(owner, name), []

    def watched(self: Any, *arguments: Any) -> Any:
        self.model.train()
        modules = list(self.model.modules())
        modules[-1].eval()
        found = evaluate(self, *arguments)
        seen.append([module.training for module in modules])
        return found

    monkeypatch.setattr(owner, name, watched)
    monkeypatch.setattr(owner if verb == "pretrain" else Job, "predicted", None)
    words = ["--method", "stiefel", "--paradigm", "fo", "--steps", 1, "--batch-size", 2, "--eval-rows", 4]
    if verb == "pretrain":
        (tmp_path / "text.txt").write_text("\n\n".join(f"The {i} mice met {i * i} cats." for i in range(90)))
        words += ["--data", tmp_path / "text.txt", "--train-tokenizer", "--vocab-size", 280, "--length", 16]
        words += ["--hidden-size", 16, "--layers", 1, "--heads", 2]
    code, _, err = zolr(verb, *words, "--quiet", "--output", tmp_path / "run")
    assert code == 0, err
    assert seen and all(modes == [True] * (len(modes) - 1) + [False] for modes in seen)


@pytest.mark.parametrize("fails", ["nan", "raises"])
def test_a_step_that_is_not_taken_leaves_running_statistics_alone(fails: str) -> None:
    net = normed().train()
    run = zolr.Engine(net, zolr.compose("stiefel", "fo", rank=2), lr=1e-3, loss=loss)
    run.step([(X, Y)])
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    if fails == "nan":
        assert run.step([(torch.full_like(X, float("nan")), Y)]).skipped
    else:
        with pytest.raises(IndexError):
            run.step([(X, Y + 5)])
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    run.step([(X, Y)])
    assert not all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


def test_a_pass_that_measures_the_norm_leaves_running_statistics_alone() -> None:
    seen = []
    for clip in (None, 0.1):
        net = normed().train()
        method = zolr.compose("galore", "fo", rank=2, clip_by="twice")
        run = zolr.Engine(net, method, lr=1e-3, loss=loss, clip=clip)
        run.step([(X, Y)])
        seen.append({name: buffer.clone() for name, buffer in net.named_buffers()})
    once, twice = seen
    assert once and all(torch.equal(buffer, twice[name]) for name, buffer in once.items())


# ---- schedules ----------------------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=12),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, cycle_momentum=True),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
def test_schedules_that_move_momenta_resume_bit_for_bit(name: str, optimizer: str) -> None:
    def made() -> zolr.Engine:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Linear(6, 3)
        method = zolr.compose("stiefel", "fo", rank=2, optimizer=optimizer)
        return zolr.Engine(net, method, lr=1e-2, loss=loss, schedule=SCHEDULES[name])

    run = made()
    losses = [run.step([(X, Y)]).loss for _ in range(10)]
    first = made()
    for _ in range(5):
        first.step([(X, Y)])
    again = made()
    again.load_state_dict(first.state_dict())
    assert [again.step([(X, Y)]).loss for _ in range(5)] == losses[5:]


@pytest.mark.parametrize("optimizer", ["muon", "flora"])
@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_a_schedule_that_moves_momenta_is_refused_where_groups_have_others(name: str, optimizer: str) -> None:
    settings = {"total_steps": 9} if name == "OneCycleLR" else {"base_lr": 1e-3}
    cls = getattr(torch.optim.lr_scheduler, name)

    def run(**more: Any) -> zolr.Engine:
        method = zolr.compose("adamw", optimizer=optimizer)
        schedule = lambda o: cls(o, max_lr=1e-2, **settings, **more)  # noqa: E731
        return zolr.Engine(nn.Linear(6, 3), method, lr=1e-3, loss=loss, schedule=schedule)

    with pytest.raises(UsageError, match=f"optimizer '{optimizer}' .*give it cycle_momentum=False"):
        run()
    assert run(cycle_momentum=False).step([(X, Y)]).lr < 1e-2


# ---- what a projector learns from inputs --------------------------------------------------------------------------------------


class Mapped(nn.Linear):
    """A linear map under another name, as Falcon has it, called by keyword."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T + self.bias


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Mapped(6, 8), Mapped(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(hidden=x)))


def test_a_subclass_of_a_linear_map_shows_its_inputs_and_windows_last() -> None:
    run = zolr.Engine(
        Keywords(), zolr.compose("dependent", "zo", rank=2, refresh_every=4, eps=1e-3), lr=1e-3, loss=loss
    )
    infos = [run.step([(X, Y)]) for _ in range(6)]
    assert [info.refreshed for info in infos] == [True, False, False, False, True, False]
    assert set(run.windows.spectra) == {"first.weight", "last.weight"}


def test_where_there_is_nothing_to_learn_no_forward_is_spent_on_it() -> None:
    method = zolr.compose("dependent", "zo", refresh_every=100, eps=1e-3)
    run = zolr.Engine(normed(), method, lr=1e-3, loss=loss, select="norm+bias")
    assert [run.step([(X, Y)]).forwards for _ in range(3)] == [2, 2, 2]


# ---- losses and settings ------------------------------------------------------------------------------------------------------


def test_a_pair_of_numbers_is_a_loss_of_forward_only_runs() -> None:
    pairs = []
    for number in (False, True):

        def of(model: nn.Module, batch: Any, number: bool = number) -> Any:
            total = loss(model, batch) * len(batch[1])
            return (float(total), len(batch[1])) if number else (total, len(batch[1]))

        with torch.random.fork_rng():
            torch.manual_seed(0)
            run = zolr.Engine(
                nn.Linear(6, 3), zolr.compose("stiefel", "zo", rank=2, eps=1e-2), lr=1e-2, loss=of
            )
        pairs.append([run.step([(X, Y)]).loss for _ in range(3)])
    assert pairs[0] == pytest.approx(pairs[1], rel=1e-5)


@pytest.mark.parametrize("wrong", [None, {"loss": 1.0}, [torch.ones(()), 2], (1.0, 2, 3)])
def test_what_is_no_loss_is_named(wrong: Any) -> None:
    with pytest.raises(UsageError, match=f"the loss is of type {type(wrong).__name__}; return a scalar mean"):
        totals(wrong)


@pytest.mark.parametrize("paradigm", ["fo", "zo", "fwd"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            lambda total, given: (total, given),
            r"a pair with a tensor \(5, 3\) in it.*without what the model gave",
        ),
        (lambda total, given: (given, 5), r"a pair with a tensor \(5, 3\) in it"),
        (lambda total, given: (total, None), "a pair with a NoneType in it"),
        (lambda total, given: total * 1j, "the loss is complex"),
    ],
)
def test_a_loss_beside_what_is_none_is_named(paradigm: str, wrong: Any, said: str) -> None:
    def of(model: nn.Module, x: Tensor) -> Any:
        given = model(x)
        return wrong(given.square().sum(), given)

    method = zolr.compose("stiefel", paradigm, rank=2, eps=1e-3 if paradigm == "zo" else None)
    with pytest.raises(UsageError, match=said):
        zolr.Engine(nn.Linear(6, 3), method, lr=1e-2, loss=of).step([torch.randn(5, 6)])


def test_a_pair_may_have_its_numbers_in_tensors_of_one() -> None:
    total, count = totals((torch.ones(1), torch.full((1, 1), 3)))
    assert total.shape == () and isinstance(count, Tensor) and count.shape == ()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"model": 3}, "model = 3 .*torch.nn.Module"),
        ({"loss": None}, "loss = None .*a function of the model and a batch"),
        ({"select": ["0.weight"]}, r"select = \['0.weight'\] .*a predicate"),
        ({"schedule": "cosine"}, "schedule = 'cosine' .*a function of the step"),
        ({"hold": "all"}, "hold = 'all' .*True"),
        ({"team": 3}, "team = 3 "),
        ({"model": nn.LazyLinear(3)}, "weight 'weight' has no shape .*call the model on a batch"),
        ({"model": nn.Sequential(torch.jit.script(nn.Linear(6, 3)))}, "module '0' is compiled by torch.jit"),
        ({"model": torch.jit.trace(nn.Linear(6, 3), torch.ones(1, 6))}, "compiled by torch.jit"),
    ],
)
def test_an_argument_of_another_kind_is_named(setting: dict[str, Any], said: str) -> None:
    settings: dict[str, Any] = {"model": perceptron(), "loss": loss, "lr": 1e-3, **setting}
    with pytest.raises(UsageError, match=said):
        zolr.Engine(settings.pop("model"), zolr.compose("adamw"), **settings)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"eps": "a"}, "eps = 'a' is no number"),
        ({"scale": "a"}, "scale = 'a' is no number"),
        ({"optimizer": 3}, "optimizer '3' is not known"),
        ({"ranks": 3}, "'3' is no NAME=RANK"),
        ({"set": "scale=2"}, r"set = 'scale=2' is no list of settings"),
        ({"set": [3]}, r"set = \[3\] is no list of settings"),
    ],
)
def test_a_setting_of_another_kind_is_named(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        zolr.compose("stiefel", **setting)


def test_what_has_no_subspace_for_orthonormal_probes_is_named() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 2))
    method = zolr.compose("stiefel", "zo", rank=2, eps=1e-3, probes=2, directions="orthonormal")
    engine = zolr.Engine(model, method, lr=1e-3, loss=lambda m, x: m(x).square().mean())
    with pytest.raises(UsageError, match="weight '0.weight' is trained as a whole; use directions 'fresh'"):
        engine.step([torch.randn(5, 2, 4)])


def test_an_optimizer_that_refuses_its_weights_or_settings_is_named() -> None:
    with pytest.raises(UsageError, match=r"'Muon' cannot train these weights: .*2D.*or optimizer 'muon'"):
        zolr.Engine(
            nn.Linear(6, 3), zolr.compose("stiefel", "fo", rank=2, optimizer="Muon"), lr=1e-2, loss=loss
        )
    with pytest.raises(UsageError, match="weight_decay = nan"):
        zolr.Engine(nn.Linear(6, 3), zolr.compose("adamw"), lr=1e-2, loss=loss, weight_decay=float("nan"))


def test_an_embedding_that_scales_by_frequency_keeps_doing_so() -> None:
    ids = torch.tensor([[1, 1, 1, 2]])
    grads = []
    for attached in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Linear(4, 2))
        of: Callable[..., Any] = lambda model, batch: model(batch).square().mean()  # noqa: E731
        if attached:
            run = zolr.Engine(net, zolr.compose("stiefel", "fo", rank=4), lr=1e-3, loss=of)
            taken: dict[str, Tensor] = {}
            run.method.estimator(
                lambda b, net=net, of=of: of(net, b),
                [ids],
                run.variables,
                lambda v, g, t=taken: t.update({v.name: g}),
                run.key,
            )
            variable = run.variables[0]
            grads.append(variable.subspace.lift(taken["0.weight"]))  # of rank 4: the whole space
        else:
            of(net, ids).backward()
            first: Any = net[0]
            grads.append(first.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


# ---- the step that is predicted is the largest --------------------------------------------------------------------------------


def peak_of(run: zolr.Engine, data: Any, steps: int) -> int:
    from zolr.memory import LiveBytes

    live = LiveBytes()
    live.track(run, data)
    with live:
        for _ in range(steps):
            run.step([data])
    assert kept(run)["coords"]
    return live.peak


@pytest.mark.parametrize("q", [0.3, 0.9])
def test_weights_that_a_coin_leaves_whole_are_predicted(q: float) -> None:
    from dataclasses import replace

    from zolr.memory import PERIODS
    from zolr.models import build, prompt_loss
    from zolr.residuals.compensate import Compensate

    net: Any = build(
        "llama-20m", num_hidden_layers=3, hidden_size=64, intermediate_size=128, vocab_size=200, seed=0
    )
    method = zolr.compose("gum", rank=4, refresh_every=1)
    method = replace(method, residual=Compensate(q))
    found = predict(net.config, method, batch_size=2, max_length=8)
    assert any("coins" in one for one in found.assumptions)
    ids = torch.randint(5, 200, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    data = {"input_ids": ids, "attention_mask": mask}
    data |= {"positions": torch.ones(2, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
    run = zolr.Engine(net, method, lr=1e-3, loss=prompt_loss((5, 6)))
    assert peak_of(run, data, PERIODS) == pytest.approx(found.peak_bytes, rel=0.02)


def test_a_first_step_that_chooses_takes_no_more_than_others_and_is_predicted() -> None:
    from zolr.models import build, prompt_loss

    found = {}
    for chooses in (True, False):
        net: Any = build(
            "llama-20m", num_hidden_layers=2, hidden_size=64, intermediate_size=128, vocab_size=200, seed=0
        )
        lr = None if chooses else 1e-3
        method = zolr.compose("stiefel", "zo", rank=16, refresh_every=2, eps=None if chooses else 1e-3)
        ids = torch.randint(5, 200, (2, 8), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[:, -1] = 0
        data = {"input_ids": ids, "attention_mask": mask}
        data |= {"positions": torch.ones(2, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
        predicted = predict(net.config, method, batch_size=2, max_length=8, lr=lr).peak_bytes
        run = zolr.Engine(net, method, lr=lr, loss=prompt_loss((5, 6)))
        found[chooses] = peak_of(run, data, 3), predicted
    for measured, predicted in found.values():
        assert predicted == pytest.approx(measured, rel=0.01)
    # the window's own subspace is put away while others are looked at, and drawn again
    assert found[True][0] == pytest.approx(found[False][0], rel=0.01)


@pytest.mark.parametrize("name", ["stiefel", "dependent", "grasswalk", "subzero"])
def test_subspaces_are_the_same_bits_after_the_rate_was_chosen(name: str) -> None:
    found = []
    for chooses in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        method = zolr.compose(name, "zo", rank=2, eps=None if chooses else 1e-3)
        run = zolr.Engine(net, method, lr=None if chooses else 1e-3, loss=loss)
        run.step([(X, Y)])
        assert (run.tuning is not None) is chooses
        found.append([tensor for v in run.variables for tensor in run.subspace(v).tensors().values()])
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- what a step cannot reach -------------------------------------------------------------------------------------------------


class Past(nn.Module):
    """Reads a weight past its module, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.first(x)), self.last.weight, self.last.bias)


def test_weights_that_no_forward_comes_by_are_named_once() -> None:
    run = zolr.Engine(Past(), zolr.compose("stiefel", "fo", rank=2), lr=1e-3, loss=loss)
    with pytest.warns(
        UserWarning, match=r"used weight 'last.weight' and 1 more through its module: .*--train"
    ):
        run.step([(X, Y)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.step([(X, Y)])
        zolr.Engine(normed(), zolr.compose("stiefel", "fo", rank=2), lr=1e-3, loss=loss).step([(X, Y)])


class Idle(nn.Module):
    """A model with a layer that its forward leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_weights_that_are_read_past_their_modules_are_refused_where_they_are_checked() -> None:
    message = r"'last.weight' is used by no forward of its module \(and so is 1 more\), but read past it \(.*py:\d+\).*--train"
    with pytest.raises(UsageError, match=message):
        zolr.Engine(Past(), zolr.compose("stiefel", "fo", rank=2), lr=1e-3, loss=loss, check=(X, Y))
    run = zolr.Engine(Idle(), zolr.compose("stiefel", "fo", rank=2), lr=1e-3, loss=loss, check=(X, Y))
    with pytest.warns(UserWarning, match=r"used weight 'idle.weight' and 1 more"):  # which does no harm
        run.step([(X, Y)])


class Dropping(Idle):
    """Leaves a layer out by chance, in training."""

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + (0 if self.training else self.idle(x[:, :4])[:, :3])


def test_a_layer_that_chance_left_out_is_not_called_unused() -> None:
    run = zolr.Engine(Dropping().train(), zolr.compose("stiefel", "fo", rank=2), lr=1e-3, loss=loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.step([(X, Y)])
    assert run.model.training


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x[:, None])[0][:, -1])


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class Own(Idle):
    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(self.used(x))


class Unfinished(Idle):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("of the model's own")


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("model", "named"), [(Recurrent, "rnn|lstm"), (weight_normed, "weight_norm"), (Own, "autograd.Function")]
)
def test_what_has_no_derivative_in_forward_mode_is_named(model: Callable[[], nn.Module], named: str) -> None:
    run = zolr.Engine(model(), zolr.compose("stiefel", "fwd", rank=2), lr=1e-3, loss=loss)
    with pytest.raises(UsageError, match=f"cannot derive .*({named}).*use paradigm 'fo' or 'zo'$"):
        run.step([(X, Y)])


def test_other_refusals_of_a_forward_stay_as_they_are() -> None:
    run = zolr.Engine(Unfinished(), zolr.compose("stiefel", "fwd", rank=2), lr=1e-3, loss=loss)
    with pytest.raises(NotImplementedError, match="of the model's own"):
        run.step([(X, Y)])


@pytest.mark.parametrize("way", ["data", "assign", "double"])
def test_weights_that_were_put_elsewhere_are_refused(way: str) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    run = zolr.Engine(net, zolr.compose("stiefel", "fo", rank=2), lr=1e-3, loss=loss)
    run.step([(X, Y)])
    if way == "data":
        net[1].bias.data = net[1].bias.data.clone()
    elif way == "assign":
        net.load_state_dict({name: p.clone() for name, p in net.state_dict().items()}, assign=True)
    else:
        net.double()
    with pytest.raises(
        UsageError, match=r"weight '[01].(weight|bias)' has other memory .* make the Engine after that"
    ):
        run.step([(X, Y)])


@pytest.mark.parametrize("legacy", [True, False])
def test_a_head_that_reads_the_table_of_words_moves_it(legacy: bool) -> None:
    from transformers import DebertaV2Config, DebertaV2ForMaskedLM

    from zolr.models import lm_loss, splits

    shape: dict[str, Any] = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config = DebertaV2Config(vocab_size=40, **shape, legacy=legacy, hidden_dropout_prob=0.0)
    config.attention_probs_dropout_prob = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net: Any = DebertaV2ForMaskedLM(config)
    assert splits(net)
    ids = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    stock = net(**data).loss
    stock.backward()
    exact = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    run = zolr.Engine(net, zolr.compose("sgd"), lr=1e-3, loss=lm_loss)
    taken: dict[str, Tensor] = {}
    estimate = run.method.estimator(
        lambda batch: lm_loss(net, batch),
        [data],
        run.variables,
        lambda v, g: taken.update({v.name: g}),
        run.key,
    )
    assert float(estimate.loss) == pytest.approx(float(stock.detach()), rel=1e-5)
    assert len(exact) > 10
    for name, gradient in exact.items():
        torch.testing.assert_close(taken[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


# ---- the count of a run is that of all its steps ------------------------------------------------------------------------------

GROWING: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "held": (lambda: zolr.compose("stiefel", "fo", rank=4, refresh_every=2), {"hold": True, "hold_rank": 16}),
    "held, forward only": (
        lambda: zolr.compose("stiefel", "zo", rank=4, refresh_every=2, eps=1e-3),
        {"hold": True, "hold_rank": 16},
    ),
    "blocks": (lambda: zolr.compose("lisa", set=["blocks.every=2"]), {}),
    "spectra": (lambda: zolr.compose("dependent", "fo", rank=4, refresh_every=3), {}),
    "coins": (lambda: zolr.compose("gum", rank=4, refresh_every=2, set=["residual.q=0.5"]), {}),
    "chosen": (lambda: zolr.compose("stiefel", "zo", rank=4, refresh_every=3), {"lr": None}),
}


@pytest.mark.parametrize("case", GROWING)
def test_the_steps_that_are_counted_have_the_peak_of_all(case: str) -> None:
    from zolr.cli.record import Meter
    from zolr.memory import LiveBytes
    from zolr.models import build, prompt_loss

    made, more = GROWING[case]
    numbers = torch.Generator().manual_seed(0)
    batches = []
    for length in (7, 9, 8, 9, 5, 9, 9, 6) * 3:
        ids = torch.randint(5, 200, (2, length), generator=numbers)
        mask = torch.ones_like(ids)
        mask[:, -1] = 0
        data = {"input_ids": ids, "attention_mask": mask}
        data |= {"positions": torch.ones(2, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
        batches.append(data)
    peaks, counted = [], 0
    for every in (True, False):
        net: Any = build(
            "llama-20m", num_hidden_layers=3, hidden_size=64, intermediate_size=128, vocab_size=200, seed=0
        )
        run = zolr.Engine(net, made(), loss=prompt_loss((5, 6)), **{"lr": 1e-3, **more})
        meter = Meter(run, torch.device("cpu"))
        peak = 0
        for data in batches:
            if every:
                live = LiveBytes()
                live.track(run, data)
                with live:
                    run.step([data])
                peak = max(peak, live.peak)
            else:
                with meter.around([data]):
                    run.step([data])
                counted += meter.counting
        peaks.append(peak if every else meter.peak)
    assert counted < len(batches)
    assert peaks[1] == peaks[0]


def test_a_first_step_that_chooses_is_counted_where_it_is_the_only_one() -> None:
    from zolr.cli.record import Meter
    from zolr.models import build, lm_loss

    ids = torch.randint(5, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    data, peaks = {"input_ids": ids, "labels": ids}, []
    for steps in (1, 2):
        net: Any = build(
            "llama-20m", num_hidden_layers=1, hidden_size=16, intermediate_size=32, vocab_size=50, seed=0
        )
        run = zolr.Engine(net, zolr.compose("stiefel", "zo", rank=2), lr=None, loss=lm_loss)
        meter = Meter(run, torch.device("cpu"), steps=steps)
        for step in range(steps):
            with meter.around([data]):
                run.step([data])
            assert meter.counting is (step == steps - 1)
        peaks.append(meter.peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01) and peaks[1] > 0


# ---- what no step could train ------------------------------------------------------------------------------------------------


def perceptron() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def penalized(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return loss(model, batch) + sum(p.square().sum() for p in model.parameters())


def logged(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    weight = next(model.parameters())
    assert weight.detach().norm() > 0 and weight.shape == (8, 6) and weight.dtype == torch.float32
    assert not weight.new_zeros(3).any() and not torch.zeros_like(weight).any()
    return loss(model, (batch[0].to(weight), batch[1]))


def split(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return loss(model, batch) + sum(torch._foreach_norm([p.chunk(2)[0] for p in model.parameters()]))


def spectral(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return loss(model, batch) + torch.linalg.svdvals(next(model.parameters())).sum()


class TiedByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(nn.functional.linear(torch.tanh(self.inner(x)), self.inner.weight.t()))


class Inner(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def around(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Around(nn.Module):
    """Calls a method of a module that is not its forward, as ProphetNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner.around(x * x)


SMALL = {
    ("stiefel", "fo"): {"rank": 2},
    ("stiefel", "zo"): {"rank": 2, "eps": 1e-3},
    ("stiefel", "fwd"): {"rank": 2},
    ("mezo", "zo"): {"eps": 1e-3},
    ("lomo", "fo"): {},
    ("adamw", "fo"): {},
}


@pytest.mark.parametrize(("name", "paradigm"), SMALL)
def test_what_a_loss_reads_past_the_modules_is_said(name: str, paradigm: str) -> None:
    """A penalty on parameters and a map tied by hand train nothing by themselves; modules and logs read what they like."""

    def said(model: nn.Module, of: Callable[..., Tensor]) -> list[str]:
        engine = zolr.Engine(model, zolr.compose(name, paradigm, **SMALL[name, paradigm]), lr=1e-3, loss=of)  # type: ignore[arg-type]
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", UserWarning)
            for _ in range(2):
                engine.step([(X, Y)])
        return [str(w.message) for w in found if "reads weight" in str(w.message)]

    (once,) = said(perceptron(), penalized)
    assert "'0.weight' itself" in once and "test_as_given.py:" in once and "weight_decay" in once
    for of in (split, spectral):
        assert "'0.weight' itself" in said(perceptron(), of)[0]
    for model in (TiedByHand(), Around()):
        (once,) = said(model, loss)
        assert "'inner.weight'" in once
    assert said(perceptron(), loss) == said(perceptron(), logged) == []
    # a loss that its owner compiles is compiled as it would be; dynamo of torch 2.11 does not trace that an attribute goes again
    if paradigm == "fo" and torch.__version__ >= (2, 12):
        whole = torch.compile(loss, fullgraph=True, backend="eager")
        assert said(perceptron(), whole) == []
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8))
    ids = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))
    assert said(gpt, lambda model, _: model(input_ids=ids, labels=ids).loss) == []


def test_weights_that_no_forward_comes_by_are_said_of_all_of_them() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ParameterList([torch.ones(6, 3)])

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.parts[0]

    engine = zolr.Engine(Bare(), zolr.compose("mezo", eps=1e-3), lr=1e-3, loss=loss)
    with pytest.warns(UserWarning, match=r"no forward of the first step used weight 'parts.0'"):
        engine.step([(X, Y)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "stiefel", "galore", "muon", "apollo"])
def test_weights_without_a_gradient_and_gradients_in_parts(name: str, dtype: torch.dtype) -> None:
    """A branch that some batches leave out, and reentrant checkpointing, of a layer that is used twice too."""
    from torch.utils.checkpoint import checkpoint

    class Branched(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.first, self.often = nn.Linear(6, 6), nn.Linear(6, 6)
            self.idle, self.reentrant = nn.Linear(6, 6), reentrant

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for _ in range(2 if name == "stiefel" else 1):
                x = x + checkpoint(self.often, x, use_reentrant=self.reentrant)
            return x + self.idle(x) if x[0, 0] > 1e3 else x

    found = []
    for reentrant in (False, True):
        torch.manual_seed(0)
        model = Branched(reentrant).to(dtype)
        parts = {"rank": 2} if name in ("stiefel", "galore", "apollo") else {}
        engine = zolr.Engine(
            model,
            zolr.compose(name, "fo", **parts),
            lr=1e-2,
            loss=lambda model, x: model(x).float().square().mean(),
            select=lambda name, p: p.dim() == 2,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the idle layer is said to be idle
            losses = [engine.step([X.to(dtype), X[:3].to(dtype)]).loss for _ in range(3)]
        assert losses[-1] < losses[0]
        found.append(engine.detach().state_dict())
    plain, again = found
    for key, weight in plain.items():
        torch.testing.assert_close(weight, again[key], rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_other_parameters_of_an_embedding_have_no_padding_row() -> None:
    class Table(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(9, 6, padding_idx=0)
            self.extra, self.one = nn.Parameter(torch.ones(3, 6)), nn.Parameter(torch.ones(6))

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + self.extra[ids % 3] * self.one

    for name, parts in (("adamw", {}), ("mezo", {"eps": 1e-3})):
        model = nn.Sequential(Table(), nn.Linear(6, 1))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        engine = zolr.Engine(
            model, zolr.compose(name, **parts), lr=1e-2, loss=lambda m, ids: (m(ids) - 1).square().mean()
        )
        engine.step([torch.tensor([[1, 2, 5, 3, 8]])])
        moved = {k: (w != before[k]) for k, w in engine.detach().state_dict().items()}
        assert moved["0.extra"].any(1).all() and moved["0.one"].any() and not moved["0.weight"][0].any(), name


def test_what_cannot_be_trained_is_refused_in_one_line() -> None:
    from torch.nn.utils import prune
    from torch.utils.checkpoint import checkpoint

    def stepped(model: nn.Module, name: str, of: Any, batch: Any = (X, Y), **more: Any) -> None:
        zolr.Engine(model, zolr.compose(name, **more), lr=1e-3, loss=of).step([batch])

    pruned = perceptron()
    prune.l1_unstructured(pruned[0], "weight", 0.3)
    with pytest.raises(UsageError, match=r"pruning \(L1Unstructured\).*prune.remove"):
        stepped(pruned, "adamw", loss)
    prune.remove(pruned[0], "weight")
    stepped(pruned, "adamw", loss)

    for of in (lambda model, batch: float(loss(model, batch)), lambda m, b: m(b[0]).argmax(1).float().mean()):
        with pytest.raises(UsageError, match="has no derivative in any trained weight"):
            stepped(perceptron(), "stiefel", of, paradigm="fwd", rank=2)

    def twice(model: nn.Module, batch: Any) -> Any:
        x = batch[0].clone().requires_grad_()
        for _ in range(2):
            x = checkpoint(model, x, use_reentrant=True)
        return x.square().mean()

    for name in ("adamw", "lomo"):
        with pytest.raises(UsageError, match="in two parts.*use_reentrant=False"):
            stepped(nn.Linear(6, 6), name, twice)

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Embedding(4, 6, sparse=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rows(x).mean(0)

    ids = torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(UsageError, match="'rows.weight' has sparse gradients.*sparse=False"):
        stepped(Sparse(), "adamw", lambda model, x: model(x).sum(), ids)
    stepped(Sparse(), "mezo", lambda model, x: model(x).sum(), ids, eps=1e-3)

    with pytest.raises(UsageError, match="at least one example"):
        stepped(perceptron(), "dpzero", lambda model, x: model(x).sum(1), X[:0])
    with pytest.raises(UsageError, match="the loss is of type list"):
        stepped(perceptron(), "dpzero", lambda model, x: [1.0], X)

    engine = zolr.Engine(
        nn.Linear(6, 3, bias=False), zolr.compose("stiefel", "zo", rank=2, eps=1e-3), lr=1e-3, loss=loss
    )
    engine.model.to(torch.float64)
    with pytest.raises(UsageError, match="make the Engine after that"):
        engine.step([(X.double(), Y)])


def test_the_parts_of_one_batch_are_not_taken_for_micro_batches() -> None:
    engine = zolr.Engine(perceptron(), zolr.compose("adamw"), lr=1e-3, loss=loss)
    for batch in ([X, Y], (X, Y)):  # what a DataLoader yields
        with pytest.raises(UsageError, match=r"2 tensors are of different kinds.*step\(\[batch\]\)"):
            engine.step(batch)
    engine.step([[X, Y]])
    alone = zolr.Engine(perceptron(), zolr.compose("adamw"), lr=1e-3, loss=lambda m, x: m(x).square().mean())
    assert alone.step([X, X[:3]]).forwards == 6


def test_a_loss_that_takes_its_micro_batches_apart_is_told_of_the_list() -> None:
    near = lambda m, batch: (m(batch[0]) - batch[1]).square().mean()  # noqa: E731
    parts = [X, torch.zeros(16, 6)]  # of one kind

    def stepped(of: Any, batches: list[Any]) -> None:
        zolr.Engine(nn.Linear(6, 6), zolr.compose("adamw"), lr=1e-3, loss=of).step(batches)

    with pytest.warns(UserWarning, match=r"takes each of 2 micro-batches apart.*step\(\[batch\]\)"):
        stepped(near, parts)

    def unpacks(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return (model(x) - y).square().mean()

    with pytest.raises(ValueError, match="too many values") as raised:
        stepped(unpacks, parts)
    assert any("step([batch])" in note for note in raised.value.__notes__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(near, [parts])
        stepped(lambda m, x: (m(x[:, :6]) - x).square().mean(), parts)


@pytest.mark.parametrize("paradigm", ["zo", "fo"])
def test_a_pair_that_is_no_sum_and_count_is_pointed_at(paradigm: str) -> None:
    def stepped(second: Any) -> zolr.Info:
        of = lambda m, b: (loss(m, b), second)  # noqa: E731
        method = zolr.compose("stiefel", paradigm, rank=2, **({"eps": 1e-3} if paradigm == "zo" else {}))
        return zolr.Engine(perceptron(), method, lr=1e-3, loss=of).step([(X, Y)])

    for accuracy in (0.53, torch.tensor(1.25)):
        with pytest.warns(UserWarning, match=r"which is read as \(sum, count\); return the loss alone if"):
            stepped(accuracy)
    with pytest.raises(UsageError, match=r"pair \(1\.\d+, 0\), which is read as \(sum, count\)"):
        stepped(torch.tensor(0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not stepped(torch.tensor(16)).skipped


def test_weights_that_are_zero_say_nothing_about_a_radius() -> None:
    def engine(zeros: bool, **more: Any) -> zolr.Engine:
        net = nn.Linear(6, 3)
        nn.init.constant_(net.weight, 0.0 if zeros else 0.1)
        nn.init.zeros_(net.bias)
        return zolr.Engine(net, zolr.compose("mezo", **more), lr=None, loss=loss)

    for more in ({}, {"eps": 1e-3}):
        with pytest.raises(
            UsageError, match=r"root mean square of 0, so nothing says how far.*give eps and lr"
        ):
            engine(True, **more).step([(X, Y)])
    assert engine(False).step([(X, Y)]).lr > 0


def test_an_engine_that_has_given_its_model_back_leaves_it_alone() -> None:
    net = perceptron()
    first = zolr.Engine(net, zolr.compose("stiefel", "fo", rank=2), lr=1e-2, loss=loss)
    state = first.state_dict()
    assert first.detach() is net
    second = zolr.Engine(net, zolr.compose("stiefel", "fo", rank=2), lr=1e-2, loss=loss, seed=1)
    for _ in range(3):
        second.step([(X, Y)])
    live = {name: weight.clone() for name, weight in net.state_dict().items()}
    assert first.detach() is net
    calls: list[Callable[[], Any]] = [first.fold, first.refresh, first.export]
    calls += [
        lambda: first.load_state_dict(state),
        lambda: first.verify((X, Y)),
        lambda: first.step([(X, Y)]),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="given back by detach"):
            call()
    assert all(torch.equal(weight, live[name]) for name, weight in net.state_dict().items())
    second.step([(X, Y)])
    assert not torch.equal(net.state_dict()["0.weight"], live["0.weight"])


@pytest.mark.parametrize("name", ["stiefel", "adamw"])
def test_a_model_that_was_changed_after_its_engine_was_made_is_refused(name: str) -> None:
    def engine(**more: Any) -> zolr.Engine:
        net = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 8), nn.Linear(8, 3))
        net[2].requires_grad_(False)
        method = (
            zolr.compose(name, "fo", rank=2, refresh_every=2) if name == "stiefel" else zolr.compose(name)
        )
        of = lambda m, b: nn.functional.cross_entropy(m(b).mean(1), torch.zeros(2).long())  # noqa: E731
        return zolr.Engine(net, method, lr=1e-2, loss=of, **more)

    ids = torch.tensor([[0, 1], [2, 3]])
    for grown in ("unfrozen", "added"):
        run = engine()
        if name == "stiefel":  # at the next refresh
            run.step([ids])
            run.step([ids])
        if grown == "unfrozen":
            run.model[2].requires_grad_(True)
        else:
            run.model.append(nn.Linear(3, 3))
        with pytest.raises(
            UsageError, match=r"weight '[23].weight' requires gradients and was frozen, or not there"
        ):
            run.step([ids])
    run = engine()
    run.step([ids])
    table: Any = run.model[0]
    table.weight.data = torch.zeros(7, 6)  # as resize_token_embeddings does
    with pytest.raises(UsageError, match=r"weight '0.weight' has other memory .*make the Engine after that"):
        run.step([ids])


def test_steps_that_change_nothing_are_told_of_in_the_end() -> None:
    engine = zolr.Engine(
        perceptron(), zolr.compose("adamw"), lr=1e-3, loss=lambda m, b: loss(m, b) * float("nan")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            assert engine.step([(X, Y)]).skipped
        with pytest.raises(UserWarning, match="more than 20 steps in a row"):
            engine.step([(X, Y)])


def test_small_slips_are_told_in_one_sentence() -> None:
    def engine(**more: Any) -> zolr.Engine:
        return zolr.Engine(perceptron(), zolr.compose("adamw"), lr=1e-3, **{"loss": loss, **more})

    for seed in (None, 1.5, "a", True):
        with pytest.raises(UsageError, match=r"seed = .* cannot be used; give a whole number"):
            engine(seed=seed)
    with pytest.raises(TypeError) as raised:
        engine(check=[(X, Y)])
    assert "check takes one batch" in raised.value.__notes__[0]
    with pytest.raises(UsageError, match="inside of another one"):
        outer = engine(loss=lambda m, b: outer.step([b]).loss)
        outer.step([(X, Y)])
    for wrong, way in (
        (zolr.METHODS["stiefel"], r"compose\('stiefel'\)"),
        (zolr.compose("adamw"), "dataclasses"),
    ):
        with pytest.raises(UsageError, match=f"takes the name of a row.*{way}"):
            zolr.compose(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"projector = Stiefel\(.*is no name.*dataclasses.replace"):
        zolr.compose("stiefel", "fo", projector=zolr.compose("stiefel", "fo").projector)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"one for an adapter.*zolr.lora.wrap"):
        zolr.Engine(perceptron(), zolr.compose("lora", "fo"), lr=1e-3, loss=loss)


@pytest.mark.parametrize("paradigm", ["zo", "fo"])
def test_a_running_average_of_weights_is_taken_of_copies_or_after_a_fold(paradigm: str) -> None:
    for folds in (False, True):
        net = perceptron()
        method = zolr.compose("stiefel", paradigm, rank=2, **({"eps": 1e-3} if paradigm == "zo" else {}))
        engine = zolr.Engine(net, method, lr=1e-2, loss=loss)
        seen = [net.state_dict()["0.weight"].clone()]
        average = AveragedModel(net if folds else engine.export())
        average.update_parameters(net if folds else engine.export())
        for _ in range(4):
            engine.step([(X, Y)])
            if folds:
                engine.fold()
            average.update_parameters(net if folds else engine.export())
            seen.append(net.state_dict()["0.weight"].clone())
        mean = torch.stack(seen).mean(0)
        assert not torch.equal(mean, seen[0])
        torch.testing.assert_close(average.module.state_dict()["0.weight"], mean, rtol=1e-5, atol=1e-6)


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    given = zolr.compose("stiefel", "fo", rank=np.int64(2), refresh_every=np.int32(7))
    assert repr(given) == repr(zolr.compose("stiefel", "fo", rank=2, refresh_every=7))
    with pytest.raises(UsageError, match="rank True"):
        zolr.compose("stiefel", "fo", rank=True)


def test_a_loss_that_its_owner_has_compiled_is_not_looked_into() -> None:
    of = torch.compile(loss, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        engine = zolr.Engine(perceptron(), zolr.compose("stiefel", "zo", rank=2, eps=1e-3), lr=1e-2, loss=of)
        assert engine.step([(X, Y)]).slope


def test_a_layer_without_outputs_is_left_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not initialize it
        net = nn.ModuleList([nn.Linear(6, 3), nn.Linear(3, 0)])
    engine = zolr.Engine(net, zolr.compose("adamw"), lr=1e-3, loss=lambda m, b: loss(m[0], b))  # type: ignore[index]
    assert engine.step([(X, Y)]).loss > 0 and {v.name for v in engine.variables} == {"0.weight", "0.bias"}


# ---- running statistics, and batches that say the same ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("stiefel", {"clip": 0.1}),
        ("dependent", {}),
        ("extrapolation", {}),
        ("adazo-sam", {}),
        ("lorenza", {}),
        ("lomo", {"clip": 0.1}),
        ("galore", {"clip": 0.1}),
    ],
)
def test_a_batch_counts_once_in_running_statistics(name: str, more: dict[str, Any]) -> None:
    parts = {"rank": 2} if name in ("stiefel", "dependent", "galore", "lorenza") else {}
    parts |= {"clip_by": "twice"} if name in ("lomo", "galore") else {}
    model, twin = normed().train(), normed().train()
    twin.load_state_dict(model.state_dict())
    engine = zolr.Engine(model, zolr.compose(name, "fo", **parts), lr=1e-3, loss=loss, **more)
    engine.step([(X, Y), (X[:4] + 1, Y[:4])])
    for x in (X, X[:4] + 1):
        twin(x)
    assert int(model[1].num_batches_tracked) == 2
    reach = 0.1 if name == "adazo-sam" else 1e-6  # it sees the batch from where its first probe is
    for key in ("running_mean", "running_var"):
        assert (getattr(model[1], key) - getattr(twin[1], key)).abs().max() <= reach, key


def test_a_batch_that_is_given_twice_is_two() -> None:
    seen: list[Tensor] = []

    def noisy(model: nn.Module, batch: Any) -> Tensor:
        out = nn.functional.dropout(model(X), 0.5, model.training)
        seen.append((out == 0).detach())
        return out.square().mean()

    for batch in (X, (X, Y), [X], {"x": X}, 0, "a", None):
        seen.clear()
        model = normed().train()
        engine = zolr.Engine(model, zolr.compose("stiefel", "fo", rank=2), lr=1e-3, loss=noisy)
        engine.step([batch, batch])
        assert len(seen) == 2 and not torch.equal(*seen), type(batch)
        assert int(model[1].num_batches_tracked) == 2, type(batch)
