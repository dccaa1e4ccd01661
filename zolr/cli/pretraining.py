"""One pretraining run: tokens, model and engine made from its settings, then trained, measured and written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from math import cos, exp, pi
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from zolr.cli import record, runs
from zolr.cli.architectures import check_apart, check_ids, check_length, model_of
from zolr.cli.budget import is_out_of_memory
from zolr.cli.config import as_dict, toml
from zolr.cli.corpus import files_of, kept_if_used, streams_of, tokenizer_of
from zolr.cli.planned import Planned
from zolr.cli.pretrain import Pretrain

if TYPE_CHECKING:
    from torch import Tensor, device, nn

    from zolr.distributed import Team
    from zolr.engine import Engine
    from zolr.memory import Prediction
    from zolr.training import Outcome

CHUNK_ENTRIES = 1 << 21  # logits alive at once on a CPU: 8 MiB stay in its cache, and more is slower


class Pretraining(Planned[Pretrain]):
    """One pretraining run, loaded and ready to go.

    Args:
        settings: what to do.
        place: the claimed run folder.
        team: the processes of the run.
        shown: a rich console.
    """

    def __init__(self, settings: Pretrain, place: runs.RunFolder, team: Team, shown: Any) -> None:
        from zolr.cli.throughput import Throughput, flops_of_a_forward, peak_flops
        from zolr.cli.workload import device_of, set_threads
        from zolr.models import checkpoint_activations

        super().__init__(shown)
        self.settings, self.place, self.team = settings, place, team
        set_threads(settings.threads)
        self.device = device_of(settings.device)
        train_files, valid_files = files_of(settings)
        if team.first and not settings.resume:
            # from now on --resume knows the folder, should this process be killed
            runs.write_text(place.work / runs.CONFIG, toml(settings))
        with kept_if_used(place.work, team.first):
            with team.in_turn():
                self.tokenizer = tokenizer_of(settings, place.work, train_files)
            self.model: Any = model_of(settings, self.tokenizer).to(self.device)
            check_length(settings, self.model)
            if settings.documents == "apart":
                check_apart(self.model)
            self.settings = settings = self.within_budget(settings)
            checkpoint_activations(self.model, settings.checkpointing or False)
            with team.in_turn():
                self.stream, self.valid, self.origins = streams_of(
                    settings, place.work, self.tokenizer, train_files, valid_files, shown
                )
        check_ids(self.model, self.origins)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        low = settings.compute == "bfloat16" or settings.dtype != "float32"
        flops = flops_of_a_forward(self.model, settings.length)
        self.speed = Throughput(flops, peak_flops(self.device, low, settings.peak_flops))
        self.engine = self._new_engine()

    def _new_engine(self) -> Engine:
        from zolr.engine import Engine
        from zolr.methods import METHODS
        from zolr.models import splits

        settings, model = self.settings, self.model
        method = settings.composed()
        usual = METHODS[settings.method or "adamw"].lr.get(method.paradigm)
        # families whose forward we know need no proof that the coordinates reach the loss; it costs a pass per weight
        check = None if splits(model) else self._moved(self.batches(0)[0])
        return Engine(
            model,
            method,
            lr=usual if settings.lr is None else settings.lr,
            loss=objective_of(settings, model, self.device),
            select=settings.selection,
            seed=settings.seed,
            weight_decay=settings.weight_decay,
            schedule=schedule(settings),
            clip=settings.clip,
            realization=settings.realization,
            compile=settings.compile,
            undo=settings.undo,
            check=check,
            team=self.team,
        )

    def note(self, line: str) -> None:
        """Tell who runs this."""
        self._shown.print(line, markup=False)

    def foretell(self, settings: Pretrain) -> int:
        """Peak bytes of a step; under mlm the loss is taken to see every token."""
        return prediction(settings, self.model.config, self.device).peak_bytes

    def _moved(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: part.to(self.device) for name, part in batch.items()}

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """The micro-batches of a step."""
        from zolr.tasks.streams import IGNORED

        batch, settings = self.stream.batch(step), self.settings
        starts = range(0, settings.rows, settings.micro)
        parts = [{key: value[i : i + settings.micro] for key, value in batch.items()} for i in starts]
        if settings.objective == "mlm":
            for part in parts:  # the head, the dearest layer of a small model, need not see the other 85 %
                part["counted"] = (part["labels"].flatten() != IGNORED).nonzero()[:, 0]
        return parts

    def evaluate(self) -> dict[str, float]:
        """Loss (nats a token) and perplexity on the held-out rows."""
        import torch

        from zolr.distributed import Share
        from zolr.estimators import mean_of, parts_of
        from zolr.modes import mode

        loss, model = loss_of(self.settings, self.model, self.device), self.model
        share = Share(list(self.valid.evaluation(self.settings.eval_rows)), self.team, device=self.device)
        with mode(model, training=False), torch.no_grad():
            parts = parts_of(lambda batch: loss(model, self._moved(batch)), share)
        mean = float(mean_of(share, parts))
        return {"loss": mean, "perplexity": exp(min(mean, 700.0))}

    def summary(self) -> str:
        """What is about to happen."""
        settings, stream = self.settings, self.stream
        return (
            f"{stream.tokens:,} tokens to train on, {self.valid.tokens:,} held out, vocabulary {len(self.tokenizer):,}\n"
            f"{type(self.model).__name__} ({self.parameters:,} parameters, {self.engine.trained_share:.1%} trained): method "
            f"{settings.method}, paradigm {self.engine.method.paradigm}, {settings.steps:,} steps of "
            f"{settings.rows * settings.length:,} tokens, {settings.steps * settings.rows / stream.rows:.2f} epochs"
        )

    def train(self) -> dict[str, Any]:
        """Train, complete the run folder, and return what is in its `result.json`."""
        from zolr.cli.replay import about
        from zolr.cli.screen import watching
        from zolr.cli.throughput import Timed
        from zolr.memory import resident
        from zolr.tasks.streams import ahead
        from zolr.training import train

        settings, place, team, on = self.settings, self.place, self.team, self.device
        if settings.parts < team.size and team.spread == "batches":
            self.note(
                f"note: the {settings.parts} batches of a step keep {settings.parts} of {team.size} ranks busy; give "
                f"--accumulate {team.size}, and a smaller --batch-size for as many rows"
            )
        self.note(self.summary())
        built = settings.model is None or _builds(settings.model)
        meter = record.Meter(self.engine, on, place.path if settings.resume else None, steps=settings.steps)
        if team.first:
            runs.write_text(place.work / runs.CONFIG, toml(settings))
        try:
            with (
                watching(self._shown, lambda: resident(on), 0, settings.steps, self.speed.line) as screen,
                ahead(self.batches, settings.workers, settings.steps) as made,
                meter.kept(place.work, team.first),
            ):
                outcome = train(
                    self.engine,
                    made,
                    steps=settings.steps,
                    evaluate=self.evaluate,
                    eval_every=settings.eval_every or 0,
                    metric="loss",
                    # the last weights, where nobody asked: a schedule that ends at zero leaves the best ones there
                    best="min" if settings.patience else None,
                    patience=settings.patience,
                    folder=place.work,
                    save_every=settings.save_every or max(1, settings.steps // 20),
                    keep_last=settings.keep_last,
                    resume=settings.resumed_from,
                    about=about("pretrain", settings, self.model, self.engine.base_lr, built=built),
                    device=on,
                    meter=meter,
                    reporter=Timed(screen, self.speed, lambda: meter.counting),
                    check_every=settings.check_every,
                    observer=settings.observer(self.engine, self.batches(0)[0]),
                )
        except BaseException as error:
            if is_out_of_memory(error):
                raise self.advice(error) from error
            raise
        if over := self.over_budget(meter):
            self.note(over)
        result = self._result(outcome, meter)
        if team.first:
            if "ranks" in result:
                self.note(record.said(result["ranks"]))
            self._complete(result, meter)
        return result

    def _result(self, outcome: Outcome, meter: record.Meter) -> dict[str, Any]:
        """The content of `result.json`."""
        settings, progress = self.settings, outcome.progress
        return {
            "verb": "pretrain",
            "method": settings.method,
            "paradigm": self.engine.method.paradigm,
            "model": type(self.model).__name__,
            "parameters": self.parameters,
            "metric": "loss",
            "before": outcome.before["loss"],
            "after": outcome.after["loss"],
            **record.course(self, outcome, meter),
            "tokens_seen": progress.step * settings.rows * settings.length,
            "speed": self.speed.rates(progress),
            "step_seconds": self.speed.steps(),
            "rows": {"train": self.stream.rows, "held_out": self.valid.rows},
            "evaluated_tokens": len(self.valid.evaluated(settings.eval_rows)) * settings.length,
            "data": self.origins,
            "metrics": {"held_out": {"before": outcome.before, "after": outcome.after}},
            "settings": as_dict(settings),
            "versions": record.versions(),
        }

    def _complete(self, result: dict[str, Any], meter: record.Meter) -> None:
        """Put everything into the run folder; `result.json` is the last to appear."""
        settings, place = self.settings, self.place
        memory = record.memory_of(self, self.model, meter) | {"compute": settings.compute}

        def fill(folder: Path) -> None:
            runs.write_model(folder, self.engine.detach(), self.tokenizer)
            runs.write_text(folder / runs.CONFIG, toml(settings))
            runs.write_json(folder / runs.MEMORY, memory)
            runs.write_text(folder / runs.CARD, card(settings, result))
            runs.write_json(folder / runs.RESULT, result)

        # a killed run that is replaced may have left one, a finished one has not
        for folder in (place.work, place.path):
            if not (folder / runs.RESULT).is_file():
                shutil.rmtree(folder / runs.TOKENIZER, ignore_errors=True)
        record.close(place, fill, settings.save_every)


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


def loss_of(settings: Pretrain, model: nn.Module, on: device, at: str | None = None) -> Callable[..., Any]:
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


def objective_of(settings: Pretrain, model: Any, on: device, at: str | None = None) -> Callable[..., Any]:
    """What training lowers: the loss of a batch, or, where a method must tell examples apart, that of each row."""
    import torch

    from zolr.models import lm_losses

    if not settings.composed().private:
        return loss_of(settings, model, on, at)
    low, kind = settings.compute == "bfloat16", at or on.type

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast(kind, torch.bfloat16, enabled=low):
            return lm_losses(model, batch)

    return losses


def prediction(settings: Pretrain, config: Any, on: device, *, profile: bool = False) -> Prediction:
    """The peak of a step of a run and what it is made of; under mlm the loss is taken to see every token.

    Where documents are apart, rows are taken to hold several: a batch in which none does has no mask, and takes less.

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
        loss=objective_of(settings, named, on, "cpu"),
        accumulation=settings.parts,
        checkpointing=settings.checkpointing or False,
        lr=settings.lr,
        select=settings.selection,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        realization=settings.realization,
        device=on,
        dropout=None,
        packed=settings.documents == "apart",
        profile=profile,
    )


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
