"""`--memory-budget`: the fastest way to take the same steps whose predicted peak fits, or an error that says what would."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Literal

from zolr.errors import BudgetError, UsageError

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
DECIMAL_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

# What ways cost in time, roughly, on a CPU (benchmarks/speed.py): only their order matters
RECOMPUTED = {False: 1.0, "selective": 1.18, True: 1.46}  # 0.57, 0.67 and 0.83 of an AdamW step
PASS_ROWS = (
    2.0  # what every pass costs besides its rows, in rows: two halves of 16 rows take 1.12 of the whole
)
SIDE = 1.05  # products with factors where a rebuilt weight would be faster; assumed
TOGETHER = 1.14  # both signs in one pass by vmap: 1.15 of two forwards, against 1.01; as rows of one batch they take no longer

Checkpointing = bool | Literal["selective"]
CHECKPOINTING = {
    False: "--no-checkpointing",
    "selective": "--checkpointing selective",
    True: "--checkpointing",
}

SIZE = ("batch_size", "accumulate")  # one choice: their product, the examples of a step, stays


def bytes_of(amount: str, flag: str = "--budget") -> int:
    """Bytes of an amount of memory such as 4GiB, 4GB, 4096MiB or 3.5G (without the B, units are binary ones).

    Raises:
        UsageError: it is none.

    >>> bytes_of("4GiB"), bytes_of("4 GB"), bytes_of("3.5G")
    (4294967296, 4000000000, 3758096384)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b?)|(b))\s*", amount, re.IGNORECASE)
    size = 0
    if found is not None:
        number, unit, ending, _ = found.groups()
        units = DECIMAL_UNITS if (ending or "").upper() == "B" else UNITS
        size = int(float(number) * units[(unit or "").upper()])
    if size < 1:
        raise UsageError(
            f"{flag} '{amount}' is no amount of memory; give a number above zero and a unit, such as 4GiB, 4GB or 4096MiB"
        )
    return size


@dataclass(frozen=True)
class Way:
    """One way to take a step: everything here changes its time and its memory, and not what it computes.

    Args:
        batch_size: examples of a micro-batch.
        accumulate: micro-batches of a step.
        checkpointing: activations are computed again in the backward pass; "selective": those of half of the layers.
        signs: of a forward-only probe, "sequence" or "together".
        realization: how a perturbation reaches a weight, "auto" or "side".
    """

    batch_size: int
    accumulate: int = 1
    checkpointing: Checkpointing = False
    signs: str = "sequence"
    realization: str = "auto"

    @property
    def cost(self) -> float:
        """Time of a step, up to a factor that all ways of a method share."""
        factor = RECOMPUTED[self.checkpointing]
        factor *= TOGETHER if self.signs == "together" else 1.0
        factor *= SIDE if self.realization == "side" else 1.0
        return factor * self.accumulate * (self.batch_size + PASS_ROWS)

    @property
    def rest(self) -> tuple[Checkpointing, str, str]:
        """All but the size."""
        return self.checkpointing, self.signs, self.realization

    def flags(self, paradigm: str) -> str:
        """The way as flags of the command line, those that mean something under a paradigm."""
        words = [f"--batch-size {self.batch_size}", f"--accumulate {self.accumulate}"]
        if paradigm == "fo":
            words.append(CHECKPOINTING[self.checkpointing])
        if paradigm == "zo":
            words.append(f"--signs {self.signs}")
        return " ".join([*words, f"--realization {self.realization}"])


@dataclass(frozen=True)
class Plan:
    """The way that was picked.

    Args:
        way: the fastest that fits.
        peak: its predicted peak in bytes.
        faster: the next faster way and its peak, which does not fit; None where the fastest of all does.
        skipped: ways that cannot be predicted or taken, and why, one line each.
    """

    way: Way
    peak: int
    faster: tuple[Way, int] | None = None
    skipped: tuple[str, ...] = ()


