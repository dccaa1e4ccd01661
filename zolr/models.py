"""Models: load one, build one from numbers alone, and the losses that never hold a batch of full logits.

A language model is used here in two halves: `encode` gives hidden states, `head` turns the few of them that a
loss needs into logits. A prompt needs one position a row, a language-model loss takes the tokens in chunks,
so logits of shape `(batch, tokens, vocab)`, usually the largest tensor of a run, never exist.
"""

import copy
import difflib
import importlib.util
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.utils import logging as transformers_logging

from zolr import adapters
from zolr.attaching import as_read, multiplied_with
from zolr.errors import DataError, UsageError, cause_of
from zolr.held import keep_codes
from zolr.hub import answers as _hub_answers

Batch = Mapping[str, Tensor]
Kind = Literal["lm", "classes"]
Checkpointing = bool | Literal["selective"]
Codes = Literal["int8", "nf4"]
DeviceMap = Literal["auto", "cpu", "disk"]

# the package that holds and computes with each code
CODES: dict[str, str] = {"int8": "torchao", "nf4": "bitsandbytes"}

IGNORED = -100  # label of a token that does not count, as everywhere in torch and transformers
CHUNK_ENTRIES = 1 << 24  # logits alive at once in `lm_loss`, and widest states in `encode`: 64 MiB in float32
# however many tokens there are: smaller parts of those are nothing beside their hidden states
MOST_CHUNKS = 256

DEMO = Path(__file__).parent / "demo" / "model"

# one of these at least is in every folder with a tokenizer; without any transformers makes one that knows no word
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


