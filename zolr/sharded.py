"""Models too large for one device: what ranks with a piece of every weight write, and how it becomes a plain model.

`torch.distributed.fsdp.fully_shard` cuts every weight into rows, which come together only inside the forward of the module
that it was called on. Such a weight is held (see `zolr.held`): its coordinates, and the thin factors that closed windows leave,
are whole on every rank, and the weight itself is never written. Here they meet, piece by piece.

`cut` cuts a transformers model, `inside` lets a loss see the weights that no layer holds, `save` and `consolidate` write.
"""

import hashlib
import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zolr.checkpoints import DTYPES, write_text
from zolr.distributed import Team
from zolr.engine import Engine
from zolr.errors import StorageError, UsageError
from zolr.held import is_sharded
from zolr.probes import row_blocks
from zolr.variables import Variable

SHARDS = "shards.json"


def shard_name(rank: int) -> str:
    """File of one rank."""
    return f"shard-{rank:05d}.safetensors"


def cut(
    model: nn.Module, team: Team, device: torch.device | str = "cpu", whole: Sequence[str] = ()
) -> nn.Module:
    """Cut the weights of a transformers model into rows over all ranks, and bring to each rank's device the rows that are its own.

    A layer of the model (what transformers call modules that are not split) comes together in its own forward, everything
    else in that of the model. Tied weights belong to the model.

    Args:
        model: whole, in host memory if it is larger than a device; cut in place.
        team: its ranks; one alone has the model on its device and nothing is cut.
        device: of this rank.
        whole: names of modules that stay whole on every rank, such as a fresh head, whose weights can be written.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if team.size == 1:
        return model.to(device)
    kept = {p for name in whole for p in model.get_submodule(name).parameters()}
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(torch.device(device).type, (team.size,))
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    layers, done = set(getattr(model, "_no_split_modules", None) or ()), [""]
    for name, module in model.named_modules():
        own = list(module.parameters())
        alone = all(uses[id(p)] == 1 and p not in kept for p in own)
        inner = any(name.startswith(f"{outer}.") for outer in done[1:])
        if own and type(module).__name__ in layers and alone and not inner:
            fully_shard(module, mesh=mesh)
            done.append(name)
    fully_shard(model, mesh=mesh, ignored_params=kept or None)
    return model


def inside(function: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
    """`function(model, batch)` in the place of the model's forward, so that the weights of embedding and head are together in it.

    For one that calls parts of the model and never the model itself.
    """

    def called(model: nn.Module, batch: Any) -> Any:
        before = vars(model).get("forward")
        vars(model)["forward"] = lambda: function(model, batch)
        try:
            return model()
        finally:
            del vars(model)["forward"]
            if before is not None:
                vars(model)["forward"] = before

    return called


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
    left, result = left[rows], torch.empty_like(local)
    # in float64 and one rank after the other: the bits do not depend on where the weight was cut
    for some in row_blocks(tuple(local.shape)):
        block = local[some].double()
        for column in range(left.shape[1]):
            block.addcmul_(left[some, column, None].double(), right[:, column].double())
        result[some] = block.to(local.dtype)
    return result


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
