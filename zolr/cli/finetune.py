"""`zolr finetune`: fine-tune a model on a task or on own files, and leave a run folder that plain transformers loads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import typer

from zolr.cli import noting, runs
from zolr.cli.budget import bytes_of
from zolr.cli.choices import (
    DEFAULTS,
    PARTS,
    RANK,
    Composition,
    Holding,
    Inspection,
    Realization,
    Schedule,
    Thrift,
    Writing,
)
from zolr.cli.config import add, as_dict, resolve, toml
from zolr.cli.workload import DataChoice, Machine, ModelChoice, Ranks, teamed
from zolr.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from zolr.cli.job import Job
    from zolr.distributed import Team
    from zolr.methods import Adapter, Method


# Learning rate where neither the user nor the method's row has one for this optimizer (zo: the engine measures one)
LEARNING_RATES = {
    "sgd": 1e-2,
    "momentum": 1e-2,
    "averaged": 1e-2,
    "optimistic": 1e-2,
    "adamw": 2.5e-4,
    "adafactor": 2.5e-4,
    "muon": 2.5e-4,
    "adalomo": 1e-3,
    "flora": 1e-3,
    "mofasgd": 5e-4,
}
OTHER_OPTIMIZER = 2.5e-4


@dataclass(frozen=True)
class Finetune(
    Writing, Inspection, Holding, Ranks, Machine, Thrift, Schedule, Composition, DataChoice, ModelChoice
):
    """Settings of `zolr finetune`."""

    @classmethod
    def gather(cls, given: dict[str, Any], config: Path | None) -> Self:
        """On resume the run's own config file stands in for the flags that are not repeated."""
        settings = cls.going_on(given, config).filled()
        if settings.resume:
            settings.check_same(resolve(cls, {}, Path(settings.output or "") / runs.CONFIG))
        return settings

    @property
    def chosen_later(self) -> list[str]:
        """What hangs on the rows of the data, and what the method says of its parts."""
        numbers = DEFAULTS[self.paradigm or "zo"]
        sizes = {"batch-size": numbers.batch_size, "accumulate": self.usual_accumulation}
        usual = [
            f"{name} = {most}"
            for name, most in sizes.items()
            if getattr(self, name.replace("-", "_")) is None
        ]
        by_rows = (
            f"{', '.join(usual)}, or less where the data have fewer rows, or the budget asks" if usual else ""
        )
        parts = f"projector, rank, optimizer, transport, ...: as `zolr methods {self.method}` has them, unless they are given"
        return [line for line in (by_rows, parts) if line]

    def filled(self) -> Self:
        """The settings with every number that depends on the method, and checked as far as names go."""
        self.check_source()
        self.check_prompt(self.head, "--head classes reads texts without one")
        method = self.composed()
        self.check_used(method, self.clip)
        numbers = DEFAULTS[method.paradigm]
        if self.epochs is not None and self.steps is not None:
            raise UsageError(
                f"--epochs {self.epochs} and --steps {self.steps} both say how long; give one of them"
            )
        if self.objective != "loss" and method.paradigm != "zo":
            raise UsageError(
                f"--objective {self.objective} has no derivative, so paradigm '{method.paradigm}' cannot use it; "
                "use --objective loss, or --paradigm zo"
            )
        if self.checkpointing and method.paradigm != "fo":
            raise UsageError(
                f"--checkpointing is for backprop; paradigm '{method.paradigm}' saves no activations, leave it out"
            )
        if self.adapter is not None and self.holds:
            raise UsageError(
                f"method '{self.method}' trains an adapter of its own beside plain weights; leave out --quantize, --hold, --shard and "
                "--device-map, or use --method stiefel, which ends in an adapter too"
            )
        if self.device_map is not None and method.paradigm != "zo":
            raise UsageError(
                f"--device-map {self.device_map} is for forward passes; paradigm '{method.paradigm}' needs the weights "
                "again on the way back, use --paradigm zo"
            )
        if self.shard:
            self._check_shard(method)
        if self.device_map == "disk" and self.offload_folder is None:
            raise UsageError("--device-map disk needs a place for the weights; give --offload-folder")
        if self.offload_folder is not None and self.device_map not in ("disk", "auto"):
            raise UsageError(
                f"--offload-folder {self.offload_folder} holds weights on disk; give --device-map disk or auto too"
            )
        if self.device_map is not None and self.quantize is not None:
            raise UsageError(
                f"--device-map {self.device_map} moves plain weights only; leave out --quantize {self.quantize}"
            )
        if self.device_map is not None and self.memory_budget is not None:
            raise UsageError(
                f"--memory-budget {self.memory_budget} goes by predictions, and there is none for --device-map "
                f"{self.device_map}; leave one of them out"
            )
        if self.hold_rank is not None and not self.holds:
            raise UsageError(
                f"--hold-rank {self.hold_rank} is of what is kept beside weights that are not written; give --hold, or leave it out"
            )
        if self.holds and self.weight_decay:
            raise UsageError(
                f"--weight-decay {self.weight_decay} would have to write the weights, which are held; leave it out"
            )
        if self.memory_budget is not None:
            bytes_of(self.memory_budget, "--memory-budget")
        if self.warmup and self.steps is not None and self.warmup >= self.steps:
            raise UsageError(f"--warmup {self.warmup} leaves none of {self.steps} steps; use less")
        if self.adapter is not None and self.train not in (None, "all", "adapter"):
            raise UsageError(
                f"--train {self.train}: method '{self.method}' trains an adapter and no weight of the model; leave it out"
            )
        return replace(
            self,
            method=self.method or "stiefel",
            paradigm=method.paradigm,
            probes=self.probes or self.all_probes,
            # said, since a journal keeps this and not where the weights were
            hold=self.hold or self.device_map is not None,
            checkpointing=self.checkpointing if self.memory_budget else self.checkpointing or False,
            task=self.task or (None if self.data or self.model != "demo" else "questions"),
            steps=self.steps if self.steps or self.epochs else numbers.steps,
            eval_every=self.eval_every or min(numbers.eval_every, self.steps or numbers.eval_every),
        )

    def _check_shard(self, method: Method) -> None:
        """Refuse what cannot be done with weights in pieces."""
        flags = {
            "--quantize": self.quantize,
            "--device-map": self.device_map,
            "--hold": self.hold or None,
            "--compile": self.compile or None,
            "--memory-budget": self.memory_budget,
            "--diagnose-every": self.diagnose_every,
        }
        for name, value in flags.items():
            if value is not None:
                raise UsageError(
                    f"{name} does not go with --shard, whose weights are in pieces; leave one of them out"
                )
        if method.paradigm == "fwd":
            raise UsageError("--shard is for zo and fo; use --paradigm zo, or leave --shard out")

    @property
    def realized(self) -> Realization:
        """How a perturbation reaches a weight: of weights in pieces beside them, on one rank too."""
        return "side" if self.shard and self.realization == "auto" else self.realization

    def composed(self) -> Method:
        """The method these settings describe."""
        from zolr.methods import compose

        parts = {f: getattr(self, f) for f in PARTS}
        return compose(self.method, self.paradigm, **parts)

    @property
    def held_rank(self) -> int:
        """Rank at most of what is kept beside a held weight; below four windows' worth it would soon drop much."""
        return self.hold_rank or max(RANK, 4 * getattr(self.composed().projector, "rank", 0))

    @property
    def split(self) -> tuple[int, int]:
        """Examples of a forward pass, and batches of a step."""
        return self.batch_size or 1, self.accumulate or 1

    @property
    def usual_accumulation(self) -> int:
        """Batches of a step where nobody said: one of a size that was given, else what goes with the default size."""
        return 1 if self.batch_size else DEFAULTS[self.paradigm or "zo"].accumulate

    @property
    def selection(self) -> str:
        """Which weights are trained: as given, else as the method has it, and a classification head."""
        from zolr.methods import METHODS

        usual = METHODS[self.method or "stiefel"].trained(self.paradigm or "zo")
        if self.head == "classes" and self.adapter is None and usual != "all":
            usual = "+".join(dict.fromkeys([*usual.split("+"), "head"]))
        return usual if self.adapter is not None else self.train or usual

    @property
    def adapter(self) -> Adapter | None:
        """What the method wraps the model in, if anything; --rank is that of the adapter then."""
        from zolr.methods import METHODS

        adapter = METHODS[self.method or "stiefel"].adapter
        return adapter if adapter is None or self.rank is None else replace(adapter, rank=self.rank)

    def learning_rate(self, method: Method, width: int) -> float | None:
        """The rate: as given, else of the method's row, else of its optimizer; None is for the engine to measure.

        Args:
            width: hidden size of the model, which rates of backprop that nobody gave are fitted to (`workload.fitted`).
        """
        from zolr.cli.workload import fitted
        from zolr.methods import METHODS

        if self.lr is not None:
            return self.lr
        row = METHODS[self.method or "stiefel"]
        if row.methods[method.paradigm].optimizer.name == method.optimizer.name:
            rate = row.lr.get(method.paradigm)
        else:
            rate = (
                None
                if method.paradigm == "zo"
                else LEARNING_RATES.get(method.optimizer.name, OTHER_OPTIMIZER)
            )
        return rate if rate is None else fitted(rate, method, width)

    @property
    def name(self) -> str:
        """What the run is called: task, method, paradigm and seed."""
        task = self.task or Path(self.data or "data").stem
        method = self.projector if self.projector and self.method in (None, "stiefel") else self.method
        return f"{task}-{method}-{self.paradigm}-{self.seed}"


