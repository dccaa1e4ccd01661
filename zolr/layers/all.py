"""All weights, always."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from zolr.keys import Key
from zolr.layers import Outside


@dataclass(frozen=True)
class All:
    """Every block is active in one period without end."""

    keeps: ClassVar[bool] = True

    @property
    def every(self) -> int | None:
        """Without end."""
        return None

    @property
    def outside(self) -> Outside:
        """Active too."""
        return "always"

    def active(self, blocks: int, period: int, key: Key) -> Collection[int]:
        """All of them."""
        return range(blocks)
