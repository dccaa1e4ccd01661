"""`zolr pretrain`: train a language model on plain text, from random weights or from a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import cos, exp, pi
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import typer
from annotated_types import Ge, Gt, Lt

from zolr.cli import noting, runs
from zolr.cli.architectures import check_apart, check_ids, check_length, model_of
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
from zolr.cli.choices import PARTS, Composition, Inspection, Seed, Thrift, Writing
from zolr.cli.config import Settings, add, as_dict, flag, resolve, toml
from zolr.cli.corpus import TOKENIZER, files_of, streams_of, tokenizer_of
from zolr.cli.rates import USUAL, rate_of
from zolr.cli.workload import Machine, Ranks, Trust, teamed
from zolr.errors import NonFiniteError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, device, nn

    from zolr.distributed import Team
    from zolr.memory import Prediction
    from zolr.methods import Method

# on --resume; the text may have moved, what it says is compared
MAY_CHANGE = ("eval_every", "save_every", "eval_rows", "memory_budget", "data", "held_out", "workers")
NUMBERS = ("hidden_size", "layers", "heads", "ffn_size")  # what a model without a name is made from
CHUNK_ENTRIES = 1 << 21  # logits alive at once on a CPU: 8 MiB stay in its cache, and more is slower
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
            result = pretrain(settings, place, shown, team)
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


def pretrain(
    settings: Pretrain, place: runs.RunFolder, shown: Any, team: Team | None = None
) -> dict[str, Any]:
    """Train, complete the run folder, and return what is in its `result.json`.

    Args:
        settings: what to do.
        place: the claimed run folder.
        shown: a rich console.
        team: the processes of the run; None for this one alone.
    """
    import torch

    from zolr.cli import record
    from zolr.cli.replay import about
    from zolr.cli.screen import watching
    from zolr.cli.throughput import Throughput, Timed, flops_of_a_forward, peak_flops
    from zolr.cli.workload import device_of, set_threads
    from zolr.distributed import Share, Team
    from zolr.engine import Engine
    from zolr.estimators import mean_of, parts_of
    from zolr.memory import resident
    from zolr.methods import METHODS
    from zolr.models import checkpoint_activations, splits
    from zolr.tasks.streams import IGNORED, ahead
    from zolr.training import train

    team = team or Team()
    set_threads(settings.threads)
    on = device_of(settings.device)
    train_files, valid_files = files_of(settings)
    if team.first and not settings.resume:
        # from now on --resume knows the folder, should this process be killed
        runs.write_text(place.work / runs.CONFIG, toml(settings))
    with team.in_turn():
        tokenizer = tokenizer_of(settings, place.work, train_files)
    model: Any = model_of(settings, tokenizer).to(on)
    check_length(settings, model)
    if settings.documents == "apart":
        check_apart(model)
    peaks: dict[Pretrain, int] = {}
    settings = _within_budget(settings, model, on, shown, peaks)
    checkpoint_activations(model, settings.checkpointing or False)
    with team.in_turn():
        stream, valid, origins = streams_of(settings, place.work, tokenizer, train_files, valid_files, shown)
    check_ids(model, origins)
    method = settings.composed()
    rows = settings.rows
    parameters = sum(p.numel() for p in model.parameters())
    flops = flops_of_a_forward(model, settings.length)

    def batches(step: int) -> list[dict[str, Tensor]]:
        batch = stream.batch(step)
        size = settings.micro
        parts = [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, rows, size)]
        if settings.objective == "mlm":
            for part in parts:  # the head, the dearest layer of a small model, need not see the other 85 %
                part["counted"] = (part["labels"].flatten() != IGNORED).nonzero()[:, 0]
        return parts

    loss = _loss(settings, model, on)
    engine = Engine(
        model,
        method,
        lr=settings.lr
        if settings.lr is not None
        else METHODS[settings.method or "adamw"].lr.get(method.paradigm),
        loss=_objective(settings, model, on),
        select=settings.selection,
        seed=settings.seed,
        weight_decay=settings.weight_decay,
        schedule=schedule(settings),
        clip=settings.clip,
        realization=settings.realization,
        compile=settings.compile,
        undo=settings.undo,
        # families whose forward we know need no proof that the coordinates reach the loss; it costs a pass per weight
        check=None if splits(model) else {name: part.to(on) for name, part in batches(0)[0].items()},
        team=team,
    )
    if settings.parts < team.size and team.spread == "batches":
        shown.print(
            f"note: the {settings.parts} batches of a step keep {settings.parts} of {team.size} ranks busy; give "
            f"--accumulate {team.size}, and a smaller --batch-size for as many rows",
            markup=False,
        )
    shown.print(
        f"{stream.tokens:,} tokens to train on, {valid.tokens:,} held out, vocabulary {len(tokenizer):,}\n"
        f"{type(model).__name__} ({parameters:,} parameters, {engine.trained_share:.1%} trained): method {settings.method}, "
        f"paradigm {method.paradigm}, {settings.steps:,} steps of {rows * settings.length:,} tokens, "
        f"{settings.steps * rows / stream.rows:.2f} epochs",
        markup=False,
    )

    def evaluate() -> dict[str, float]:
        share = Share(list(valid.evaluation(settings.eval_rows)), team, device=on)
        training = model.training
        model.eval()
        with torch.no_grad():
            parts = parts_of(
                lambda batch: loss(model, {key: value.to(on) for key, value in batch.items()}), share
            )
        model.train(training)
        mean = float(mean_of(share, parts))
        return {"loss": mean, "perplexity": exp(min(mean, 700.0))}

    meter = record.Meter(engine, on, place.path if settings.resume else None)
    low = settings.compute == "bfloat16" or settings.dtype != "float32"
    speed = Throughput(flops, peak_flops(on, low, settings.peak_flops))
    if team.first:
        runs.write_text(place.work / runs.CONFIG, toml(settings))
    with (
        watching(shown, lambda: resident(on), 0, settings.steps, speed.line) as screen,
        ahead(batches, settings.workers, settings.steps) as made,
        _advised(settings, model, on, peaks),
        meter.kept(place.work, team.first),
    ):
        outcome = train(
            engine,
            made,
            steps=settings.steps,
            evaluate=evaluate,
            eval_every=settings.eval_every or 0,
            metric="loss",
            # the last weights, where nobody asked: a schedule that ends at zero leaves the best ones there
            best="min" if settings.patience else None,
            patience=settings.patience,
            folder=place.work,
            save_every=settings.save_every or max(1, settings.steps // 20),
            keep_last=settings.keep_last,
            resume=settings.resumed_from,
            about=about(
                "pretrain",
                settings,
                model,
                engine.base_lr,
                built=settings.model is None or _builds(settings.model),
            ),
            device=on,
            meter=meter,
            reporter=Timed(screen, speed, lambda: meter.counting),
            check_every=settings.check_every,
            observer=settings.observer(engine, batches(0)[0]),
        )

    progress = outcome.progress
    budget = None if settings.memory_budget is None else bytes_of(settings.memory_budget, "--memory-budget")
    if budget is not None and (over := verdict(budget, meter.peak or None, meter.counter)):
        shown.print(over, markup=False)
    result = {
        "verb": "pretrain",
        "method": settings.method,
        "paradigm": method.paradigm,
        "model": type(model).__name__,
        "parameters": parameters,
        "trained_share": engine.trained_share,
        "metric": "loss",
        "before": outcome.before["loss"],
        "after": outcome.after["loss"],
        "steps": progress.step,
        "kept_step": outcome.kept_step,
        "stopped_early": outcome.stopped_early,
        "skipped": progress.skipped,
        "forwards": progress.forwards,
        "tokens": progress.tokens,
        "tokens_seen": progress.step * rows * settings.length,
        "seconds": round(progress.seconds, 3),
        "speed": speed.rates(progress),
        "step_seconds": speed.steps(),
        "peak_bytes_predicted": _predicted(settings, model, on, shown, peaks),
        "peak_bytes_measured": meter.peak or None,
        **record.within(budget, meter.peak or None),
        "lr": engine.base_lr,
        "rows": {"train": stream.rows, "held_out": valid.rows},
        "evaluated_tokens": len(valid.evaluated(settings.eval_rows)) * settings.length,
        "data": origins,
        "metrics": {"held_out": {"before": outcome.before, "after": outcome.after}},
        **record.exchanged(engine),
        "settings": as_dict(settings),
        "versions": record.versions(),
    }
    if not team.first:
        return result
    if "ranks" in result:
        shown.print(record.said(result["ranks"]), markup=False)
    memory = {
        "peak_bytes_predicted": result["peak_bytes_predicted"],
        "peak_bytes_measured": result["peak_bytes_measured"],
        "counter": meter.counter,
        "process_bytes": resident("cpu").peak,
        "dtype": settings.dtype,
        "compute": settings.compute,
        "device": str(on),
        "batch": list(meter.shape),
        "attention": getattr(model.config, "_attn_implementation", None),
    }

    def fill(folder: Path) -> None:
        runs.write_model(folder, engine.detach(), tokenizer)
        runs.write_text(folder / runs.CONFIG, toml(settings))
        runs.write_json(folder / runs.MEMORY, memory)
        runs.write_text(folder / runs.CARD, card(settings, result))
        runs.write_json(folder / runs.RESULT, result)

    shutil.rmtree(place.work / TOKENIZER, ignore_errors=True)
    place.complete(fill)
    if settings.save_every is None:  # they guarded the run; asked for, they stay
        shutil.rmtree(place.path / runs.CHECKPOINTS, ignore_errors=True)
    return result


@contextmanager
def _advised(settings: Pretrain, model: Any, on: device, known: dict[Pretrain, int]) -> Iterator[None]:
    """Say what would fit where a step runs out of memory."""
    try:
        yield
    except BaseException as error:
        if not is_out_of_memory(error):
            raise
        asked, chosen = _ways(settings)
        peak = lambda way: _peak(chosen(way), model, on, known)  # noqa: E731
        raise advice(peak, asked, settings.paradigm or "fo", memory_there(on.type), error) from error


def _builds(model: str) -> bool:
    """Whether a model has random weights."""
    from zolr.models import PRESETS

    return model in PRESETS or model.endswith(".json")


def schedule(settings: Pretrain) -> Callable[[int], float]:
    """The factor on the learning rate at each step: a linear rise, then what `settings.schedule` names.

    `wsd` up to the step where it begins to fall does not depend on `steps`: a run may be stopped, and resumed with
    another number of steps, as if that number had been given from the beginning.

    Reference: Hu et al., MiniCPM (2024), for wsd.
    """
    steps, warmup, floor = settings.steps, settings.warmup, settings.floor

    def course(step: int) -> float:
        share = min(1.0, (step - warmup) / max(1, steps - warmup))
        if settings.schedule == "linear":
            return 1.0 - share
        if settings.schedule == "cosine":
            return 0.5 * (1.0 + cos(pi * share))
        if settings.schedule == "wsd":
            return min(1.0, (steps - step) / max(1.0, settings.decay * steps))
        return 1.0

    def factor(step: int) -> float:
        return (step + 1) / (warmup + 1) if step < warmup else floor + (1.0 - floor) * course(step)

    return factor


def chunk_rows(model: Any) -> int:
    """Tokens whose logits are alive at once on a CPU.

    Logits that fit into its cache are fastest, unless the head's gradient, of which each chunk makes one, is much larger.
    """
    config = model.config.get_text_config()
    return max(64, CHUNK_ENTRIES // config.vocab_size, config.hidden_size // 4)


def _loss(settings: Pretrain, model: nn.Module, on: device, at: str | None = None) -> Callable[..., Any]:
    """The loss of a batch of rows.

    Args:
        on: where the run is, by which the chunks are chosen.
        at: type of the device that computes, where that is another: predictions run on the host.
    """
    import torch

    from zolr.models import lm_loss

    chunk = chunk_rows(model) if on.type == "cpu" else None
    low, kind = settings.compute == "bfloat16", at or on.type

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.autocast(kind, torch.bfloat16, enabled=low):
            return lm_loss(model, batch, chunk=chunk)

    return loss


def _objective(settings: Pretrain, model: Any, on: device, at: str | None = None) -> Callable[..., Any]:
    """What training lowers: the loss of a batch, or, where a method must tell examples apart, that of each row."""
    import torch

    from zolr.models import lm_losses

    if not settings.composed().private:
        return _loss(settings, model, on, at)
    low, kind = settings.compute == "bfloat16", at or on.type

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast(kind, torch.bfloat16, enabled=low):
            return lm_losses(model, batch)

    return losses


def prediction(settings: Pretrain, config: Any, on: device, *, profile: bool = False) -> Prediction:
    """The peak of a step of a run and what it is made of; under mlm the loss is taken to see every token.

    Args:
        settings: of the run.
        config: of its model.
        on: where the run is to be; it need not be there.
        profile: as for `predict`.
    """
    import torch

    from zolr.memory import predict

    named: Any = SimpleNamespace(config=config)
    return predict(
        config,
        settings.composed(),
        batch_size=settings.micro,
        max_length=settings.length,
        dtype=getattr(torch, settings.dtype),
        objective="lm",
        loss=_objective(settings, named, on, "cpu"),
        accumulation=settings.parts,
        checkpointing=settings.checkpointing or False,
        lr=settings.lr,
        select=settings.selection,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        realization=settings.realization,
        device=on,
        dropout=None,
        profile=profile,
    )


def _peak(settings: Pretrain, model: Any, on: device, known: dict[Pretrain, int], shown: Any = None) -> int:
    """Predicted peak bytes of a step, seconds the first time."""
    from zolr.cli.screen import predicting

    if settings not in known:
        with predicting(shown, _ways(settings)[0].flags(settings.paradigm or "fo")):
            known[settings] = prediction(settings, model.config, on).peak_bytes
    return known[settings]


def _predicted(
    settings: Pretrain, model: Any, on: device, shown: Any, known: dict[Pretrain, int]
) -> int | None:
    """Peak bytes of a step as predicted without running one; None where that cannot be known."""
    try:
        return _peak(settings, model, on, known, shown)
    except Exception as error:  # an operation that fake tensors cannot run must not stop a run that works
        shown.print(f"note: no memory prediction ({type(error).__name__}: {error})", markup=False)
        return None


def _within_budget(
    settings: Pretrain, model: Any, on: device, shown: Any, known: dict[Pretrain, int]
) -> Pretrain:
    """The settings with what nobody has given chosen so that a step fits the memory budget."""
    if settings.memory_budget is None:
        return settings
    method, budget = settings.composed(), bytes_of(settings.memory_budget, "--memory-budget")
    asked, chosen = _ways(settings)
    free = {name for name in ("checkpointing", "signs") if getattr(settings, name) is None}
    if settings.batch_size is None and settings.accumulate is None:
        free |= set(SIZE)
    if settings.realization == "auto":
        free.add("realization")
    peak = lambda way: _peak(chosen(way), model, on, known, shown)  # noqa: E731
    found = plan(peak, asked, method.paradigm, free, budget)
    for line in told(found, method.paradigm, budget):
        shown.print(line, markup=False)
    return chosen(found.way)


def _ways(settings: Pretrain) -> tuple[Way, Callable[[Way], Pretrain]]:
    """The way in which the settings take a step, and the settings that take it in another one."""
    from zolr.estimators import setting

    method = settings.composed()
    signs = setting(method.estimator, "signs", "sequence")
    asked = Way(settings.micro, settings.parts, settings.checkpointing or False, signs, settings.realization)

    def chosen(way: Way) -> Pretrain:
        return replace(
            settings,
            batch_size=way.batch_size,
            accumulate=way.accumulate,
            checkpointing=way.checkpointing,
            signs=way.signs if method.paradigm == "zo" else None,
            realization=way.realization,  # pyright: ignore[reportArgumentType]
        )

    return asked, chosen


def card(settings: Pretrain, result: Mapping[str, Any]) -> str:
    """The model card."""
    from zolr.cli.screen import number

    causal = settings.objective == "clm"
    made = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'text-generation' if causal else 'fill-mask'}",
        "tags: [zolr]",
        "---",
        "",
        f"# A {'causal' if causal else 'masked'} language model of {result['parameters']:,} parameters",
        "",
        f"Trained on plain text with zolr {result['versions']['zolr']}: method `{settings.method}`, paradigm `{result['paradigm']}`.",
        "",
        "| | |",
        "|---|---|",
        f"| text | {', '.join(Path(path).name for path in settings.data)} |",
        f"| steps | {result['steps']:,} of {settings.rows} rows of {settings.length} tokens |",
        f"| tokens seen | {result['tokens_seen']:,} |",
        f"| learning rate | {number(result['lr'])}, {settings.schedule} |",
        f"| seed | {settings.seed} |",
        f"| held-out loss (nats a token) | {result['before']:.4f} before, {result['after']:.4f} after |",
        f"| made with | {made} |",
        "",
        "`config.toml` repeats the run:",
        "",
        "```",
        "zolr pretrain --config config.toml",
        "```",
    ]
    return "\n".join(lines) + "\n"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add(app, "pretrain", Pretrain, run)
