"""Aside: old bytes of what a step overwrites, kept where no tensor lives, until the step is sure.

A step that ends early goes back to them bit for bit. Those of tensors on the host go into a temporary file without a name,
whose pages the system writes out where memory is short; those of tensors on a card into pinned host memory that is used
again by every step, by copies in the order of the card's own work, which the host does not wait for. Steps overwrite the
same tensors again and again, so where what is to be kept looks as it did in the step before, it goes the same way.
"""

import ctypes
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

CHUNK = 1 << 28  # bytes of pinned memory taken at once, at most, but for one larger tensor
FIRST_CHUNK = 1 << 20
SMALL = 1 << 20  # bytes of a tensor of a card that travels together with others
TOGETHER = 1 << 24  # bytes that travel together, of which the card holds a copy for as long as that takes
ALIGNED = 64
AT_ONCE = 1 << 30  # bytes; no system writes much more in one call
BUFFERS = 1000  # of one call; systems allow 1024


class Place(NamedTuple):
    """Where the bytes of one tensor are, and how it looked."""

    start: int
    chunk: int  # of pinned memory; -1 for the file
    size: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


# what decides where the bytes of a tensor are, and how many: address, shape, stride, type and device
_Look = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]


@dataclass
class _Way:
    """How the tensors of one call are kept: found once, and gone again for tensors that look the same."""

    looks: list[_Look]
    begins: tuple[int, ...]  # where the file and the chunks were filled to
    ends: tuple[int, ...]
    places: list[Place]
    host: list[memoryview] = field(default_factory=list)  # into the file, one after the other
    # into pinned memory: numbers of tensors, whose bytes follow each other, and where
    device: list[tuple[list[int], Tensor]] = field(default_factory=list)


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
        self._ways: list[_Way] = []  # of the calls of a step, in their order
        self._calls = 0

    def __deepcopy__(self, memo: Any) -> "Aside":
        return Aside()  # a file has one owner

    def begin(self) -> None:
        """A step begins; what was kept for the one before is forgotten."""
        self.open, self.failed = True, ""
        self._end, self._used, self._calls = 0, [0] * len(self._chunks), 0

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
            whole = [tensor if _is_as_kept(tensor) else _as_kept(tensor) for tensor in tensors]
            looks: list[_Look] = [
                (own.data_ptr(), own.shape, own.stride(), own.dtype, tensor.device)
                for own, tensor in zip(whole, tensors, strict=True)
            ]
            number, self._calls = self._calls, self._calls + 1
            known = self._ways[number] if number < len(self._ways) else None
            if known is not None and known.looks == looks and known.begins == self._filled:
                way = known
                self._end, self._used = way.ends[0], [*way.ends[1:]]
            else:
                way = self._way(whole, looks)
                self._ways[number : number + 1] = [way]
            self._write(way.host, way.begins[0])
            for numbers, to in way.device:
                flats = [_flat(whole[i]) for i in numbers]
                from_ = flats[0] if len(flats) == 1 else torch.cat(flats)
                to.copy_(from_.view(torch.uint8), non_blocking=True)
        return way.places

    @torch.no_grad()
    def into(self, place: Place, tensor: Tensor) -> None:
        """Give a tensor of the same shape and type the kept bytes."""
        with unseen():
            if tensor.stride() == place.stride and tensor.device == place.device:
                self._read(place, _flat(tensor).view(torch.uint8))
            else:
                tensor.copy_(self.fresh(place))

    @torch.no_grad()
    def fresh(self, place: Place) -> Tensor:
        """The kept tensor, made anew."""
        with unseen():
            new = torch.empty_strided(place.shape, place.stride, dtype=place.dtype, device=place.device)
            self._read(place, _flat(new).view(torch.uint8))
        return new

    @property
    def _filled(self) -> tuple[int, ...]:
        return self._end, *self._used

    def _way(self, tensors: Sequence[Tensor], looks: list[_Look]) -> _Way:
        """Where the tensors of a call go."""
        begins, places = self._filled, dict[int, Place]()
        host: list[memoryview] = []
        together: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        filled: dict[tuple[torch.device, torch.dtype], int] = {}  # bytes of these groups
        device: list[tuple[list[int], Tensor]] = []

        def pinned(numbers: list[int]) -> None:
            sizes = [tensors[i].nbytes for i in numbers]
            start, chunk = self._room(sum(sizes))
            device.append((numbers, self._chunks[chunk][start : start + sum(sizes)]))
            for i, size in zip(numbers, sizes, strict=True):
                places[i] = Place(start, chunk, size, *looks[i][1:])
                start += size

        for i, (tensor, look) in enumerate(zip(tensors, looks, strict=True)):
            size = tensor.nbytes
            if not _is_on_card(tensor):
                places[i] = Place(self._end, -1, size, *look[1:])
                host.append(_memory(tensor))
                self._end += size
            elif size > SMALL:
                pinned([i])
            else:
                kind = look[4], look[3]
                if filled.get(kind, 0) + size > TOGETHER and kind in together:
                    pinned(together.pop(kind))
                    filled[kind] = 0
                together.setdefault(kind, []).append(i)
                filled[kind] = filled.get(kind, 0) + size
        for group in together.values():
            pinned(group)
        return _Way(looks, begins, self._filled, [places[i] for i in range(len(tensors))], host, device)

    def _write(self, views: Sequence[memoryview], start: int) -> None:
        """Write host bytes into the file, one after the other."""
        if not views:
            return
        if self._owner != os.getpid():  # a forked process must not write into its parent's
            self._file, self._owner = _nameless(self), os.getpid()
        for some in _at_once(views):
            left = sum(map(len, some))
            while left:
                done = os.pwritev(self._file, some, start)
                start, left = start + done, left - done
                some = _after(some, done) if left else some

    def _room(self, size: int) -> tuple[int, int]:
        """Pinned memory for so many bytes: where it begins, and in which chunk."""
        size = -(-size // ALIGNED) * ALIGNED
        for chunk, used in enumerate(self._used):
            if used + size <= self._chunks[chunk].numel():
                break
        else:
            chunk, last = len(self._chunks), self._chunks[-1].numel() if self._chunks else FIRST_CHUNK // 2
            self._chunks.append(_pinned(max(size, min(2 * last, CHUNK))))
            self._used.append(0)
        start = self._used[chunk]
        self._used[chunk] += size
        return start, chunk

    def _read(self, place: Place, flat: Tensor) -> None:
        if place.chunk >= 0:
            _wait_for(place.device)  # the bytes may still be on their way
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


class Number(int):
    """The place of a tensor in a list of them."""


class Scalar(NamedTuple):
    """A tensor of one number on the host, as optimizers count their steps in."""

    value: int | float | bool
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """The tensor, made anew."""
        return torch.tensor(self.value, dtype=self.dtype)


def gathered(state: Any, tensors: list[Tensor], first: int = 0) -> Any:
    """A state of mappings, lists, tensors and plain values without its tensors, which are added to a list.

    Args:
        first: number of the first tensor of the list.

    Returns:
        The state with a `Number` for every tensor, or the `Scalar` that it is.
    """
    if type(state) is dict:  # the usual case, and thousands of them a step
        found: dict[Any, Any] = {}
        for name, value in state.items():
            if type(value) is Tensor and value.dim():
                found[name] = Number(first + len(tensors))
                tensors.append(value)
            else:
                found[name] = gathered(value, tensors, first)
        return found
    if isinstance(state, Tensor):
        if not state.dim() and state.dtype in EXACT and state.device.type == "cpu" and type(state) is Tensor:
            return Scalar(state.item(), state.dtype)
        tensors.append(state)
        return Number(first + len(tensors) - 1)
    if isinstance(state, Mapping):
        return {name: gathered(value, tensors, first) for name, value in state.items()}
    return list(state) if isinstance(state, list) else state


# whose numbers python holds bit for bit
EXACT = (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool)


def fresh(aside: Aside, places: Sequence[Place], state: Any, alive: Any = None) -> Any:
    """The state that `gathered` was given; in the tensors of `alive` where they look alike."""
    if isinstance(state, Number):
        place = places[state]
        if isinstance(alive, Tensor) and _alike(place, alive):
            aside.into(place, alive)
            return alive
        return aside.fresh(place)
    if isinstance(state, Scalar):
        return state.tensor()
    if isinstance(state, Mapping):
        there = alive if isinstance(alive, Mapping) else {}
        return {name: fresh(aside, places, value, there.get(name)) for name, value in state.items()}
    return list(state) if isinstance(state, list) else state


def _alike(place: Place, tensor: Tensor) -> bool:
    return place[3:] == (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def _dense(tensor: Tensor) -> Tensor | None:
    """The tensor with its entries in the order of memory; None where they do not fill it."""
    data = tensor.detach()
    if data.is_contiguous():
        return data
    order = sorted(range(data.dim()), key=lambda axis: -data.stride(axis))
    data = data.permute(order)
    return data if data.is_contiguous() else None


def _is_as_kept(tensor: Tensor) -> bool:
    """Whether its bytes can be kept where they are."""
    if not (_is_on_card(tensor) or tensor.device.type == "cpu"):
        return False
    return tensor.is_contiguous() or _dense(tensor) is not None


def _as_kept(tensor: Tensor) -> Tensor:
    data = tensor.detach()
    return (data if _is_on_card(data) else data.cpu()).contiguous()


def _flat(tensor: Tensor) -> Tensor:
    """Its entries in the order of memory, which they fill."""
    data = _dense(tensor)
    assert data is not None
    return data.view(-1)


def _is_on_card(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _wait_for(device: torch.device) -> None:
    torch.cuda.current_stream(device).synchronize()


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a host tensor that fills its memory, which has to outlive this."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _at_once(views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The views in parts that a system writes in one call."""
    some, size = list[memoryview](), 0
    for view in views:
        if some and (len(some) == BUFFERS or size + len(view) > AT_ONCE):
            yield some
            some, size = [], 0
        some.append(view)
        size += len(view)
    yield some


def _after(views: Sequence[memoryview], done: int) -> list[memoryview]:
    """The views without what has been written of them."""
    left = list[memoryview]()
    for view in views:
        if done < len(view):
            left.append(view[done:])
        done = max(0, done - len(view))
    return left


def _nameless(owner: Aside) -> int:
    """A temporary file that nobody else can open and that is gone with its owner."""
    number, path = tempfile.mkstemp(prefix="zolr-")
    os.unlink(path)
    weakref.finalize(owner, _closed, number, os.getpid())
    return number


def _closed(number: int, process: int) -> None:
    if os.getpid() == process:
        os.close(number)
