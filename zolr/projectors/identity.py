"""The whole space: plain training and MeZO."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from zolr.keys import Key
from zolr.projectors import Fixed
from zolr.subspaces import Full, Subspace


@dataclass(frozen=True)
class Identity(Fixed):
    """No projection: the coordinates are the weight itself."""

    needs: ClassVar[Literal["nothing", "gradient"]] = "nothing"
    unbiased: ClassVar[bool] = True

    def draw(self, shape: tuple[int, ...], key: Key, *, like: Tensor, **_: Any) -> Subspace:
        """The full space of the weight; nothing is drawn."""
        return Full(tuple(shape))
