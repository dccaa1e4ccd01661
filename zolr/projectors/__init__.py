"""How a subspace is drawn: the Projector protocol and the registry.

Convention: a projector is scaled so that `E[lift(project(G))] = c G` with `c = 1` unless asked, so `lr` and `eps`
mean the same thing in every subspace and at every rank.
"""

from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from zolr.errors import UsageError
from zolr.keys import Key
from zolr.probes import one_thread
from zolr.spectra import Moments, Spectrum
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


def check_rank(rank: int, c: float = 1.0) -> None:
    """Refuse a rank or isotropy constant that means nothing."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UsageError(f"rank {rank!r} is not possible; use a whole number of at least 1")
    if not c > 0:
        raise UsageError(f"isotropy constant c = {c} must be positive; use 1 for an unbiased estimate")


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


def orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal columns spanning those of `matrix (n, r)`; Haar-distributed if its entries are Gaussian."""
    with one_thread():
        q, upper = torch.linalg.qr(matrix)  # (n, r), (r, r)
    sign = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(q)
    # QR alone is not Haar: fix the signs (Mezzadri 2007). Row-major, as it comes back from a file: products round by layout
    return (q * sign).contiguous()


def haar(length: int, rank: int, key: Key, like: Tensor) -> Tensor:
    """`(length, rank)` with orthonormal columns, uniform on the Stiefel manifold, drawn on the host."""
    return orthonormal(key.normal((length, rank)).to(working_dtype(like)))


from zolr.projectors.coordinate import Coordinate  # noqa: E402  (the files obey the protocol above)
from zolr.projectors.dependent import Dependent  # noqa: E402
from zolr.projectors.gaussian import Gaussian  # noqa: E402
from zolr.projectors.identity import Identity  # noqa: E402
from zolr.projectors.range_finder import RangeFinder  # noqa: E402
from zolr.projectors.srht import Srht  # noqa: E402
from zolr.projectors.stiefel import Stiefel  # noqa: E402
from zolr.projectors.svd import Svd  # noqa: E402
from zolr.projectors.two_sided import TwoSidedHaar  # noqa: E402

PROJECTORS: dict[str, type] = {
    "stiefel": Stiefel,
    "dependent": Dependent,
    "gaussian": Gaussian,
    "coordinate": Coordinate,
    "srht": Srht,
    "two_sided": TwoSidedHaar,
    "svd": Svd,
    "range_finder": RangeFinder,
    "identity": Identity,
}
