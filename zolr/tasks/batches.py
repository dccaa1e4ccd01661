"""Encoded examples as padded batches.

The batch of a training step is a function of (seed, step) and of nothing else, so that a resumed run sees
what the uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NotRequired, TypedDict

from zolr.errors import UsageError, is_count

if TYPE_CHECKING:
    from torch import Tensor


POOL = 50  # batches among which examples are dealt out by length


class Encoded(TypedDict):
    """One tokenized example.

    Prompts give a `position`, pairs `token_type_ids` for models that tell the texts apart.
    """

    input_ids: list[int]
    label: int
    truncated: bool
    position: NotRequired[int]
    token_type_ids: NotRequired[list[int]]


def truncation_share(encoded: Sequence[Encoded]) -> float:
    """The part of the examples, from 0 to 1, whose texts were cut."""
    return sum(one["truncated"] for one in encoded) / len(encoded) if encoded else 0.0


def collate(encoded: Sequence[Encoded], pad_id: int, pad_to_multiple: int | None = None) -> dict[str, Tensor]:
    """Pad examples on the right to the longest one.

    Args:
        encoded: b examples.
        pad_id: id to pad with; `attention_mask` hides it.
        pad_to_multiple: round the length up to a multiple of this, for kernels that like even shapes.

    Returns:
        `input_ids` and `attention_mask` (b, t), `labels` (b,), and where the examples have them `positions`
        (b,) and `token_type_ids` (b, t); all int64.

    >>> one = {"input_ids": [5], "label": 0, "truncated": False, "position": 0}
    >>> batch = collate([one], 1, pad_to_multiple=2)
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[5, 1]], [[1, 0]])
    """
    import torch

    if not encoded:
        raise UsageError("a batch of no examples is not possible; give at least one")
    length = max(len(one["input_ids"]) for one in encoded)
    if pad_to_multiple:
        length += -length % pad_to_multiple
    batch = {
        "input_ids": [one["input_ids"] + [pad_id] * (length - len(one["input_ids"])) for one in encoded],
        "attention_mask": [
            [1] * len(one["input_ids"]) + [0] * (length - len(one["input_ids"])) for one in encoded
        ],
        "labels": [one["label"] for one in encoded],
    }
    if "position" in encoded[0]:
        batch["positions"] = [one.get("position", 0) for one in encoded]
    if "token_type_ids" in encoded[0]:
        kinds = [one.get("token_type_ids", []) for one in encoded]
        batch["token_type_ids"] = [kind + [0] * (length - len(kind)) for kind in kinds]
    return {name: torch.tensor(values) for name, values in batch.items()}


class TrainingBatches:
    """The micro-batches of every training step, a function of the arguments and the step alone.

    Every epoch is an order of its own, and a batch may reach into the next one: in any `len(encoded)` draws from the
    start of an epoch each example comes once. The classes are spread evenly over an epoch: a run of b examples holds
    each class very nearly in proportion. A batch in which one class is missing by chance pulls the prior of the
    answers to one side; that is the largest part of a small batch's noise, and the easiest to avoid.

    Examples of like length share a micro-batch, so that several of them hold less padding than one batch would. With
    `by_length` they share a batch: of every class, a stretch of `POOL` batches deals its examples out by length, to
    the batches in a random order. That leaves next to no padding and costs nothing but some independence of examples.

    Args:
        encoded: all training examples.
        batch_size: examples of a step, 1 to `len(encoded)`.
        seed: names the orders.
        pad_id: id to pad with.
        micro_batch_size: examples of a micro-batch; all in one when left out. The last one may be smaller.
        by_length: examples of like length share a batch.
        pad_to_multiple: see `collate`.

    Raises:
        UsageError: a size below 1 or above the number of examples.

    >>> one = {"input_ids": [5], "truncated": False}
    >>> batches = TrainingBatches([{**one, "label": i % 2} for i in range(6)], batch_size=2, seed=0, pad_id=1)
    >>> [batch["labels"].sum().item() for step in range(3) for batch in batches(step)]
    [1, 1, 1]
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        *,
        batch_size: int,
        seed: int,
        pad_id: int,
        micro_batch_size: int | None = None,
        by_length: bool = False,
        pad_to_multiple: int | None = None,
    ) -> None:
        for name, size in (("batch size", batch_size), ("micro-batch size", micro_batch_size)):
            if size is not None and not is_count(size):
                raise UsageError(f"{name} {size!r} is not possible; use a whole number of at least 1")
        if batch_size > len(encoded):
            raise UsageError(
                f"batch size {batch_size} is more than the {len(encoded)} training examples; "
                f"use {len(encoded)} or less"
            )
        self.encoded, self.batch_size, self.seed, self.pad_id = encoded, batch_size, seed, pad_id
        self.micro_batch_size, self.by_length = micro_batch_size or batch_size, by_length
        self.pad_to_multiple = pad_to_multiple
        self._classes: dict[int, list[int]] = {}
        for row, one in enumerate(encoded):
            self._classes.setdefault(one["label"], []).append(row)
        self._orders: dict[int, list[int]] = {}

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            from zolr.keys import Key

            places: list[tuple[float, int, int]] = []
            for label, rows in sorted(self._classes.items()):
                key = Key(self.seed).fold_in("data", epoch, label)
                start = float(key.fold_in("start").uniform())
                for i, place in enumerate(key.permutation(len(rows)).tolist()):
                    places.append(((i + start) / len(rows), label, rows[place]))
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            order = [row for *_, row in sorted(places)]
            self._orders[epoch] = self._by_length(order, epoch) if self.by_length else order
        return self._orders[epoch]

    def _by_length(self, order: list[int], epoch: int) -> list[int]:
        """Deal the rows of each class out to the batches by length; which class stands where does not change."""
        from zolr.keys import Key

        size, start = self.batch_size, epoch * len(order)
        by_batch: dict[
            int, list[int]
        ] = {}  # places of each batch; the first and the last may be shared with other epochs
        for place in range(len(order)):
            by_batch.setdefault((start + place) // size, []).append(place)
        batches, result = list(by_batch.values()), list(order)
        for first in range(0, len(batches), POOL):
            pool = batches[first : first + POOL]
            waiting: dict[int, list[int]] = {}
            # sorted is stable: rows of one length stay in their random order
            for row in sorted((order[p] for places in pool for p in places), key=self._length, reverse=True):
                waiting.setdefault(self.encoded[row]["label"], []).append(row)
            key = Key(self.seed).fold_in("data", epoch, "lengths", first)
            for turn in key.permutation(len(pool)).tolist():
                for place in pool[turn]:
                    result[place] = waiting[self.encoded[order[place]]["label"]].pop()
        return result

    def _length(self, row: int) -> int:
        return len(self.encoded[row]["input_ids"])

    def rows(self, step: int) -> list[int]:
        """The examples of a step.

        Raises:
            UsageError: a negative step.
        """
        if step < 0:
            raise UsageError(f"step {step} is not possible; steps count from 0")
        count = len(self.encoded)
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._order(place // count)[place % count] for place in places]

    def __call__(self, step: int) -> list[dict[str, Tensor]]:
        """The micro-batches of a step, together `batch_size` examples."""
        rows, size = self.rows(step), self.micro_batch_size
        if size < self.batch_size:
            rows.sort(key=self._length)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [
            collate([self.encoded[row] for row in part], self.pad_id, self.pad_to_multiple) for part in parts
        ]


def evaluation_batches(
    encoded: Sequence[Encoded], *, batch_size: int, pad_id: int, pad_to_multiple: int | None = None
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of all examples, the longest first, each with the rows it holds.

    Examples of like length go together, so little is padding; the longest come first, so that a lack of
    memory shows at once.
    """
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size} is not possible; use at least 1")
    order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]["input_ids"]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, collate([encoded[row] for row in rows], pad_id, pad_to_multiple)
