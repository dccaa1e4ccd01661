"""Aside: old bytes of what a step overwrites, kept where no tensor lives, until the step is sure.

A step that ends early goes back to them bit for bit. Those of tensors on the host go into a temporary file without a name,
whose pages the system writes out where memory is short; those of tensors on a card into pinned host memory that is used
again by every step, by copies in the order of the card's own work, which the host does not wait for.
"""

import ctypes
import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

CHUNK = 1 << 28  # bytes of pinned memory taken at once, at most, but for one larger tensor
FIRST_CHUNK = 1 << 20
SMALL = 1 << 16  # bytes of a tensor of a card that travels together with others
ALIGNED = 64
AT_ONCE = 1 << 30  # bytes; no system writes much more in one call


@dataclass(frozen=True)
class Place:
    """Where the bytes of one tensor are, and how it looked."""

    start: int
    chunk: int  # of pinned memory; -1 for the file
    size: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Aside:
    """The old bytes of one step at a time.

    Attributes:
        open: a step goes on.
        failed: why something of this step could not be kept; empty where all of it was.
    """

    def __init__(self) -> None:
        self.open = False
        self.failed = ""
        self._file, self._owner = -1, 0
        self._end = 0  # of what is in the file
        self._chunks: list[Tensor] = []  # pinned
        self._used: list[int] = []  # bytes of each

    def __deepcopy__(self, memo: Any) -> "Aside":
        return Aside()  # a file has one owner

    def begin(self) -> None:
        """A step begins; what was kept for the one before is forgotten."""
        self.open, self.failed = True, ""
        self._end, self._used = 0, [0] * len(self._chunks)

    def end(self) -> None:
        """The step is sure, or undone."""
        self.open = False

    @torch.no_grad()
    def put(self, tensors: Sequence[Tensor]) -> list[Place]:
        """Keep the bytes of tensors as they are now.

        Raises:
            OSError: the file cannot take them.
            RuntimeError: there is no pinned memory for them.
        """
        with unseen():
            places: list[Place | None] = [None] * len(tensors)
            small: dict[torch.device, list[int]] = {}
            for i, tensor in enumerate(tensors):
                flat = _bytes(tensor)
                if tensor.is_cuda and flat.numel() <= SMALL:
                    small.setdefault(tensor.device, []).append(i)
                elif tensor.is_cuda:
                    places[i] = self._place(tensor, *self._pinned(flat), flat.numel())
                else:
                    places[i] = self._place(
                        tensor,
                        self._written(flat if flat.device.type == "cpu" else flat.cpu()),
                        -1,
                        flat.numel(),
                    )
            for numbers in small.values():  # one launch and one copy for all
                flats = [_padded(_bytes(tensors[i])) for i in numbers]
                start, chunk = self._pinned(torch.cat(flats))
                for i, flat in zip(numbers, flats, strict=True):
                    places[i] = self._place(tensors[i], start, chunk, _bytes(tensors[i]).numel())
                    start += flat.numel()
        return [place for place in places if place is not None]

    @torch.no_grad()
    def into(self, place: Place, tensor: Tensor) -> None:
        """Give a tensor of the same shape and type the kept bytes."""
        with unseen():
            if tensor.stride() == place.stride and tensor.device == place.device:
                self._read(place, _bytes(tensor, own=True))
            else:
                tensor.copy_(self.fresh(place))

    @torch.no_grad()
    def fresh(self, place: Place) -> Tensor:
        """The kept tensor, made anew."""
        with unseen():
            new = torch.empty_strided(place.shape, place.stride, dtype=place.dtype, device=place.device)
            self._read(place, _bytes(new, own=True))
        return new

    @staticmethod
    def _place(tensor: Tensor, start: int, chunk: int, size: int) -> Place:
        dense = _dense(tensor)
        stride = tensor.stride() if dense is not None else torch.empty(tensor.shape, device="meta").stride()
        return Place(start, chunk, size, tuple(tensor.shape), stride, tensor.dtype, tensor.device)

    def _written(self, flat: Tensor) -> int:
        """Write host bytes into the file; where they begin."""
        if self._owner != os.getpid():  # a forked process must not write into its parent's
            self._file, self._owner = _nameless(self), os.getpid()
        start, view = self._end, _memory(flat)
        self._end += -(-len(view) // ALIGNED) * ALIGNED
        done = 0
        while done < len(view):
            done += os.pwrite(self._file, view[done : done + AT_ONCE], start + done)
        return start

    def _pinned(self, flat: Tensor) -> tuple[int, int]:
        """Copy bytes of a card; where they begin, and in which chunk."""
        size = -(-flat.numel() // ALIGNED) * ALIGNED
        for chunk, used in enumerate(self._used):
            if used + size <= self._chunks[chunk].numel():
                break
        else:
            chunk, last = len(self._chunks), self._chunks[-1].numel() if self._chunks else FIRST_CHUNK // 2
            self._chunks.append(
                torch.empty(max(size, min(2 * last, CHUNK)), dtype=torch.uint8, pin_memory=True)
            )
            self._used.append(0)
        start = self._used[chunk]
        self._used[chunk] += size
        self._chunks[chunk][start : start + flat.numel()].copy_(flat, non_blocking=True)
        return start, chunk

    def _read(self, place: Place, flat: Tensor) -> None:
        if place.chunk >= 0:
            torch.cuda.current_stream(place.device).synchronize()  # the bytes may still be on their way
            flat.copy_(self._chunks[place.chunk][place.start : place.start + place.size])
            return
        host = flat if flat.device.type == "cpu" else torch.empty(place.size, dtype=torch.uint8)
        view, done = _memory(host), 0
        while done < len(view):
            got = os.preadv(self._file, [view[done : done + AT_ONCE]], place.start + done)
            if not got:
                raise OSError(5, "the temporary file of a step was cut short")
            done += got
        if host is not flat:
            flat.copy_(host)


def unseen() -> AbstractContextManager[Any]:
    """Nothing done inside is seen by who counts the tensors of a step."""
    return _disable_current_modes()


def kept(aside: Aside, state: Any) -> Any:
    """A state of mappings, lists, tensors and plain values with a `Place` for every tensor."""
    tensors: list[Tensor] = []
    shape = _gathered(state, tensors)
    return _filled(shape, aside.put(tensors))


def _gathered(state: Any, tensors: list[Tensor]) -> Any:
    """The state with a number for every tensor; a closure that calls itself would keep them until garbage is collected."""
    if isinstance(state, Tensor):
        tensors.append(state)
        return _Number(len(tensors) - 1)
    if isinstance(state, Mapping):
        return {name: _gathered(value, tensors) for name, value in state.items()}
    return list(state) if isinstance(state, list) else state


def fresh(aside: Aside, state: Any, alive: Any = None) -> Any:
    """The state that `kept` was given; in the tensors of `alive` where they look alike."""
    if isinstance(state, Place):
        if isinstance(alive, Tensor) and _alike(state, alive):
            aside.into(state, alive)
            return alive
        return aside.fresh(state)
    if isinstance(state, Mapping):
        there = alive if isinstance(alive, Mapping) else {}
        return {name: fresh(aside, value, there.get(name)) for name, value in state.items()}
    return list(state) if isinstance(state, list) else state


@dataclass(frozen=True)
class _Number:
    index: int


def _filled(state: Any, places: Sequence[Place]) -> Any:
    if isinstance(state, _Number):
        return places[state.index]
    return {name: _filled(v, places) for name, v in state.items()} if isinstance(state, Mapping) else state


def _alike(place: Place, tensor: Tensor) -> bool:
    return (place.shape, place.stride, place.dtype, place.device) == (
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.device,
    )


def _dense(tensor: Tensor) -> Tensor | None:
    """The tensor with its entries in the order of memory; None where they do not fill it."""
    data = tensor.detach()
    if data.is_contiguous():
        return data
    order = sorted(range(data.dim()), key=lambda axis: -data.stride(axis))
    data = data.permute(order)
    return data if data.is_contiguous() else None


def _bytes(tensor: Tensor, own: bool = False) -> Tensor:
    """Its bytes in the order of memory, or row by row where they do not fill it.

    Args:
        own: they are to be written; a tensor that does not fill its memory has none that are.
    """
    data = _dense(tensor)
    if data is None:
        assert not own
        data = tensor.detach().contiguous()
    return data.reshape(-1).view(torch.uint8)


def _memory(flat: Tensor) -> memoryview:
    """The bytes of a host tensor, which has to outlive this."""
    if not flat.numel():
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * flat.numel()).from_address(flat.data_ptr())).cast("B")


def _padded(flat: Tensor) -> Tensor:
    return torch.nn.functional.pad(flat, (0, -flat.numel() % ALIGNED))


def _nameless(owner: Aside) -> int:
    """A temporary file that nobody else can open and that is gone with its owner."""
    number, path = tempfile.mkstemp(prefix="zolr-")
    os.unlink(path)
    weakref.finalize(owner, _closed, number, os.getpid())
    return number


def _closed(number: int, process: int) -> None:
    if os.getpid() == process:
        os.close(number)
