"""The same laws on a CUDA device: the same directions, the same weights as on the host, one wait a step."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from test_compiled import Net, batch, loss, trained

from zolr.engine import Engine
from zolr.estimators import changed, setting
from zolr.keys import Key
from zolr.methods import METHODS, compose
from zolr.models import build, lm_loss
from zolr.probes import Layout, Probe, Space, counters

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


@pytest.mark.parametrize("law", ["gaussian", "sphere"])
def test_normal_directions_are_drawn_by_the_card_and_named(law):
    spaces = [Space("a", (3000, 700), blocked=True), Space("b", (64, 16), blocked=False)]
    layout = Layout(spaces, torch.device("cuda"))
    one, two = Probe(layout, law, Key(1)), Probe(layout, law, Key(2))
    for name in "ab":
        whole = one(name)
        assert whole.is_cuda and torch.equal(whole, Probe(layout, law, Key(1))(name))
        assert torch.equal(one(name, slice(10, 50)), whole[10:50])
        assert abs(float((whole * two(name)).mean())) < 5 / whole.numel() ** 0.5
        assert float(whole.square().mean()) == pytest.approx(1.0, abs=5 * (2 / whole.numel()) ** 0.5)


@pytest.mark.parametrize("name", ["roberta-base", "llama-20m"])
def test_both_signs_in_one_pass_are_those_in_sequence(name):
    thin = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=300
    )
    net = build(name, **thin, **({"dropout": 0.0} if name == "roberta-base" else {})).cuda()
    ids = torch.randint(10, 300, (4, 12))
    data = {"input_ids": ids.cuda(), "attention_mask": torch.ones_like(ids).cuda(), "labels": ids.cuda()}
    data["attention_mask"][0, -3:] = 0
    found = {}
    for signs in ("sequence", "together"):
        method = compose("stiefel", "zo", rank=4, signs=signs, eps=1e-3)
        engine = Engine(copy.deepcopy(net), method, lr=1e-3, loss=lm_loss)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found[signs] = [engine.step([data]).loss for _ in range(3)]
    # torch 2.11 has no rule for a mask of fewer rows than the queries: then signs follow each other, and that is said
    settled = setting(engine.method.estimator, "signs")
    assert settled in ("rows", "together") or any("attn_bias" in str(warning.message) for warning in said)
    assert found["together"] == pytest.approx(found["sequence"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "paradigm"),
    [("stiefel", "zo"), ("mezo", "zo"), ("stiefel", "fo"), ("galore", "fo"), ("lomo", "fo")],
)
def test_a_step_that_raises_leaves_everything_as_it_was(name, paradigm):
    engine, _ = run(name, paradigm, "cuda", steps=4)
    x, y = batch()
    data = (x.double().cuda(), y.cuda())
    weights = [p.detach().clone() for p in engine.model.parameters()]
    before = {name: int(number) for name, number in engine.digests().items()}

    def fails(*_):
        raise RuntimeError("after the update")

    for _ in range(2):  # the second time what is kept goes the way of the first
        hook = engine.optimizer.register_step_post_hook(fails)
        with pytest.raises(RuntimeError, match="after the update"):
            engine.step([data])
        hook.remove()
        assert not engine.torn
        for new, old in zip(engine.model.parameters(), weights, strict=True):
            assert torch.equal(new, old)
        assert {name: int(number) for name, number in engine.digests().items()} == before


def test_directions_are_the_same_bits_on_every_device():
    own = counters("some weight", 0, 5000, torch.device("cpu"))
    assert torch.equal(Key(5).signs(own), Key(5).signs(own.cuda()).cpu())


@pytest.mark.parametrize(("name", "paradigm"), ROWS)
def test_every_row_gives_the_weights_of_the_host(name, paradigm):
    # singular vectors have no sign of their own: what is carried into the next window follows the library's
    method = METHODS[name].build(paradigm)
    if (name, paradigm) == ("dependent", "zo"):
        pytest.skip("directions of nearly equal energy, which rounding decides, are named by it")
    if setting(method.estimator, "law", "rademacher") != "rademacher":
        pytest.skip("a card draws normal numbers of its own")
    steps = 3 if method.dense or name == "dependent" else 7
    (host, expected), (device, found) = run(name, paradigm, "cpu", steps), run(name, paradigm, "cuda", steps)
    # muon's steps are bfloat16, and q-galore rounds its bases to codes
    coarse = "muon" in method.optimizer.name or name == "q-galore"
    assert found == pytest.approx(expected, rel=1e-3 if coarse else 1e-6)
    if coarse:
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
    # backprop's plain steps are folded at once, recorded ones put the weight together: the same but for rounding
    folded = (name, paradigm) == ("stiefel", "fo")
    assert fast == (pytest.approx(plain, rel=1e-6) if folded else plain)


@pytest.mark.parametrize("name", ["stiefel", "adamw"])
def test_recorded_gradients_of_micro_batches_add_up(name):
    found = []
    for compile in (False, True):
        engine = Engine(Net().cuda(), small(name, "fo"), lr=1e-2, loss=loss, compile=compile)
        data = [tuple(part.cuda() for part in batch(rows)) for rows in (6, 4, 6)]
        found.append([engine.step(data).loss for _ in range(7)])
    assert engine._fast._recordings and found[1] == pytest.approx(found[0], rel=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("paradigm", ["zo", "fo"])
def test_recordings_of_several_shapes_do_not_disturb_each_other(paradigm):
    found = []
    for compile in (False, True):
        engine = Engine(Net().cuda(), small("stiefel", paradigm), lr=1e-2, loss=loss, compile=compile)
        data = [tuple(part.cuda() for part in batch(rows)) for rows in (6, 40, 4, 6, 40, 4) * 3]
        found.append([engine.step([one]).loss for one in data])
    assert len(engine._fast._recordings) >= 3  # type: ignore[union-attr]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


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
