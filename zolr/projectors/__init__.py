"""How a subspace is drawn: the Projector protocol and the registry.

Convention: a projector is scaled so that `E[lift(project(G))] = c G` with `c = 1` unless asked, so `lr` and `eps`
mean the same thing in every subspace and at every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from zolr.errors import UsageError, is_count
from zolr.factorizations import leading, orthonormal
from zolr.keys import Key
from zolr.spectra import Moments, Spectrum, inclusion_probabilities, picked, sample
from zolr.subspaces import Left, Right, Subspace

Side = Literal["right", "left", "short"]
Source = Literal["nothing", "gradients", "inputs"]


class Projector(Protocol):
    """A frozen rule that draws subspaces; it holds hyper-parameters and no state."""

    needs: ClassVar[
        Literal["nothing", "gradient"]
    ]  # what a draw wants beyond its key and what was learned before
    unbiased: ClassVar[bool]  # whether E[lift(project(G))] = c G at the default settings

    @property
    def learns_from(self) -> Source:
        """What its law follows from window to window: nothing, the gradients of a window, or a layer's inputs."""
        ...

    @property
    def eigenpairs(self) -> int:
        """How many eigenpairs of the inputs' second moment a draw uses, if it learns from inputs."""
        ...

    def draw(
        self,
        shape: tuple[int, ...],
        key: Key,
        *,
        like: Tensor,
        gradient: Tensor | None = None,
        previous: Subspace | None = None,
        spectrum: Spectrum | None = None,
        momentum: Tensor | None = None,
    ) -> Subspace:
        """Draw the subspace of one weight for one window.

        Args:
            shape: `(m, n)` of the weight.
            key: name of the draw.
            like: its dtype and device are those of the basis.
            gradient: dense gradient `(m, n)`, for projectors that need one.
            previous: the subspace of the window before.
            spectrum: what was learned, for projectors that learn; None before that.
            momentum: mean gradient in the coordinates of `previous`, where a dense method's optimizer keeps one.
        """
        ...


class Learner(Projector, Protocol):
    """A projector that learns from the gradients of each window."""

    def observe(self, subspace: Subspace, moments: Moments | None, grad: Tensor) -> Moments:
        """Add one gradient in the coordinates to what the window has shown."""
        ...

    def learn(
        self, spectrum: Spectrum | None, subspace: Subspace, moments: Moments, *, exact: bool
    ) -> Spectrum | None:
        """The spectrum after a window; `exact` says that its gradients carried no estimation noise."""
        ...


class Fixed:
    """A law that learns nothing."""

    @property
    def learns_from(self) -> Source:
        """Nothing."""
        return "nothing"

    @property
    def eigenpairs(self) -> int:
        """None."""
        return 0


@dataclass(frozen=True)
class OneSided(Fixed):
    """An unbiased law of bases on one side of a matrix, which nothing but the key decides.

    Args:
        rank: r, at least 1; capped at the projected dimension.
        side: "right" projects the input dimension, "left" the output dimension, "short" the smaller one.
        c: isotropy constant; 1 is unbiased.

    Raises:
        UsageError: rank below 1, unknown side, or c not positive.
    """

    rank: int = 8
    side: Side = "right"
    c: float = 1.0
    needs: ClassVar[Literal["nothing", "gradient"]] = "nothing"
    unbiased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rank(self.rank, self.c)
        check_side(self.side)

    def draw(self, shape: tuple[int, ...], key: Key, *, like: Tensor, **_: Any) -> Subspace:
        """Draw the subspace of one weight."""
        n = projected_length(self.side, shape)
        return one_sided(self.side, shape, self._basis(n, min(self.rank, n), key, like).to(like))

    def _basis(self, n: int, r: int, key: Key, like: Tensor) -> Tensor:
        """P `(n, r)`."""
        raise NotImplementedError


class Patient(Fixed):
    """A law that is asked again the later, the more alike its draws for one weight are."""

    def likeness(self, before: Subspace, after: Subspace) -> Tensor:
        """How alike two draws are, shape (), 1 for the same."""
        raise NotImplementedError

    def gap(self, gap: int, seen: Sequence[float]) -> int:
        """Windows of a method that one draw lasts.

        Args:
            gap: the same before the last draw.
            seen: likeness of consecutive draws so far, the last one last.
        """
        raise NotImplementedError


