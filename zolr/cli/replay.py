"""`zolr replay`: the weights of a run made again from its base model and its journal, without data or a forward pass."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from annotated_types import Ge

from zolr.cli import runs
from zolr.cli.config import Settings, add, flag, resolve
from zolr.errors import DataError, UsageError, ZolrError

if TYPE_CHECKING:
    from torch import device, nn

    from zolr.cli.finetune import Finetune
    from zolr.engine import Engine
    from zolr.journal import Read

# settings of a run that its steps depend on, apart from the base model and the rate
KEPT = (
    "method", "paradigm", "seed", "dtype", "weight_decay", "clip", "realization", "hold", "quantize", "shard",
)  # fmt: skip

PROMISES = {
    True: "on every machine that draws these subspaces (their hashes were compared)",
    False: "on the machine class and torch version of the run",
}


@dataclass(frozen=True)
class Replay(Settings):
    """Settings of `zolr replay`."""

    source: str | None = flag(None, "Run folder, or a journal.", "Model", argument=True)
    base: str | None = flag(None, "The model that the run began with.", "Model", shown="as the run has it")
    to: Annotated[int, Ge(0)] | None = flag(
        None, "Step whose weights are wanted.", "Run", shown="the one that the run kept, else the last"
    )
    output: str | None = flag(
        None, "Folder for the model, as plain transformers load it.", "Output", shown="none: verify only"
    )
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.", "Memory")
    threads: Annotated[int, Ge(1)] | None = flag(None, "CPU threads.", "Memory", shown="torch's choice")
    trust_remote_code: bool = flag(False, "Run Python code that comes with the base model.", "Model")
    json: bool = flag(False, "Print JSON.", "Output")
    quiet: bool = flag(False, "Print nothing but the result and errors.", "Output")


def run(settings: Replay) -> None:
    """Make the weights of a run without backprop again from its base model and its journal."""
    from zolr.cli.screen import console
    from zolr.cli.workload import device_of, set_threads
    from zolr.journal import NAME, described, read, replay

    if settings.source is None:
        raise UsageError("nothing to replay; give a run folder, or a journal with --base MODEL")
    set_threads(settings.threads)
    on, shown = device_of(settings.device), console(settings.quiet)
    source = Path(settings.source)
    path = source / NAME if source.is_dir() else source
    if source.is_dir() and not path.exists():
        raise DataError(runs.without_journal(source))
    found = read(path)
    to = settings.to if settings.to is not None else kept_step(source, found)
    if settings.output is not None:
        runs.check_free(Path(settings.output), overwrite=False, resume=False, way_out="")
    if (why := found.header.get("unrepeatable")) is not None:
        raise UsageError(f"this journal cannot be replayed: {why}")
    made = Rebuilt(found.header, settings.base, on, settings.trust_remote_code)
    if found.torn:
        shown.print(f"note: a torn last line of {path} is left out; it has {found.steps} steps", markup=False)
    first = described(made.engine)
    compared = replay(made.engine, found, to)
    promise = PROMISES[made.engine.portable]
    result = {"steps": to, "of": found.steps, "hashes_compared": compared, "promise": promise, **first}
    if settings.output is not None:
        made.write(Path(settings.output), source if source.is_dir() else None)
        result["folder"] = settings.output
    if settings.json:
        print(runs.as_json(result))
        return
    print(
        f"{made_again(to, found.steps)}, {compared} hashes of weights and state compared; bit for bit {promise}"
    )
    if settings.output is not None:
        print(f"model: {settings.output}")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add(app, "replay", Replay, run, config=False)


def made_again(to: int, steps: int) -> str:
    """Which steps were made again."""
    if to == 0:
        return f"none of {steps} steps made again: the weights before the first"
    return f"steps 1 to {to} of {steps} made again"


def kept_step(source: Path, found: Read) -> int:
    """The step whose weights a run kept; the last one where nothing says so."""
    kept = found.header.get("kept")
    if source.is_dir() and (source / runs.RESULT).is_file():
        kept = runs.read_json(source / runs.RESULT).get("kept_step")
    return kept if isinstance(kept, int) else found.steps


def about(
    verb: str,
    settings: Any,
    model: nn.Module,
    lr: float | None,
    classes: tuple[str, ...] | None = None,
    built: bool = False,
    task: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the journal of a run says of it, enough to build its engine again.

    Args:
        settings: of the verb.
        lr: what the engine was given.
        classes: of a model with a classification head.
        built: the model has random weights, drawn from the seed; its numbers are kept.
        task: as `task.json` has it, where the run has one.
    """
    import torch

    from zolr.cli.choices import PARTS

    kept = {name: getattr(settings, name, None) for name in (*KEPT, *PARTS)}
    kept |= {"train": settings.selection, "hold_rank": getattr(settings, "hold_rank", None)}
    config: Any = model.config
    return {
        "verb": verb,
        "model": None if built else settings.model,
        "config": json.loads(config.to_json_string()) if built else None,
        "classes": classes,
        "task": task,
        "rate": lr,
        "settings": {name: value for name, value in kept.items() if value is not None},
        # a resumed run that differs in these goes another way from there on
        "course": {
            name: getattr(settings, name, None) for name in ("steps", "schedule", "warmup", "decay", "lr")
        },
        "torch": torch.__version__,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


class Rebuilt:
    """A model and its engine as they were before the first step of a run.

    Args:
        header: of the run's journal.
        base: the model, instead of the one that the header names.
        on: where it is.
        trust: run Python code that comes with the model.

    Raises:
        DataError: the header does not describe a run.
        UsageError: the model cannot be loaded, or no model is named.
    """

    def __init__(self, header: Mapping[str, Any], base: str | None, on: device, trust: bool = False) -> None:
        from zolr.cli.finetune import Finetune

        try:
            self.settings: Finetune = resolve(Finetune, dict(header["settings"]))
            self._header, self.base = header, base or header["model"]
            self.engine = self._begin(on, trust)
        except ZolrError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"the journal does not describe its run: {type(error).__name__}: {error}"
            ) from error

    def _begin(self, on: device, trust: bool) -> Engine:
        import torch

        from zolr import lora, models
        from zolr.cli.workload import classifies, noted
        from zolr.engine import Engine

        settings, header = self.settings, self._header
        classes = header["classes"]
        common: dict[str, Any] = dict(dtype=getattr(torch, settings.dtype), device=on, seed=settings.seed)
        if self.base is None and header["config"] is None:
            raise UsageError("the journal does not name the model that the run began with; give --base MODEL")
        if self.base is None:
            from transformers import AutoConfig

            numbers = dict(header["config"])
            self.model: nn.Module = models.build(
                AutoConfig.for_model(numbers.pop("model_type"), **numbers), **common
            )
            self.tokenizer = None
        else:
            with noted():
                self.model = models.load_model(
                    self.base,
                    kind="classes" if classes else "lm",
                    num_labels=len(classes) if classes else None,
                    quantize=settings.quantize,
                    trust_remote_code=trust,
                    **common,
                )
            self.tokenizer = models.load_tokenizer(self.base, trust_remote_code=trust)
        if classes:
            classifies(self.model, classes, self.tokenizer)
        self.own = own_modules(self.model) if classes else []
        self.wrapped: Any = settings.adapter and lora.wrap(
            self.model, settings.adapter, classifier=bool(classes), seed=settings.seed
        )
        return Engine(
            self.model,
            settings.composed(),
            lr=header["rate"],
            loss=_none,
            select=settings.selection if settings.adapter is None else lora.trained,
            seed=settings.seed,
            weight_decay=settings.weight_decay,
            clip=settings.clip,
            realization=settings.realized,
            hold=(lambda name, _: not any(name.startswith(f"{own}.") for own in self.own))
            if settings.holds
            else False,
            hold_rank=settings.held_rank,
        )

    def write(self, folder: Path, run: Path | None = None) -> None:
        """Write the model as it is now, and what it was trained for; the engine has ended then.

        Args:
            run: folder of the run, which knows more than its journal.
        """
        from zolr import adapters, lora, sharded

        def fill(aside: Path) -> None:
            told = self._header["task"]
            if run is not None and (run / runs.TASK).is_file():
                told = runs.read_json(run / runs.TASK)
            if told is not None:
                runs.write_json(aside / runs.TASK, told)
            if told is not None and run is not None and (run / runs.CONFIG).is_file():
                shutil.copyfile(run / runs.CONFIG, aside / runs.CONFIG)
            if self.tokenizer is None and run is not None:
                self.tokenizer = _tokenizer_of(run)
            if self.settings.shard:
                shards = sharded.save(aside / runs.SHARDS, self.engine)
                runs.write_sharded(aside, shards, self.model, self.tokenizer)
                return
            if self.settings.holds:
                adapters.write(aside, self.model, self.engine.variables, str(self.base), keep=self.own)
                runs.write_tokenizer(aside, self.tokenizer)
                return
            model = self.engine.detach()
            if self.wrapped is not None:
                model = lora.merged(self.wrapped)
            runs.write_model(aside, model, self.tokenizer)

        with runs.claimed(folder, overwrite=False, resume=False) as place:
            place.complete(fill)


def _tokenizer_of(run: Path) -> Any:
    """The tokenizer that a run has made, if it is done."""
    from zolr.models import load_tokenizer

    return load_tokenizer(str(run)) if (run / "tokenizer_config.json").is_file() else None


def own_modules(model: nn.Module) -> list[str]:
    """Modules that a classifier has beside its base model, and those of the base that its checkpoint holds nothing of."""
    from zolr.models import fresh_modules

    base = getattr(model, "base_model", None)
    beside = [
        name
        for name, module in model.named_children()
        if module is not base and next(module.parameters(), None) is not None
    ]
    return beside + [name for name in fresh_modules(model) if name.split(".")[0] not in beside]


def _none(model: Any, batch: Any) -> Any:
    raise AssertionError("a replay computes no loss")
