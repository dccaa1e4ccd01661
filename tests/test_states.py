"""A state is all there is: of the model while it is attached, of running statistics, of signs; and what would change weights
silently, or leave them unchanged silently, is refused."""

import copy
import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import zolr
from zolr.engine import Engine
from zolr.errors import UsageError
from zolr.estimators import changed, setting
from zolr.methods import METHODS, Method, compose

ROWS = [(name, paradigm) for name, row in METHODS.items() for paradigm in row.paradigms]


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 9)
        self.norm = nn.BatchNorm1d(8)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.mid(self.embed(ids)))))


def net(dtype: torch.dtype = torch.float64) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Net(dtype)


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(ids), (2 * ids + 1) % 9, reduction="none")


def batch(step: int) -> Tensor:
    return torch.randint(9, (12,), generator=torch.Generator().manual_seed(step))


def small(name: str, paradigm: str) -> Method:
    method = compose(name, paradigm)
    if hasattr(method.projector, "rank"):
        method = replace(method, projector=replace(method.projector, rank=2), refresh_every=3)  # type: ignore[type-var]
    if setting(method.estimator, "probes", 1) > 3:
        method = replace(method, estimator=changed(method.estimator, probes=3))
    return method


def trained(method: Method, model: nn.Module, steps: int, **settings: Any) -> Engine:
    engine = Engine(model, method, lr=1e-2, loss=losses, seed=0, **settings)
    for step in range(steps):
        engine.step([batch(step)])
    return engine


# ---- the model's own state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "paradigm"), ROWS)
def test_the_state_of_an_attached_model_is_that_of_its_live_weights(
    name: str, paradigm: str, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and paradigm == "fwd":
        pytest.skip("forward mode in low precision is not of interest here")
    model = net(dtype)
    engine = trained(small(name, paradigm), model, 5, weight_decay=0.1)
    other = Net(dtype)
    saved = copy.deepcopy(model.state_dict())  # plain ones share the memory of the weights
    other.load_state_dict(saved)
    model.eval(), other.eval()
    with torch.no_grad():
        here, there = model(batch(9)), other(batch(9))
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(there, here, **close)

    # a state that is loaded is what the model computes with, and steps go on from there
    zeros = {key: torch.zeros_like(value) for key, value in saved.items()}
    model.load_state_dict(zeros)
    with torch.no_grad():
        assert not model(batch(9)).any()
    model.load_state_dict(saved)
    with torch.no_grad():
        torch.testing.assert_close(model(batch(9)), there, **close)
    model.train()
    assert torch.isfinite(torch.as_tensor(engine.step([batch(5)]).loss))
    engine.detach()


def test_a_state_of_before_any_step_holds_the_weights_themselves() -> None:
    model = net()
    plain = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    Engine(model, small("stiefel", "fo"), lr=1e-2, loss=losses)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == plain


def test_held_weights_are_in_a_state_as_they_are() -> None:
    model = net()
    model.norm = nn.Identity()  # type: ignore[assignment]
    before = copy.deepcopy(model.state_dict())
    trained(small("stiefel", "zo"), model, 4, hold=True, select="linear")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) or "bias" in name, name


# ---- the engine's ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paradigm", ["fo", "zo"])
def test_running_statistics_go_with_a_state(paradigm: str) -> None:
    model = net()
    engine = trained(small("adamw" if paradigm == "fo" else "mezo", paradigm), model, 6)
    state = copy.deepcopy(engine.state_dict())
    other = net()
    fresh = Engine(other, engine.method, lr=1e-2, loss=losses, seed=0)
    fresh.load_state_dict(state)
    mean, variance = model.norm.running_mean, model.norm.running_var
    assert mean is not None and mean.any() == (
        paradigm == "fo"
    )  # forward-only runs evaluate the model as it is used
    assert torch.equal(other.norm.running_mean, mean) and torch.equal(other.norm.running_var, variance)  # type: ignore[arg-type]
    assert fresh.step([batch(6)]).loss == engine.step([batch(6)]).loss
    assert torch.equal(other.norm.running_mean, model.norm.running_mean)  # type: ignore[arg-type]


