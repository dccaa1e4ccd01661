"""The model of `zolr pretrain`: made from numbers, a preset, a config file or a checkpoint, and whether it takes the text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zolr.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from zolr.cli.pretrain import Pretrain


def model_of(settings: Pretrain, tokenizer: Any) -> nn.Module:
    """The model to train, with an embedding as large as the tokenizer where it is built here."""
    import torch
    from transformers import AutoConfig

    from zolr.models import PRESETS, build, is_masked, load_model

    common: dict[str, Any] = dict(dtype=getattr(torch, settings.dtype), seed=settings.seed)
    # Only these are the model's business: beginning, end and padding of a text, and the number of tokens
    changes = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if settings.model is None:
        model = build(_config(settings, changes), **common)
    elif settings.model in PRESETS:
        config = PRESETS[settings.model].config()
        if getattr(config, "rope_parameters", None) and settings.length > config.max_position_embeddings:
            changes["max_position_embeddings"] = settings.length  # rotary positions have no weights
        model = build(settings.model, **common, **changes)
    elif settings.model.endswith(".json"):
        if not Path(settings.model).is_file():
            raise UsageError(f"there is no model config '{settings.model}'; give the path of a config.json")
        try:
            config = AutoConfig.from_pretrained(settings.model)
        except (OSError, ValueError) as error:
            raise UsageError(f"model config '{settings.model}' cannot be used: {error}") from error
        model = build(config, **common, **changes)
    else:
        model = load_model(settings.model, trust_remote_code=settings.trust_remote_code, **common)
        rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
        if len(tokenizer) > rows:
            raise UsageError(
                f"model '{settings.model}' has {rows} tokens, the tokenizer {len(tokenizer)}; use the model's own tokenizer"
            )
    if is_masked(model) != (settings.objective == "mlm"):
        kind, other = ("masked", "mlm") if is_masked(model) else ("causal", "clm")
        raise UsageError(
            f"{type(model).__name__} is a {kind} language model; train it with --objective {other}"
        )
    return model


def _config(settings: Pretrain, changes: dict[str, Any]) -> Any:
    """A llama (clm) or roberta (mlm) config with the numbers of the settings."""
    from transformers import AutoConfig

    width = settings.hidden_size
    numbers = dict(
        changes, hidden_size=width, num_hidden_layers=settings.layers, num_attention_heads=settings.heads
    )
    if settings.objective == "clm":
        # 8/3 of the width with a gate costs what 4 times the width costs without one; multiples of 32 are fast
        numbers["intermediate_size"] = settings.ffn_size or -(-8 * width // 3 // 32) * 32
        numbers |= dict(
            max_position_embeddings=max(512, settings.length), tie_word_embeddings=True, rms_norm_eps=1e-6
        )
        return AutoConfig.for_model("llama", **numbers)
    numbers["intermediate_size"] = settings.ffn_size or 4 * width
    # RoBERTa counts positions from its padding index on
    numbers["max_position_embeddings"] = max(512, settings.length) + changes["pad_token_id"] + 1
    numbers |= dict(
        type_vocab_size=1, layer_norm_eps=1e-5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return AutoConfig.for_model("roberta", **numbers)


def check_length(settings: Pretrain, model: Any) -> None:
    """Refuse rows that are longer than the model has positions."""
    from zolr.cli.workload import positions_of

    most = positions_of(model.config.get_text_config())
    if most is not None and settings.length > most:
        raise UsageError(
            f"--length {settings.length} is more than the {most} positions of model "
            f"'{settings.model or 'made from numbers'}'; use --length {most}, or a config.json with more"
        )


def check_apart(model: Any) -> None:
    """Refuse a model for which positions that begin again do not keep documents apart: what it says of one must not depend on another."""
    import torch

    from zolr.models import encode

    ids = torch.arange(2, 10, device=next(model.parameters()).device).expand(2, -1)  # (2, 8): two documents
    places = torch.arange(8, device=ids.device).remainder(4).expand(2, -1)
    with torch.no_grad():
        seen, alone = (
            encode(model, {"input_ids": ids, "position_ids": places}),
            encode(model, {"input_ids": ids[:, 4:]}),
        )
    error, size = float((seen[:, 4:] - alone).abs().max()), float(alone.abs().max())
    if not error <= 1e-2 * size:
        raise UsageError(
            f"{type(model).__name__} looks across documents in a row whatever their positions; leave out --documents apart"
        )


def check_ids(model: Any, origins: Mapping[str, Any]) -> None:
    """Refuse text with tokens that the model does not have."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(origin["largest"] for origin in origins.values())
    if largest >= rows:
        raise DataError(
            f"the text has token {largest:,}, and the model {rows:,} tokens; use the tokenizer that belongs to the model"
        )
