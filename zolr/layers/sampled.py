"""A few random blocks at a time."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from zolr.errors import UsageError, is_count
from zolr.keys import Key
from zolr.layers import Outside, check_every, check_outside, shuffled


@dataclass(frozen=True)
class Sampled:
    """`count` blocks, drawn without replacement for each period; embeddings and head are always active.

    Args:
        count: blocks of a period (gamma); all, where there are no more.
        every: optimizer steps of a period (K).
        outside: weights outside of all blocks: "always" active (as published), "never", or "blocks" (drawn like the others).

    Raises:
        UsageError: an argument out of range.

    Reference: LISA arXiv 2403.17919.
    """

    count: int = 2
    every: int = 20
    outside: Outside = "always"
    keeps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_every(self.every)
        check_outside(self.outside)
        if not is_count(self.count):
            raise UsageError(f"{self.count!r} blocks cannot be drawn; use a whole number of at least 1")

    def active(self, blocks: int, period: int, key: Key) -> Collection[int]:
        """The first ones of a permutation."""
        return shuffled(blocks, key.fold_in("period", period))[: self.count]