def test_signs_that_were_compared_once_are_not_compared_again() -> None:
    method = small("fzoo", "zo")
    assert setting(method.estimator, "signs") == "together"
    engine = trained(method, net(), 2)
    fresh = Engine(net(), method, lr=1e-2, loss=losses, seed=0)
    fresh.load_state_dict(engine.state_dict())
    usual, again = engine.step([batch(2)]), fresh.step([batch(2)])
    assert (again.forwards, again.loss) == (usual.forwards, usual.loss)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert Engine(net(), method, lr=1e-2, loss=losses, seed=0).step([batch(2)]).forwards > usual.forwards


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -1.0])
def test_a_rate_that_is_none_ends_the_run_before_a_weight_is_written(factor: float) -> None:
    model = net()
    engine = Engine(
        model, small("adamw", "fo"), lr=1e-2, loss=losses, schedule=lambda step: factor if step == 2 else 1.0
    )
    engine.step([batch(0)]), engine.step([batch(1)])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=re.escape(f"a rate of {1e-2 * factor} for step 3")):
        engine.step([batch(2)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_factors_of_any_kind_of_number() -> None:
    import numpy

    ends = []
    for kind in (float, numpy.float32, numpy.float64):
        model = net()
        engine = Engine(
            model, small("adamw", "fo"), lr=1e-2, loss=losses, schedule=lambda s, k=kind: k(0.5**s)
        )
        ends.append([engine.step([batch(step)]).lr for step in range(3)])
    assert ends[0] == [1e-2, 5e-3, 2.5e-3] and all(end == pytest.approx(ends[0]) for end in ends)


def test_weights_that_nobody_would_train_are_refused() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn, self.bias = (
                nn.Parameter(torch.randn(3, 3, dtype=torch.cfloat)),
                nn.Parameter(torch.zeros(3)),
            )

    with pytest.raises(UsageError, match="weight 'turn' is complex"):
        Engine(Complex(), compose("adamw", "fo"), lr=1e-2, loss=losses)
    Engine(Complex(), compose("adamw", "fo"), lr=1e-2, loss=losses, select=lambda name, _: name == "bias")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    with pytest.raises(UsageError, match=r"WeightNorm of torch.nn.utils .*parametrizations"):
        Engine(model, compose("adamw", "fo"), lr=1e-2, loss=losses)
    other = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    Engine(other, compose("adamw", "fo"), lr=1e-2, loss=losses)


@pytest.mark.parametrize("lr", [None, 1e-2])
@pytest.mark.parametrize("paradigm", ["zo", "fo"])
def test_a_loss_that_is_none_is_told(paradigm: str, lr: float | None) -> None:
    if lr is None and paradigm == "fo":
        return
    engine = Engine(
        net(), compose("stiefel", paradigm, rank=2), lr=lr, loss=lambda model, ids: {"loss": model(ids)}
    )  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the loss is of type dict; return a scalar mean"):
        engine.step([batch(0)])


def test_a_step_says_what_it_takes() -> None:
    engine = Engine(net(), compose("adamw", "fo"), lr=1e-2, loss=losses)
    for given in (DataLoader([batch(0)]), iter([batch(0)])):  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=rf"this is a {type(given).__name__}; use step\(\[batch\]\)"):
            engine.step(given)  # type: ignore[arg-type]


# ---- matrices that are small beside the model -----------------------------------------------------------------------


class Adapted(nn.Module):
    """A large map that stays as it is, and factors beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(256, 256)
        self.down, self.up = nn.Linear(256, 2, bias=False), nn.Linear(2, 256, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Calls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def adapted(
    monkeypatch: pytest.MonkeyPatch, share: float, law: str, probes: int
) -> tuple[list[Tensor], int, bool]:
    monkeypatch.setattr("zolr.attaching.SMALL", share)
    torch.manual_seed(0)
    model, x = Adapted(), torch.randn(8, 256, dtype=torch.float64)
    engine = zolr.Engine(
        model,
        compose("mezo", "zo", eps=1e-3, law=law, probes=probes),
        lr=1e-2,
        loss=lambda model, x: (model(x) - 1).square().mean(),
        select=lambda name, _: "base" not in name,
        seed=0,
    )
    engine.step([x])
    with Calls() as calls:
        engine.step([x])
    return [v.value.detach().clone() for v in engine.variables], calls.count, engine.streams


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("law", ["rademacher", "gaussian", "sphere"])
def test_small_matrices_move_as_large_ones_do_in_fewer_calls(
    law: str, probes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, few, streams = adapted(monkeypatch, 1 / 32, law, probes)
    one_by_one, many, streamed = adapted(monkeypatch, 0.0, law, probes)
    assert (streams, streamed) == (False, True)
    for a, b in zip(at_once, one_by_one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert few < 0.8 * many


def test_what_is_large_together_is_worked_on_one_by_one() -> None:
    engine = Engine(Adapted(), compose("mezo", "zo", eps=1e-3), lr=1e-2, loss=losses)
    blocked = {v.name for v in engine.variables if v.space.blocked}
    assert blocked == {"base.weight"} and engine.streams
    model = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(80)))
    engine = Engine(model, compose("mezo", "zo", eps=1e-3), lr=1e-2, loss=losses)
    left = sum(v.value.numel() for v in engine.variables if len(v.shape) > 1 and not v.space.blocked)
    assert 0 < left <= sum(p.numel() for p in model.parameters()) / 32


@pytest.mark.parametrize(("name", "paradigm"), ROWS)
def test_a_copy_of_a_run_goes_on_alike_under_every_row(name: str, paradigm: str) -> None:
    if METHODS[name].adapter is not None:
        pytest.skip("trains what peft adds")
    method = small(name, paradigm)
    if setting(method.estimator, "eps", 1.0) is None:
        method = replace(method, estimator=changed(method.estimator, eps=1e-3))
    run = trained(method, net(), 2, schedule=lambda step: 1 / (1 + step))
    copied = copy.deepcopy(run)
    assert [run.step([batch(i)]).loss for i in range(4)] == [copied.step([batch(i)]).loss for i in range(4)]
    pairs = zip(run.model.state_dict().values(), copied.model.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_a_model_and_of_a_run_have_weights_of_their_own(dtype: torch.dtype) -> None:
    """A copy goes on as the first one would, and neither moves the other."""
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    method = zolr.compose("stiefel", "fo", rank=2, refresh_every=2)
    run = zolr.Engine(net, method, lr=0.1, loss=lambda model, batch: model(batch).float().square().mean())
    run.step([x])
    copied, model = copy.deepcopy(run), copy.deepcopy(net)
    before = copied.model(x)
    losses = [run.step([x]).loss for _ in range(3)]
    assert torch.equal(copied.model(x), before) and torch.equal(model(x), before)
    assert [copied.step([x]).loss for _ in range(3)] == losses
    assert torch.equal(copied.model(x), net(x))
    model.load_state_dict(net.state_dict())
    with torch.no_grad():
        quiet = model(x)
    torch.testing.assert_close(model(x), quiet)  # with gradients and without
    torch.testing.assert_close(quiet, net(x), atol=0.02 if dtype == torch.bfloat16 else 1e-6, rtol=0.0)
