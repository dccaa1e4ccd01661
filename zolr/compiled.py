"""Losses that run compiled: recorded CUDA graphs on a GPU, torch.compile elsewhere.

A pass of a large model over a few short rows takes less time on a GPU than the host needs to launch it. A recorded graph
launches the same kernels in one call, so its losses are those of the plain pass; torch.compile makes kernels of its own.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from zolr.variables import Variable, narrow, placed

GRAPHS = 16  # batch shapes that are recorded; others run as they are

Loss = Callable[[Any], Any]


Recording = Callable[
    [list[Tensor], list[Tensor]], Any
]  # tensors of a batch, points -> loss in any of its forms


class Compiled:
    """A loss of one batch, compiled on the way; where that fails, the plain loss and one warning that says why.

    On a GPU the forward pass, and under autograd the backward pass too, is recorded as a CUDA graph the second time that
    a shape of batch comes, and replayed from then on. On a CPU the loss goes through torch.compile.

    Args:
        loss: of one batch; a scalar mean, a `(sum, count)` pair, or per-example losses.
        variables: what the loss depends on besides the batch, at its current points. They are made steady: a new
            subspace then takes the memory of the old one, and a recording outlives the window.
        training: whether the model is in training mode.
    """

    def __init__(self, loss: Loss, variables: Sequence[Variable], training: Callable[[], bool]) -> None:
        self.loss, self.variables, self.training = loss, variables, training
        self._owned: tuple[tuple[Any, Any], ...] | None = None  # subspaces and values that recordings read
        for variable in variables:
            variable.steady = True
        self.failed = ""  # why the plain loss is used
        self._fused: Loss | None = None
        self._recordings: dict[Any, Recording] = {}
        self._pool: Any = None  # memory that recordings of forward passes share
        self._seen: set[Any] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiled":
        loss, variables = copy.deepcopy(self.loss, memo), copy.deepcopy(self.variables, memo)
        return Compiled(loss, variables, copy.deepcopy(self.training, memo))

    def __call__(self, batch: Any) -> Any:
        """The loss of one batch at the variables' current points."""
        # tangents and vmap axes pass by Python, and so does who counts the memory of every operation
        if self.failed or any(not v.plain for v in self.variables) or _is_watched():
            return self.loss(batch)
        if any(v.redrawn for v in self.variables):
            self._give_up(RuntimeError("directions as large as a weight are drawn in each forward anew"))
            return self.loss(batch)
        return self._replayed(batch) if self.variables[0].value.is_cuda else self._compiled(batch)

    def _give_up(self, error: Exception) -> None:
        self.failed = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        self._forget()
        warnings.warn(f"the loss is evaluated as it is, not compiled: {self.failed}", stacklevel=2)

    def _compiled(self, batch: Any) -> Any:
        # in one piece or not at all: pieces are kept by what they were compiled for, and do not see that a module reads a
        # weight which stands before its own parameter
        self._fused = self._fused or cast(Loss, torch.compile(self.loss, fullgraph=True))
        try:
            return self._fused(batch)
        except Exception as error:
            value = self.loss(
                batch
            )  # an error of the loss itself is raised here, as it would be without compile
            self._give_up(error)
            return value

    # ---- recording -----------------------------------------------------------------------------------------------

    def _replayed(self, batch: Any) -> Any:
        if any(v.decay != 1.0 for v in self.variables):
            self._give_up(RuntimeError("weight decay changes a number inside of the forward at every step"))
            return self.loss(batch)
        leaves, structure = tree_flatten(batch)
        points = [v.shifted_to for v in self.variables]
        key = (
            torch.is_grad_enabled(),
            tuple(v.value.requires_grad for v in self.variables),  # those that are trained now
            self.training(),
            str(structure),
            tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves),
            tuple(None if p is None else p.shape for p in points),
            # only a forward at the values themselves leaves out what has not moved
            tuple(p is None and v.moved for v, p in zip(self.variables, points, strict=True))
            if not torch.is_grad_enabled()
            else None,
        )
        owned = tuple((v.subspace, v.value) for v in self.variables)
        if self._owned is None or any(
            a is not c or b is not d for (a, b), (c, d) in zip(owned, self._owned, strict=True)
        ):
            self._forget()  # they read memory that is no longer that of the variables
            self._owned = owned
        found = self._recordings.get(key)
        if found is None and key not in self._seen:  # libraries make their workspaces in a plain run
            self._seen.add(key)
            return self.loss(batch)
        if found is None and len(self._recordings) >= GRAPHS:
            return self.loss(batch)
        if found is None:
            record = self._record_both if torch.is_grad_enabled() else self._record
            noise = torch.cuda.get_rng_state()  # trying the pass out draws from it
            try:
                found = record(leaves, structure, points)
                torch.cuda.set_rng_state(noise)
            except RuntimeError as error:  # an operation that waits for the device, for one
                torch.cuda.synchronize()
                value = self.loss(batch)
                self._give_up(error)
                return value
            self._recordings[key] = found
        return found([x for x in leaves if isinstance(x, Tensor)], [p for p in points if p is not None])

    def _forget(self) -> None:
        self._recordings.clear()
        self._pool = None  # goes with the last recording in it

    def _record(self, leaves: list[Any], structure: Any, points: list[Tensor | None]) -> Recording:
        """Record one forward around copies of what may be elsewhere the next time.

        Replays follow each other and leave nothing behind but what is copied from them at once, so that all shapes of batches
        can work in the memory of the largest.
        """
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        own = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        copies = [None if p is None else p.clone() for p in points]
        graph = torch.cuda.CUDAGraph()
        with placed(self.variables, copies), torch.cuda.graph(graph, pool=self._pool):
            output = self.loss(tree_unflatten(own, structure))
        read = [x for x in own if isinstance(x, Tensor)] + [p for p in copies if p is not None]

        def replay(given: list[Tensor], moved: list[Tensor]) -> Any:
            torch._foreach_copy_(read, given + moved, non_blocking=True)  # pyright: ignore
            graph.replay()
            return tree_map_only(Tensor, torch.clone, output)

        return replay

    def _record_both(self, leaves: list[Any], structure: Any, points: list[Tensor | None]) -> Recording:
        """Record a forward and its backward, by the values themselves: their memory stays where it is."""
        values = [v.value for v in self.variables]
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        assert all(point is None for point in points)  # backprop differentiates at the values

        def run(*tensors: Tensor) -> Any:
            own = list(leaves)
            for i, tensor in zip(places, tensors[len(values) :], strict=True):
                own[i] = tensor
            with placed(self.variables, narrow(self.variables, tensors[: len(values)])):
                return self.loss(tree_unflatten(own, structure))

        sample = (*values, *(leaves[i].clone() for i in places))
        both: Any = torch.cuda.make_graphed_callables(run, sample, allow_unused_input=True)

        def replay(given: list[Tensor], moved: list[Tensor]) -> Any:
            # a first gradient is that of the recording itself, which the next replay would write over
            for value in values:
                if value.grad is not None:
                    value.grad = value.grad.clone()
            return both(*values, *given)

        return replay


def _is_watched() -> bool:
    """Whether a dispatch mode sees every operation."""
    return torch._C._len_torch_dispatch_stack() > 0
