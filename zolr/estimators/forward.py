"""Forward-mode differentiation along random directions."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from zolr.distributed import share_of
from zolr.errors import UsageError
from zolr.estimators import (
    ByProbes,
    Found,
    Loss,
    check_probes,
    mean_of,
    parts_of,
    same_noise,
)
from zolr.keys import Key
from zolr.probes import LAWS
from zolr.variables import Variable

# tangents grow from layer to layer, and those of unit directions leave the range of float16; a power of two costs no precision
_SCALE = 2.0**-8


class _TangentsLikeValues(TorchFunctionMode):
    """Has every result's tangent in the dtype of the result.

    Normalization keeps its statistics in float32, on a GPU and where its own weights are so, and hands on a tangent in
    float32 below a value in bfloat16; the next product then refuses the two. So do products under autocast.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        value, tangent = forward_ad.unpack_dual(result)
        if tangent is None or tangent.dtype == value.dtype:
            return result
        return forward_ad.make_dual(value, tangent.to(value.dtype))


class _Seen(TorchDispatchMode):
    """Changes nothing, but that some mode is on.

    Forward-mode rules of torch (that of layer_norm) sum in another order while one is, as where memory is counted: tangents
    would depend on who looks on, and a resumed run, which counts its first steps again, would not have the bits of the whole one.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def _refusals_explained() -> Iterator[None]:
    """One line for an operation that torch cannot derive in forward mode."""
    try:
        yield
    except NotImplementedError as error:
        if "forward AD" not in str(error) and "forward mode AD" not in str(error):
            raise
        named = re.search(r"forward AD with (\w+)", str(error))
        what = f"'{named[1]}'" if named else "a torch.autograd.Function without a jvp of its own"
        raise UsageError(
            f"torch cannot derive {what} in forward mode, and the loss uses it; use paradigm 'fo' or 'zo'"
        ) from error


@dataclass(frozen=True)
class Forward(ByProbes):
    """`(1/k) sum_i ⟨∇L, z_i⟩ z_i` with exact directional derivatives, from one forward each.

    No finite difference and no `eps`; costs about two forwards in time and keeps no graph. Attention runs under the
    math kernel, since fused kernels have no forward-mode rule.

    Args:
        probes: k, directions a step.
        law: "rademacher", "gaussian" or "sphere".

    Raises:
        UsageError: an argument out of range, or in a step a loss without a derivative, or an operation that torch cannot derive
            in forward mode.

    Reference: Baydin et al., Gradients without backpropagation (2022).
    """

    probes: int = 1
    law: str = "rademacher"
    paradigm: ClassVar[Literal["fo", "zo", "fwd"]] = "fwd"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_probes(self.probes)
        if self.law not in LAWS:
            raise UsageError(f"probe law '{self.law}' is not known; use one of {', '.join(LAWS)}")

    def forwards(self, batches: int) -> int:
        """A tangent forward costs about two."""
        return 2 * batches * self.probes

    @torch.no_grad()
    def measure(self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], key: Key) -> Found:
        """Measure the slopes; see `Measuring`."""
        directions = self.draw(variables, key)
        share = share_of(batches)
        own = directions[share.turn(len(directions))]
        seen = []
        with same_noise(variables[0].value.device) as rewind:
            for direction in own:
                rewind()
                with (
                    _refusals_explained(),
                    forward_ad.dual_level(),
                    sdpa_kernel(SDPBackend.MATH),
                    ExitStack() as stack,
                ):
                    if variables[0].value.device.type == "cpu":  # where memory is counted by such a mode
                        stack.enter_context(_Seen())
                    stack.enter_context(_TangentsLikeValues())
                    for variable in variables:
                        tangent = variable.mask(direction(variable.name).to(variable.value.dtype)) * _SCALE
                        dual = forward_ad.make_dual(variable.value.detach(), tangent)
                        stack.enter_context(variable.at(dual, plain=False))
                    parts, tangents = forward_ad.unpack_dual(parts_of(loss, batches))
                    if (
                        tangents is None and float(parts[1].sum()) > 0
                    ):  # a batch without labels has none either
                        raise UsageError(
                            "the loss has no derivative in any trained weight; use paradigm 'zo' (--paradigm zo), or another loss"
                        )
                    moved = torch.zeros_like(parts[0]) if tangents is None else tangents[0] / _SCALE
                    seen.append(torch.stack([parts, torch.stack([moved, parts[1]])]))  # (2, 2, n)
        both = mean_of(batches, share.stacked(seen, 2, 2))
        losses, slopes = share.of_all_probes(both, len(directions)).unbind(1)
        return self._found(losses.mean(), slopes, variables, directions)
