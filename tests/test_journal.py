"""The journal: a run without backprop is its base model and some numbers a step, and nothing of that is lost or bent."""

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import STEPS, Stopper, Toy, batches, equal, evaluation, loss, rows
from torch import Tensor, nn

from zolr import checkpoints, compose, journal
from zolr.engine import Engine, Made
from zolr.errors import DataError, NonFiniteError, StorageError, UsageError
from zolr.methods import METHODS
from zolr.training import Interrupted, train

ROWS = [(n, p) for n, row in METHODS.items() for p in row.paradigms if p != "fo" and row.adapter is None]
NEED_DATA = {"dependent"}
SETTINGS: dict[str, Any] = {"steps": STEPS, "eval_every": 5, "save_every": 7}


def begin(
    name: str = "stiefel", paradigm: str = "zo", dtype: torch.dtype = torch.float32, **more: Any
) -> Engine:
    method = compose(name, paradigm)
    if method.refresh_every is not None:
        method = replace(method, refresh_every=5)
    rank = getattr(method.projector, "rank", None)
    if rank is not None:
        method = replace(method, projector=replace(method.projector, rank=2))
    measured = method.tunable and paradigm == "zo" and name in ("stiefel", "zo-hgd")
    more = {"lr": None if measured else 1e-3, "seed": 3, **more}
    return Engine(Toy().to(dtype), method, loss=lossy if name == "zo-adam" else loss, **more)


def lossy(model: nn.Module, batch: Any) -> Tensor:
    """A loss that is not a number on one batch of the run."""
    value = loss(model, batch)
    return (
        value * float("nan")
        if int(batch["input_ids"].sum()) == int(batches(3)[0]["input_ids"].sum())
        else value
    )


def run_of(folder: Path, *arguments: Any, **more: Any) -> Engine:
    engine = begin(*arguments, **more)
    train(engine, batches, evaluate=evaluation(engine), folder=folder, best=None, **SETTINGS)
    return engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "paradigm"), ROWS, ids=lambda x: x)
def test_a_journal_replayed_is_the_run_bit_for_bit(
    name: str, paradigm: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    live = run_of(tmp_path, name, paradigm, dtype)
    found, again = journal.read(tmp_path / journal.NAME), begin(name, paradigm, dtype)
    if name in NEED_DATA:
        with pytest.raises(UsageError, match="cannot be replayed: .*activations of the data"):
            journal.replay(again, found)
        return
    assert found.steps == STEPS and not found.torn
    assert any(made.skipped for made in found.made) == (name == "zo-adam")
    again._loss = None  # type: ignore[assignment]  # nothing is evaluated
    assert journal.replay(again, found) >= 4  # the hashes at checkpoints
    assert checkpoints.digest(again.state_dict()) == checkpoints.digest(live.state_dict())
    assert equal(live.model.state_dict(), again.model.state_dict())
    assert again.step_count == live.step_count and again.base_lr == live.base_lr


def test_a_journal_without_losses_is_as_good(tmp_path: Path) -> None:
    live = run_of(tmp_path)
    path = tmp_path / journal.NAME
    found = journal.read(path)
    path.write_bytes(journal.shared(found, found.header))
    again, given = begin(), journal.read(path)
    assert all(made.loss != made.loss for made in given.made) and given.hashes == found.hashes
    assert journal.replay(again, given) == len(found.hashes)
    assert checkpoints.digest(again.state_dict()) == checkpoints.digest(live.state_dict())


def test_a_journal_leads_to_every_step(tmp_path: Path) -> None:
    run_of(tmp_path)
    found = journal.read(tmp_path / journal.NAME)
    for to in (0, 1, 5, 13):
        live, again = begin(), begin()
        for step in range(to):
            live.step(batches(step))
        journal.replay(again, found, to)
        assert checkpoints.digest(again.state_dict()) == checkpoints.digest(live.state_dict())
    with pytest.raises(UsageError, match=f"has steps 1 to {STEPS}, and no step {STEPS + 1}"):
        journal.replay(begin(), found, STEPS + 1)


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path)
    found = journal.read(tmp_path / journal.NAME)
    other = begin()
    with torch.no_grad():
        other.model.out.weight[1, 1] += 1e-3  # type: ignore[union-attr, operator]
    for engine, what in ((begin(seed=4), "seed 3"), (begin("mezo"), "method"), (other, "base")):
        with pytest.raises(UsageError, match=f"is of a run with {what}"):
            journal.replay(engine, found)


