"""Adapters: what held weights were moved by, as a LoRA folder that plain `peft.PeftModel.from_pretrained` loads.

A matrix becomes a pair of factors at scale 1, a bias is stored beside them, and any other module with a trained vector
(a norm) is stored whole. `load` reads such a folder without peft.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zolr.attaching import attach, detach
from zolr.checkpoints import write_text
from zolr.errors import DataError, UsageError
from zolr.held import opened
from zolr.variables import Site, Variable, Variables

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """Name of the model that an adapter belongs to.

    Raises:
        DataError: the adapter cannot be read, or names none.
    """
    name = _config(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise DataError(f"{folder / CONFIG} names no base_model_name_or_path; write the model's name into it")
    return name


def absolute(name: str) -> str:
    """A model's name that holds from every folder: that of a folder as a whole path, others as they are."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def check(model: nn.Module, variables: Sequence[Variable], keep: Sequence[str] = ()) -> None:
    """Refuse, from the first step on, what `write` could not make an adapter of.

    Args:
        model, variables, keep: as for `write`.

    Raises:
        UsageError: a variable outside of `keep` is not held, so its part of the result is in the model; or none of them is
            of a kind of module that a LoRA adapter has a layer for.
    """
    beside = _beside(variables, keep)
    if (written := next((v.name for v in beside if not v.held), None)) is not None:
        raise UsageError(
            f"weight '{written}' is not held, so no adapter can tell what it was moved by; train with hold=True"
        )
    modules, whole = dict(model.named_modules()), _whole(beside)
    paired = any(v.stack is not None and site.kind != "other" for v in beside for site in v.sites)
    if not paired and not any(_is_bias(modules[name], names) for name, names in whole.items()):
        named = f"; '{beside[0].name}' is of a {type(beside[0].sites[0].module).__name__}" if beside else ""
        raise UsageError(
            f"an adapter needs a plain linear map or an embedding, and none is trained{named}; train such weights too "
            "(--train all, select='all'), or leave out --hold, --quantize and --device-map"
        )


