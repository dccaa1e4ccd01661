"""Batches by their rows: the same examples several times in one, for as many points of the model."""

import copy
from collections import UserDict
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


class NotByRows(Exception):
    """Several points cannot be evaluated by the rows of one batch; says why."""


def rows_in(batch: Any) -> int:
    """Examples of a batch, where all of its tensors have one leading axis for them.

    Raises:
        NotByRows: they do not, or there is something else in it that might belong to rows.
    """
    sizes = set()
    for leaf in tree_leaves(_opened(batch)):
        if isinstance(leaf, Tensor):
            sizes.add(len(leaf) if leaf.dim() else None)
        elif not (leaf is None or isinstance(leaf, bool | int | float | str)):
            raise NotByRows(f"a batch has a {type(leaf).__name__} in it")
    if len(sizes) != 1 or None in sizes:
        raise NotByRows("the tensors of a batch have not one number of rows")
    return sizes.pop()


def repeated(batch: Any, count: int) -> Any:
    """A batch with all of its rows again behind them, so often in all."""
    again = lambda rows: rows.repeat(count, *[1] * (rows.dim() - 1))  # noqa: E731
    found = tree_map_only(Tensor, again, _opened(batch))
    if not isinstance(batch, UserDict):
        return found
    # of its own type: models and losses read by attribute what transformers encodes
    opened = copy.copy(batch)
    opened.data = found
    return opened


def _opened(batch: Any) -> Any:
    """The batch as torch's pytree knows it."""
    return batch.data if isinstance(batch, UserDict) else batch
