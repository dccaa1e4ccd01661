"""The run folder: claimed before training, filled while it lasts, completed by renames so that a failure damages nothing."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zolr.errors import DataError, StorageError, UsageError

if TYPE_CHECKING:
    from zolr.distributed import Team


def write_text(path: Path, text: str) -> None:
    """Write a text file and flush it to the disk."""
    from zolr.checkpoints import write_text as write  # brings torch, which the command line's help must not

    write(path, text)


def write_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a model, and its tokenizer if there is one, as plain transformers load them, without its progress bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.to("cpu").eval().save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def write_sharded(folder: Path, shards: Path, model: Any, tokenizer: Any) -> None:
    """Put the shards of a model together as plain transformers load it; the shards are removed.

    Args:
        shards: folder that `sharded.save` has written.
        model: for its config.
    """
    from zolr.sharded import consolidate

    consolidate(shards, folder / "model.safetensors")
    model.config.architectures = [
        type(model).__name__.removeprefix("FSDP")
    ]  # the class that fully_shard makes
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    shutil.rmtree(shards, ignore_errors=True)


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write a tokenizer alone, beside an adapter."""
    tokenizer.save_pretrained(folder)


CONFIG, RESULT, TASK, METRICS, MEMORY, CARD = (
    "config.toml",
    "result.json",
    "task.json",
    "metrics.jsonl",
    "memory.json",
    "README.md",
)
CHECKPOINTS = "checkpoints"
SHARDS = "shards"  # of a model that no rank has as a whole, until they are put together
ADAPTER = "adapter"
JOURNAL = "journal"
OF_AN_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
OF_A_MODEL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    *OF_AN_ADAPTER,
)
# as transformers name those of a large model
PIECE = re.compile(r"model-\d{5}-of-\d{5}\.safetensors", re.ASCII)
DATA = "data.json"  # what a pretraining run is trained and evaluated on: sources, tokenizer and ids with their hashes
TOKENIZER = "tokenizer"  # that it has learned, until it is complete
BEGUN = {CONFIG, JOURNAL, DATA, TOKENIZER, f"{TOKENIZER}.part"}  # all that precedes the metrics of a run


def free_folder(name: str, root: Path = Path("runs")) -> Path:
    """`runs/NAME`, or the first of `runs/NAME-2`, `-3`, ... that does not exist."""
    folder, number = root / name, 2
    while folder.exists():
        folder, number = root / f"{name}-{number}", number + 1
    return folder


