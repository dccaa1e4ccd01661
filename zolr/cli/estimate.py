"""`zolr estimate`: the peak memory of a step by method, and what it is made of, without weights and without a GPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from annotated_types import Ge, Le

from zolr.cli import quieten
from zolr.cli.budget import bytes_of
from zolr.cli.config import Settings, add, flag
from zolr.cli.processes import follow, fresh, without_main
from zolr.cli.variants import methods_in, variant
from zolr.errors import BudgetError, DataError, UsageError, ZolrError, cause_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from transformers import PreTrainedConfig

    from zolr.cli.finetune import Finetune

EVERY = "all"  # stands for every row of the table of methods under each of its paradigms
MOST = 2**31  # of what is counted, as `memory.MOST` has it, which takes seconds to import
MOST_ROWS = 4096  # the largest batch that is looked for

MOST_PROCESSES = 8  # by default; each holds the libraries, 0.5 GB
WORTH_IT = 30.0  # seconds of predictions to come from which on processes, which take seconds to start, are

# where a step may run, and what of its memory hangs on that
PLACES = {
    "cuda": "a step on cuda, where dropout leaves attention fused",
    "cpu": "a step on cpu, where attention with dropout is not fused",
}

# what the columns of the breakdown hold, where their heading does not say it
IN_WORDS = (
    "coords: coordinates that are not the weights themselves, bases and learned spectra; rest: the batch, probes, weights rebuilt "
    "for one use, gradients of activations, scratch"
)


@dataclass(frozen=True)
class Estimate(Settings):
    """Settings of `zolr estimate`."""

    model: str = flag(
        "demo",
        "Preset, model folder, config.json, hub name, or the demo model of the package; weights are not read.",
        "Model",
        aliases=("model_name_or_path",),
        path=True,
    )
    head: Literal["prompt", "classes", "lm"] = flag(
        "prompt",
        "What the loss reads: prompt (one position a row), classes (a classification head), lm (every token).",
        "Model",
    )
    classes: Annotated[int, Ge(2)] = flag(2, "Classes of a classification head.", "Model")
    method: tuple[str, ...] = flag(
        ("stiefel:zo", "stiefel:fo", "adamw"),
        "Methods: stiefel,mezo,adamw, or all; with a paradigm as in stiefel:fo, and settings as in adamw@checkpointing=true@batch-size=8.",
        "Method",
        shown="stiefel:zo,stiefel:fo,adamw",
        aliases=("methods",),
    )
    tables: Literal["full", "subspace", "frozen"] | None = flag(
        None,
        "Embeddings and head: full (trained as a whole), subspace (projected), frozen (not trained).",
        "Method",
        shown="as each method has it",
    )
    batch_size: Annotated[int, Ge(1), Le(MOST)] | None = flag(
        None, "Rows of a forward pass.", "Training", shown="as zolr finetune has it for the paradigm"
    )
    accumulate: Annotated[int, Ge(1), Le(MOST)] | None = flag(
        None, "Batches of a step.", "Training", shown="as zolr finetune has it for the paradigm"
    )
    max_length: Annotated[int, Ge(1), Le(MOST)] = flag(128, "Tokens of a row, padding included.", "Training")
    dtype: Literal["float32", "bfloat16", "float16"] = flag(
        "float32", "Precision of the weights: float32, bfloat16, float16.", "Memory"
    )
    quantize: Literal["int8", "nf4"] | None = flag(
        None,
        "Code the linear maps of the base model, for methods with subspaces: int8, nf4.",
        "Memory",
        shown="plain weights",
    )
    checkpointing: bool | Literal["selective"] = flag(
        False,
        "Recompute activations in the backward pass, for the methods that have one (fo): on, off, or selective (those of half of the layers).",
        "Memory",
        shown="off",
    )
    device: Literal["cuda", "cpu"] = flag(
        "cuda",
        "Where the step is to run, which need not be here: cuda, or cpu, where attention with dropout is not fused.",
        "Memory",
    )
    budget: str | None = flag(
        None, "Find the largest batch of each method under it: 4GiB, 4GB, 4096MiB; 4G is 4GiB.", "Memory"
    )
    processes: Annotated[int, Ge(1)] | None = flag(
        None,
        "Processes that predict methods side by side where that takes long.",
        "Output",
        shown=f"one a core, {MOST_PROCESSES} at most",
        saved=False,
    )
    json: bool = flag(False, "Print JSON.", "Output", saved=False)
    quiet: bool = flag(False, "Print nothing but the tables and errors.", "Output", saved=False)


def run(settings: Estimate) -> None:
    """Peak memory of a step by method, predicted by running the real step on tensors without data."""
    budget = None if settings.budget is None else bytes_of(settings.budget)
    asked = dict(variant(word, "--method") for word in expanded(settings.method))
    if not asked:
        raise UsageError("nothing to estimate; give --method stiefel,adamw, or --method all")
    _check_shared(settings, asked)

    from zolr.cli import runs
    from zolr.cli.screen import console
    from zolr.memory import OVERHEAD

    shown = console(settings.quiet)
    rows, notes = [], list[str]()
    for row, said in _all_rows(
        settings, asked, budget, lambda name: shown.print(f"{name} ...", markup=False)
    ):
        rows.append(row)
        notes += said
    for note in dict.fromkeys(notes):
        shown.print(note, markup=False)
    if settings.json:
        found = {"model": settings.model, "budget_bytes": budget, "overhead": OVERHEAD, "methods": rows}
        print(runs.as_json(found))
    else:
        _print(rows, settings, budget)
    failed = [row for row in rows if "error" in row]
    if len(failed) == len(rows):
        error = UsageError(f"no method can be predicted; the first one: {failed[0]['error']}")
        error.exit_code = failed[0].get("exit_code", error.exit_code)
        raise error


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add(app, "estimate", Estimate, run)


def expanded(words: Sequence[str]) -> list[str]:
    """The methods that are asked for, one a word, with `all` (and `all:fo`, `all@dtype=bfloat16`) spelled out."""
    from zolr.methods import METHODS

    result = []
    for word in methods_in(words):
        head, at, own = word.partition("@")
        name, colon, paradigm = head.partition(":")
        if name != EVERY:
            result.append(word)
            continue
        known = list(dict.fromkeys(p for row in METHODS.values() for p in row.paradigms))
        if colon and paradigm not in known:
            raise UsageError(f"--method: no method runs under '{paradigm}'; use one of {', '.join(known)}")
        result += [
            f"{row.name}:{each}{at}{own}"
            for row in METHODS.values()
            for each in row.paradigms
            if each == (paradigm or each)
        ]
    return result


def config_of(model: str) -> PreTrainedConfig:
    """The transformers config of a preset, a model folder, a hub name, the demo, or of a config file.

    Raises:
        UsageError: the name is unknown.
        DataError: the file or folder cannot be read.
    """
    from zolr.models import load_config

    path = Path(model).expanduser()
    if not path.is_file():
        return load_config(model)
    from transformers import AutoConfig

    from zolr.cli.runs import read_json

    numbers = read_json(path)
    if not isinstance(numbers, dict) or not isinstance(numbers.get("model_type"), str):
        raise DataError(
            f"{path} is no config of a transformers model: it names no 'model_type'; give a config.json, a folder or a preset"
        )
    try:
        return AutoConfig.for_model(**numbers)
    except (
        Exception
    ) as error:  # an unknown family is a ValueError, numbers that contradict each other are many things
        raise DataError(
            f"{path} is no config that transformers can use: {cause_of(error)}; correct it, or give a preset"
        ) from error


def _check_shared(settings: Estimate, asked: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse at once what would be the same error in every row: a model that cannot be read, or cannot do what all ask of it."""
    from zolr.memory import check_predictable
    from zolr.models import check_kind

    config = config_of(settings.model)
    if not any({"model", "max_length"} & own.keys() for own in asked.values()):
        _check_length(config, settings.max_length, settings.model)
    if not any({"model", "head"} & own.keys() for own in asked.values()):
        check_kind(config, "classes" if settings.head == "classes" else "lm")
        check_predictable(config, settings.head)


