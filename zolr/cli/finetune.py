"""`zolr finetune`: fine-tune a model on a task or on own files, and leave a run folder that plain transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import cos, pi, prod
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import typer
from annotated_types import Ge, Gt

from zolr.cli import noting, runs
from zolr.cli.budget import (
    SIZE,
    Way,
    advice,
    bytes_of,
    is_out_of_memory,
    memory_there,
    plan,
    told,
    verdict,
)
from zolr.cli.config import Settings, add, as_dict, flag, resolve, toml
from zolr.cli.workload import DataChoice, Machine, ModelChoice, Ranks, Workload, described, teamed
from zolr.errors import BudgetError, NonFiniteError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from zolr.distributed import Team
    from zolr.engine import Engine
    from zolr.methods import Adapter, Method
    from zolr.tasks import Splits
    from zolr.training import Progress


@dataclass(frozen=True)
class Numbers:
    """What a run does unless it is told: a forward-only step is cheap and says little, a backprop step neither."""

    steps: int
    batch_size: int
    accumulate: int
    eval_every: int
    save_every: int


DEFAULTS = {
    "fo": Numbers(steps=300, batch_size=16, accumulate=1, eval_every=50, save_every=100),
    "zo": Numbers(steps=1600, batch_size=32, accumulate=2, eval_every=400, save_every=400),
    "fwd": Numbers(steps=1000, batch_size=16, accumulate=1, eval_every=125, save_every=250),
}

# Learning rate where neither the user nor the method's row has one for this optimizer (zo: the engine measures one)
LEARNING_RATES = {
    **{
        "sgd": 1e-2,
        "momentum": 1e-2,
        "averaged": 1e-2,
        "optimistic": 1e-2,
        "adamw": 2.5e-4,
        "adafactor": 2.5e-4,
        "muon": 2.5e-4,
    },
    **{"adalomo": 1e-3, "flora": 1e-3, "mofasgd": 5e-4},
}
OTHER_OPTIMIZER = 2.5e-4

# settings that replace a part of the method's row, under the names that `methods.compose` has for them
PARTS = (
    "projector", "rank", "refresh_every", "optimizer", "transport", "residual", "side",
    "probes", "eps", "law", "sides", "directions", "signs", "limit", "noise",
    "point", "reach", "blocks", "switch_every", "outside", "accumulate_in", "clip_by",
    "tables", "scale", "ranks", "set",
)  # fmt: skip

RANK = 64  # `held.RANK`, without torch, which --help must not import

EVEN = 16  # tokens that lengths are rounded up to for a compiled loss, which wants few shapes
DELTA = 1e-5  # at which the epsilon of a private run is told

Realization = Literal["auto", "side", "rebuild", "inplace"]

OBJECTIVES = ("loss", "accuracy", "f1")
MAY_CHANGE = (
    "steps",
    "device",
    "threads",
    "keep_last",
    "check_every",
    "diagnose_every",
    "diagnose_draws",
    "undo",
)  # on --resume; anything else would make it another run


@dataclass(frozen=True)
class TablePolicy(Settings):
    """What becomes of embeddings and heads, which are most of a small model."""

    tables: Literal["full", "subspace", "frozen"] | None = flag(
        None,
        "Embeddings and head: full (trained as a whole), subspace (projected), frozen (not trained).",
        "Method",
        shown="as the method and --train have it",
    )


@dataclass(frozen=True)
class Composition(TablePolicy):
    """How to train."""

    method: str | None = flag(None, "A row of `zolr methods`.", "Method", shown="stiefel")
    paradigm: Literal["fo", "zo", "fwd"] | None = flag(
        None,
        "fo: backprop; zo: forward passes only; fwd: forward mode.",
        "Method",
        shown="the method's first",
    )
    projector: str | None = flag(
        None,
        "How subspaces are drawn: stiefel, dependent, gaussian, coordinate, srht, two_sided, svd, power_iteration, tracking, walk, jump, "
        "lazy_svd, plumage, viewed, range_finder, identity.",
        "Method",
        shown="the method's",
    )
    rank: int | None = flag(None, "Rank of the subspaces.", "Method", shown="the method's")
    ranks: str | None = flag(
        None,
        "Ranks of single weights by parts of their names: q_proj=16,mlp=64; the first that fits counts.",
        "Method",
        shown="--rank everywhere",
    )
    refresh_every: int | None = flag(None, "Steps a subspace lives.", "Method", shown="the method's")
    optimizer: str | None = flag(
        None, "sgd, momentum, adamw, muon, ..., or a class of torch.optim.", "Method", shown="the method's"
    )
    transport: str | None = flag(
        None,
        "Optimizer state at a refresh: reset, keep, align, aware, reproject.",
        "Method",
        shown="the method's",
    )
    residual: str | None = flag(
        None,
        "The gradient outside its subspace: drop, recover, replace, error_feedback, compensate, precondition, projfactor (fo).",
        "Method",
        shown="the method's",
    )
    probes: int | None = flag(None, "Directions a step (zo, fwd).", "Method", shown="the method's")
    eps: float | None = flag(None, "Probe radius (zo).", "Method", shown="measured, or the method's")
    side: str | None = flag(
        None, "Which side of a matrix is projected: right, left, short, both.", "Method", shown="the method's"
    )
    law: str | None = flag(
        None, "How a probe is drawn: rademacher, gaussian, sphere (zo, fwd).", "Method", shown="the method's"
    )
    sides: int | None = flag(
        None, "2 for central differences, 1 for one-sided (zo).", "Method", shown="the method's"
    )
    directions: str | None = flag(
        None, "Several probes: fresh, or orthonormal (zo).", "Method", shown="the method's"
    )
    signs: str | None = flag(
        None,
        "Both signs of a probe in sequence, or together in one forward (zo).",
        "Method",
        shown="the method's",
    )
    limit: float | None = flag(None, "Largest slope of an example (dpzero).", "Method", shown="the method's")
    noise: float | None = flag(
        None,
        "Noise of a step, in units of --limit over the examples (dpzero).",
        "Method",
        shown="the method's",
    )
    point: str | None = flag(
        None,
        "Where the gradient is taken: ascent (uphill by probes, as SAM), lookahead (extragradient).",
        "Method",
        shown="the method's, else at the weights",
    )
    reach: float | None = flag(
        None,
        "How far that point is: ascent a length, lookahead a factor on the gradient.",
        "Method",
        shown="the method's",
    )
    blocks: str | None = flag(
        None,
        "Blocks of layers that are trained at a time: all, cycle, sampled, bernoulli.",
        "Method",
        shown="the method's",
    )
    switch_every: int | None = flag(
        None, "Steps until other blocks are trained.", "Method", shown="the method's"
    )
    outside: str | None = flag(
        None,
        "Embeddings, head and what else is in no block: always trained, never, or blocks of their own (blocks).",
        "Method",
        shown="the method's",
    )
    accumulate_in: str | None = flag(
        None,
        "Where a dense method sums micro-batches: dense, or coordinates (in the subspace, as they come).",
        "Method",
        shown="the method's",
    )
    clip_by: str | None = flag(
        None,
        "The norm by which a dense method clips: last (of the step before), twice (by a second backward pass).",
        "Method",
        shown="the method's",
    )
    scale: Annotated[float, Gt(0)] | None = flag(
        None,
        "Factor on the steps of matrices that are projected (GaLore's alpha); all else moves at the rate itself.",
        "Method",
        shown="the method's",
    )
    set: tuple[str, ...] = flag(
        (),
        "Any setting of any part, as PART.NAME=VALUE: residual.q=0.2, projector.granularity=8, projects=all (`zolr methods NAME` "
        "shows what a part has). May be repeated.",
        "Method",
    )
    realization: Realization = flag(
        "auto", "How a perturbation reaches a weight: auto, side, rebuild, inplace.", "Method"
    )
    undo: bool | None = flag(
        None,
        "Keep what a step overwrites aside (TMPDIR; of a card: pinned host memory), so that one that fails changes nothing; --no-undo: "
        "keep nothing.",
        "Method",
        shown="on, but not for matrices on a card that one call updates (adamw), nor --realization inplace",
    )
    train: str | None = flag(
        None,
        "Weights to train: all, or attention, linear, head, embedding, bias, norm joined by +.",
        "Method",
        shown="the method's",
    )


@dataclass(frozen=True)
class Schedule(Settings):
    """How long, how fast, and on how much."""

    k: Annotated[int, Ge(1)] | None = flag(
        None, "Few-shot: training examples a class.", "Training", shown="all rows"
    )
    train_rows: Annotated[int, Ge(1)] | None = flag(
        None, "Training rows at most.", "Training", shown="all rows"
    )
    validation: str | None = flag(
        None, "Own file to choose the best step on.", "Data", shown="a share of --data", path=True
    )
    test: str | None = flag(None, "Own file to report on.", "Data", shown="a share of --data", path=True)
    lr: Annotated[float, Gt(0)] | None = flag(
        None,
        "Learning rate.",
        "Training",
        shown="the method's, for the width of the model; zo: measured on the first batch",
        aliases=("learning_rate",),
    )
    schedule: Literal["constant", "linear", "cosine"] = flag(
        "linear", "Course of the rate: constant, linear, cosine.", "Training"
    )
    warmup: Annotated[int, Ge(0)] = flag(0, "Steps in which the rate rises from zero.", "Training")
    weight_decay: Annotated[float, Ge(0)] = flag(0.0, "Decoupled decay of the matrices.", "Training")
    clip: Annotated[float, Gt(0)] | None = flag(
        None, "Largest norm of a gradient.", "Training", shown="no clipping"
    )
    steps: Annotated[int, Ge(1)] | None = flag(
        None, "Optimizer steps.", "Training", shown=", ".join(f"{p} {n.steps}" for p, n in DEFAULTS.items())
    )
    epochs: Annotated[float, Gt(0)] | None = flag(
        None, "Passes over the training rows, instead of steps.", "Training", aliases=("num_train_epochs",)
    )
    batch_size: Annotated[int, Ge(1)] | None = flag(
        None,
        "Examples of a forward pass.",
        "Training",
        shown=", ".join(f"{p} {n.batch_size}" for p, n in DEFAULTS.items()),
        aliases=("per_device_train_batch_size",),
    )
    accumulate: Annotated[int, Ge(1)] | None = flag(
        None,
        "Batches of a step.",
        "Training",
        shown="1, or 2 for zo with its own batch size",
        aliases=("gradient_accumulation_steps",),
    )
    objective: Literal["loss", "accuracy", "f1"] = flag(
        "loss", "What training improves: loss, accuracy, f1 (the last two under zo).", "Training"
    )
    eval_every: Annotated[int, Ge(1)] | None = flag(
        None,
        "Steps between evaluations.",
        "Training",
        shown=", ".join(f"{p} {n.eval_every}" for p, n in DEFAULTS.items()),
    )
    patience: Annotated[int, Ge(1)] | None = flag(
        None,
        "Stop after so many evaluations in a row without a better one; the best weights are kept.",
        "Training",
        shown="never",
        aliases=("early_stopping_patience",),
    )
    seed: int = flag(0, "Seed of directions, subspaces and a fresh head.", "Training")
    data_seed: int = flag(0, "Seed of splits and order of the data.", "Training")
    group_by_length: bool = flag(
        False, "Batches of examples of like length: faster where padding is much of a batch.", "Training"
    )
    compile: bool = flag(
        False,
        "Compile the loss: recorded CUDA graphs for forward passes (zo), torch.compile elsewhere. Pads batches to whole 16s.",
        "Training",
    )
    checkpointing: bool | Literal["selective"] | None = flag(
        None,
        "Recompute activations in the backward pass (fo): on, off, or selective (those of half of the layers).",
        "Memory",
        shown="off, or as the budget asks",
    )
    memory_budget: str | None = flag(
        None,
        "Take steps in the fastest way whose predicted peak fits: 4GiB, 4GB; settings that are given stay.",
        "Memory",
        shown="no limit",
    )


@dataclass(frozen=True)
class Holding(Settings):
    """Weights that are not written: quantized, away from the device, or left as they are for an adapter."""

    quantize: Literal["int8", "nf4"] | None = flag(
        None,
        "Code the linear maps of the base model: int8 (torchao), nf4 (bitsandbytes). Implies --hold.",
        "Memory",
        shown="plain weights",
    )
    device_map: Literal["auto", "cpu", "disk"] | None = flag(
        None,
        "Keep weights off the device between two uses (zo): in host memory (cpu), on disk, or as accelerate divides them (auto). Implies --hold.",
        "Memory",
        shown="all weights on the device",
    )
    offload_folder: str | None = flag(
        None, "Folder for weights on disk (--device-map disk, auto).", "Memory", path=True
    )
    hold: bool = flag(
        False, "Leave the model as it is, and write what was learned as a LoRA adapter for peft.", "Memory"
    )
    hold_rank: Annotated[int, Ge(1)] | None = flag(
        None,
        "Rank at most of what is kept beside a weight that is not written.",
        "Memory",
        shown=f"four times --rank, at least {RANK}",
    )

    shard: bool = flag(
        False,
        "Cut the weights over all ranks of torchrun (fully_shard), for a model larger than a card (zo, fo); the run folder "
        "holds a plain model. While it lasts they are not written, as with --hold.",
        "Ranks",
    )

    @property
    def holds(self) -> bool:
        """Whether the model's weights stay as they are."""
        return self.hold or self.shard or self.quantize is not None or self.device_map is not None


