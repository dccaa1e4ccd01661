"""Settings that several verbs share, in the groups that `--help` shows, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from annotated_types import Ge, Gt, Lt

from zolr.cli import runs
from zolr.cli.config import Settings, differing, flag, resolve, toml
from zolr.errors import UsageError

if TYPE_CHECKING:
    from zolr.engine import Engine
    from zolr.methods import Method


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

RANK = 64  # `held.RANK`, without torch, which --help must not import

# settings that replace a part of the method's row, under the names that `methods.compose` has for them
PARTS = (
    "projector", "rank", "refresh_every", "optimizer", "transport", "residual", "side",
    "probes", "eps", "law", "sides", "directions", "signs", "limit", "noise",
    "point", "reach", "blocks", "switch_every", "outside", "accumulate_in", "clip_by",
    "tables", "scale", "ranks", "set",
)  # fmt: skip


Seed = Annotated[int, Ge(-(1 << 63)), Lt(1 << 64)]  # what torch takes
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
        shown="the method's, and a classification head",
    )

    def check_used(self, method: Method, clip: float | None) -> None:
        """Refuse settings that a run has no use for.

        Args:
            method: what these settings describe.
            clip: largest norm of a gradient, None for any.
        """
        from zolr.projectors.identity import Identity

        if self.transport is not None and method.refresh_every is None:
            raise UsageError(
                f"--transport {self.transport} is about state at a new subspace, and this method never takes one; "
                "leave it out, or use --projector stiefel"
            )
        if self.scale is not None and method.dense and isinstance(method.projector, Identity):
            raise UsageError(
                f"--scale {self.scale} is a factor on what is lifted from subspaces, and this method has none; "
                "leave it out, or use --method galore"
            )
        if self.clip_by is not None and clip is None:
            raise UsageError(
                f"--clip-by {self.clip_by} says how to clip, and nothing is clipped; give --clip too, or leave it out"
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
    seed: Seed = flag(0, "Seed of directions, subspaces and a fresh head.", "Training")
    data_seed: Seed = flag(0, "Seed of splits and order of the data.", "Training")
    group_by_length: bool = flag(
        False, "Batches of examples of like length: faster where padding is much of a batch.", "Training"
    )
    compile: bool = flag(
        False,
        "Compile the loss: recorded CUDA graphs for forward passes (zo), torch.compile elsewhere. Pads batches to whole 16s.",
        "Training",
    )


@dataclass(frozen=True)
class Thrift(Settings):
    """What a step does to need less memory."""

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
        for key, was, now in differing(toml(before), toml(self)):
            if key.replace("-", "_") not in (*MAY_CHANGE, *more):
                raise UsageError(
                    f"--{key} {now} differs from the run to resume ({was} in "
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