def _check_length(config: PreTrainedConfig, length: int, model: str) -> None:
    from types import SimpleNamespace

    from zolr.cli.workload import longest_text

    # a config file has no tokenizer, whose limit would be the other one
    longest = longest_text(config, SimpleNamespace(model_max_length=10**9))
    if longest is not None and length > longest:
        raise UsageError(
            f"--max-length {length} is more than model '{model}' can read; use {longest} or less"
        )


def plan_of(settings: Estimate, own: Mapping[str, Any]) -> Finetune:
    """The fine-tuning run whose step is predicted: shared settings, then the method's own, then defaults.

    Raises:
        UsageError: settings that cannot work together.
    """
    from dataclasses import replace

    from zolr.cli.choices import DEFAULTS
    from zolr.cli.finetune import Finetune

    shared = {
        "model": settings.model,
        "head": "classes" if settings.head == "classes" else "prompt",
        "batch_size": settings.batch_size,
        "accumulate": settings.accumulate,
        "max_length": settings.max_length,
        "dtype": settings.dtype,
        "quantize": settings.quantize,
        "tables": settings.tables,
        "device": settings.device,
        "checkpointing": settings.checkpointing if own["paradigm"] == "fo" else False,
    }
    plan = Finetune(**{**shared, **own}).filled()
    return replace(
        plan,
        batch_size=plan.batch_size or DEFAULTS[plan.paradigm or "zo"].batch_size,
        accumulate=plan.accumulate or plan.usual_accumulation,
    )


