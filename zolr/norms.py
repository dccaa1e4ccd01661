"""Running statistics of normalizations: what training changes in a model beside its weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from zolr.distributed import Team


class Running:
    """The running statistics of a model: batch norms, and instance norms that track them.

    Args:
        model: whose.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name: m for name, m in model.named_modules() if isinstance(m, _NormBase)}

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every buffer by its name in the model."""
        for place, module in self._modules.items():
            yield from module.named_buffers(prefix=place)

    @property
    def mixing(self) -> bool:
        """Whether a batch norm takes its statistics from the rows of a batch in evaluation too."""
        return any(isinstance(m, _BatchNorm) and m.running_mean is None for m in self._modules.values())

    def kept(self) -> list[tuple[Tensor, Tensor]]:
        """Buffers that forward passes would change, those of modules in training mode, and what they are now."""
        return [(b, b.clone()) for m in self._modules.values() if m.training for b in m.buffers()]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Forward passes inside leave no trace: they see what has been counted already."""
        before = self.kept()
        try:
            yield
        finally:
            put_back(before)

    @torch.no_grad()
    def combine(self, before: Sequence[tuple[Tensor, Tensor]], team: Team, batches: Sequence[int]) -> None:
        """Make the statistics those of one process that saw the micro-batches of all ranks, in their order.

        A batch moves an average `a` to `(1 - momentum) a + momentum x`, or, without a momentum, to the mean of all so far.
        So a rank that made `b` of `a` in `n` batches would make `b + (1 - momentum)ⁿ (c - a)` of any other `c`.

        Args:
            before: what `kept` said before the step, alike on all ranks.
            batches: micro-batches of each rank.
        """
        old = {id(buffer): value for buffer, value in before}
        for module in self._modules.values():
            mean, var, count = module.running_mean, module.running_var, module.num_batches_tracked
            if mean is None or var is None or count is None or id(mean) not in old:
                continue
            if isinstance(module, nn.SyncBatchNorm):  # made of all ranks' batches as it is
                continue
            begun = torch.cat([old[id(b)].reshape(-1).double() for b in (mean, var, count)])
            own = torch.cat([b.reshape(-1).double() for b in (mean, var, count)])
            ended = team.joined(own, [len(own)] * team.size, "control").view(team.size, -1)
            # instance norms count no batches, and without a momentum they stay as they are
            counted = isinstance(module, _BatchNorm)
            seen = ended[:, -1] - begun[-1] if counted else own.new_tensor(batches)
            if counted and module.momentum is None:
                known = begun[-1] + seen
                sums = (known[:, None] * ended).sum(0) - (team.size - 1) * begun[-1] * begun
                total = sums / (begun[-1] + seen.sum()).clamp_min(1.0)
            else:
                total = begun.clone()
                for end, n in zip(ended, seen, strict=True):
                    total = end + (1.0 - (module.momentum or 0.0)) ** n * (total - begun)
            total[-1] = begun[-1] + (ended[:, -1] - begun[-1]).sum()
            sizes = [b.numel() for b in (mean, var, count)]
            for buffer, part in zip((mean, var, count), total.split(sizes), strict=True):
                buffer.copy_(part.view(buffer.shape))


def put_back(kept: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Give buffers the values that they had."""
    for buffer, value in kept:
        # past the version that autograd compares: a backward pass to come has saved it, and in training does not look at it
        buffer.data.copy_(value)