def test_other_subspaces_are_noticed(tmp_path: Path) -> None:
    run_of(tmp_path)
    found = journal.read(tmp_path / journal.NAME)
    made = list(found.made)
    made[5] = replace(made[5], bases="0" * 16)  # as if this machine factorized otherwise
    with pytest.raises(StorageError, match="subspaces of step 6 are .* and were 0000000000000000 there"):
        journal.replay(begin(), replace(found, made=tuple(made)))


def test_other_weights_are_noticed(tmp_path: Path) -> None:
    run_of(tmp_path)
    found = journal.read(tmp_path / journal.NAME)
    made = list(found.made)
    made[3] = replace(made[3], lr=made[3].lr * (1 + 1e-6))
    with pytest.raises(StorageError, match="weights after step 7 are not bit for bit"):
        journal.replay(begin(), replace(found, made=tuple(made)))


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_weights_that_are_away_have_the_fingerprint_of_those_that_are_there(way: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, away, other = Toy(), Toy(), Toy()
    assert journal.fingerprint(plain) == journal.fingerprint(other)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(1)
    for model in (away, other):
        if way == "cpu":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(
                model, str(tmp_path / f"{id(model)}"), execution_device=torch.device("cpu")
            )
    assert journal.fingerprint(away) == journal.fingerprint(plain) != journal.fingerprint(other)
    assert all(weight.is_meta for weight in away.parameters())  # gone again


def test_every_cut_leaves_a_prefix(tmp_path: Path) -> None:
    run_of(tmp_path)
    path = tmp_path / journal.NAME
    whole, found = path.read_bytes(), journal.read(path)
    start = whole.index(b"\n") + 1
    end = whole.rindex(b"\n", 0, len(whole) - 100)
    for length in (*range(start, end, 29), *range(end, len(whole), 3)):
        path.write_bytes(whole[:length])
        part = journal.read(path)
        assert part.made == found.made[: part.steps]
        assert part.torn == (length not in found.ends) or whole[:length].endswith(b"\n")
        assert length - 400 < part.ends[part.steps] <= length


def test_every_flip_is_refused_by_its_line(tmp_path: Path) -> None:
    run_of(tmp_path)
    path, source = tmp_path / journal.NAME, random.Random(0)
    whole, found = path.read_bytes(), journal.read(path)
    lines = whole.count(b"\n")
    for _ in range(120):
        at = source.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << source.randrange(8)]) + whole[at + 1 :])
        line = whole[:at].count(b"\n") + 1
        if line == lines:  # of a last line nobody can say whether it was whole
            part = journal.read(path)
            assert part.torn and part.made == found.made[: part.steps]
            continue
        with pytest.raises(DataError, match=rf"damaged in line ({line}|{line + 1}):|is no journal|layout"):
            journal.read(path)


def test_lines_cannot_be_left_out_moved_or_doubled(tmp_path: Path) -> None:
    run_of(tmp_path)
    path = tmp_path / journal.NAME
    lines = path.read_bytes().splitlines(keepends=True)
    for bent in (lines[:4] + lines[5:], lines[:4] + [lines[5], lines[4]] + lines[6:], lines[:5] + lines[4:]):
        path.write_bytes(b"".join(bent))
        with pytest.raises(DataError, match="damaged in line"):
            journal.read(path)


@pytest.mark.parametrize("name", ["stiefel", "mezo", "zo-adam", "zo-hgd"])
def test_a_resumed_run_takes_its_steps_from_the_journal(name: str, tmp_path: Path) -> None:
    """As after a kill between two checkpoints: no forward pass is spent on steps that the journal has."""
    settings = {"evaluate": None, "best": None, "steps": STEPS, "save_every": 10}
    whole = begin(name)
    train(whole, batches, folder=tmp_path / "whole", **settings)

    class Killed(BaseException):
        pass

    first, calls = begin(name), []
    inner = first._apply if not first.streams else first._stream

    def dying(*arguments: Any, **more: Any) -> Any:
        if first.step_count == 16:
            raise Killed
        return inner(*arguments, **more)

    setattr(first, "_stream" if first.streams else "_apply", dying)  # after the journal, before the update
    with pytest.raises(Killed):
        train(first, batches, folder=tmp_path / "cut", **settings)

    second = begin(name)
    counted = second._loss

    def counting(model: nn.Module, batch: Any) -> Tensor:
        calls.append(second.step_count)
        return counted(model, batch)

    second._loss = counting
    train(second, batches, folder=tmp_path / "cut", resume=True, **settings)
    assert min(calls) == 17  # the one that was cut short is in the journal too
    assert equal(whole.model.state_dict(), second.model.state_dict())
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    assert (tmp_path / "whole" / journal.NAME).read_bytes() == (tmp_path / "cut" / journal.NAME).read_bytes()


