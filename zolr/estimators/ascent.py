"""Another estimator's gradient a little way uphill, in a direction that forward passes have found."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zolr.estimators import (
    Elsewhere,
    Estimate,
    Estimator,
    Loss,
    Prober,
    check_reach,
    combine,
    itself,
)
from zolr.keys import Key
from zolr.variables import Variable


@dataclass(frozen=True)
class Ascent(Elsewhere):
    """The gradient of `inner` at `B + reach A / |A|`, `A = (1/k) sum_i c_i z_i` the slopes times directions of `guess`.

    SAM goes uphill and descends from there: `A` points along the gradient as far as the probes know it, so its sign is plus.
    `|A|` is taken over all weights together. All evaluations of a step see the same noise.

    Args:
        inner: whose gradient is taken.
        guess: probes that say where uphill is.
        reach: length of the way in the coordinates (rho), at least 0; 0 is `inner` itself, without probes.
        within: for dense methods: probe in the subspaces that these step in, and move what has none not at all. Before the
            first subspace there is nowhere to probe, and the step is that of `inner`.

    Raises:
        UsageError: a reach out of range.

    Reference: SAM arXiv 2010.01412; AdaZo-SAM and LORENZA arXiv 2502.19571.
    """

    inner: Estimator
    guess: Prober
    reach: float = 0.05
    within: bool = False

    def __post_init__(self) -> None:
        check_reach(self.reach)

    def forwards(self, batches: int) -> int:
        """Those of the probes and those of `inner`."""
        return self.inner.forwards(batches) + (self.guess.forwards(batches) if self.reach else 0)

    @torch.no_grad()
    def way(
        self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], key: Key
    ) -> tuple[Estimate | None, dict[Variable, Callable[[], Tensor]]]:
        """What the probes saw, and the way to go for each variable."""
        key = key.fold_in("ascent")
        climbing = [v for v in variables if v.steps_in is not None] if self.within else variables
        if not climbing:
            return None, {}
        squares: list[Tensor] = []

        def measure(variable: Variable, gradient: Tensor) -> None:
            squares.append(variable.mask(gradient).double().square().sum())

        with ExitStack() as stack:
            if self.within:
                for variable in climbing:
                    assert variable.steps_in is not None
                    stack.enter_context(variable.within(variable.steps_in))
            directions = self.guess.draw(climbing, key)
            seen = self.guess(loss, batches, climbing, measure, key)
            assert seen.slopes is not None  # a prober has them
            size = torch.stack(squares).sum().sqrt()
            weights = seen.slopes.double() * (self.reach / (len(seen.slopes) * size.clamp_min(1e-300)))
            offsets: dict[Variable, Callable[[], Tensor]] = {}
            for variable in climbing:
                if variable.space.blocked:  # as large as the weight: drawn again at every use
                    offsets[variable] = partial(combine, variable, directions, weights)
                    continue
                coords = variable.mask(combine(variable, directions, weights))
                space = variable.steps_in if self.within else None
                offsets[variable] = partial(itself if space is None else space.lift, coords)
        return seen, offsets
