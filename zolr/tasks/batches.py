"""Encoded examples as padded batches.

The batch of a training step is a function of (seed, step) and of nothing else, so that a resumed run sees
what the uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NotRequired, TypedDict

from zolr.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


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


@lru_cache(maxsize=4)
def _epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    from zolr.keys import Key

    return tuple(Key(seed).fold_in("data", epoch).permutation(count).tolist())


def batch_rows(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Rows of the batch of a training step.

    Every epoch is a permutation of its own, and a batch may reach into the next one: in any `count` draws
    from the start of an epoch each row comes once.

    Args:
        count: number of training examples.
        batch_size: rows of a batch, 1 to `count`.
        seed: names the permutations.
        step: from 0.

    Raises:
        UsageError: a batch size below 1 or above `count`, or a negative step.

    >>> sorted(batch_rows(6, 2, 0, 0) + batch_rows(6, 2, 0, 1) + batch_rows(6, 2, 0, 2))
    [0, 1, 2, 3, 4, 5]
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"batch size {batch_size!r} is not possible; use a whole number of at least 1")
    if batch_size > count:
        raise UsageError(
            f"batch size {batch_size} is more than the {count} training examples; use {count} or less"
        )
    if step < 0:
        raise UsageError(f"step {step} is not possible; steps count from 0")
    places = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch_order(count, seed, place // count)[place % count] for place in places]


def training_batches(
    encoded: Sequence[Encoded],
    *,
    batch_size: int,
    seed: int,
    step: int,
    pad_id: int,
    micro_batch_size: int | None = None,
    pad_to_multiple: int | None = None,
) -> list[dict[str, Tensor]]:
    """The micro-batches of a training step, together `batch_size` examples; a function of its arguments.

    Args:
        encoded: all training examples.
        batch_size: examples of the step.
        seed: names the order.
        step: from 0.
        pad_id: id to pad with.
        micro_batch_size: examples of a micro-batch; all in one when left out. The last one may be smaller.
        pad_to_multiple: see `collate`.
    """
    rows = batch_rows(len(encoded), batch_size, seed, step)
    size = batch_size if micro_batch_size is None else micro_batch_size
    if size < 1:
        raise UsageError(f"micro-batch size {size} is not possible; use at least 1")
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [collate([encoded[row] for row in part], pad_id, pad_to_multiple) for part in parts]


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