@dataclass(frozen=True)
class Writing(Settings):
    """Where to."""

    output: str | None = flag(
        None,
        "Run folder.",
        "Output",
        shown="runs/TASK-METHOD-PARADIGM-SEED",
        aliases=("output_dir",),
        saved=False,
    )
    overwrite: bool = flag(False, "Replace a run that is there.", "Output", saved=False)
    save_every: Annotated[int, Ge(1)] | None = flag(
        None,
        "Steps between checkpoints, which then stay after the run.",
        "Output",
        shown="some, removed when the run is done",
    )
    keep_last: Annotated[int, Ge(1)] = flag(
        2, "Checkpoints that stay, the newest ones; the best weights stay too.", "Output"
    )
    resume: str | None = flag(
        None,
        "Go on with --output from its newest good checkpoint; auto: or begin where there is none. Or the path of a run or a checkpoint.",
        "Output",
        saved=False,
        bare=True,
    )
    json: bool = flag(False, "Print the result as JSON on stdout.", "Output", saved=False)
    quiet: bool = flag(False, "Print nothing but the result and errors.", "Output", saved=False)

    @classmethod
    def going_on(cls, given: dict[str, Any], config: Path | None) -> Self:
        """The settings of a command line; on resume the run's own config file stands in for flags that are not repeated."""
        given = _settled(given, config)
        if not given.get("resume"):
            return resolve(cls, given, config)
        folder = Path(given["output"])
        saved = folder / runs.CONFIG
        runs.check_free(folder, overwrite=False, resume=True)
        if not saved.is_file():
            raise UsageError(
                f"{folder} is no run folder: it has no {runs.CONFIG}; give --output RUN, or start without --resume"
            )
        return resolve(cls, given, config or saved)

    def check_same(self, before: Self, *more: str) -> None:
        """Refuse what would make the run that is gone on with another one.

        Args:
            before: its settings.
            more: settings that may differ, besides those that may in every verb.
        """
        was, now = (dict(line.split(" = ", 1) for line in toml(s).splitlines()) for s in (before, self))
        for key in was.keys() | now.keys():
            if was.get(key) != now.get(key) and key.replace("-", "_") not in (*MAY_CHANGE, *more):
                raise UsageError(
                    f"--{key} {now.get(key, 'not given')} differs from the run to resume ({was.get(key, 'not given')} in "
                    f"{Path(self.output or '') / runs.CONFIG}); leave it out, or start a new run"
                )

    def left(self, folder: Path, shown: Any) -> str | None:
        """Why nothing is left to do for --resume, None where something is; says where the rate takes another course."""
        steps, schedule = getattr(self, "steps", None), getattr(self, "schedule", "constant")
        if not self.resume:
            return None
        done = runs.done(folder, steps) if self.resume == "on" else None  # an earlier checkpoint is asked for
        if done is None and (note := runs.new_course(folder, steps, schedule)) is not None:
            shown.print(note, markup=False)
        return done

    @property
    def resumed_from(self) -> bool | Path:
        """What `training.train` goes on from."""
        return self.resume == "on" if self.resume in (None, "on") else Path(self.resume)