def _all_rows(
    settings: Estimate,
    asked: Mapping[str, Mapping[str, Any]],
    budget: int | None,
    begins: Callable[[str], None],
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """What is known of each method, in order, and what was said meanwhile.

    Args:
        begins: told the name of each method before its turn.
    """
    from concurrent.futures import BrokenExecutor, ProcessPoolExecutor

    from zolr.cli.doctor import cores

    processes = settings.processes or min(MOST_PROCESSES, cores())
    left = [(settings, name, own, budget) for name, own in asked.items()]
    warm = False  # the first one pays for imports
    while left:
        given, began = left.pop(0), time.perf_counter()
        begins(given[1])
        yield _row(given)
        ahead = (time.perf_counter() - began) * len(left)
        if warm and ahead > WORTH_IT and processes > 1 and left:
            break
        warm = True
    if not left:
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(processes, len(left)), fresh(), initializer=_helping)
    try:
        with without_main():
            tasks = [(given, pool.submit(_row, given)) for given in left]
        for given, task in tasks:
            begins(given[1])
            try:
                found = task.result()
            except BrokenExecutor:  # one was ended from outside, for its memory perhaps
                found = _row(given)
            yield found
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for helper in set(multiprocessing.active_children()) - others:  # an interrupted run waits for none
            helper.terminate()


def _helping() -> None:
    """Have a helper say nothing, and die with the run that it is of, however that ends."""
    quieten()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    follow(lambda: os._exit(1))


def _row(
    given: tuple[Estimate, str, Mapping[str, Any], int | None],
) -> tuple[dict[str, Any], list[str]]:
    from zolr.cli.workload import noted

    settings, name, own, budget = given
    with noted() as notes:
        row = {"name": name, "method": own["method"], "paradigm": own["paradigm"]}
        row |= _estimated(settings, own, budget)
    return row, notes


def _estimated(settings: Estimate, own: Mapping[str, Any], budget: int | None) -> dict[str, Any]:
    """What is known of one method, or why nothing is."""
    try:
        return _predicted(settings, own, budget)
    except ZolrError as error:
        return {"error": str(error), "exit_code": error.exit_code}
    except Exception as error:  # an operation that fake tensors cannot run: the other methods still can
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _predicted(settings: Estimate, own: Mapping[str, Any], budget: int | None) -> dict[str, Any]:
    import torch

    from zolr.memory import Prediction, predict

    plan = plan_of(settings, own)
    if plan.device_map is not None:
        raise UsageError(
            f"--device-map {plan.device_map}: what is in memory between two uses is not predicted; leave it out"
        )
    if plan.shard:
        raise UsageError("--shard: what each rank has of weights in pieces is not predicted; leave it out")
    if plan.memory_budget is not None:
        raise UsageError(
            f"--memory-budget {plan.memory_budget} would choose how a step is taken, and what is predicted is the step as given; "
            "leave it out, and give --budget for the largest batch that fits"
        )
    if plan.device not in PLACES:
        raise UsageError(f"--device '{plan.device}': predicted is a step on cuda or on cpu; use one of them")
    config, length, rows = config_of(plan.model), plan.max_length or 0, plan.batch_size or 0
    _check_length(config, length, plan.model)
    objective = settings.head if "head" not in own else plan.head
    select = plan.selection

    def at(batch_size: int, profile: bool = False) -> Prediction:
        return predict(
            config,
            plan.composed(),
            batch_size=batch_size,
            max_length=length,
            dtype=getattr(torch, plan.dtype),
            objective=objective,
            num_labels=settings.classes,
            accumulation=plan.accumulate or 1,
            checkpointing=plan.checkpointing or False,
            lr=plan.lr,
            select=select,
            weight_decay=plan.weight_decay,
            clip=plan.clip,
            realization=plan.realization,
            adapter=plan.adapter,
            quantize=plan.quantize,
            hold=plan.holds,
            hold_rank=plan.held_rank,
            device=plan.device,
            dropout=None,
            profile=profile,
        )

    predicted = at(rows, profile=True)
    result = {
        "head": objective,
        "train": select,
        "tables": plan.tables,
        "batch_size": rows,
        "accumulate": plan.accumulate,
        "max_length": length,
        "dtype": plan.dtype,
        "device": plan.device,
        "quantize": plan.quantize,
        "checkpointing": plan.checkpointing or False,
        **predicted.as_dict(),
    }
    del result["overhead"]  # the same for all, said once
    if budget is not None:
        result |= _largest(lambda batch: at(batch).peak_bytes, budget, {rows: predicted.peak_bytes})
    return result


