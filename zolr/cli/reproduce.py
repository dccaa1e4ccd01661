"""`zolr reproduce`: run a recipe and compare with its recorded result.

A recipe is a config file of `zolr finetune` or `zolr pretrain` (key `verb`), and a table of what it gave:

    [recorded]
    metric = "loss"             # of the held-out text, or of the test rows
    mean = 5.43                 # over the seeds
    spread = 0.02               # a run is expected within mean - spread and mean + spread
    seeds = [0, 1, 2]
    values = [5.42, 5.43, 5.44]
    text = "sha256:..."         # of the training text, where the recipe does not name a public one
    conditions = "..."          # versions and machine
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer
from annotated_types import Ge

from zolr.cli import runs
from zolr.cli.choices import Seed
from zolr.cli.config import RECORDED, VERB, Settings, add, flag, nearest
from zolr.errors import DataError, UsageError, ZolrError

KINDS = {"finetune": "Finetune", "pretrain": "Pretrain"}  # a verb and the class of its settings
SEEDED = {
    "finetune": ("seed", "data_seed"),
    "pretrain": ("seed",),
}  # what a seed names: directions, weights, and splits

OF_PRETRAINING = ("loss", "perplexity")  # what is measured; that of fine-tuning hangs on its task


class Differs(ZolrError):
    """A run whose result lies outside of what its recipe has recorded."""

    exit_code = 8


@dataclass(frozen=True)
class Reproduce(Settings):
    """Settings of `zolr reproduce`."""

    recipe: str | None = flag(None, "Recipe: a .toml file.", "Data", argument=True, path=True)
    data: tuple[str, ...] = flag(
        (),
        "Data in place of what the recipe names (repeat the flag).",
        "Data",
        shown="the recipe's",
        path=True,
    )
    seed: Seed | None = flag(
        None, "Seed of the run.", "Training", shown="the first recorded one, else the recipe's"
    )
    device: str | None = flag(None, "cpu, cuda, cuda:1, ...", "Memory", shown="the recipe's")
    threads: Annotated[int, Ge(1)] | None = flag(None, "CPU threads.", "Memory", shown="the recipe's")
    output: str | None = flag(None, "Run folder.", "Output", shown="runs/reproduce-RECIPE", saved=False)
    overwrite: bool = flag(False, "Replace a run that is there.", "Output", saved=False)
    json: bool = flag(False, "Print JSON.", "Output", saved=False)
    quiet: bool = flag(False, "Print nothing but the result and errors.", "Output", saved=False)


@dataclass(frozen=True)
class Recorded:
    """What a recipe has given.

    Args:
        metric: what was measured after training.
        mean: over the seeds.
        spread: a run is expected to be no farther than this from the mean.
        seeds: of the runs.
        values: of each of them.
        text: `sha256:` and the hash of the training text; empty where any text of the recipe's name is the right one.
        conditions: under which it was recorded, for people.
    """

    metric: str
    mean: float
    spread: float
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    text: str = ""
    conditions: str = ""

    def holds(self, value: float) -> bool:
        """Whether a value lies within the spread."""
        return isfinite(value) and abs(value - self.mean) <= self.spread

    def __str__(self) -> str:
        seeds = ", ".join(map(str, self.seeds))
        return f"{self.metric} {self.mean:.4f} +- {self.spread:.4f} (seeds {seeds})"


@dataclass(frozen=True)
class Recipe:
    """A recipe as it is read: the verb that runs it, what was recorded, and its path."""

    path: Path
    verb: str
    recorded: Recorded | None
    seeded: tuple[str, ...]  # settings that a seed goes into

    def settings(self, **given: Any) -> Any:
        """The settings of its verb, some of them given anew."""
        kind = getattr(import_module(f"zolr.cli.{self.verb}"), KINDS[self.verb])
        return kind.gather(given, self.path)


def recipe_of(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UsageError: it cannot be read, names no verb that can run it, or its record is not one.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is not valid TOML: {error}") from error
    verb = table.get(VERB, "finetune")
    if verb not in KINDS:
        raise UsageError(f"recipe {path}: verb '{verb}' runs no recipes; {nearest(str(verb), KINDS)}")
    recorded = _recorded(path, table[RECORDED]) if RECORDED in table else None
    if recorded is not None and verb == "pretrain" and recorded.metric not in OF_PRETRAINING:
        raise UsageError(
            f"recipe {path}: [recorded] metric '{recorded.metric}' is not measured by zolr pretrain; "
            f"{nearest(recorded.metric, OF_PRETRAINING)}"
        )
    return Recipe(path, verb, recorded, SEEDED[verb])


def _recorded(path: Path, table: Any) -> Recorded:
    from pydantic import TypeAdapter, ValidationError

    try:
        found = TypeAdapter(Recorded).validate_python(table, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise UsageError(f"recipe {path}: [recorded] {where}: {first['msg'].lower()}") from None
    unknown = sorted(set(table) - set(Recorded.__dataclass_fields__))
    if unknown:
        raise UsageError(
            f"recipe {path}: [recorded] has no key '{unknown[0]}'; {nearest(unknown[0], list(Recorded.__dataclass_fields__))}"
        )
    if not found.spread > 0 or not found.seeds or len(found.seeds) != len(found.values):
        raise UsageError(
            f"recipe {path}: [recorded] needs a positive spread, and a value for each of at least one seed"
        )
    return found


def text_hash(paths: Sequence[str]) -> str:
    """`sha256:` and the hash of the contents of text files and of all those in folders, in order of path.

    Raises:
        DataError: a path does not exist.
    """
    from zolr.tasks.texts import files_in

    digest = hashlib.sha256()
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"no file or folder {str(path)!r}; give the text of the recipe with --data")
        for file in [path] if path.is_file() else files_in(path):
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:32]}"


def run(settings: Reproduce) -> None:
    """Run a recipe, and compare with its recorded result. Exit code 0: within its spread (or nothing is recorded); 8: outside."""
    if settings.recipe is None:
        raise UsageError("nothing to reproduce; give a recipe, such as recipes/demo-fo.toml")
    recipe = recipe_of(Path(settings.recipe))
    recorded = recipe.recorded
    folder = Path(settings.output) if settings.output else runs.free_folder(f"reproduce-{recipe.path.stem}")
    runs.check_free(folder, overwrite=settings.overwrite, resume=False, way_out="--overwrite")
    given: dict[str, Any] = {"output": str(folder), "overwrite": settings.overwrite, "quiet": settings.quiet}
    seed = settings.seed if settings.seed is not None else recorded.seeds[0] if recorded else None
    if seed is not None:
        given |= dict.fromkeys(recipe.seeded, seed)
    if len(settings.data) > 1 and recipe.verb == "finetune":
        raise UsageError(f"--data: {recipe.path} fine-tunes, on one file; name it alone")
    if settings.data:
        given["data"] = settings.data if recipe.verb == "pretrain" else settings.data[0]
    given |= {name: value for name in ("device", "threads") if (value := getattr(settings, name)) is not None}
    chosen = recipe.settings(**given)
    if recorded and recorded.text and (found := text_hash(chosen.data)) != recorded.text:
        raise DataError(
            f"{recipe.path} was recorded on another text ({recorded.text}, this is {found}); give that text with --data"
        )
    # the verb prints its own table; stdout is for the verdict alone where a program reads it
    with contextlib.redirect_stdout(sys.stderr) if settings.json else contextlib.nullcontext():
        runner = import_module(f"zolr.cli.{recipe.verb}").run
        runner(chosen, **({"dry_run": False} if recipe.verb == "finetune" else {}))
    result = runs.read_json(folder / runs.RESULT)
    metric = recorded.metric if recorded else result["metric"]
    value = measured(result, metric)
    within = recorded.holds(value) if recorded else None
    if settings.json:
        told = {
            "recipe": str(recipe.path),
            "verb": recipe.verb,
            "seed": result["settings"]["seed"],
            "metric": metric,
        }
        told |= {"value": value, "within": within, "folder": str(folder)}
        told["recorded"] = (
            None if recorded is None else {k: getattr(recorded, k) for k in recorded.__dataclass_fields__}
        )
        print(json.dumps(told, indent=2))
    elif recorded is None:
        print(f"{metric} {value:.4f}; {recipe.path} has no recorded result to compare with")
    elif within:
        print(f"{metric} {value:.4f} is within what was recorded: {recorded}")
    if within is False:
        raise Differs(
            f"{metric} {value:.4f} is outside of what was recorded: {recorded}; {recorded and recorded.conditions}"
        )


def measured(result: Mapping[str, Any], metric: str) -> float:
    """A metric after training, of a `result.json`.

    Raises:
        UsageError: the run has not measured it.
    """
    parts = result["metrics"]
    after = parts["held_out" if "held_out" in parts else "test"]["after"]
    if metric not in after:
        raise UsageError(
            f"[recorded] metric '{metric}' is not measured by this run; {nearest(metric, list(after))}"
        )
    return float(after[metric])


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add(app, "reproduce", Reproduce, run, config=False)