def check_rank(rank: int, c: float = 1.0) -> None:
    """Refuse a rank or isotropy constant that means nothing."""
    if not is_count(rank):
        raise UsageError(f"rank {rank!r} is not possible; use a whole number of at least 1")
    if not c > 0:
        raise UsageError(f"isotropy constant c = {c} must be positive; use 1 for an unbiased estimate")


def demanded(gradient: Tensor | None, projector: Projector) -> Tensor:
    """The gradient that a draw of this projector needs.

    Raises:
        UsageError: there is none.
    """
    if gradient is None:
        name = next((n for n, cls in PROJECTORS.items() if type(projector) is cls), type(projector).__name__)
        raise UsageError(
            f"projector '{name}' needs a dense gradient to draw from; use a dense method such as 'galore'"
        )
    return gradient


def check_side(side: str) -> None:
    """Refuse an unknown side."""
    if side not in ("right", "left", "short"):
        raise UsageError(f"side '{side}' is not known; use 'right' (input side), 'left' or 'short'")


def is_right(side: Side, shape: tuple[int, ...]) -> bool:
    """Whether the basis lies on the input side."""
    return side == "right" or (side == "short" and shape[1] <= shape[0])


def one_sided(side: Side, shape: tuple[int, ...], basis: Tensor) -> Subspace:
    """The kind of subspace that `side` asks for, around a basis of that side's length."""
    return Right(basis, shape[0]) if is_right(side, shape) else Left(basis, shape[1])


def projected_length(side: Side, shape: tuple[int, ...]) -> int:
    """Length of the dimension that is projected."""
    return shape[1] if is_right(side, shape) else shape[0]


def working_dtype(like: Tensor) -> torch.dtype:
    """float64 for a float64 model, else float32: factorizations have no half-precision kernels."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def haar(length: int, rank: int, key: Key, like: Tensor) -> Tensor:
    """`(length, rank)` with orthonormal columns, uniform on the Stiefel manifold, drawn on the host."""
    return orthonormal(key.normal((length, rank)).to(working_dtype(like)))


def lengthened(basis: Tensor, c: float | None) -> Tensor:
    """Orthonormal columns of `(n, r)` at the length of an isotropic basis, `PᵀP = (c n / r) I`; as they are for no c."""
    length, rank = basis.shape
    return basis if c is None else basis * sqrt(c * length / rank)


def turned(side: Side, gradient: Tensor) -> Tensor:
    """The gradient with the projected side last, so that a weight and its transpose get the same numbers."""
    return gradient if is_right(side, tuple(gradient.shape)) else gradient.mT


def oriented(side: Side, gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient `turned`, fit for factorizations: `(m, n)`, or `(n, m)`."""
    return turned(side, gradient).to(working_dtype(like))


def start(
    side: Side, shape: tuple[int, ...], rank: int, key: Key, like: Tensor, gradient: Tensor | None
) -> Tensor:
    """The first of a sequence of bases `(n, r)`: the leading directions of a gradient, Haar where there is none.

    A gradient with fewer directions than the rank gets random ones besides its own.
    """
    n = projected_length(side, shape)
    r = min(rank, n)
    if gradient is None:
        return haar(n, r, key, like)
    _, basis = leading(turned(side, gradient), r)
    if basis.shape[1] == r:
        return basis
    return orthonormal(torch.cat((basis, key.normal((n, r - basis.shape[1])).to(basis)), dim=1))


def basis_before(side: Side, shape: tuple[int, ...], rank: int, previous: Subspace | None) -> Tensor | None:
    """The basis `(n, r)` of the window before, at whatever scale; None where there is none to go on from."""
    n = projected_length(side, shape)
    kind = Right if is_right(side, shape) else Left
    if not isinstance(previous, kind) or previous.basis.shape != (n, min(rank, n)):
        return None
    return previous.basis.to(working_dtype(previous.basis))


def geodesic(basis: Tensor, u: Tensor, angles: Tensor, v: Tensor) -> Tensor:
    """`P + (P V (cos - 1) + U sin) Vᵀ`: each direction `P v_i` of the span turned toward `u_i` by its angle.

    Args:
        basis: `P (n, r)`, orthonormal.
        u: `(n, k)`, orthonormal and orthogonal to `P`.
        angles: `(k,)` in radians.
        v: `(r, k)`, orthonormal.

    Reference: Edelman, Arias and Smith 1998, theorem 2.3.
    """
    return basis + (basis @ v * (angles.cos() - 1) + u * angles.sin()) @ v.mT


