"""Weights that a loss reads itself, past the modules that know where they are evaluated."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from zolr.attaching import binds
from zolr.held import compute
from zolr.variables import Variable

_OWN, _TORCH = (str(Path(package).parent) + os.sep for package in (__file__, torch.__file__))
_FORWARDS = [
    f.__code__.co_filename for f in (binds, compute)
]  # of what modules are given, around their own forward
# what takes the shape or the dtype of a tensor and none of its numbers, and what says that it is not to be derived
_HARMLESS = (
    "detach",
    "alias",
    "new_",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
)


class Reads(TorchDispatchMode):
    """Notes, while it is entered, which trained weights are used as they are stored, and by which line.

    There they are without the coordinates, without a probe and without a gradient, so that what is computed from them trains
    nothing: a penalty on `model.parameters()`, or a map that is tied by hand. What has been compiled is
    not looked into.

    Args:
        variables: whose weights.
        derived: whether losses are derived by autograd, so that what is computed without it is meant for the eye alone.
    """

    def __init__(self, variables: Sequence[Variable], derived: bool) -> None:
        super().__init__()
        # offloading replaces weights while this is entered: of those that were let go, other tensors would get the number
        self._weights = [(site.weight, v) for v in variables for site in v.sites]
        self._variables = {id(weight): v for weight, v in self._weights}
        self._derived = derived
        self.found: dict[str, str] = {}  # names of weights, and "file:line"

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whoever compiles does so as if this were not here."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation as it is, looked at."""
        read = [x for x in _flat((*args, *(kwargs or {}).values())) if id(x) in self._variables]
        name = func._schema.name.removeprefix("aten::")
        seen = not self._derived or torch.is_grad_enabled()
        if read and seen and not name.startswith(_HARMLESS):
            for weight in read:
                variable = self._variables[id(weight)]
                line = None if variable.lent else _line(sys._getframe(1), variable)
                if line is not None:
                    self.found.setdefault(variable.name, line)
        return func(*args, **(kwargs or {}))


def _flat(given: Sequence[Any]) -> Iterator[Any]:
    """Arguments, and what is in those that are lists."""
    for part in given:
        yield from part if isinstance(part, list | tuple) else (part,)


def _line(frame: FrameType | None, variable: Variable) -> str | None:
    """Where a weight was used, outside of torch; None where the forward that we gave its module did it, or another line of ours."""
    line = None
    while frame is not None:
        file = frame.f_code.co_filename
        watches = frame.f_code.co_name.startswith("__torch_")  # another mode that calls go through
        if line is None and not watches and not file.startswith(_TORCH) and file not in _FORWARDS:
            if file.startswith((_OWN, "<")):  # the latter has been compiled
                return None
            line = f"{file}:{frame.f_lineno}"
        ours = file in _FORWARDS and frame.f_code.co_name == "forward"
        if ours and binds(frame.f_locals.get("self"), variable):
            return None
        frame = frame.f_back
    return line


class TakenApart(TorchFunctionMode):
    """Notes, while it is entered, whether one of some tensors is taken apart by number (`batch[0]`, or `x, y = batch`).

    That is what a loss does with a batch of several parts, and seldom with one tensor of rows.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._tensors = {id(tensor) for tensor in tensors}
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation as it is, looked at."""
        if args and id(args[0]) in self._tensors:
            by_number = func is Tensor.__getitem__ and type(args[1]) is int
            self.found = self.found or by_number or func in (Tensor.__iter__, Tensor.unbind)
        return func(*args, **(kwargs or {}))
