"""What fine-tuning and pretraining share: steps whose peak is predicted, taken in the way that a memory budget asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from zolr.cli.budget import SIZE, Way, advice, bytes_of, memory_there, plan, told, verdict
from zolr.errors import BudgetError

if TYPE_CHECKING:
    import torch

    from zolr.cli.finetune import Finetune
    from zolr.cli.pretrain import Pretrain
    from zolr.cli.record import Meter
    from zolr.distributed import Team
    from zolr.engine import Engine

S = TypeVar("S", "Finetune", "Pretrain")


class Planned(ABC, Generic[S]):
    """A run from its settings: how much a step of it takes, and which way to take it fits.

    Args:
        shown: a rich console, told what takes long; None for silence.

    Attributes:
        settings: of the run, complete.
        engine: that takes its steps.
        device: where it takes them.
        team: the processes that share them out.
    """

    settings: S
    engine: Engine
    device: torch.device
    team: Team

    def __init__(self, shown: Any = None) -> None:
        self._shown = shown
        self._peaks: dict[S, int] = {}

    @abstractmethod
    def note(self, line: str) -> None:
        """Tell who runs this."""

    @abstractmethod
    def foretell(self, settings: S) -> int:
        """Peak bytes of a step with these settings, found without running one."""

    @property
    def whole(self) -> str:
        """Why steps of other micro-batches would compute something else; "" where they would not."""
        return ""

    @property
    def unpredictable(self) -> str:
        """What the run has that no prediction knows; "" for nothing."""
        return ""

    @property
    def on_top(self) -> int:
        """Bytes at most, about, of what ranks exchange of gradients, which no prediction counts; 0 for one, or without backprop."""
        if self.team.size < 2 or self.engine.method.paradigm != "fo":
            return 0
        from zolr.distributed import BUCKET

        dense = self.engine.method.dense and self.engine.method.accumulate == "dense"
        values = [v.weight if dense else v.value for v in self.engine.variables]
        sizes = [value.numel() for value in values]
        each = max(value.element_size() for value in values)
        # a bucket is full with its last gradient: these gradients, one after the other, padded, from all ranks, and their sum, of
        # which each rank adds up its part in float64
        entries = min(sum(sizes), BUCKET + max(sizes))
        return entries * 5 * each + entries * (8 + each) // self.team.size

    @property
    def budget(self) -> int | None:
        """Bytes a step may take."""
        budget = self.settings.memory_budget
        return None if budget is None else bytes_of(budget, "--memory-budget")

    def peak(self, settings: S) -> int:
        """Predicted peak bytes of a step with these settings; seconds the first time, and remembered."""
        from zolr.cli.screen import predicting

        if settings not in self._peaks:
            with predicting(self._shown, _ways(settings)[0].flags(settings.composed().paradigm)):
                self._peaks[settings] = self.foretell(settings)
        return self._peaks[settings]

    @cached_property
    def predicted(self) -> int | None:
        """Peak bytes of a step of the run, as predicted; None where that cannot be known."""
        if self.unpredictable:
            self.note(f"note: no memory prediction for {self.unpredictable}")
            return None
        if self.on_top:
            from zolr.cli.screen import size

            self.note(
                f"note: predicted is a step of one process; what {self.team.size} ranks exchange of its gradients comes on top, some "
                f"{size(self.on_top)} at most"
            )
        try:
            return self.peak(self.settings)
        except Exception as error:  # an operation that fake tensors cannot run must not stop a run that works
            self.note(f"note: no memory prediction ({type(error).__name__}: {error})")
            return None

    def within_budget(self, given: S) -> S:
        """The settings with what nobody has given chosen so that a step fits the memory budget.

        Args:
            given: as they came, where a size that nobody gave is None.

        Raises:
            BudgetError: no way to take the step fits.
        """
        if self.budget is None:
            return self.settings
        paradigm = self.settings.composed().paradigm
        asked, chosen = _ways(self.settings)
        free = {name for name in ("checkpointing", "signs") if getattr(given, name) is None}
        if given.batch_size is None and given.accumulate is None:
            free |= set(SIZE)
        if given.realization == "auto":
            free.add("realization")
        found = plan(lambda way: self.peak(chosen(way)), asked, paradigm, free, self.budget, self.whole)
        for line in told(found, paradigm, self.budget):
            self.note(line)
        return chosen(found.way)

    def advice(self, error: BaseException) -> BudgetError:
        """The error for a step that ran out of memory."""
        asked, chosen = _ways(self.settings)
        peak = lambda way: self.peak(chosen(way))  # noqa: E731
        paradigm, there = self.settings.composed().paradigm, memory_there(self.device.type)
        return advice(peak, asked, paradigm, there, error, self.whole)

    def over_budget(self, meter: Meter) -> str | None:
        """A warning where steps took more than they may."""
        return None if self.budget is None else verdict(self.budget, meter.peak or None, meter.counter)


def _ways(settings: S) -> tuple[Way, Callable[[Way], S]]:
    """The way in which the settings take a step, and the settings that take it in another one."""
    from zolr.estimators import setting

    method = settings.composed()
    asked = Way(
        *settings.split,
        settings.checkpointing or False,
        setting(method.estimator, "signs", "sequence"),
        settings.realization,
    )

    def chosen(way: Way) -> S:
        return replace(
            settings,
            batch_size=way.batch_size,
            accumulate=way.accumulate,
            checkpointing=way.checkpointing,
            signs=way.signs if method.paradigm == "zo" else None,
            realization=way.realization,  # pyright: ignore[reportArgumentType]
        )

    return asked, chosen
