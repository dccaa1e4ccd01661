"""`zolr compare`: the same task under several methods, each in a process of its own: memory, time and quality side by side."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import typer

from zolr.cli import race, runs
from zolr.cli.choices import Schedule, TablePolicy, Thrift
from zolr.cli.config import Settings, add, differing, flag, nearest, spelled, toml
from zolr.cli.finetune import Finetune
from zolr.cli.processes import fresh, without_main
from zolr.cli.variants import methods_in, variant
from zolr.cli.workload import DEMO_TASK, REFERENCE_WIDTH, DataChoice, Machine, ModelChoice, metric_of, task_of
from zolr.errors import BudgetError, StorageError, UsageError, ZolrError

UNITS = ("forwards", "seconds", "steps")
RESULTS = "compare.json"  # of the folder of the runs

# what a row has of the `result.json` of its run
KEPT = (
    "before", "after", "chosen_by", "rows", "steps", "kept_step", "forwards", "tokens", "seconds", "lr", "trained_share",
    "peak_bytes_measured", "peak_bytes_predicted",
)  # fmt: skip

# settings that make the task, and so are those of all rows
SHARED = {f.name for kind in (ModelChoice, DataChoice) for f in fields(kind)}
SHARED |= {"k", "train_rows", "validation", "test", "data_seed"}

DONE, NO_MEMORY, NOT_RUN, FAILED = "done", "out of memory", "does not fit", "failed"
KILLED = "killed"  # as the system does where memory runs out, and as others may for reasons of their own


@dataclass(frozen=True)
class Contest(Settings):
    """What competes, and for what."""

    methods: tuple[str, ...] = flag(
        (),
        "Methods to compare: stiefel,mezo,adamw; with a paradigm as in stiefel:fo, and settings as in adamw@lr=1e-3@checkpointing=true.",
        "Method",
    )
    equal: str | None = flag(
        None,
        "What every method may spend: forwards=2000 (a backward counts as two), seconds=60, or steps=300.",
        "Training",
        shown="the steps of each method",
    )
    memory_budget: str | None = flag(
        None, "Do not run what is predicted to take more: 4GiB, 4GB, 4096MiB.", "Memory", shown="no limit"
    )
    timing: bool = flag(
        True, "Measure a step against two plain forwards after each run.", "Output", shown="timing"
    )


@dataclass(frozen=True)
class Report(Settings):
    """Where to."""

    output: str | None = flag(None, "Folder of the runs.", "Output", shown="runs/compare-TASK", saved=False)
    plot: str | None = flag(
        None,
        "Picture of memory and quality: a png, pdf or svg file (needs matplotlib).",
        "Output",
        saved=False,
    )
    markdown: str | None = flag(None, "Table for a README: an md file.", "Output", saved=False)
    resume: bool = flag(
        False,
        "Go on with --output: methods that have been run are not run again; more can be named.",
        "Output",
        saved=False,
    )
    json: bool = flag(False, "Print JSON.", "Output", saved=False)
    quiet: bool = flag(False, "Print nothing but the table and errors.", "Output", saved=False)


@dataclass(frozen=True)
class Compare(Report, Contest, Machine, Thrift, Schedule, TablePolicy, DataChoice, ModelChoice):
    """Settings of `zolr compare`."""


@dataclass(frozen=True)
class Terms:
    """What holds for all rows.

    Args:
        task: name of the task.
        model: name of the model.
        metric: what all rows show; a run with an objective of its own may go by another one.
        equal: unit and amount of what every method may spend; None for the steps of each.
        budget: bytes that a predicted peak must not be above.
        timing: whether steps are measured against forwards.
    """

    task: str
    model: str
    metric: str
    equal: tuple[str, float] | None
    budget: int | None
    timing: bool


def run(settings: Compare) -> None:
    """The same task under several methods, each in a process of its own: memory, time and quality in one table."""
    from zolr.cli.screen import console

    shown = console(settings.quiet)
    competitors = dict(variant(word) for word in methods_in(settings.methods))
    if not competitors:
        raise UsageError(
            "nothing to compare; give --methods stiefel:zo,stiefel:fo,adamw (zolr methods lists them)"
        )
    _check_same_workload(competitors)
    terms = _terms(settings, competitors)
    if settings.resume and not settings.output:
        raise UsageError("--resume needs the comparison to go on with; give --output FOLDER")
    root = Path(settings.output) if settings.output else runs.free_folder(f"compare-{terms.task}")
    _check_places(settings, root)
    plans = _plans(settings, competitors, terms)
    files = _sources(settings, terms.task)
    data = _hashes(files)
    found = _before(root, terms, plans, files, data) if settings.resume else {}
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # so that the child is told, too
    names = labels(competitors)
    try:
        _run_all(competitors, names, terms, plans, data, root, found, shown)
    except (KeyboardInterrupt, SystemExit) as end:
        rows = _in_order(plans, found)
        if rows:  # also where all of them failed before they wrote a file: --resume needs the folder
            root.mkdir(parents=True, exist_ok=True)
        if root.is_dir():
            _save(root, terms, plans, data, rows, _others(root, plans))
        if rows:
            missing = ", ".join(names[name] for name in plans if name not in found)
            incomplete = f"incomplete: {len(rows)} of {len(plans)} methods were run, and {missing} not; --resume --output {root} goes on"
            _report(settings, rows, terms, incomplete if missing else "")
        raise _interrupted(end, len(rows), len(plans), root) from None
    rows = _in_order(plans, found)
    _report(settings, rows, terms)
    if not any(row["status"] == DONE for row in rows):
        raise _none_left(rows)


def _run_all(
    competitors: Mapping[str, Mapping[str, Any]],
    names: Mapping[str, str],
    terms: Terms,
    plans: Mapping[str, Finetune | ZolrError],
    data: Mapping[str, str],
    root: Path,
    found: dict[str, dict[str, Any]],
    shown: Any,
) -> None:
    """Run one after the other.

    Args:
        names: of the methods, for people.
        data: hashes of what they read.
        found: rows that are known; every other one is added as soon as it is.
    """
    for name in found:  # with other methods beside it, one may be called otherwise than before
        found[name]["label"] = names[name]
    for number, (name, plan) in enumerate(plans.items(), start=1):
        shown.print(f"{number}/{len(plans)} {names[name]} ...", markup=False)
        row: dict[str, Any] = {"name": name, "label": names[name]}
        row |= {"method": competitors[name]["method"], "paradigm": competitors[name]["paradigm"]}
        row["metric"] = terms.metric
        row["checkpointing"] = (isinstance(plan, Finetune) and plan.checkpointing) or False
        if name in found:
            row = found[name]
        elif isinstance(plan, Finetune):
            place = root / re.sub(r"[^\w.=+-]+", "-", name)
            rmtree(place, ignore_errors=True)  # what did not come to its end in an earlier start
            row |= _raced(replace(plan, output=str(place)), terms)
        else:
            row |= {"status": FAILED, "error": f"error: {plan}", "exit_code": plan.exit_code}
        found[name] = row
        rows = _in_order(plans, found)
        others = _others(root, plans)
        _against_adamw([*rows, *others])
        if root.is_dir():  # after every row: what is done stays if the next one is interrupted
            _save(root, terms, plans, data, rows, others)
        shown.print(f"    {_said(row)}", markup=False)


def _in_order(plans: Mapping[str, Any], found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are known, as the methods were named."""
    return [found[name] for name in plans if name in found]


