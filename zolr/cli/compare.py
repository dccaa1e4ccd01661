"""`zolr compare`: the same task under several methods, each in a process of its own, in one table."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import typer

from zolr.cli import runs
from zolr.cli.config import Settings, add, flag, spelled
from zolr.cli.finetune import Finetune, Schedule
from zolr.cli.variants import variant
from zolr.cli.workload import DEMO_TASK, DataChoice, Machine, ModelChoice
from zolr.errors import UsageError, ZolrError

SHOWN = (
    "before",
    "after",
    "steps",
    "forwards",
    "tokens",
    "seconds",
    "peak_bytes_measured",
    "peak_bytes_predicted",
)


@dataclass(frozen=True)
class Contest(Settings):
    """What competes."""

    methods: tuple[str, ...] = flag(
        (),
        "Methods to compare: stiefel,mezo,adamw; with a paradigm as in stiefel:fo, and settings as in adamw@lr=1e-3@steps=500.",
        "Method",
    )


@dataclass(frozen=True)
class Report(Settings):
    """Where to."""

    output: str | None = flag(None, "Folder of the runs.", "Output", shown="runs/compare-TASK", saved=False)
    json: bool = flag(False, "Print JSON.", "Output", saved=False)
    quiet: bool = flag(False, "Print nothing but the table and errors.", "Output", saved=False)


@dataclass(frozen=True)
class Compare(Report, Machine, Schedule, Contest, DataChoice, ModelChoice):
    """Settings of `zolr compare`."""


def run(settings: Compare) -> None:
    """The same task under several methods, in one table."""
    from zolr.cli.screen import console

    shown = console(settings.quiet)
    words = [word.strip() for part in settings.methods for word in part.split(",")]
    competitors = dict(variant(word) for word in words)
    if not competitors:
        raise UsageError(
            "nothing to compare; give --methods stiefel:zo,stiefel:fo,adamw (zolr methods lists them)"
        )
    shared = {
        f.name: getattr(settings, f.name)
        for f in fields(Compare)
        if f.name in {g.name for g in fields(Finetune)}
    }
    shared |= {"output": None, "json": True, "quiet": True}
    plans = {name: Finetune(**{**shared, **own}) for name, own in competitors.items()}
    task = settings.task or (Path(settings.data).stem if settings.data else DEMO_TASK)
    root = Path(settings.output) if settings.output else runs.free_folder(f"compare-{task}")
    runs.check_free(root, overwrite=False, resume=False)
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # so that the child is told, too
    rows = []
    for name, plan in plans.items():
        shown.print(f"{name} ...", markup=False)
        place = root / name.replace(":", "-").replace("@", "-")
        try:
            raced = _raced(replace(plan.filled(), output=str(place)))
        except ZolrError as error:
            raced = {"error": f"error: {error}", "exit_code": error.exit_code}
        rows.append({"name": name, "method": plan.method, "paradigm": plan.paradigm, **raced})
        if "error" in rows[-1]:
            shown.print(rows[-1]["error"], markup=False)
    if settings.json:
        print(runs.as_json(rows))
    else:
        _print(rows, task)
    failed = [row for row in rows if "error" in row]
    if len(failed) == len(rows):
        error = ZolrError(f"every method failed; the first one with: {failed[0]['error']}")
        error.exit_code = failed[0]["exit_code"]
        raise error


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add(app, "compare", Compare, run)


def _raced(plan: Finetune) -> dict[str, Any]:
    """One run in a process of its own: memory of one method must not count for the next."""
    command = [sys.executable, "-m", "zolr", "finetune", *arguments(plan)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            out, said = child.communicate()
        except BaseException:  # interrupted: the child saves and leaves too
            child.terminate()
            child.wait()
            raise
    if child.returncode:
        lines = said.strip().splitlines()
        return {
            "error": lines[-1] if lines else f"ended with exit code {child.returncode}",
            "exit_code": child.returncode,
        }
    result = json.loads(out)
    return {key: result[key] for key in ("metric", *SHOWN)}


def arguments(settings: Finetune) -> list[str]:
    """The flags that give these settings."""
    words = []
    for field in fields(settings):
        value, name = getattr(settings, field.name), f"--{spelled(field.name)}"
        if value is None or value == field.default:
            continue
        if isinstance(value, bool):
            words.append(name if value else f"--no-{spelled(field.name)}")
        else:
            for each in value if isinstance(value, tuple) else (value,):
                words += [name, str(each)]
    return words


def _print(rows: Sequence[dict[str, Any]], task: str) -> None:
    from rich.console import Console

    from zolr.cli.screen import outcome_cells, outcome_columns, table

    metric = next((row["metric"] for row in rows if "metric" in row), "metric")
    columns = ["method", *outcome_columns(metric)]
    lines = []
    for row in rows:
        name = row["name"]
        if "error" in row:
            lines.append((name, None, row["error"], *[None] * 6))
            continue
        lines.append((name, *outcome_cells(row)))
    Console(highlight=False).print(table(f"{task}, each method in its own process", columns, lines))
