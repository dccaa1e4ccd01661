"""Subspace and its kinds: the linear maps between a weight `(m, n)` and its coordinates.

Laws (tests/test_subspaces.py), for every kind, `G (m, n)`, coordinates `C` and inputs `x (..., n)`:

- `<project(G), C> == <G, lift(C)>`;
- `apply(x, C) == x @ lift(C).T`, and the products of `outer` and `factors` are `lift` and `apply`;
- `lift(dual(project(G)))` is the orthogonal projection of `G` on the span, whatever the basis;
- rotating or rescaling the basis of the same span leaves what is lifted after `change_from` unchanged.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor

from zolr.probes import one_thread

Rows = slice | Tensor


@dataclass(frozen=True)
class Change:
    """How what was written in the coordinates of an old subspace reads in a new one.

    Args:
        coords: of displacements: `C_old -> C_new`, the coordinates of the orthogonal projection of `lift_old(C_old)`.
        gradients: of gradients and their averages: `G P_old -> G P_new` for every `G` inside the old span; they grow
            with the length of the basis where coordinates shrink.
        squares: of second moments of gradients: each new axis takes the average of the old axes' moments, weighted by
            squared cosines, so that the mass of a moment is not lost between unrelated subspaces.
        variances: of the variances of gradients whose coordinates are uncorrelated, by the squares of the map of
            `gradients`; between unrelated subspaces most of their mass is lost.
        lifted: of what stands for a whole gradient by its lift: `C_old -> project_new(lift_old(C_old))`. The same as
            `gradients` where columns are orthonormal; for bases that are unbiased instead (`E[P Pᵀ] = I`) it keeps the
            mean of the lift over the new basis, where `gradients` would shrink it by `r / n`.

    Reference: PLUMAGE arXiv 2505.18313, LOZO (gradients), LDAdam arXiv 2410.16103 (variances), FLORA arXiv 2402.03293
    (lifted); the average of squares is ours.
    """

    coords: Callable[[Tensor], Tensor]
    gradients: Callable[[Tensor], Tensor]
    squares: Callable[[Tensor], Tensor]
    variances: Callable[[Tensor], Tensor]
    lifted: Callable[[Tensor], Tensor]


class Subspace(ABC):
    """A drawn subspace of one weight `(m, n) = (out_features, in_features)`, for one window."""

    channel: ClassVar[int | None] = (
        None  # axis of the coordinates that was projected; None where no single one was
    )

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """`(m, n)` of the weight (any shape for Full)."""

    @property
    @abstractmethod
    def coords_shape(self) -> tuple[int, ...]:
        """Shape of the coordinates."""

    @abstractmethod
    def project(self, grad: Tensor) -> Tensor:
        """`(m, n) -> coords_shape`; the gradient in the coordinates when `grad` is the gradient in the weight."""

    def lift(self, coords: Tensor, rows: Rows = slice(None)) -> Tensor:
        """`coords_shape -> (m, n)`, the adjoint of `project`; `rows` (a slice or indices) picks rows of the result."""
        left, right = self.outer(coords, rows)
        return left @ right

    @abstractmethod
    def apply(self, x: Tensor, coords: Tensor) -> Tensor:
        """`(..., n) -> (..., m)`, equal to `x @ lift(coords).T`, without forming the lifted matrix."""

    @abstractmethod
    def dual(self, coords: Tensor) -> Tensor:
        """Coordinates of the gradient inside the span that `project` sends to `coords`; the same for orthonormal bases."""

    @abstractmethod
    def change_from(self, old: "Subspace") -> Change | None:
        """How coordinates of `old` read in this subspace; None where no linear map is known."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that define it, by field name; with the kind's name they rebuild it."""

    @abstractmethod
    def outer(self, coords: Tensor, rows: Rows = slice(None)) -> tuple[Tensor, Tensor]:
        """`(a, b)` with `lift(coords, rows) == a @ b`, so that the product can be added to a weight."""

    def factors(self, x: Tensor, coords: Tensor) -> tuple[Tensor, Tensor] | None:
        """`(a, b)` with `apply(x, coords) == a @ b`, so that the product can be added in place; None if dense."""
        return None


