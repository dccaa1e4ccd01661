"""Compiled losses equal plain ones, fall back with a reason, and a step waits for the device once."""

import copy
import warnings
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import zolr
from zolr.compiled import Compiled
from zolr.errors import UsageError

WAITS = (
    "item",
    "tolist",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "cpu",
    "numpy",
    "nonzero",
    "equal",
)


class Waiting(TorchFunctionMode):
    """Counts calls that wait for the device; torch's optimizers read step counters, which are on the host."""

    def __init__(self, engine: zolr.Engine) -> None:
        super().__init__()
        self.count, self.optimizing = 0, False
        engine.optimizer.register_step_pre_hook(lambda *_: setattr(self, "optimizing", True))
        engine.optimizer.register_step_post_hook(lambda *_: setattr(self, "optimizing", False))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in WAITS and not self.optimizing
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(torch.tanh(self.first(x))))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batch(rows: int = 6) -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 12, generator=numbers), torch.randint(3, (rows,), generator=numbers)


ONE_WAIT = [
    ("stiefel", "zo"),
    ("lozo", "zo"),
    ("subzero", "zo"),
    ("mezo", "zo"),
    ("stiefel", "fo"),
    ("adamw", "fo"),
]


def composed(name: str, paradigm: str, **windows: int) -> zolr.Method:
    """A row with nothing left to choose; windows are of those that have a subspace."""
    eps = {"eps": 1e-3} if paradigm == "zo" else {}
    return zolr.compose(
        name, paradigm, **eps, **({} if name in ("adamw", "mezo") else {"rank": 2, **windows})
    )


@pytest.mark.parametrize(("name", "paradigm"), ONE_WAIT)
def test_a_step_waits_for_the_device_once(name, paradigm, monkeypatch):
    monkeypatch.setattr("zolr.aside.EXACT", ())  # counters of optimizers are on the host beside every device
    engine = zolr.Engine(Net(), composed(name, paradigm), lr=1e-3, loss=loss)
    with Waiting(engine) as first:
        engine.step([batch()])
    with Waiting(engine) as second:
        engine.step([batch(), batch(4)])
    assert (first.count, second.count) == (1, 1)


@pytest.mark.parametrize(("name", "paradigm"), ONE_WAIT)
def test_without_a_guard_a_step_never_waits(name, paradigm):
    engine = zolr.Engine(Net(), composed(name, paradigm), lr=1e-3, loss=loss, guard=False)
    with Waiting(engine) as seen:
        engine.step([batch()])
    assert seen.count == 0


def trained(
    paradigm: str, compile: bool, net: nn.Module | None = None, name: str = "stiefel"
) -> tuple[list[float], zolr.Engine]:
    method = composed(name, paradigm, refresh_every=3)
    net = net or Net()
    engine = zolr.Engine(net, method, lr=1e-2, loss=loss, compile=compile)
    data = tuple(part.to(next(net.parameters()).device) for part in batch())
    return [engine.step([data]).loss for _ in range(7)], engine


@pytest.mark.slow
@pytest.mark.parametrize("paradigm", ["zo", "fo"])
def test_compiled_losses_equal_plain_ones_over_refreshes(paradigm):
    plain, _ = trained(paradigm, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="torch")
        fast, engine = trained(paradigm, True)
    assert isinstance(engine._fast, Compiled) and not engine._fast.failed
    assert fast == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stiefel", "adamw"])
def test_compiled_runs_train_the_same_weights_beside_another_engine(name):
    """Modules of one shape, some in a subspace and some whole, in an interpreter that has compiled another run before."""

    def ended(name, compile):
        torch.manual_seed(0)
        layers = [(part, nn.Linear(12, 12)) for part in ("attn", "mid", "attn2", "mid2")]
        model = nn.Sequential(
            OrderedDict(step for layer in layers for step in (layer, (f"{layer[0]}_", nn.Tanh())))
        )
        method = composed(name, "fo", refresh_every=4)
        if name == "stiefel":
            method = replace(method, projects="attention")
        engine = zolr.Engine(model, method, lr=1e-2, loss=loss, compile=compile, seed=0)
        for _ in range(5):
            engine.step([batch()])
        if compile:
            assert isinstance(engine._fast, Compiled) and not engine._fast.failed
        return {name: weight.clone() for name, weight in engine.detach().state_dict().items()}

    ended("stiefel" if name == "adamw" else "adamw", True)
    plain, fast = ended(name, False), ended(name, True)
    for part, weight in plain.items():
        assert torch.allclose(fast[part], weight, rtol=1e-4, atol=1e-6), part


def test_a_forward_that_draws_is_not_compiled():
    method = zolr.compose("mezo", "zo", eps=1e-3, law="rademacher")
    ends = []
    for compile in (False, True):
        engine = zolr.Engine(Net(), method, lr=1e-3, loss=loss, compile=compile, seed=0)
        with pytest.warns(UserWarning, match="drawn in each forward anew") if compile else nullcontext():
            ends.append([engine.step([batch()]).loss for _ in range(3)])
    assert ends[0] == ends[1]


