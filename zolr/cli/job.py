"""One fine-tuning run: data, model and engine made from its settings, then trained, measured and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from zolr.cli import runs
from zolr.cli.budget import is_out_of_memory
from zolr.cli.choices import DEFAULTS, schedule_of
from zolr.cli.config import toml
from zolr.cli.finetune import Finetune
from zolr.cli.planned import Planned
from zolr.cli.workload import Workload, described
from zolr.errors import NonFiniteError, UsageError

if TYPE_CHECKING:
    from zolr.distributed import Team
    from zolr.engine import Engine
    from zolr.methods import Method
    from zolr.tasks import Splits
    from zolr.training import Progress


EVEN = 16  # tokens that lengths are rounded up to for a compiled loss, which wants few shapes
# objectives that are no mean over examples, so that a step of other micro-batches would have another one
WHOLE = {"f1": "--objective f1 is the mean of what each micro-batch has, which others would change"}
DELTA = 1e-5  # at which the epsilon of a private run is told


class Job(Planned[Finetune]):
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
        from zolr.cli.workload import (
            device_of,
            metric_of,
            set_threads,
            splits_of,
            task_of,
            width_of,
            words_of,
        )
        from zolr.distributed import Team
        from zolr.journal import fingerprint
        from zolr.tasks import TrainingBatches, own_task, truncation_share

        super().__init__(shown)
        self.team = team or Team()
        self.by_clock = False  # its rate follows seconds, which no settings repeat
        if adapters.is_adapter(Path(settings.model)):
            raise UsageError(
                f"--model {settings.model} is an adapter, whose base is {adapters.base_of(Path(settings.model))}; "
                "train the base, or a model that both were merged into"
            )
        set_threads(settings.threads)
        self.device = device_of(settings.device)
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
            device=self.device,
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
        self.settings = self._sized(settings)
        # of a run that ends by what it has spent nobody knows how many there will be
        self.planned_steps = self.settings.steps if schedule is None else None
        self.settings = settings = self.within_budget(settings)
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
        self.metric = metric_of(settings.objective, task)
        self.engine = self.new_engine(
            method,
            settings.learning_rate(method, width_of(self.work.model)),
            schedule=schedule or schedule_of(settings.schedule, settings.warmup, settings.steps or 1),
            # families whose forward we know need no proof that the coordinates reach the loss; it costs a pass per weight
            check=None if models.splits(self.work.model) else self._moved(self.batches(0)[0]),
            team=self.team,
        )
        if settings.holds and not settings.shard:
            adapters.check(self.work.model, self.engine.variables, self.own_modules)

        fresh = models.fresh_modules(self.work.model) if settings.head == "classes" else []
        left = [m for m in fresh if not any(v.name.startswith(f"{m}.") for v in self.engine.variables)]
        if left and settings.adapter is None:
            self.notes.append(
                f"note: {left[0]} has random weights, and --train {settings.train} leaves them so; give --train "
                f"{settings.train}+head"
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

    def new_engine(self, method: Method, lr: float | None, **more: Any) -> Engine:
        """An engine on the model as it is now, with the settings of the run.

        Args:
            method, lr: as for `Engine`.
            more: what no settings say: its schedule, batch to check and team.
        """
        from zolr import lora
        from zolr.engine import Engine

        settings = self.settings
        return Engine(
            self.work.model,
            method,
            lr=lr,
            loss=self.work.objective(settings.objective),
            select=self.select if settings.adapter is None else lora.trained,
            seed=settings.seed,
            weight_decay=settings.weight_decay,
            clip=settings.clip,
            realization=settings.realized,
            hold=self._hold if settings.holds else False,
            hold_rank=settings.held_rank,
            compile=settings.compile,
            undo=settings.undo,
            **more,
        )

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

    @property
    def batch_size(self) -> int:
        """Examples of a forward pass."""
        return self.settings.split[0]

    @property
    def step_size(self) -> int:
        """Examples of a step."""
        return prod(self.settings.split)

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

    def note(self, line: str) -> None:
        """Tell who runs this, when it is time."""
        self.notes.append(line)

    @property
    def whole(self) -> str:
        """Why steps of other micro-batches would compute something else; "" where they would not."""
        return WHOLE.get(self.settings.objective, "")

    @property
    def unpredictable(self) -> str:
        """What the run has that no prediction knows; "" for nothing."""
        if self.settings.shard:
            return "weights in pieces"
        return "weights that are away between two uses" if self.settings.device_map is not None else ""

    def foretell(self, settings: Finetune) -> int:
        """Peak bytes of a step on the longest examples."""
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
            steps=self.planned_steps,
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
        known = place.path if settings.resume else None
        meter = record.Meter(self.engine, work.device, known, steps=settings.steps or 0)
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
        if over := self.over_budget(meter):
            shown.print(over, markup=False)
        return result
