"""Several processes on one run: equal bits, equal gradients, what travels, and what happens when they differ or one is gone."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from zolr import sharded as shards
from zolr.distributed import Processes, Share, Team, digest
from zolr.engine import Engine
from zolr.errors import PeerLostError, PeersDifferError, StorageError, UsageError
from zolr.estimators import mean_loss, setting
from zolr.methods import METHODS, Method, compose
from zolr.training import train

Batch = dict[str, Tensor]

ROWS = [(name, paradigm) for name, row in METHODS.items() for paradigm in row.paradigms]
FORWARD_ONLY = [row for row in ROWS if row[1] == "zo"]
OTHERS = [row for row in ROWS if row[1] != "zo"]
STEPS = 4  # with a refresh in the middle
TIMEOUT = 10.0  # seconds after which a silent rank counts as lost here
LIMIT = 90  # seconds after which the processes of a test hang


class Small(nn.Module):
    """A language model of two matrices, so small that a step takes a millisecond."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(13, 8, dtype=dtype)
        self.inner = nn.Linear(8, 12, dtype=dtype)
        self.outer = nn.Linear(12, 8, dtype=dtype)
        self.norm = nn.LayerNorm(8, dtype=dtype)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(8, 13, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next token."""
        hidden = self.embedding(ids)
        hidden = hidden + self.dropout(self.outer(torch.tanh(self.inner(hidden))))
        return self.head(self.norm(hidden))


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Sum and count, which the micro-batches have different ones of."""
    logits = model(batch["input_ids"])
    total = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    return total, batch["labels"].numel()


def each(model: nn.Module, batch: Batch) -> Tensor:
    """Losses of the examples."""
    logits = model(batch["input_ids"]).mT
    return F.cross_entropy(logits, batch["labels"], reduction="none").mean(1)


def batches(step: int, count: int = 4) -> list[Batch]:
    """The micro-batches of a step, of 2 to 5 rows."""
    made = []
    for i in range(count):
        generator = torch.Generator().manual_seed(1000 * step + i)
        ids = torch.randint(13, (2 + (step + i) % 4, 7), generator=generator)
        made.append({"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
    return made


def composed(name: str, paradigm: str, **more: Any) -> Method:
    """A row at a rank and window of this model."""
    method = compose(name, paradigm, **more)
    if getattr(method.projector, "rank", None) is not None:
        more["rank"] = 2
    if method.refresh_every:
        more["refresh_every"] = 2
    method = compose(name, paradigm, **more)
    if setting(method.estimator, "eps", 0.0) is None:
        method = compose(name, paradigm, **{**more, "eps": 1e-2})
    return method


def engine_of(
    method: Method, team: Team | None = None, dtype: torch.dtype = torch.float32, **more: Any
) -> Engine:
    """A fresh model under a method; equal arguments, equal engine."""
    more = {"lr": 1e-2, "loss": each if method.private else loss, "seed": 3, **more}
    return Engine(Small(dtype), method, team=team, **more)


def stepped(engine: Engine, steps: int = STEPS, count: int = 4) -> dict[str, Tensor]:
    """The weights after some steps, folded, and the loss of the last one."""
    info = None
    for step in range(steps):
        info = engine.step(batches(step, count))
    assert info is not None and not info.skipped
    weights = {name: p.detach().clone() for name, p in engine.detach().named_parameters()}
    return {**weights, "loss": torch.tensor(info.loss, dtype=torch.float64)}


CASES: dict[str, Callable[[Team | None], dict[str, Tensor]]] = {}


def case(function: Callable[[Team | None], Any]) -> Callable[[Team | None], Any]:
    """Something every world size does, and whose tensors are compared."""
    CASES[function.__name__] = function
    return function


def _all(rows: Sequence[tuple[str, str]], dtype: torch.dtype, team: Team | None) -> dict[str, Tensor]:
    found = {}
    for name, paradigm in rows:
        weights = stepped(engine_of(composed(name, paradigm), team, dtype))
        found |= {f"{name} {paradigm} {key}": value for key, value in weights.items()}
    return found


@case
def forward_only(team: Team | None) -> dict[str, Tensor]:
    """All rows without backprop, float32."""
    return _all(FORWARD_ONLY, torch.float32, team)


@case
def by_gradients(team: Team | None) -> dict[str, Tensor]:
    """All other rows, float64; dropout is on."""
    return _all(OTHERS, torch.float64, team)


@case
def chosen(team: Team | None) -> dict[str, Tensor]:
    """Radius and rate measured, signs together, a plain mean as loss, one-sided probes."""
    mean: Any = lambda model, batch: loss(model, batch)[0] / 10  # noqa: E731
    found = stepped(engine_of(compose("stiefel", "zo", rank=2), team, lr=None))
    for name, parts in (("together", {"signs": "together"}), ("one-sided", {"sides": 1, "probes": 3})):
        more = stepped(engine_of(composed("stiefel", "zo", **parts), team, loss=mean))
        found |= {f"{name} {key}": value for key, value in more.items()}
    return found


@case
def few_batches(team: Team | None) -> dict[str, Tensor]:
    """One micro-batch a step: all ranks but one have nothing to do."""
    found = stepped(engine_of(composed("stiefel", "zo"), team, torch.float64), count=1)
    for name, paradigm in (("stiefel", "fo"), ("galore", "fo"), ("stiefel", "fwd")):
        more = stepped(engine_of(composed(name, paradigm), team, torch.float64), count=1)
        found |= {f"{name} {paradigm} {key}": value for key, value in more.items()}
    return found


@case
def running_statistics(team: Team | None) -> dict[str, Tensor]:
    """Batch norms with a momentum and without, and an instance norm, which counts no batches."""
    draw = lambda *shape, seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()  # noqa: E731
    found = {}
    for name, more in (
        ("stiefel", {"rank": 2}),
        ("galore", {"rank": 2}),
        ("adamw", {}),
        ("extrapolation", {}),
    ):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            norms = (
                nn.BatchNorm1d(6),
                nn.InstanceNorm1d(6, track_running_stats=True),
                nn.BatchNorm1d(6, momentum=None),
            )
            first, last = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 1, 1)
        model = nn.Sequential(first, *norms, last).double()
        engine = Engine(
            model,
            compose(name, "fo", **more),
            lr=1e-2,
            loss=lambda model, x: (model(x).square().sum(), x.shape[0]),
            team=team,
        )
        for step, count in enumerate((5, 4, 1)):
            engine.step([draw(2 + i, 2, 5, seed=10 * step + i) + i for i in range(count)])
        state = engine.detach().state_dict()
        found |= {
            f"{name} {key}": value.double()
            for key, value in state.items()
            if "running" in key or "tracked" in key
        }
    return found


@case
def statistics_beside_subspaces_of_the_first_micro_batch(team: Team | None) -> dict[str, Tensor]:
    """Every rank draws a new subspace from the first micro-batch of the step, and one of them counts it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).double()
    method = compose("galore", rank=2, refresh_every=2, accumulate_in="coordinates")
    engine = Engine(model, method, lr=1e-2, loss=lambda model, x: model(x).square(), team=team)
    for step, count in enumerate((4, 4, 1, 5)):
        generator = torch.Generator().manual_seed(step)
        engine.step([torch.randn(3, 5, generator=generator).double() + i for i in range(count)])
    return {name: buffer.double() for name, buffer in engine.detach().named_buffers()}


@case
def settings_of_a_step(team: Team | None) -> dict[str, Tensor]:
    """Clipping, decay, and accumulation in the coordinates, of a streamed row and of one that is not."""
    found = {}
    parts: list[tuple[str, str, dict[str, Any]]] = [
        ("stiefel", "fo", {}),
        ("galore", "fo", {}),
        ("galore", "fo", {"accumulate_in": "coordinates"}),
        ("galore", "fo", {"accumulate_in": "coordinates", "clip_by": "twice"}),
    ]
    for i, (name, paradigm, more) in enumerate(parts):
        method = composed(name, paradigm, **more)
        weights = stepped(engine_of(method, team, torch.float64, clip=0.1, weight_decay=0.1))
        found |= {f"{i} {key}": value for key, value in weights.items()}
    return found


@case
def probes_spread(team: Team | None) -> dict[str, Tensor]:
    """Three probes, which two ranks cannot share evenly."""
    found = {}
    before = None if team is None else team.spread
    if team is not None:
        team.spread = "probes"
    for paradigm, parts in (("zo", {}), ("zo", {"sides": 1}), ("fwd", {})):
        weights = stepped(engine_of(composed("stiefel", paradigm, probes=3, **parts), team))
        found |= {f"{paradigm} {parts} {key}": value for key, value in weights.items()}
    if team is not None and before is not None:
        team.spread = before
    return found


def without_value(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The loss, but not of batches of 5 rows."""
    total, count = loss(model, batch)
    return total * (float("nan") if len(batch["labels"]) == 5 else 1.0), count


@case
def bad_batch(team: Team | None) -> dict[str, Tensor]:
    """A loss without a value, in a micro-batch of one rank: the step is left out everywhere."""
    found = {}
    for name, paradigm in (("stiefel", "zo"), ("stiefel", "fo"), ("galore", "fo")):
        engine = engine_of(composed(name, paradigm), team, torch.float64, loss=without_value)
        before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
        assert engine.step(batches(0)).skipped  # its last micro-batch has 5 rows
        for key, parameter in engine.detach().named_parameters():
            assert torch.equal(parameter, before[key])
            found[f"{name} {paradigm} {key}"] = parameter.detach().clone()
    return found


@case
def bad_gradient(team: Team | None) -> dict[str, Tensor]:
    """A gradient without a value amid backprop, in a micro-batch of one rank: all go back, also over the begin of a window."""
    found = {}
    for name, more in (
        ("stiefel", {}),
        ("galore", {}),
        ("galore", {"accumulate_in": "coordinates"}),
        ("lomo", {}),
    ):
        engine = engine_of(composed(name, "fo", **more), team, torch.float64)
        for step in range(2):
            engine.step(batches(step))
        before, good = engine.digests(), engine._loss
        engine._loss = _with_a_cusp
        assert engine.step(batches(2)).skipped
        engine._loss = good
        after = engine.digests()
        assert [key for key in before if not torch.equal(before[key], after[key])] == []
        for step in range(2, 5):
            assert not engine.step(batches(step)).skipped
        for key, parameter in engine.detach().named_parameters():
            found[f"{name} {more} {key}"] = parameter.detach().clone()
    return found


def _with_a_cusp(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """The loss; in batches of 5 rows the embedding, whose gradient comes last, has none that is finite."""
    seen: list[Tensor] = []
    hook = model.embedding.register_forward_hook(lambda *told: seen.append(told[2]))
    total, count = loss(model, batch)
    hook.remove()
    return total + (seen[0] * 0).square().sum().sqrt() * (len(batch["labels"]) == 5), count


@case
def sharded(team: Team | None) -> dict[str, Tensor]:
    """Weights in pieces (several processes), or held (one): coordinates, and the weights as a plain file has them."""
    found = {}
    for paradigm in ("zo", "fo"):
        engine = _in_pieces(paradigm, team)
        for step in range(STEPS):
            assert not engine.step(batches(step)).skipped
        for variable in engine.variables:
            found[f"{paradigm} {variable.name} value"] = variable.value.detach().clone()
            if team is None:
                weight = variable.value if variable.stack is None else variable.weight.data
                if variable.stack is not None:
                    left, right = variable.moved_by()
                    weight = weight + left @ right.mT
                found[f"{paradigm} {variable.name}"] = weight.detach().clone()
        if team is not None:
            with tempfile.TemporaryDirectory() as scratch:
                folder = shards.save(Path(team.told(scratch)) / "model", engine)
                plain = shards.consolidate(folder, Path(scratch) / "model.safetensors")
                found |= {f"{paradigm} {name}": tensor for name, tensor in load_file(plain).items()}
                _check_damage(folder)
                team.wait()
    return found


def _in_pieces(paradigm: str, team: Team | None) -> Engine:
    """Of a sharded model, or of one that one process holds."""
    model = Small(torch.float64)
    if team is not None:
        mesh = init_device_mesh("cpu", (team.size,))
        for part in (model.embedding, model.inner, model):
            fully_shard(part, mesh=mesh)
    method = composed("stiefel", paradigm, optimizer="adamw")
    return Engine(model, method, lr=1e-2, loss=loss, seed=3, hold=True, realization="side", team=team)


@case
def sharded_resumed(team: Team | None) -> dict[str, Tensor]:
    """A sharded run with checkpoints, gone on with after step 3, inside a window, by the loop of all runs."""
    found = {}
    for paradigm in ("zo", "fo"):
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch if team is None else team.told(scratch))
            ends = []
            for name, stops in (("whole", (6,)), ("stopped", (3, 6))):
                for stop in stops:
                    engine = _in_pieces(paradigm, team)
                    train(
                        engine, batches, steps=stop, folder=root / name, save_every=3, resume=stop != stops[0]
                    )
                ends.append({v.name: v.value.detach().clone() for v in engine.variables} | engine.digests())
            assert [key for key in ends[0] if not torch.equal(ends[0][key], ends[1][key])] == []
            assert all(v.window >= 2 for v in engine.variables if not v.is_full)
            if team is not None:
                team.wait()
        found |= {f"{paradigm} {v.name}": v.value.detach().clone() for v in engine.variables}
    return found


def _check_damage(folder: Path) -> None:
    """A shard with another byte is refused."""
    copy = Path(f"{folder}-{os.getpid()}")
    shutil.copytree(folder, copy)
    path = copy / shards.shard_name(1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="does not match its hash"):
        shards.consolidate(copy, copy / "model.safetensors")


def _uneven(team: Team) -> str:
    """What is said when sharded weights meet micro-batches that ranks cannot share evenly."""
    model = Small(torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (team.size,)))
    engine = Engine(model, composed("stiefel", "zo"), lr=1e-2, loss=loss, team=team)
    try:
        engine.step(batches(0, team.size + 1))
    except UsageError as error:
        return str(error)
    return ""


def _unequal(team: Team) -> dict[str, str]:
    """What is said when ranks are given different numbers of micro-batches."""
    said = {}
    for name in ("stiefel zo", "stiefel fo"):
        engine = engine_of(composed(*name.split()), team)
        engine.step(batches(0, 4))
        try:
            engine.step(batches(1, 4 - (team.rank == 1)))
        except UsageError as error:
            said[name] = str(error)
    return said


# ---- what only several processes do -----------------------------------------------------------------------------------


SENDING: dict[str, dict[str, Any]] = {
    "stiefel zo": {},
    "stiefel fo": {},
    "sgd fo": {},
    "galore fo": {},
    "galore fo in coordinates": {"accumulate_in": "coordinates"},
}


def _bytes_sent(team: Team) -> dict[str, int]:
    """What a step sends, for each way of training."""
    found = {}
    for name, parts in SENDING.items():
        engine = engine_of(composed(*name.split()[:2], **parts), team)
        engine.step(batches(0))
        before = dict(team.sent)
        engine.step(batches(1))
        found[name] = {kind: team.sent[kind] - before[kind] for kind in before}
    return found


def _difference(team: Team) -> str:
    """What is said when one bit of one weight is another on one rank."""
    engine = engine_of(composed("stiefel", "zo"), team)
    engine.step(batches(0))
    team.compare(engine.digests(all_weights=True), "before")
    if team.rank == 1:
        engine.variables[2].weight.data.view(torch.int32).view(-1)[5] ^= 1
    try:
        team.compare(engine.digests(), "after step 1")
    except PeersDifferError as error:
        return str(error)
    return ""


def _trained(engine: Engine, folder: Path, steps: int, resume: bool = False, **more: Any) -> Any:
    """The training loop with checkpoints, evaluation and best weights."""

    def evaluate() -> dict[str, float]:
        engine.model.eval()
        with torch.no_grad():
            return {"accuracy": -float(mean_loss(lambda b: loss(engine.model, b), batches(100)))}

    settings = {"evaluate": evaluate, "eval_every": 2, "save_every": 2, "check_every": 2, **more}
    return train(engine, batches, steps=steps, folder=folder, resume=resume, **settings)


def _killed(team: Team, folder: Path) -> str:
    """What is said on the first rank when the last one is killed in the fifth step."""
    engine = engine_of(composed("stiefel", "zo"), team)

    def until(progress: Any) -> bool:
        if progress.step == 5 and team.rank == team.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    try:
        _trained(engine, folder, 8, until=until)
    except PeerLostError as error:
        return str(error)
    return ""


def _work(rank: int, size: int, port: int, folder: Path) -> None:
    try:
        _worked(rank, size, port, folder)
    except Exception:
        (folder / f"failed-{rank}.txt").write_text(traceback.format_exc())
        raise


def _worked(rank: int, size: int, port: int, folder: Path) -> None:
    """What a process of these tests does; the last one is killed at the end."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    team = Processes(timeout=TIMEOUT)
    for name, function in CASES.items():
        torch.save(function(team), folder / f"{name}-{rank}.pt")
    said = {
        "bytes": _bytes_sent(team),
        "difference": _difference(team),
        "told": team.told(f"from {rank}"),
        "largest": team.largest(rank),
        "uneven": _uneven(team),
        "unequal": _unequal(team),
    }
    _trained(engine_of(composed("galore", "fo"), team, torch.float64), folder / "streamed", 3)
    team.wait()
    said["killed"] = _killed(team, folder / "killed")
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    team.abandon()
    sys.exit(PeerLostError.exit_code)


def _processes() -> Any:
    """Processes that begin with what takes longest to import, and know nothing of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "zolr.engine", __name__])
    return context


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class World:
    """What the processes of a world size left behind."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder = size, folder
        context, port = _processes(), _free_port()
        processes = [context.Process(target=_work, args=(r, size, port, folder)) for r in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(LIMIT * size / 2)
        self.hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        self.codes = [process.exitcode for process in processes]
        failed = "\n".join(path.read_text() for path in folder.glob("failed-*.txt"))
        assert not failed, failed

    def found(self, name: str) -> list[dict[str, Tensor]]:
        """Tensors of a case, by rank."""
        return [torch.load(self.folder / f"{name}-{r}.pt", weights_only=True) for r in range(self.size)]

    @property
    def said(self) -> list[dict[str, Any]]:
        """Everything else, of the ranks that were not killed."""
        return [json.loads((self.folder / f"said-{r}.json").read_text()) for r in range(self.size - 1)]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The processes, which start once for all tests: starting is what takes time."""
    return World(request.param, tmp_path_factory.mktemp(f"world{request.param}"))


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """As many threads as the processes have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


EXACT = ("forward_only", "chosen", "probes_spread", "bad_batch")


@pytest.mark.parametrize("name", EXACT)
def test_forward_only_runs_have_the_same_bits_on_any_number_of_ranks(world: World, name: str) -> None:
    alone = CASES[name](None)
    assert alone
    for weights in world.found(name):
        assert weights.keys() == alone.keys()
        assert [key for key in alone if not torch.equal(weights[key], alone[key])] == []


@pytest.mark.parametrize("name", [name for name in CASES if name not in EXACT])
def test_gradients_are_those_of_one_process_to_rounding_and_equal_on_all_ranks(
    world: World, name: str
) -> None:
    alone = CASES[name](None)
    first, *others = world.found(name)
    for key, expected in alone.items():
        torch.testing.assert_close(
            first[key], expected, rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}"
        )
        assert all(torch.equal(weights[key], first[key]) for weights in others), key


def test_ranks_that_were_given_different_micro_batches_are_told_so(world: World) -> None:
    counts = ", ".join("3" if rank == 1 else "4" for rank in range(world.size))
    for said in world.said:
        for name in ("stiefel zo", "stiefel fo"):
            assert f"were given {counts} micro-batches for step 2" in said["unequal"][name]


def test_sharded_weights_need_batches_that_ranks_share_evenly(world: World) -> None:
    for said in world.said:
        assert f"{world.size + 1} micro-batches do not go evenly into {world.size} ranks" in said["uneven"]


def test_forward_only_coordinates_of_sharded_weights_have_the_bits_of_one_process(world: World) -> None:
    alone = sharded(None)
    for weights in world.found("sharded"):
        values = [key for key in alone if key.startswith("zo") and key.endswith("value")]
        assert values and [key for key in values if not torch.equal(weights[key], alone[key])] == []


def test_forward_only_steps_send_scalars_and_backprop_sends_coordinates(world: World) -> None:
    sent = world.said[0]["bytes"]
    ranks = world.size
    # both signs of a probe at once: a float64 sum and count of the micro-batches of a rank, to every other rank
    assert sent["stiefel zo"]["losses"] == (ranks - 1) * 2 * 2 * 8 * (4 // ranks)
    assert sent["stiefel zo"]["gradients"] == 0
    dense = sum(v.weight.numel() for v in engine_of(composed("sgd", "fo")).variables)
    coords = sum(v.value.numel() for v in engine_of(composed("stiefel", "fo")).variables)
    streamed = engine_of(composed("galore", "fo"))
    streamed.step(batches(0))
    inside = sum(streamed.trained(v).numel() for v in streamed.variables)
    for name, entries in (
        ("stiefel fo", coords),
        ("sgd fo", dense),
        ("galore fo", dense),
        ("galore fo in coordinates", inside),
    ):
        chunk = -(-entries // ranks)  # a ring all-reduce sends as much
        assert sent[name]["gradients"] == 2 * (ranks - 1) * chunk * 4, name
    assert sent["stiefel fo"]["gradients"] < sent["sgd fo"]["gradients"]


def test_a_difference_of_one_bit_stops_all_ranks_with_the_name_of_the_weight(world: World) -> None:
    name = engine_of(composed("stiefel", "zo")).variables[2].name
    for said in world.said:
        assert f"'{name}' is not the same on all ranks after step 1" in said["difference"]
        if world.size > 2:
            assert "rank 1 differs" in said["difference"]
    assert PeersDifferError.exit_code == 6


def test_every_rank_hears_the_first_one(world: World) -> None:
    assert {said["told"] for said in world.said} == {"from 0"}
    assert {said["largest"] for said in world.said} == {world.size - 1}


def test_a_killed_rank_ends_all_others_and_names_itself(world: World) -> None:
    assert world.hanging == []
    *others, killed = world.codes
    assert killed == -signal.SIGKILL
    assert others == [PeerLostError.exit_code] * (world.size - 1)
    named = re.match(r"(?:rank|one of ranks) ([\d, ]+) of the run is gone", world.said[0]["killed"])
    assert named and str(world.size - 1) in named[1].split(", "), world.said[0]["killed"]
    assert "0" not in named[1].split(", ")
    assert "step 5 is saved in" in world.said[0]["killed"]


def test_a_run_resumed_on_another_number_of_ranks_is_the_run_that_never_stopped(
    world: World, tmp_path: Path
) -> None:
    method = composed("stiefel", "zo")
    resumed, whole = engine_of(method), engine_of(method)
    outcome = _trained(resumed, world.folder / "killed", 8, resume=True)
    expected = _trained(whole, tmp_path / "whole", 8)
    assert outcome.progress.step == 8 and outcome.kept_step == expected.kept_step
    state, other = resumed.digests(all_weights=True), whole.digests(all_weights=True)
    assert state.keys() == other.keys()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []
    lines, rows = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (world.folder / "killed", tmp_path / "whole")
    )
    kept = ("step", "loss", "slope", "lr", "eval", "forwards", "tokens")
    assert [[line.get(k) for k in kept] for line in lines] == [[row.get(k) for k in kept] for row in rows]


def test_only_the_first_rank_writes(world: World) -> None:
    lines = (world.folder / "streamed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "eval" not in line] == [1, 2, 3]


def test_a_streamed_run_goes_on_in_one_process(world: World, tmp_path: Path) -> None:
    folder, method = tmp_path / "stopped", composed("galore", "fo")
    shutil.copytree(world.folder / "streamed", folder)
    resumed, whole = (engine_of(method, dtype=torch.float64) for _ in range(2))
    _trained(resumed, folder, 6, resume=True)
    _trained(whole, tmp_path / "whole", 6)
    for v, w in zip(resumed.variables, whole.variables, strict=True):
        torch.testing.assert_close(v.weight, w.weight, rtol=1e-9, atol=1e-12)


KINDS = {"zo": ("stiefel", "zo"), "fo": ("stiefel", "fo"), "streamed": ("galore", "fo")}


def _goes_on(rank: int, size: int, port: int, folder: Path, steps: int) -> None:
    """What a process of a run on so many ranks does."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    team = Processes(timeout=TIMEOUT)
    for name, row in KINDS.items():
        engine = engine_of(composed(*row), team, torch.float64)
        _trained(engine, folder / name, steps, resume=True, keep_last=9)
    team.close()