def test_a_batch_that_cannot_be_compiled_later_runs_as_it_is(monkeypatch):
    def fussy(call, fullgraph):
        def compiled(given):
            if len(given[0]) == 7:
                raise RuntimeError("no kernel for 7 rows")
            return call(given)

        return compiled

    monkeypatch.setattr(torch, "compile", fussy)
    engine = zolr.Engine(Net(), composed("stiefel", "zo"), lr=1e-3, loss=loss, compile=True, seed=0)
    engine.step([batch(6)])
    with pytest.warns(UserWarning, match="no kernel for 7 rows"):
        assert engine.step([batch(7)]).loss > 0


def test_what_cannot_be_compiled_runs_as_it_is_and_says_why(monkeypatch):
    def broken(*_, **__):
        def call(*_):
            raise RuntimeError("no compiler\non this machine")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    plain, _ = trained("zo", False)
    with pytest.warns(UserWarning, match="as it is, not compiled: RuntimeError: no compiler$"):
        fast, engine = trained("zo", True)
    assert fast == plain


def test_an_error_of_the_loss_itself_is_the_users(monkeypatch):
    def wrong(model, batch):
        raise ValueError("labels are missing")

    monkeypatch.setattr(torch, "compile", lambda f, fullgraph: f)
    engine = zolr.Engine(Net(), zolr.compose("stiefel", "fo", rank=2), lr=1e-2, loss=wrong, compile=True)
    with pytest.raises(ValueError, match="labels are missing"):
        engine.step([batch()])


def test_a_dense_method_is_not_compiled():
    with pytest.raises(UsageError, match="takes its gradients one by one; leave compile out"):
        trained("fo", True, name="galore")


def test_steady_subspaces_keep_their_memory_and_saved_states_do_not_follow(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph: f)
    _, engine = trained("zo", True)
    variable = next(v for v in engine.variables if not v.is_full)
    subspace, saved = variable.subspace, engine.state_dict()
    basis = subspace.tensors()["basis"].clone()
    engine.refresh()
    assert variable.subspace is subspace and not torch.equal(subspace.tensors()["basis"], basis)
    assert torch.equal(saved["variables"][variable.name]["tensors"]["basis"], basis)
    engine.load_state_dict(saved)
    _, plain = trained("zo", False)
    assert torch.equal(subspace.tensors()["basis"], basis)
    assert engine.step([batch()]).loss == plain.step([batch()]).loss


def test_a_compiled_engine_exports_a_plain_copy(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph: f)
    _, engine = trained("zo", True)
    _, other = trained("zo", False)
    a, b = engine.export(), other.export()
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert type(copy.deepcopy(a).first) is nn.Linear


def graphed(run, sample, allow_unused_input):
    """What torch.cuda.make_graphed_callables gives, on the host: inputs and gradients stay where they were recorded."""
    assert allow_unused_input
    own = [torch.zeros_like(x) if x.requires_grad else None for x in sample]

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            for place, given in zip(sample, inputs, strict=True):
                if place.data_ptr() != given.data_ptr():
                    place.copy_(given)
            with torch.enable_grad():
                ctx.inputs = [x.detach().requires_grad_(x.requires_grad) for x in sample]
                ctx.out = run(*ctx.inputs)
            return ctx.out.detach()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, *grads):
            wanted = [x for x in ctx.inputs if x.requires_grad]
            found = iter(torch.autograd.grad(ctx.out, wanted, grads, allow_unused=True))
            for place in own:
                if place is not None:
                    given = next(found)
                    place.copy_(torch.zeros_like(place) if given is None else given)
            return tuple(place if place is None else place.detach() for place in own)

    return Recorded.apply


@pytest.fixture
def recording(monkeypatch):
    """Have the host record, as a card would."""
    monkeypatch.setattr(Compiled, "_compiled", Compiled._replayed)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", torch.set_rng_state)


@pytest.mark.parametrize("name", ["stiefel", "adamw"])
@pytest.mark.parametrize("rows", [(6, 6, 6), (6, 4, 6), (4, 6), (6,)])
def test_recorded_gradients_of_micro_batches_add_up(name, rows, recording):
    """The gradients of a recording stay in one place: the second micro-batch must not write over the first."""
    losses, weights = [], []
    for fast in (False, True):
        engine = zolr.Engine(Net(), composed(name, "fo", refresh_every=3), lr=1e-2, loss=loss, compile=fast)
        noise = torch.Generator().manual_seed(0)
        batches = [
            [(torch.randn(n, 12, generator=noise), torch.randint(3, (n,), generator=noise)) for n in rows]
            for _ in range(7)
        ]
        losses.append([engine.step(step).loss for step in batches])
        weights.append([p.detach() for p in engine.detach().parameters()])
        if fast:
            assert len(engine._fast._recordings) == len(set(rows)) and not engine._fast.failed
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for a, b in zip(*weights, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