def run(settings: Finetune, dry_run: bool) -> None:
    """Fine-tune a language model on a task or on your own file."""
    from zolr.cli.screen import console

    with teamed(settings, settings.device, toml(settings)) as team:
        shown = console(settings.quiet or not team.first)
        with noting(partial(shown.print, markup=False)):
            _run(settings, dry_run, team, shown)


def _run(settings: Finetune, dry_run: bool, team: Team, shown: Console) -> None:
    from zolr.cli.job import Job
    from zolr.cli.screen import size

    folder = Path(settings.output) if settings.output else runs.free_folder(settings.name)
    done = None
    if not dry_run and team.first:
        runs.check_free(folder, overwrite=settings.overwrite, resume=bool(settings.resume))
        done = settings.left(folder, shown)
    folder = Path(team.told(str(folder)))
    if team.largest(done is not None):
        shown.print(done or "", markup=False)
        if team.first:
            _present(runs.read_json(folder / runs.RESULT), settings)
        return
    job = Job(settings, team=team, shown=shown)
    before = len(job.notes)
    for line in (*job.notes, job.summary(), *job.examples()):
        shown.print(line, markup=False)
    if dry_run and not team.first:
        return
    peak = job.predicted  # takes seconds, and notes why there is none
    for note in job.notes[before:]:
        shown.print(note, markup=False)
    if dry_run:
        _rehearsed(job, settings)
        return
    if peak is not None:
        shown.print(f"expected peak memory of a step: {size(peak)}")
    with runs.claimed_by_first(
        folder, team, overwrite=settings.overwrite, resume=bool(settings.resume)
    ) as place:
        result = job.train(place, shown)
    if team.first:
        _present({**result, "folder": str(folder)}, settings)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add(app, "finetune", Finetune, run, dry_run=True)


def _rehearsed(job: Job, settings: Finetune) -> None:
    """What a dry run has found."""
    from zolr.cli.screen import size

    found = {
        "truncated": job.truncated,
        "trained_share": job.engine.trained_share,
        "peak_bytes_predicted": job.predicted,
    }
    if settings.json:
        print(runs.as_json({**found, "settings": as_dict(job.settings)}))
    else:
        print(f"dry run: everything is in place; predicted peak memory {size(found['peak_bytes_predicted'])}")


def _present(result: dict[str, Any], settings: Finetune) -> None:
    """The result for people or for programs."""
    if settings.json:
        print(runs.as_json(result))
        return
    from rich.console import Console

    from zolr.cli.screen import outcome_cells, outcome_columns, table

    title = f"{result['task']}, {result['method']} {result['paradigm']}: {result['rows']['test']} test rows"
    Console(highlight=False).print(table(title, outcome_columns(result["metric"]), [outcome_cells(result)]))
    if "folder" in result:
        print(f"run folder: {result['folder']}")
