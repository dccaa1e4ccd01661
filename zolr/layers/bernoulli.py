"""A coin for each block."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from zolr.errors import UsageError
from zolr.keys import Key
from zolr.layers import Outside, check_every, check_outside


@dataclass(frozen=True)
class Bernoulli:
    """Each block with a probability of its own in each period; where all coins say no, the block that was closest to yes.

    Args:
        share: probability that a block is active, above 0 and at most 1.
        every: optimizer steps of a period.
        outside: weights outside of all blocks: "always" active, "never", or "blocks" (a coin for each module).

    Raises:
        UsageError: an argument out of range.
    """

    share: float = 0.5
    every: int = 20
    outside: Outside = "always"
    keeps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_every(self.every)
        check_outside(self.outside)
        if not 0 < self.share <= 1:
            raise UsageError(f"share = {self.share} is no probability of a block; use a number in (0, 1]")

    def active(self, blocks: int, period: int, key: Key) -> Collection[int]:
        """Those whose coin says yes."""
        coins = [key.fold_in("period", period, block).integer() / 2**64 for block in range(blocks)]
        return [i for i, coin in enumerate(coins) if coin < self.share] or (coins.index(min(coins)),)