def gaussian_basis(length: int, rank: int, key: Key, like: Tensor, c: float = 1.0) -> Tensor:
    """`(length, rank)` of independent `N(0, c / rank)` entries, drawn on the host: `E[P Pᵀ] = c I`."""
    return (key.normal((length, rank)).to(working_dtype(like)) * sqrt(c / rank)).to(like)


def sampled(
    spectrum: Spectrum, rank: int, key: Key, like: Tensor, *, alpha: float = 0.0, c: float = 1.0
) -> Tensor:
    """`[ sqrt(c / pi_i) q_i ]`, `(n, r)`, for a set of r directions drawn with water-filled marginals pi.

    Args:
        spectrum: directions with a name and an eigenvalue each; all others share one, as do those named with the same, and
            are drawn Haar-uniformly.
        alpha: share of the uniform law in pi; where fewer than r directions carry anything, the others share the rest.
    """
    n, named = spectrum.vectors.shape
    certain = not alpha and not spectrum.rest
    if certain:
        n = named  # nothing else is ever drawn
    sigma = torch.cat((spectrum.values, torch.full((n - named,), spectrum.rest, dtype=torch.float64)))
    apart = torch.ones_like(sigma, dtype=torch.bool) if certain else sigma != spectrum.rest
    pi = inclusion_probabilities(sigma, rank)
    spare = rank - float(pi.sum())
    if spare > 0.5:  # fewer directions carry anything than may be drawn: spend the others uniformly
        free = pi == 0
        pi = torch.where(free, spare / free.sum(), pi)
    pi = (1 - alpha) * pi + alpha * rank / n
    drawn = sample(pi, key.fold_in("sample"), rank)
    by_name = apart[drawn]
    count = rank if certain else int(by_name.sum())
    chosen = picked(drawn, by_name, count)
    vectors = spectrum.vectors.cpu().to(working_dtype(like))  # (n, k)
    # the sign of an eigenvector is that of whatever library computed it, and a probe along it would be another one
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    columns = [vectors[:, chosen] * (c / pi[chosen]).sqrt().to(vectors)]
    others = rank - count
    if others:
        gauss = key.fold_in("rest").normal((len(vectors), others)).to(vectors)
        vectors = vectors * apart[:named].to(vectors)
        for _ in range(2):  # twice is enough for full precision
            gauss = gauss - vectors @ (vectors.mT @ gauss)
        shared = float(torch.where(apart, 0.0, pi).amax())
        columns.append(orthonormal(gauss) * sqrt(c / shared))
    return torch.cat(columns, dim=1).to(like)


from zolr.projectors.coordinate import Coordinate  # noqa: E402  (the files obey the protocol above)
from zolr.projectors.dependent import Dependent  # noqa: E402
from zolr.projectors.gaussian import Gaussian  # noqa: E402
from zolr.projectors.identity import Identity  # noqa: E402
from zolr.projectors.jump import Jump  # noqa: E402
from zolr.projectors.plumage import Plumage  # noqa: E402
from zolr.projectors.power_iteration import PowerIteration  # noqa: E402
from zolr.projectors.range_finder import RangeFinder  # noqa: E402
from zolr.projectors.srht import Srht  # noqa: E402
from zolr.projectors.stiefel import Stiefel  # noqa: E402
from zolr.projectors.svd import LazySvd, Svd  # noqa: E402
from zolr.projectors.tracking import Tracking  # noqa: E402
from zolr.projectors.two_sided import TwoSidedHaar  # noqa: E402
from zolr.projectors.viewed import View  # noqa: E402
from zolr.projectors.walk import Walk  # noqa: E402

PROJECTORS: dict[str, type] = {
    "stiefel": Stiefel,
    "dependent": Dependent,
    "gaussian": Gaussian,
    "coordinate": Coordinate,
    "srht": Srht,
    "two_sided": TwoSidedHaar,
    "svd": Svd,
    "power_iteration": PowerIteration,
    "tracking": Tracking,
    "walk": Walk,
    "jump": Jump,
    "lazy_svd": LazySvd,
    "plumage": Plumage,
    "viewed": View,
    "range_finder": RangeFinder,
    "identity": Identity,
}
