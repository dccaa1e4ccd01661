"""The leading singular directions of a gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zolr.errors import UsageError
from zolr.factorizations import leading, triples
from zolr.keys import Key
from zolr.projectors import (
    Fixed,
    Patient,
    Side,
    check_rank,
    check_side,
    demanded,
    one_sided,
    turned,
)
from zolr.subspaces import Coded, Left, Right, Subspace, TwoSided


@dataclass(frozen=True)
class Svd(Fixed):
    """Subspace of the r leading singular vectors of the gradient that is at hand when a window begins.

    `P (n, r)` has orthonormal columns and no scale, so `G P Pᵀ` is the best approximation of that one gradient of rank
    r: biased, and blind to whatever later gradients hold outside of it.

    Args:
        rank: r, at least 1; capped at the shorter side.
        side: "right" (input side), "left" (output side), "short" (the smaller one, as published), or "both": `Uᵀ G V`
            with the leading vectors of both sides, r² coordinates (the "full" of the released code).

    Raises:
        UsageError: rank below 1, or an unknown side.

    Reference: arXiv 2403.03507.

    >>> import torch
    >>> gradient = torch.outer(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 4.0]))
    >>> s = Svd(rank=1).draw((3, 2), Key(0), like=gradient, gradient=gradient)
    >>> bool(torch.allclose(s.lift(s.project(gradient)), gradient, atol=1e-5))
    True
    """

    rank: int = 8
    side: Side | Literal["both"] = "short"
    needs: ClassVar[Literal["nothing", "gradient"]] = "gradient"
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_rank(self.rank)
        if self.side != "both":
            check_side(self.side)

    def draw(
        self, shape: tuple[int, ...], key: Key, *, like: Tensor, gradient: Tensor | None = None, **_: Any
    ) -> Subspace:
        """Take the subspace of one weight from its gradient.

        Raises:
            UsageError: no gradient.
        """
        gradient = demanded(gradient, self)
        if self.side == "both":
            left, right = triples(gradient, self.rank)[::2]
            return TwoSided(left.to(like), right.to(like))
        basis = leading(turned(self.side, gradient), self.rank)[1]
        return one_sided(self.side, shape, basis.to(like))


@dataclass(frozen=True)
class LazySvd(Svd, Patient):
    """`svd` for each weight at its own pace: the gap between its draws doubles whenever the last ones were alike.

    Alike is the absolute cosine of the leading directions of consecutive draws; the gap doubles at a draw when the mean of
    the last `memory` cosines is at least `threshold`.

    Args:
        threshold: in (0, 1].
        memory: number of cosines that are averaged, at least 1; before that many were seen, the gap stays.
        bits: 4 or 8 keeps the basis in whole numbers of so many bits (see `subspaces.Coded`), for one side; None as it is.
            Cosines are those of the bases that were kept.

    Raises:
        UsageError: a setting out of range.

    Reference: Q-GaLore arXiv 2407.08296.
    """

    threshold: float = 0.4
    memory: int = 5
    bits: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (None, 4, 8):
            raise UsageError(f"bases cannot be kept in {self.bits!r} bits; use 4, 8 or none")
        if self.bits is not None and self.side == "both":
            raise UsageError(
                f"a basis of {self.bits} bits has one side; use side 'short', or no bits for side 'both'"
            )
        if not 0 < self.threshold <= 1 or self.memory < 1:
            raise UsageError(
                f"threshold = {self.threshold}, memory = {self.memory} are out of range; use a threshold in (0, 1] and a "
                "memory of at least 1"
            )

    def draw(
        self, shape: tuple[int, ...], key: Key, *, like: Tensor, gradient: Tensor | None = None, **_: Any
    ) -> Subspace:
        """Take the subspace of one weight from its gradient; see `Svd`."""
        drawn = super().draw(shape, key, like=like, gradient=gradient)
        return Coded.of(drawn, self.bits) if self.bits and isinstance(drawn, Left | Right) else drawn

    def likeness(self, before: Subspace, after: Subspace) -> Tensor:
        """Absolute cosine of the leading directions; the sign of a singular vector means nothing."""
        return torch.cosine_similarity(_first(before), _first(after), dim=0).abs()

    def gap(self, gap: int, seen: Sequence[float]) -> int:
        """Twice as long where the last draws were alike."""
        last = seen[-self.memory :]
        alike = len(last) == self.memory and sum(last) / self.memory >= self.threshold
        return 2 * gap if alike else gap


def _first(subspace: Subspace) -> Tensor:
    if isinstance(subspace, TwoSided):
        return subspace.right[:, 0]
    assert isinstance(subspace, Left | Right | Coded)  # the kinds that are drawn
    return subspace.basis[:, 0]
