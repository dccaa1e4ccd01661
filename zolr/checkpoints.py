"""Checkpoints: a nested dict of tensors, numbers and strings, saved so that no moment exists at which a kill loses it.

A checkpoint is a folder with `tensors.safetensors` and `manifest.json`. It is written under another name, flushed to the disk and
renamed, so a folder called `step-N` is complete; the hashes of the manifest then tell damage that came later. Nothing is pickled.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zolr
from zolr.errors import StorageError

State = Mapping[str, Any]

FORMAT = 1  # of the layout of folder and manifest; a reader refuses any other, by name
KEEP = 2  # newest checkpoints that stay: one to use, one to fall back to
LARGEST_MANIFEST = 1 << 28  # bytes; a million tensors need half of it, and what is larger is not ours

_TENSORS, _MANIFEST = "tensors.safetensors", "manifest.json"
_STEP = re.compile(r"step-(\d{1,18})", re.ASCII)

# names of the safetensors format, https://github.com/huggingface/safetensors#format
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read and verified.

    Args:
        step: the N of its folder `step-N`.
        state: what was given to `save`.
        damaged: one line for every newer checkpoint that had to be passed over, newest first.
    """

    step: int
    state: dict[str, Any]
    damaged: tuple[str, ...]


def save(folder: str | Path, state: State, hashed: Callable[[str], None] | None = None) -> Path:
    """Write `state` as the checkpoint `folder`: aside first, flushed to the disk, then renamed.

    Tensors are written one after the other, so that saving needs the memory of one tensor at most. A folder of the same
    name is replaced.

    Args:
        folder: the folder to create, by convention `RUN/checkpoints/step-N`.
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.
        hashed: told what `digest_of` will say, before the folder has its name.

    Raises:
        StorageError: the folder cannot be written, or `state` holds something else.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, tensors, "state")
    need = sum(t.numel() * t.element_size() for t in tensors.values())
    aside = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        digest, size = _write_tensors(aside / _TENSORS, tensors)
        files = {_TENSORS: {"sha256": digest, "bytes": size}}
        manifest = {"format": FORMAT, "zolr": zolr.__version__, "files": files, "tree": tree}
        write_text(aside / _MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}))
        _sync_folder(aside)
        if hashed is not None:
            hashed(digest)
        replaced = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        if folder.exists():
            os.rename(folder, replaced)
        os.rename(aside, folder)
        _sync_folder(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"cannot save checkpoint {folder}: {_cause(error, need)}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # renamed by now, unless something went wrong
    return folder


def digest_of(folder: str | Path) -> str:
    """The hash of a checkpoint's tensors, as its manifest states it.

    Raises:
        StorageError: it cannot be read, or is damaged.
    """
    return _manifest(Path(folder))["files"][_TENSORS]["sha256"]


def digest(state: State) -> str:
    """What `digest_of` would say of `state`, which is not written."""
    tensors: dict[str, Tensor] = {}
    _encode(state, tensors, "state")
    found = hashlib.sha256()
    for part in _file(tensors):
        found.update(part)
    return found.hexdigest()


def not_finite(state: State) -> str | None:
    """Where the first number that is NaN or infinite is among the tensors of `state`; None where all are finite."""
    tensors: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    _encode(state, tensors, "state", places)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return places[name].removeprefix("state.")
    return None


def load(folder: str | Path) -> dict[str, Any]:
    """Read and verify the checkpoint `folder`; tensors come back on the host, in the dtype they were saved in.

    Raises:
        StorageError: it is missing, incomplete or damaged, or of another version; the message says which part.
    """
    from safetensors import safe_open

    folder = Path(folder)
    try:
        manifest = _manifest(folder)
        path = folder / _TENSORS
        if _file_digest(path) != manifest["files"][_TENSORS]["sha256"]:
            raise StorageError(f"checkpoint {folder} is damaged: {_TENSORS} does not match its hash")
        with safe_open(path, framework="pt") as file:
            # copies, because the file's own memory is not aligned as torch aligns its tensors, and rounding depends on that
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        state = _decode(manifest["tree"], tensors)
        if not isinstance(state, dict):
            raise TypeError(f"a checkpoint holds a dict, not a {type(state).__name__}")
        return state
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read checkpoint {folder}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file fails in the reader's own ways
        raise StorageError(f"checkpoint {folder} is damaged: {type(error).__name__}: {error}") from error


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, whose own hash is right and whose layout is that of this version."""
    path = folder / _MANIFEST
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise StorageError(f"checkpoint {folder} is damaged: {_MANIFEST} is absurdly large")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        claimed = manifest.pop("sha256")
        if claimed != _digest(manifest):
            raise StorageError(f"checkpoint {folder} is damaged: {_MANIFEST} does not match its hash")
        if manifest["format"] != FORMAT:
            raise StorageError(
                f"checkpoint {folder} has layout {manifest['format']} (zolr {manifest.get('zolr', 'unknown')}), and this "
                f"version reads layout {FORMAT}; go on with the version that wrote it"
            )
        return manifest
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read checkpoint {folder}: {error.strerror or error}") from error
    except Exception as error:
        raise StorageError(f"checkpoint {folder} is damaged: {type(error).__name__}: {error}") from error