def ways(asked: Way, paradigm: str, free: Collection[str]) -> list[Way]:
    """All ways to take the step of `asked` that change none but the `free` fields, the fastest first.

    Args:
        asked: settings as given, and as they would be without a budget.
        paradigm: "fo", "zo" or "fwd".
        free: names of fields that nobody has given; the size counts as free if both of its parts are.
    """
    examples = asked.batch_size * asked.accumulate
    sizes = [(size, examples // size) for size in range(1, examples + 1) if examples % size == 0]
    if not set(SIZE) <= set(free):
        sizes = [(asked.batch_size, asked.accumulate)]

    def choices(name: str, *values: object) -> Sequence[object]:
        return values if name in free and values else [getattr(asked, name)]

    checkpointing = choices("checkpointing", *(RECOMPUTED if paradigm == "fo" else []))
    signs = choices("signs", *(["sequence", "together"] if paradigm == "zo" else []))
    # on the way back the side path is what "auto" takes, and tangents take no other
    realization = choices("realization", *(["auto", "side"] if paradigm == "zo" else []))
    found = [
        replace(asked, batch_size=size, accumulate=parts, checkpointing=c, signs=s, realization=r)
        for (size, parts), c, s, r in product(sizes, checkpointing, signs, realization)
    ]
    return sorted(found, key=lambda way: way.cost)


def plan(
    peak_at: Callable[[Way], int],
    asked: Way,
    paradigm: str,
    free: Collection[str],
    budget: int,
    whole: str = "",
) -> Plan:
    """The fastest way whose predicted peak fits the budget, in few predictions.

    Args:
        peak_at: predicted peak of a way in bytes, not falling as the batch grows; UsageError for one that cannot be.
        asked, paradigm, free: as for `ways`.
        budget: bytes.
        whole: why steps of other micro-batches would compute something else, so that none is taken or named; "" where
            they would not.

    Raises:
        BudgetError: none fits; the message names the nearest that would, and the smallest budget that would do.
    """
    known: dict[Way, int] = {}
    skipped: dict[tuple[Checkpointing, str, str], str] = {}

    def peak(way: Way) -> int | None:
        if way.rest in skipped:
            return None
        if way not in known:
            try:
                known[way] = peak_at(way)
            except UsageError as error:
                skipped[way.rest] = f"{way.flags(paradigm)} is left out: {error}"
                return None
        return known[way]

    sized = set(SIZE) if whole else set[str]()
    best = _fastest(ways(asked, paradigm, {*free} - sized), peak, budget)
    if best is not None:
        tried = [(way, size) for way, size in known.items() if way.cost < best.cost]
        faster = max(tried, key=lambda pair: pair[0].cost) if tried else None
        return Plan(best, known[best], faster, tuple(skipped.values()))
    if not known:
        raise UsageError(
            f"no way can be predicted, so --memory-budget has nothing to choose; {next(iter(skipped.values()))}"
        )
    least = min(known, key=lambda way: known[way])
    room, floor = _sizes(budget, known[least])
    text = (
        f"no way to take this step fits into --memory-budget {room}: the least is {floor} with "
        f"{least.flags(paradigm)}, so --memory-budget {-(-known[least] // 2**20)}MiB would do"
    )
    if whole:
        text += f" (the batch size stays: {whole})"
    everything = {f.name for f in fields(Way)} - sized
    if not everything <= set(free):
        near = _fastest(ways(asked, paradigm, everything), peak, budget)
        if near is not None:
            raise BudgetError(
                f"{text}; within the budget {near.flags(paradigm)} would fit ({_sizes(known[near], budget)[0]})"
            )
    others = "a smaller model, --dtype bfloat16, shorter rows"
    raise BudgetError(
        f"{text}; use {others}{', --paradigm zo' if paradigm == 'fo' else ''}, or a larger budget"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is the lack of memory, of the host or of a device."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def advice(
    peak_at: Callable[[Way], int],
    asked: Way,
    paradigm: str,
    there: int | None,
    error: BaseException,
    whole: str = "",
) -> BudgetError:
    """The error for a step that ran out of memory, with the fastest way to take it whose predicted peak fits.

    Args:
        peak_at, asked, paradigm, whole: as for `plan`.
        there: bytes that a step could have; None where that is not known: then anything that takes less may do.
        error: what the step ended with.
    """
    said = " ".join(str(error).split())[:200]
    text = f"out of memory in a step with {asked.flags(paradigm)}"
    try:
        needed = peak_at(asked)
        budget = needed - 1 if there is None else min(there, needed - 1)
        found = plan(peak_at, asked, paradigm, [f.name for f in fields(Way)], budget, whole)
    except BudgetError as nothing:
        return BudgetError(f"{text}, and {str(nothing).replace('--memory-budget ', '')} ({said})")
    except Exception:  # a prediction that fails must not hide what happened
        return BudgetError(f"{text}; try a smaller --batch-size or a shorter --max-length ({said})")
    takes, less, *room = _sizes(needed, found.peak, *([] if there is None else [there]))
    return BudgetError(
        f"{text}, predicted to take {takes}{' of ' * bool(room)}{''.join(room)}; {found.way.flags(paradigm)} is the same step in "
        f"{less}: go on with these and --resume, or give --memory-budget ({said})"
    )


def memory_there(kind: str) -> int | None:
    """Bytes that this process can have on a device: what is free and what it holds; None for the host."""
    if kind != "cuda":
        return None
    import torch

    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def _fastest(found: Sequence[Way], peak: Callable[[Way], int | None], budget: int) -> Way | None:
    """The first of the ways, fastest first, that fits: of each kind the largest batch, found by halving.

    What is no faster than a way that fits is not asked about.
    """
    best: Way | None = None
    for rest in dict.fromkeys(way.rest for way in found):
        kind = [way for way in found if way.rest == rest and (best is None or way.cost < best.cost)]
        kind.sort(key=lambda way: way.batch_size)
        low, high = -1, len(kind)
        guess = high - 1  # the largest may fit
        while high - low > 1:
            size = peak(kind[guess])
            if size is not None and size <= budget:
                low = guess
            else:
                high = guess
            guess = (low + high) // 2
        if low >= 0:
            best = kind[low]
        elif kind and best is None:
            peak(kind[0])  # the floor of this kind, for the error
    return best


def told(plan: Plan, paradigm: str, budget: int) -> list[str]:
    """What was picked and why, one line each."""
    room, peak, *next_peak = _sizes(budget, plan.peak, *([] if plan.faster is None else [plan.faster[1]]))
    line = f"memory budget {room}: {plan.way.flags(paradigm)}, predicted peak of a step {peak}"
    if plan.faster is None:
        line += ", the fastest way there is"
    else:
        way = plan.faster[0].flags(paradigm)
        line += f"; the next faster way tried, {way}, would take {next_peak[0]}"
    return [line, *plan.skipped]


def verdict(budget: int, measured: int | None, counter: str) -> str | None:
    """A warning where the measured peak is over the budget."""
    if measured is None or measured <= budget:
        return None
    took, room = _sizes(measured, budget)
    return (
        f"warning: the measured peak, {took} ({counter}), is over --memory-budget {room}: the prediction "
        f"was too low; give a budget that is smaller by {measured / budget - 1:.1%}"
    )


def _sizes(*counts: int) -> list[str]:
    from zolr.cli.screen import sizes

    return sizes(*counts)
