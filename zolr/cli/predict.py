"""`zolr predict`: labels and probabilities for lines of text, from a finished run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from annotated_types import Ge

from zolr.cli import runs
from zolr.cli.config import add, flag
from zolr.cli.workload import Machine, Trust
from zolr.errors import DataError, UsageError


@dataclass(frozen=True)
class Sources(Trust):
    """What is read."""

    run: str | None = flag(None, "Run folder of `zolr finetune`.", "Model", argument=True, path=True)
    file: str = flag(
        "-",
        "Texts: txt with one a line, csv, tsv, json, jsonl, parquet; - for standard input.",
        "Data",
        argument=True,
    )
    text_column: tuple[str, ...] = flag(
        (), "Column with the text; twice for pairs.", "Data", shown="as in the run"
    )


@dataclass(frozen=True)
class Predict(Machine, Sources):
    """Settings of `zolr predict`."""

    batch_size: Annotated[int, Ge(1)] = flag(32, "Examples of a forward pass.", "Memory")
    json: bool = flag(
        False, "One JSON object a line, with the probability of every class.", "Output", saved=False
    )


def run(settings: Predict) -> None:
    """Label lines of text with a finished run."""
    from zolr.cli.workload import Workload, device_of, set_threads, task_from
    from zolr.tasks import Example, read_texts

    if settings.run is None:
        raise UsageError("zolr predict needs a run folder: zolr predict RUN [FILE]")
    folder = Path(settings.run)
    if not (folder / runs.TASK).is_file():
        raise DataError(
            f"{folder} is no finished run (it has no {runs.TASK}); give the folder that zolr finetune or zolr replay has "
            f"written, or copy {runs.TASK} of the run into it"
        )
    saved = runs.read_json(folder / runs.TASK)
    task = task_from(saved["task"], folder / runs.TASK)
    columns = settings.text_column or task.columns
    if len(columns) != len(task.columns):
        raise UsageError(
            f"--text-column: the run reads {len(task.columns)} texts ({', '.join(task.columns)}); name as many"
        )
    texts = read_texts(settings.file, columns)
    set_threads(settings.threads)
    work = Workload(
        str(folder),
        task,
        saved["head"],
        dtype=settings.dtype,
        device=device_of(settings.device),
        quantize=saved.get("quantize"),
        trust_remote_code=settings.trust_remote_code,
    )
    shares = work.predictions(work.encode([Example(text) for text in texts]), settings.batch_size).softmax(-1)
    best, winners = shares.max(-1)
    for text, share, winner, row in zip(texts, best.tolist(), winners.tolist(), shares.tolist(), strict=True):
        label = task.classes[winner]
        if settings.json:
            all_classes = {name: round(p, 6) for name, p in zip(task.classes, row, strict=True)}
            line = {
                "text": text[0] if len(text) == 1 else list(text),
                "label": label,
                "probability": round(share, 6),
            }
            print(json.dumps({**line, "probabilities": all_classes}, ensure_ascii=False))
        else:
            print(f"{label}\t{share:.4f}")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add(app, "predict", Predict, run, config=False)
