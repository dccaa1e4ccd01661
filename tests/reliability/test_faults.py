"""Faults: whatever goes wrong in a step, on the disk or at the keyboard, nothing that was good is lost."""

import errno
import gc
import io
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from torch import Tensor, nn

from zolr import checkpoints, compose
from zolr.engine import Engine
from zolr.errors import BudgetError, NonFiniteError, StorageError, UsageError
from zolr.methods import METHODS
from zolr.training import train

OFTEN = {"mezo", "galore", "gum", "lomo", "lorenza", "badam"}  # one of each way to take a step
ROWS = [
    pytest.param(name, p, marks=[] if name in OFTEN else pytest.mark.slow)
    for name, row in METHODS.items()
    for p in row.paradigms
    if row.adapter is None
]


class Net(nn.Module):
    """An embedding, a matrix that is projected, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.inner = nn.Embedding(19, 12), nn.Linear(12, 16)
            self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.norm(torch.tanh(self.inner(self.embedding(ids).mean(1)))))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["input_ids"]), batch["labels"], reduction="none")


def batches(step: int) -> list[dict[str, Tensor]]:
    source = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 19, (2, 6, 4), generator=source)
    return [{"input_ids": part, "labels": part.sum(1) % 3} for part in ids]


def engine(name: str, paradigm: str, **more: Any) -> Engine:
    method = compose(name, paradigm)
    if method.refresh_every is not None:
        method = replace(method, refresh_every=3)
    if getattr(method.projector, "rank", None) is not None:
        method = replace(method, projector=replace(method.projector, rank=2))
    return Engine(Net(), method, lr=1e-3, loss=loss, seed=2, **more)


def bits(run: Engine) -> str:
    """A hash of weights and state."""
    return checkpoints.digest(run.state_dict())


class Fault(Exception):
    """What a user's hook raises."""


FAULTS = {
    "loss": lambda run, at: setattr(run, "_loss", after(run._loss, at)),
    "optimizer": lambda run, at: setattr(run.optimizer, "step", half(run.optimizer.step, at)),
    "fold": lambda run, at: setattr(run.variables[1], "fold", raising),
    "window": lambda run, at: setattr(run.windows, "renew", half(run.windows.renew, at)),
    "hook": lambda run, at: run.model.out.register_forward_hook(after(lambda *_: None, at)),
    "backward": lambda run, at: run.model.inner.register_full_backward_hook(after(lambda *_: None, at)),
    "schedule": lambda run, at: setattr(run, "_follow_schedule", half(run._follow_schedule, at)),
}
TWICE = ("loss", "optimizer", "hook", "backward")  # also at their second call


def raising(*_: Any, **__: Any) -> Any:
    raise Fault


