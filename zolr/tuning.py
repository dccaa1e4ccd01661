"""Choosing how far to probe, and the learning rate of a forward-only run.

Everything is read off the losses around the starting point, on the first batch. Along a probe `z` (unit variance in
every coordinate) the loss is `L + t c + t² h / 2 + ...` with slope `c` and curvature `h = zᵀ H z`; over probes
`E[c²] = ‖g‖²` and `E[h] = tr H`.

- Radius. `c(eps)` is off by `O(eps²)` from the third derivative and by `noise / eps` from the arithmetic of the
  losses. Both show in `c(eps) - c(eps / 3)` along the same probe. The rule takes the radius of a ladder, from 3e-1 to
  1e-4 of the weights' root mean square, whose two neighbors disagree least with it. The noise of a curvature is
  `noise / eps²`, so that it wants a larger radius: the same rule on the curvatures of the same probes finds it.
- Step. A step of SGD along a probe changes the loss by `- lr c² + lr² c² h / 2`, best at `lr = 1 / h`. The curvature
  is the mean over the probes of `(L₊ + L₋ - 2 L) / eps²`, taken at its upper confidence limit so that a curvature lost
  in noise gives a small step and not a large one. Every probe has a subspace of its own: what one subspace holds of the
  few directions with most of the curvature varies by a third, and the rate shall serve all of them. A batch of
  `rows` examples shows the gradient and its own noise; the
  best rate shrinks by the part of `c²` that is signal, `rows / (rows + NOISE_ROWS)` (McCandlish et al. 2018, there for
  backprop). The noise scale is not measured on the first batch, where all examples agree that the prior of the answers
  is wrong, but taken from later in a run of the demo. A step at the typical slope moves the weights by no more than
  `LARGEST_STEP` of their root mean square, or a third of that with momentum, which overshoots.
- Later steps. The curvature grows several times while a model becomes sure of its answers, and a rate that was right
  at first then undoes what was learned. Near a solution the curvature is the Fisher information, which is what
  the squared slopes of a batch measure; so the rate falls as their running mean rises above that of the first steps
  (`Caution`). This costs nothing.
- Optimizers that divide by the size of the gradient (Adam) take steps of `lr` in every coordinate: their rate is the
  SGD rate times the root mean square of the slopes. Estimators that do (FZOO) take steps of `lr / sqrt(probes)`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from zolr.errors import NonFiniteError, UsageError
from zolr.keys import Key
from zolr.probes import Probe
from zolr.variables import Variable, layout, shifted

LADDER = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
DIRECTIONS = 4  # directions that judge the radius
PROBES = 16  # directions that measure slope and curvature
NOISE_ROWS = 110.0  # rows at which the noise of a batch equals the gradient, on the demo
USUAL_ROWS = 30.0  # of a loss that does not say how many it averages
# half of the best step diverged on two models: curvature grows while a model learns a task
LARGEST_SHARE = 0.4
LARGEST_STEP, SMALLEST_STEP = 1e-1, 1e-6
SMALLEST_WEIGHTS = 1e-6  # of a model that has been drawn or trained none is as small
FORWARDS = 1 + 2 * (len(LADDER) * DIRECTIONS + PROBES)  # that choosing takes, per batch of the step
FIRST_STEPS, RUNNING_STEPS = 100, 50  # of the squared slopes that a rate is held against


@dataclass(frozen=True)
class Tuning:
    """What was chosen and from what.

    Args:
        eps: radius of a probe.
        lr: learning rate.
        slope: root mean square of the slopes, an estimate of the gradient's norm in the coordinates.
        curvature: the curvature that the step was taken from.
        reach: radius at which slope and curvature were measured.
        noise: relative disagreement of the slopes at `eps` and the next smaller radius.
        forwards: forward passes spent.
    """

    eps: float
    lr: float
    slope: float
    curvature: float
    reach: float
    noise: float
    forwards: int

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers by name."""
        return asdict(self)


