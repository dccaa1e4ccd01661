"""Simultaneous perturbation: slopes of the loss along random directions, from forward passes alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zolr.errors import UsageError
from zolr.estimators import Emit, Estimate, Loss, check_eps, check_probes, combined, mean_loss, same_noise
from zolr.keys import Key
from zolr.probes import LAWS, Probe, orthonormal
from zolr.variables import Variable, layout, shifted

Direction = Callable[..., Tensor]


@dataclass(frozen=True)
class Spsa:
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
        signs: "sequence" (least memory) or "together" (both signs in one forward by vmap). An engine tries "together"
            on its first step (see `tried`).

    Raises:
        UsageError: an argument out of range.

    Reference: Spall 1992; MeZO arXiv 2305.17333; arXiv 2603.20632 (two-point LR form).
    """

    eps: float | None = None
    probes: int = 1
    law: str = "rademacher"
    sides: int = 2
    directions: Literal["fresh", "orthonormal"] = "fresh"
    signs: Literal["sequence", "together"] = "sequence"
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
        if self.signs not in ("sequence", "together"):
            raise UsageError(f"signs '{self.signs}' is not known; use 'sequence' or 'together'")

    def forwards(self, batches: int) -> int:
        """`2 k` forwards a micro-batch, or `k + 1` one-sided."""
        return batches * (2 * self.probes if self.sides == 2 else self.probes + 1)

    def draw(self, variables: Sequence[Variable], key: Key) -> list[Direction]:
        """The step's directions; the same for the same key, whatever was drawn before."""
        space = layout(variables)
        if self.directions == "orthonormal":
            return list(orthonormal(space, self.probes, key))
        return [Probe(space, self.law, key.fold_in("probe", i)) for i in range(self.probes)]

    @torch.no_grad()
    def __call__(
        self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], emit: Emit, key: Key
    ) -> Estimate:
        """Emit the gradients; see `Estimator`."""
        if self.eps is None:
            raise UsageError("spsa has no eps; give one, or let the engine choose with lr=None")
        eps = self.eps
        directions = self.draw(variables, key)
        slopes, losses = [], []
        with same_noise(variables[0].value.device) as rewind:
            base = mean_loss(loss, batches) if self.sides == 1 else None
            if base is not None:
                losses.append(base)
            for direction in directions:
                scales = (eps, -eps) if self.sides == 2 else (eps,)
                values = self._evaluate(loss, batches, variables, direction, scales, rewind)
                if base is None:
                    losses.append((values[0] + values[1]) / 2)
                    slopes.append((values[0] - values[1]) / (2 * eps))
                else:
                    slopes.append((values[0] - base) / eps)
        weights = torch.stack(slopes) / len(slopes)
        for variable, gradient in combined(variables, directions, weights):
            emit(variable, gradient)
        return Estimate(torch.stack(losses).mean(), torch.stack(slopes))

    @torch.no_grad()
    def tried(
        self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], key: Key
    ) -> tuple["Spsa", str]:
        """This rule, or the same with signs in sequence and why, if the model cannot be run on both signs together.

        vmap has no rule for an operation that looks at values, and a model may treat the leading axis as its own: both
        signs are evaluated both ways once, `4` forwards a micro-batch.
        """
        direction, scales = self.draw(variables, key)[0], (self.eps or 1e-3, -(self.eps or 1e-3))
        apart = replace(self, signs="sequence")
        with same_noise(variables[0].value.device) as rewind:
            expected = apart._evaluate(loss, batches, variables, direction, scales, rewind)
            try:
                found = self._evaluate(loss, batches, variables, direction, scales, rewind)
            except (RuntimeError, NotImplementedError) as error:  # what torch raises where a rule is missing
                return apart, str(error).strip().split("\n")[0]
        precision = max(torch.finfo(v.weight.dtype).eps for v in variables)
        size = max(1.0, abs(float(expected[0])))
        gap = max(abs(float(a) - float(b)) for a, b in zip(expected, found, strict=True))
        if gap > min(100 * precision, 0.05) * size:
            return apart, f"the losses differ by {gap:.2g}"
        return self, ""

    def _evaluate(
        self,
        loss: Loss,
        batches: Sequence[Any],
        variables: Sequence[Variable],
        direction: Direction,
        scales: Sequence[float],
        rewind: Callable[[], None],
    ) -> list[Tensor]:
        if self.signs == "together" and len(scales) > 1:

            def moved(scale: Tensor) -> Tensor:
                with shifted(variables, direction, scale, plain=False):
                    return mean_loss(loss, batches)

            rewind()
            # filled on the device: a copy from the host would wait for it
            points = torch.stack([variables[0].value.new_full((), scale) for scale in scales])
            return list(torch.func.vmap(moved, randomness="same")(points).unbind())
        values = []
        for scale in scales:
            rewind()
            with shifted(variables, direction, scale):
                values.append(mean_loss(loss, batches))
        return values
