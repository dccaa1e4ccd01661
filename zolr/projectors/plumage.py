"""Singular directions of a gradient sampled with water-filled probabilities."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from zolr.errors import UsageError
from zolr.factorizations import leading
from zolr.keys import Key
from zolr.probes import one_thread
from zolr.projectors import (
    Fixed,
    Side,
    check_rank,
    check_side,
    demanded,
    one_sided,
    projected_length,
    sampled,
    turned,
)
from zolr.spectra import Spectrum
from zolr.subspaces import Subspace


@dataclass(frozen=True)
class Plumage(Fixed):
    """Exactly r singular directions of the gradient at hand, direction i with probability p_i and weight `1 / p_i`.

    `p_i = min(1, s_i / lambda)` with sum r for singular values s, and systematic sampling meets these marginals exactly.
    `G P Pᵀ = sum_J (1 / p_i) s_i u_i v_iᵀ` then has mean G and the least variance of rank r, `sum_i s_i² (1 / p_i - 1)`.
    That is so for the gradient that the subspace was drawn from; later ones of the window meet the same directions, and
    what lies outside of the drawn gradient's row space is met by none (with `alpha` by all).

    The weight is split: `P = [ v_i / sqrt(p_i) ]`, one root where the gradient is projected and one at the lift, so that
    projecting and lifting stay adjoint. Rules that are linear in the gradient (SGD, momentum) get both and are unbiased.
    Rules that are not (Adam, Muon) lose the root inside, whatever it is, and keep the one at the lift: direction i then
    moves by `1 / sqrt(p_i)` with probability p_i, whose mean square is that of the rule in all directions, while the
    mean is short by `sqrt(p_i)`. All of the weight at the lift would give them the mean, and rare directions steps of
    `1 / p_i` that have no bound in the mean square.

    Args:
        rank: r, at least 1; capped at the projected length.
        side: "right", "left" or "short" (as published).
        alpha: share of the uniform law in p, in [0, 1]; 0 as published.

    Raises:
        UsageError: an argument out of range.

    Reference: PLUMAGE arXiv 2505.18313 (law as its abstract and reviews state it; the split of the weight is ours).
    """

    rank: int = 8
    side: Side = "short"
    alpha: float = 0.0
    needs: ClassVar[Literal["nothing", "gradient"]] = "gradient"
    unbiased: ClassVar[bool] = False  # for one gradient it is, see above

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_side(self.side)
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha = {self.alpha} is no share of the uniform law; use a number in [0, 1]")

    @one_thread()
    def draw(
        self, shape: tuple[int, ...], key: Key, *, like: Tensor, gradient: Tensor | None = None, **_: Any
    ) -> Subspace:
        """Draw the subspace of one weight from its gradient.

        Raises:
            UsageError: no gradient.
        """
        gradient = demanded(gradient, self)
        values, vectors = leading(turned(self.side, gradient), min(shape))
        n = projected_length(self.side, shape)
        # no gradient has more directions than its shorter side, and svd has no more either
        rank = min(self.rank, len(values)) if not self.alpha else min(self.rank, n)
        spectrum = Spectrum(vectors, values.double().cpu().square(), 0.0)
        return one_sided(self.side, shape, sampled(spectrum, rank, key, like, alpha=self.alpha))
