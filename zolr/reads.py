"""Weights that a loss reads itself, past the modules that know where they are evaluated."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zolr.variables import Variable, binds

_OWN, _TORCH = (str(Path(package).parent) + os.sep for package in (__file__, torch.__file__))
# whoever calls these says that what is read is not to be derived; others, such as `shape`, give no numbers
_HARMLESS = {Tensor.detach, Tensor.data.__get__, Tensor.requires_grad_}  # pyright: ignore[reportAttributeAccessIssue]


class Reads(TorchFunctionMode):
    """Notes, while it is entered, which trained weights are used as they are stored, and by which line.

    There they are without the coordinates, without a probe and without a gradient, so that what is computed from them trains
    nothing: a penalty on `model.parameters()`, or a map that is tied by hand.

    Args:
        variables: whose weights.
    """

    def __init__(self, variables: Sequence[Variable]) -> None:
        super().__init__()
        self._variables = {id(site.weight): v for v in variables for site in v.sites}
        self.found: dict[str, str] = {}  # names of weights, and "file:line"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The call as it is, looked at."""
        given = (*args, *(kwargs or {}).values())
        read = [
            part for part in _flat(given) if isinstance(part, nn.Parameter) and id(part) in self._variables
        ]
        result = func(*args, **(kwargs or {}))
        if read and func not in _HARMLESS and isinstance(result, Tensor) and result.is_floating_point():
            for weight in read:
                variable = self._variables[id(weight)]
                line = _line(sys._getframe(1), variable)
                if line is not None:
                    self.found.setdefault(variable.name, line)
        return result


def _flat(given: Sequence[Any]) -> list[Any]:
    """Arguments, and what is in those that are lists."""
    return [x for part in given for x in (part if isinstance(part, list | tuple) else (part,))]


def _line(frame: FrameType | None, variable: Variable) -> str | None:
    """Where a weight was used, outermost of torch; None where its own module did it, or we did."""
    line = None
    while frame is not None:
        file = frame.f_code.co_filename
        if line is None and not file.startswith(_TORCH):
            if file.startswith(_OWN):
                return None
            line = f"{file}:{frame.f_lineno}"
        if binds(frame.f_locals.get("self"), variable) and frame.f_code.co_name == "forward":
            return None
        frame = frame.f_back
    return line
