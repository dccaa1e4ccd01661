"""`zolr export`: a run's journal as a file to give away, from which `zolr replay` makes the weights again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import typer

from zolr.cli import runs
from zolr.cli.config import Settings, add, flag
from zolr.errors import DataError, StorageError, UsageError

LEFT_OUT = ("model", "course")  # where a model lies is the sender's business


@dataclass(frozen=True)
class Export(Settings):
    """Settings of `zolr export`."""

    source: str | None = flag(None, "Run folder.", "Model", argument=True)
    journal: str | None = flag(None, "File to write.", "Output")


def run(settings: Export) -> None:
    """Write a run's journal as a file that, with the base model, is its weights."""
    from zolr.cli.replay import kept_step
    from zolr.cli.screen import size
    from zolr.journal import NAME, read, shared
    from zolr.methods import METHODS

    if settings.source is None or settings.journal is None:
        raise UsageError("nothing to export; give a run folder and --journal FILE")
    source, target = Path(settings.source), Path(settings.journal)
    if not (source / NAME).is_file():
        raise DataError(runs.without_journal(source))
    found = read(source / NAME)
    if (why := found.header.get("unrepeatable")) is not None:
        raise UsageError(f"this journal cannot be replayed: {why}; give the model itself away")
    row = METHODS.get(str(found.header.get("settings", {}).get("method")))
    if row is not None and any(method.private for method in row.methods.values()):
        raise UsageError(
            "the weights of a private run are private while its seed is secret, and a journal names the seed; "
            "give the model itself away"
        )
    if target.exists():
        raise StorageError(f"{target} exists; choose another --journal, or remove it")
    header = {name: value for name, value in found.header.items() if name not in LEFT_OUT}
    data = shared(found, {**header, "model": None, "kept": kept_step(source, found)})
    try:
        aside = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        runs.write_text(aside, data.decode())
        os.replace(aside, target)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}") from error
    print(
        f"{target}: {found.steps} steps, {size(len(data))}; zolr replay {target} --base MODEL makes the weights"
    )


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add(app, "export", Export, run, config=False)