@dataclass
class Caution:
    """Factor on a measured learning rate that follows the squared slopes of the steps.

    It is the mean of `c²` over the first `FIRST_STEPS` steps divided by a running mean, at most 1. Half-way through a run
    squared slopes are mostly the noise of the batch, `tr F / rows` with the Fisher information `F`, which for the log
    likelihood of a model that fits is the curvature that limits the rate.

    Args:
        first: sum of `c²` over the first steps.
        count: number of those seen.
        now: running mean of `c²` after them.
    """

    first: float = 0.0
    count: int = 0
    now: float = 0.0

    @property
    def factor(self) -> float:
        """What to multiply the rate of the next step by, in (0, 1].

        >>> caution = Caution()
        >>> for step in range(600):
        ...     caution.observe(1.0 if step < 300 else 2.0)
        >>> round(caution.factor, 2)
        0.25
        """
        return min(1.0, self.first / (self.count * self.now)) if self.count and self.now > 0 else 1.0

    def observe(self, slope: float) -> None:
        """Add the root mean square slope of a step."""
        if self.count < FIRST_STEPS:
            self.first, self.count = self.first + slope**2, self.count + 1
            self.now = self.first / self.count
        else:
            self.now += (slope**2 - self.now) / RUNNING_STEPS


class Probing:
    """Losses around the starting point, with a count of what they cost."""

    def __init__(self, loss: Callable[[], Tensor], key: Key) -> None:
        self.loss, self.key, self.forwards = loss, key, 1
        self.base = float(loss())
        if not abs(self.base) < float("inf"):
            raise NonFiniteError(
                f"the loss is {self.base} before training; check the model, the data type and the first batch"
            )

    def sides(
        self, variables: Sequence[Variable], name: str, number: int, radius: float
    ) -> tuple[float, float]:
        """Losses on both sides of the starting point along one direction."""
        direction = Probe(layout(variables), "rademacher", self.key.fold_in(name, number))
        values = []
        for scale in (radius, -radius):
            with shifted(variables, direction, scale):
                values.append(float(self.loss()))
        self.forwards += 2
        return values[0], values[1]

    def along(
        self, variables: Sequence[Variable], name: str, number: int, radius: float
    ) -> tuple[float, float]:
        """Slope and curvature along one direction."""
        plus, minus = self.sides(variables, name, number, radius)
        return (plus - minus) / (2 * radius), (plus + minus - 2 * self.base) / radius**2


