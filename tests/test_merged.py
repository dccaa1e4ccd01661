"""A weight that is put together gives the output and the gradients of the path beside it, and keeps no more for backward."""

import itertools

import pytest
import torch

import zolr
from zolr import merged
from zolr.keys import Key
from zolr.memory import LiveBytes, kept
from zolr.subspaces import Left, Right


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_outputs_and_gradients_are_those_of_two_products(right: bool, decay: float) -> None:
    m, n, r = 6, 10, 3
    draw = iter(range(100))
    weight, x, turn = (Key(next(draw)).normal(s).double() for s in ((m, n), (4, 7, n), (4, 7, m)))
    basis = Key(next(draw)).normal((n if right else m, r)).double()
    subspace = Right(basis, m) if right else Left(basis, n)
    coords = Key(next(draw)).normal(subspace.coords_shape).double()
    found = []
    for way in ("merged", "beside"):
        a, b = x.clone().requires_grad_(), coords.clone().requires_grad_()
        if way == "merged":
            out = merged.linear(a, weight, decay, subspace, b)
        else:
            out = decay * (a @ weight.mT) + subspace.apply(a, b)
        found.append((out, *torch.autograd.grad((out * turn).sum(), (a, b))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda a, b: merged.linear(a, weight, decay, subspace, b),
        (x.requires_grad_(), coords.requires_grad_()),
    )


def test_it_is_taken_exactly_where_it_saves_multiplications() -> None:
    for m, n, r, tokens, right in itertools.product((8, 64), (8, 64), (2,), (4, 32, 64, 200), (True, False)):
        subspace = Right(torch.zeros(n, r), m) if right else Left(torch.zeros(m, r), n)
        # beside: each product in forward, and twice in backward but for the basis, which is not trained
        inside, outside = (n, m) if right else (m, n)
        beside = tokens * r * (2 * inside + 3 * outside)
        copied = tokens * r * (n + m) + 2 * m * n * r
        folded = tokens * r * (n + m) + m * n * r
        assert merged.pays(subspace, tokens) == (copied < beside and tokens >= n)
        assert merged.pays(subspace, tokens, folded=True) == (folded < beside)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(32, 48), torch.nn.Linear(48, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_run_is_the_same_either_way(side: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(256, 32).double(), torch.randn(256, 32).double()
    nets, peaks, called = [], [], []
    real = merged.linear
    for realization in ("auto", "side"):
        torch.manual_seed(1)
        net = Net().double()
        method = zolr.compose("stiefel", "fo", rank=4, refresh_every=3, side=side)
        engine = zolr.Engine(
            net,
            method,
            lr=1e-2,
            loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
            weight_decay=0.1,
            realization=realization,  # type: ignore[arg-type]
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(merged, "linear", lambda *a, r=realization: called.append(r) or real(*a))
            for _ in range(8):
                engine.step([(x, y)])
            live = LiveBytes()
            live.track(x, y, *net.parameters(), *(t for part in kept(engine).values() for t in part))
            with live:
                engine.step([(x, y)])
        nets.append(engine.detach())
        peaks.append(live.peak)
    assert set(called) == {"auto"} and len(called) == 2 * 9
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert peaks[0] <= peaks[1]


def test_steps_are_folded_where_batches_are_long_and_rules_do_not_read_values() -> None:
    torch.manual_seed(0)
    long, short = torch.randn(256, 32), torch.randn(2, 32)
    for name, batch, still in (
        ("adamw", long, True),
        ("muon", long, True),
        ("adamw", short, False),
        ("adalomo", long, False),
        ("Adafactor", long, False),
    ):
        net = Net()
        before = net.first.weight.detach().clone()
        method = zolr.compose("stiefel", "fo", rank=4, optimizer=name)
        loss = lambda model, batch: (model(batch) - batch).square().mean()  # noqa: E731
        engine = zolr.Engine(net, method, lr=1e-2, loss=loss)
        engine.step([batch])
        variable = next(v for v in engine.variables if v.name == "first.weight")
        assert (not bool(variable.value.any())) is still and variable.moved is not still
        assert torch.equal(net.first.weight, before) is not still
        # a batch of the other kind goes on from there, whatever the coordinates hold
        with torch.no_grad():
            seen = loss(net, short)
        assert engine.step([short]).loss == pytest.approx(float(seen), rel=1e-5)
        assert engine.step([long]).loss > 0


def test_recorded_passes_take_no_coordinates_for_zero_and_fold_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A recording runs the choices of its first time again, and what python would note beside them is not noted."""
    torch.manual_seed(0)
    batch, zeros = torch.randn(256, 32), []
    monkeypatch.setattr(torch, "compile", lambda loss, fullgraph: loss)  # as a recording: the same operations
    linear = merged.linear
    monkeypatch.setattr(merged, "linear", lambda *args: zeros.append(args[-1]) or linear(*args))

    def losses(compile: bool) -> list[float]:
        torch.manual_seed(1)
        method = zolr.compose("stiefel", "fo", rank=4, refresh_every=3)
        loss = lambda model, batch: (model(batch) - batch).square().mean()  # noqa: E731
        engine = zolr.Engine(Net(), method, lr=1e-2, loss=loss, compile=compile)
        return [engine.step([batch]).loss for _ in range(7)]

    plain = losses(False)
    assert any(zeros)
    zeros.clear()
    assert losses(True) == pytest.approx(plain, rel=1e-5) and zeros and not any(zeros)


def test_a_run_whose_steps_are_folded_resumes_bit_for_bit() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(rows, 32) for rows in (256, 256, 3, 256, 256, 256)]

    def engine() -> zolr.Engine:
        torch.manual_seed(1)
        method = zolr.compose("stiefel", "fo", rank=4, refresh_every=4)
        loss = lambda model, batch: (model(batch) - batch).square().mean()  # noqa: E731
        return zolr.Engine(Net(), method, lr=1e-2, loss=loss, weight_decay=0.1)

    whole = engine()
    for batch in batches:
        whole.step([batch])
    for stop in range(1, 6):
        begun, resumed = engine(), engine()
        for batch in batches[:stop]:
            begun.step([batch])
        resumed.load_state_dict(begun.state_dict())
        for batch in batches[stop:]:
            resumed.step([batch])
        for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(one, other)
