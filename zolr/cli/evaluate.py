"""`zolr evaluate`: how well a run, or a model as it is, does on a task or on an own file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer
from annotated_types import Ge

from zolr.cli import runs
from zolr.cli.config import add, flag, resolve
from zolr.cli.workload import EVAL_ROWS, DataChoice, Machine, Trust, Workload
from zolr.errors import DataError, UsageError

if TYPE_CHECKING:
    from zolr.tasks import Example, Task


@dataclass(frozen=True)
class Subject(Trust):
    """What is measured."""

    model: str = flag(
        "demo",
        "Run folder, or a model: folder, hub name or the demo model.",
        "Model",
        argument=True,
        path=True,
    )


@dataclass(frozen=True)
class Evaluate(Machine, DataChoice, Subject):
    """Settings of `zolr evaluate`."""

    head: Literal["prompt", "classes"] | None = flag(  # pyright: ignore[reportIncompatibleVariableOverride]
        None, "What the run was trained with: prompt, classes.", "Model", shown="that of the run, else prompt"
    )
    eval_rows: Annotated[int, Ge(1)] | None = flag(  # pyright: ignore[reportIncompatibleVariableOverride]
        None, "Rows at most.", "Data", shown=f"those of the run on its own data, else {EVAL_ROWS}"
    )
    batch_size: Annotated[int, Ge(1)] = flag(32, "Examples of a forward pass.", "Memory")
    quantize: Literal["int8", "nf4"] | None = flag(
        None,
        "Code the linear maps of the model: int8, nf4.",
        "Memory",
        shown="as the run was trained, or not",
    )
    json: bool = flag(False, "Print JSON.", "Output", saved=False)


class Question(NamedTuple):
    """What is asked of a model.

    Args:
        name: of the examples.
        task, head: how the model reads them.
        metric: the one that counts.
        examples: all of them.
    """

    name: str
    task: Task
    head: str
    metric: str
    examples: list[Example]


def run(settings: Evaluate) -> None:
    """Measure a run or a model on a task or on your own file."""
    from zolr.cli.workload import device_of, set_threads

    settings.check_source()
    set_threads(settings.threads)
    device = device_of(settings.device)
    folder = Path(settings.model)
    finished = (folder / runs.TASK).is_file()
    if not finished and settings.task is None and settings.data is None:
        _check_run(settings.model)
    asked = _of_run(settings, folder) if finished else _of_model(settings)
    quantize = settings.quantize
    if finished and quantize is None:  # an adapter fits the codes that it was trained beside
        quantize = runs.read_json(folder / runs.TASK).get("quantize")
    work = Workload(
        settings.model,
        asked.task,
        asked.head,
        max_length=settings.max_length,
        dtype=settings.dtype,
        device=device,
        quantize=quantize,
        trust_remote_code=settings.trust_remote_code,
    )
    metrics = work.evaluate(work.encode(asked.examples), settings.batch_size)
    if settings.json:
        found = {
            "model": settings.model,
            "task": asked.name,
            "rows": len(asked.examples),
            "metric": asked.metric,
            **metrics,
        }
        print(runs.as_json(found))
        return
    from rich.console import Console

    from zolr.cli.screen import console, table

    for note in work.notes:
        console().print(note, markup=False)
    title = f"{settings.model} on {asked.name}, {len(asked.examples)} rows"
    Console(highlight=False).print(table(title, list(metrics), [list(metrics.values())]))


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add(app, "evaluate", Evaluate, run)


def _of_run(settings: Evaluate, folder: Path) -> Question:
    """What is asked of a finished run: its own test set unless other data are given."""
    from zolr.cli.finetune import Finetune
    from zolr.cli.workload import splits_of, task_from, words_of
    from zolr.tasks import find_task, load_file
    from zolr.tasks.fewshot import cut

    saved = runs.read_json(folder / runs.TASK)
    head = saved["head"]
    if settings.head not in (None, head):
        raise UsageError(
            f"--head {settings.head}: {folder} was trained with --head {head} and has no other; leave --head out"
        )
    settings.check_prompt(head, f"{folder} was trained with --head {head}, which has none")
    if settings.task is not None and settings.data is not None:
        raise UsageError(
            f"--task {settings.task}: a run reads a file of yours by the task that it was trained on; leave out --task, or --data"
        )
    task = task_from(saved["task"], folder / runs.TASK)
    words = words_of(settings.label_words, task.classes) if settings.label_words else None
    task = task.changed(template=settings.template, words=words)
    metric = saved.get("metric", task.metric)
    config = folder / runs.CONFIG  # a model made from a journal alone has none
    if settings.data is None and settings.task is None and not config.is_file():
        raise DataError(f"{folder} does not say what the run was tested on; give --task or --data")
    trained = resolve(Finetune, {}, config) if config.is_file() else Finetune()
    if settings.data is not None:  # every row of it, with the run's classes
        columns = settings.text_column or trained.text_column or task.columns
        if len(columns) != len(task.columns):
            raise UsageError(
                f"--text-column: the run reads {len(task.columns)} texts ({', '.join(task.columns)}); name as many"
            )
        label = settings.label_column or trained.label_column or "label"
        examples, _ = load_file(settings.data, columns, label, task.classes)
        examples = cut(examples, settings.eval_rows or EVAL_ROWS)
        return Question(Path(settings.data).name, task, head, metric, examples)
    if settings.task is not None:
        rows = settings.eval_rows or EVAL_ROWS
        choice = replace(settings, eval_rows=rows)
        other = find_task(settings.task)
        if other.classes != task.classes:
            raise UsageError(
                f"task '{other.name}' has classes {', '.join(other.classes)}, but the run learned {', '.join(task.classes)}; "
                "evaluate it on a task with the same classes"
            )
        splits = splits_of(choice, other, seed=trained.data_seed, k=None, train_rows=None, more={})
        return Question(splits.name, task, head, metric, splits.test)
    rows = settings.eval_rows or trained.eval_rows
    choice = replace(trained, eval_rows=rows, data_dir=settings.data_dir or trained.data_dir)
    known = None if trained.task is None else find_task(trained.task)
    files = {"validation_data": trained.validation, "test_data": trained.test}
    splits = splits_of(
        choice, known, seed=trained.data_seed, k=trained.k, train_rows=trained.train_rows, more=files
    )
    return Question(splits.name, task, head, metric, splits.test)


def _check_run(name: str) -> None:
    """Refuse what names no examples to evaluate on: the folder of a run without any, or a folder that is not there."""
    folder = Path(name)
    if not folder.exists() and name != "demo":
        from zolr.models import PRESETS, located

        located(name)  # says so of what can be nothing but a path
        if name not in PRESETS:
            raise DataError(
                f"there is no folder '{name}'; give a run folder, or --task or --data too where this is a model of the hub"
            )
    if (folder / runs.RESULT).is_file() and runs.read_json(folder / runs.RESULT).get("verb") == "pretrain":
        raise UsageError(
            f"{folder} is a run of zolr pretrain, whose held-out loss is in {folder / runs.RESULT}; give --task or --data "
            "to measure it on a task"
        )
    if (folder / runs.CONFIG).is_file():
        raise DataError(
            f"{folder} is no finished run: it has no {runs.TASK}; go on with zolr finetune --resume --output {folder}, or "
            "give --task or --data and a model"
        )


def _of_model(settings: Evaluate) -> Question:
    """What is asked of a model as it is, without training."""
    from zolr.cli.workload import splits_of, task_of, words_of
    from zolr.tasks import load_file, own_task
    from zolr.tasks.fewshot import cut

    if settings.head == "classes":
        raise UsageError(
            "--head classes would measure a head that was never trained; give a run folder, or use --head prompt"
        )
    task = task_of(settings, settings.model, "to evaluate on")
    if settings.data is not None:
        columns = settings.text_column or (task.columns if task else ("text",))
        examples, classes = load_file(
            settings.data, columns, settings.label_column or "label", task.classes if task else None
        )
        task = task or own_task(Path(settings.data).stem, columns, classes)
        name, examples = Path(settings.data).name, cut(examples, settings.eval_rows or EVAL_ROWS)
    else:
        assert task is not None
        choice = replace(settings, eval_rows=settings.eval_rows or EVAL_ROWS)
        # whose test set is the same for every seed
        splits = splits_of(choice, task, seed=0, k=None, train_rows=None, more={})
        name, examples = splits.name, splits.test
    words = words_of(settings.label_words, task.classes) if settings.label_words else None
    task = task.changed(template=settings.template, words=words)
    return Question(name, task, "prompt", task.metric, examples)
