"""Models too large for one device: what ranks with a piece of every weight write, and how it becomes a plain model.

`torch.distributed.fsdp.fully_shard` cuts every weight into rows, which come together only inside the forward of the module
that it was called on. Such a weight is held (see `zolr.held`): its coordinates, and the thin factors that closed windows leave,
are whole on every rank, and the weight itself is never written. Here they meet, piece by piece.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zolr.checkpoints import DTYPES, write_text
from zolr.engine import Engine
from zolr.errors import StorageError, UsageError
from zolr.held import is_sharded
from zolr.variables import Variable

SHARDS = "shards.json"


def shard_name(rank: int) -> str:
    """File of one rank."""
    return f"shard-{rank:05d}.safetensors"


@torch.no_grad()
def save(folder: str | Path, engine: Engine) -> Path:
    """Write the trained model, every rank the rows that it has; all ranks call this alike.

    A trained weight is `W + lift(value)` and what closed windows have moved it by, made for the own rows only. Weights that
    are not sharded are written by the first rank. The folder appears under its name when all shards are on the disk.

    Args:
        folder: to create; one that every rank sees.
        engine: attached to a model whose weights `fully_shard` has cut along their first axis, over all ranks.

    Raises:
        UsageError: a weight is cut along another axis or over a part of the ranks.
        StorageError: the folder is there already, or cannot be written.
    """
    from safetensors.torch import save_file

    folder, team = Path(folder), engine.team
    aside = Path(team.told(str(folder.with_name(f".{folder.name}.tmp-{os.getpid()}"))))
    if team.largest(folder.exists()):
        raise StorageError(f"cannot save a sharded model in {folder}: it exists; choose another folder")
    trained = {site.name: variable for variable in engine.variables for site in variable.sites}
    tensors: dict[str, Tensor] = {}
    layout: dict[str, dict[str, Any]] = {}
    persistent = engine.model.state_dict().keys()  # other buffers are made anew by the model itself
    buffers = [(name, buffer) for name, buffer in engine.model.named_buffers() if name in persistent]
    for name, parameter in (*engine.model.named_parameters(), *buffers):
        first, local = _rows(name, parameter, team)
        if not is_sharded(parameter) and not team.first:
            local = local[:0] if local.dim() else local.new_zeros(0)
        elif name in trained:
            local = _trained(trained[name], local, first)
        tensors[name] = local.to("cpu").contiguous()
        layout[name] = {"shape": list(parameter.shape), "dtype": DTYPES[parameter.dtype]}
    try:
        aside.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside / shard_name(team.rank))
        with open(aside / shard_name(team.rank), "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        write_text(aside / f"{shard_name(team.rank)}.sha256", digest)
        team.wait()
        if team.first:
            files = [shard_name(rank) for rank in range(team.size)]
            digests = {name: (aside / f"{name}.sha256").read_text() for name in files}
            write_text(aside / SHARDS, json.dumps({"format": 1, "files": digests, "tensors": layout}))
            os.rename(aside, folder)
    except OSError as error:
        raise StorageError(f"cannot save a sharded model in {folder}: {error.strerror or error}") from error
    team.wait()
    return folder


def _rows(name: str, parameter: Any, team: Any) -> tuple[int, Tensor]:
    """The rows of a weight that are here, and the number of the first of them."""
    if not is_sharded(parameter):
        return 0, parameter.detach()
    places, mesh = parameter.placements, parameter.device_mesh
    if len(places) != 1 or not places[0].is_shard(dim=0) or mesh.size() != team.size:
        raise UsageError(
            f"weight '{name}' is cut as {places} over {mesh.size()} of {team.size} ranks; use fully_shard over all ranks, along "
            "the first axis"
        )
    local = parameter.detach().to_local()
    chunk = -(-parameter.shape[0] // team.size)  # as torch.chunk cuts
    return min(team.rank * chunk, parameter.shape[0]), local


def _trained(variable: Variable, local: Tensor, first: int) -> Tensor:
    """The rows of a weight with what training has moved them by."""
    rows = slice(first, first + local.shape[0])
    if not variable.held:
        dense = variable.dense(variable.point())
        return (variable.weight if dense is None else dense).detach()[rows]
    if variable.stack is None:
        value = variable.value.detach()
        return (value.t() if variable.transposed else value)[rows].to(local.dtype)
    left, right = variable.moved_by()
    if variable.transposed:
        left, right = right, left
    return (local.to(left.dtype) + left[rows] @ right.mT).to(local.dtype)


def consolidate(folder: str | Path, target: str | Path) -> Path:
    """Make one plain safetensors file of the shards of a model; one process, the memory of one piece of a weight.

    Args:
        folder: that `save` has written.
        target: file to write, such as `model.safetensors`.

    Raises:
        StorageError: a shard is missing or damaged, or the file cannot be written.
    """
    from safetensors import safe_open

    folder, target = Path(folder), Path(target)
    try:
        manifest = json.loads((folder / SHARDS).read_text())
        for name, digest in manifest["files"].items():
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise StorageError(f"{folder / name} is damaged: it does not match its hash; save again")
        free = shutil.disk_usage(target.absolute().parent).free
        if (need := sum((folder / name).stat().st_size for name in manifest["files"])) > free:
            raise StorageError(
                f"{target} needs {need / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free; make room"
            )
        shards = [safe_open(folder / name, framework="pt") for name in manifest["files"]]
        aside = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        with open(aside, "wb") as out:
            for part in _plain(manifest["tensors"], shards):
                out.write(part)
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, target)
    except StorageError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(f"cannot put the shards in {folder} together: {error}") from error
    return target


def _plain(tensors: dict[str, dict[str, Any]], shards: list[Any]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: rows of a matrix lie one after the other, and so do the pieces."""
    width = {kind: torch.empty(0, dtype=dtype).element_size() for dtype, kind in DTYPES.items()}
    order = sorted(tensors, key=lambda name: -width[tensors[name]["dtype"]])  # every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape, kind = tensors[name]["shape"], tensors[name]["dtype"]
        start, end = end, end + torch.Size(shape).numel() * width[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        for shard in shards:
            piece = shard.get_tensor(name)
            if piece.numel():
                yield piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
