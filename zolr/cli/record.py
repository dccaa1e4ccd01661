"""What a finished run leaves: result, memory, model, task, and a card that says how it came about."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zolr.cli import runs
from zolr.cli.config import as_dict, toml
from zolr.cli.screen import number, size

if TYPE_CHECKING:
    import torch

    from zolr.cli.job import Job
    from zolr.cli.planned import Planned
    from zolr.engine import Engine
    from zolr.training import Outcome


class Meter:
    """Peak memory of a run's steps.

    On CUDA the allocator counts by itself. Elsewhere live tensors are counted, which slows a step down, so only those
    steps are counted that can set a new peak: whose padded batch is larger than any before, or as large as the largest
    for the second time (the first one may have made the optimizer's state), those before which the engine holds more than
    before any that were counted, and of those that open a new window the first, second, fourth and so on, of dense methods all.
    A first step that chooses a radius or a rate is left to the second one, where there is one.

    Args:
        engine: whose steps they are.
        device: where it is.
        folder: of the run that is gone on with, whose earlier steps count too as far as they left a `memory.json`.
        steps: of the run in all, 0 where that is not known.

    Attributes:
        counter: what is counted.
        peak: bytes at most.
        shape: rows and tokens of the batch that took them.
        counting: whether live tensors were counted in the last step, which makes it slower.
    """

    def __init__(
        self, engine: Engine, device: torch.device, folder: Path | None = None, steps: int = 0
    ) -> None:
        import torch

        self._engine, self._device, self._only = engine, device, steps == 1
        self.counter, self.shape, self._peak = "live tensors of a step", (0, 0), 0
        self.counting, self._stepped = False, False
        self._times, self._opened = 0, 0  # steps counted of the largest batch; windows opened
        self._counted: list[tuple[int, int]] = []  # tokens of a step, and bytes held before it
        # fully_shard gives memory back by emptying tensors that live on, which no count of them sees
        self._blind = any(v.sharded for v in engine.variables)
        if self._blind:
            self.counter = "not counted for weights in pieces"
        if device.type == "cuda":
            self.counter = "cuda allocated"
            torch.cuda.reset_peak_memory_stats(device)
        if folder is not None and (folder / runs.MEMORY).is_file():
            known = runs.read_json(folder / runs.MEMORY)
            if known.get("counter") == self.counter and known.get("peak_bytes_measured"):
                self._peak, (rows, tokens) = known["peak_bytes_measured"], known["batch"]
                self.shape = rows, tokens

    @property
    def peak(self) -> int:
        """Bytes at most so far."""
        if self._device.type == "cuda" and self._stepped:
            from zolr.memory import resident

            return max(self._peak, resident(self._device).peak)
        return self._peak

    @contextmanager
    def kept(self, folder: Path, writes: bool) -> Iterator[None]:
        """Write what is known so far where a run is cut short that can be gone on with.

        Args:
            folder: of the run.
            writes: whether this process is the one that writes there.
        """
        try:
            yield
        except BaseException:
            if writes and self.peak and (folder / runs.CHECKPOINTS).is_dir():
                found = {"peak_bytes_measured": self.peak, "counter": self.counter, "batch": list(self.shape)}
                with suppress(OSError):  # a full disk is reported by what was cut short
                    runs.write_json(folder / runs.MEMORY, found)
            raise

    @contextmanager
    def around(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[None]:
        """Count one step."""
        from zolr.estimators import setting

        shape = max((tuple(batch["input_ids"].shape) for batch in batches), key=lambda s: s[0] * s[1])
        tokens, most = shape[0] * shape[1], self.shape[0] * self.shape[1]
        engine, every = self._engine, self._engine.method.refresh_every
        self._stepped = True
        if self._device.type == "cuda":
            self.shape = max(shape, self.shape, key=lambda s: s[0] * s[1])
        # a first step that chooses makes many forward passes, which hold no more than the step itself does
        chooses = engine.tuning is None and (
            engine.base_lr is None or setting(engine.method.estimator, "eps", 1.0) is None
        )
        if self._device.type == "cuda" or self._blind or (chooses and not self._only):
            self.counting = False
            yield
            return
        opens = bool(every and engine.step_count and engine.step_count % every == 0)
        self._opened += opens
        # a dense method may leave other weights whole in each window, and its opening is slow anyway
        opens = opens and (engine.method.dense or self._opened & (self._opened - 1) == 0)
        held = held_bytes(engine)
        new = not any(tokens <= t and held <= h for t, h in self._counted)
        self.counting = new or (tokens == most and self._times < 2) or opens
        if not self.counting:
            yield
            return
        self._counted = [(t, h) for t, h in self._counted if t > tokens or h > held] + [(tokens, held)]
        if tokens >= most:
            self._times = 1 if tokens > most else self._times + 1
        from zolr.memory import LiveBytes

        self.shape = shape if tokens > most else self.shape
        live = LiveBytes()
        live.track(self._engine, *batches)
        with live:
            yield
        if live.peak > self._peak:
            self._peak, self.shape = live.peak, shape


def held_bytes(engine: Engine) -> int:
    """Bytes that an engine holds from step to step besides the model."""
    from zolr.memory import kept

    parts = {id(tensor): tensor for part in kept(engine).values() for tensor in part}
    return sum(tensor.numel() * tensor.element_size() for tensor in parts.values())


def within(budget: int | None, measured: int | None) -> dict[str, Any]:
    """The memory budget of a run, if it had one, and whether its measured peak kept it."""
    if budget is None:
        return {}
    return {"memory_budget_bytes": budget, "within_budget": None if measured is None else measured <= budget}


def exchanged(engine: Engine) -> dict[str, Any]:
    """What the ranks of a run sent each other, beside what all-reducing dense gradients would; nothing of one alone.

    A ring all-reduce of `b` bytes makes each of `w` ranks send `2 b (w - 1) / w`.
    """
    team = engine.team
    if team.size == 1:
        return {}
    dense = sum(v.weight.numel() * v.weight.element_size() for v in engine.variables)
    return {
        "ranks": {
            "size": team.size,
            "spread": team.spread,
            "steps": team.steps,
            "sent_bytes": dict(team.sent),
            "dense_all_reduce_bytes": 2 * dense * (team.size - 1) // team.size * team.steps,
        }
    }


def said(ranks: Mapping[str, Any]) -> str:
    """One line about `exchanged`."""
    sent, steps = ranks["sent_bytes"], max(1, ranks["steps"])
    return (
        f"{ranks['size']} ranks: each sent {size((sent['losses'] + sent['gradients']) / steps)} a step for training (losses "
        f"{size(sent['losses'])}, gradients {size(sent['gradients'])} in {steps} steps); all-reducing dense gradients would "
        f"have been {size(ranks['dense_all_reduce_bytes'] / steps)} a step"
    )


def versions(*more: str) -> dict[str, str]:
    """What the result may depend on; `more` are further packages that it used."""
    import zolr

    names = ("torch", "transformers", "datasets", "safetensors", *more)
    installed = {name: version(name) for name in names}
    return {"zolr": zolr.__version__, "python": platform.python_version(), **installed}


def course(run: Planned[Any], outcome: Outcome, meter: Meter) -> dict[str, Any]:
    """What `result.json` has of any run: how far it came, what that took, and at which rate."""
    progress = outcome.progress
    return {
        "steps": progress.step,
        "kept_step": outcome.kept_step,
        "stopped_early": outcome.stopped_early,
        "skipped": progress.skipped,
        "forwards": progress.forwards,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 3),
        "peak_bytes_predicted": run.predicted,
        "peak_bytes_measured": meter.peak or None,
        **within(run.budget, meter.peak or None),
        "lr": run.engine.base_lr,
        "trained_share": run.engine.trained_share,
        **exchanged(run.engine),
    }


def memory_of(run: Planned[Any], model: Any, meter: Meter) -> dict[str, Any]:
    """The content of `memory.json`: peaks, and what they are peaks of."""
    from zolr.memory import resident

    return {
        "peak_bytes_predicted": run.predicted,
        "peak_bytes_measured": meter.peak or None,
        "counter": meter.counter,
        "process_bytes": resident("cpu").peak,
        "dtype": run.settings.dtype,
        "device": str(run.device),
        "batch": list(meter.shape),
        "attention": getattr(model.config, "_attn_implementation", None),
    }


def close(place: runs.RunFolder, fill: Callable[[Path], None], save_every: int | None) -> None:
    """Complete a run folder.

    Args:
        fill: writes what is in it.
        save_every: steps between checkpoints that were asked for, which stay; those that guarded the run go.
    """
    from zolr.checkpoints import clear

    place.complete(fill)
    if save_every is None:
        clear(place.path / runs.CHECKPOINTS)


def result_of(
    job: Job, outcome: Outcome, before: Mapping[str, float], after: Mapping[str, float], meter: Meter
) -> dict[str, Any]:
    """The content of `result.json`."""
    from zolr.estimators import setting
    from zolr.models import CODES

    settings, metric = job.settings, job.metric
    return {
        "method": settings.method,
        "paradigm": settings.paradigm,
        "task": job.splits.name,
        "metric": metric,
        "before": before[metric],
        "after": after[metric],
        **course(job, outcome, meter),
        "tokens_seen": outcome.progress.tokens_seen,
        "eps": setting(job.engine.method.estimator, "eps"),
        "privacy": job.privacy(outcome.progress.step),
        "held": {"rank": settings.held_rank, "lost": job.engine.lost} if settings.holds else None,
        "rows": {
            "train": len(job.splits.train),
            "validation": len(job.splits.validation),
            "test": len(job.splits.test),
        },
        "metrics": {
            "test": {"before": before, "after": after},
            "validation": {"before": outcome.before, "after": outcome.after},
        },
        "settings": as_dict(settings),
        "versions": versions(
            *(["peft"] if settings.adapter else []),
            *([CODES[settings.quantize]] if settings.quantize else []),
        ),
    }


def complete(job: Job, place: runs.RunFolder, result: dict[str, Any], meter: Meter) -> None:
    """Put everything into the run folder; `result.json` is the last to appear."""
    from zolr import adapters, lora

    settings, work = job.settings, job.work
    memory = memory_of(job, work.model, meter) | {"model": settings.model, "quantize": settings.quantize}
    task = job.told_task

    def fill(folder: Path) -> None:
        if settings.shard:
            runs.write_sharded(folder, place.work / runs.SHARDS, work.model, work.tokenizer)
        elif settings.holds:
            adapters.write(folder, work.model, job.engine.variables, settings.model, keep=job.own_modules)
            runs.write_tokenizer(folder, work.tokenizer)
        else:
            model = job.engine.detach()  # the run is over, so no copy has to be made
            if work.wrapped is not None:
                lora.save(work.wrapped, folder / runs.ADAPTER)
                work.model = model = lora.merged(work.wrapped)
            runs.write_model(folder, model, work.tokenizer)
        runs.write_text(folder / runs.CONFIG, toml(settings))
        runs.write_json(folder / runs.TASK, task)
        runs.write_json(folder / runs.MEMORY, memory)
        runs.write_text(folder / runs.CARD, card(job, result, memory))
        runs.write_json(folder / runs.RESULT, result)

    close(place, fill, settings.save_every)


def card(job: Job, result: Mapping[str, Any], memory: Mapping[str, Any]) -> str:
    """The model card."""
    from zolr.adapters import absolute

    s, work, metric = job.settings, job.work, result["metric"]
    method = job.engine.method
    pipeline = {"classes": "text-classification"}.get(
        s.head, "fill-mask" if _is_masked(job) else "text-generation"
    )
    template = work.task.template if _is_masked(job) else work.task.causal_template
    reading = (
        f"template: `{template}`, label words: {', '.join(work.task.words)}"
        if s.head == "prompt"
        else "classification head"
    )
    lines = [
        "---",
        *(
            ["library_name: peft", f"base_model: {absolute(s.model)}"]
            if s.holds and not s.shard
            else ["library_name: transformers"]
        ),
        f"pipeline_tag: {pipeline}",
        "tags: [zolr]",
        "---",
        "",
        f"# {Path(s.model).name} fine-tuned on {job.splits.name}",
        "",
        f"Trained with zolr {result['versions']['zolr']}: method `{s.method}`, paradigm `{s.paradigm}`.",
        "",
        "| | |",
        "|---|---|",
        f"| task | {job.splits.name}: {', '.join(work.task.classes)} |",
        f"| data | {result['rows']['train']} training rows from {Path(job.splits.source).name}, data seed {s.data_seed} |",
        f"| reading | {reading} |",
        f"| adapter | `{s.adapter}`, also in `adapter/` in the format of peft |"
        if s.adapter
        else f"| projector | `{method.projector}` |",
        f"| optimizer | `{method.optimizer.name}`, lr {number(result['lr'])}, eps {number(result['eps'])} |",
        f"| seed | {s.seed} |",
        f"| steps | {result['steps']} of {job.step_size} examples, weights of step {result['kept_step']} |",
        f"| forward passes, tokens through them | {result['forwards']:,}, {result['tokens']:,} |",
        f"| {metric} on {result['rows']['test']} test rows, before | {result['before']:.4f} |",
        f"| {metric} on {result['rows']['test']} test rows, after | {result['after']:.4f} |",
        f"| peak memory, measured ({memory['counter']}, {memory['dtype']}{_batch(memory)}) "
        f"| {size(memory['peak_bytes_measured'])} |",
        f"| peak memory, predicted | {size(memory['peak_bytes_predicted'])} |",
        *_held_lines(job, result),
        "",
        "`zolr predict` labels texts with this folder; `config.toml` "
        + (
            "trains as many steps, at a rate that does not follow the clock:"
            if job.by_clock
            else "repeats the run:"
        ),
        "",
        "```",
        "zolr finetune --config config.toml",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _batch(memory: Mapping[str, Any]) -> str:
    """The batch that took the peak, where one was measured."""
    rows, tokens = memory["batch"]
    return f", batch {rows} x {tokens}" if memory["peak_bytes_measured"] else ""


def _held_lines(job: Job, result: Mapping[str, Any]) -> list[str]:
    """How to put an adapter and its base together again."""
    from zolr.adapters import absolute

    s, base = job.settings, absolute(job.settings.model)
    if not s.holds:
        return []
    if s.shard:
        lost = f"{result['held']['lost']:.2%}"
        return [
            f"| sharded | changes of rank {s.held_rank} at most beside weights that were not written; {lost} of their squared norm dropped |"
        ]
    lines = [
        f"| base | `{base}`, {s.quantize or s.dtype}, not written |",
        f"| adapter | rank {s.held_rank} at most, {result['held']['lost']:.2%} of the squared norm of the change dropped |",
        "",
        f"A LoRA adapter: load `{base}` with transformers, then `peft.PeftModel.from_pretrained(model, folder)`.",
    ]
    if any(v.stack is not None and len(v.sites) > 1 for v in job.engine.variables):
        lines += [
            "It changes a weight that is tied to another one at both places. Use it unmerged: `merge_and_unload` adds both to the one",
            "weight that there is, unless the base is untied first.",
        ]
    if s.quantize:
        lines += [
            f"It was trained beside {s.quantize} codes. `zolr.models.load_model(folder, quantize='{s.quantize}')` loads",
            "both; outputs beside other codes, or plain weights, differ by what these differ by.",
        ]
    return lines


def _is_masked(job: Job) -> bool:
    from zolr.models import is_masked

    return is_masked(job.work.model)