@final
@dataclass(frozen=True, eq=False)
class Full(Subspace):
    """The whole space: coordinates are the weight itself.

    Args:
        size: shape of the weight, of any number of dimensions.
    """

    size: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def coords_shape(self) -> tuple[int, ...]:
        return self.size

    def project(self, grad: Tensor) -> Tensor:
        return grad

    def lift(self, coords: Tensor, rows: Rows = slice(None)) -> Tensor:
        return coords[rows] if coords.dim() else coords

    def outer(self, coords: Tensor, rows: Rows = slice(None)) -> tuple[Tensor, Tensor]:
        raise TypeError("coordinates of the whole space are no product of two thin matrices; use lift")

    def apply(self, x: Tensor, coords: Tensor) -> Tensor:
        return x @ coords.mT

    def dual(self, coords: Tensor) -> Tensor:
        return coords

    def change_from(self, old: Subspace) -> Change | None:
        same = isinstance(old, Full) and old.size == self.size
        return Change(*[lambda x: x] * 5) if same else None

    def tensors(self) -> dict[str, Tensor]:
        return {"size": torch.tensor(self.size)}


def _overlap(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maps between coordinates of two bases of columns `(n, r)`, `(n, s)`.

    Returns:
        `(r, s)` matrix `R` with `B_old @ R` the coordinates of the orthogonal projection of `B_old oldᵀ` on the span
        of `new`; the `(r, s)` matrix `T` with `G old T = G new` for `G` in the span of `old`; and the `(r, s)` weights,
        columns summing to 1 for bases of equal lengths, that average second moments. All are the identity when the
        bases are the same, orthogonal or not.
    """
    if old.dtype.itemsize < 4:
        old, new = old.float(), new.float()  # there are no factorizations in 16 bits
    cross = old.mT @ new  # (r, s)
    # a pseudo-inverse: columns may depend on each other, or be zero where a padding row was cut out
    coords = cross @ torch.linalg.pinv(new.mT @ new, hermitian=True)  # (r, s)
    # a gradient seen as g in the old basis is g @ turn in the new one, as far as it lies in the old span
    turn = torch.linalg.pinv(old.mT @ old, hermitian=True) @ cross  # (r, s)
    lengths = old.square().sum(0)[:, None]  # (r, 1)
    seen = lengths > 0
    squared = turn.square() * lengths  # (r, s): squared cosines times the squared lengths of the new axes
    share = squared / squared.sum(0).clamp_min(torch.finfo(cross.dtype).tiny)
    uniform = (seen.to(cross) / seen.sum().clamp_min(1)).expand_as(cross)
    size = new.square().sum(0)  # (s,)
    weights = torch.where(squared.sum(0) > torch.finfo(cross.dtype).eps * size, share, uniform)
    # a second moment of gradients scales with the square of the basis it was taken in
    scale = torch.where(seen, size / lengths, torch.zeros_like(cross))
    return coords, turn, weights * scale


def _inverse_gram(basis: Tensor) -> Tensor:
    """Pseudo-inverse of `PᵀP (r, r)`; columns may depend on each other, or be zero."""
    wide = basis.float() if basis.dtype.itemsize < 4 else basis  # there are no factorizations in 16 bits
    with one_thread():
        return torch.linalg.pinv(wide.mT @ wide, hermitian=True).to(basis)


@final
@dataclass(frozen=True, eq=False)
class Right(Subspace):
    """Input side: `lift(B) = B Pᵀ`, `project(G) = G P`.

    Args:
        basis: `P (n, r)`.
        m: rows of the weight.
    """

    channel: ClassVar[int | None] = -1
    basis: Tensor
    m: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.m, self.basis.shape[0])

    @property
    def coords_shape(self) -> tuple[int, ...]:
        return (self.m, self.basis.shape[1])

    def project(self, grad: Tensor) -> Tensor:
        return grad @ self.basis

    def apply(self, x: Tensor, coords: Tensor) -> Tensor:
        return (x @ self.basis) @ coords.mT

    def outer(self, coords: Tensor, rows: Rows = slice(None)) -> tuple[Tensor, Tensor]:
        return coords[rows], self.basis.mT

    def factors(self, x: Tensor, coords: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.basis, coords.mT

    @cached_property
    def inverse(self) -> Tensor:
        """`(PᵀP)⁻¹ (r, r)`."""
        return _inverse_gram(self.basis)

    def dual(self, coords: Tensor) -> Tensor:
        return coords @ self.inverse

    def change_from(self, old: Subspace) -> Change | None:
        if not isinstance(old, Right) or old.shape != self.shape:
            return None
        coords, turn, squares = _overlap(old.basis, self.basis)
        return Change(
            coords=lambda c: c @ coords,
            gradients=lambda g: g @ turn,
            squares=lambda v: v @ squares,
            variances=lambda v: v @ turn.square(),
            lifted=lambda c: c @ (old.basis.mT @ self.basis).to(c),
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"basis": self.basis, "m": torch.tensor(self.m)}


@final
@dataclass(frozen=True, eq=False)
class Left(Subspace):
    """Output side: `lift(B) = P B`, `project(G) = Pᵀ G`.

    Args:
        basis: `P (m, r)`.
        n: columns of the weight.
    """

    channel: ClassVar[int | None] = -2
    basis: Tensor
    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.basis.shape[0], self.n)

    @property
    def coords_shape(self) -> tuple[int, ...]:
        return (self.basis.shape[1], self.n)

    def project(self, grad: Tensor) -> Tensor:
        return self.basis.mT @ grad

    def apply(self, x: Tensor, coords: Tensor) -> Tensor:
        return (x @ coords.mT) @ self.basis.mT

    def outer(self, coords: Tensor, rows: Rows = slice(None)) -> tuple[Tensor, Tensor]:
        return self.basis[rows], coords

    def factors(self, x: Tensor, coords: Tensor) -> tuple[Tensor, Tensor]:
        return x @ coords.mT, self.basis.mT

    @cached_property
    def inverse(self) -> Tensor:
        """`(PᵀP)⁻¹ (r, r)`."""
        return _inverse_gram(self.basis)

    def dual(self, coords: Tensor) -> Tensor:
        return self.inverse @ coords

    def change_from(self, old: Subspace) -> Change | None:
        if not isinstance(old, Left) or old.shape != self.shape:
            return None
        coords, turn, squares = _overlap(old.basis, self.basis)
        return Change(
            coords=lambda c: coords.mT @ c,
            gradients=lambda g: turn.mT @ g,
            squares=lambda v: squares.mT @ v,
            variances=lambda v: turn.mT.square() @ v,
            lifted=lambda c: (self.basis.mT @ old.basis).to(c) @ c,
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"basis": self.basis, "n": torch.tensor(self.n)}


@final
@dataclass(frozen=True, eq=False)
class TwoSided(Subspace):
    """Both sides: `lift(B) = U B Vᵀ`, `project(G) = Uᵀ G V`.

    Args:
        left: `U (m, r)`.
        right: `V (n, s)`.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[0], self.right.shape[0])

    @property
    def coords_shape(self) -> tuple[int, ...]:
        return (self.left.shape[1], self.right.shape[1])

    def project(self, grad: Tensor) -> Tensor:
        return self.left.mT @ grad @ self.right

    def apply(self, x: Tensor, coords: Tensor) -> Tensor:
        return (x @ self.right) @ (coords.mT @ self.left.mT)

    def outer(self, coords: Tensor, rows: Rows = slice(None)) -> tuple[Tensor, Tensor]:
        return self.left[rows] @ coords, self.right.mT

    def factors(self, x: Tensor, coords: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.right, coords.mT @ self.left.mT

    @cached_property
    def inverses(self) -> tuple[Tensor, Tensor]:
        """`(UᵀU)⁻¹ (r, r)` and `(VᵀV)⁻¹ (s, s)`."""
        return _inverse_gram(self.left), _inverse_gram(self.right)

    def dual(self, coords: Tensor) -> Tensor:
        left, right = self.inverses
        return left @ coords @ right

    def change_from(self, old: Subspace) -> Change | None:
        if not isinstance(old, TwoSided) or old.shape != self.shape:
            return None
        left, left_turn, left_squares = _overlap(old.left, self.left)
        right, right_turn, right_squares = _overlap(old.right, self.right)
        return Change(
            coords=lambda c: left.mT @ c @ right,
            gradients=lambda g: left_turn.mT @ g @ right_turn,
            squares=lambda v: left_squares.mT @ v @ right_squares,
            variances=lambda v: left_turn.mT.square() @ v @ right_turn.square(),
            lifted=lambda c: (self.left.mT @ old.left).to(c) @ c @ (old.right.mT @ self.right).to(c),
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}


@final
@dataclass(frozen=True, eq=False)
class Viewed(Subspace):
    """Input side of the weight seen as `(m c, n / c)`, each row cut into c parts: `lift(B) = (B Pᵀ) as (m, n)`.

    One short basis serves every part, so coordinates can be many and thin: `(m c, r)` numbers, a budget of `c r` a row.

    Args:
        basis: `P (n / c, r)`.
        m: rows of the weight.
        parts: c.
    """

    basis: Tensor
    m: int
    parts: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.m, self.basis.shape[0] * self.parts)

    @property
    def coords_shape(self) -> tuple[int, ...]:
        return (self.m * self.parts, self.basis.shape[1])

    def project(self, grad: Tensor) -> Tensor:
        return grad.reshape(self.m * self.parts, -1) @ self.basis

    def lift(self, coords: Tensor, rows: Rows = slice(None)) -> Tensor:
        picked = self.by_row(coords)[rows]  # (k, c, r)
        return (picked.flatten(0, 1) @ self.basis.mT).reshape(picked.shape[0], self.shape[1])

    def apply(self, x: Tensor, coords: Tensor) -> Tensor:
        seen, right = self.factors(x, coords)
        return seen @ right

    def outer(self, coords: Tensor, rows: Rows = slice(None)) -> tuple[Tensor, Tensor]:
        # the right factor is one block P' a part: thin only where c r is below n
        eye = torch.eye(self.parts, dtype=self.basis.dtype, device=self.basis.device)
        return self.by_row(coords)[rows].flatten(1), torch.kron(eye, self.basis.mT.contiguous())

    def factors(self, x: Tensor, coords: Tensor) -> tuple[Tensor, Tensor]:
        seen = x.unflatten(-1, (self.parts, self.basis.shape[0])) @ self.basis  # (..., c, r)
        return seen.flatten(-2), self.by_row(coords).flatten(1).mT

    def by_row(self, coords: Tensor) -> Tensor:
        """`(m c, r) -> (m, c, r)`: the coordinates of each row of the weight."""
        return coords.unflatten(0, (self.m, self.parts))

    @cached_property
    def parted(self) -> Right:
        """The subspace of the weight as it is seen."""
        return Right(self.basis, self.m * self.parts)

    def dual(self, coords: Tensor) -> Tensor:
        return self.parted.dual(coords)

    def change_from(self, old: Subspace) -> Change | None:
        if not isinstance(old, Viewed) or old.shape != self.shape or old.parts != self.parts:
            return None
        return self.parted.change_from(old.parted)

    def tensors(self) -> dict[str, Tensor]:
        return {"basis": self.basis, "m": torch.tensor(self.m), "parts": torch.tensor(self.parts)}