def _settled(given: dict[str, Any], config: Path | None) -> dict[str, Any]:
    """The flags with what --resume means: "on" or a checkpoint, and the run as --output; or no --resume at all."""
    wish = given.get("resume")
    rest = {name: value for name, value in given.items() if name != "resume"}
    if wish in (None, "off"):
        return rest
    folder = Path(given["output"]) if "output" in given else config.parent if config else None
    if wish not in ("on", "auto"):
        path = Path(wish)
        is_checkpoint = path.absolute().parent.name == runs.CHECKPOINTS
        found = path.absolute().parent.parent if is_checkpoint else path
        if "output" in given and folder is not None and found.resolve() != folder.resolve():
            raise UsageError(f"--resume {wish} is not of the run in --output {folder}; leave one of them out")
        return {**rest, "output": str(found), "resume": str(path.absolute()) if is_checkpoint else "on"}
    if folder is None:
        raise UsageError(
            f"--resume{'' if wish == 'on' else ' auto'} needs the run to go on with; give --output RUN"
        )
    if wish == "auto" and not (folder / runs.CONFIG).is_file():
        return rest
    return {**rest, "output": str(folder), "resume": "on"}


@dataclass(frozen=True)
class Inspection(Settings):
    """What to look into while a run lasts."""

    diagnose_every: Annotated[int, Ge(1)] | None = flag(
        None,
        "Steps between diagnoses of gradient, subspaces and estimates, for metrics.jsonl and `zolr plot`.",
        "Output",
        shown="none",
    )
    diagnose_draws: Annotated[int, Ge(2)] = flag(8, "Estimates per weight of a diagnosis.", "Output")

    def observer(self, engine: Engine, batch: dict[str, Any]) -> Any:
        """Who diagnoses a run on this batch; None where nobody was asked to."""
        if self.diagnose_every is None:
            return None
        from zolr.diagnostics import Diagnostics

        device = engine.variables[0].value.device
        moved = {name: part.to(device) for name, part in batch.items()}
        return Diagnostics(engine, moved, every=self.diagnose_every, draws=self.diagnose_draws)