# --- presets ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """An architecture given by its numbers: random weights, no tokenizer, no network.

    Args:
        family: model type as transformers spells it.
        settings: the numbers of its config.
        hub: where the published weights of this architecture live, if anywhere.
    """

    family: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    hub: str | None = None

    def config(self, **changes: Any) -> PreTrainedConfig:
        """The transformers config of this preset with some numbers changed."""
        return AutoConfig.for_model(self.family, **{**self.settings, **changes})


def _roberta(hidden: int, layers: int, heads: int, hub: str) -> Preset:
    numbers = dict(vocab_size=50265, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads)
    numbers |= dict(intermediate_size=4 * hidden, max_position_embeddings=514, type_vocab_size=1)
    return Preset("roberta", numbers | dict(layer_norm_eps=1e-5), hub)


def _opt(hidden: int, layers: int, heads: int, hub: str) -> Preset:
    numbers = dict(vocab_size=50272, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads)
    numbers |= dict(ffn_dim=4 * hidden, word_embed_proj_dim=hidden, max_position_embeddings=2048)
    return Preset("opt", numbers, hub)


def _llama(hidden: int, layers: int, heads: int, ffn: int, vocab: int = 32000, length: int = 1024) -> Preset:
    numbers = dict(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads)
    numbers |= dict(intermediate_size=ffn, max_position_embeddings=length, rms_norm_eps=1e-6)
    return Preset("llama", numbers | dict(tie_word_embeddings=False))


# The llama sizes are those of the GaLore paper (Zhao et al., 2024), on which pretraining methods are
# compared.
PRESETS: dict[str, Preset] = {
    "bert-base": Preset("bert", dict(vocab_size=30522), "google-bert/bert-base-uncased"),
    "roberta-base": _roberta(768, 12, 12, "FacebookAI/roberta-base"),
    "roberta-large": _roberta(1024, 24, 16, "FacebookAI/roberta-large"),
    "gpt2": Preset("gpt2", dict(vocab_size=50257), "openai-community/gpt2"),
    "opt-125m": _opt(768, 12, 12, "facebook/opt-125m"),
    "opt-1.3b": _opt(2048, 24, 32, "facebook/opt-1.3b"),
    "llama-20m": _llama(256, 4, 4, 688),
    "llama-60m": _llama(512, 8, 8, 1376),
    "llama-100m": _llama(640, 12, 10, 1708, vocab=32100),
    "llama-130m": _llama(768, 12, 12, 2048),
    "llama-350m": _llama(1024, 24, 16, 2736),
    "llama-1b": _llama(2048, 24, 32, 5461),
    "llama-7b": _llama(4096, 32, 32, 11008, length=2048),
}


# --- loading and building -----------------------------------------------------------------------------------

# of a loaded model the weights that its checkpoint does not hold
_FRESH: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()


def load_model(
    name: str | os.PathLike[str],
    *,
    kind: Kind = "lm",
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    dropout: float | None = None,
    seed: int = 0,
    quantize: Codes | None = None,
    device_map: DeviceMap | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> nn.Module:
    """Load a model, in eval mode, from a folder, a preset's numbers, the packaged demo or the hub.

    The folder may hold an adapter alone: its base model is loaded and computes with it.

    Weights come out in `dtype` whatever the checkpoint holds. A preset, and the fresh head of a classifier,
    is drawn from `seed`; the global random state is left as it was.

    Args:
        name: an existing folder, a key of `PRESETS` (random weights), "demo", or a hub name.
        kind: "lm" for the masked or causal language model that the config describes, "classes" for a
            classifier.
        num_labels: number of classes of a classifier.
        dtype: dtype of the weights.
        attn_implementation: attention kernel; by default transformers picks (sdpa wherever it can).
        dropout: sets every dropout probability of the config, in [0, 1); None leaves them.
        trust_remote_code: run Python code that comes with the checkpoint.
        quantize: how the linear maps of the base model are coded: "int8" (a scale per row, by torchao; activations
            stay as they are) or "nf4" (four bits, a scale per 64 weights, by bitsandbytes). Heads, embeddings and
            norms keep `dtype`.
        device_map: keep weights away from the device between two uses: "cpu" in host memory, "disk" in
            `offload_folder`, "auto" as accelerate divides them over GPU, host memory and disk.
        offload_folder: where "disk" and "auto" write weights; not emptied.
        max_memory: bytes, or amounts such as "10GiB", that weights may take by device (GPU number or "cpu"), for
            device_map "auto"; what fits nowhere goes to disk. None takes what accelerate finds to be free.

    Raises:
        UsageError: the name is unknown, the model has no such kind, a package is missing, or settings contradict.
        DataError: the folder cannot be read, or the hub cannot be reached.
    """
    label = os.fspath(name)
    _check_quantize(quantize)
    if device_map is not None:
        _check_device_map(device_map, quantize, offload_folder)
    if max_memory is not None and device_map != "auto":
        raise UsageError(f"max_memory is for device_map 'auto', and device_map is {device_map!r}; use 'auto'")
    if adapters.is_adapter(Path(label)):
        loaded = load_model(
            adapters.base_of(Path(label)),
            kind=kind,
            num_labels=num_labels,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            dropout=dropout,
            seed=seed,
            quantize=quantize,
            device_map=device_map,
            offload_folder=offload_folder,
            max_memory=max_memory,
        )
        adapters.load(Path(label), loaded)
        return loaded
    if label in PRESETS and not Path(label).is_dir():
        hub = PRESETS[label].hub
        if hub is not None:
            warnings.warn(
                f"'{label}' builds the architecture with random weights; for the published ones use '{hub}'",
                stacklevel=2,
            )
        built = build(
            label,
            kind=kind,
            num_labels=num_labels,
            dtype=dtype,
            device="cpu" if device_map else device,
            attn_implementation=attn_implementation,
            dropout=dropout,
            seed=seed,
        )
        if quantize is not None:
            code(built, quantize)
        return built if device_map is None else _offloaded(built, device_map, device, offload_folder)
    source, remote = located(label)
    options: dict[str, Any] = dict(
        trust_remote_code=trust_remote_code, local_files_only=remote and not _hub_answers()
    )
    with _plain_errors(label, remote):
        config = AutoConfig.from_pretrained(source, **options)
        auto = _auto_class(config, kind)
        if num_labels is not None:
            config.num_labels = num_labels
        _prepare(config, kind, dropout)
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        if quantize is not None:
            with torch.device("meta"):
                empty = auto.from_config(config, trust_remote_code=trust_remote_code)
            coded_maps(empty, quantize)  # says so where there is nothing to do
            options["quantization_config"] = _coding(quantize, dtype, _plain_maps(empty))
            options["device_map"] = {"": device}
        elif device_map == "auto":
            options |= {"device_map": "auto", "offload_folder": offload_folder, "max_memory": max_memory}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, report = auto.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=None if trust_remote_code else True,  # the other format is a pickle
                **options,
            )
    missing = sorted(report["missing_keys"])
    if missing and kind == "lm":
        warnings.warn(
            f"model '{label}' holds no weights for {', '.join(missing[:4])}{' ...' if missing[4:] else ''}: "
            "they start random",
            stacklevel=2,
        )
    _FRESH[model] = tuple(missing)
    if quantize is not None:
        _keep_codes(model)
        return model.eval()  # it is on its device, and transformers refuses to move some codes
    if device_map == "auto":
        return model.eval()
    if device_map is not None:
        return _offloaded(model, device_map, device, offload_folder)
    return model.to(device).eval()


def fresh_modules(model: nn.Module) -> list[str]:
    """The largest modules of a loaded model of which its checkpoint holds no weight: a new head, a pooler."""
    missing = set(_FRESH.get(model, ()))
    found: list[str] = []
    for name, module in model.named_modules():  # from the outside in
        own = {f"{name}.{key}" for key, _ in module.named_parameters()}
        if name and own and own <= missing and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def _offloaded(
    model: nn.Module, device_map: str, device: torch.device | str, folder: str | os.PathLike[str] | None
) -> nn.Module:
    """The model with every weight in host memory or on disk between two uses."""
    import accelerate

    target = torch.device(device)
    if device_map == "disk":
        return accelerate.disk_offload(model, os.fspath(folder or ""), execution_device=target).eval()
    return accelerate.cpu_offload(model, execution_device=target).eval()


# --- quantizing ---------------------------------------------------------------------------------------------


def _check_quantize(quantize: str | None) -> None:
    if quantize is None:
        return
    if quantize not in CODES:
        raise UsageError(f"quantize '{quantize}' is not known; use one of {', '.join(CODES)}")
    if importlib.util.find_spec(CODES[quantize]) is None:
        raise UsageError(
            f"quantize '{quantize}' needs the package {CODES[quantize]}; install it with pip install 'zolr[quant]'"
        )


def _check_device_map(device_map: str, quantize: str | None, folder: Any) -> None:
    if device_map not in ("auto", "cpu", "disk"):
        raise UsageError(f"device_map '{device_map}' is not known; use auto, cpu or disk")
    if quantize is not None:
        raise UsageError(
            f"device_map '{device_map}' moves plain weights only, and quantize '{quantize}' has coded ones; use one of the two"
        )
    if device_map == "disk" and folder is None:
        raise UsageError("device_map 'disk' needs a place for the weights; give offload_folder")


def _maps(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Linear maps by name: those of the base model's layers, which are quantized, and all others, which are not.

    A pooler is among the others: many checkpoints have none, and what starts random is not quantized.
    """
    base: Any = getattr(model, "base_model", model)
    inside = {id(module) for module in base.modules()}
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear or _is_conv1d(m)}
    coded = {n: m for n, m in linear.items() if id(m) in inside and "pooler" not in n.split(".")}
    return coded, {n: m for n, m in linear.items() if n not in coded}


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _plain_maps(model: nn.Module) -> list[str]:
    return list(_maps(model)[1])


