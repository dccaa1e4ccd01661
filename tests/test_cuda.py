"""The same laws on a CUDA device: the same directions, the same weights as on the host, one wait a step."""

import warnings
from dataclasses import replace

import pytest
import torch
from test_compiled import Net, batch, loss, trained

from zolr.engine import Engine
from zolr.estimators import changed, setting
from zolr.keys import Key
from zolr.methods import METHODS
from zolr.probes import counters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS = [(name, p) for name, row in METHODS.items() if row.adapter is None for p in row.paradigms]


def small(name: str, paradigm: str):
    """A row at a size that fits the model, with nothing left to choose."""
    method = METHODS[name].build(paradigm)
    if hasattr(method.projector, "rank"):
        method = replace(method, projector=replace(method.projector, rank=2), refresh_every=3)  # type: ignore[type-var]
    if setting(method.estimator, "eps", 1.0) is None:
        method = replace(method, estimator=changed(method.estimator, eps=1e-3))
    return method


def run(name: str, paradigm: str, device: str, steps: int = 7) -> tuple[Engine, list[float]]:
    torch.manual_seed(0)
    engine = Engine(Net().double().to(device), small(name, paradigm), lr=1e-2, loss=loss, seed=3)
    x, y = batch()
    data = (x.double().to(device), y.to(device))
    return engine, [engine.step([data]).loss for _ in range(steps)]


def test_directions_are_the_same_bits_on_every_device():
    own = counters("some weight", 0, 5000, torch.device("cpu"))
    assert torch.equal(Key(5).signs(own), Key(5).signs(own.cuda()).cpu())


@pytest.mark.parametrize(("name", "paradigm"), ROWS)
def test_every_row_gives_the_weights_of_the_host(name, paradigm):
    # singular vectors have no sign of their own: what is carried into the next window follows the library's
    method = METHODS[name].build(paradigm)
    if (name, paradigm) == ("dependent", "zo"):
        pytest.skip("directions of nearly equal energy, which rounding decides, are named by it")
    steps = 3 if method.dense or name == "dependent" else 7
    (host, expected), (device, found) = run(name, paradigm, "cpu", steps), run(name, paradigm, "cuda", steps)
    assert found == pytest.approx(expected, rel=1e-3 if "muon" in method.optimizer.name else 1e-6)
    if "muon" in method.optimizer.name:  # whose steps are bfloat16
        return
    for a, b in zip(host.detach().parameters(), device.detach().parameters(), strict=True):
        assert b.is_cuda
        torch.testing.assert_close(b.cpu(), a, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "paradigm"), ROWS)
def test_a_saved_state_continues_bit_for_bit(name, paradigm):
    whole, losses = run(name, paradigm, "cuda", steps=7)
    half, _ = run(name, paradigm, "cuda", steps=4)
    state = half.state_dict()
    again, _ = run(name, paradigm, "cuda", steps=0)
    again.load_state_dict(state)
    x, y = batch()
    assert [again.step([(x.double().cuda(), y.cuda())]).loss for _ in range(3)] == losses[4:]
    for a, b in zip(whole.detach().parameters(), again.detach().parameters(), strict=True):
        assert torch.equal(a, b)


def waits(engine: Engine, data) -> int:
    with warnings.catch_warnings(record=True) as found:
        torch.cuda.set_sync_debug_mode("warn")  # says once in a process that it is a prototype
        warnings.simplefilter("always")
        try:
            engine.step([data])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in found)


@pytest.mark.parametrize(
    ("name", "paradigm", "guard", "expected"),
    [
        ("stiefel", "zo", True, 1),
        ("mezo", "zo", True, 1),
        ("stiefel", "fo", True, 1),
        ("stiefel", "zo", False, 0),
        ("stiefel", "fo", False, 0),
    ],
)
def test_a_step_waits_for_the_device_once(name, paradigm, guard, expected):
    engine = Engine(Net().cuda(), small(name, paradigm), lr=1e-2, loss=loss, guard=guard)
    data = tuple(part.cuda() for part in batch())
    engine.step([data])
    assert waits(engine, data) == expected


@pytest.mark.parametrize(
    ("name", "paradigm", "dropout"),
    [("stiefel", "zo", 0.0), ("stiefel", "fo", 0.0), ("stiefel", "fo", 0.5), ("adamw", "fo", 0.0)],
)
def test_recorded_losses_are_those_of_the_plain_passes_bit_for_bit(name, paradigm, dropout):
    plain, _ = trained(paradigm, False, Net(dropout).cuda(), name)
    fast, engine = trained(paradigm, True, Net(dropout).cuda(), name)
    assert not engine._fast.failed and engine._fast._recordings  # type: ignore[union-attr]
    assert fast == plain


def test_what_waits_inside_its_forward_is_not_recorded_and_says_why():
    class Waiting(Net):
        def forward(self, x):
            return super().forward(x) * (2.0 if bool((x.sum() > 1e9).all()) else 1.0)

    method = small("stiefel", "zo")
    plain = Engine(Waiting().cuda(), method, lr=1e-2, loss=loss)
    fast = Engine(Waiting().cuda(), method, lr=1e-2, loss=loss, compile=True)
    data = tuple(part.cuda() for part in batch())
    with pytest.warns(UserWarning, match="as it is, not compiled"):
        found = [fast.step([data]).loss for _ in range(4)]
    assert found == [plain.step([data]).loss for _ in range(4)]