@dataclass(frozen=True)
class Finetune(Writing, Inspection, Holding, Ranks, Machine, Schedule, Composition, DataChoice, ModelChoice):
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
        method = self.composed()
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
    def usual_accumulation(self) -> int:
        """Batches of a step where nobody said: one of a size that was given, else what goes with the default size."""
        return 1 if self.batch_size else DEFAULTS[self.paradigm or "zo"].accumulate

    @property
    def selection(self) -> str:
        """Which weights are trained: as given, else as the method has it."""
        from zolr.methods import METHODS

        usual = METHODS[self.method or "stiefel"].trained(self.paradigm or "zo")
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
    for note in job.notes:
        shown.print(note, markup=False)
    shown.print(job.summary(), markup=False)
    for line in job.examples():
        shown.print(line, markup=False)
    if dry_run:
        if team.first:
            _rehearsed(job, settings)
        return
    if job.predicted is not None:
        shown.print(f"expected peak memory of a step: {size(job.predicted)}")
    with runs.claimed_by_first(
        folder, team, overwrite=settings.overwrite, resume=bool(settings.resume)
    ) as place:
        result = job.train(place, shown)
    if team.first:
        _present({**result, "folder": str(folder)}, settings)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add(app, "finetune", Finetune, run, dry_run=True)