def coded_maps(model: nn.Module, how: str) -> dict[str, nn.Module]:
    """The linear maps that are quantized, by name.

    Raises:
        UsageError: there are none.
    """
    coded = _maps(model)[0]
    found = {n: m for n, m in coded.items() if type(m) is nn.Linear or how == "nf4"}
    if not found:
        hint = "use nf4" if coded else "train it as it is"
        raise UsageError(f"{type(model).__name__} has no linear map that {how} covers; {hint}")
    return found


def _coding(how: str, dtype: torch.dtype, plain: list[str]) -> Any:
    """The quantization config of transformers."""
    if how == "nf4":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=plain,
        )
    from transformers import TorchAoConfig

    rule = import_module("torchao.quantization").Int8WeightOnlyConfig()
    return TorchAoConfig(rule, modules_to_not_convert=plain)


def code(model: nn.Module, how: Codes) -> None:
    """Quantize, in place, what `load_model` quantizes on its way in.

    Raises:
        UsageError: nothing that can be quantized, or a package is missing.
    """
    _check_quantize(how)
    coded = coded_maps(model, how)
    if how == "int8":
        package = import_module("torchao.quantization")
        wanted = {id(m) for m in coded.values()}
        package.quantize_(
            model, package.Int8WeightOnlyConfig(), filter_fn=lambda module, _: id(module) in wanted
        )
        return
    layers = import_module("bitsandbytes").nn  # optional packages: a checker of types need not find them
    for name, module in coded.items():
        weight: Any = module.weight
        rows = weight.data if type(module) is nn.Linear else weight.data.t().contiguous()
        new = layers.Linear4bit(
            rows.shape[1],
            rows.shape[0],
            bias=module.bias is not None,
            compute_dtype=rows.dtype,
            compress_statistics=False,
            quant_type="nf4",
            device="meta",
        )
        new.bias = module.bias
        settings: Any = dict(requires_grad=False, quant_type="nf4", compress_statistics=False, module=new)
        new.weight = layers.Params4bit(rows, **settings).to(rows.device)
        model.set_submodule(name, new)
    _keep_codes(model)


def _keep_codes(model: nn.Module) -> None:
    """See `held.keep_codes`; before the first evaluation it can still be done."""
    for module in model.modules():
        keep_codes(module)


