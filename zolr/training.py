"""The one training loop: steps, evaluation, best weights, early stopping, checkpoints and signals, for every paradigm and verb."""

import copy
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from multiprocessing import parent_process
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal, Protocol

import torch
from torch import Tensor

import zolr
from zolr import checkpoints, journal
from zolr.checkpoints import Found
from zolr.engine import NON_FINITE_LIMIT, Engine, Info, Made
from zolr.errors import DataError, NonFiniteError, PeerLostError, StorageError, UsageError, ZolrError

Batch = Mapping[str, Tensor]

CHECK_EVERY = 100  # steps between two comparisons of the ranks' weights, which take about as long as a step
# seconds within which a second signal is the same wish: who starts a process passes on what a terminal has sent to both
PASSED_ON = 5.0


METRICS = ("accuracy", "f1", "matthews")


class Interrupted(ZolrError):
    """A signal ended the run; everything is saved. `exit_code` is 128 + the signal's number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@dataclass(frozen=True)
class Progress:
    """How far a run is: all that the loop itself has to remember.

    Args:
        step: steps done, those skipped included.
        forwards: forward passes through the model, evaluation not counted.
        tokens: real tokens (no padding) through those forwards.
        tokens_seen: real tokens of the batches, each counted once.
        seconds: time spent in steps, over all sessions of the run; evaluation and saving not counted.
        skipped: steps left out because the loss was not finite.
        skipped_in_a_row: how many of them just now.
        evaluated: step of the last evaluation, -1 before the first.
        before, last: metrics of the untrained weights, and of the last evaluation.
        best, best_step: metrics of the best evaluation and its step.
        stale: evaluations in a row without a better one.
        saved: step and best step of each checkpoint on disk, oldest first.
    """

    step: int = 0
    forwards: int = 0
    tokens: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluated: int = -1
    before: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = -1
    stale: int = 0
    saved: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a finished run did; the engine holds its best weights.

    Args:
        progress: the counters at the end.
        before, after: metrics of the first weights and of those kept; empty without evaluation.
        kept_step: the step whose weights the engine holds.
        stopped_early: whether patience ended the run.
        loss: loss of the last step that was not skipped.
    """

    progress: Progress
    before: dict[str, float]
    after: dict[str, float]
    kept_step: int
    stopped_early: bool
    loss: float | None


