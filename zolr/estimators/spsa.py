"""Simultaneous perturbation: slopes of the loss along random directions, from forward passes alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from zolr.distributed import share_of
from zolr.errors import UsageError
from zolr.estimators import (
    ByProbes,
    Direction,
    Found,
    Loss,
    Signs,
    check_eps,
    check_probes,
    check_signs,
    compared,
    evaluate,
    mean_of,
    parts_of,
    same_noise,
)
from zolr.keys import Key
from zolr.probes import LAWS, Combination, orthonormal
from zolr.variables import Variable, layout


@dataclass(frozen=True)
class Spsa(ByProbes):
    """Gradient estimate `(1/k) sum_i c_i z_i` with `c_i = (L(B + eps z_i) - L(B - eps z_i)) / (2 eps)`.

    Unbiased up to `O(eps²)` for every law with `E[z zᵀ] = I`. Its second moment is about the number of coordinates
    times `‖gradient‖²` over `k`; Rademacher and sphere directions have the least.

    Args:
        eps: radius of a probe in every entry of the coordinates; with an unbiased projector also the standard
            deviation of an entry of the weight's change. None lets the engine choose.
        probes: k, directions a step.
        law: "rademacher" (default; the same bits everywhere), "gaussian" or "sphere".
        sides: 2 for central differences, 1 for `(L(B + eps z) - L(B)) / eps`, which shares one base loss between
            probes (k + 1 forwards instead of 2 k) at the price of a curvature term in the variance.
        directions: "fresh" (independent) or "orthonormal" (mutually orthogonal, less variance for several probes).
        signs: "sequence" (least memory), or both signs in one forward; of one-sided probes all of them, and the base: as
            rows of one batch ("rows") or by vmap ("together"). An engine tries on its first step (see `tried`): what is asked
            for together goes by rows where it can.
        normalize: divide by the standard deviation of the slopes, which is that of the probes' losses over eps. Steps
            are long where the loss is flat and short where it is steep, and a factor on the loss means nothing: the
            estimate points along the gradient in expectation, but has not its length. Probes that all agree in their
            slope give no step.

    Raises:
        UsageError: an argument out of range.

    Reference: Spall 1992; MeZO arXiv 2305.17333; arXiv 2603.20632 (two-point LR form); FZOO arXiv 2506.09034
    (normalize).
    """

    eps: float | None = None
    probes: int = 1
    law: str = "rademacher"
    sides: int = 2
    directions: Literal["fresh", "orthonormal"] = "fresh"
    signs: Signs = "sequence"
    normalize: bool = False
    paradigm: ClassVar[Literal["fo", "zo", "fwd"]] = "zo"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_eps(self.eps)
        check_probes(self.probes)
        if self.law not in LAWS:
            raise UsageError(f"probe law '{self.law}' is not known; use one of {', '.join(LAWS)}")
        if self.sides not in (1, 2):
            raise UsageError(f"sides = {self.sides} is not possible; use 2 (central) or 1 (one-sided)")
        if self.directions not in ("fresh", "orthonormal"):
            raise UsageError(f"directions '{self.directions}' are not known; use 'fresh' or 'orthonormal'")
        check_signs(self.signs)
        if self.normalize and self.probes < 2:
            raise UsageError(f"{self.probes} probe has no spread to normalize by; use at least 2 probes")

    def forwards(self, batches: int) -> int:
        """`2 k` forwards a micro-batch, or `k + 1` one-sided."""
        return batches * (2 * self.probes if self.sides == 2 else self.probes + 1)

    def draw(self, variables: Sequence[Variable], key: Key) -> Sequence[Direction]:
        """The step's directions; see `ByProbes`."""
        if self.directions == "orthonormal":
            return orthonormal(layout(variables), self.probes, key)
        return super().draw(variables, key)

    @torch.no_grad()
    def measure(self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], key: Key) -> Found:
        """Measure the slopes; see `Measuring`."""
        if self.eps is None:
            raise UsageError("spsa has no eps; give one, or let the engine choose with lr=None")
        eps, together = self.eps, self.signs != "sequence"
        directions = self.draw(variables, key)
        if self.sides == 1 and together:
            directions = [self._held(d, variables) for d in directions]  # which are all alive in any case
        share = share_of(batches)
        own = directions[share.turn(len(directions))]

        def measured(points: Sequence[tuple[Direction, float]]) -> torch.Tensor:
            parts = evaluate(parts_of, loss, batches, variables, points, rewind, self.signs)
            return share.stacked(parts, 2)

        with same_noise(variables[0].value.device) as rewind:
            if self.sides == 2:
                pairs = share.stacked([measured([(d, eps), (d, -eps)]) for d in own], 2, 2)
                plus, minus = share.of_all_probes(mean_of(batches, pairs), len(directions)).unbind(1)
                slopes = (plus - minus) / (2 * eps)
                mean = ((plus + minus) / 2).mean()
            else:
                points = [(d, eps) for d in own]
                if together:
                    parts = measured([(directions[0], 0.0), *points])
                else:
                    base = parts_of(loss, batches)
                    parts = torch.cat([base[None], measured(points)])
                mean, values = mean_of(batches, parts).split([1, len(own)])
                mean = mean[0]
                slopes = (share.of_all_probes(values, len(directions)) - mean) / eps
        return self._found(mean, slopes, variables, directions)

    def _weights(self, slopes: torch.Tensor) -> torch.Tensor:
        weights = super()._weights(slopes)
        if not self.normalize:
            return weights
        spread = slopes.std(unbiased=False)
        return torch.where(spread == 0, 0.0, weights / spread)

    def _held(self, direction: Direction, variables: Sequence[Variable]) -> Direction:
        """A direction that is drawn once and kept, in a byte an entry where that holds it."""
        kept = torch.int8 if self.law == "rademacher" and self.directions == "fresh" else torch.float32
        return Combination({v.name: direction(v.name).to(kept) for v in variables})

    @torch.no_grad()
    def tried(
        self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], key: Key
    ) -> tuple["Spsa", str, int]:
        """This rule as it can be followed: with signs by rows, together, or in sequence and why.

        Two points are evaluated in sequence and in one pass: 4 forwards a micro-batch by vmap, 6 by rows.

        Returns:
            The rule, the reason, and forwards a micro-batch that it took.
        """
        direction, eps = self.draw(variables, key)[0], self.eps or 1e-3
        points = [(direction, eps), (direction, -eps)]
        if self.sides == 1:  # as a step does it: every point with a direction of its own
            points[1] = self.draw(variables, key.fold_in("other"))[0], eps
        way, reason, passes = compared(parts_of, loss, batches, variables, points, self.signs)
        return replace(self, signs=way), reason, passes
