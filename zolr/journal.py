"""The journal of a run without backprop: what every step was made from, in lines that can be made into the weights again.

A step is a few numbers (its slopes) along directions that have names, so a journal and the base model are a checkpoint:
`replay` makes the steps again without loss or data. The file is text, one line a step, written ahead of the update:

    zolr-journal 1 {"seed": 0, ...} 5b1c8f0e             what the steps are steps of
    1 + {"bases": "9f86d081884c7d65"} 0a63d1b2           what was chosen before step 1, where anything was
    1 H4sIAAAAAAAAAAAAAAAAAAAAAAAAAAAA 81d1c7e3            step 1: loss, rate and slopes, float64 in base64
    2 ! H4sIAAAAAAAAAAAAAAAAAAAAAAAAAAAA 7b0e12aa          step 2 was skipped
    2 = 6b86b273ff34fce19d6b804eff5a3f57... 1c2d3e4f       hash of weights and state after step 2, at a checkpoint

Every line ends in a checksum of itself and of the one before, so that no line can be changed, left out or moved. A last
line that a kill has torn is dropped; any other damage is refused by its number.
"""

import base64
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from zolr import checkpoints
from zolr.engine import Engine, Made
from zolr.errors import DataError, StorageError, UsageError
from zolr.held import opened

NAME = "journal"
MAGIC, FORMAT = "zolr-journal", 1
LARGEST = 1 << 32  # bytes; a hundred million steps

_SAMPLE = 4096  # entries of a weight that its fingerprint looks at


@dataclass(frozen=True)
class Read:
    """A journal that was read and verified.

    Args:
        header: what the steps are steps of.
        made: the steps, the first one at index 0.
        hashes: of weights and state, by step.
        ends: byte after the lines of each number of steps, the header at index 0.
        checksum: of the last line of each number of steps.
        torn: whether a last line was dropped.
    """

    header: dict[str, Any]
    made: tuple[Made, ...]
    hashes: dict[int, str]
    ends: tuple[int, ...]
    checksums: tuple[int, ...]
    torn: bool

    @property
    def steps(self) -> int:
        """How many steps it holds."""
        return len(self.made)


class Journal:
    """A journal that is being written; every line is with the operating system before the step goes on.

    That outlives a killed process. What a dead machine loses is bounded by `sync`, called at checkpoints.

    Args:
        path: the file.
        header: what the steps are steps of; of a file that is gone on with the one it has stands.
        kept: steps of the file that stay, with what `read` said of it; None begins a new file.

    Raises:
        StorageError: it cannot be written.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], kept: tuple[Read, int] | None = None) -> None:
        self.path, self.header, self.steps, self._checksum = path, header, 0, 0
        with self._plainly():
            if kept is None:
                self._file: IO[bytes] = open(path, "wb", buffering=0)
                self._write(f"{MAGIC} {FORMAT} {json.dumps(header, sort_keys=True)}")
            else:
                found, self.steps = kept
                self._file = open(path, "r+b", buffering=0)
                self._file.truncate(found.ends[self.steps])
                self._file.seek(0, os.SEEK_END)
                self._checksum = found.checksums[self.steps]

    def append(self, made: Made) -> None:
        """Write down a step that is about to be applied."""
        self.steps += 1
        before = _chosen(made)
        lines = [] if not before else [f"{self.steps} + {json.dumps(before, sort_keys=True)}"]
        with self._plainly():
            self._write(*lines, _step_line(self.steps, made))

    def mark(self, digest: str) -> None:
        """Write down the hash of weights and state as they are after the last step."""
        with self._plainly():
            self._write(f"{self.steps} = {digest}")

    def sync(self) -> None:
        """Flush it to the disk."""
        with self._plainly():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing more is written."""
        self._file.close()

    def _write(self, *bodies: str) -> None:
        text = b""
        for body in bodies:
            self._checksum = zlib.crc32(body.encode(), self._checksum)
            text += f"{body} {self._checksum:08x}\n".encode()
        done = self._file.write(text)  # one call, so that a kill tears the last line at most
        if done != len(text):
            raise OSError(28, "No space left on device")

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}") from error