def _others(root: Path, plans: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier start whose methods are not asked for now."""
    path = root / RESULTS
    known = runs.read_json(path).get("methods", []) if path.is_file() else []
    return [row for row in known if row["name"] not in plans]


def _save(
    root: Path,
    terms: Terms,
    plans: Mapping[str, Finetune | ZolrError],
    data: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
) -> None:
    """What is known so far, from what settings and data.

    Args:
        others: what an earlier start knew of other methods, which stays.
    """
    path = root / RESULTS
    before = runs.read_json(path) if path.is_file() else {}
    settings = {name: toml(plan) for name, plan in plans.items() if isinstance(plan, Finetune)}
    known = {"data": data, "methods": [*rows, *others], "settings": before.get("settings", {}) | settings}
    runs.write_json(path, {**asdict(terms), **known})


def _sources(settings: Compare, task: str) -> dict[str, Path]:
    """The files that the runs read their examples from, by flag; the hub and the package keep theirs as they are."""
    from zolr.tasks import TASKS, folder_of

    given = {f"--{name}": getattr(settings, name) for name in ("data", "validation", "test")}
    files = {name: Path(path) for name, path in given.items() if path is not None}
    known = None if settings.data is not None else TASKS.get(task)
    folder = None if known is None else folder_of(known, settings.data_dir)
    if folder is not None:
        name = "ZOLR_DATA" if settings.data_dir is None else "--data-dir"
        files |= {
            f"{name}: {part}": folder / part for part in ("train.tsv", "dev.tsv", "test.tsv", "meta.json")
        }
    return files


def _hashes(files: Mapping[str, Path]) -> dict[str, str]:
    """`sha256:` and the hash of every file that is there; runs say themselves what they miss."""
    from zolr.cli.reproduce import text_hash

    return {name: text_hash([str(path)]) for name, path in files.items() if path.is_file()}


def _before(
    root: Path,
    terms: Terms,
    plans: Mapping[str, Finetune | ZolrError],
    files: Mapping[str, Path],
    data: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """What has become of methods in an earlier start; those that failed or were killed are run again.

    Args:
        files: that the runs read.
        data: their hashes.

    Raises:
        StorageError: there is no comparison in the folder.
        UsageError: it is another one, or one of other data.
    """
    path = root / RESULTS
    if not path.is_file():
        raise StorageError(f"{root} is no comparison to go on with: it has no {RESULTS}; leave --resume out")
    found = runs.read_json(path)
    now = json.loads(json.dumps(asdict(terms)))
    for key, value in now.items():
        if found.get(key) != value:
            raise UsageError(
                f"'{key}' is {value} here and {found.get(key)} in {path}; go on with the same settings, or choose another --output"
            )
    texts = found.get("settings", {})
    for name, plan in plans.items():
        # what makes the task is that of every other method, too
        for other in [name] if name in texts else list(texts)[:1]:
            for key, old, new in differing(texts[other], toml(plan)) if isinstance(plan, Finetune) else ():
                if other == name or key.replace("-", "_") in SHARED:
                    raise UsageError(
                        f"--{key} of '{name}' is {new} here and was {old} in {path}; go on with the same settings, or choose another "
                        "--output"
                    )
    known = found.get("data", data)  # which earlier versions did not keep
    for name in sorted(known.keys() | data.keys()):
        if known.get(name) != data.get(name):
            was, now = known.get(name, "not there"), data.get(name, "not there")
            raise UsageError(
                f"{files.get(name, name)} ({name}) is {now} here and was {was} in {path}, so its rows would be of other data; go on with "
                "the same data, or choose another --output"
            )
    return {row["name"]: row for row in found["methods"] if row["name"] in plans and not _again(row)}


def _again(row: Mapping[str, Any]) -> bool:
    """Whether a row had bad luck rather than too little memory: it failed, or was killed by whomever."""
    return row["status"] in (FAILED, KILLED) or row.get("exit_code") == -signal.SIGKILL


def _report(settings: Compare, rows: Sequence[dict[str, Any]], terms: Terms, incomplete: str = "") -> None:
    """Table, files and picture of the rows that there are.

    Args:
        incomplete: what is missing, as a sentence; "" for nothing.
    """
    if settings.json:
        print(runs.as_json(rows))
    else:
        _print(rows, terms, incomplete)
    if settings.markdown is not None:
        _write(Path(settings.markdown), markdown(rows, terms, incomplete))
    if settings.plot is not None:
        from zolr.cli.picture import draw

        Path(settings.plot).parent.mkdir(parents=True, exist_ok=True)
        draw(rows, terms.budget, Path(settings.plot), title=f"{terms.task}, {terms.model}")


def _interrupted(end: BaseException, done: int, of: int, root: Path) -> ZolrError:
    """The end of a comparison that was cut short."""
    code = end.code if isinstance(end, SystemExit) and isinstance(end.code, int) else 128 + signal.SIGINT
    error = ZolrError(
        f"interrupted by {signal.Signals(code - 128).name}: {done} of {of} methods were run, and their rows are in "
        f"{root / RESULTS}; go on with --resume --output {root}"
        if done
        else f"interrupted by {signal.Signals(code - 128).name} before a method was done"
        + (f"; what there is lies in {root}" if root.is_dir() else "")
    )
    error.exit_code = code
    return error


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add(app, "compare", Compare, run)


# ---- before anything runs -----------------------------------------------------------------------------------------


def _check_same_workload(competitors: Mapping[str, Mapping[str, Any]]) -> None:
    """A method's own settings must leave the model and the examples alone."""
    for word, own in competitors.items():
        for name in own:
            if name in SHARED:
                raise UsageError(
                    f"--methods: '{spelled(name)}' in '{word}' would make it another task; give --{spelled(name)} for all of them, or leave it out"
                )


def _terms(settings: Compare, competitors: Mapping[str, Mapping[str, Any]]) -> Terms:
    from zolr.cli.budget import bytes_of

    budget = None
    if settings.memory_budget is not None:
        budget = bytes_of(settings.memory_budget, "--memory-budget")
    equal = None if settings.equal is None else _equal(settings.equal)
    if equal is not None:
        rivals = [name for name in ("steps", "epochs", "patience") if getattr(settings, name) is not None]
        rivals = [f"--{name} {getattr(settings, name)}" for name in rivals]
        rivals += [
            f"'{name}={own[name]}' in '{word}'"
            for word, own in competitors.items()
            for name in ("steps", "epochs", "patience")
            if name in own
        ]
        if rivals:
            raise UsageError(
                f"--equal {settings.equal} and {rivals[0]} both say how long a method trains; give one of them"
            )
    task = settings.task or (Path(settings.data).stem if settings.data else DEMO_TASK)
    return Terms(task, Path(settings.model).name, _metric(settings), equal, budget, settings.timing)


def _metric(settings: Compare) -> str:
    """The metric of a run that has no settings of its own."""
    from zolr.tasks import Task

    return metric_of(settings.objective, task_of(settings, settings.model) or Task)


def _equal(text: str) -> tuple[str, float]:
    """Unit and amount of `forwards=2000`.

    >>> _equal("forwards=2_000"), _equal("seconds=1.5")
    (('forwards', 2000.0), ('seconds', 1.5))
    """
    unit, equals, amount = (part.strip() for part in text.partition("="))
    if unit not in UNITS:
        raise UsageError(f"--equal '{text}': there is no '{unit}' to share; {nearest(unit, UNITS)}")
    try:
        number = float(amount)
    except ValueError:
        number = 0.0
    whole = unit == "seconds" or number == int(number if number < 1e15 else 0)
    if not equals or not 0 < number < float("inf") or not whole:
        raise UsageError(
            f"--equal '{text}' gives no amount of {unit}; write --equal {unit}={dict(zip(UNITS, (2000, 60, 300), strict=True))[unit]}"
        )
    return unit, number


def _plans(
    settings: Compare, competitors: Mapping[str, Mapping[str, Any]], terms: Terms
) -> dict[str, Finetune | ZolrError]:
    """A complete run for every method, or why there cannot be one.

    Raises:
        UsageError: an allowance that does not pay for one step of a method, or a package that a method needs.
    """
    from zolr import lora

    known = {
        f.name
        for kind in (Machine, Thrift, Schedule, TablePolicy, DataChoice, ModelChoice)
        for f in fields(kind)
    }
    shared = {name: getattr(settings, name) for name in known}
    shared["memory_budget"] = None  # the budget decides which methods run, and changes none of them
    if terms.equal is not None and terms.equal[0] == "steps":
        shared["steps"] = int(terms.equal[1])
    plans: dict[str, Finetune | ZolrError] = {}
    for name, own in competitors.items():
        try:
            plan = Finetune(**{**shared, **own})
            plans[name] = plan.filled()
        except ZolrError as error:
            plans[name] = error
            continue
        if plan.adapter is not None:
            lora.check_installed(plan.adapter)
        if terms.equal is not None and terms.equal[0] == "forwards":
            _check_pays(name, plans[name], terms.equal[1])
        if (
            plan.eval_every is None
        ):  # the race spreads them over what is spent, so that all curves are as fine
            plans[name] = replace(plans[name], eval_every=None)  # type: ignore[type-var]
    return plans


def _check_pays(name: str, plan: Any, amount: float) -> None:
    """Whether so many forwards pay for a step."""
    method = plan.composed()
    rate = plan.learning_rate(method, REFERENCE_WIDTH)
    price = race.Price.of(method, rate, plan.clip, plan.accumulate or plan.usual_accumulation)
    # few rows may make the step of one batch where it would else have two: this is the least it can take
    if price.choosing:
        price = race.Price.of(method, rate, plan.clip, plan.accumulate or 1)
    price.check_pays(amount, name)


def _check_places(settings: Compare, root: Path) -> None:
    """Refuse, before hours of runs, what could not be written after them; nothing is created or replaced."""
    runs.check_free(
        root, overwrite=False, resume=settings.resume, way_out="--resume if it holds this comparison"
    )
    for name, endings in (("plot", (".png", ".pdf", ".svg")), ("markdown", (".md",))):
        if getattr(settings, name) is not None:
            _check_file(Path(getattr(settings, name)), f"--{name}", endings, settings.resume)
    if settings.plot is not None:
        try:
            import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UsageError(
                "--plot needs the package matplotlib, which is not installed; install it with: pip install 'zolr[plot]'"
            ) from None


def _check_file(path: Path, name: str, endings: Sequence[str], replaces: bool) -> None:
    if path.suffix.lower() not in endings:
        raise UsageError(
            f"{name} {path}: the name has to end in {' or '.join(endings)}, which says what it holds"
        )
    if path.exists() and not (replaces and path.is_file()):
        raise StorageError(f"{name} {path} exists; choose another name, or remove it")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "no permission in" if above.is_dir() else "a file is in the way:"
        raise StorageError(f"{name} {path} cannot be written: {what} {above}; choose another place")


def labels(competitors: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Names for people: the paradigm where a method has several, and what was set, but for the steps, which have a column.

    >>> labels({"adamw:fo@checkpointing=true@steps=4": {"method": "adamw", "paradigm": "fo", "checkpointing": True, "steps": 4}})
    {'adamw:fo@checkpointing=true@steps=4': 'adamw + checkpointing'}
    """
    from zolr.methods import METHODS

    def label(own: Mapping[str, Any], steps: bool) -> str:
        name = own["method"]
        if len(METHODS[name].paradigms) > 1:
            name += f":{own['paradigm']}"
        for key, value in own.items():
            if key == "checkpointing" and value:
                name += " + selective checkpointing" if value == "selective" else " + checkpointing"
            elif key not in ("method", "paradigm", "checkpointing") and (steps or key != "steps"):
                name += f" {spelled(key)}={value}"
        return name

    short = {word: label(own, steps=False) for word, own in competitors.items()}
    taken = list(short.values())
    return {
        word: label(own, steps=True) if taken.count(short[word]) > 1 else short[word]
        for word, own in competitors.items()
    }


# ---- the runs -----------------------------------------------------------------------------------------------------


def _raced(plan: Finetune, terms: Terms) -> dict[str, Any]:
    """One run in a process of its own: memory of one method must not count for the next."""
    equal = terms.equal if terms.equal is not None and terms.equal[0] != "steps" else None
    told = {"settings": plan, "equal": equal, "budget": terms.budget}
    told |= {"timing": terms.timing, "metric": terms.metric}
    with TemporaryDirectory(prefix="zolr-") as place:
        found, said = Path(place) / "found", Path(place) / "said"
        child = fresh(warm=_on_host(plan.device)).Process(target=race.main, args=(told, found, said))
        with without_main():
            child.start()
        try:
            child.join()
        except BaseException:  # interrupted: the child saves and leaves too
            child.terminate()
            child.join()
            raise
        texts = [file.read_text(errors="replace") if file.is_file() else "" for file in (found, said)]
    assert child.exitcode is not None
    row = outcome(child.exitcode, *texts)
    if row["status"] == NOT_RUN and "error" not in row:
        row["budget"] = terms.budget
    return {**row, "folder": plan.output}


def _on_host(device: str) -> bool:
    """Whether a run with this setting computes on the host."""
    import torch

    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def outcome(code: int, out: str, said: str) -> dict[str, Any]:
    """What became of a run.

    Args:
        code: exit code of its process, negative for a signal.
        out: what it reported, one JSON object a line.
        said: what it printed, the reason of a failure last.
    """
    found: dict[str, Any] = {}
    for line in out.splitlines():
        try:
            found |= json.loads(line)
        except ValueError:  # the last line of a process that was killed while it wrote
            continue
    kept = ("batch_size", "accumulate", "untimed", *KEPT)
    row = {key: found[key] for key in kept if key in found}
    row |= {key: value for key, value in found.items() if key.startswith("step_") or key == "pairs"}
    if "after" in found:
        return {"status": DONE, **row}  # whatever happened later concerned the timing alone
    if found.get("fits") is False:
        return {"status": NOT_RUN, **row}
    reason = (said.strip().splitlines() or [f"ended with exit code {code}"])[-1]
    # one code for both: a memory budget of the method's own is refused before a step is predicted
    if (
        code == BudgetError.exit_code
        and "peak_bytes_predicted" not in found
        and "out of memory" not in reason
    ):
        return {"status": NOT_RUN, "error": reason, "exit_code": code, **row}
    if code == -signal.SIGKILL:
        reason = "killed (SIGKILL), as the system does when memory runs out; --resume runs it again"
        return {"status": KILLED, "error": reason, "exit_code": code, **row}
    exhausted = code == BudgetError.exit_code or "OutOfMemoryError" in reason or "MemoryError" in reason
    if code < 0:
        exhausted, reason = False, f"ended by {signal.Signals(-code).name}"
    return {"status": NO_MEMORY if exhausted else FAILED, "error": reason, "exit_code": code, **row}


def _against_adamw(rows: Sequence[dict[str, Any]]) -> None:
    """Add each step over a step of AdamW, both measured in forwards of the same examples.

    Args:
        rows: all of the comparison, those of an earlier start too. Without AdamW among them they keep what they have.
    """
    found, ratio = _reference(rows), "step_over_two_forwards"
    for row in rows:
        if found is not None and ratio in row:
            row["step_over_adamw"] = round(row[ratio] / found[ratio], 4)
            row["adamw"] = found["label"]


def _reference(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row that others are held against: AdamW as it is, else that with the fewest settings of its own, the first of equals.

    One that computes activations again is none, and neither is one that was not timed.
    """
    timed = [row for row in rows if row["method"] == "adamw" and "step_over_two_forwards" in row]
    plain = [row for row in timed if not row["checkpointing"]]
    return min(plain, key=lambda row: row["name"].count("@"), default=None)


def _none_left(rows: Sequence[Mapping[str, Any]]) -> ZolrError:
    first = next((row for row in rows if "error" in row), None)
    if first is None:
        return BudgetError(
            "no method fits the memory budget; use a larger --memory-budget, or a smaller --batch-size or --max-length"
        )
    if all(row["status"] == NOT_RUN for row in rows):
        return BudgetError(f"no method fits its memory budget; the first one: {_reason(first)}")
    error = ZolrError(f"every method failed; the first one with: {_reason(first)}")
    error.exit_code = first["exit_code"] if first["exit_code"] > 0 else BudgetError.exit_code
    return error


# ---- what is shown ------------------------------------------------------------------------------------------------


def _reason(row: Mapping[str, Any]) -> str:
    """Why a row has no result."""
    from zolr.cli.screen import sizes

    if "error" in row:
        return row["error"].removeprefix("error: ")
    return "predicted " + " of ".join(
        sizes(*(row[key] for key in ("peak_bytes_predicted", "budget") if key in row))
    )


def _said(row: Mapping[str, Any]) -> str:
    """One line about a run that has just ended."""
    from zolr.cli.screen import size

    if row["status"] == NOT_RUN:
        return f"does not fit: {_reason(row)}"
    if row["status"] != DONE:
        return row["error"]
    before, after = ("-" if row[when] is None else f"{row[when]:.4f}" for when in ("before", "after"))
    return (
        f"{row['metric']} {before} -> {after}, {row['forwards']:,} forwards, "
        f"{row['seconds']:.1f} s, peak {size(row['peak_bytes_measured'])}"
    )


@dataclass(frozen=True)
class Column:
    """A column: its heading, its cell of a finished row, and from how wide a terminal on it is shown."""

    heading: str
    key: str
    least_width: int = 0


COLUMNS = (
    Column("method", "label"),
    Column("METRIC", "after"),
    Column("steps", "steps", 96),
    Column("batch", "batch", 120),
    Column("forwards", "forwards"),
    Column("tokens", "tokens", 132),
    Column("seconds", "seconds"),
    Column("peak", "peak_bytes_measured"),
    Column("predicted", "peak_bytes_predicted"),
    Column("x 2 fwd", "step_over_two_forwards"),
    Column("x adamw", "step_over_adamw", 88),
)


def _columns(rows: Sequence[Mapping[str, Any]], width: int) -> list[Column]:
    """The columns that something is known for and that there is room for."""
    metric = next((row["metric"] for row in rows if "metric" in row), "metric")
    return [
        replace(column, heading=metric if column.heading == "METRIC" else column.heading)
        for column in COLUMNS
        if width >= column.least_width
        and (not column.key.startswith("step_") or any(column.key in row for row in rows))
    ]


def _cells(row: Mapping[str, Any], columns: Sequence[Column]) -> list[str]:
    """A row of the table: what is known, and the status in the place of the result."""
    from zolr.cli.screen import number, size

    cells = []
    for column in columns:
        value = row.get(column.key)
        if column.key == "after" and row["status"] != DONE:
            cells.append(row["status"])
        elif column.key == "batch":
            sizes = [row[key] for key in ("batch_size", "accumulate") if key in row]
            cells.append(" x ".join(str(each) for each in sizes if each > 1) or "-")
        elif column.key.startswith("peak_"):
            cells.append(size(value))
        elif value is None:
            cells.append("-")
        elif column.key == "seconds":
            cells.append(f"{value:.1f}")
        elif column.key.startswith("step_"):
            cells.append(f"{value:.2f}")
        else:
            cells.append(number(value))
    return cells


def _title(rows: Sequence[Mapping[str, Any]], terms: Terms) -> str:
    before = {round(row["before"], 4) for row in rows if row.get("before") is not None}
    metric = next((row["metric"] for row in rows if "metric" in row), None)
    start = f", {metric} {before.pop():.4f} before training" if len(before) == 1 else ""
    return f"{terms.task}, {terms.model}{start}"


def notes(
    rows: Sequence[Mapping[str, Any]], terms: Terms, columns: Sequence[Column], incomplete: str = ""
) -> list[str]:
    """What is missing, what the columns mean, and what became of the rows that have no result."""
    from zolr.cli.screen import size

    texts = [incomplete] if incomplete else []
    if terms.equal is not None:
        unit, amount = terms.equal
        spent = {
            "forwards": f"{amount:,.0f} forward passes (a backward counts as two, finding a rate counts)",
            "seconds": f"{amount:g} seconds in steps (evaluation not counted, the last step ends a little later)",
            "steps": f"{amount:,.0f} steps",
        }
        texts.append(f"every method stops when it has spent {spent[unit]}")
    if terms.budget is not None:
        texts.append(f"memory budget {size(terms.budget)}: what is predicted to take more is not run")
    if any(row["status"] == DONE for row in rows):
        texts.append(
            "each method in a process of its own; the weights with the best validation score, on the test rows; "
            "peak: most bytes of tensors alive in a step, counted in the run and predicted without it"
        )
    timed = [row for row in rows if "pairs" in row]
    if timed:
        pairs = sorted({row["pairs"] for row in timed})
        count = f"{pairs[0]} to {pairs[-1]}" if len(pairs) > 1 else f"{pairs[0]}"
        texts.append(
            "x 2 fwd: time of a step over that of two plain forwards of the same model on the step's own batches, "
            f"median of {count} pairs taken in turn in the process of the run; drawing new subspaces is not in it"
        )
        plain = next((row["adamw"] for row in rows if "adamw" in row), None)
        if plain is not None and any(column.key == "step_over_adamw" for column in columns):
            texts.append(
                f"x adamw: x 2 fwd of the row over x 2 fwd of {plain}, so per example where batches differ; each was "
                "measured in its own process"
            )
    for row in rows:
        if row["status"] == NOT_RUN:
            texts.append(f"{row['label']} does not fit: {_reason(row)}")
        elif row["status"] != DONE:
            texts.append(f"{row['label']}: {_reason(row)}")
            continue
        if (own := row.get("chosen_by", row["metric"])) != row["metric"]:
            texts.append(f"{row['label']}: its weights are those with the best validation {own}")
        if "untimed" in row:
            texts.append(f"{row['label']} is {row['untimed']}")
    return texts


def _print(rows: Sequence[Mapping[str, Any]], terms: Terms, incomplete: str = "") -> None:
    from rich.console import Console

    from zolr.cli.screen import table

    console = Console(highlight=False)
    columns = _columns(rows, console.width)
    made = table(_title(rows, terms), [c.heading for c in columns], [_cells(row, columns) for row in rows])
    for column in made.columns[1:]:
        column.justify, column.no_wrap = "right", True
    console.print(made)
    for text in notes(rows, terms, columns, incomplete):
        console.print(text, markup=False)


def markdown(rows: Sequence[Mapping[str, Any]], terms: Terms, incomplete: str = "") -> str:
    """The table as GitHub shows it, with what its columns mean below."""
    columns = _columns(rows, 10**6)
    lines = [
        f"**{_title(rows, terms)}**",
        "",
        f"| {' | '.join(c.heading for c in columns)} |",
        f"|---|{'---:|' * (len(columns) - 1)}",
    ]
    for row in rows:
        cells = [cell.replace("|", "\\|") for cell in _cells(row, columns)]
        lines.append(f"| `{cells[0]}` | {' | '.join(cells[1:])} |")
    return "\n".join([*lines, "", *(f"- {text}" for text in notes(rows, terms, columns, incomplete))]) + "\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_text(path, text)
