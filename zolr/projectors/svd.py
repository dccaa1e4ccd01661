"""The leading singular directions of a gradient."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from zolr.errors import UsageError
from zolr.keys import Key
from zolr.projectors import Fixed, Side, check_rank, check_side, leading, one_sided, oriented
from zolr.subspaces import Subspace


@dataclass(frozen=True)
class Svd(Fixed):
    """Subspace of the r leading singular vectors of the gradient that is at hand when a window begins.

    `P (n, r)` has orthonormal columns and no scale, so `G P Pᵀ` is the best approximation of that one gradient of rank
    r: biased, and blind to whatever later gradients hold outside of it.

    Args:
        rank: r, at least 1; capped at the shorter side.
        side: "right" (input side), "left" (output side), or "short" (the smaller one, as published).

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
    side: Side = "short"
    needs: ClassVar[Literal["nothing", "gradient"]] = "gradient"
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_side(self.side)

    def draw(
        self, shape: tuple[int, ...], key: Key, *, like: Tensor, gradient: Tensor | None = None, **_: Any
    ) -> Subspace:
        """Take the subspace of one weight from its gradient.

        Raises:
            UsageError: no gradient.
        """
        if gradient is None:
            raise UsageError(
                "projector 'svd' needs a dense gradient to draw from; use a dense method such as 'galore'"
            )
        return one_sided(self.side, shape, leading(oriented(self.side, gradient, like), self.rank).to(like))