class Reporter(Protocol):
    """Who watches a run."""

    def stepped(self, progress: Progress, info: Info) -> None:
        """One optimizer step is done."""

    def evaluated(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """One evaluation is done."""

    def noted(self, text: str) -> None:
        """Something a person should know."""


class Meter(Protocol):
    """Who measures a step."""

    def around(self, batches: Sequence[Batch]) -> AbstractContextManager[None]:
        """Surrounds one optimizer step on these batches."""
        ...


class Observer(Protocol):
    """Who adds lines to `metrics.jsonl`, and may remember something from one to the next."""

    def __call__(self, progress: Progress) -> Iterable[Mapping[str, Any]]:
        """The lines that are due after a step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know, in tensors, numbers and strings."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""


class Silent:
    """A reporter that says nothing."""

    def stepped(self, progress: Progress, info: Info) -> None:
        """Nothing."""

    def evaluated(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def noted(self, text: str) -> None:
        """Nothing."""


def train(
    engine: Engine,
    batch_of_step: Callable[[int], Sequence[Batch]],
    *,
    steps: int,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    eval_every: int = 0,
    metric: str = "accuracy",
    best: Literal["max", "min"] | None = "max",
    patience: int | None = None,
    folder: Path | None = None,
    save_every: int = 0,
    keep_last: int = checkpoints.KEEP,
    resume: bool | Path = False,
    about: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    meter: Meter | None = None,
    reporter: Reporter | None = None,
    until: Callable[[Progress], bool] | None = None,
    check_every: int = CHECK_EVERY,
    observer: Observer | None = None,
) -> Outcome:
    """Train `engine` up to `steps` steps and leave it at its best weights.

    A step is a function of its number, so a run that was stopped and resumed equals one that was not. In `folder` the loop
    writes `metrics.jsonl` (one line a step, one an evaluation) and `checkpoints/`: `step-N`, the newest few, and the best
    weights `best-N`, on disk because a second copy in memory would cost more than the whole of a forward-only step. A run
    without backprop also writes a `journal`, from which a resumed run makes the steps after its checkpoint again without
    a forward pass. SIGINT, SIGTERM and SIGHUP save a checkpoint and raise `Interrupted`; a second one leaves at once.
    Weights that are not finite are never saved.

    All ranks of the engine's team call this alike. The first one writes, all read: `folder` is one that every rank sees.

    Args:
        engine: the attached model with its method.
        batch_of_step: the micro-batches of step 0, 1, ...; a pure function.
        steps: optimizer steps in all, those of earlier sessions included.
        evaluate: metrics of the model as it is now; called before step 0, every `eval_every` steps and at the end.
        eval_every: steps between evaluations; 0 evaluates at both ends only.
        metric: the key of `evaluate` that decides; among equals the smaller `"loss"` wins.
        best: whether more or less of it is better; None keeps the last weights.
        patience: evaluations in a row without a better one after which the run stops; the first, of the untrained weights, is
            not counted.
        folder: where to write; None keeps everything in memory.
        save_every: steps between checkpoints, and the last step; 0 saves on signals only.
        keep_last: checkpoints that stay, the newest ones; what they call the best weights stays too.
        resume: go on from the newest good checkpoint of `folder` and its journal, or start where there is none; a path
            goes on from that checkpoint.
        about: what else the journal says of the run, numbers and strings; `base`, the fingerprint of the first weights, where
            the model is cut into pieces.
        device: where batches are moved after their tokens have been counted.
        meter: who measures the memory of steps.
        reporter: who watches.
        observer: asked after every step for further lines of `metrics.jsonl` (see `zolr.diagnostics`); its time is not counted.
        until: asked between two steps whether what has been spent is enough; the run then ends as at its last step.
        check_every: steps between comparisons of the weights of all ranks; they are also compared at both ends.

    Raises:
        UsageError: patience where nothing says what is better.
        NonFiniteError: loss or gradient was not finite in 20 steps in a row, or weights to be saved are not.
        PeerLostError: another rank is gone; the weights before the step are saved first, unless an engine with undo=False
            was cut short while it wrote.
        PeersDifferError: a weight is not the same on all ranks.
        Interrupted: by a signal, after saving.
        StorageError: a checkpoint cannot be written, or none that is there can be read.
    """
    if patience is not None and (best is None or evaluate is None):
        raise UsageError(
            f"patience = {patience} goes by evaluations; give evaluate, and best as 'max' or 'min'"
        )
    reporter = reporter or Silent()
    team = engine.team
    run = _Run(engine, folder, metric, best, reporter, keep_last, observer)
    run.open(resume, about or {})
    run.compare("before the first step", all_weights=True)
    loss, stopped = None, False
    started = team.size > 1 or parent_process() is not None
    with _signals(PASSED_ON if started else 0.0) as stop, run.writing(), run.survived():
        while True:
            asked = team.largest(stop.number)  # all ranks have to stop at the same step
            now = run.progress
            ends = now.step >= steps or (until is not None and until(now))
            due = now.evaluated < now.step and (ends or _due(now.step, eval_every))
            if evaluate and due and not asked:
                # an evaluation changes nothing, so it may be cut short; it is repeated on resume
                with stop.at_once(alone=team.size == 1):
                    measured = dict(evaluate())
                if not stop.left:
                    run.evaluated(measured)
                asked = team.largest(stop.number)
            stopped = patience is not None and run.progress.stale >= patience
            if asked:
                raise Interrupted(asked, run.saved_for_later(signal.Signals(asked).name))
            if ends or stopped:
                break
            if now.step and save_every and now.step % save_every == 0:
                run.save()
            if now.step and now.step % check_every == 0:
                run.compare(f"after step {now.step}")
            started = time.perf_counter()
            batches = batch_of_step(now.step)
            tokens = sum(_tokens(batch) for batch in batches)
            if device is not None:
                batches = [
                    {name: part.to(device, non_blocking=True) for name, part in b.items()} for b in batches
                ]
            made = run.recorded.pop(now.step + 1, None)
            if made is not None:
                info = run.made_again(made, len(batches))
            else:
                with meter.around(batches) if meter else nullcontext():
                    info = engine.step(batches)
            run.stepped(info, len(batches), tokens, time.perf_counter() - started)
            for line in observer(run.progress) if observer and run.writes else ():
                run.write(**line)
            loss = loss if info.skipped else info.loss
        if save_every:
            run.save()  # what comes after the last step can fail too
        run.compare("after the last step")
        kept = run.keep_best()
    now = run.progress
    return Outcome(now, now.before, now.best if best else now.last, kept, stopped, loss)


def score(metric: str, predictions: Tensor, labels: Tensor, classes: int) -> float:
    """A classification metric of predicted and true class indices `(rows,)`.

    Args:
        metric: `accuracy`, `f1` (macro average over the classes) or `matthews` (correlation; 0 where predictions or labels
            are all of one class, as scikit-learn and GLUE have it).
    """
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_f1_score,
        multiclass_matthews_corrcoef,
    )

    if metric == "accuracy":
        value = multiclass_accuracy(predictions, labels, num_classes=classes, average="micro")
    elif metric == "f1":
        value = multiclass_f1_score(predictions, labels, num_classes=classes, average="macro")
    elif any(rows.unique().numel() < 2 for rows in (predictions, labels)):
        value = 0.0  # 0 / 0; torchmetrics makes a small number of it
    else:
        value = multiclass_matthews_corrcoef(predictions, labels, num_classes=classes)
    return round(float(value), 6)  # float32 spells 0.7 as 0.699999988


def _due(step: int, every: int) -> bool:
    return step == 0 or (every > 0 and step % every == 0)


def _tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()


class _Run:
    """The changing side of one call of `train`."""

    def __init__(
        self,
        engine: Engine,
        folder: Path | None,
        metric: str,
        best: Literal["max", "min"] | None,
        reporter: Reporter,
        keep_last: int,
        observer: Observer | None,
    ) -> None:
        self.observer = observer
        self.engine, self.metric, self.sign, self.reporter = (
            engine,
            metric,
            {"max": 1, "min": -1, None: 0}[best],
            reporter,
        )
        self.folder, self.keep_last = folder, keep_last
        self.writes = engine.team.first
        self.progress = Progress()
        self.in_memory: Any = None  # best weights where there is no folder
        self.lines: IO[str] | None = None
        self.book: journal.Journal | None = None
        self.recorded: dict[int, Made] = {}  # steps after the checkpoint that the journal knows
        self.hashes: dict[int, str] = {}  # of weights and state, as the journal has them

    @property
    def checkpoints(self) -> Path:
        assert self.folder is not None
        return self.folder / "checkpoints"

    def open(self, resume: bool | Path, about: Mapping[str, Any]) -> None:
        """Begin, or go on where the newest good checkpoint and the journal stand."""
        if self.folder is None:
            return
        with self.engine.team.in_turn():  # what the first rank mends, the others find mended
            self._open(resume, about)
        if resume:
            found = {"newest checkpoint": self.progress.step, "journal": len(self.recorded)}
            self.engine.team.compare({k: torch.tensor(v) for k, v in found.items()}, f"in {self.folder}")

    def _open(self, resume: bool | Path, about: Mapping[str, Any]) -> None:
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot create {self.folder}: {error.strerror}") from error
        header = None
        if (
            self.engine.method.paradigm != "fo"
        ):  # before weights are loaded: it names those that the run began with
            # of a model in pieces its maker has said what it was as a whole
            header = {"zolr": zolr.__version__, **journal.described(self.engine), **about}
            if (why := self.engine.repeatable) is not None:
                header["unrepeatable"] = why
            header = json.loads(json.dumps(header))  # as it will be read: a file has lists and no tuples
        book = self._read_journal(header) if resume and header else None
        if resume:
            self._restore(resume, book)
        if header is None:
            return
        path, done = self.folder / journal.NAME, self.progress.step
        if book is None and done == 0 and self.writes:
            self.book = journal.Journal(path, header)
        elif book is not None and book.steps >= done:
            # other settings, such as more steps: the steps up to here stand, those after it would be others now
            same = resume is True and book.header == header
            stands = book.steps if same else done
            self.hashes = {step: digest for step, digest in book.hashes.items() if step <= stands}
            self.recorded = {n: book.made[n - 1] for n in range(done + 1, book.steps + 1)} if same else {}
            if self.writes:
                self.book = journal.Journal(path, header, (book, stands))
        if self.book is not None and "unrepeatable" not in header:
            self.engine.ahead = self.book.append

    def _read_journal(self, header: Mapping[str, Any]) -> journal.Read | None:
        """The journal of the run to go on with; one that cannot be used is put aside, which is said."""
        assert self.folder is not None
        path = self.folder / journal.NAME
        if not path.exists():
            return None
        try:
            book = journal.read(path)
        except DataError as error:
            why = str(error)
        else:
            other = [key for key in ("seed", "method", "base") if book.header.get(key) != header[key]]
            if not other:
                return book
            why = f"journal {path} is of a run with another {other[0]}"
        aside = path.with_name("journal.damaged")
        if self.writes:
            path.replace(aside)
        self.reporter.noted(f"{why}; it is now {aside}, and the run goes on without it")
        return None

    def _restore(self, resume: bool | Path, book: journal.Read | None) -> None:
        """Load the checkpoint to go on from."""
        assert self.folder is not None
        try:
            if isinstance(resume, Path):
                found = checkpoints.found_at(resume)
            else:
                found = checkpoints.newest(self.checkpoints)
        except StorageError as error:
            if book is None or "unrepeatable" in book.header or not book.steps or resume is not True:
                raise
            self.reporter.noted(
                f"{error}; the journal and the base model give the weights of step {book.steps}"
            )
            found = None
        if found is not None:
            for line in found.damaged:
                self.reporter.noted(f"{line}; going on from step {found.step} instead")
            self._load(found)
        if self.writes:
            _cut(self.folder / "metrics.jsonl", self.progress)

    def compare(self, when: str, all_weights: bool = False) -> None:
        """Refuse to go on where the weights of the ranks differ."""
        if self.engine.team.size > 1:
            self.engine.team.compare(self.engine.digests(all_weights=all_weights), when)

    @contextmanager
    def survived(self) -> Iterator[None]:
        """Save before the run ends because another rank is gone, unless a step was applied in part."""
        try:
            with self.engine.team.exchanging("gathering weights"):
                yield
        except PeerLostError as error:
            if self.folder is None or self.engine.torn:
                raise
            self.save()
            raise PeerLostError(f"{error}; step {self.progress.step} is saved in {self.folder}") from error

    def _load(self, found: Found) -> None:
        try:
            self.engine.load_state_dict(found.state["engine"])
            saved = found.state["progress"]
            self.progress = Progress(**{**saved, "saved": tuple(map(tuple, saved["saved"]))})
            if self.observer is not None and "observer" in found.state:
                self.observer.load_state_dict(found.state["observer"])
            if self.progress.step != found.step:
                raise ValueError(f"it is of step {self.progress.step}")
        except ZolrError:
            raise
        except Exception as error:  # whole, and yet not what a run saves
            raise StorageError(
                f"checkpoint {self.checkpoints / f'step-{found.step}'} is not of this run: {type(error).__name__}: {error}; "
                "remove it, or start again with --overwrite"
            ) from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """`metrics.jsonl` open for appending, and the journal."""
        if self.folder is None or not self.writes:
            yield
            return
        path = self.folder / "metrics.jsonl"
        fresh = not self.progress.step and self.progress.evaluated < 0
        try:
            self.lines = open(path, "w" if fresh else "a", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error
        try:
            yield
        finally:
            self.engine.ahead = None
            if self.book is not None:
                self.book.close()
            lines, self.lines = self.lines, None
            with suppress(OSError):  # every line has been flushed; what a full disk refused has been reported
                lines.close()

    def write(self, **line: Any) -> None:
        """Add a line to the metrics.

        Raises:
            StorageError: the disk is full, or the folder is gone.
        """
        if self.lines is None or self.folder is None:
            return
        try:
            self.lines.write(json.dumps(spelled_out(line), allow_nan=False) + "\n")
            self.lines.flush()
            os.stat(self.lines.name)  # a file that was removed still takes lines, and keeps none
        except OSError as error:
            raise StorageError(
                f"cannot write {self.folder / 'metrics.jsonl'}: {error.strerror}; {self._kept()}, go on with --resume"
            ) from error

    def made_again(self, made: Made, batches: int) -> Info:
        """A step that the journal has, without a forward pass."""
        info = self.engine.again(made)
        return (
            info if made.forwards else replace(info, forwards=self.engine.method.estimator.forwards(batches))
        )

    def stepped(self, info: Info, batches: int, tokens: int, seconds: float) -> None:
        now = self.progress
        self.progress = now = replace(
            now,
            step=now.step + 1,
            forwards=now.forwards + info.forwards,
            tokens=now.tokens + tokens * info.forwards // batches,
            tokens_seen=now.tokens_seen + tokens,
            seconds=now.seconds + seconds,
            skipped=now.skipped + info.skipped,
            skipped_in_a_row=now.skipped_in_a_row + 1 if info.skipped else 0,
        )
        counted = {"forwards": now.forwards, "tokens": now.tokens, "seconds": round(now.seconds, 4)}
        counted["tokens_seen"] = now.tokens_seen
        self.write(
            step=now.step, loss=info.loss, slope=info.slope, lr=info.lr, skipped=info.skipped, **counted
        )
        self.reporter.stepped(now, info)
        if now.skipped_in_a_row >= NON_FINITE_LIMIT:
            raise NonFiniteError(
                f"the loss or the gradient was not finite in {NON_FINITE_LIMIT} steps in a row, up to step {now.step}; "
                f"{self._kept()}; try a smaller --lr, --dtype float32, or --clip"
            )

    def evaluated(self, metrics: dict[str, float]) -> None:
        now = replace(self.progress, evaluated=self.progress.step, last=metrics)
        if now.step == 0:
            now = replace(now, before=metrics)
        elif self.sign and self._better(metrics, now.best):
            now = replace(now, best=metrics, best_step=now.step, stale=0)
            self._hold_best(now.step)
        else:
            now = replace(now, stale=now.stale + 1)
        self.progress = now
        self.write(step=now.step, eval=metrics)
        self.reporter.evaluated(now, metrics)
        self._forget_bests()

    def save(self) -> None:
        """Save a checkpoint of this moment, unless it is already there.

        Raises:
            NonFiniteError: a weight is not finite; nothing is saved.
            StorageError: it cannot be written.
        """
        now = self.progress
        if self.folder is None or (now.saved and now.saved[-1][0] == now.step):
            return
        kept = (*now.saved, (now.step, now.best_step))[-self.keep_last :]
        now = replace(now, saved=kept)
        if self.writes:
            state = self._sound(self.engine.state_dict())
            self._check_there()
            whole = {"engine": state, "progress": asdict(now)}
            if self.observer is not None:
                whole["observer"] = self.observer.state_dict()
            checkpoints.save(self.checkpoints / f"step-{now.step}", whole, self._mark)
            checkpoints.prune(self.checkpoints, self.keep_last)
        self.progress = now
        self._forget_bests()

    def _sound(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state that may be saved."""
        where = checkpoints.not_finite(state)
        if where is not None:
            raise NonFiniteError(
                f"{where} is not finite after step {self.progress.step}, so nothing of it is saved; {self._kept()}; "
                "try a smaller --lr, --dtype float32, or --clip"
            )
        return state

    def _mark(self, digest: str) -> None:
        """Have the journal say what the weights are now, or compare; before a checkpoint says so too."""
        step = self.progress.step
        if self.book is None or "unrepeatable" in self.book.header:
            return
        if step in self.hashes:
            if self.hashes[step] != digest:
                self.reporter.noted(
                    f"the weights of step {step} are not bit for bit those of the interrupted run: it was on another "
                    "machine class or torch version"
                )
        elif not self.recorded:
            self.book.mark(digest)
            self.book.sync()  # on the disk no checkpoint is ahead of the journal
            self.hashes[step] = digest

    def _check_there(self) -> None:
        assert self.folder is not None
        if not self.folder.is_dir():
            raise StorageError(f"output folder {self.folder} has vanished; nothing more can be saved there")

    def saved_for_later(self, name: str) -> str:
        """Save, and the sentence that says so."""
        step = self.progress.step
        if self.folder is None:
            return f"interrupted by {name} after step {step}; nothing is saved, there is no run folder"
        try:
            self.save()
        except NonFiniteError as error:
            return f"interrupted by {name} after step {step}; {error}"
        return f"interrupted by {name} after step {step}; saved, go on with --resume --output {self.folder}"

    def keep_best(self) -> int:
        """Bring the best weights back; the step they are of."""
        now = self.progress
        if now.best_step in (-1, now.step):
            return now.step
        if self.folder is None:
            state = self.in_memory
        else:
            try:
                state = checkpoints.load(self.checkpoints / f"best-{now.best_step}")
            except StorageError as error:
                self.reporter.noted(
                    f"{error}; the weights of step {now.step} are kept instead of the best ones"
                )
                return now.step
        self.engine.load_state_dict(state)
        return now.best_step

    def _better(self, metrics: dict[str, float], best: dict[str, float]) -> bool:
        if not best or not isfinite(best[self.metric]):
            return True
        new, old = self.sign * metrics[self.metric], self.sign * best[self.metric]
        return new > old or (new == old and metrics.get("loss", 0.0) < best.get("loss", 0.0))

    def _hold_best(self, step: int) -> None:
        if self.folder is None:
            self.in_memory = _on_host(self.engine.state_dict())
        elif self.writes:
            self._check_there()
            state = self._sound(self.engine.state_dict())
            checkpoints.save(self.checkpoints / f"best-{step}", state, self._mark)

    def _forget_bests(self) -> None:
        """Remove best weights that neither this moment nor a checkpoint on disk refers to."""
        if self.folder is None or not self.writes:
            return
        needed = {
            f"best-{step}" for step in (self.progress.best_step, *(best for _, best in self.progress.saved))
        }
        for path in self.checkpoints.glob("best-*"):
            if path.name not in needed:
                shutil.rmtree(path, ignore_errors=True)

    def _kept(self) -> str:
        now = self.progress
        if self.folder is None:
            return "nothing is saved, there is no run folder"
        if now.best_step >= 0:
            return f"the best weights (step {now.best_step}) are kept in {self.checkpoints / f'best-{now.best_step}'}"
        if now.saved:
            return f"the newest checkpoint is {self.checkpoints / f'step-{now.saved[-1][0]}'}"
        return "there is no earlier checkpoint"


def _cut(path: Path, progress: Progress) -> None:
    """Drop what `metrics.jsonl` says about steps after the checkpoint: they are about to be done again."""
    kept = []
    for text in _lines(path):
        try:
            line = json.loads(text)
            if line["step"] <= (progress.evaluated if "eval" in line else progress.step):
                kept.append(text + "\n")
        except (ValueError, TypeError, KeyError):  # the last line of a killed run may be cut
            continue
    aside = path.with_name(path.name + ".tmp")
    try:
        checkpoints.write_text(aside, "".join(kept))
        os.replace(aside, path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def spelled_out(value: Any) -> Any:
    """A value that JSON can hold: numbers that are not finite become words, so that they are seen and not averaged away.

    >>> spelled_out({"loss": float("nan"), "steps": [1, 2.5]})
    {'loss': 'nan', 'steps': [1, 2.5]}
    """
    if isinstance(value, Mapping):
        return {key: spelled_out(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [spelled_out(part) for part in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _on_host(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _on_host(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(_on_host, state))
    return copy.copy(state)


class _Leave(BaseException):
    """Leaves an evaluation that a signal has made pointless; a BaseException so that user code does not catch it."""


class _Stop:
    """Whether a signal has asked the run to end.

    Args:
        passed_on: seconds within which a second signal means no more than the first.
    """

    def __init__(self, passed_on: float = 0.0) -> None:
        self.number = 0
        self.left = False  # an evaluation was cut short
        self._passed_on, self._since = passed_on, 0.0
        self._at_once = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            if time.monotonic() - self._since < self._passed_on:
                return
            os._exit(
                128 + number
            )  # asked twice: whatever is being written is written aside, so leaving harms nothing
        self.number, self._since = number, time.monotonic()
        if self._at_once:
            raise _Leave

    @contextmanager
    def at_once(self, alone: bool = True) -> Iterator[None]:
        """Leave the block as soon as a signal comes; not where other ranks would wait for this one."""
        self._at_once = alone
        try:
            yield
        except _Leave:
            self.left = True
        finally:
            self._at_once = False


@contextmanager
def _signals(passed_on: float) -> Iterator[_Stop]:
    """Signals that end a run become a wish that the loop meets between two steps."""
    stop, before = _Stop(passed_on), {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup means it
                before[number] = signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