def newest(root: str | Path) -> Found | None:
    """The newest good checkpoint `step-N` under `root`, or None where there is none at all.

    Raises:
        StorageError: there are checkpoints, and every one of them is damaged.
    """
    damaged: list[str] = []
    for step, folder in _steps(root):
        try:
            return Found(step, load(folder), tuple(damaged))
        except StorageError as error:
            damaged.append(str(error))
    if damaged:
        raise StorageError(
            f"no usable checkpoint under {root}: {'; '.join(damaged)}; start again with --overwrite"
        )
    return None


def found_at(folder: str | Path) -> Found:
    """The checkpoint `step-N` that a path names.

    Raises:
        StorageError: it is none, or is damaged.
    """
    folder = Path(folder)
    match = _STEP.fullmatch(folder.name)
    if match is None:
        raise StorageError(f"{folder} is no checkpoint: its name is not step-N; give RUN/checkpoints/step-N")
    return Found(int(match[1]), load(folder), ())


def prune(root: str | Path, keep: int = KEEP) -> None:
    """Remove all but the `keep` newest checkpoints under `root`, and what a killed save left behind."""
    root = Path(root)
    for _, folder in _steps(root)[keep:]:
        shutil.rmtree(folder, ignore_errors=True)
    for left in (*root.glob(".*.tmp-*"), *root.glob(".*.old-*")):
        shutil.rmtree(left, ignore_errors=True)


def clear(root: str | Path) -> None:
    """Remove all checkpoints under `root` and the best weights, and the folder if nothing else is in it."""
    root = Path(root)
    prune(root, 0)
    for folder in root.glob("best-*"):
        if folder.name.removeprefix("best-").isdecimal():
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # it is not there, or has something in it
        root.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a text file and flush it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _steps(root: str | Path) -> list[tuple[int, Path]]:
    """The `step-N` folders under `root`, newest first."""
    root = Path(root)
    try:
        names = list(root.iterdir()) if root.is_dir() else []
    except OSError as error:
        raise StorageError(f"cannot read checkpoints {root}: {error.strerror or error}") from error
    return sorted(((int(m[1]), p) for p in names if (m := _STEP.fullmatch(p.name))), reverse=True)


def _encode(value: Any, tensors: dict[str, Tensor], where: str, places: dict[str, str] | None = None) -> Any:
    """`value` as JSON; tensors are moved to `tensors` and leave their name behind.

    Args:
        places: receives where each tensor was.
    """
    if isinstance(value, Tensor):
        if value.dtype not in DTYPES:
            raise StorageError(f"{where} has dtype {value.dtype}, which a checkpoint cannot hold")
        name = str(len(tensors))
        tensors[name] = value.detach()
        if places is not None:
            places[name] = where
        # rounding depends on the order in which a kernel walks a tensor, so a transposed one must come back transposed
        permuted = (
            value.dim() > 1
            and not value.is_contiguous()
            and torch.empty_like(value).stride() == value.stride()
        )
        return {"tensor": [name, list(value.stride()) if permuted else None]}
    if isinstance(
        value, Mapping
    ):  # pairs, not a JSON object: keys may be integers, as in torch.optim's states
        items = [
            [_encode(k, tensors, where), _encode(v, tensors, f"{where}.{k}", places)]
            for k, v in value.items()
        ]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, tensors, f"{where}[{i}]", places) for i, v in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if isinstance(value, float):
        return {"float": value.hex()}  # exact, and the only spelling of inf and nan that JSON allows
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise StorageError(
        f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers and strings only"
    )


def _decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        name, stride = content
        return tensors[name] if stride is None else _permuted(tensors[name], stride)
    if kind == "float":
        return float.fromhex(content)
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    items = [_decode(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items


def _permuted(tensor: Tensor, stride: list[int]) -> Tensor:
    """The tensor in memory that is walked in another order; strides that leave gaps or overlap are refused."""
    order = sorted(range(tensor.dim()), key=lambda d: (-stride[d], -tensor.shape[d]))
    expected, size = [0] * tensor.dim(), 1
    for d in reversed(order):
        expected[d], size = size, size * tensor.shape[d]
    if len(stride) != tensor.dim() or any(
        a != b for a, b, n in zip(stride, expected, tensor.shape, strict=True) if n > 1
    ):
        raise ValueError(f"strides {stride} are not those of a permuted tensor {tuple(tensor.shape)}")
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> tuple[str, int]:
    """Write a safetensors file tensor by tensor; its sha256 and size.

    safetensors' own writer copies every tensor to the host before it writes the first.
    """
    found, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for part in _file(tensors):
            found.update(part)
            file.write(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return found.hexdigest(), size


def _file(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, part by part."""
    tensors = dict(
        sorted(tensors.items(), key=lambda item: -item[1].element_size())
    )  # keeps every tensor aligned
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors.values():
        if tensor.numel():
            yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: State) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries, without which a rename may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: OSError, need: int) -> str:
    cause = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cause += f" ({need / 2**20:.0f} MiB needed); free some space and go on with --resume"
    return f"{cause} ({error.filename})" if error.filename else cause
