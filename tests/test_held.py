"""Laws of held weights: a run beside weights equals one in them, to rounding, and never writes them."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zolr import checkpoints
from zolr.engine import Engine
from zolr.errors import UsageError
from zolr.held import Stack
from zolr.keys import Key
from zolr.memory import LiveBytes
from zolr.methods import Method, compose
from zolr.optim import OptimizerRule
from zolr.projectors.stiefel import Stiefel
from zolr.projectors.two_sided import TwoSidedHaar
from zolr.subspaces import Full
from zolr.transports.reset import Reset

Batch = tuple[Tensor, Tensor]

CODES = ("int8", "nf4")
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


class Net(nn.Module):
    """A small language model with a padded embedding, a norm, a bias and an embedding of an unknown class."""

    class Positions(nn.Embedding):
        """Takes no argument, as nothing that is known does."""

        def forward(self, count: int) -> Tensor:  # type: ignore[override]
            return self.weight[:count]

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(19, 12, padding_idx=0), nn.LayerNorm(16)
        self.positions = Net.Positions(7, 12)
        self.up, self.same, self.head = nn.Linear(12, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 19)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(self.embed(ids) + self.positions(ids.shape[1]))
        return self.head(self.norm(x + self.same(torch.tanh(x))))


def net(dtype: torch.dtype = torch.float64) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net().to(dtype)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).mT, batch[1], reduction="none").mean(1)


def batches(count: int, size: int = 4) -> list[Batch]:
    ids = torch.randint(19, (count, size, 5), generator=torch.Generator().manual_seed(7))
    return [(one, one.roll(1, 1)) for one in ids]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batches(1)[0][0])


def method(paradigm: str, optimizer: str = "sgd", projector: Any = None, every: int = 3) -> Method:
    base = compose("stiefel", paradigm, eps=1e-3 if paradigm == "zo" else None)
    return Method(
        base.estimator, projector or Stiefel(rank=2), OptimizerRule(optimizer), Reset(), refresh_every=every
    )


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).norm()) <= tolerance * (1 + float(b.norm()))


# ---- the stack -------------------------------------------------------------------------------------------------------


def pushed(stack: Stack, count: int, rank: int, seed: int = 0) -> Tensor:
    """Push products of normal factors; their dense sum."""
    key, total = Key(seed), torch.zeros(stack.left.shape[0], stack.right.shape[0], dtype=stack.left.dtype)
    for i in range(count):
        left = key.fold_in("left", i).normal((stack.left.shape[0], rank)).to(total)
        right = key.fold_in("right", i).normal((stack.right.shape[0], rank)).to(total)
        stack.push(left, right)
        total += left @ right.mT
    return total


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_below_its_cap_a_stack_is_the_sum(shape: tuple[int, int]) -> None:
    stack = Stack(shape, 12, torch.zeros((), dtype=torch.float64))
    total = pushed(stack, 4, 3)
    assert stack.rank == 12 and float(stack.lost) == 0
    assert close(stack.left @ stack.right.mT, total, 1e-14)
    assert float(stack.energy) == pytest.approx(float(total.square().sum()), rel=1e-12)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (40, 6)])
def test_recompression_is_the_truncated_svd_of_the_sum(shape: tuple[int, int]) -> None:
    stack = Stack(shape, 5, torch.zeros((), dtype=torch.float64))
    total = pushed(stack, 1, 9)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    best = (u[:, :5] * s[:5]) @ vh[:5]
    assert stack.rank == 5
    assert close(stack.left @ stack.right.mT, best, 1e-12)
    assert float(stack.lost) == pytest.approx(float(s[5:].square().sum()), rel=1e-10)


def test_a_rank_as_large_as_the_matrix_loses_nothing() -> None:
    stack = Stack((6, 40), 100, torch.zeros((), dtype=torch.float64))
    total = pushed(stack, 30, 2)
    assert stack.rank == 6 and float(stack.lost) < 1e-20 * float(stack.energy)
    assert close(stack.left @ stack.right.mT, total, 1e-12)


# ---- a held run is a run ---------------------------------------------------------------------------------------------

PROJECTORS = {
    "right": Stiefel(rank=2),
    "left": Stiefel(rank=2, side="left"),
    "two_sided": TwoSidedHaar(rank=2),
}


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("paradigm", ["fo", "zo", "fwd"])
def test_a_held_run_equals_a_folded_one(paradigm: str, optimizer: str, projector: str) -> None:
    how = method(paradigm, optimizer, PROJECTORS[projector])
    plain, held = net(), net()
    before = copy.deepcopy(held.state_dict())
    runs = [
        Engine(model, how, lr=3e-2, loss=loss, hold=hold) for model, hold in ((plain, False), (held, True))
    ]
    for batch in batches(11):  # refreshes at steps 3, 6 and 9
        infos = [run.step([batch]) for run in runs]
        assert infos[0].loss == pytest.approx(infos[1].loss, rel=1e-10)
        assert close(logits(held), logits(plain), 1e-10)
    assert not close(logits(held), logits(net()), 1e-3)
    assert runs[1].lost < 1e-20
    for name, tensor in held.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    runs[1].detach()
    assert torch.equal(logits(held), logits(net()))


@pytest.mark.parametrize("realization", ["side", "rebuild"])
def test_realizations_of_a_held_weight_agree(realization: Any) -> None:
    outputs = []
    for how in (realization, "auto"):
        model = net()
        run = Engine(model, method("zo"), lr=3e-2, loss=loss, hold=True, realization=how)
        for batch in batches(7):
            run.step([batch])
        outputs.append(logits(model))
    assert close(outputs[0], outputs[1], 1e-10)


def test_signs_together_equal_signs_in_sequence_on_held_weights() -> None:
    outputs = []
    for signs in ("together", "sequence"):
        model = net()
        how = compose("stiefel", "zo", rank=2, refresh_every=3, eps=1e-3, signs=signs)
        run = Engine(model, how, lr=3e-2, loss=loss, hold=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it says so where it goes on in sequence
            warnings.filterwarnings("ignore", message="There is a performance drop")
            for batch in batches(7):
                run.step([batch])
        outputs.append(logits(model))
    assert close(outputs[0], outputs[1], 1e-8)


def test_some_weights_may_be_held_and_others_not() -> None:
    plain, mixed = net(), net()
    runs = [
        Engine(m, method("fo"), lr=3e-2, loss=loss, hold=hold)
        for m, hold in ((plain, False), (mixed, lambda name, _: name.startswith("up")))
    ]
    for batch in batches(7):
        for run in runs:
            run.step([batch])
    assert close(logits(mixed), logits(plain), 1e-10)
    assert torch.equal(mixed.up.weight, net().up.weight)
    assert not torch.equal(mixed.same.weight, net().same.weight)


@pytest.mark.parametrize("paradigm", ["fo", "zo"])
def test_a_fold_of_held_weights_leaves_the_output(paradigm: str) -> None:
    model = net()
    run = Engine(model, method(paradigm), lr=3e-2, loss=loss, hold=True)
    for batch in batches(5):
        run.step([batch])
    before = logits(model)
    run.fold()
    assert close(logits(model), before, 1e-13)
    once = logits(model)
    run.fold()
    assert torch.equal(logits(model), once)


def test_the_padding_row_stays_zero_beside_a_held_embedding() -> None:
    model = net()
    run = Engine(
        model, method("fo", projector=Stiefel(rank=2, side="left")), lr=0.1, loss=loss, hold=True, hold_rank=3
    )
    for batch in batches(12):
        run.step([batch])
    (table,) = [v for v in run.variables if v.name == "embed.weight"]
    left, right = table.moved_by()
    assert float((left[0] @ right.mT).abs().max()) < 1e-15
    assert float((left[1:] @ right.mT).abs().max()) > 1e-3


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("paradigm", ["fo", "zo"])
def test_a_held_run_resumes_bit_for_bit(paradigm: str, optimizer: str, tmp_path: Path) -> None:
    def start() -> tuple[Net, Engine]:
        model = net(torch.float32)
        return model, Engine(model, method(paradigm, optimizer), lr=3e-2, loss=loss, hold=True, hold_rank=5)

    data = batches(17)
    whole, run = start()
    for batch in data[:10]:
        run.step([batch])
    checkpoints.save(tmp_path / "step-10", run.state_dict())
    for batch in data[10:]:
        run.step([batch])
    resumed, again = start()
    again.step([data[3]])  # state that must not survive
    again.load_state_dict(checkpoints.load(tmp_path / "step-10"))
    for batch in data[10:]:
        again.step([batch])
    assert torch.equal(logits(whole), logits(resumed))
    assert run.lost == again.lost > 0


def test_a_state_from_before_the_first_refresh_empties_the_stack() -> None:
    model = net()
    run = Engine(model, method("fo"), lr=3e-2, loss=loss, hold=True)
    run.step([batches(1)[0]])
    state, output = copy.deepcopy(run.state_dict()), logits(model)
    for batch in batches(7):
        run.step([batch])
    run.load_state_dict(state)
    assert torch.equal(logits(model), output)


def everything(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for part in state.values():
            yield from everything(part)


def test_the_state_of_a_held_run_holds_no_matrix_of_the_size_of_a_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    square: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: m(x).square().mean()  # noqa: E731
    run = Engine(model, method("fo", "adamw"), lr=1e-2, loss=square, hold=True, hold_rank=8)
    for _ in range(20):
        run.step([torch.randn(8, 64, generator=torch.Generator().manual_seed(1))])
    assert max(t.numel() for t in everything(run.state_dict())) == 96 * 8 < 64 * 96
    assert set(map(id, model.parameters())).isdisjoint(map(id, everything(run.state_dict())))


@pytest.mark.parametrize("paradigm", ["fo", "zo"])
def test_live_bytes_of_a_held_run_do_not_grow(paradigm: str) -> None:
    model = net(torch.float32)
    run = Engine(model, method(paradigm), lr=1e-3, loss=loss, hold=True, hold_rank=6)
    data = batches(4)
    for step in range(30):  # every stack is at its cap by now
        run.step([data[step % 4]])
    held = [t for v in run.variables if v.stack is not None for t in v.stack.tensors().values()]
    with LiveBytes() as live:
        live.track(model, *held, *(v.value for v in run.variables))
        live.track(*(t for v in run.variables for t in v.subspace.tensors().values()))
        del held
        seen = []
        for step in range(500):
            run.step([data[step % 4]])
            if step % 3 == 0:
                seen.append(live.live)
    assert max(seen[10:]) <= max(seen[:10])
    assert all(v.stack.rank <= 6 for v in run.variables if v.stack is not None)


# ---- what is lost is said --------------------------------------------------------------------------------------------


def test_a_stack_that_drops_much_is_spoken_of_once() -> None:
    run = Engine(net(), method("fo"), lr=3e-2, loss=loss, hold=True, hold_rank=2)
    with pytest.warns(UserWarning, match="have lost .* larger hold_rank") as caught:
        for batch in batches(20):
            run.step([batch])
    assert len([w for w in caught if "have lost" in str(w.message)]) == 1
    assert 0.01 < run.lost < 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "decay": (dict(weight_decay=0.1), "cannot decay; leave out weight_decay = 0.1"),
    "in place": (dict(realization="inplace"), "realization 'inplace' cannot reach it"),
    "rank": (dict(hold_rank=0), "hold_rank = 0 is no rank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_held_weights_do_not_allow_is_refused(case: str) -> None:
    settings, message = REFUSED[case]
    model = net()
    with pytest.raises(UsageError, match=message):
        Engine(model, method("zo"), lr=1e-2, loss=loss, hold=True, **settings)
    assert type(model.up) is nn.Linear


@pytest.mark.parametrize("name", ["mezo", "adamw"])
def test_whole_spaces_are_refused_on_held_weights(name: str) -> None:
    model = net()
    with pytest.raises(UsageError, match="cannot be trained as a whole; use a method with subspaces"):
        Engine(model, compose(name), lr=1e-2, loss=loss, hold=True)
    assert type(model.up) is nn.Linear
    run = Engine(model, compose(name), lr=1e-3, loss=loss, hold=True, select="norm+bias")
    run.step(batches(1))
    assert all(isinstance(v.subspace, Full) for v in run.variables)


def test_a_held_run_gives_no_plain_copy_and_takes_no_other_state() -> None:
    run = Engine(net(), method("fo"), lr=1e-2, loss=loss, hold=True)
    with pytest.raises(UsageError, match="is held: a plain model cannot hold"):
        run.export()
    other = Engine(net(), method("fo"), lr=1e-2, loss=loss)
    with pytest.raises(UsageError, match="is held here, but not in the saved state"):
        run.load_state_dict(other.state_dict())