def test_steps_that_are_made_otherwise_have_hashes_of_their_own(tmp_path: Path) -> None:
    """Gone on with under other settings, the journal drops the steps after the checkpoint, and what it said of them."""
    engine = begin()
    with pytest.raises(Interrupted):
        train(engine, batches, folder=tmp_path, reporter=Stopper(9), about={"lr": 1}, **SETTINGS)
    shutil.rmtree(tmp_path / "checkpoints" / "step-9")
    assert set(journal.read(tmp_path / journal.NAME).hashes) == {7, 9}
    for steps, marked in ((9, {7, 9}), (STEPS, {7, 9, 14, 21, STEPS})):
        settings = {**SETTINGS, "steps": steps}
        train(begin(), batches, folder=tmp_path, about={"lr": (2, steps)}, resume=True, **settings)
        found = journal.read(tmp_path / journal.NAME)
        assert set(found.hashes) == marked and found.steps == steps
    assert journal.replay(begin(), found) == len(found.hashes)


def test_without_a_checkpoint_the_journal_begins_at_the_base_model(tmp_path: Path) -> None:
    live = run_of(tmp_path)
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        (folder / "tensors.safetensors").write_bytes(b"")
    again, watcher = begin(), Stopper(-1)
    train(
        again,
        batches,
        evaluate=evaluation(again),
        folder=tmp_path,
        best=None,
        resume=True,
        reporter=watcher,
        **SETTINGS,
    )
    assert equal(live.model.state_dict(), again.model.state_dict())
    assert len(watcher.notes) == 1 and "no usable checkpoint" in watcher.notes[0]
    assert f"the base model give the weights of step {STEPS}" in watcher.notes[0]


def test_a_damaged_journal_is_put_aside_and_the_run_goes_on(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "whole")
    first = begin()
    with pytest.raises(Interrupted):
        train(
            first,
            batches,
            evaluate=evaluation(first),
            folder=tmp_path / "cut",
            best=None,
            reporter=Stopper(9),
            **SETTINGS,
        )
    path = tmp_path / "cut" / journal.NAME
    path.write_bytes(path.read_bytes().replace(b"\n4 ", b"\n5 ", 1))
    second, watcher = begin(), Stopper(-1)
    train(
        second,
        batches,
        evaluate=evaluation(second),
        folder=tmp_path / "cut",
        best=None,
        resume=True,
        reporter=watcher,
        **SETTINGS,
    )
    assert equal(whole.model.state_dict(), second.model.state_dict())
    assert (
        len(watcher.notes) == 1
        and "damaged in line" in watcher.notes[0]
        and "goes on without" in watcher.notes[0]
    )
    assert not path.exists() and (tmp_path / "cut" / "journal.damaged").exists()


def test_a_journal_says_how_it_was_settled_and_is_small(tmp_path: Path) -> None:
    path, step = tmp_path / "journal", Made(0.6931471805599453, 1e-3, (0.123456789,), 2)
    written = journal.Journal(path, {"seed": 0})
    for number in range(10_000):
        written.append(replace(step, bases="0123456789abcdef") if number % 200 == 0 else step)
    written.close()
    found = journal.read(path)
    assert found.steps == 10_000 and found.made[1] == replace(step, forwards=0)
    given = journal.shared(found, {"seed": 0})
    assert path.stat().st_size < 500_000 and len(given) < 400_000
    path.write_bytes(given)
    assert [m.slopes for m in journal.read(path).made] == [m.slopes for m in found.made]


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    written = journal.Journal(tmp_path / "journal", {})
    written._file.close()
    written._file = open("/dev/full", "wb", buffering=0)
    with pytest.raises(StorageError, match="cannot write .*journal: No space left on device"):
        written.append(Made(1.0, 1.0, (1.0,), 2))
    written.close()


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    engine = begin("mezo")

    class Breaking(Stopper):
        def stepped(self, progress: Any, info: Any) -> None:
            if progress.step == 8:
                with torch.no_grad():
                    engine.model.out.weight[0, 0] = float("inf")  # type: ignore[union-attr, operator]

    with pytest.raises(
        NonFiniteError, match=r"variables.out.weight.weight is not finite after step 8.*step-4"
    ):
        train(engine, batches, steps=12, folder=tmp_path, save_every=4, reporter=Breaking(0))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-4"]