def _largest(peak_at: Callable[[int], int], budget: int, known: Mapping[int, int]) -> dict[str, Any]:
    """The largest batch under a budget: 0 where not even one row fits, which takes `one_row_bytes`."""
    from zolr.memory import largest_batch

    known = {1: known[1] if 1 in known else peak_at(1), **known}
    try:
        found = largest_batch(peak_at, budget, MOST_ROWS, known)
    except BudgetError:
        found = 0
    return {"largest_batch": found, "one_row_bytes": known[1]}


def _print(rows: Sequence[Mapping[str, Any]], settings: Estimate, budget: int | None) -> None:
    from rich.console import Console

    from zolr.cli.screen import size
    from zolr.memory import OVERHEAD, PARTS

    console = Console(highlight=False)
    columns = ["method", "batch", "peak", "x forward"]
    if budget is not None:
        columns.append(f"largest batch in {settings.budget}")
    lines = []
    for row in rows:
        if "error" in row:
            lines.append((row["name"], None, "not predicted", *[None] * (len(columns) - 3)))
            continue
        line = [row["name"], f"{row['batch_size']} x {row['max_length']}", size(row["peak_bytes"])]
        lines.append((*line, f"{row['ratio']:.2f}", *([] if budget is None else [_fitting(row, budget)])))
    _put(console, f"{settings.model}: predicted peak memory of a step", columns, lines)
    for row in rows:
        if "error" in row:
            console.print(f"{row['name']} is not predicted: {row['error']}", markup=False, soft_wrap=True)
    found = [row for row in rows if "error" not in row]
    if not found:
        return
    there = [part for part in PARTS if part != "workspaces" or any(row["parts"][part] for row in found)]
    parts = [(row["name"], *(size(row["parts"][part]) for part in there)) for row in found]
    _put(console, "what the peak is made of", ["method", *there], parts)
    places = [(row["name"], row["phase"], row["module"] or None) for row in found]
    _put(console, "where the peak is", ["method", "phase", "module"], places)
    for line in (IN_WORDS, *(f"assumed: {text}" for text in assumed(found))):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"overhead, in none of the figures: {OVERHEAD}", markup=False, soft_wrap=True)


def _put(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; where there is no room for its columns, with a column a method, as many at a time as fit."""
    from rich.measure import Measurement

    from zolr.cli.screen import table

    free = console.options.update(max_width=10**4)
    fits = lambda made: Measurement.get(console, free, made).maximum <= console.width  # noqa: E731
    if fits(made := table(title, columns, rows)) or len(columns) <= 3:
        made.columns[0].no_wrap = True  # a long module may be folded, a method's name is what one looks for
        console.print(made)
        return
    turned, rest = list(zip(*rows, strict=True)), len(rows)
    while rest:
        first = len(rows) - rest
        count = next(
            (n for n in range(rest, 1, -1) if fits(_turned(title, columns, turned, first, first + n))), 1
        )
        console.print(_turned(title, columns, turned, first, first + count))
        rest -= count


def _turned(title: str, columns: Sequence[str], turned: Sequence[Sequence[Any]], a: int, b: int) -> Table:
    """Rows `a` to `b` of a table as columns."""
    from zolr.cli.screen import table

    names, *values = turned
    lines = [(column, *cells[a:b]) for column, cells in zip(columns[1:], values, strict=True)]
    made = table(title, [columns[0], *names[a:b]], lines)
    for column in made.columns[1:]:
        column.justify = "right"
    return made


def _fitting(row: Mapping[str, Any], budget: int) -> str:
    from zolr.cli.screen import sizes

    largest = row["largest_batch"]
    if not largest:
        return f"none: one row takes {sizes(row['one_row_bytes'], budget)[0]}"
    parts = (
        row.get("accumulate") or 1
    )  # of a --batch-size that is given there is one, where nobody says otherwise
    return f"{largest}{' or more' * (largest == MOST_ROWS)}{f' with --accumulate {parts}' * (parts > 1)}"


def assumed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the predictions rest on: what all share once, the rest with the methods it is said of."""
    said: dict[str, list[str]] = {}
    for row in rows:
        recomputed = ", activations recomputed" if row["checkpointing"] else ""
        recomputed += " in half of the layers" if row["checkpointing"] == "selective" else ""
        tables = f", tables {row['tables']}" if row.get("tables") else ""
        own = (
            f"trains {row['train']}{tables}, {row['head']} loss, accumulates {row['accumulate']}{recomputed}"
        )
        for text in (*row["assumptions"], PLACES[row["device"]], own):
            said.setdefault(text, []).append(row["name"])
    return [
        text if len(names) == len(rows) else f"{text} ({', '.join(names)})" for text, names in said.items()
    ]
