"""Slopes of single examples, clipped, averaged and made private by noise."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, erfc, exp, inf, isfinite, sqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zolr.distributed import share_of
from zolr.errors import UsageError, check_numbers
from zolr.estimators import (
    ByProbes,
    Direction,
    Found,
    Loss,
    Signs,
    check_eps,
    check_probes,
    check_signs,
    combine,
    compared,
    evaluate,
    same_noise,
    totals,
)
from zolr.keys import Key
from zolr.probes import LAWS, Probe
from zolr.variables import Variable, layout


@dataclass(frozen=True)
class PrivateSpsa(ByProbes):
    """Gradient estimate `(1/k) sum_i s_i z_i`, `s_i = (1/n) (sum_j clip(c_ij, -C, C) + N(0, (sigma C)²))`.

    `c_ij` is the slope of example j along direction i, `n` the examples of a step, `sigma` the noise multiplier. Below
    the limit C it is unbiased as `Spsa` is, and the noise adds `d (sigma C / n)² / k` to its second moment in d
    coordinates: a number of noise a direction, not one a weight. With `sigma = 0` and `C = inf` it is `Spsa`.

    Privacy (`epsilon`): replacing one example by another of the same label moves each `s_i` by at most `2 C / n`, and
    the directions do not depend on the data. A step is thus a Gaussian mechanism of sensitivity `2 sqrt(k) / sigma` in
    units of its noise. Batches go through the training rows epoch by epoch, so that an example is used at most
    `uses = ceil(steps n / rows)` times; all steps together are as private as one Gaussian mechanism with
    `mu = 2 sqrt(k uses) / sigma`, whose `delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu)`.
    (Where n does not divide the rows, an example may come twice in a step, which counts twice: `uses` is doubled.)
    No amplification by sampling is claimed: that needs batches of random size. The guarantee is of the trained weights
    against those who do not know the seed, which names the noise; not of losses that a run prints, of label counts, of
    batches sorted by length, or against reading floating-point noise to the last bit.

    Args:
        eps: radius of a probe. It is not chosen by the engine, which would look at losses without noise.
        probes: k, directions a step.
        law: "rademacher", "gaussian" (as released) or "sphere" (as in the analysis).
        limit: C, largest slope of an example; inf for none.
        noise: sigma, standard deviation of the noise of the sum in units of C; 0 for none (and no privacy).
        signs: "sequence", "together" or "rows", see `Spsa`.

    Raises:
        UsageError: an argument out of range, or noise without a limit.

    Reference: DPZero arXiv 2310.09639; Dong, Roth and Su, Gaussian differential privacy (2022), for the composition;
    Balle and Wang 2018 for `delta(epsilon)`.
    """

    eps: float = 1e-3
    probes: int = 1
    law: str = "gaussian"
    limit: float = 200.0
    noise: float = 10.0
    signs: Signs = "sequence"
    paradigm: ClassVar[Literal["fo", "zo", "fwd"]] = "zo"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.eps is None:
            raise UsageError("a radius measured on losses without noise would not be private; give eps")
        check_eps(self.eps)
        check_probes(self.probes)
        if self.law not in LAWS:
            raise UsageError(f"probe law '{self.law}' is not known; use one of {', '.join(LAWS)}")
        check_numbers(limit=self.limit, noise=self.noise)
        if not self.limit > 0:
            raise UsageError(f"limit = {self.limit} leaves no slope; use a positive number, or inf")
        if not 0 <= self.noise < inf:
            raise UsageError(f"noise = {self.noise} is no noise multiplier; use 0 or a positive number")
        if self.noise and not isfinite(self.limit):
            raise UsageError(f"noise = {self.noise} has no unit without a limit on slopes; give limit")
        check_signs(self.signs)

    def forwards(self, batches: int) -> int:
        """`2 k` forwards a micro-batch."""
        return 2 * batches * self.probes

    def epsilon(self, *, steps: int, batch_size: int, rows: int, delta: float) -> float:
        """Privacy spent by so many steps, inf without noise.

        Args:
            batch_size: examples of a step.
            rows: training examples, which batches go through epoch by epoch.
            delta: probability, in (0, 1); usual is less than 1 / rows.
        """
        if not self.noise:
            return inf
        uses = ceil(steps * batch_size / rows) * (1 if rows % batch_size == 0 else 2)
        return epsilon_of(2 * sqrt(self.probes * uses) / self.noise, delta)

    @torch.no_grad()
    def measure(self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], key: Key) -> Found:
        """Measure the slopes; see `Measuring`.

        Raises:
            UsageError: the loss is not one number an example.
        """
        directions = self.draw(variables, key)
        slopes, losses, examples = [], [], 0
        with same_noise(variables[0].value.device) as rewind:
            for direction in directions:
                both = evaluate(
                    _examples,
                    loss,
                    batches,
                    variables,
                    [(direction, self.eps), (direction, -self.eps)],
                    rewind,
                    self.signs,
                )
                plus, minus = share_of(batches).rows(torch.stack(both)).unbind()
                each = (plus - minus) / (2 * self.eps)  # (n,)
                examples = len(each)
                if not examples:
                    raise UsageError("a step needs at least one example, and these batches have none")
                # an example without a number is one with slope 0: to skip the step for it would tell of it
                known = torch.isfinite(each)
                slopes.append(torch.where(known, each, 0.0).clamp(-self.limit, self.limit).mean())
                losses.append(torch.where(known, (plus + minus) / 2, 0.0).sum() / known.sum())
        values = torch.stack(slopes)
        if self.noise:
            normal = torch.randn(self.probes, generator=key.fold_in("noise").generator(), dtype=torch.float64)
            values = values + normal.to(values.device) * (self.noise * self.limit / examples)
        return self._found(torch.stack(losses).mean(), values, variables, directions)

    def _found(
        self, loss: Tensor, slopes: Tensor, variables: Sequence[Variable], directions: Sequence[Direction]
    ) -> Found:
        # not `combined`, which rounds a sum over several probes otherwise
        weights = self._weights(slopes)
        return Found(loss, slopes, lambda variable: combine(variable, directions, weights))

    @torch.no_grad()
    def tried(
        self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], key: Key
    ) -> tuple["PrivateSpsa", str, int]:
        """This rule, or the same in sequence and why; see `Spsa.tried`."""
        direction = Probe(layout(variables), self.law, key)
        points = [(direction, self.eps), (direction, -self.eps)]
        way, reason, passes = compared(_examples, loss, batches, variables, points, self.signs)
        return replace(self, signs=way), reason, passes


def _examples(loss: Loss, batches: Sequence[Any]) -> Tensor:
    """Losses `(n,)` of all examples, float64."""
    parts = []
    for batch in batches:
        output = loss(batch)
        totals(output)  # says what is no loss at all
        if isinstance(output, tuple) or output.dim() != 1:
            found = (
                "a sum and a count"
                if isinstance(output, tuple)
                else f"a tensor of shape {tuple(output.shape)}"
            )
            raise UsageError(
                f"slopes of single examples need one loss an example, but this loss is {found}; return a tensor "
                "(batch,), or use method 'mezo'"
            )
        parts.append(output.double())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def delta_of(mu: float, epsilon: float) -> float:
    """Smallest delta at which a Gaussian mechanism of sensitivity `mu` (in units of its noise) is (epsilon, delta)-private.

    >>> round(delta_of(1.0, 1.0), 4)
    0.1269
    """
    near, far = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    # e^epsilon Phi(-far) without its overflow: e^epsilon times the density at far is the density at near
    mills = float(torch.special.erfcx(torch.tensor(far / sqrt(2), dtype=torch.float64))) / 2
    return erfc(near / sqrt(2)) / 2 - exp(-(near**2) / 2) * mills


def epsilon_of(mu: float, delta: float) -> float:
    """Smallest epsilon for a delta, to a relative 1e-9 from above.

    Raises:
        UsageError: delta outside (0, 1).

    >>> round(epsilon_of(1 / 3.730632, 1e-5), 4)
    1.0
    """
    if not 0 < delta < 1:
        raise UsageError(
            f"delta = {delta} is no probability of failure; use a number in (0, 1), such as 1e-5"
        )
    return _least(lambda epsilon: delta_of(mu, epsilon) <= delta)


def _least(enough: Any) -> float:
    """Least number at which a rising condition holds, from above."""
    if enough(0.0):
        return 0.0
    high = 1.0
    while not enough(high):
        high *= 2
    low = 0.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