@torch.no_grad()
def write(
    folder: Path, model: nn.Module, variables: Sequence[Variable], base: str, keep: Sequence[str] = ()
) -> None:
    """Write what held variables were moved by, up to this moment, as a LoRA adapter in PEFT's format.

    Args:
        folder: where to; it is created.
        model: the model the variables are of, attached or not.
        variables: `Engine.variables`.
        base: folder or hub name of the model's own weights.
        keep: names of modules to store whole, trained or not, such as a head that the base does not have.

    Raises:
        UsageError: as `check`.
    """
    from safetensors.torch import save_file

    check(model, variables, keep)
    folder.mkdir(parents=True, exist_ok=True)
    beside = _beside(variables, keep)
    kept: dict[str, Tensor] = {}  # live weights of variables inside of what is stored whole
    for variable in variables:
        if variable in beside:
            continue
        if variable.stack is not None:
            kept |= {site.name: _moved(variable, site) for site in variable.sites}
        else:
            dense = variable.value.detach() if variable.held else variable.dense(variable.point())
            kept |= {site.name: site.weight if dense is None else dense for site in variable.sites}
    modules = dict(model.named_modules())
    ranks: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    whole: dict[str, dict[str, Tensor]] = {}
    transposed = False
    for variable in beside:
        if variable.stack is None:
            for site in variable.sites:
                value = variable.value.detach()
                whole.setdefault(site.module_name, {})[site.parameter] = value
            continue
        left, right = variable.moved_by()
        for site in variable.sites:
            if site.kind == "other":  # no LoRA layer for it: the module is stored with its weight
                whole.setdefault(site.module_name, {})[site.parameter] = _moved(variable, site)
                continue
            transposed |= site.kind == "conv1d"
            ranks[site.module_name] = max(1, left.shape[1])
            tensors |= _factors(site.module_name, left, right, site.kind == "embedding")
    for name, trained in list(whole.items()):
        module = modules[name]
        if _is_bias(module, trained):
            if name not in ranks:  # peft finds the bias in a LoRA layer alone
                ranks[name] = 1
                loose: Any = module
                out, into = _features(loose)
                tensors |= _factors(name, torch.zeros(out, 1), torch.zeros(into, 1), False)
            tensors[f"{_PREFIX}{name}.base_layer.bias"] = trained["bias"]
            del whole[name]
            continue
        if (
            next(module.children(), None) is not None
        ):  # peft would store all that is below it, LoRA layers too
            tensors |= {f"{_PREFIX}{name}.{key}": tensor for key, tensor in trained.items()}
            del whole[name]
            continue
        with opened(module):
            state = {**module.state_dict(), **trained}
            tensors |= {f"{_PREFIX}{name}.{key}": tensor for key, tensor in state.items()}
    for name in keep:
        with ExitStack() as stack:
            for module in modules[name].modules():  # offloaded ones hold no numbers but in their forward
                stack.enter_context(opened(module))
            state = {f"{name}.{key}": tensor for key, tensor in modules[name].state_dict().items()}
        tensors |= {f"{_PREFIX}{key}": tensor for key, tensor in {**state, **kept}.items() if key in state}
        whole[name] = {}
    rank = max(ranks.values())
    other = {f"^{name}": own for name, own in ranks.items() if own != rank}
    config = {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": absolute(base),
        "revision": None,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(whole) or None,
        "fan_in_fan_out": transposed,
        "bias": "all" if any(key.endswith(".base_layer.bias") for key in tensors) else "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    stored = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    save_file(stored, folder / TENSORS, metadata={"format": "pt"})
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def load(folder: Path, model: nn.Module) -> Variables:
    """Let a model compute with an adapter; `attaching.detach` takes it away again.

    Matrices that are stored whole (a head, an unknown kind of embedding) are written into the model for good.

    Args:
        folder: written by `write`.
        model: the base model, quantized as it was in training.

    Raises:
        DataError: the folder cannot be read, or belongs to another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = _config(folder)
    try:
        stored = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {folder / TENSORS}: {error}") from error
    pairs, whole = _sorted(stored, config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    unknown = sorted((pairs.keys() | whole.keys()) - parameters.keys() - buffers.keys())
    if unknown:
        raise DataError(
            f"the adapter in {folder} is of another model: there is no '{unknown[0]}' in this one"
        )
    # a tied weight may be a pair at one place and whole at another: the pair alone moves it at both
    paired = {id(parameters[name]) for name in pairs.keys() & parameters.keys()}
    whole = {name: tensor for name, tensor in whole.items() if id(parameters.get(name)) not in paired}
    for name in list(whole):
        target = parameters.get(name, buffers.get(name))
        assert target is not None
        if name in buffers or (target.dim() > 1 and target.device.type != "meta"):
            if target.shape != whole[name].shape:
                raise DataError(f"the adapter in {folder} is of another model: '{name}' has another shape")
            target.data.copy_(whole.pop(name))
    wanted = {id(parameters[name]) for name in (pairs.keys() | whole.keys()) & parameters.keys()}
    names = {id(p): name for name, p in reversed(list(parameters.items()))}
    variables = attach(model, lambda _, p: id(p) in wanted, hold=True)
    try:
        for variable in variables:
            own = [n for n in (site.name for site in variable.sites) if n in pairs or n in whole]
            name = own[0] if own else names[id(variable.sites[0].weight)]
            try:
                _fill(variable, pairs.get(name), whole.get(name))
            except RuntimeError as error:
                raise DataError(
                    f"the adapter in {folder} is of another model: '{name}' has another shape"
                ) from error
    except BaseException:
        detach(model)
        raise
    return variables


def _fill(variable: Variable, pair: tuple[Tensor, Tensor] | None, tensor: Tensor | None) -> None:
    if variable.stack is None:
        assert tensor is not None
        variable.value.data.copy_(tensor)
        return
    if pair is None:
        assert tensor is not None
        with opened(variable.sites[0].module):
            moved = (tensor.to(variable.weight) - variable.sites[0].weight).detach()
        pair = moved, torch.eye(variable.shape[1])
    variable.stack.cap = pair[0].shape[1]
    variable.stack.push(*pair)


def _sorted(
    stored: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Factors of matrices, scale included, and whole tensors, both by name of the parameter."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        name = key.removeprefix(_PREFIX)
        if name.endswith((".lora_A.weight", ".lora_embedding_A")):
            embedding = name.endswith("embedding_A")
            module = name.removesuffix(".lora_embedding_A").removesuffix(".lora_A.weight")
            a, b = (
                tensor,
                stored[key.replace("lora_embedding_A", "lora_embedding_B").replace("lora_A", "lora_B")],
            )
            scale = _value(config, "alpha_pattern", "lora_alpha", module) / a.shape[0]
            left, right = (a.mT, b) if embedding else (b, a.mT)
            pairs[f"{module}.weight"] = (left * scale, right)
        elif "lora_" not in name:
            whole[name.replace(".base_layer.bias", ".bias")] = tensor
    return pairs, whole


def _value(config: Mapping[str, Any], pattern: str, default: str, module: str) -> float:
    """A number of one module, as peft finds it: the first pattern that matches the end of its name."""
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return float(config[default])


def _moved(variable: Variable, site: Site) -> Tensor:
    """The weight at one of its places with what it was moved by."""
    left, right = variable.moved_by()
    change = left @ right.mT
    with opened(site.module):
        weight = site.weight.detach()
        return weight + (change.mT if variable.transposed else change).to(weight)


def _factors(name: str, left: Tensor, right: Tensor, embedding: bool) -> dict[str, Tensor]:
    """The two tensors of a LoRA layer for `left @ right.T`; peft wants a rank of at least 1."""
    if not left.shape[1]:
        left, right = left.new_zeros(left.shape[0], 1), right.new_zeros(right.shape[0], 1)
    if embedding:
        return {
            f"{_PREFIX}{name}.lora_embedding_A": left.mT,  # (r, entries)
            f"{_PREFIX}{name}.lora_embedding_B": right,  # (width, r)
        }
    return {f"{_PREFIX}{name}.lora_A.weight": right.mT, f"{_PREFIX}{name}.lora_B.weight": left}


def _beside(variables: Sequence[Variable], keep: Sequence[str]) -> list[Variable]:
    """The variables outside of what is stored whole, trained or not."""
    return [v for v in variables if not any(v.name.startswith(f"{name}.") for name in keep)]


def _whole(variables: Sequence[Variable]) -> dict[str, set[str]]:
    """Parameters that are stored as they are instead of as factors, by module."""
    found: dict[str, set[str]] = {}
    for variable in variables:
        for site in variable.sites:
            if variable.stack is None or site.kind == "other":
                found.setdefault(site.module_name, set()).add(site.parameter)
    return found


def _is_bias(module: nn.Module, trained: Collection[str]) -> bool:
    """Whether what is trained of a module is the bias of a linear map, which a LoRA layer stores."""
    return set(trained) == {"bias"} and "weight" in module._parameters and _is_linear(module)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _features(module: Any) -> tuple[int, int]:
    """`(out_features, in_features)` of a linear map; a Conv1D stores its weight the other way round."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.nf, module.weight.shape[0]


def _config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {folder / CONFIG}: {error}") from error
