"""Laws of held weights: a run beside weights equals one in them, to rounding, and never writes them."""

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zolr import adapters, checkpoints, models
from zolr.attaching import detach
from zolr.engine import Engine
from zolr.errors import DataError, UsageError
from zolr.held import Stack, shapes, stand_in
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
    a, b = a.detach(), b.detach()
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


@pytest.mark.parametrize("name", ["galore", "q-galore", "grasswalk"])
def test_dense_methods_are_refused_on_held_weights(name: str) -> None:
    with pytest.raises(UsageError, match="is never written .* dense gradients at every step cannot train it"):
        Engine(net(), compose(name, rank=2), lr=1e-2, loss=loss, hold=True)


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


# ---- offloaded weights -----------------------------------------------------------------------------------------------

WAYS = ("cpu", "disk", "some")


def offloaded(model: nn.Module, way: str, folder: Path) -> nn.Module:
    """The model with its weights away between two uses, by accelerate."""
    import accelerate

    if way == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif way == "disk":
        accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    else:
        places: dict[str, Any] = {name: "cpu" for name, _ in model.named_children()}
        places |= {"up": "disk", "same": "disk"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)
    return model


@pytest.mark.parametrize("projector", ["right", "two_sided"])
@pytest.mark.parametrize("way", WAYS)
def test_a_run_on_offloaded_weights_equals_one_on_plain_weights(
    way: str, projector: str, tmp_path: Path
) -> None:
    how = method("zo", projector=PROJECTORS[projector])
    plain, away = net(), offloaded(net(), way, tmp_path)
    assert away.up.weight.is_meta
    kept = logits(away)
    select = lambda name, _: "positions" not in name  # noqa: E731
    runs = [Engine(model, how, lr=3e-2, loss=loss, select=select) for model in (plain, away)]
    assert all(v.held for v in runs[1].variables) or way == "some"
    for batch in batches(8):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the loss reads weight")
            infos = [run.step([batch]) for run in runs]
        assert infos[0].loss == pytest.approx(infos[1].loss, rel=1e-10)
    assert close(logits(away), logits(plain), 1e-10) and not close(logits(away), kept, 1e-3)
    assert away.up.weight.is_meta
    runs[1].detach()
    if way != "some":
        assert torch.equal(logits(away), kept)


def test_the_rate_of_an_offloaded_run_is_chosen_as_that_of_a_plain_one(tmp_path: Path) -> None:
    found = []
    for model in (net(), offloaded(net(), "disk", tmp_path)):
        run = Engine(model, compose("stiefel", "zo", rank=2, eps=1e-3), lr=None, loss=loss, select="linear")
        sizes = [float(v.weight.square().mean().sqrt()) for v in run.variables]
        run.step(batches(2))
        found.append([run.base_lr, *sizes])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_an_offloaded_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    data = batches(9)
    outputs = []
    state: dict[str, Any] = {}
    for again in (False, True):
        model = offloaded(net(torch.float32), "cpu", tmp_path)
        run = Engine(model, method("zo"), lr=3e-2, loss=loss, select="linear+norm+bias+head")
        if again:
            run.load_state_dict(state)
        for step in range(5 if again else 0, 9):
            if step == 5 and not again:
                state = copy.deepcopy(run.state_dict())
            run.step([data[step]])
        outputs.append(logits(model))
    assert torch.equal(*outputs)


def test_what_offloaded_weights_do_not_allow_is_refused(tmp_path: Path) -> None:
    model = offloaded(net(), "cpu", tmp_path)
    linear = dict(lr=1e-2, loss=loss, select="linear+norm")
    with pytest.raises(UsageError, match="gone by the time of a backward pass; use paradigm 'zo'"):
        Engine(model, method("fo"), **linear)
    with pytest.raises(UsageError, match="is offloaded, so realization 'rebuild' cannot reach it"):
        Engine(model, method("zo"), realization="rebuild", **linear)
    with pytest.raises(UsageError, match="'positions.weight' is offloaded, and what Positions does with it"):
        Engine(model, method("zo"), lr=1e-2, loss=loss)
    with pytest.raises(UsageError, match="holds no numbers"):
        Engine(nn.Linear(3, 3, device="meta"), method("zo"), lr=1e-2, loss=loss)


