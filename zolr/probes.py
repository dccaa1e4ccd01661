"""Probes: one random direction over a list of named spaces, and the laws it can follow.

Every law has `E[z zᵀ] = I` over all entries together, so that `E[slope * z]` is the gradient.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from zolr.errors import UsageError
from zolr.keys import SIGNS_PER_COUNTER, Key, name_hash

BLOCK = 1 << 20  # entries of a space too large to be drawn whole are drawn in blocks of this many

LAWS = ("rademacher", "gaussian", "sphere")


@contextmanager
def one_thread() -> Iterator[None]:
    """Factorizations on one thread: with several the bits of QR depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis of at most `BLOCK` entries each (at least one row)."""
    step = max(1, BLOCK // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def counters(name: str, start: int, entries: int, device: torch.device) -> Tensor:
    """Philox counters of entries `start ... start + entries` of the space called `name`.

    Args:
        start: multiple of 128.

    Returns:
        `(ceil(entries / 128), 4)` int64: block number (two words) and 64-bit hash of the name (two words).
    """
    code = name_hash(name)
    first, blocks = start // SIGNS_PER_COUNTER, -(-entries // SIGNS_PER_COUNTER)
    index = torch.arange(first, first + blocks, device=device)
    high, low = torch.full_like(index, code >> 32), torch.full_like(index, code & 0xFFFFFFFF)
    return torch.stack((index & 0xFFFFFFFF, index >> 32, low, high), dim=-1)


@dataclass(frozen=True)
class Space:
    """One named space that a direction covers.

    Args:
        name: unique name; the draw depends on it.
        shape: shape of an element.
        blocked: the space is as large as a weight and is drawn by row blocks, never whole.
    """

    name: str
    shape: tuple[int, ...]
    blocked: bool = False

    @property
    def size(self) -> int:
        """Number of entries."""
        return prod(self.shape)


class Layout:
    """Where each space lies in one flat draw; built once, used by every step.

    Args:
        spaces: the spaces, in any order (the draw does not depend on it).
        device: where the numbers are needed.
    """

    def __init__(self, spaces: Sequence[Space], device: torch.device | str = "cpu") -> None:
        self.spaces = tuple(spaces)
        self.device = torch.device(device)
        self.offsets: dict[str, int] = {}
        offset, parts = 0, []
        for space in self.spaces:
            if space.blocked:
                continue
            self.offsets[space.name] = offset
            parts.append(counters(space.name, 0, space.size, self.device))
            offset += len(parts[-1]) * SIGNS_PER_COUNTER
        self.length = offset
        self._cuts = [
            (
                s.name,
                s.shape,
                tuple(prod(s.shape[i + 1 :]) for i in range(len(s.shape))),
                self.offsets[s.name],
            )
            for s in self.spaces
            if not s.blocked
        ]
        self.counters = torch.cat(parts) if parts else None
        self.size = sum(space.size for space in self.spaces)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut a flat draw `(length,)` into one tensor a space."""
        offset = flat.storage_offset()
        return {
            name: flat.as_strided(shape, strides, offset + start)
            for name, shape, strides, start in self._cuts
        }