@pytest.mark.slow
def test_a_run_goes_on_on_more_and_on_fewer_ranks(tmp_path: Path) -> None:
    """On 2, then 4, then 1, each from the checkpoint of the others, against one process that never stopped."""
    context = _processes()
    for size, steps in ((2, 3), (4, 6)):
        port = _free_port()
        arguments = [(rank, size, port, tmp_path, steps) for rank in range(size)]
        processes = [context.Process(target=_goes_on, args=each) for each in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(LIMIT)
        assert [process.exitcode for process in processes] == [0] * size
    for name, row in KINDS.items():
        resumed, whole = (engine_of(composed(*row), dtype=torch.float64) for _ in range(2))
        _trained(resumed, tmp_path / name, 9, resume=True)
        _trained(whole, tmp_path / f"{name}-whole", 9)
        if name == "zo":
            state, other = resumed.digests(), whole.digests()
            assert [key for key in state if not torch.equal(state[key], other[key])] == []
        for v, w in zip(resumed.variables, whole.variables, strict=True):
            torch.testing.assert_close(v.weight, w.weight, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(v.value, w.value, rtol=1e-9, atol=1e-12)


# ---- one process ------------------------------------------------------------------------------------------------------


def test_a_digest_tells_every_changed_bit() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int8):
        tensor = torch.arange(-40, 40).to(dtype)
        before = int(digest(tensor))
        raw = tensor.view(torch.uint8)
        for place in range(len(raw)):
            for bit in range(8):
                raw[place] ^= 1 << bit
                assert int(digest(tensor)) != before
                raw[place] ^= 1 << bit
        assert int(digest(tensor)) == before
        assert int(digest(tensor.flip(0))) != before


def test_a_share_covers_all_batches_once_in_their_order() -> None:
    for size in (1, 2, 3, 4, 7):
        for count in (1, 2, 5, 8):
            seen, firsts = [], []
            for rank in range(size):
                team = Team()
                team.rank, team.size = rank, size
                share = Share(list(range(count)), team)
                seen += list(share)
                firsts += [share.first] * len(share)
                assert share.lengths[rank] == len(share) and sum(share.lengths) == count
            assert seen == list(range(count))
            assert firsts == sorted(firsts)


def test_settings_of_a_team_that_mean_nothing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="spread 'weights'"):
        Team("weights")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="timeout = 0"):
        Processes(timeout=0)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="torchrun"):
        Processes()
    with pytest.raises(UsageError, match="no probes that ranks could share"):
        engine_of(composed("galore", "fo"), Team("probes"))


def test_verbs_of_one_process_are_refused_under_torchrun(zolr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, _, said = zolr("methods")
    assert code == 2 and said.startswith("rank 1: error: 'methods' runs in one process")


def test_a_group_of_our_own_goes_before_the_interpreter_does() -> None:
    """A thread of gloo's that gives up an exchanged tensor after that ends the process; with the group, it is waited for."""
    script = """
import torch, torch.distributed as dist, sys, weakref
from zolr.distributed import Processes
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
team = Processes()
group = weakref.ref(team._host)
team.largest(3)
import atexit
print(team._host is not None)
dist.destroy_process_group()  # as accelerate's end_training does
atexit._run_exitfuncs()
print(team._host is None, group() is None)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert ended.stdout.splitlines() == ["True", "True True"], ended.stderr
