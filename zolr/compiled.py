"""Losses that run compiled: recorded CUDA graphs for forward passes, torch.compile for everything else.

A forward of a large model on a few short rows takes less time on a GPU than the host needs to launch it. A recorded
graph launches the same kernels in one call, so its losses are those of the plain forward; torch.compile makes kernels
of its own.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from zolr.variables import Variable

GRAPHS = 16  # batch shapes that are recorded in one window; others run as they are

Loss = Callable[[Any], Any]


@dataclass(frozen=True)
class Recording:
    """One recorded forward.

    Args:
        graph: what is replayed.
        inputs: the batch's tensors that it reads.
        points: the coordinates that it reads.
        output: the loss that it writes, in any of its three forms.
        subspaces: what it was recorded in; held, so that their memory stays theirs.
    """

    graph: Any
    inputs: list[Tensor]
    points: list[Tensor]
    output: Any
    subspaces: tuple[Any, ...]


class Compiled:
    """A loss of one batch, compiled on the way; where that fails, the plain loss and one warning that says why.

    Under autograd, and on a CPU, the loss goes through torch.compile. Without autograd on a GPU it is recorded as a CUDA
    graph the second time that a shape of batch comes, once for every window, and replayed from then on.

    Args:
        loss: of one batch; a scalar mean, a `(sum, count)` pair, or per-example losses.
        variables: what the loss depends on besides the batch, at its current points.
    """

    def __init__(self, loss: Loss, variables: Sequence[Variable]) -> None:
        self.loss, self.variables = loss, variables
        self.failed = ""  # why the plain loss is used
        self._fused: Loss | None = None
        self._recordings: dict[Any, Recording] = {}
        self._seen: set[Any] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiled":
        return Compiled(copy.deepcopy(self.loss, memo), copy.deepcopy(self.variables, memo))

    def __call__(self, batch: Any) -> Any:
        """The loss of one batch at the variables' current points."""
        # tangents and vmap axes pass by Python, and so does who counts the memory of every operation
        if self.failed or any(not v.plain for v in self.variables) or _is_watched():
            return self.loss(batch)
        recorded = self.variables[0].value.is_cuda and not torch.is_grad_enabled()
        return self._replayed(batch) if recorded else self._compiled(batch)

    def _give_up(self, error: Exception) -> None:
        self.failed = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        self._recordings.clear()
        warnings.warn(f"the loss is evaluated as it is, not compiled: {self.failed}", stacklevel=2)

    def _compiled(self, batch: Any) -> Any:
        if self._fused is not None:
            return self._fused(batch)
        fused = torch.compile(self.loss)
        try:
            value = fused(batch)
        except Exception as error:
            value = self.loss(
                batch
            )  # an error of the loss itself is raised here, as it would be without compile
            self._give_up(error)
        else:
            self._fused = cast(Loss, fused)
        return value

    # ---- recording -----------------------------------------------------------------------------------------------

    def _replayed(self, batch: Any) -> Any:
        if any(v.redrawn for v in self.variables):
            self._give_up(RuntimeError("directions as large as a weight are drawn in each forward anew"))
            return self.loss(batch)
        leaves, structure = tree_flatten(batch)
        points = [v.shifted_to for v in self.variables]
        key = (
            str(structure),
            tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves),
            tuple(None if p is None else p.shape for p in points),
            tuple(v.decay for v in self.variables),
            tuple(v.moved for v in self.variables),
        )
        subspaces = tuple(v.subspace for v in self.variables)
        found = self._recordings.get(key)
        if found is not None and any(a is not b for a, b in zip(found.subspaces, subspaces, strict=True)):
            self._recordings.clear()  # a new window: no recording will be right again
            found = None
        if found is None and key not in self._seen:  # libraries make their workspaces in a plain run
            self._seen.add(key)
            return self.loss(batch)
        if found is None and len(self._recordings) >= GRAPHS:
            return self.loss(batch)
        if found is None:
            try:
                found = self._record(leaves, structure, points, subspaces)
            except RuntimeError as error:  # an operation that waits for the device, for one
                torch.cuda.synchronize()
                value = self.loss(batch)
                self._give_up(error)
                return value
            self._recordings[key] = found
        given = [x for x in leaves if isinstance(x, Tensor)] + [p for p in points if p is not None]
        torch._foreach_copy_(found.inputs + found.points, given, non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]
        found.graph.replay()
        return tree_map_only(Tensor, torch.clone, found.output)

    def _record(
        self, leaves: list[Any], structure: Any, points: list[Tensor | None], subspaces: tuple[Any, ...]
    ) -> Recording:
        """Record one forward around copies of what may be elsewhere the next time."""
        own = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        copies = [None if p is None else p.clone() for p in points]
        graph = torch.cuda.CUDAGraph()
        with ExitStack() as stack:
            for variable, point in zip(self.variables, copies, strict=True):
                if point is not None:
                    stack.enter_context(variable.at(point))
            with torch.cuda.graph(graph):
                output = self.loss(tree_unflatten(own, structure))
        inputs = [x for x in own if isinstance(x, Tensor)]
        return Recording(graph, inputs, [p for p in copies if p is not None], output, subspaces)


def _is_watched() -> bool:
    """Whether a dispatch mode sees every operation."""
    return torch._C._len_torch_dispatch_stack() > 0