class Probe:
    """One direction `z`: `probe(name)` is its part in the space called `name`.

    Parts of blocked spaces are drawn again at every call, row block by row block (`probe(name, rows)`), and are the
    same numbers each time. All other parts come from one flat draw that lives as long as the probe.
    """

    def __init__(self, layout: Layout, law: str, key: Key) -> None:
        if law not in LAWS:
            raise UsageError(f"probe law '{law}' is not known; use one of {', '.join(LAWS)}")
        self.layout, self.law, self.key = layout, law, key
        self._shapes = {s.name: s.shape for s in layout.spaces}
        self._parts: dict[str, Tensor] = {}
        self._radii: dict[str, Tensor] = {}
        if layout.counters is not None and law == "rademacher":
            self._parts = layout.views(key.signs(layout.counters))
        elif layout.counters is not None:
            for space in layout.spaces:
                if not space.blocked:
                    self._parts[space.name] = self._normal(space.name, space.shape)

    def _normal(self, name: str, shape: tuple[int, ...], rows: slice = slice(None)) -> Tensor:
        """Normal numbers of some rows; they are named by fixed blocks of rows, so that no block needs another."""
        start, stop, _ = rows.indices(shape[0]) if shape else (0, 1, 1)
        parts = []
        for block in row_blocks(shape or (1,)):
            if block.stop > start and block.start < stop:
                z = self._block(name, shape, block)
                parts.append(z[max(start - block.start, 0) : stop - block.start])
        z = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(self.layout.device)
        z = z if shape else z[0]
        return z * self._radius(name, shape) if self.law == "sphere" else z

    def _block(self, name: str, shape: tuple[int, ...], block: slice) -> Tensor:
        """Normal numbers of one of the blocks that name them, by the card that they are for, or by the host."""
        return self.key.fold_in(name, block.start).normal(
            (block.stop - block.start, *shape[1:]), self.layout.device
        )

    def _radius(self, name: str, shape: tuple[int, ...]) -> float | Tensor:
        """Factor that puts a Gaussian draw on the sphere of radius sqrt(entries), where E[z zᵀ] = I."""
        if name not in self._radii:
            squares = sum(
                self._block(name, shape, b).double().square().sum() for b in row_blocks(shape or (1,))
            )
            assert isinstance(squares, Tensor)
            self._radii[name] = (sqrt(prod(shape)) / squares.sqrt()).float().to(self.layout.device)
        return self._radii[name]

    def __call__(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The part of the direction in one space, float32; `rows` picks a block along its first axis."""
        part = self._parts.get(name)
        if part is not None:
            return part if rows == slice(None) or not part.dim() else part[rows]
        shape = self._shapes[name]
        if self.law != "rademacher":
            return self._normal(name, shape, rows)
        start, stop, _ = rows.indices(shape[0])
        row = prod(shape[1:])
        first = start * row // SIGNS_PER_COUNTER * SIGNS_PER_COUNTER
        flat = self.key.signs(counters(name, first, stop * row - first, self.layout.device))
        return flat[start * row - first : stop * row - first].unflatten(0, (stop - start, *shape[1:]))


class Combination:
    """A direction that is held as it is: orthonormal ones, and those of several probes evaluated together.

    Args:
        parts: one tensor a space.
    """

    def __init__(self, parts: dict[str, Tensor]) -> None:
        self._parts = parts

    def __call__(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The part of the direction in one space."""
        part = self._parts[name]
        return part[rows] if part.dim() else part


def orthonormal(layout: Layout, count: int, key: Key) -> list[Combination]:
    """`count` mutually orthogonal directions of length `sqrt(size)`, uniform on the Stiefel manifold.

    Their average slope times direction has relative error `size / count - 1` in a fixed space (a full set of
    `size` directions gives the exact gradient).

    Raises:
        UsageError: more directions than entries, or a space that is too large to be drawn whole.
    """
    if count > layout.size:
        raise UsageError(
            f"{count} orthonormal probes do not fit in {layout.size} coordinates; use fewer probes"
        )
    whole = next((space.name for space in layout.spaces if space.blocked), None)
    if whole is not None:
        raise UsageError(
            f"orthonormal probes need subspaces, and weight '{whole}' is trained as a whole; use directions 'fresh', or leave it out "
            "of what is trained"
        )
    columns = [
        torch.cat([key.fold_in("orthonormal", i, s.name).normal(s.shape).flatten() for s in layout.spaces])
        for i in range(count)
    ]
    with one_thread():
        q, upper = torch.linalg.qr(torch.stack(columns, dim=1))  # (size, count), (count, count)
    q = q * (
        upper.diagonal().sign() * sqrt(layout.size)
    )  # QR alone is not Haar: fix the signs (Mezzadri 2007)
    directions = []
    for column in q.to(layout.device).unbind(1):
        pieces = column.split([s.size for s in layout.spaces])
        directions.append(
            Combination({s.name: p.view(s.shape) for s, p in zip(layout.spaces, pieces, strict=True)})
        )
    return directions