BLOCK = 256  # numbers of a coded basis that share a scale


@final
@dataclass(frozen=True, eq=False)
class Coded(Subspace):
    """One side, its basis kept as whole numbers of 4 or 8 bits and decoded at every use.

    In blocks of 256 numbers, `p = step (code - zero)`, with the range of a block, which always holds 0, cut into
    `2^bits - 1` steps. What it stands for is the decoded basis in every respect; that one is orthonormal no more.

    Args:
        codes: uint8 `(blocks, 256 bits / 8)`; at 4 bits two numbers in each, the first in the lower half.
        step: `(blocks,)`, of the dtype of the basis.
        zero: uint8 `(blocks,)`, the code of 0.
        sizes: `(length of the basis, rank, the other side of the weight, 1 for the input side)`.

    Reference: Q-GaLore arXiv 2407.08296 (blocks of 256, uniform codes with a zero point).
    """

    codes: Tensor
    step: Tensor
    zero: Tensor
    sizes: tuple[int, int, int, int]

    @classmethod
    def of(cls, subspace: "Left | Right", bits: int) -> "Coded":
        """The nearest codes of a subspace of one side.

        Args:
            bits: 4 or 8.
        """
        right = isinstance(subspace, Right)
        basis, other = subspace.basis, subspace.m if isinstance(subspace, Right) else subspace.n
        blocks = -(-basis.numel() // BLOCK)
        # in at least float32: there, and not in 16 bits, a step is exact enough to count by
        flat = basis.flatten().to(torch.promote_types(basis.dtype, torch.float32))
        numbers = torch.zeros(blocks * BLOCK, dtype=flat.dtype, device=flat.device)
        numbers[: flat.numel()] = flat
        numbers = numbers.view(blocks, BLOCK)
        low, high = numbers.amin(1).clamp_max(0), numbers.amax(1).clamp_min(0)
        step = ((high - low) / (2**bits - 1)).to(basis.dtype)  # as it is kept
        usable = torch.where(step > 0, step, torch.ones_like(step)).to(flat)[:, None]
        zero = (-low[:, None] / usable).round().clamp(0, 2**bits - 1)
        codes = (numbers / usable + zero).round().clamp(0, 2**bits - 1).to(torch.uint8)
        if bits == 4:
            codes = codes[:, ::2] | (codes[:, 1::2] << 4)
        length, rank = basis.shape
        sizes = (length, rank, other, int(right))
        return cls(codes.contiguous(), step, zero[:, 0].to(torch.uint8), sizes)

    @property
    def bits(self) -> int:
        """Of each number."""
        return 8 * self.codes.shape[1] // BLOCK

    @property
    def basis(self) -> Tensor:
        """The basis that the codes stand for, `(n, r)` or `(m, r)`."""
        codes, (length, rank) = self.codes, self.sizes[:2]
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)
        wide = torch.promote_types(self.step.dtype, torch.float32)
        numbers = (codes.to(wide) - self.zero.to(wide)[:, None]) * self.step.to(wide)[:, None]
        return numbers.flatten()[: length * rank].view(length, rank).to(self.step.dtype)

    @property
    def plain(self) -> Left | Right:
        """The subspace that the codes stand for."""
        return Right(self.basis, self.sizes[2]) if self.sizes[3] else Left(self.basis, self.sizes[2])

    @property
    def channel(self) -> int:  # type: ignore[override]
        return -1 if self.sizes[3] else -2

    @property
    def shape(self) -> tuple[int, ...]:
        length, _, other, right = self.sizes
        return (other, length) if right else (length, other)

    @property
    def coords_shape(self) -> tuple[int, ...]:
        _, rank, other, right = self.sizes
        return (other, rank) if right else (rank, other)

    def project(self, grad: Tensor) -> Tensor:
        return self.plain.project(grad)

    def apply(self, x: Tensor, coords: Tensor) -> Tensor:
        return self.plain.apply(x, coords)

    def outer(self, coords: Tensor, rows: Rows = slice(None)) -> tuple[Tensor, Tensor]:
        return self.plain.outer(coords, rows)

    def factors(self, x: Tensor, coords: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain.factors(x, coords)

    def dual(self, coords: Tensor) -> Tensor:
        return self.plain.dual(coords)

    def change_from(self, old: Subspace) -> Change | None:
        return self.plain.change_from(old.plain) if isinstance(old, Coded) else None

    def tensors(self) -> dict[str, Tensor]:
        sizes = torch.tensor(self.sizes)
        return {"codes": self.codes, "step": self.step, "zero": self.zero, "sizes": sizes}


def rebuild(kind: str, tensors: dict[str, Tensor]) -> Subspace:
    """A subspace from its kind's name and `tensors()`.

    Raises:
        ValueError: `kind` names no kind of subspace.
    """
    if kind == "Full":
        return Full(tuple(tensors["size"].tolist()))
    if kind == "Right":
        return Right(tensors["basis"], int(tensors["m"]))
    if kind == "Left":
        return Left(tensors["basis"], int(tensors["n"]))
    if kind == "TwoSided":
        return TwoSided(tensors["left"], tensors["right"])
    if kind == "Viewed":
        return Viewed(tensors["basis"], int(tensors["m"]), int(tensors["parts"]))
    if kind == "Coded":
        length, rank, other, right = tensors["sizes"].tolist()
        return Coded(tensors["codes"], tensors["step"], tensors["zero"], (length, rank, other, right))
    raise ValueError(f"'{kind}' is no kind of subspace; use Full, Right, Left, TwoSided, Viewed or Coded")
