"""The instance-dependent optimum: directions sampled by the spectrum of the gradient's second moment."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zolr.errors import UsageError
from zolr.keys import Key
from zolr.probes import one_thread
from zolr.projectors import (
    Side,
    Source,
    check_rank,
    check_side,
    haar,
    lengthened,
    one_sided,
    projected_length,
    sampled,
)
from zolr.spectra import Moments, Spectrum, isotropic
from zolr.subspaces import Left, Right, Subspace


@dataclass(frozen=True)
class Dependent:
    """Eigenvectors of `Sigma = E[GᵀG]` drawn with water-filled probabilities, weighted to be unbiased.

    With `Sigma = Q diag(sigma) Qᵀ`, `pi_i = min(1, sqrt(sigma_i) / lambda)` summing to r, and a set J of size r with
    those marginals, `P = [ sqrt(c / pi_i) q_i ]` for i in J. Then `E[P Pᵀ] = c I` and
    `E‖G P Pᵀ‖² = c² sum_i sigma_i / pi_i` is the least that any rank-r law can have. A flat spectrum gives `stiefel`.

    `Sigma` is not known and not formed; the estimate holds `named` eigenpairs and gives all other directions one mean
    eigenvalue, from which directions are drawn Haar-uniformly. It comes from one of two sources:

    - "gradients": each window shows the r by r block that it saw, and the running estimate is moved to agree with it.
      Exact gradients (backprop) count by their second moment, uncentered as the theory asks; noisy ones (forward-only
      probes) by the products of different steps, whose noise has mean zero. The first draw is `stiefel`'s.
    - "inputs": `G = sum_t delta_t x_tᵀ`, so the gradient's rows lie in the span of the layer's inputs, and
      `Sigma` is proportional to `sum_t x_t x_tᵀ` where the errors do not depend on the inputs. Forward passes alone
      show it, on the first batch of each window, with no probe spent. Right side only; weights that are looked up
      rather than multiplied (embeddings) are drawn as by `stiefel`.

    The probabilities are mixed with the uniform ones, `pi <- (1 - alpha) pi + alpha r / n`, so that the estimate stays
    unbiased for every gradient when the spectrum is stale or wrong; weights use the mixed `pi`. Unbiased is what SGD
    sees: Adam's steps are rescaled per coordinate, so a rarely drawn direction is not fully compensated there.

    Args:
        rank: r, at least 1; capped at the projected dimension.
        side: "right", "left" or "short".
        c: isotropy constant; 1 is unbiased.
        alpha: share of the uniform law, in (0, 1]; 0.05, 0.2 cost about 3 %, 13 % of variance on a steep spectrum.
        named: eigenpairs kept, as a multiple of the rank.
        rate: weight of a new window in the running estimate, in (0, 1].
        source: "gradients" or "inputs".

    Raises:
        UsageError: an argument out of range.

    Reference: arXiv 2603.20632, instance-dependent law (spectrum estimates, alpha-mix and hybrid law derived here; an
    activation basis without weights is AGZO's).
    """

    rank: int = 8
    side: Side = "right"
    c: float = 1.0
    alpha: float = 0.1
    named: int = 4
    rate: float = 0.5
    source: Literal["gradients", "inputs"] = "gradients"
    needs: ClassVar[Literal["nothing", "gradient"]] = "nothing"
    unbiased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rank(self.rank, self.c)
        check_side(self.side)
        for name, share in (("alpha", self.alpha), ("rate", self.rate)):
            if not 0 < share <= 1:
                raise UsageError(
                    f"{name} = {share} is outside (0, 1]; without it the estimate loses directions"
                )
        if self.source not in ("gradients", "inputs"):
            raise UsageError(
                f"source '{self.source}' of a spectrum is not known; use 'gradients' or 'inputs'"
            )
        if self.source == "inputs" and self.side != "right":
            raise UsageError(f"side '{self.side}' sees no inputs; use side 'right', or source 'gradients'")
        if self.named < 1:
            raise UsageError(
                f"named = {self.named} keeps no eigenpair; use at least 1, or projector 'stiefel'"
            )

    @property
    def learns_from(self) -> Source:
        """Its source."""
        return self.source

    @property
    def eigenpairs(self) -> int:
        """Eigenpairs kept of a spectrum."""
        return self.named * self.rank

    @one_thread()
    def draw(
        self, shape: tuple[int, ...], key: Key, *, like: Tensor, spectrum: Spectrum | None = None, **_: Any
    ) -> Subspace:
        """Draw the subspace of one weight from the running estimate of its spectrum."""
        n = projected_length(self.side, shape)
        r = min(self.rank, n)
        if spectrum is None:
            return one_sided(self.side, shape, lengthened(haar(n, r, key, like), self.c).to(like))
        return one_sided(self.side, shape, sampled(spectrum, r, key, like, alpha=self.alpha, c=self.c))

    def observe(self, subspace: Subspace, moments: Moments | None, grad: Tensor) -> Moments:
        """Add one gradient in the coordinates to the window's moments."""
        square = grad.mT @ grad if isinstance(subspace, Right) else grad @ grad.mT  # (r, r)
        if moments is None:
            moments = Moments(torch.zeros_like(grad), torch.zeros_like(square), 0)
        return moments.add(grad, square)

    @one_thread()
    def learn(
        self, spectrum: Spectrum | None, subspace: Subspace, moments: Moments, *, exact: bool
    ) -> Spectrum | None:
        """The estimate after a window.

        Args:
            exact: the gradients carried no estimation noise (backprop); otherwise only products of different steps
                are used, `(Ḡᵀ Ḡ - sum g_tᵀ g_t) / (T (T - 1))` with `Ḡ` their sum.
        """
        assert isinstance(subspace, Right | Left)
        right = isinstance(subspace, Right)
        basis = subspace.basis.double().cpu()  # (n, r)
        if exact:
            seen = moments.squares.double().cpu() / moments.count
        else:
            if moments.count < 2:
                return spectrum
            total = moments.total.double().cpu()
            outer = total.mT @ total if right else total @ total.mT
            seen = (outer - moments.squares.double().cpu()) / (moments.count * (moments.count - 1))
        # g = G P: undo the lengths of the columns of P to see Sigma between orthonormal directions
        u, upper = torch.linalg.qr(basis)
        inverse = torch.linalg.pinv(upper)  # (r, r)
        block = inverse.mT @ seen @ inverse  # UᵀSigma U
        block = (block + block.mT) / 2
        if not bool(torch.isfinite(block).all()):
            return spectrum
        if not exact:  # a noisy moment may be negative in places
            values, vectors = torch.linalg.eigh(block)
            block = vectors * values.clamp_min(0) @ vectors.mT
        n = basis.shape[0]
        if spectrum is None:
            mean = max(float(block.trace()), 0.0) / u.shape[1]
            spectrum = isotropic(n, mean, u)
        return spectrum.updated(u, block, self.named * min(self.rank, n), self.rate)
