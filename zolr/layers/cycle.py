"""One block at a time, all in turn."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

from zolr.errors import UsageError
from zolr.keys import Key
from zolr.layers import Outside, check_every, check_outside, shuffled


@dataclass(frozen=True)
class Cycle:
    """Block coordinate descent: each block for `every` steps, with optimizer state that begins and ends with its turn.

    Args:
        every: optimizer steps of a turn (K).
        order: of the blocks in a round: "random" (a new permutation each round), "ascending" or "descending".
        outside: weights outside of all blocks: "never" active (as published), "always", or "blocks" (each module its turn).

    Raises:
        UsageError: an argument out of range.

    Reference: BAdam arXiv 2404.02827.
    """

    every: int = 50
    order: Literal["random", "ascending", "descending"] = "random"
    outside: Outside = "never"
    keeps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_every(self.every)
        check_outside(self.outside)
        if self.order not in ("random", "ascending", "descending"):
            raise UsageError(f"order '{self.order}' is not known; use 'random', 'ascending' or 'descending'")

    def active(self, blocks: int, period: int, key: Key) -> Collection[int]:
        """The one whose turn it is."""
        turn, position = divmod(period, blocks)
        if self.order == "random":
            return (shuffled(blocks, key.fold_in("round", turn))[position],)
        return (position if self.order == "ascending" else blocks - 1 - position,)