def read(path: str | Path) -> Read:
    """Read and verify a journal.

    Raises:
        DataError: it is no journal, or a line of it is damaged; the message has its number.
        StorageError: it cannot be read.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST:
            raise DataError(f"{path} is absurdly large for a journal; give the journal of a run")
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read journal {path}: {error.strerror or error}") from error
    header: dict[str, Any] | None = None
    made: list[Made] = []
    hashes: dict[int, str] = {}
    ends, checksums, checksum, place, before = [0], [0], 0, 0, {}
    lines = data.split(b"\n")
    torn = lines[-1] != b""  # every whole line ends in a newline
    last = len(lines) - 2  # of those that do
    for number, raw in enumerate(lines[:-1]):
        place += len(raw) + 1
        try:
            body, checksum = _verified(raw, checksum)
            if header is None:
                header = _header(body)
            else:
                index, _, rest = body.partition(" ")
                kind, _, content = rest.partition(" ")
                if int(index) != len(made) + (kind != "="):
                    raise ValueError(f"it is of step {index} and comes after step {len(made)}")
                if kind == "+":
                    before = json.loads(content)
                    continue
                if kind == "=":
                    hashes[len(made)] = content
                else:
                    made.append(_made(kind, content, before, header))
                    before = {}
        except DataError:
            raise
        except Exception as error:  # a damaged line fails in its own ways
            if number == last and header is not None:  # a dead machine may leave a last line of zeros
                torn = True
                break
            raise DataError(f"journal {path} is damaged in line {number + 1}: {error}") from error
        del ends[len(made) :], checksums[len(made) :]
        ends.append(place)
        checksums.append(checksum)
    if header is None:
        raise DataError(f"{path} is no journal: its first line does not say so; give the journal of a run")
    return Read(header, tuple(made), hashes, tuple(ends), tuple(checksums), torn or bool(before))


def replay(
    engine: Engine, found: Read, to: int | None = None, stepped: Callable[[int], None] | None = None
) -> int:
    """Make the steps of a journal again on an engine that has made none, and check every hash on the way.

    Args:
        engine: of the base model and the method of the journal, in their first state.
        to: the last step to make; None for all of them.
        stepped: called after each step with its number.

    Returns:
        The hashes of weights and state that were compared.

    Raises:
        UsageError: the journal is of something else, or has no such step.
        StorageError: the weights come out otherwise than those of the run.
    """
    to = found.steps if to is None else to
    if not 0 <= to <= found.steps:
        raise UsageError(f"the journal has steps 1 to {found.steps}, and no step {to}; give one of them")
    if (why := found.header.get("unrepeatable")) is not None:
        raise UsageError(f"this journal cannot be replayed: {why}")
    for name, value in described(engine).items():
        if name in found.header and found.header[name] != value:
            raise UsageError(
                f"the journal is of a run with {name} {found.header[name]}, and this is {value}; give the model and the "
                "settings that the run began with"
            )
    compared = 0
    for number, made in enumerate(found.made[:to], 1):
        engine.again(made)
        if number in found.hashes:
            check(engine, found.hashes[number], number)
            compared += 1
        if stepped is not None:
            stepped(number)
    return compared


def check(engine: Engine, expected: str, step: int) -> None:
    """Compare weights and state with the hash that a run wrote down after a step.

    Raises:
        StorageError: they differ.
    """
    if checkpoints.digest(engine.state_dict()) != expected:
        raise StorageError(
            f"the weights after step {step} are not bit for bit those of the run: another machine class or torch version, "
            "or another base model; replay where the run was made"
        )


def described(engine: Engine) -> dict[str, Any]:
    """What a journal says of the run that it is of, so that no other one is replayed by it: of an engine before its first step."""
    return {
        "seed": engine.seed,
        "method": hashlib.sha256(repr(engine.method).encode()).hexdigest()[:16],
        "base": fingerprint(engine.model),
        "weights": len(engine.variables),
    }


def fingerprint(model: nn.Module) -> str:
    """A short hash of a model's weights: names, shapes, types, and some thousand entries of each.

    It tells models apart, not bits: what was changed in one entry shows in the hashes at checkpoints. Offloaded weights are
    brought back for it, those of one module at a time.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta":
            found.update(_some(tensor))
            continue
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        with opened(module):
            found.update(_some(getattr(module, own)))
    return found.hexdigest()[:16]