@pytest.mark.parametrize("way", WAYS)
def test_the_adapter_of_an_offloaded_run(way: str, tmp_path: Path) -> None:
    model = offloaded(net(torch.float32), way, tmp_path)
    run = Engine(model, method("zo"), lr=3e-2, loss=loss, hold=True, select="linear+norm+head+bias+attention")
    for batch in batches(5):
        run.step([batch])
    after = logits(model)
    adapters.write(tmp_path, model, run.variables, "somewhere")
    fresh = net(torch.float32)
    adapters.load(tmp_path, fresh)
    assert close(logits(fresh), after, 1e-6)


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_tied_weights_stay_tied_while_they_are_away(way: Any, tmp_path: Path) -> None:
    base = tiny("gpt2", tmp_path / "base")
    outputs = []
    for how in (None, way):
        model = models.load_model(
            base, device_map=how, offload_folder=tmp_path / "away" if how == "disk" else None
        )
        run = Engine(
            model, method("zo"), lr=1e-3, loss=models.lm_loss, hold=True, select="linear+embedding+norm"
        )
        for _ in range(5):
            run.step([lines()])
        outputs.append((answers(model), [v.name for v in run.variables]))
        folder = tmp_path / f"adapter-{how}"
        folder.mkdir()
        adapters.write(folder, model, run.variables, str(base))
        assert close(answers(models.load_model(folder)), outputs[-1][0], 1e-5)
    assert outputs[0][1] == outputs[1][1]
    assert close(outputs[0][0], outputs[1][0], 1e-4)


@pytest.mark.parametrize("room", [0, 0.6])
def test_a_run_on_weights_that_accelerate_divides_equals_one_on_plain_weights(
    room: float, tmp_path: Path
) -> None:
    """Host memory for none, or for some, of the weights of a model; the others are on disk."""
    base = tiny("llama", tmp_path / "base")
    plain = models.load_model(base, dtype=torch.float64)
    total = sum(p.numel() * 8 for p in plain.parameters())
    away = models.load_model(
        base,
        dtype=torch.float64,
        device_map="auto",
        offload_folder=tmp_path / "away",
        max_memory={"cpu": int(room * total) + 1},
    )
    gone = [name for name, p in away.named_parameters() if p.device.type == "meta"]
    assert gone and (len(gone) < len(list(away.parameters()))) == (room > 0)
    before = answers(away)
    runs = [
        Engine(model, method("zo"), lr=2e-2, loss=models.lm_loss, hold=True, select="attention")
        for model in (plain, away)
    ]
    for _ in range(8):
        infos = [run.step([lines()]) for run in runs]
        assert infos[0].loss == pytest.approx(infos[1].loss, rel=1e-9)
    assert close(answers(away), answers(plain), 1e-7) and not close(answers(away), before, 2e-2)
    assert [name for name, p in away.named_parameters() if p.device.type == "meta"] == gone
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapters.write(folder, away, runs[1].variables, str(base))
    assert close(answers(models.load_model(folder)).double(), answers(away), 1e-4)
    with pytest.raises(UsageError, match="max_memory is for device_map 'auto'"):
        models.load_model(base, max_memory={"cpu": 1})


# ---- quantized weights -----------------------------------------------------------------------------------------------


def tiny(family: str, folder: Path) -> Path:
    """A folder with a tiny model of a family, random weights."""
    sizes: dict[str, Any] = dict(vocab_size=100)
    if family == "gpt2":
        sizes |= dict(n_embd=64, n_layer=2, n_head=4, n_positions=40, bos_token_id=0, eos_token_id=0)
    elif family == "opt":
        sizes |= dict(hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4)
        sizes |= dict(max_position_embeddings=40, word_embed_proj_dim=64)
    else:
        sizes |= dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        sizes |= dict(max_position_embeddings=40)
        if family == "roberta":
            sizes |= dict(type_vocab_size=1)
    config = models.AutoConfig.for_model(family, **sizes)
    config.architectures = [
        {"gpt2": "GPT2LMHeadModel", "roberta": "RobertaForMaskedLM", "opt": "OPTForCausalLM"}.get(
            family, "LlamaForCausalLM"
        )
    ]
    models.build(config).save_pretrained(folder)  # type: ignore[operator]
    return folder


def lines(count: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (count, 16), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "labels": ids.roll(-1, 1)}