def schedule_of(course: str, warmup: int, steps: int) -> Callable[[int], float] | None:
    """Factor on the learning rate by step: a linear rise over `warmup` steps, then constant or down to zero at `steps`.

    >>> [round(schedule_of("linear", 2, 6)(step), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if course == "constant" and not warmup:
        return None

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return factor_at(course, min(1.0, (step - warmup) / max(1, steps - warmup)))

    return factor


def factor_at(course: str, done: float) -> float:
    """Factor on the learning rate where a share of the run, 0 to 1, is done."""
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + cos(pi * done))}[course]


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


class Job:
    """One fine-tuning run, loaded and ready to go.

    Args:
        settings: what to do.
        schedule: factor on the learning rate by step, instead of the one that the settings describe.
        team: the processes of the run; None for this one alone.
        shown: a rich console, told what takes long; None for silence.
    """

    def __init__(
        self,
        settings: Finetune,
        schedule: Callable[[int], float] | None = None,
        team: Team | None = None,
        shown: Any = None,
    ) -> None:
        from zolr import adapters, lora, models
        from zolr.cli.replay import about
        from zolr.cli.workload import device_of, set_threads, splits_of, task_of, width_of, words_of
        from zolr.distributed import Team
        from zolr.engine import Engine
        from zolr.journal import fingerprint
        from zolr.tasks import TrainingBatches, own_task, truncation_share

        self.team, self._shown = team or Team(), shown
        if adapters.is_adapter(Path(settings.model)):
            raise UsageError(
                f"--model {settings.model} is an adapter, whose base is {adapters.base_of(Path(settings.model))}; "
                "train the base, or a model that both were merged into"
            )
        set_threads(settings.threads)
        device = device_of(settings.device)
        if settings.adapter is not None:
            lora.check_installed(settings.adapter)
        task = task_of(settings, settings.model)
        files = {"validation_data": settings.validation, "test_data": settings.test}
        self.splits: Splits = splits_of(
            settings, task, seed=settings.data_seed, k=settings.k, train_rows=settings.train_rows, more=files
        )
        if task is None:
            task = own_task(Path(settings.data or "").stem, self.splits.columns, self.splits.classes)
        words = words_of(settings.label_words, task.classes) if settings.label_words else None
        task = task.changed(template=settings.template, words=words)
        self.work = Workload(
            settings.model,
            task,
            settings.head,
            max_length=settings.max_length,
            dtype=settings.dtype,
            device=device,
            seed=settings.seed,
            adapter=settings.adapter,
            quantize=settings.quantize,
            device_map=settings.device_map,
            offload_folder=settings.offload_folder,
            apart=settings.shard,
            team=self.team,
            trust_remote_code=settings.trust_remote_code,
        )
        self.train_set = self.work.encode(self.splits.train)
        self.validation = self.work.encode(self.splits.validation)
        self.test = self.work.encode(self.splits.test)
        self.truncated = truncation_share(self.train_set)
        self.notes = list(self.work.notes)
        self.select = settings.selection
        self._peaks: dict[Finetune, int] = {}
        self.settings = settings = self._within_budget(self._sized(settings), settings)
        self.batches = TrainingBatches(
            self.train_set,
            batch_size=self.step_size,
            micro_batch_size=self.batch_size,
            by_length=settings.group_by_length,
            pad_to_multiple=EVEN if settings.compile else None,
            seed=settings.data_seed,
            pad_id=self.work.pad_id,
        )
        models.checkpoint_activations(self.work.model, settings.checkpointing or False)
        whole: dict[str, str] = {}
        if settings.shard:
            whole = {"base": fingerprint(self.work.model)}
            self.work.cut(self.own_modules)
        method = settings.composed()
        self.metric = "f1" if settings.objective == "f1" else task.metric
        self.engine: Engine = Engine(
            self.work.model,
            method,
            lr=settings.learning_rate(method, width_of(self.work.model)),
            loss=self.work.objective(settings.objective),
            select=self.select if settings.adapter is None else lora.trained,
            seed=settings.seed,
            weight_decay=settings.weight_decay,
            schedule=schedule or schedule_of(settings.schedule, settings.warmup, settings.steps or 1),
            clip=settings.clip,
            realization=settings.realized,
            hold=self._hold if settings.holds else False,
            hold_rank=settings.held_rank,
            compile=settings.compile,
            undo=settings.undo,
            # families whose forward we know need no proof that the coordinates reach the loss; it costs a pass per weight
            check=None if models.splits(self.work.model) else self._moved(self.batches(0)[0]),
            team=self.team,
        )

        spent = self.privacy(settings.steps or 0)
        if spent is not None:
            self.notes.append(
                f"privacy of the weights: epsilon {spent['epsilon']:.3g} at delta {spent['delta']:g} after "
                f"{settings.steps} steps, for one example replaced by another of its label, while --seed is secret"
            )

        self.about = about(
            "finetune", settings, self.work.model, self.engine.base_lr, self.own_classes, task=self.told_task
        )
        self.about |= whole

    @property
    def told_task(self) -> dict[str, Any]:
        """What `zolr predict` and `zolr evaluate` have to know of the run."""
        told = {"task": described(self.work.task), "head": self.settings.head, "metric": self.metric}
        return told | ({"quantize": self.settings.quantize} if self.settings.quantize else {})

    @property
    def own_classes(self) -> tuple[str, ...] | None:
        """Classes of a model with a head for them."""
        return self.work.task.classes if self.settings.head == "classes" else None

    def privacy(self, steps: int) -> dict[str, float] | None:
        """`epsilon` that so many steps spend at `delta`; None for a method that is not private."""
        estimator: Any = self.engine.method.estimator
        if not self.engine.method.private:
            return None
        sizes = dict(batch_size=self.step_size, rows=len(self.train_set))
        return {"epsilon": estimator.epsilon(steps=steps, delta=DELTA, **sizes), "delta": DELTA}

    @property
    def own_modules(self) -> list[str]:
        """Modules that the base model does not have: a fresh classification head, which no adapter can be kept beside."""
        from zolr.cli.replay import own_modules

        return own_modules(self.work.model) if self.settings.head == "classes" else []

    def _hold(self, name: str, _: Any) -> bool:
        return not any(name.startswith(f"{own}.") for own in self.own_modules)

    def _sized(self, settings: Finetune) -> Finetune:
        """The settings with what depends on the number of rows."""
        rows = len(self.train_set)
        numbers = DEFAULTS[settings.paradigm or "zo"]
        size = settings.batch_size or min(numbers.batch_size, rows)
        parts = settings.accumulate or max(1, min(settings.usual_accumulation, rows // size))
        ranks = self.team.size if self.team.spread == "batches" else 1
        if settings.batch_size is None and settings.accumulate is None and parts < ranks <= size * parts:
            total = size * parts  # as many examples, in batches enough for all ranks
            fits = lambda p: total % p == 0 and not (settings.shard and p % ranks)  # noqa: E731
            parts = next((p for p in range(ranks, total + 1) if fits(p)), parts)
            size = total // parts
        if settings.shard and parts % ranks:
            raise UsageError(
                f"the {parts} batches of a step do not go evenly into {ranks} ranks, which put the weights together in step; "
                f"give --accumulate {ranks * -(-parts // ranks)}, and a --batch-size for as many examples"
            )
        if parts < ranks:
            self.notes.append(
                f"note: the {parts} batches of a step keep {parts} of {ranks} ranks busy; give --accumulate {ranks}, and "
                "a smaller --batch-size for as many examples"
            )
        if size * parts > rows:
            raise UsageError(
                f"--batch-size {size} times --accumulate {parts} is more than the {rows} training rows; use less"
            )
        steps = settings.steps or max(1, round((settings.epochs or 1) * rows / (size * parts)))
        if settings.warmup >= steps:
            raise UsageError(f"--warmup {settings.warmup} leaves none of {steps} steps; use less")
        return replace(settings, batch_size=size, accumulate=parts, steps=steps, epochs=None)

    def _within_budget(self, settings: Finetune, given: Finetune) -> Finetune:
        """The settings with what nobody has given chosen so that a step fits the memory budget."""
        if settings.memory_budget is None:
            return settings
        method, budget = settings.composed(), bytes_of(settings.memory_budget, "--memory-budget")
        asked, chosen = self._ways(settings)
        free = {name for name in ("checkpointing", "signs") if getattr(given, name) is None}
        if given.batch_size is None and given.accumulate is None:
            free |= set(SIZE)
        if given.realization == "auto":
            free.add("realization")
        found = plan(lambda way: self._peak(chosen(way)), asked, method.paradigm, free, budget)
        self.notes += told(found, method.paradigm, budget)
        return chosen(found.way)

    def _ways(self, settings: Finetune) -> tuple[Way, Callable[[Way], Finetune]]:
        """The way in which the settings take a step, and the settings that take it in another one."""
        from zolr.estimators import setting

        method = settings.composed()
        asked = Way(
            settings.batch_size or 1,
            settings.accumulate or 1,
            settings.checkpointing or False,
            setting(method.estimator, "signs", "sequence"),
            settings.realization,
        )

        def chosen(way: Way) -> Finetune:
            signs = way.signs if method.paradigm == "zo" else None
            size = dict(batch_size=way.batch_size, accumulate=way.accumulate)
            return replace(
                settings,
                **size,
                checkpointing=way.checkpointing,
                signs=signs,
                realization=way.realization,  # pyright: ignore[reportArgumentType]
            )

        return asked, chosen

    def advice(self, error: BaseException) -> BudgetError:
        """The error for a step that ran out of memory."""
        asked, chosen = self._ways(self.settings)
        there = memory_there(self.work.device.type)
        return advice(
            lambda way: self._peak(chosen(way)), asked, self.settings.paradigm or "zo", there, error
        )

    @property
    def budget(self) -> int | None:
        """Bytes a step may take."""
        budget = self.settings.memory_budget
        return None if budget is None else bytes_of(budget, "--memory-budget")

    @property
    def batch_size(self) -> int:
        """Examples of a forward pass."""
        return self.settings.batch_size or 1

    @property
    def step_size(self) -> int:
        """Examples of a step."""
        return self.batch_size * (self.settings.accumulate or 1)

    def _write_shards(self, folder: Path) -> None:
        """Write the trained model, every rank its rows; those of a run that did not come to its end are replaced."""
        from zolr import sharded

        with self.team.in_turn():
            if self.team.first:
                rmtree(folder, ignore_errors=True)
        sharded.save(folder, self.engine)

    def _moved(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: part.to(self.work.device) for name, part in batch.items()}

    def summary(self) -> str:
        """What is about to happen, in two lines."""
        from zolr.held import shapes

        s, splits = self.settings, self.splits
        rows = f"{len(splits.train)} train, {len(splits.validation)} validation, {len(splits.test)} test rows from {splits.source}"
        total = sum(map(prod, shapes(self.work.model).values()))
        coded = f" in {s.quantize}" if s.quantize else ""
        return (
            f"{splits.name}: {rows}; {self.truncated:.1%} of the training rows cut to {self.work.task.max_length} tokens\n"
            f"{s.model}{coded} ({total:,} parameters, {self.engine.trained_share:.1%} trained): method {s.method}, paradigm {s.paradigm}, "
            f"{s.steps} steps of {self.step_size} examples"
        )

    def examples(self) -> list[str]:
        """Two training examples as the model sees them, of different classes."""
        first = self.splits.train[0]
        second = next((e for e in self.splits.train if e.label != first.label), first)
        return [self.work.input.show(example) for example in (first, second)]

    @cached_property
    def predicted(self) -> int | None:
        """Peak bytes of a step on the longest examples, as predicted without running one; None where that fails."""
        if self.settings.shard:
            self.notes.append("note: no memory prediction for weights in pieces")
            return None
        if self.settings.device_map is not None:
            self.notes.append("note: no memory prediction for weights that are away between two uses")
            return None
        try:
            return self._peak(self.settings)
        except Exception as error:  # an operation that fake tensors cannot run must not stop a run that works
            self.notes.append(f"note: no memory prediction ({type(error).__name__}: {error})")
            return None

    def _peak(self, settings: Finetune) -> int:
        """Predicted peak bytes of a step with these settings; seconds the first time, and remembered."""
        from zolr.cli.screen import predicting

        if settings not in self._peaks:
            with predicting(self._shown, self._ways(settings)[0].flags(settings.paradigm or "zo")):
                self._peaks[settings] = self._predict(settings)
        return self._peaks[settings]

    def _predict(self, settings: Finetune) -> int:
        import torch

        from zolr.memory import predict

        return predict(
            self.work.model.config,  # pyright: ignore[reportArgumentType]
            settings.composed(),
            batch_size=settings.batch_size or 1,
            max_length=max(len(one["input_ids"]) for one in self.train_set),
            dtype=getattr(torch, settings.dtype),
            objective="classes" if settings.head == "classes" else "prompt",
            num_labels=len(self.work.task.classes),
            accumulation=settings.accumulate or 1,
            checkpointing=settings.checkpointing or False,
            lr=settings.lr,
            select=self.select,
            weight_decay=settings.weight_decay,
            clip=settings.clip,
            realization=settings.realization,
            adapter=settings.adapter,
            quantize=settings.quantize,
            hold=settings.holds,
            hold_rank=settings.held_rank,
            device=self.work.device,
            dropout=None,
        ).peak_bytes

    def train(
        self, place: runs.RunFolder, shown: Any, until: Callable[[Progress], bool] | None = None
    ) -> dict[str, Any]:
        """Train, complete the run folder, and return what is in its `result.json`.

        Args:
            until: ends the run early, see `training.train`; its settings then say how many steps it was.
        """
        from zolr.cli import record
        from zolr.cli.screen import watching
        from zolr.memory import resident
        from zolr.training import train

        settings, work = self.settings, self.work
        meter = record.Meter(self.engine, work.device, place.path if settings.resume else None)
        if not settings.resume and self.team.first:
            runs.write_text(place.work / runs.CONFIG, toml(settings))
        try:
            # on resume too: the engine still has the first weights, and the model's answer to them does not change
            before = work.evaluate(self.test, self.batch_size)
            with (
                watching(
                    shown, lambda: resident(work.device), 0, settings.steps or 0, rows="validation"
                ) as screen,
                meter.kept(place.work, self.team.first),
            ):
                outcome = train(
                    self.engine,
                    self.batches,
                    steps=settings.steps or 0,
                    evaluate=lambda: work.evaluate(self.validation, self.batch_size),
                    eval_every=settings.eval_every or 0,
                    metric=self.metric,
                    patience=settings.patience,
                    folder=place.work,
                    save_every=settings.save_every or DEFAULTS[settings.paradigm or "zo"].save_every,
                    keep_last=settings.keep_last,
                    resume=settings.resumed_from,
                    about=self.about,
                    device=work.device,
                    meter=meter,
                    reporter=screen,
                    until=until,
                    check_every=settings.check_every,
                    observer=settings.observer(self.engine, self.batches(0)[0]),
                )
        except NonFiniteError:
            raise
        except BaseException as error:
            place.discard()
            if is_out_of_memory(error):
                raise self.advice(error) from error
            raise
        if until is not None:
            self.settings = replace(settings, steps=outcome.progress.step)
        after = work.evaluate(self.test, self.batch_size)
        result = record.result_of(self, outcome, before, after, meter)
        if settings.shard:
            self._write_shards(place.work / runs.SHARDS)
        if not self.team.first:
            return result
        record.complete(self, place, result, meter)
        if "ranks" in result:
            shown.print(record.said(result["ranks"]), markup=False)
        if self.budget is not None and (over := verdict(self.budget, meter.peak or None, meter.counter)):
            shown.print(over, markup=False)
        return result