def load_config(name: str | os.PathLike[str], *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The transformers config of a preset, a folder, the packaged demo or a hub model; no weights are read.

    Raises:
        UsageError: the name is unknown.
        DataError: the folder cannot be read, or the hub cannot be reached.
    """
    label = os.fspath(name)
    if label in PRESETS and not Path(label).is_dir():
        return PRESETS[label].config()
    source, remote = located(label)
    with _plain_errors(label, remote):
        return AutoConfig.from_pretrained(
            source, trust_remote_code=trust_remote_code, local_files_only=remote and not _hub_answers()
        )


def build(
    preset: str | PreTrainedConfig,
    *,
    kind: Kind = "lm",
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    dropout: float | None = None,
    seed: int = 0,
    **changes: Any,
) -> nn.Module:
    """Build a model with random weights from numbers alone, in eval mode.

    Weights are drawn on the host, so the same seed gives the same model on every device. With
    `device="meta"`, or under a fake-tensor mode, nothing is drawn and no memory is taken.

    Args:
        preset: key of `PRESETS`, or a transformers config.
        seed: names the weights; the global random state is left as it was.
        changes: config numbers to change, such as `vocab_size=8192`.

    Raises:
        UsageError: the preset is not known.

    >>> model = build("llama-20m", device="meta")
    >>> sum(p.numel() for p in model.parameters())
    19548416
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise UsageError(
                f"preset '{preset}' is not known{_nearest(preset)}; presets: {', '.join(PRESETS)}"
            )
        config = PRESETS[preset].config(**changes)
    else:
        config = copy.deepcopy(preset)
        for key, value in changes.items():
            setattr(config, key, value)
    if num_labels is not None:
        config.num_labels = num_labels
    auto = _auto_class(config, kind)
    _prepare(config, kind, dropout)
    options: dict[str, Any] = (
        {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    )
    # On the meta device and in a mode that replaces tensors (fake tensors) nothing is drawn, and such a mode
    # cannot hand out the generator's state
    probe = torch.empty(0)
    meta = "meta" in (torch.device(device).type, probe.device.type)
    if meta or type(probe) is not Tensor:
        with torch.device("meta" if meta else device), _undrawn():
            return auto.from_config(config, dtype=dtype, **options).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=dtype, **options)
    return model.to(device).eval()


@contextmanager
def _undrawn() -> Iterator[None]:
    """Weights are made and tied, and not initialized: some families read values for that, where there are none."""
    before = PreTrainedModel.initialize_weights
    PreTrainedModel.initialize_weights = lambda self: None
    try:
        yield
    finally:
        PreTrainedModel.initialize_weights = before


def load_tokenizer(name: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a folder, of the packaged demo or of a hub model, padding on the right.

    A tokenizer without a padding token pads with its end-of-text token; the attention mask keeps the two
    apart.

    Raises:
        UsageError: the name is a preset (those have none), is unknown, or the tokenizer has nothing to pad
            with.
        DataError: the folder cannot be read, or the hub cannot be reached.
    """
    label = os.fspath(name)
    if label in PRESETS and not Path(label).is_dir():
        hub = PRESETS[label].hub or "hf-internal-testing/llama-tokenizer"
        raise UsageError(
            f"preset '{label}' has no tokenizer; pass one: a folder, or a hub name such as '{hub}'"
        )
    source, remote = located(label, "tokenizer")
    if not remote and not any(found for name in TOKENIZER_FILES for found in Path(source).glob(name)):
        raise DataError(
            f"folder '{label}' has no tokenizer; put the tokenizer.json and tokenizer_config.json of its model into it"
        )
    with _plain_errors(label, remote, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, local_files_only=remote and not _hub_answers()
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(
                f"tokenizer '{label}' has neither a padding nor an end-of-text token to pad with"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def checkpoint_activations(model: nn.Module, how: Checkpointing = True) -> None:
    """Keep only the inputs of layers for backward and compute the rest again (non-reentrant checkpoints).

    transformers does this in `train()` mode only: in eval mode the call has no effect.

    Args:
        how: True for all layers; "selective" for the first half of them, whose results would be kept longest: half of
            the time of full recomputation, and half of its savings; False for none.

    Raises:
        UsageError: the model does not support it.
    """
    if how is False:
        return
    if how not in (True, "selective"):
        raise UsageError(f"checkpointing '{how}' is not known; use True, False or 'selective'")
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UsageError(
            f"{type(model).__name__} does not support activation checkpointing; train without it"
        )
    loose: Any = model
    if hasattr(model, "activation_checkpointing_enable"):  # the name of later transformers 5
        loose.activation_checkpointing_enable({"use_reentrant": False})
    else:
        loose.gradient_checkpointing_enable({"use_reentrant": False})
    # Reentrant checkpoints need inputs that require gradients; ours do not, and the gradient of the
    # embeddings' output that this would keep is as large as a layer's input
    loose.disable_input_require_grads()
    if how == "selective":
        layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if len(layers) < 2:
            raise UsageError(
                f"{type(model).__name__} has no layers that can be told apart; use checkpointing on or off"
            )
        # the last layers are the first on the way back: theirs is gone before anything is computed again
        for layer in layers[(len(layers) + 1) // 2 :]:
            layer.gradient_checkpointing = False


def is_masked(model: nn.Module) -> bool:
    """Whether the model predicts masked tokens (True) or next tokens (False)."""
    name = type(model).__name__
    if name.endswith("ForMaskedLM"):
        return True
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return False
    return _masked_config(_config(model))


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise UsageError(
            f"{type(model).__name__} is not a transformers model; give the engine a loss of its own"
        )
    return config


def _masked_config(config: PreTrainedConfig) -> bool:
    """What the architecture named in the config says, else what its family can be."""
    for name in config.architectures or ():
        if name.endswith("ForMaskedLM"):
            return True
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return False
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def check_kind(config: PreTrainedConfig, kind: Kind) -> None:
    """Refuse a family that has no model of this kind.

    Raises:
        UsageError: there is none.
    """
    _auto_class(config, kind)


def _auto_class(config: PreTrainedConfig, kind: str) -> Any:
    if kind == "classes":
        if _classifies(config):
            return AutoModelForSequenceClassification
        way_out = "--head prompt (kind 'lm')" if _predicts(config) else "a model of another family"
        raise UsageError(
            f"model family '{config.model_type}' has no classification head in transformers; use {way_out}"
        )
    if kind != "lm":
        raise UsageError(f"kind '{kind}' is not known; use 'lm' or 'classes'")
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"model family '{config.model_type}' is an encoder-decoder; use a masked or a causal model"
        )
    if _masked_config(config):
        return AutoModelForMaskedLM
    if _predicts(config):
        return AutoModelForCausalLM
    way_out = "--head classes (kind 'classes')" if _classifies(config) else "a model of another family"
    raise UsageError(f"model family '{config.model_type}' has no language-model head; use {way_out}")


def _classifies(config: PreTrainedConfig) -> bool:
    """Whether there is a model of this family with a classification head, of transformers or of its own code."""
    own = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    return own or type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def _predicts(config: PreTrainedConfig) -> bool:
    """Whether there is a model of this family with a language-model head that is used here."""
    if getattr(config, "is_encoder_decoder", False):
        return False
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return own or _masked_config(config) or config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _prepare(config: Any, kind: str, dropout: float | None) -> None:
    if kind == "classes" and config.pad_token_id is None:
        # Causal classifiers find the last real token by the padding id
        eos = config.eos_token_id
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    if dropout is not None:
        set_dropout(config, dropout)


def dropouts(config: Any) -> dict[str, float]:
    """The dropout probabilities of a config, by their names."""
    pattern = r"dropout$|pdrop$|dropout_prob$"
    numbers = {
        k: v
        for k, v in config.to_dict().items()
        if isinstance(v, (int, float)) and not isinstance(v, bool)  # a switch of its own, such as ESM's
    }
    return {k: v for k, v in numbers.items() if re.search(pattern, k)}


def set_dropout(config: Any, probability: float, *, attention: bool = False) -> None:
    """Set every dropout probability of a config, or those of attention alone."""
    for key in dropouts(config):
        if not attention or key.startswith("att"):
            setattr(config, key, probability)


def _nearest(name: str) -> str:
    known = [*PRESETS, "demo", *(p.hub for p in PRESETS.values() if p.hub and p.hub != name)]
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def located(name: str, kind: str = "model") -> tuple[str, bool]:
    """The folder or hub name behind `name`, and whether it is on the hub.

    Raises:
        DataError: it is a path, and there is no folder.
    """
    if name == "demo" and not Path(name).is_dir():
        if not DEMO.is_dir():
            raise DataError(
                "the demo model is not part of this installation; install the zolr package from its wheel"
            )
        return str(DEMO), False
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path), False
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        what = "is a file" if path.exists() else "does not exist"
        way_out = (
            "a folder with a config.json, a preset" if kind == "model" else "a folder with a tokenizer.json"
        )
        raise DataError(f"{kind} folder '{name}' {what}; give {way_out} or a hub name")
    return name, True


def _has_pickles(folder: str) -> bool:
    """Whether a folder has weights in a format other than safetensors."""
    return any(
        found for name in ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack") for found in Path(folder).glob(name)
    )


@contextmanager
def _plain_errors(name: str, remote: bool, kind: str = "model") -> Iterator[None]:
    """Turn what transformers raises into one line that says what to do, and keep its progress bars off."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except (UsageError, DataError):
        raise
    except Exception as error:
        causes, cause = [], error
        while cause is not None:
            causes.append(type(cause).__name__)
            cause = cause.__cause__ or cause.__context__
        reason = str(error).strip().split("\n")[0]
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"{kind} '{name}' brings Python code of its own; read it, then allow it with trust_remote_code (--trust-remote-code)"
            ) from error
        if ".safetensors" in reason and not remote and not _has_pickles(name):
            raise DataError(
                f"{kind} folder '{name}' has no weights; give one with a model.safetensors beside its config.json"
            ) from error
        if ".safetensors" in reason:
            raise DataError(
                f"{kind} '{name}' has no safetensors; its weights are in a format that can run code: convert them, or allow "
                f"it with trust_remote_code (--trust-remote-code; {reason})"
            ) from error
        if not remote:
            if "backend tokenizer" in reason:
                reason = "nothing in it says what kind it is; add a tokenizer.json, or a tokenizer_config.json with tokenizer_class"
            else:
                reason = cause_of(error)
            raise DataError(f"{kind} folder '{name}' cannot be read: {reason}") from error
        presets = f", a preset, with random weights ({', '.join(PRESETS)})," if kind == "model" else ""
        way_out = f"use a folder{presets} or 'demo'"
        if {"LocalEntryNotFoundError", "OfflineModeIsEnabled"} & set(causes) or "connect" in reason:
            what = f"is not a folder{' or preset' * bool(presets)}{_nearest(name)}, and the hub cannot be reached"
            raise DataError(f"{kind} '{name}' {what}; {way_out}") from error
        if "GatedRepoError" in causes:
            raise DataError(f"{kind} '{name}' is gated; accept its terms on the hub and log in") from error
        raise UsageError(f"{kind} '{name}' is not known{_nearest(name)} ({reason}); {way_out}") from error
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


# --- the two halves of a language model ---------------------------------------------------------------------


def _lm_head(model: Any, hidden: Tensor) -> Tensor:
    return model.lm_head(hidden)


def _cls(model: Any, hidden: Tensor) -> Tensor:
    return model.cls(hidden)


def _deberta(model: Any, hidden: Tensor) -> Tensor:
    if model.legacy:
        return model.cls(hidden)
    table = model.deberta.embeddings.word_embeddings
    with as_read(table):
        return model.lm_predictions(hidden, table)


def _distilbert(model: Any, hidden: Tensor) -> Tensor:
    hidden = model.activation(model.vocab_transform(hidden))
    return model.vocab_projector(model.vocab_layer_norm(hidden))


def _electra(model: Any, hidden: Tensor) -> Tensor:
    return model.generator_lm_head(model.generator_predictions(hidden))


def _softcap(model: Any, hidden: Tensor) -> Tensor:
    logits, cap = _wide(model.lm_head(hidden)), model.config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


# How each family turns hidden states into logits. A family that is not here is never guessed at: an unknown
# scale or cap after the head would give wrong losses without a sign of it.
HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    **dict.fromkeys(
        ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "esm", "eurobert"), _lm_head
    ),
    **dict.fromkeys(("opt", "gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"), _lm_head),
    **dict.fromkeys(("phi", "phi3", "olmo", "olmo2", "smollm3", "starcoder2", "stablelm", "gemma"), _lm_head),
    **dict.fromkeys(("bert", "nomic_bert"), _cls),
    **dict.fromkeys(("deberta", "deberta-v2"), _deberta),
    **dict.fromkeys(("gemma2", "gemma3_text"), _softcap),
    "albert": lambda model, hidden: model.predictions(hidden),
    "distilbert": _distilbert,
    "electra": _electra,
    "modernbert": lambda model, hidden: model.decoder(model.head(hidden)),
    "cohere": lambda model, hidden: model.lm_head(hidden) * model.logit_scale,
    "granite": lambda model, hidden: model.lm_head(hidden) / model.config.logits_scaling,
}