def check_free(
    folder: Path, *, overwrite: bool, resume: bool, way_out: str = "--overwrite, or --resume"
) -> None:
    """Refuse a folder that cannot or must not be written; nothing stays there.

    Args:
        folder: where a verb wants to write.
        overwrite, resume: as its flags.
        way_out: flags of the verb for a folder that is not empty; "" for none.

    Raises:
        StorageError: it is not empty, holds something else than the run that is to be replaced, is a file, or lies where
            nothing can be written.
    """
    if resume and not folder.is_dir():
        raise StorageError(f"nothing to resume: run folder {folder} does not exist; check --output")
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"output {folder} is a file; choose another --output")
    try:
        if not (overwrite or resume) and folder.is_dir() and any(folder.iterdir()):
            raise StorageError(
                f"output folder {folder} is not empty; choose another --output{', or ' * bool(way_out)}{way_out}"
            )
        if overwrite and not resume and folder.is_dir() and any(folder.iterdir()) and not is_run(folder):
            raise StorageError(
                f"output folder {folder} holds files and no run of zolr ({CONFIG} and {METRICS}), and --overwrite replaces "
                "a run only; choose another --output, or remove it yourself"
            )
        ancestor = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    except OSError as error:
        raise error if isinstance(error, StorageError) else _refused(folder, error) from error
    if not ancestor.is_dir():
        raise StorageError(
            f"output folder {folder} cannot be created: {ancestor} is a file; choose another --output"
        )
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise StorageError(
            f"output folder {folder} cannot be written: no permission in {ancestor}; choose another --output"
        )
    try:  # permissions do not say all: a file system can be read-only, full, or none to make folders in
        probe = tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=ancestor)
        os.rmdir(probe)
    except OSError as error:
        raise _refused(folder, error) from error


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run of zolr, finished or not: settings as a run writes them, and its metrics.

    One that was killed before its first metrics has nothing beside that a person has put there.
    """
    names = {entry.name for entry in folder.iterdir()}
    if CONFIG not in names or not (METRICS in names or names <= BEGUN):
        return False
    try:
        settings = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError:  # of another program, or no text
        return False
    return {"method", "paradigm", "steps"} <= settings.keys()


def without_journal(folder: Path) -> str:
    """Why a folder has no journal."""
    put_aside = folder / f"{JOURNAL}.damaged"
    if put_aside.is_file():
        return f"{folder} has no {JOURNAL}: it was damaged, and is {put_aside}; use the model or a checkpoint itself"
    return f"{folder} has no {JOURNAL}: it is no run without backprop; give one of zo or fwd"


def done(folder: Path, steps: int | None) -> str | None:
    """Why there is nothing to resume in a folder, None where there is; a run whose checkpoints stay can be given more steps.

    Args:
        steps: of the run as it is asked for now; None where that is not known yet.

    Raises:
        UsageError: a run that has not ended is beyond these steps.
    """
    if not (folder / RESULT).is_file():
        at = max(
            (int(p.name[5:]) for p in (folder / CHECKPOINTS).glob("step-*") if p.name[5:].isdigit()),
            default=0,
        )
        if steps is not None and at > steps:
            raise UsageError(
                f"--steps {steps}: the run in {folder} has done {at} and is not finished; give {at} or more, or leave --steps out"
            )
        return None
    result = read_json(folder / RESULT)
    text = f"the run in {folder} is finished; nothing to resume"
    if result.get("stopped_early"):
        return f"{text}: it ended by --patience after step {result['steps']}"
    if steps is not None and steps <= result["steps"]:
        return f"{text}: it has done {result['steps']} steps, and --steps {steps} asks for no more"
    if not (folder / CHECKPOINTS).is_dir():
        return f"{text}: its checkpoints are gone (--save-every keeps them)"
    return None


def new_course(folder: Path, steps: int | None, schedule: str) -> str | None:
    """A note where a run goes on with another number of steps, and with it on another course of the rate."""
    before = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8")).get("steps")
    if schedule == "constant" or steps is None or before in (None, steps):
        return None
    text = f"note: --steps {steps} where the run began with {before}: from here on the rate follows the {schedule} course of {steps} steps"
    if schedule == "wsd":  # up to its fall it is the same for any number of steps
        return text
    return f"{text}, so the run is not the one that {steps} steps from the beginning would have been"


class RunFolder:
    """One run's folder, held by one process.

    A run that replaces another one works in `FOLDER.tmp-xxxxxx` beside it until it is complete.

    Attributes:
        path: where the results end up.
        work: where the run writes while it lasts.
    """

    def __init__(self, path: Path, work: Path, created: bool) -> None:
        self.path, self.work, self._created = path, work, created

    def complete(self, fill: Callable[[Path], None]) -> None:
        """Add the results: `fill` writes them into an empty folder aside, then they are renamed into place.

        `result.json` comes last: where it stands, the rest is whole.
        """
        from zolr.checkpoints import clear

        aside = self.work / "results.tmp"
        try:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed here
            aside.mkdir()
            fill(aside)
            if self.work != self.path:
                for entry in list(self.work.iterdir()):
                    if entry != aside and not (aside / entry.name).exists():
                        entry.rename(aside / entry.name)
                clear(self.path / CHECKPOINTS)
                _remove(self.path / JOURNAL)  # that of this run, if it has one, comes below
            # of a run that was here before
            for name in (*OF_AN_ADAPTER, CARD):
                _remove(self.path / ADAPTER / name)
            for old in self.path.iterdir():
                if (old.name in OF_A_MODEL or PIECE.fullmatch(old.name)) and not (aside / old.name).exists():
                    _remove(old)
            for entry in sorted(aside.iterdir(), key=lambda p: (p.name == RESULT, p.name)):
                _move(entry, self.path / entry.name)
            with suppress(OSError):  # it is not there, or has something in it
                (self.path / ADAPTER).rmdir()
            if self.work != self.path:
                shutil.rmtree(self.work, ignore_errors=True)
        except StorageError:
            raise
        except OSError as error:
            raise _refused(self.path, error) from error
        except Exception as error:  # safetensors reports a full disk in an error class of its own
            if "I/O error" in str(error) or "os error" in str(error):
                raise StorageError(f"cannot write the results into {self.path}: {error}") from error
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def discard(self) -> None:
        """Remove what this run created, if it has nothing worth keeping yet."""
        if self._created and not (self.work / CHECKPOINTS).exists():
            shutil.rmtree(self.work, ignore_errors=True)


@contextmanager
def claimed_by_first(folder: Path, team: Team, *, overwrite: bool, resume: bool) -> Iterator[RunFolder]:
    """The run folder, claimed by the first rank for all of them; the others only read in it.

    Raises:
        StorageError: as `claimed`.
    """
    if team.first:
        with claimed(folder, overwrite=overwrite, resume=resume) as place:
            team.told(str(place.work))
            yield place
    else:
        yield RunFolder(folder, Path(team.told("")), created=False)


@contextmanager
def claimed(folder: Path, *, overwrite: bool, resume: bool) -> Iterator[RunFolder]:
    """The run folder, created and locked against a second process.

    Raises:
        StorageError: as `check_free`, or another process works in it.
    """
    check_free(folder, overwrite=overwrite, resume=resume)
    occupied = folder.is_dir() and any(folder.iterdir())
    work = _aside(folder) if occupied and not resume else folder
    created = not work.exists()
    locks: list[int] = []
    try:
        try:
            work.mkdir(parents=True, exist_ok=True)
            probe = work / ".probe"
            write_text(probe, "")
            probe.unlink()
            locks = [os.open(path, os.O_RDONLY) for path in {folder, work}]
        except OSError as error:
            raise _refused(folder, error) from error
        for lock in locks:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StorageError(
                    f"another process is working in {folder}; wait for it or choose another --output"
                ) from error
        yield RunFolder(folder, work, created)
    finally:
        for lock in locks:
            os.close(lock)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file for people: indented, flushed to the disk."""
    write_text(path, as_json(value) + "\n")


def as_json(value: Any) -> str:
    """JSON for people and for strict readers: a loss that is not finite is the word `"nan"`."""
    from zolr.training import spelled_out

    return json.dumps(spelled_out(value), indent=2, ensure_ascii=False, allow_nan=False)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run.

    Raises:
        DataError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _aside(folder: Path) -> Path:
    folder = folder.resolve()  # `.` and `..` are no names, and a link may be on another disk
    return folder.with_name(f"{folder.name}.tmp-{os.urandom(3).hex()}")


def _remove(file: Path) -> None:
    """Remove a file; a folder of its name is not ours."""
    if not file.is_dir():
        file.unlink(missing_ok=True)


def _move(entry: Path, target: Path) -> None:
    """Rename, file by file where there is a folder already: what else is in it stays."""
    if not (entry.is_dir() and target.is_dir()):
        os.replace(entry, target)
        return
    for part in list(entry.iterdir()):
        _move(part, target / part.name)


def _refused(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write into output folder {folder}: {error.strerror or error}; choose another --output"
    )