@torch.no_grad()
def tune(
    loss: Callable[[], Tensor],
    variables: Sequence[Variable],
    key: Key,
    *,
    eps: float | None,
    normalized: bool,
    unit: bool = False,
    momentum: bool = False,
    probes: int = 1,
    rows: float | None = None,
    elsewhere: Callable[[int], AbstractContextManager[None]] = lambda number: nullcontext(),
) -> Tuning:
    """Measure and choose.

    Args:
        loss: mean loss on fixed batches at the model's current point.
        eps: a radius to keep; None to choose one.
        normalized: the optimizer divides by the size of the gradient.
        unit: the estimator does, before it averages over the probes.
        momentum: its steps go on where earlier ones went: they may be a third as large at most.
        probes: directions averaged in a step.
        rows: examples in the batch; None where that is not known.
        elsewhere: puts the variables into another subspace of theirs, one for each number, while its context lasts.

    Raises:
        UsageError: the loss is flat: no radius gives a slope; or all weights are zero, so that nothing says how far to look.
        NonFiniteError: the loss is not finite to begin with, or nowhere around.
    """
    probing = Probing(loss, key)
    overall = _root_mean_square(variables)
    if overall < SMALLEST_WEIGHTS:
        raise UsageError(
            f"the trained weights have a root mean square of {overall:.2g}, so nothing says how far to probe them; give eps and lr (--eps, "
            "--lr), or train others with them"
        )
    ladder = [f * overall for f in LADDER]
    seen = torch.tensor(
        [[probing.along(variables, "radius", i, radius) for i in range(DIRECTIONS)] for radius in ladder],
        dtype=torch.float64,
    )  # (radii, directions, 2)
    noise = 0.0
    if eps is None:
        eps, noise = _radius(ladder, seen[..., 0])
    reach = max(eps, _radius(ladder, seen[..., 1])[0]) if bool(seen[..., 1].any()) else eps
    measured = []
    for i in range(PROBES):
        with elsewhere(i):
            measured.append(probing.along(variables, "step", i, reach))
    slopes, bends = torch.tensor(measured, dtype=torch.float64).unbind(1)
    slope = float(slopes.square().mean().sqrt())
    curvature = float(bends.mean().abs() + 2 * bends.std() / sqrt(PROBES))
    if slope == 0:
        raise UsageError(
            f"the loss does not change at probes of radius {reach:.3g}; give a larger --eps, or check the loss"
        )
    if not slope < float("inf") or not curvature < float("inf"):
        raise NonFiniteError(
            f"the loss is not finite at probes of radius {reach:.3g}; give a smaller --eps and an --lr"
        )
    # an Adam step moves every coordinate by its rate, an SGD step by rate times slope: compare them as the former
    typical = slope / sqrt(probes)
    entry = share(rows) * min(probes, 8) / max(curvature, 1e-12) * typical
    largest = LARGEST_STEP / 3 if momentum else LARGEST_STEP
    entry = min(max(entry, SMALLEST_STEP * overall), largest * overall)
    return Tuning(
        eps=eps,
        lr=entry if normalized else entry * sqrt(probes) if unit else entry / typical,
        slope=slope,
        curvature=curvature,
        reach=reach,
        noise=noise,
        forwards=probing.forwards,
    )


def share(rows: float | None) -> float:
    """Share of the locally best step that a batch of so many examples may take: `rows / (rows + NOISE_ROWS)`.

    >>> round(share(30), 2), round(share(64), 2), share(1024)
    (0.21, 0.37, 0.4)
    """
    rows = USUAL_ROWS if rows is None else rows
    return min(rows / (rows + NOISE_ROWS), LARGEST_SHARE)


def _root_mean_square(variables: Sequence[Variable]) -> float:
    total = sum(float(v.weight.float().square().sum()) for v in variables)
    return sqrt(total / sum(v.weight.numel() for v in variables))


def _radius(ladder: Sequence[float], slopes: Tensor) -> tuple[float, float]:
    """The radius whose slopes (or curvatures) agree best with those of its neighbors, and that disagreement.

    Args:
        slopes: `(radii, directions)`.

    Slopes that are all zero say nothing: a loss of finitely many values (accuracy) has none at small radii.
    """
    finite = [bool(torch.isfinite(s).all()) for s in slopes]
    useful = [ok and bool(s.any()) for ok, s in zip(finite, slopes, strict=True)]
    if any(finite) and not any(useful):
        raise UsageError(
            f"the loss does not change at probes of radius {ladder[-1]:.3g} to {ladder[0]:.3g}; "
            "give a larger --eps with an --lr, or check the loss"
        )
    seen = torch.stack([s for ok, s in zip(useful, slopes, strict=True) if ok] or list(slopes))
    scale = seen.nan_to_num(0, 0, 0).abs().median().clamp_min(1e-12)
    gaps = [float((a - b).square().mean().sqrt() / scale) for a, b in zip(slopes, slopes[1:], strict=False)]
    gaps = [g if g == g and useful[i] and useful[i + 1] else float("inf") for i, g in enumerate(gaps)]
    best, chosen = float("inf"), -1
    for i in range(1, len(ladder) - 1):
        gap = max(gaps[i - 1], gaps[i])
        if gap < best:
            best, chosen = gap, i
    if chosen < 0 and any(
        useful
    ):  # no three radii in a row say anything: the largest that does is the safest
        return ladder[useful.index(True)], 1.0
    if chosen < 0:
        raise NonFiniteError(
            "the loss is not finite around the starting point; give --eps and --lr, or check the data type"
        )
    return ladder[chosen], gaps[chosen]