def _some(tensor: torch.Tensor) -> bytes:
    """Some thousand entries of a tensor; none where it has no numbers, or they are not plain ones."""
    if tensor.device.type == "meta" or not tensor.numel() or type(tensor) not in (torch.Tensor, nn.Parameter):
        return b""
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _SAMPLE)].cpu().contiguous()
    return some.view(torch.uint8).numpy().tobytes()


def shared(found: Read, header: Mapping[str, Any]) -> bytes:
    """A journal to give away: the steps without their losses, under another header.

    Args:
        header: what shall be said of the run.
    """
    text, checksum = b"", 0
    bodies = [f"{MAGIC} {FORMAT} {json.dumps({**header, 'losses': False}, sort_keys=True)}"]
    for number, made in enumerate(found.made, 1):
        before = _chosen(made)
        bodies += [f"{number} + {json.dumps(before, sort_keys=True)}"] if before else []
        bodies.append(_step_line(number, made, losses=False))
        bodies += [f"{number} = {found.hashes[number]}"] if number in found.hashes else []
    for body in bodies:
        checksum = zlib.crc32(body.encode(), checksum)
        text += f"{body} {checksum:08x}\n".encode()
    return text


def _chosen(made: Made) -> dict[str, Any]:
    """What a step has beside its numbers. Its passes are those of any step, told as 0, unless something was chosen on it."""
    found = {"tuning": made.tuning, "signs": made.signs, "bases": made.bases}
    found = {name: value for name, value in found.items() if value is not None}
    return {**found, "forwards": made.forwards} if made.tuning or made.signs else found


def _step_line(number: int, made: Made, losses: bool = True) -> str:
    numbers = [*([made.loss] if losses else []), made.lr, *made.slopes]
    packed = base64.b64encode(struct.pack(f"<{len(numbers)}d", *numbers)).decode().rstrip("=")
    return f"{number} ! {packed}" if made.skipped else f"{number} {packed}"


def _verified(raw: bytes, before: int) -> tuple[str, int]:
    body, _, claimed = raw.rpartition(b" ")
    checksum = zlib.crc32(body, before)
    if claimed != f"{checksum:08x}".encode():
        raise ValueError("its checksum does not match")
    return body.decode(), checksum


def _header(body: str) -> dict[str, Any]:
    magic, version, content = body.split(" ", 2)
    if magic != MAGIC:
        raise ValueError("it does not begin as a journal does")
    if int(version) != FORMAT:
        raise DataError(
            f"the journal has layout {version}, and this version reads layout {FORMAT}; use the zolr that wrote it"
        )
    header = json.loads(content)
    if not isinstance(header, dict):
        raise ValueError("it holds no settings")
    return header


def _made(kind: str, content: str, before: Mapping[str, Any], header: Mapping[str, Any]) -> Made:
    packed = content if kind == "!" else kind
    raw = base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    numbers = struct.unpack(f"<{len(raw) // 8}d", raw)
    loss = numbers[0] if header.get("losses", True) else float("nan")
    lr, *slopes = numbers[1:] if header.get("losses", True) else numbers
    if not slopes:
        raise ValueError("a step has slopes, and this one has none")
    chosen = {name: before.get(name) for name in ("tuning", "signs", "bases")}
    return Made(loss, lr, tuple(slopes), before.get("forwards", 0), **chosen, skipped=kind == "!")
