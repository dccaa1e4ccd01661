"""Forward-mode differentiation along random directions."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zolr.distributed import share_of
from zolr.errors import UsageError
from zolr.estimators import Emit, Estimate, Loss, check_probes, combine, mean_of, parts_of, same_noise
from zolr.keys import Key
from zolr.probes import LAWS, Probe
from zolr.variables import Variable, layout


@dataclass(frozen=True)
class Forward:
    """`(1/k) sum_i ⟨∇L, z_i⟩ z_i` with exact directional derivatives, from one forward each.

    No finite difference and no `eps`; costs about two forwards in time and keeps no graph. Attention runs under the
    math kernel, since fused kernels have no forward-mode rule.

    Args:
        probes: k, directions a step.
        law: "rademacher", "gaussian" or "sphere".

    Raises:
        UsageError: an argument out of range.

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
    def __call__(
        self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], emit: Emit, key: Key
    ) -> Estimate:
        """Emit the gradients; see `Estimator`."""
        directions = [Probe(layout(variables), self.law, key.fold_in("probe", i)) for i in range(self.probes)]
        share = share_of(batches)
        own = directions[share.turn(len(directions))]
        seen = []
        with same_noise(variables[0].value.device) as rewind:
            for direction in own:
                rewind()
                with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), ExitStack() as stack:
                    for variable in variables:
                        tangent = variable.mask(direction(variable.name).to(variable.value.dtype))
                        dual = forward_ad.make_dual(variable.value.detach(), tangent)
                        stack.enter_context(variable.at(dual, plain=False))
                    parts, tangents = forward_ad.unpack_dual(parts_of(loss, batches))
                    moved = torch.zeros_like(parts[0]) if tangents is None else tangents[0]
                    seen.append(torch.stack([parts, torch.stack([moved, parts[1]])]))  # (2, 2, n)
        both = mean_of(batches, share.stacked(seen, 2, 2))
        losses, values = share.of_all_probes(both, len(directions)).unbind(1)
        for variable in variables:
            emit(variable, combine(variable, directions, values / self.probes))
        return Estimate(losses.mean(), values)
