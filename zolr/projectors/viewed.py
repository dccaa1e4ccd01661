"""A subspace of the weight seen in another shape: finer parts, fewer directions."""

from dataclasses import dataclass, fields, replace
from math import gcd
from typing import Any, ClassVar, Literal

from torch import Tensor

from zolr.errors import UsageError
from zolr.keys import Key
from zolr.projectors import Fixed, Projector, check_rank, gaussian_basis
from zolr.subspaces import Right, Subspace, Viewed


@dataclass(frozen=True)
class View(Fixed):
    """Every row of a weight cut into c parts, all projected by one basis: `(m c, n / c)` instead of `(m, n)`.

    At one budget `c r` a row, more parts mean more coordinates of less precision each.

    Args:
        rank: r of the short basis, at least 1; capped at `n / c`.
        granularity: c, at least 1; the greatest common divisor of it and n is taken.
        around: law of the short basis; its own rank gives way to `rank`, and its side to the input side. None for
            independent Gaussian entries.

    Raises:
        UsageError: an argument out of range, or a law that is not drawn on the input side by its key or gradient alone.

    Reference: VLoRP arXiv 2505.01744.
    """

    rank: int = 2
    granularity: int = 16
    around: Projector | None = None
    needs: ClassVar[Literal["nothing", "gradient"]] = "nothing"
    unbiased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rank(self.rank)
        if (
            isinstance(self.granularity, bool)
            or not isinstance(self.granularity, int)
            or self.granularity < 1
        ):
            raise UsageError(
                f"granularity {self.granularity!r} is no number of parts; use a whole number of at least 1"
            )
        if self.around is None:
            return
        if self.around.learns_from != "nothing" or "rank" not in {f.name for f in fields(self.around)}:  # type: ignore[arg-type]
            raise UsageError(
                f"a view cannot go around {type(self.around).__name__}, which has no rank or learns from what it sees; use "
                "Stiefel, Coordinate or Svd"
            )
        # what it needs is what the law inside needs
        object.__setattr__(self, "needs", self.around.needs)

    def draw(
        self,
        shape: tuple[int, ...],
        key: Key,
        *,
        like: Tensor,
        gradient: Tensor | None = None,
        previous: Subspace | None = None,
        **_: Any,
    ) -> Subspace:
        """Draw the subspace of one weight.

        Raises:
            UsageError: the law inside gives no basis of the input side.
        """
        m, n = shape
        parts = gcd(self.granularity, n)
        small = (m * parts, n // parts)
        if self.around is None:
            return Viewed(gaussian_basis(small[1], min(self.rank, small[1]), key, like), m, parts)
        known = {f.name for f in fields(self.around)}  # type: ignore[arg-type]
        settings = {"rank": self.rank, **({"side": "right"} if "side" in known else {})}
        inner: Projector = replace(self.around, **settings)  # type: ignore[type-var]
        drawn = inner.draw(
            small,
            key,
            like=like,
            gradient=None if gradient is None else gradient.reshape(small),
            previous=Right(previous.basis, small[0]) if isinstance(previous, Viewed) else None,
        )
        if not isinstance(drawn, Right):
            raise UsageError(
                f"a view cannot go around {type(self.around).__name__}, which projects another side than the input's; use "
                "Stiefel, Coordinate or Svd"
            )
        return Viewed(drawn.basis, m, parts)