def answers(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=lines()["input_ids"]).logits


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The bytes behind every parameter, those of coded weights included."""
    found = {}
    for name, parameter in model.named_parameters():
        inner = [parameter.data]
        if hasattr(parameter, "__tensor_flatten__"):
            inner = [getattr(parameter, part) for part in parameter.__tensor_flatten__()[0]]
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            inner.append(state.absmax)
        for i, tensor in enumerate(inner):
            found[f"{name}.{i}"] = tensor.detach().contiguous().flatten().view(torch.uint8).clone()
    return found


def same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def coded(family: str, how: str, folder: Path) -> nn.Module:
    """A tiny quantized model; skips the test where the package for it is missing."""
    pytest.importorskip(PACKAGES[how], reason=f"needs {PACKAGES[how]} (pip install 'zolr[quant]')")
    return models.load_model(tiny(family, folder), quantize=how)  # type: ignore[arg-type]


CASES = [("int8", "llama"), ("int8", "roberta"), ("nf4", "llama"), ("nf4", "gpt2"), ("nf4", "opt")]


@pytest.mark.parametrize(("how", "family"), CASES)
@pytest.mark.parametrize("paradigm", ["fo", "zo"])
def test_a_quantized_model_trains_and_keeps_its_bytes(
    paradigm: str, how: str, family: str, tmp_path: Path
) -> None:
    model = coded(family, how, tmp_path)
    before = stored(model)
    assert any(part.numel() < 64 * 64 * 2 for name, part in before.items() if name.endswith("weight.0"))
    rate, count = (2e-3, 12) if paradigm == "fo" else (None, 60)
    run = Engine(
        model,
        compose("stiefel", paradigm, rank=4, refresh_every=5, probes=4 if paradigm == "zo" else None),
        lr=rate,
        loss=models.lm_loss,
        select="linear+norm",
        hold=True,
        hold_rank=8,
    )
    assert 0.5 < run.trained_share < 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="held weights have lost")
        losses = [run.step([lines()]).loss for _ in range(count)]
    assert losses[-1] < losses[0] - (0.2 if paradigm == "fo" else 0.01)
    assert max(t.numel() for t in everything(run.state_dict())) <= 8 * 256
    run.detach()
    assert same_bytes(stored(model), before)
    assert same_bytes(stored(models.load_model(tmp_path, quantize=how)), before)  # type: ignore[arg-type]


def decoded(model: nn.Module, base: Path) -> nn.Module:
    """The plain model whose weights are the numbers that the codes of a quantized one stand for."""
    plain = models.load_model(base)
    for name, module in model.named_modules():
        if name and hasattr(module, "in_features"):
            twin: Any = plain.get_submodule(name)
            with torch.no_grad():
                units = torch.eye(module.in_features)  # type: ignore[arg-type]
                rows = module(units) - module(torch.zeros_like(units))  # (in, out)
                twin.weight.copy_(rows if type(twin).__name__ == "Conv1D" else rows.mT)
    return plain


@pytest.mark.parametrize(("how", "family"), [*CASES, ("int8", "opt")])
@pytest.mark.parametrize("paradigm", ["fo", "zo"])
def test_a_run_on_codes_equals_a_held_run_on_what_they_stand_for(
    paradigm: str, how: str, family: str, tmp_path: Path
) -> None:
    quantized = coded(family, how, tmp_path)
    plain = decoded(quantized, tmp_path)
    assert close(answers(plain), answers(quantized), 1e-5)
    rule = compose(
        "stiefel", paradigm, rank=4, refresh_every=3, optimizer="sgd", eps=None if paradigm == "fo" else 1e-2
    )
    rate = 0.1 if paradigm == "fo" else 1e-3
    runs = [Engine(m, rule, lr=rate, loss=models.lm_loss, hold=True) for m in (quantized, plain)]
    for _ in range(7):
        infos = [run.step([lines()]) for run in runs]
        assert infos[0].loss == pytest.approx(infos[1].loss, rel=1e-4)
    for one, other in zip(*(run.variables for run in runs), strict=True):
        if one.stack is None:  # a bias or a norm: its gradient passes the codes too
            moved = one.value - coded_start(other.name, tmp_path)
            assert close(one.value, other.value, 1e-4) and float(moved.detach().abs().max()) > 0
    assert close(answers(quantized), answers(plain), 1e-3)


def coded_start(name: str, base: Path) -> Tensor:
    """A plain weight of the saved model."""
    return dict(models.load_model(base).named_parameters())[name].detach()


@pytest.mark.parametrize("how", CODES)
def test_backward_keeps_no_decoded_weight(how: str, tmp_path: Path) -> None:
    model = coded("llama", how, tmp_path)
    wide = 64 * 128  # entries of a weight of the feed-forward block, more than any activation here
    run = Engine(
        model, compose("stiefel", "fo", rank=4), lr=1e-3, loss=models.lm_loss, hold=True, select="attention"
    )
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept.append(tensor.numel())
        return tensor

    few = {"input_ids": torch.full((1, 4), 5), "labels": torch.full((1, 4), 6)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run.step([few])
    assert kept and wide not in kept


@pytest.mark.parametrize(("how", "family"), CASES)
def test_quantizing_in_place_gives_the_bytes_of_loading_quantized(
    how: Any, family: str, tmp_path: Path
) -> None:
    loaded = coded(family, how, tmp_path)
    placed = models.load_model(tmp_path)
    models.code(placed, how)
    assert same_bytes(stored(placed), stored(loaded))
    assert torch.equal(answers(placed), answers(loaded))


@pytest.mark.parametrize("how", CODES)
def test_the_size_of_a_coded_weight_is_estimated(how: Any, tmp_path: Path) -> None:
    plain, quantized = models.load_model(tiny("llama", tmp_path)), coded("llama", how, tmp_path)
    assert shapes(quantized) == {name: tuple(p.shape) for name, p in plain.named_parameters()}
    one = dict(quantized.named_modules())["model.layers.0.mlp.up_proj"]
    found = stand_in(one, "weight", torch.float32)
    weight = dict(plain.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    assert found.shape == weight.shape and found.untyped_storage().nbytes() == 4
    assert float(found[0, 0]) == pytest.approx(float(weight.detach().square().mean().sqrt()), rel=0.05)


@pytest.mark.parametrize("how", CODES)
def test_a_quantized_run_resumes_bit_for_bit(how: str, tmp_path: Path) -> None:
    outputs, state = [], {}
    for again in (False, True):
        model = coded("llama", how, tmp_path)
        run = Engine(model, method("fo", "adamw"), lr=2e-3, loss=models.lm_loss, hold=True)
        if again:
            run.load_state_dict(state)
        for step in range(5 if again else 0, 9):
            if step == 5 and not again:
                state = copy.deepcopy(run.state_dict())
            run.step([lines()])
        outputs.append(answers(model))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("how", CODES)
def test_what_quantized_weights_do_not_allow_is_refused(how: str, tmp_path: Path) -> None:
    model = coded("llama", how, tmp_path)
    with pytest.raises(UsageError, match="is quantized, so realization 'rebuild' cannot reach it"):
        Engine(model, method("fo"), lr=1e-3, loss=models.lm_loss, realization="rebuild")
    with pytest.raises(UsageError, match="cannot be trained as a whole"):
        Engine(model, compose("adamw"), lr=1e-3, loss=models.lm_loss, select="linear")
    with pytest.raises(UsageError, match="use a smaller rank"):
        Engine(model, compose("stiefel", "fo", rank=500), lr=1e-3, loss=models.lm_loss, select="linear")


def test_int8_modules_of_bitsandbytes_train_too(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'zolr[quant]')")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama", tmp_path), quantization_config=how)
    answers(model)  # the codes move inside the module at the first use
    before = stored(model)
    run = Engine(
        model,
        compose("stiefel", "fo", rank=4, refresh_every=5),
        lr=2e-3,
        loss=models.lm_loss,
        select="linear",
        hold=True,
    )
    losses = [run.step([lines()]).loss for _ in range(12)]
    assert losses[-1] < losses[0] - 0.3
    assert same_bytes(stored(model), before)


def test_int8_says_that_it_covers_no_transposed_maps(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no linear map that int8 covers; use nf4"):
        coded("gpt2", "int8", tmp_path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.CODES, "nf4", "a_package_that_is_not_there")
    with pytest.raises(UsageError, match=r"needs the package a_package_that_is_not_there.*zolr\[quant\]"):
        models.load_model("demo", quantize="nf4")


# ---- adapters --------------------------------------------------------------------------------------------------------

ADAPTED = [
    *((None, family) for family in ("llama", "gpt2", "roberta", "opt")),
    *CASES,
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("how", "family"), ADAPTED)
def test_peft_loads_the_adapter_and_gives_the_same_outputs(how: Any, family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft (pip install peft)")
    if how is not None:
        pytest.importorskip(PACKAGES[how], reason=f"needs {PACKAGES[how]} (pip install 'zolr[quant]')")
    base, folder = tiny(family, tmp_path / "base"), tmp_path / "adapter"
    folder.mkdir()
    model = models.load_model(base, quantize=how)
    untouched = answers(model)
    run = Engine(
        model, compose("stiefel", "fo", rank=3, refresh_every=3), lr=5e-3, loss=models.lm_loss, hold=True
    )
    for _ in range(8):
        run.step([lines()])
    trained = answers(model)
    assert not close(untouched, trained, 0.05)
    adapters.write(folder, model, run.variables, str(base))
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]

    theirs = peft.PeftModel.from_pretrained(models.load_model(base, quantize=how), folder)
    assert close(answers(theirs), trained, 1e-5)

    ours = models.load_model(folder, quantize=how)
    assert close(answers(ours), trained, 1e-5)
    detach(ours)
    if family != "opt":  # its positions have no LoRA layer: they are stored, and loaded, as they are
        assert torch.equal(answers(ours), untouched)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("select", ["linear+embedding+head", "linear"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_an_embedding_of_its_own_kind_is_moved_once(
    family: str, tied: bool, select: str, tmp_path: Path
) -> None:
    """Such an embedding is stored whole, and the head that may share its weight as a pair."""
    sizes: dict[str, Any] = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=40)
    config = models.AutoConfig.for_model(family, **sizes, tie_word_embeddings=tied)
    model: Any = models.build(config)
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    folder.mkdir()
    untouched = answers(model)
    rule = compose("stiefel", "fo", rank=4, refresh_every=3)
    run = Engine(model, rule, lr=1e-2, loss=models.lm_loss, hold=True, select=select)
    for _ in range(8):
        run.step([lines()])
    trained = answers(model)
    assert not close(untouched, trained, 0.05)
    adapters.write(folder, model, run.variables, str(base))
    said = json.loads((folder / "adapter_config.json").read_text())
    assert (said["modules_to_save"] is not None) == ("embedding" in select)
    assert close(answers(models.load_model(folder)), trained, 1e-5)
    peft = pytest.importorskip("peft", reason="needs peft (pip install peft)")
    assert close(answers(peft.PeftModel.from_pretrained(models.load_model(base), folder)), trained, 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_ranks_of_an_adapter_are_those_of_its_weights(tmp_path: Path) -> None:
    model = models.load_model(tiny("llama", tmp_path))
    wanted = ("q_proj", "down_proj")
    run = Engine(
        model,
        compose("stiefel", "fo", rank=100, refresh_every=3),
        lr=1e-3,
        loss=models.lm_loss,
        hold=True,
        select=lambda name, _: any(part in name for part in wanted),
    )
    run.step([lines()])
    adapters.write(tmp_path, model, run.variables, str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {name: config["rank_pattern"].get(f"^{name}", config["r"]) for name in config["target_modules"]}
    assert {name.rsplit(".", 1)[1]: rank for name, rank in ranks.items()} == {"q_proj": 64, "down_proj": 100}
    assert config["alpha_pattern"] == config["rank_pattern"] and config["lora_alpha"] == config["r"]


def test_an_adapter_is_refused_by_what_it_would_be_written_of(tmp_path: Path) -> None:
    """Subclasses of linear maps may do anything, so they are stored whole, and peft needs one layer at least."""

    class Own(nn.Linear):
        pass

    for layer in (Own(5, 5), nn.LayerNorm(5)):
        model = nn.Sequential(nn.Linear(5, 5), layer)
        for select, fits in ((lambda name, _: name[0] == "1", False), (lambda *_: True, True)):
            run = Engine(
                model, method("fo"), lr=1e-2, loss=lambda m, x: m(x).mean(), hold=True, select=select
            )
            outcomes = set()
            for make in (adapters.check, lambda *parts: adapters.write(tmp_path, *parts, "base")):
                try:
                    make(model, run.variables)
                    outcomes.add("")
                except UsageError as error:
                    outcomes.add(str(error))
            (message,) = outcomes
            assert fits == (message == "") and (fits or f"is of a {type(layer).__name__}; train" in message)
            run.detach()


def test_an_adapter_needs_held_weights_and_its_own_model(tmp_path: Path) -> None:
    model = net(torch.float32)
    run = Engine(model, method("fo"), lr=1e-2, loss=loss)
    with pytest.raises(UsageError, match="is not held, so no adapter can tell"):
        adapters.write(tmp_path, model, run.variables, "base")
    run.detach()
    run = Engine(model, method("fo"), lr=1e-2, loss=loss, hold=True)
    run.step(batches(1))
    adapters.write(tmp_path, model, run.variables, "base")
    with pytest.raises(DataError, match="is of another model: there is no"):
        adapters.load(tmp_path, nn.Sequential(nn.Linear(3, 3)))
    other = net(torch.float32)
    other.up = nn.Linear(12, 15)
    with pytest.raises(DataError, match="'up.weight' has another shape"):
        adapters.load(tmp_path, other)
    assert type(other.up) is nn.Linear
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot read .*adapter_model.safetensors"):
        adapters.load(tmp_path, net(torch.float32))
