"""Slopes along few coordinates at a time, which are sampled by what the gradient holds there."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zolr.errors import UsageError, is_count
from zolr.estimators import (
    BySlopes,
    Found,
    Loss,
    check_eps,
    evaluate,
    mean_loss,
    same_noise,
)
from zolr.keys import Key
from zolr.probes import LAWS, Layout, Probe, Space
from zolr.spectra import mixed_probabilities, sample
from zolr.variables import Variable


@dataclass(frozen=True)
class Coordinates(BySlopes):
    """Gradient estimate `sum_(b in I) c_b z_b / p_b` over sampled blocks b of coordinates.

    A block is a row of a matrix of coordinates, or a whole vector; `z_b` is a direction inside of it and `c_b` the
    central difference along it. For blocks of one entry `c_b z_b` is the partial derivative itself, whatever the sign.
    `I` has a fixed size and inclusion probabilities `p_b`, so the mean is the gradient up to `O(eps²)`, and the second
    moment `sum_b d_b ‖g_b‖² / p_b` for `d_b` entries in block b and signs as directions. It is least for
    `p_b = min(1, sqrt(d_b) ‖g_b‖ / lambda)`: with a guide, its estimate stands for `g_b`; without, `p_b` follows `d_b`.

    Args:
        eps: radius; None lets the engine choose.
        blocks: size of I; all blocks where there are no more.
        law: "rademacher", "gaussian" or "sphere", of the direction inside a block.
        alpha: share of the uniform law in the probabilities, in (0, 1]; it bounds `1 / p_b`.

    Raises:
        UsageError: an argument out of range.

    Reference: ZO-HGD arXiv 2012.11518 (coordinates; the blocks, for weights of a language model, are ours).
    """

    eps: float | None = None
    blocks: int = 2
    law: str = "rademacher"
    alpha: float = 0.2
    paradigm: ClassVar[Literal["fo", "zo", "fwd"]] = "zo"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_eps(self.eps)
        if not is_count(self.blocks):
            raise UsageError(
                f"{self.blocks!r} blocks a step are not possible; use a whole number of at least 1"
            )
        if self.law not in LAWS:
            raise UsageError(f"probe law '{self.law}' is not known; use one of {', '.join(LAWS)}")
        if not 0 < self.alpha <= 1:
            raise UsageError(f"alpha = {self.alpha} is outside (0, 1]; without it the estimate loses blocks")

    def forwards(self, batches: int) -> int:
        """Two forwards a block and micro-batch."""
        return 2 * batches * self.blocks

    @torch.no_grad()
    def measure(
        self,
        loss: Loss,
        batches: Sequence[Any],
        variables: Sequence[Variable],
        key: Key,
        guide: Found | None = None,
    ) -> Found:
        """Measure the slopes; see `Guided`."""
        if self.eps is None:
            raise UsageError("coordinates have no eps; give one, or let the engine choose with lr=None")
        probes = self._draw(variables, key, guide)
        slopes, losses = [], []
        with same_noise(variables[0].value.device) as rewind:
            for variable, probe, _ in probes:
                plus, minus = evaluate(
                    mean_loss,
                    loss,
                    batches,
                    [variable],
                    [(probe, self.eps), (probe, -self.eps)],
                    rewind,
                )
                losses.append((plus + minus) / 2)
                slopes.append((plus - minus) / (2 * self.eps))
        return self._found(torch.stack(losses).mean(), torch.stack(slopes), probes)

    @torch.no_grad()
    def from_slopes(
        self,
        loss: Tensor,
        slopes: Tensor,
        variables: Sequence[Variable],
        key: Key,
        guide: Found | None = None,
    ) -> Found:
        """The step again; see `Repeatable`."""
        return self._found(loss, slopes, self._draw(variables, key, guide))

    def _draw(
        self, variables: Sequence[Variable], key: Key, guide: Found | None
    ) -> list[tuple[Variable, "_BlockProbe", Tensor]]:
        """The blocks of a step: where each is, the direction inside, and its inclusion probability."""
        ordered = sorted(variables, key=lambda v: v.name)  # what is drawn must not depend on the order
        ends = list(accumulate(_blocks(v)[0] for v in ordered))
        sizes = torch.cat([torch.full((_blocks(v)[0],), float(_blocks(v)[1])).double() for v in ordered])
        squares = (
            sizes if guide is None else torch.cat([_squares(v, guide.gradient(v)) for v in ordered]).cpu()
        )
        size = min(self.blocks, ends[-1])
        pi = mixed_probabilities(sizes * squares, size, self.alpha)
        probes: list[tuple[Variable, _BlockProbe, Tensor]] = []
        for index in sample(pi, key.fold_in("blocks"), size):
            place = bisect_right(ends, int(index))
            variable = ordered[place]
            row = int(index) - (ends[place - 1] if place else 0)
            probes.append((variable, _BlockProbe(variable, row, self.law, key), pi[index]))
        return probes

    def _found(
        self, loss: Tensor, seen: Tensor, probes: Sequence[tuple[Variable, "_BlockProbe", Tensor]]
    ) -> Found:
        weights = [slope / pi.to(slope.device) for slope, (_, _, pi) in zip(seen, probes, strict=True)]
        poison = 0.0 * seen.sum()  # a slope that is not finite must show in every gradient

        def gradient(variable: Variable) -> Tensor:
            result = torch.zeros_like(variable.value)
            for (_, probe, _), weight in zip(probes, weights, strict=True):
                if probe.name == variable.name:
                    part = result[probe.row] if result.dim() > 1 else result
                    part += probe.part.to(result) * weight.to(result)
            return result + poison.to(result)

        return Found(loss, seen, gradient)


class _BlockProbe:
    """A direction inside one block of one variable, zero everywhere else."""

    def __init__(self, variable: Variable, row: int, law: str, key: Key) -> None:
        shape = variable.subspace.coords_shape
        self.name, self.row, self.shape = variable.name, row, shape
        space = Space(f"{variable.name}[{row}]", shape[1:] if len(shape) > 1 else shape)
        self.part = Probe(Layout([space], variable.value.device), law, key.fold_in("block"))(space.name)

    def __call__(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The part of the direction in the variable's rows."""
        if len(self.shape) < 2:
            return self.part
        start, stop, _ = rows.indices(self.shape[0])
        result = self.part.new_zeros(stop - start, *self.shape[1:])
        if start <= self.row < stop:
            result[self.row - start] = self.part
        return result


def _blocks(variable: Variable) -> tuple[int, int]:
    """How many blocks a variable has, and entries of each."""
    shape = variable.subspace.coords_shape
    count = shape[0] if len(shape) > 1 else 1
    return count, max(1, variable.space.size // max(1, count))


def _squares(variable: Variable, gradient: Tensor) -> Tensor:
    """`‖g_b‖²` of every block, float64."""
    gradient = variable.mask(gradient).double()
    return gradient.flatten(1).square().sum(1) if gradient.dim() > 1 else gradient.square().sum().reshape(1)
