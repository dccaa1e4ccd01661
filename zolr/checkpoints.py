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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zolr.errors import StorageError

State = Mapping[str, Any]

FORMAT = 1
KEEP = 2  # newest checkpoints that stay: one to use, one to fall back to

_TENSORS, _MANIFEST = "tensors.safetensors", "manifest.json"
_STEP = re.compile(r"step-(\d+)")

# names of the safetensors format, https://github.com/huggingface/safetensors#format
_DTYPES = {
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


def save(folder: str | Path, state: State) -> Path:
    """Write `state` as the checkpoint `folder`: aside first, flushed to the disk, then renamed.

    Tensors are written one after the other, so that saving needs the memory of one tensor at most. A folder of the same
    name is replaced.

    Args:
        folder: the folder to create, by convention `RUN/checkpoints/step-N`.
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.

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
        manifest = {"format": FORMAT, "files": {_TENSORS: {"sha256": digest, "bytes": size}}, "tree": tree}
        write_text(aside / _MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}))
        _sync_folder(aside)
        replaced = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        if folder.exists():
            os.rename(folder, replaced)
        os.rename(aside, folder)
        _sync_folder(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StorageError(f"cannot save checkpoint {folder}: {_cause(error, folder, need)}") from error
    return folder


def load(folder: str | Path) -> dict[str, Any]:
    """Read and verify the checkpoint `folder`; tensors come back on the host, in the dtype they were saved in.

    Raises:
        StorageError: it is missing, incomplete or damaged; the message says which part.
    """
    from safetensors import safe_open

    folder = Path(folder)
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        claimed = manifest.pop("sha256")
        if manifest["format"] != FORMAT:
            raise StorageError(
                f"checkpoint {folder} has format {manifest['format']}, this version reads {FORMAT}"
            )
        if claimed != _digest(manifest):
            raise StorageError(f"checkpoint {folder} is damaged: {_MANIFEST} does not match its hash")
        path = folder / _TENSORS
        if _file_digest(path) != manifest["files"][_TENSORS]["sha256"]:
            raise StorageError(f"checkpoint {folder} is damaged: {_TENSORS} does not match its hash")
        with safe_open(path, framework="pt") as file:
            # copies, because the file's own memory is not aligned as torch aligns its tensors, and rounding depends on that
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        return _decode(manifest["tree"], tensors)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read checkpoint {folder}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file fails in the reader's own ways
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


def prune(root: str | Path, keep: int = KEEP) -> None:
    """Remove all but the `keep` newest checkpoints under `root`, and what a killed save left behind."""
    root = Path(root)
    for _, folder in _steps(root)[keep:]:
        shutil.rmtree(folder, ignore_errors=True)
    for left in (*root.glob(".*.tmp-*"), *root.glob(".*.old-*")):
        shutil.rmtree(left, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file and flush it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _steps(root: str | Path) -> list[tuple[int, Path]]:
    """The `step-N` folders under `root`, newest first."""
    root = Path(root)
    found = [
        (int(m[1]), p) for p in (root.iterdir() if root.is_dir() else ()) if (m := _STEP.fullmatch(p.name))
    ]
    return sorted(found, reverse=True)


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """`value` as JSON; tensors are moved to `tensors` and leave their name behind."""
    if isinstance(value, Tensor):
        if value.dtype not in _DTYPES:
            raise StorageError(f"{where} has dtype {value.dtype}, which a checkpoint cannot hold")
        name = str(len(tensors))
        tensors[name] = value.detach()
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
        items = [[_encode(k, tensors, where), _encode(v, tensors, f"{where}.{k}")] for k, v in value.items()]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]
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
        return (
            tensors[name]
            if stride is None
            else torch.empty_strided(tensors[name].shape, stride, dtype=tensors[name].dtype).copy_(
                tensors[name]
            )
        )
    if kind == "float":
        return float.fromhex(content)
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    items = [_decode(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> tuple[str, int]:
    """Write a safetensors file tensor by tensor; its sha256 and size.

    safetensors' own writer copies every tensor to the host before it writes the first.
    """
    tensors = dict(
        sorted(tensors.items(), key=lambda item: -item[1].element_size())
    )  # keeps every tensor aligned
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in _parts(struct.pack("<Q", len(text)) + text, tensors):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), 8 + len(text) + end


def _parts(head: bytes, tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield head
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


def _cause(error: OSError, folder: Path, need: int) -> str:
    cause = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cause += f" ({need / 2**20:.0f} MiB needed); free some space and go on with --resume"
    return f"{cause} ({error.filename})" if error.filename else cause