def after(real: Callable[..., Any], calls: int) -> Callable[..., Any]:
    left = calls

    def counted(*arguments: Any, **more: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Fault
        return real(*arguments, **more)

    return counted


def half(real: Callable[..., Any], calls: int) -> Callable[..., Any]:
    left = calls

    def stepped(*arguments: Any, **more: Any) -> Any:
        nonlocal left
        result = real(*arguments, **more)  # it has moved values, of one weight or of all
        left -= 1
        if left < 0:
            raise Fault
        return result

    return stepped


def mended(run: Engine, fault: str, real: Any, hook: Any) -> None:
    run._loss = real
    run.optimizer.__dict__.pop("step", None)
    run.variables[1].__dict__.pop("fold", None)
    run.windows.__dict__.pop("renew", None)
    run.__dict__.pop("_follow_schedule", None)
    if hook is not None:
        hook.remove()


@pytest.mark.parametrize(("name", "paradigm"), ROWS)
def test_a_step_that_raises_anywhere_leaves_everything_as_it_was(name: str, paradigm: str) -> None:
    """On a step that begins a window, where also the fold of the last one has to be undone, and on one that does not."""
    run, other = engine(name, paradigm), engine(name, paradigm)
    for step in range(6):
        if step in (3, 4):
            before, state, real = bits(run), run.state_dict(), run._loss
            for fault, at in ((f, n) for f in FAULTS for n in ((0, 1) if f in TWICE else (0,))):
                hook, met = FAULTS[fault](run, at), False
                try:
                    run.step(batches(step))
                except Fault:
                    met = True
                mended(run, fault, real, hook)
                if not met:
                    run.load_state_dict(state)
                assert bits(run) == before, (fault, step, at)
        run.step(batches(step))
        other.step(batches(step))
    assert bits(run) == bits(other)


def test_the_faults_are_met_where_they_are_meant() -> None:
    met = set()
    for name, paradigm in (("galore", "fo"), ("stiefel", "zo")):
        for fault in FAULTS:
            run = engine(name, paradigm)
            for step in range(3):
                run.step(batches(step))
            FAULTS[fault](run, 0)
            with suppress(Fault):
                run.step(batches(3))
                continue
            met.add((name, fault))
    both = {(name, fault) for name in ("galore", "stiefel") for fault in FAULTS}
    assert both - met == {("galore", "fold"), ("stiefel", "window"), ("stiefel", "backward")}


BACKWARD = [p for p in ROWS if p.values[1] == "fo"]


@pytest.mark.parametrize(("name", "paradigm"), BACKWARD)
@pytest.mark.parametrize("first", [3, 4])
def test_a_gradient_that_is_not_finite_amid_backprop_leaves_everything_as_it_was(
    name: str, paradigm: str, first: int
) -> None:
    """That of the embedding, which comes last: all other weights have been moved by then, where gradients are streamed."""

    def cusp(model: Any, batch: Any) -> Tensor:
        seen: list[Tensor] = []
        hook = model.embedding.register_forward_hook(lambda *told: seen.append(told[2]))
        value = loss(model, batch)
        hook.remove()
        return value + (seen[0] * 0).square().sum().sqrt()  # 0, and nothing finite behind it

    run, other = engine(name, paradigm), engine(name, paradigm)
    for step in range(first):
        run.step(batches(step))
        other.step(batches(step))
    before, run._loss = bits(run), cusp
    moved: list[int] = []
    # vectors go at the end
    matrices = [v for v in run.variables if len(v.shape) > 1 and v.name != "embedding.weight"]
    last = (matrices if run.streams else run.variables)[-1]
    commit = last.commit
    last.commit = lambda: moved.append(1) or commit()
    info = run.step(batches(first))
    run._loss = loss
    if any(v.name == "embedding.weight" for v in run.active):
        assert info.skipped and run.step_count == first and bits(run) == before
        assert bool(moved) == run.streams
        for step in range(first, first + 4):
            assert not run.step(batches(step)).skipped
            other.step(batches(step))
        assert bits(run) == bits(other)


@pytest.mark.parametrize(
    "row", [("stiefel", "zo"), ("mezo", "zo"), ("stiefel", "fo"), ("galore", "fo")], ids=str
)
def test_a_skipped_step_that_begins_a_window_leaves_everything_as_it_was(row: tuple[str, str]) -> None:
    run = engine(*row)
    for step in range(3):
        run.step(batches(step))
    before, good = bits(run), run._loss
    run._loss = lambda model, batch: good(model, batch) * float("inf")
    info = run.step(batches(3))
    assert info.skipped and not info.refreshed and bits(run) == before


def test_with_nothing_kept_an_engine_cut_short_while_it_writes_says_so() -> None:
    run = engine("lomo", "fo", undo=False)
    run.step(batches(0))
    before = run.state_dict()
    run.optimizer.step = half(run.optimizer.step, 0)
    with pytest.raises(Fault):
        run.step(batches(1))
    del run.optimizer.__dict__["step"]
    for use in (lambda: run.step(batches(1)), run.state_dict, run.export):
        with pytest.raises(
            UsageError, match="cut short by Fault while weights were written; go back by load_state_dict"
        ):
            use()
    run.load_state_dict(before)
    run.step(batches(1))


@pytest.mark.parametrize("realization", ["auto", "inplace"])
def test_undo_covers_the_walk_in_place_too(realization: Any) -> None:
    run = Engine(Net(), compose("mezo", "zo"), lr=1e-3, loss=loss, seed=2, realization=realization, undo=True)
    run.step(batches(0))
    before = bits(run)
    run._loss = after(run._loss, 3)
    with pytest.raises(Fault):
        run.step(batches(1))
    assert bits(run) == before


def test_where_nothing_can_be_kept_a_run_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    run, other, strict = engine("galore", "fo"), engine("galore", "fo"), engine("galore", "fo", undo=True)
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.warns(UserWarning, match="cannot be kept aside .*No space left.* TMPDIR"):
        run.step(batches(0))
    run.step(batches(1))  # said once
    before = bits(strict)
    with pytest.raises(StorageError, match="No space left on device; make room"):
        strict.step(batches(0))
    assert bits(strict) == before
    monkeypatch.undo()
    for step in range(2):
        other.step(batches(step))
    assert bits(run) == bits(other)


def test_what_is_kept_takes_no_memory_of_tensors_and_one_file() -> None:
    from zolr.memory import LiveBytes

    peaks: dict[bool | None, list[int]] = {None: [], False: []}
    gc.collect()  # engines of other tests have files too
    files = len(os.listdir("/proc/self/fd"))
    for undo, found in peaks.items():
        for name in ("galore", "stiefel"):
            run = engine(name, "fo", undo=undo)
            run.step(batches(0))
            for step in range(1, 5):
                with LiveBytes() as live:
                    live.track(run.model, *(v.subspace.tensors() for v in run.variables))
                    run.step(batches(step))
                found.append(live.peak)
            assert len(os.listdir("/proc/self/fd")) == files + (undo is None)
            del run
            gc.collect()
    assert peaks[None] == peaks[False] and len(os.listdir("/proc/self/fd")) == files


# ---- the disk ---------------------------------------------------------------------------------------------------------


def full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


class Then:
    """A reporter that does something after a step."""

    def __init__(self, step: int, act: Callable[[], Any]) -> None:
        self.step, self.act, self.notes = step, act, []

    def stepped(self, progress: Any, info: Any) -> None:
        if progress.step == self.step:
            self.act()

    def evaluated(self, progress: Any, metrics: Any) -> None:
        pass

    def noted(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("row", [("stiefel", "zo"), ("stiefel", "fo"), ("galore", "fo")], ids=str)
@pytest.mark.parametrize("fault", ["full", "full metrics", "vanished"])
def test_a_fault_of_the_disk_ends_in_one_line_and_the_last_checkpoint_is_whole(
    row: tuple[str, str], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, moved = tmp_path / "run", tmp_path / "moved"
    run = engine(*row)

    def act() -> None:
        if fault == "full":
            monkeypatch.setattr(os, "fsync", full)
        elif fault == "vanished":
            folder.rename(moved)
        else:
            os.dup2(os.open("/dev/full", os.O_WRONLY), lines[0])

    lines: list[int] = []
    plain = open

    def opened(path: Any, *arguments: Any, **more: Any) -> Any:
        file = plain(path, *arguments, **more)
        if str(path).endswith("metrics.jsonl"):
            lines.append(file.fileno())
        return file

    monkeypatch.setattr("builtins.open", opened)
    with pytest.raises(StorageError, match="No space left|cannot write|has vanished"):
        train(run, batches, steps=12, folder=folder, save_every=4, reporter=Then(6, act))
    monkeypatch.undo()
    found = checkpoints.newest((moved if fault == "vanished" else folder) / "checkpoints")
    assert found is not None and found.step == 4 and not found.damaged
    assert not folder.exists() or fault != "vanished"
    if fault != "vanished":
        whole, again = engine(*row), engine(*row)
        train(whole, batches, steps=12)
        train(again, batches, steps=12, folder=folder, save_every=4, resume=True)
        assert bits(whole) == bits(again)


@contextmanager
def nobody(folder: Path) -> Iterator[None]:
    """Root, who may write everywhere, as a user who may not; others as they are."""
    if os.geteuid() != 0:
        yield
        return
    os.chown(folder, 65534, -1)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_became_read_only_ends_in_one_line() -> None:
    run = engine("stiefel", "zo")
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        act = Then(6, lambda: (folder / "checkpoints").chmod(0o500))
        with nobody(folder):
            with pytest.raises(StorageError, match="Permission denied"):
                train(run, batches, steps=12, folder=folder, save_every=4, reporter=act)
            found = checkpoints.newest(folder / "checkpoints")
            assert found is not None and found.step == 4 and not found.damaged
            (folder / "checkpoints").chmod(0o700)
            whole, again = engine("stiefel", "zo"), engine("stiefel", "zo")
            train(whole, batches, steps=12)
            train(again, batches, steps=12, folder=folder, save_every=4, resume=True)
    assert bits(whole) == bits(again)


def test_keep_last_keeps_so_many(tmp_path: Path) -> None:
    for count in (1, 3):
        run = engine("sgd", "fo")
        train(run, batches, steps=10, folder=tmp_path / str(count), save_every=2, keep_last=count)
        kept = sorted(p.name for p in (tmp_path / str(count) / "checkpoints").iterdir())
        assert kept == sorted(f"step-{10 - 2 * i}" for i in range(count))


def test_going_on_from_a_named_checkpoint(tmp_path: Path) -> None:
    whole = engine("stiefel", "zo")
    train(whole, batches, steps=12, folder=tmp_path, save_every=3, keep_last=9)
    again = engine("stiefel", "zo")
    train(again, batches, steps=12, folder=tmp_path, save_every=3, resume=tmp_path / "checkpoints" / "step-6")
    assert bits(whole) == bits(again)
    with pytest.raises(StorageError, match="is no checkpoint: its name is not step-N"):
        train(engine("stiefel", "zo"), batches, steps=12, folder=tmp_path, resume=tmp_path / "x")


def test_a_checkpoint_of_another_layout_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", 7)
        checkpoints.save(tmp_path / "step-1", {"a": torch.ones(1)})
    with pytest.raises(
        StorageError, match=r"has layout 7 \(zolr .*\), and this version reads layout 1; go on with"
    ):
        checkpoints.load(tmp_path / "step-1")


# ---- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", [("stiefel", "zo"), ("mezo", "zo"), ("stiefel", "fo"), ("galore", "fo")], ids=str
)
def test_a_loss_that_is_never_finite_ends_with_5_and_saves_nothing_bad(
    row: tuple[str, str], tmp_path: Path
) -> None:
    run = engine(*row)
    good = run._loss
    run._loss = lambda model, batch: good(model, batch) * (float("nan") if run.step_count >= 5 else 1.0)
    with pytest.raises(NonFiniteError, match="not finite in 20 steps in a row") as ended:
        train(run, batches, steps=60, folder=tmp_path, save_every=1, keep_last=50)
    assert ended.value.exit_code == 5
    for folder in (tmp_path / "checkpoints").iterdir():
        assert checkpoints.not_finite(checkpoints.load(folder)) is None


def test_a_slope_that_float32_cannot_hold_is_skipped() -> None:
    run = engine("mezo", "zo")
    before, good = bits(run), run._loss
    run._loss = lambda model, batch: good(model, batch).double() * 1e300
    assert run.step(batches(0)).skipped and bits(run) == before


# ---- the command line -------------------------------------------------------------------------------------------------

TINY = (
    "finetune",
    "--paradigm",
    "zo",
    "--steps",
    6,
    "--batch-size",
    4,
    "--lr",
    1e-3,
    "--eps",
    1e-3,
    "--eval-rows",
    8,
)
TINY = (*TINY, "--train-rows", 32, "--eval-every", 3, "--save-every", 2, "--max-length", 24, "--quiet")


def test_auto_begins_or_goes_on_and_replay_gives_the_model(zolr: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = tmp_path / "run"
    code, _, err = zolr(*TINY, "--output", run, "--resume", "auto", "--keep-last", 1)
    assert code == 0, err
    assert sum(p.name.startswith("step-") for p in (run / "checkpoints").iterdir()) == 1
    model = load_file(run / "model.safetensors")
    (run / "result.json").unlink()  # as if it had been cut short
    for how in ("auto", run / "checkpoints" / "step-6"):
        code, _, err = zolr(
            "finetune", "--resume", how, *(("--output", run) if how == "auto" else ()), "--quiet"
        )
        assert code == 0, err
        assert all(
            torch.equal(model[name], part) for name, part in load_file(run / "model.safetensors").items()
        )
    code, out, err = zolr("replay", run, "--output", tmp_path / "again")
    assert code == 0 and "bit for bit on every machine" in out, err
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert model.keys() == again.keys() and all(torch.equal(model[name], again[name]) for name in model)
    code, out, err = zolr("export", run, "--journal", tmp_path / "given")
    assert code == 0 and (tmp_path / "given").stat().st_size < 2000, err
    assert str(tmp_path) not in (tmp_path / "given").read_text()
    code, out, err = zolr("replay", tmp_path / "given", "--base", "demo", "--to", 6, "--json")
    assert code == 0 and '"hashes_compared": 4' in out, err
    code, _, err = zolr("replay", tmp_path / "given")
    assert code == 2 and "does not name the model" in err
    code, _, err = zolr("replay", run, "--to", 7)
    assert code == 2 and "steps 1 to 6, and no step 7" in err
    code, _, err = zolr("finetune", "--resume", run, "--output", tmp_path / "other")
    assert code == 2 and "is not of the run in --output" in err


def test_steps_after_the_last_checkpoint_are_taken_from_the_journal(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a command as people give it, whose journal says much of the run; no step is made by forward passes again."""
    from zolr.cli.job import Job

    monkeypatch.setattr(Job, "predicted", None)
    run = tmp_path / "run"
    code, _, err = zolr(*TINY, "--output", run)
    assert code == 0, err
    before = {name: (run / name).read_bytes() for name in ("model.safetensors", "journal")}
    shutil.rmtree(run / "checkpoints" / "step-6")  # as if it had been killed on the way to it
    (run / "result.json").unlink()
    made: list[int] = []
    again = Engine.again

    def counted(self: Engine, step: Any) -> Any:
        made.append(self.step_count + 1)
        return again(self, step)

    monkeypatch.setattr(Engine, "again", counted)
    monkeypatch.setattr(Engine, "step", raising)
    code, _, err = zolr("finetune", "--resume", "--output", run, "--quiet")
    assert code == 0 and made == [5, 6], err
    assert before == {name: (run / name).read_bytes() for name in before}


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EPIPE])
def test_a_reader_that_has_left_and_a_full_log_do_not_end_a_run(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    from zolr.cli import main
    from zolr.cli.job import Job

    class Deaf(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(reason, os.strerror(reason))

        def fileno(self) -> int:
            return nowhere

    monkeypatch.setattr(Job, "predicted", None)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    line = [str(part) for part in (*TINY[:-1], "--output", tmp_path / "run")]  # not quiet
    assert TINY[-1] == "--quiet"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Deaf())
        patch.setattr(sys, "stderr", Deaf())
        code = main(line)
    os.close(nowhere)
    assert code == (4 if reason == errno.ENOSPC else 0) and (tmp_path / "run" / "result.json").exists()


def test_what_a_step_keeps_aside_is_the_users_to_say(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that takes nothing: asked for, it ends the run; by default it is said; refused, nothing is tried."""
    from zolr.cli.job import Job

    monkeypatch.setattr(Job, "predicted", None)
    monkeypatch.setattr(os, "pwritev", full)
    asked = [None, "--undo", "--no-undo"]
    said: dict[str | None, tuple[int, list[str]]] = {}
    for number, how in enumerate(asked):
        loud = [word for word in TINY if word != "--quiet"]
        code, _, err = zolr(*loud, *([how] if how else []), "--output", tmp_path / str(number))
        said[how] = code, [line for line in err.splitlines() if "No space left" in line or "undo" in line]
    assert said[None][0] == 0 and len(said[None][1]) == 1
    assert said[None][1][0].startswith("note: ") and "No space left" in said[None][1][0]
    assert (
        said["--undo"][0] == 4
        and "make room in the folder that TMPDIR names, or leave undo out" in said["--undo"][1][0]
    )
    assert said["--no-undo"] == (0, [])
    assert "undo = false" in (tmp_path / "2" / "config.toml").read_text()
    monkeypatch.undo()  # it is no part of what a run is: another one may be chosen to go on
    (tmp_path / "2" / "result.json").unlink()
    code, _, err = zolr("finetune", "--resume", "--output", tmp_path / "2", "--undo", "--quiet")
    assert code == 0, err


def test_out_of_memory_says_what_fits(zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def starved(self: Engine, parts: Any) -> Any:
        if self.step_count == 1 and type(self.variables[0].weight.data) is Tensor:  # predictions may
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(self, parts)

    monkeypatch.setattr(Engine, "step", starved)
    code, _, err = zolr(*TINY, "--output", tmp_path / "run")
    assert code == 7 and "out of memory in a step with --batch-size 4 --accumulate 1" in err, err
    assert "--batch-size 2 --accumulate 2" in err or "--batch-size 1 --accumulate 4" in err, err
    assert BudgetError.exit_code == 7


def test_a_signal_before_training_ends_with_its_number(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zolr.cli.job as job

    for number in (signal.SIGINT, signal.SIGTERM):
        with monkeypatch.context() as patch:
            patch.setattr(job, "Workload", lambda *a, number=number, **k: os.kill(os.getpid(), number))
            before = signal.getsignal(number)
            code, _, err = zolr(*TINY, "--output", tmp_path / "run")
        assert code == 128 + number and "interrupted by SIG" in err and signal.getsignal(number) is before
        assert not (tmp_path / "run").exists()


def test_code_that_comes_with_a_model_is_not_run(zolr: Run, tmp_path: Path) -> None:
    import zolr as package

    model = tmp_path / "model"
    shutil.copytree(Path(package.__file__).parent / "demo" / "model", model)
    torch.save({}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    code, _, err = zolr(*TINY, "--model", model, "--task", "questions", "--output", tmp_path / "run")
    assert code == 3 and "no safetensors" in err and "trust_remote_code" in err, err