def _wide(logits: Tensor) -> Tensor:
    """At least float32, whatever the model computes in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def splits(model: nn.Module) -> bool:
    """Whether `encode` and `head` know this family; if not, losses use the stock forward's full logits."""
    base = getattr(model, "base_model", model)
    # a wrapper (peft) has the config of what is in it, and a whole model, or a wrapper of one, for its base
    whole = base is model or getattr(base, "base_model", base) is not base
    return _config(model).model_type in HEADS and not whole


def encode(model: nn.Module, batch: Batch) -> Tensor:
    """Hidden states before the language-model head.

    Args:
        batch: `input_ids` `(b, t)`; `attention_mask`, `token_type_ids` and `position_ids` of that shape are
            used where present.

    Returns:
        `(b, t, h)` in the model's dtype.
    """
    with _in_rows(model, batch["input_ids"].numel()):
        return model.base_model(**_inputs(model, batch)).last_hidden_state  # type: ignore[operator]


@contextmanager
def _in_rows(model: nn.Module, tokens: int) -> Iterator[None]:
    """Feed-forward halves of layers take a part of the tokens at a time where no autograd keeps what they make.

    Their inner states, the widest of a layer, are most of what a large forward pass holds besides the weights. Covers
    the families that have this half in a method (BERT and its kin) or a module (LLaMA, GPT-2 and theirs) of its own.
    """
    wide = _config(model).get_text_config()
    width = getattr(wide, "intermediate_size", None) or 4 * getattr(wide, "hidden_size", 1)
    rows = max(1, CHUNK_ENTRIES // width, -(-tokens // MOST_CHUNKS))
    if torch.is_grad_enabled() or tokens <= rows or torch.compiler.is_compiling():
        yield
        return

    def divided(whole: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def feed_forward(x: Tensor) -> Tensor:
            parts = [whole(part) for part in x.flatten(0, -2).split(rows)]
            return torch.cat(parts).view(x.shape)

        return feed_forward

    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in model.modules():
            name = _feed_forward(type(module))
            if name is not None:
                before.append((module.__dict__, name, module.__dict__.get(name)))
                module.__dict__[name] = divided(getattr(module, name))
        yield
    finally:
        for own, name, old in before:
            if old is None:
                del own[name]
            else:  # of a hook that moves weights
                own[name] = old


@cache
def _feed_forward(cls: type[nn.Module]) -> str | None:
    """The method of a layer, or of a module in it, that maps every token by itself through wide inner states."""
    if hasattr(cls, "feed_forward_chunk"):
        return "feed_forward_chunk"
    ours = cls.__module__.startswith("transformers.models.") and cls.__name__.endswith("MLP")
    return "forward" if ours and len(inspect.signature(cls.forward).parameters) == 2 else None


_CACHES: dict[Any, bool] = {}


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    inputs: dict[str, Any] = {name: batch[name] for name in names if name in batch}
    if _caches(type(model.base_model if splits(model) else model)):
        inputs["use_cache"] = (
            False  # a step never continues a text, and the cache is as large as keys and values
        )
    return inputs


def _caches(cls: Any) -> bool:
    """Whether a model may keep keys and values for the next token."""
    if cls not in _CACHES:  # a plain dict, which torch.compile reads where it warns of functools.cache
        _CACHES[cls] = "use_cache" in inspect.signature(cls.forward).parameters
    return _CACHES[cls]


def head(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits of hidden states, by the model's own head.

    Args:
        hidden: `(k, h)` rows of `encode`.

    Returns:
        `(k, vocab)`, at least float32.

    Raises:
        UsageError: the family is not in `HEADS`.
    """
    family = _config(model).model_type
    if family not in HEADS:
        raise UsageError(
            f"the head of model family '{family}' is not known; call the model itself, or add it to HEADS"
        )
    return _wide(HEADS[family](model, hidden))


def _stock_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Full logits `(b, t, vocab)` of a family without a known head, or of a wrapper."""
    family = _config(model).model_type
    wrapper = f"{type(model).__name__} around " if family in HEADS else ""
    warnings.warn(
        f"{wrapper}model family '{family}' is computed by its stock forward, which holds full logits",
        stacklevel=3,
    )
    logits = model(**_inputs(model, batch)).logits
    return logits[:, -batch["input_ids"].shape[1] :]  # prompt tuning puts tokens of its own before them


# --- losses -------------------------------------------------------------------------------------------------


def prompt_logits(model: nn.Module, batch: Batch, label_ids: Tensor | Sequence[int]) -> Tensor:
    """Logits of the label words at each row's prompt position.

    Args:
        batch: `input_ids` `(b, t)`, `attention_mask`, `positions` `(b,)`: the mask token of a masked model,
            the last real token of a causal one.
        label_ids: `(c,)` token of each class, in the order of the labels.

    Returns:
        `(b, c)`, at least float32.
    """
    positions = batch["positions"]
    rows = torch.arange(positions.shape[0], device=positions.device)
    if splits(model):
        logits = head(model, encode(model, batch)[rows, positions])  # (b, vocab)
    else:
        logits = _wide(_stock_logits(model, batch)[rows, positions])
    if isinstance(label_ids, Tensor):
        return logits.index_select(-1, label_ids.to(logits.device))
    # Plain integers need no tensor from outside, so that this also runs on fake tensors
    return torch.stack([logits[..., i] for i in label_ids], dim=-1)


def prompt_loss(label_ids: Tensor | Sequence[int]) -> Callable[[nn.Module, Batch], Tensor]:
    """Cross-entropy over the label words, one number a row.

    Args:
        label_ids: `(c,)` token of each class.

    Returns:
        A loss `(model, batch) -> (b,)`; `batch` as in `prompt_logits`, and `labels` `(b,)`.
    """
    words = tuple(int(i) for i in label_ids)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(prompt_logits(model, batch, words), batch["labels"], reduction="none")

    return loss


def class_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a classifier, `(b, c)`, at least float32."""
    with _in_rows(model, batch["input_ids"].numel()):
        return _wide(model(**_inputs(model, batch)).logits)


def class_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a classification head, `(b,)`.

    Args:
        batch: `input_ids` `(b, t)`, `attention_mask`, `labels` `(b,)`.
    """
    return F.cross_entropy(class_logits(model, batch), batch["labels"], reduction="none")


def _summed(
    chunk_loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, labels: Tensor, chunk: int
) -> Tensor:
    """Sum of a loss over chunks of rows, whose gradients are already there when backward asks for them.

    Args:
        chunk_loss: of rows `(k, h)` and their labels `(k,)`; a scalar.
        hidden: all rows `(t, h)`.
        labels: `(t,)`.
        chunk: rows at a time.
    """
    first = chunk_loss(hidden[:1].detach(), labels[:1])  # shows which weights a loss goes through
    leaves = _leaves(first)
    del first
    if not leaves and not hidden.requires_grad:
        with torch.no_grad():
            parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
            return torch.stack([chunk_loss(rows, targets) for rows, targets in parts]).sum()
    return _Summed.apply(chunk_loss, chunk, hidden, labels, *leaves)


def _leaves(root: Tensor) -> list[Tensor]:
    """Tensors that backward from `root` would leave a gradient in."""
    found: dict[int, Tensor] = {}
    nodes, seen = [root.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.setdefault(id(node.variable), node.variable)
        nodes += [following for following, _ in node.next_functions]
    return list(found.values())


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, chunk_loss: Any, chunk: int, hidden: Tensor, labels: Tensor, *leaves: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        of_leaves: list[Any] = [None] * len(leaves)
        start = 0
        for rows, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            rows = rows.detach().requires_grad_(of_hidden is not None)
            with torch.enable_grad():
                part = chunk_loss(rows, targets)
            asked = [*([rows] if of_hidden is not None else []), *leaves]
            found = list(torch.autograd.grad(part, asked, allow_unused=True))
            total += part.detach()
            if of_hidden is not None:
                own = found.pop(0)
                of_hidden[start : start + len(rows)] = 0 if own is None else own
            for i, own in enumerate(found):
                of_leaves[i] = own if of_leaves[i] is None else of_leaves[i].add_(own)
            start += len(rows)
        ctx.found = of_hidden, of_leaves
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_hidden, of_leaves = ctx.found
        del ctx.found  # it may be large, and comes once
        scaled = [None if g is None else g.mul_(grads[0].to(g.dtype)) for g in (of_hidden, *of_leaves)]
        return None, None, scaled[0], None, *scaled[1:]


def _plain_head(model: nn.Module, hidden: Tensor) -> Tensor | None:
    """The matrix `(vocab, h)` by which a head multiplies and does nothing else; None for any other head.

    Under autocast a head multiplies by a rounded copy, which the general way makes.
    """
    if HEADS.get(_config(model).model_type) is not _lm_head or torch.is_autocast_enabled(hidden.device.type):
        return None
    loose: Any = model
    weight = multiplied_with(loose.lm_head)
    return (
        weight if weight is not None and weight.dtype == hidden.dtype and hidden.dtype.itemsize >= 4 else None
    )


class _CrossEntropy(torch.autograd.Function):
    """Sum of `_Summed` where logits are `rows @ weight.T`: without autograd in between one buffer of logits becomes their
    gradient, and that of the weight is added up by the products themselves.
    """

    @staticmethod
    def forward(ctx: Any, chunk: int, hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[1] else None
        of_weight = None
        start = 0
        for rows, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            shares = F.log_softmax(rows @ weight.mT, dim=-1)  # (k, vocab)
            total += F.nll_loss(shares, targets, ignore_index=IGNORED, reduction="none").sum(
                dtype=torch.float64
            )
            shares.exp_()
            counts = (targets != IGNORED).to(rows)[:, None]  # (k, 1)
            where = targets.clamp_min(0)[:, None]
            shares.scatter_add_(
                1, where, -counts
            )  # the gradient of the logits, but for rows that do not count
            if of_hidden is not None:
                torch.mm(shares, weight, out=of_hidden[start : start + len(rows)]).mul_(counts)
            if ctx.needs_input_grad[3]:
                seen = rows * counts
                of_weight = shares.mT @ seen if of_weight is None else of_weight.addmm_(shares.mT, seen)
            start += len(rows)
            del shares  # before the next logits
        ctx.found = of_hidden, of_weight
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = ctx.found
        del ctx.found  # it may be large, and comes once
        of_hidden, of_weight = (None if g is None else g.mul_(grads[0].to(g.dtype)) for g in found)
        return None, of_hidden, None, of_weight


def lm_loss(model: nn.Module, batch: Batch, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Sum of token cross-entropies and the number of tokens, with only a chunk of logits alive at a time.

    Under autograd the gradient of each chunk is taken at once, in forward, so that logits are neither kept nor computed
    again (where torch.compile traces, they are computed again in backward).

    Args:
        batch: `input_ids` `(b, t)`, `labels` `(b, t)` with -100 where nothing is predicted; labels stand at
            the position that predicts them, so those of a causal model are already shifted. Optional
            `counted` `(k,)`: flat positions in `0 ... b·t` that hold every counted label; the head then sees
            these alone, which for a masked model saves most of its work.
        chunk: tokens a chunk; by default as many as give 2**24 logits, or the 256th part of all.

    Returns:
        `(sum, count)`, shapes `()`; the sum is added up in float64.
    """
    labels = batch["labels"].flatten()  # (b·t,)
    if not splits(model):
        logits = _wide(_stock_logits(model, batch)).flatten(0, 1)
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        return losses.sum(dtype=torch.float64), (labels != IGNORED).sum()

    hidden = encode(model, batch).flatten(0, 1)  # (b·t, h)
    if "counted" in batch:
        hidden, labels = hidden[batch["counted"]], labels[batch["counted"]]
    if chunk is None:
        entries = CHUNK_ENTRIES // _config(model).get_text_config().vocab_size
        chunk = max(64, entries, -(-len(hidden) // MOST_CHUNKS))

    def chunk_loss(rows: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(head(model, rows), targets, ignore_index=IGNORED, reduction="none")
        return losses.sum(dtype=torch.float64)

    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        weight = _plain_head(model, hidden)
        if weight is not None and (weight.requires_grad or hidden.requires_grad):
            return _CrossEntropy.apply(chunk, hidden, labels, weight), (labels != IGNORED).sum()
        return _summed(chunk_loss, hidden, labels, chunk), (labels != IGNORED).sum()
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    # split, not slices: the gradient of each slice would be a zero-padded copy of all hidden states
    for rows, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        if torch.is_grad_enabled():
            part = checkpoint(chunk_loss, rows, targets, use_reentrant=False, preserve_rng_state=False)
        else:
            part = chunk_loss(rows, targets)
        total = total + part
    return total, (labels != IGNORED).sum()


def lm_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Mean token cross-entropy of every row, for rules that ask for one loss an example; 0 where a row predicts nothing.

    Args:
        batch: as for `lm_loss`.

    Returns:
        `(b,)`
    """
    labels = batch["labels"]  # (b, t)
    rows = torch.arange(labels.shape[0], device=labels.device)[:, None].expand_as(labels).flatten()
    labels = labels.flatten()
    if splits(model):
        hidden = encode(model, batch).flatten(0, 1)  # (b·t, h)
        if "counted" in batch:
            hidden, labels, rows = (x[batch["counted"]] for x in (hidden, labels, rows))
        logits = head(model, hidden)
    else:
        logits = _wide(_stock_logits(model, batch)).flatten(0, 1)
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").double()
    sums = losses.new_zeros(batch["labels"].shape[0]).index_add(0, rows, losses)
    return sums / (batch["labels"] != IGNORED).sum(1).clamp_min(1)
