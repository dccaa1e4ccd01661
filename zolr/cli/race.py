"""One competitor of `zolr compare`, in a process of its own.

It says what it knows as soon as it knows it, one JSON object a line, so that a process that is killed for its memory has
at least said how much was predicted.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from zolr.cli import explained, noting, runs
from zolr.cli.choices import factor_at, schedule_of
from zolr.cli.finetune import Finetune
from zolr.cli.job import Job
from zolr.cli.processes import follow
from zolr.errors import UsageError

if TYPE_CHECKING:
    from zolr.methods import Method
    from zolr.training import Progress

EVALUATIONS = 8  # of a run, spread over what it spends, where --eval-every does not say otherwise
UNBOUNDED = 10**9  # steps of a run that ends by the clock

# pairs of a step and two forwards: as many as fit the seconds, but so many at least and at most
PAIRS, PAIR_SECONDS = (5, 21), 10.0

UNTIMED = "not timed: its weights are away between two uses, or in pieces, for the forwards beside it too"


@dataclass(frozen=True)
class Price:
    """Forward passes that the steps of a run take, as an engine counts them (a backward is two).

    Args:
        each: of every step.
        choosing: of the first one besides, to choose what nobody gave: the radius of its probes, and the rate.
        first: of the first one besides, to compare both ways to evaluate signs, or for the norm that it clips by.
        opening: of every step besides that begins a window, the first one too, to see the inputs of the weights.
        every: steps of a window; 0 where there is but one.
    """

    each: int = 0
    choosing: int = 0
    first: int = 0
    opening: int = 0
    every: int = 0

    @classmethod
    def of(cls, method: Method, rate: float | None, clip: float | None, batches: int) -> Price:
        """What the steps of a method take.

        Args:
            rate: its learning rate, None for one that is to be measured.
            clip: largest norm of its gradients, None for no clipping.
            batches: of a step.
        """
        from zolr.estimators import setting
        from zolr.tuning import FORWARDS

        each = method.estimator.forwards(batches)
        radius = setting(method.estimator, "eps", 0.0)  # zero: nothing is probed
        chooses = radius is None or (radius and rate is None)
        # of one gradient at a time the norm takes a pass of its own
        measures = method.dense and clip is not None
        twice = measures and method.clipping == "twice"
        compares = setting(method.estimator, "signs") == "together"
        sees = method.projector.learns_from == "inputs" and not method.dense
        return cls(
            each=each * (2 if twice else 1),
            choosing=(FORWARDS + 1) * batches if chooses else 0,
            # two forwards for each of both ways, as by vmap (by rows it is two more, which only the first step can tell); the
            # norm of the step before is not there yet
            first=(4 * batches if compares else 0) + (each if measures and not twice else 0),
            opening=batches if sees else 0,
            every=method.refresh_every or 0,
        )

    def total(self, steps: int) -> int:
        """Of so many steps from the first one on."""
        windows = -(-steps // self.every) if self.every else min(steps, 1)
        return steps * self.each + windows * self.opening + min(steps, 1) * (self.choosing + self.first)

    def step(self, number: int) -> int:
        """Of step 0, 1, ..."""
        return self.total(number + 1) - self.total(number)

    def steps(self, amount: float) -> int:
        """How many steps so many forwards pay for."""
        return bisect_right(range(int(amount // self.each) + 1), amount, key=self.total) - 1

    def check_pays(self, amount: float, name: str) -> None:
        """Refuse a budget that is gone before the first step is.

        Raises:
            UsageError: so many forwards pay for no step of the method of that name.
        """
        if self.total(1) <= amount:
            return
        if self.choosing:
            raise UsageError(
                f"--equal forwards={amount:g} does not pay for choosing the learning rate of '{name}', which takes "
                f"{self.choosing} before the first step; give its --lr and --eps (as @lr=1e-3@eps=1e-3), or more forwards"
            )
        raise UsageError(
            f"--equal forwards={amount:g} pays for no step of '{name}', which takes {self.total(1)}; give more"
        )


@dataclass
class Allowance:
    """What a run may spend, and how far it has got; the rate follows the steps that forwards pay for, or the share of seconds.

    Args:
        unit: "forwards" (a backward counts as two) or "seconds" (of steps, not of evaluations).
        amount: of them.
        course, warmup: of the learning rate, as in the settings of a run.
        price: of the steps in forwards.
        steps: that the forwards pay for.
        name: of the method, for who is told that its first step took all.
    """

    unit: str
    amount: float
    course: str
    warmup: int
    price: Price = Price()
    steps: int = 0
    name: str = ""
    step: int = 0
    spent: float = 0.0
    each: float = 0.0  # what the cheapest step took: the first one may search a rate

    def __call__(self, progress: Progress) -> bool:
        """Whether what is left pays for no further step; of seconds, whether none is left.

        Raises:
            UsageError: the first step took more seconds than there are, which nobody could know before.
        """
        counted = self.unit == "forwards"
        spent = float(progress.forwards if counted else progress.seconds)
        if not counted and progress.step == 1 and spent > self.amount:
            raise self._refused(spent)
        if progress.step > max(1, self.step):
            now = (spent - self.spent) / (progress.step - self.step)
            self.each = min(self.each or now, now)
        self.step, self.spent = progress.step, spent
        # a step that was left out is made again as the same one
        coming = self.price.step(progress.step - progress.skipped) if counted else 0
        return spent + coming > self.amount

    def _refused(self, spent: float) -> UsageError:
        took, way = "its first step took", "give more seconds"
        if self.price.choosing:
            took = "choosing its learning rate and its first step took"
            way = "give its --lr and --eps (as @lr=1e-3@eps=1e-3), or more seconds"
        return UsageError(
            f"--equal seconds={self.amount:g} pays for no step of '{self.name}': {took} {spent:.3g} s; {way}"
        )

    def factor(self, step: int) -> float:
        """Factor on the learning rate; what has been spent is known up to the step before."""
        if self.unit == "forwards":  # as a run of so many steps has it, so that its settings repeat it
            course = schedule_of(self.course, self.warmup, self.steps)
            return 1.0 if course is None else course(step)
        if step < self.warmup:
            return (step + 1) / self.warmup
        return factor_at(self.course, min(1.0, (self.spent + (step - self.step) * self.each) / self.amount))


def race(
    settings: Finetune,
    *,
    equal: tuple[str, float] | None,
    budget: int | None,
    timing: bool,
    metric: str,
    say: Callable[[dict[str, Any]], None],
) -> None:
    """Run one competitor.

    Args:
        settings: of the run, complete.
        equal: unit and amount of what it may spend, instead of its steps.
        budget: bytes that its predicted peak must not be above; it is not run then.
        timing: measure steps against forwards after the run.
        metric: what the outcome says of the model, whatever the run itself goes by.
        say: told every part of the outcome as it comes.
    """
    from zolr.cli.screen import console

    allowance = None
    if equal is not None:
        allowance = Allowance(*equal, course=settings.schedule, warmup=settings.warmup)
    job = Job(settings, allowance and allowance.factor)
    say({"batch_size": job.batch_size, "accumulate": job.settings.accumulate})
    say({"peak_bytes_predicted": job.predicted})
    if budget is not None and job.predicted is not None and job.predicted > budget:
        say({"fits": False})
        return
    if allowance is not None:
        _allow(job, allowance, settings.eval_every)
    elif settings.eval_every is None:
        job.settings = replace(job.settings, eval_every=max(1, (job.settings.steps or 1) // EVALUATIONS))
    with runs.claimed(Path(settings.output or ""), overwrite=False, resume=False) as place:
        result = job.train(place, console(quiet=True), allowance)
    say(result | scored(result, metric))
    if timing:
        say(timed(job) or {"untimed": UNTIMED})


def scored(result: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """What a result says of one metric on the test rows (None where it does not have it), and what its run went by."""
    test = result["metrics"]["test"]
    return {"chosen_by": result["metric"]} | {when: test[when].get(metric) for when in ("before", "after")}


def _allow(job: Job, allowance: Allowance, eval_every: int | None) -> None:
    """Give a job its allowance: a bound on its steps, and evaluations spread over what it can spend."""
    import torch

    engine, settings = job.engine, job.settings
    price = Price.of(engine.method, engine.base_lr, settings.clip, settings.accumulate or 1)
    if all(v.is_full for v in engine.variables):  # no weight has a subspace that inputs could say anything of
        price = replace(price, opening=0)
    allowance.price, allowance.name = price, settings.method or ""
    if allowance.unit == "forwards":
        price.check_pays(allowance.amount, allowance.name)
        bound = expected = allowance.steps = price.steps(allowance.amount)
    else:
        batch = job._moved(job.batches(0)[0])
        with torch.no_grad():  # how far apart evaluations are is all that hangs on this guess
            each = min(_seconds(lambda: job.work.loss(job.work.model, batch)) for _ in range(2))
        bound, job.by_clock = UNBOUNDED, True
        expected = int(allowance.amount / (each * price.each))
    every = eval_every or max(1, expected // EVALUATIONS)
    job.settings = replace(job.settings, steps=bound, eval_every=every)


def timed(job: Job) -> dict[str, Any] | None:
    """Time of a step over that of two plain forwards without autograd, by pairs taken in turn on the same batches.

    The job has ended. Steps run on its model, a plain one again, by a fresh engine with the settings of the run (compiled,
    held, kept aside as there); the forwards are those of a second set of modules around the same weights, which knows
    nothing of the engine. Held and quantized weights are in both. None for weights that are brought for each use, or put
    together from pieces: a second set of modules would share what does that.
    """
    import torch

    from zolr import lora, models

    settings, work = job.settings, job.work
    if settings.device_map is not None or settings.shard:
        return None
    method, lr = job.engine.method, job.engine.base_lr
    if settings.holds:  # its adapter has been written beside a model that was left attached
        job.engine.detach()
    del job.engine  # and the state of its optimizer
    model = work.model.to(work.device)
    twin = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())}).eval()
    if settings.adapter is not None:
        lora.wrap(model, settings.adapter, classifier=settings.head == "classes", seed=settings.seed)
    models.checkpoint_activations(model, settings.checkpointing or False)
    loss, engine = work.objective(settings.objective), job.new_engine(method, lr)

    def synchronized(work_to_do: Callable[[], Any]) -> Callable[[], None]:
        def done() -> None:
            work_to_do()
            if work.device.type == "cuda":
                torch.cuda.synchronize(work.device)

        return done

    def forwards(batches: list[Any]) -> None:
        with torch.no_grad():
            for batch in (*batches, *batches):
                loss(twin, batch)

    ratios, seconds, began, number = [], [], 0.0, 0
    while True:
        if number == 2:  # first steps make state and warm caches up
            ratios, seconds, began = [], [], time.perf_counter()
        batches = [job._moved(batch) for batch in job.batches(number)]
        tasks = [synchronized(lambda b=batches: engine.step(b)), synchronized(lambda b=batches: forwards(b))]
        order = (0, 1) if number % 2 else (1, 0)
        spent = {which: _seconds(tasks[which]) for which in order}
        ratios.append(spent[0] / spent[1])
        seconds.append(spent[0])
        number += 1
        count = len(ratios) if number > 2 else 0
        if count >= PAIRS[1] or (count >= PAIRS[0] and time.perf_counter() - began > PAIR_SECONDS):
            break
    low, _, high = quantiles(ratios, n=4)
    return {
        "step_over_two_forwards": round(median(ratios), 4),
        "step_over_two_forwards_quartiles": [round(low, 4), round(high, 4)],
        "step_seconds": round(median(seconds), 6),
        "pairs": len(ratios),
    }


def _seconds(task: Callable[[], Any]) -> float:
    began = time.perf_counter()
    task()
    return time.perf_counter() - began


def main(plan: Mapping[str, Any], found: Path, said: Path) -> None:
    """Run one competitor as what this process is for, and end it with the exit code of `zolr`.

    Args:
        plan: what `race` is told, but whom to tell.
        found: file for the parts of the outcome.
        said: file for everything that is printed, the reason of a failure last.
    """
    with open(said, "wb") as file:
        for number in (1, 2):  # of this process and of what libraries start: nothing they print is a result
            os.dup2(file.fileno(), number)
    follow(
        lambda: os.kill(os.getpid(), signal.SIGTERM)
    )  # it saves and leaves, as the other process would have
    with open(found, "w") as out:

        def say(part: dict[str, Any]) -> None:
            print(json.dumps(json.loads(runs.as_json(part))), file=out, flush=True)

        try:
            with noting(lambda line: print(line, file=sys.stderr)):
                race(**plan, say=say)
        except Exception as error:
            code, text = explained(error)
            print(" ".join(text.split()), file=sys.stderr)
            sys.exit(code)
