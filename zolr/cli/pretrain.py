"""`zolr pretrain`: train a language model on plain text, from random weights or from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import typer
from annotated_types import Ge, Gt, Lt

from zolr.cli import noting, runs
from zolr.cli.budget import bytes_of
from zolr.cli.choices import PARTS, Composition, Inspection, Seed, Thrift, Writing
from zolr.cli.config import Settings, add, flag, resolve, toml
from zolr.cli.rates import USUAL, rate_of
from zolr.cli.workload import Machine, Ranks, Trust, teamed
from zolr.errors import NonFiniteError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from zolr.distributed import Team
    from zolr.methods import Method

# on --resume; the text may have moved, what it says is compared
MAY_CHANGE = ("eval_every", "save_every", "eval_rows", "memory_budget", "data", "held_out", "workers")
NUMBERS = ("hidden_size", "layers", "heads", "ffn_size")  # what a model without a name is made from
BATCH_SIZE = 32


@dataclass(frozen=True)
class Text(Settings):
    """What to read."""

    data: tuple[str, ...] = flag(
        (),
        "Text, JSON lines or parquet files (.gz, .xz), folders of them, or a data set: NAME:CONFIG:SPLIT of the hub or a folder (repeat the flag).",
        "Data",
        path=True,
    )
    held_out: tuple[str, ...] = flag(
        (),
        "Text to evaluate on.",
        "Data",
        shown="files of --data named valid*, dev*, eval*; else the last rows",
        path=True,
    )
    text_column: str = flag("text", "Key of JSON lines, column of parquet files and data sets.", "Data")
    hub_documents: Annotated[int, Ge(1)] | None = flag(
        None, "Documents of a data set of the hub at most; they are streamed.", "Data", shown="all of them"
    )
    documents: Literal["joined", "apart"] = flag(
        "joined",
        "Documents of a row, a boundary token between them: joined, or apart (neither attention nor positions cross it).",
        "Data",
    )
    cache: str | None = flag(
        None,
        "Folder of packed tokens, found again by what they were made of.",
        "Data",
        shown="$ZOLR_CACHE, or ~/.cache/zolr",
        saved=False,
    )
    workers: Annotated[int, Ge(0)] = flag(1, "Threads that make batches ahead.", "Data", saved=False)
    tokenizer: str | None = flag(
        None, "Folder or hub name of a tokenizer.", "Data", shown="the model's own", path=True
    )
    train_tokenizer: bool = flag(False, "Learn a byte-level BPE tokenizer from the data first.", "Data")
    vocab_size: Annotated[int, Ge(260)] = flag(8192, "Tokens of the tokenizer to learn.", "Data")
    tokenizer_characters: Annotated[int, Ge(1)] = flag(
        8_000_000, "Characters of the data it is learned from.", "Data"
    )
    length: Annotated[int, Ge(2)] = flag(128, "Tokens of a row.", "Data")


@dataclass(frozen=True)
class Architecture(Trust):
    """What to train."""

    model: str | None = flag(
        None,
        "Preset, folder, hub name or config.json; without it one is made from the numbers below.",
        "Model",
        path=True,
    )
    hidden_size: Annotated[int, Ge(8)] = flag(192, "Width.", "Model")
    layers: Annotated[int, Ge(1)] = flag(4, "Layers.", "Model")
    heads: Annotated[int, Ge(1)] = flag(4, "Attention heads; they divide the width.", "Model")
    ffn_size: Annotated[int, Ge(1)] | None = flag(
        None,
        "Inner width of the feed-forward layers.",
        "Model",
        shown="8/3 of the width (clm), 4 times it (mlm)",
    )


@dataclass(frozen=True)
class Course(Settings):
    """How long and how fast."""

    objective: Literal["clm", "mlm"] = flag(
        "clm", "Predict the next token (clm) or masked ones (mlm).", "Training"
    )
    steps: Annotated[int, Ge(1)] = flag(1000, "Optimizer steps.", "Training")
    batch_size: Annotated[int, Ge(1)] | None = flag(
        None,
        "Rows of a forward pass.",
        "Training",
        shown=f"{BATCH_SIZE}, or as the budget asks",
        aliases=("per_device_train_batch_size",),
    )
    accumulate: Annotated[int, Ge(1)] | None = flag(
        None,
        "Batches of a step.",
        "Training",
        shown="1, or as the budget asks",
        aliases=("gradient_accumulation_steps",),
    )
    lr: Annotated[float, Gt(0)] | None = flag(
        None,
        "Highest learning rate.",
        "Training",
        shown=f"{USUAL.lr:g}, or what `zolr methods NAME` says; without backprop the method's",
        aliases=("learning_rate",),
    )
    schedule: Literal["constant", "linear", "cosine", "wsd"] = flag(
        "cosine",
        "Course of the rate: constant, linear, cosine, or wsd: constant, then linear over the last --decay.",
        "Training",
    )
    warmup: Annotated[int, Ge(0)] = flag(0, "Steps in which the rate rises from zero.", "Training")
    decay: Annotated[float, Gt(0), Lt(1)] = flag(0.2, "Share of the steps in which wsd falls.", "Training")
    floor: Annotated[float, Ge(0), Lt(1)] = flag(
        0.0, "Share of the highest rate that the schedule ends at.", "Training"
    )
    weight_decay: Annotated[float, Ge(0)] = flag(0.0, "Decoupled decay of the matrices.", "Training")
    clip: Annotated[float, Gt(0)] | None = flag(
        None, "Largest norm of a gradient.", "Training", shown="no clipping"
    )
    eval_every: Annotated[int, Ge(1)] | None = flag(
        None, "Steps between evaluations.", "Training", shown="a tenth of the steps"
    )
    eval_rows: Annotated[int, Ge(1)] = flag(
        256, "Held-out rows of an evaluation, spread over all of them.", "Training"
    )
    patience: Annotated[int, Ge(1)] | None = flag(
        None,
        "Stop after so many evaluations in a row without a lower loss, and keep the weights of the lowest after the start.",
        "Training",
        shown="never; the last weights are kept",
        aliases=("early_stopping_patience",),
    )
    seed: Seed = flag(0, "Seed of the weights, of the rows of each step and of directions.", "Training")
    compute: Literal["float32", "bfloat16"] = flag(
        "float32", "Precision of matrix products; weights keep --dtype, losses are float32.", "Memory"
    )
    compile: bool = flag(
        False,
        "Compile the loss: recorded CUDA graphs for forward passes (zo), torch.compile elsewhere.",
        "Training",
    )
    peak_flops: Annotated[float, Gt(0)] | None = flag(
        None,
        "Operations a second that the device can do at most, to show what share is used (MFU).",
        "Output",
        shown="that of common GPUs for 16-bit products",
        saved=False,
    )


@dataclass(frozen=True)
class Pretrain(Writing, Inspection, Ranks, Machine, Thrift, Course, Composition, Text, Architecture):
    """Settings of `zolr pretrain`."""

    method: str | None = flag(None, "A row of `zolr methods`.", "Method", shown="adamw")
    paradigm: Literal["fo", "zo", "fwd"] | None = flag(
        None,
        "fo: backprop; zo: forward passes only; fwd: forward mode.",
        "Method",
        shown="fo where the method has it",
    )
    tables: Literal["full", "subspace", "frozen"] | None = flag(
        None,
        "Embeddings and head: full (trained as a whole), subspace (projected), frozen (not trained).",
        "Method",
        shown="full by backprop, else as the method has it",
    )

    @classmethod
    def gather(cls, given: dict[str, Any], config: Path | None) -> Self:
        """On resume the run's own config file stands in for the flags that are not repeated."""
        settings = cls.going_on(given, config).filled()
        numbers = [name for name in NUMBERS if name in given]
        if numbers and settings.model is not None:
            raise UsageError(
                f"--{numbers[0].replace('_', '-')} is for a model that is made from numbers, and --model {settings.model} has its "
                "own; leave one of them out"
            )
        if "vocab_size" in given and not settings.train_tokenizer:
            raise UsageError(
                "--vocab-size is of a tokenizer to learn; give --train-tokenizer, or leave it out"
            )
        if settings.resume:
            settings.check_same(resolve(cls, {}, Path(settings.output or "") / runs.CONFIG), *MAY_CHANGE)
        return settings

    def filled(self) -> Self:
        """The settings with every number that depends on others, and checked as far as names go."""
        if not self.data:
            raise UsageError("nothing to train on; give --data FILE or --data FOLDER")
        if self.tokenizer and self.train_tokenizer:
            raise UsageError("--tokenizer and --train-tokenizer exclude each other; give one of them")
        if self.hidden_size % self.heads:
            raise UsageError(
                f"--hidden-size {self.hidden_size} cannot be divided among {self.heads} heads; change --heads"
            )
        if self.objective == "clm" and self.model is None and self.hidden_size // self.heads % 2:
            raise UsageError(
                f"--hidden-size {self.hidden_size} with {self.heads} heads is {self.hidden_size // self.heads} a head, and rotary "
                "positions turn pairs; change --heads or --hidden-size"
            )
        if self.documents == "apart" and self.objective == "mlm":
            raise UsageError("--documents apart is for causal models; use --objective clm, or leave it out")
        if self.warmup >= self.steps:
            raise UsageError(f"--warmup {self.warmup} leaves none of {self.steps} steps; use less")
        method = self.composed()
        self.check_used(method, self.clip)
        if self.checkpointing and method.paradigm != "fo":
            raise UsageError(
                f"--checkpointing is for backprop; paradigm '{method.paradigm}' saves no activations, leave it out"
            )
        if self.memory_budget is not None:
            bytes_of(self.memory_budget, "--memory-budget")
        name, lr, scale = self.method or "adamw", self.lr, self.scale
        whole = self.tables is None and method.paradigm == "fo"
        tables = "full" if whole else self.tables
        transport = self.transport
        if method.paradigm == "fo":
            rate = rate_of(name)
            transport = transport or (rate.transport if method.refresh_every else None)
            lr = rate.lr if lr is None else lr
            scale = rate.scale if scale is None and tables == "full" else scale
        return replace(
            self,
            tables=tables,
            scale=scale,
            transport=transport,
            method=name,
            paradigm=method.paradigm,
            probes=self.probes or self.all_probes,
            lr=lr,
            **({} if self.memory_budget else self._size(checkpointing=self.checkpointing or False)),
            eval_every=self.eval_every or max(1, self.steps // 10),
        )

    def _size(self, **more: Any) -> dict[str, Any]:
        return {"batch_size": self.micro, "accumulate": self.parts, **more}

    @property
    def split(self) -> tuple[int, int]:
        """Rows of a forward pass, and batches of a step."""
        return self.micro, self.parts

    @property
    def micro(self) -> int:
        """Rows of a forward pass."""
        return self.batch_size or BATCH_SIZE

    @property
    def parts(self) -> int:
        """Batches of a step."""
        return self.accumulate or 1

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.micro * self.parts

    @property
    def selection(self) -> str:
        """Which weights are trained: as given, else as the method has it."""
        from zolr.methods import METHODS

        return self.train or METHODS[self.method or "adamw"].trained(
            self.paradigm or self.composed().paradigm
        )

    def composed(self) -> Method:
        """The method these settings describe."""
        from zolr.methods import METHODS, compose

        if self.method in METHODS and METHODS[self.method].adapter is not None:
            raise UsageError(
                f"method '{self.method}' trains an adapter beside weights that stay as they are, which is for "
                "zolr finetune; use another --method here"
            )
        parts = {f: getattr(self, f) for f in PARTS}
        name, paradigm = self.method or "adamw", self.paradigm
        if paradigm is None and name in METHODS and "fo" in METHODS[name].paradigms:
            paradigm = "fo"  # forward passes alone do not teach an untrained model
        return compose(name, paradigm, **parts)


def run(settings: Pretrain) -> None:
    """Train a language model on plain text, from random weights or from a checkpoint."""
    from zolr.cli.screen import console

    with teamed(settings, settings.device, toml(settings)) as team:
        shown = console(settings.quiet or not team.first)
        with noting(partial(shown.print, markup=False)):
            _run(settings, team, shown)


def _run(settings: Pretrain, team: Team, shown: Console) -> None:
    from zolr.cli.pretraining import Pretraining

    folder = Path(settings.output) if settings.output else runs.free_folder("pretrain")
    folder = Path(team.told(str(folder)))
    done = settings.left(folder, shown) if team.first else None
    if team.largest(done is not None):
        shown.print(done or "", markup=False)
        if team.first:
            _present(runs.read_json(folder / runs.RESULT), settings, folder)
        return
    with runs.claimed_by_first(
        folder, team, overwrite=settings.overwrite, resume=bool(settings.resume)
    ) as place:
        try:
            result = Pretraining(settings, place, team, shown).train()
        except NonFiniteError:
            raise
        except BaseException:  # an interruption too: with no step done there is nothing to go on with
            place.discard()
            raise
    if team.first:
        _present(result, settings, folder)


def _present(result: dict[str, Any], settings: Pretrain, folder: Path) -> None:
    """The result for people or for programs."""
    if settings.json:
        print(json.dumps({**result, "folder": str(folder)}, indent=2))
        return
    from rich.console import Console

    from zolr.cli.screen import size, table

    columns = [
        "loss before",
        "after",
        "steps",
        "tokens",
        "tokens/s",
        "worst step / median",
        "peak",
        "predicted",
    ]
    row = [result[key] for key in ("before", "after", "steps", "tokens_seen")]
    row += [
        round(result["speed"]["tokens_per_second"]),
        _worst(result["step_seconds"]),
        size(result["peak_bytes_measured"]),
        size(result["peak_bytes_predicted"]),
    ]
    title = f"{result['model']}, {result['parameters']:,} parameters, {result['method']} {result['paradigm']}"
    out = Console(highlight=False)
    out.print(table(title, columns, [row]))
    out.print(f"run folder: {folder}")


def _worst(seconds: Mapping[str, Any]) -> str:
    """The slowest step for a person."""
    return f"{seconds['worst_over_median']:.2f}" if seconds["timed"] else "-"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add(app, "pretrain", Pretrain, run)
