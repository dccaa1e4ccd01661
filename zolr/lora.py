"""Adapters: wrap a model as another package does, train what it adds, and leave both its own format and a plain model.

The package puts its modules into the model in place, so that everything that knows the model goes on knowing it.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zolr.errors import UsageError
from zolr.methods import Adapter


def check_installed(adapter: Adapter) -> None:
    """Say what is missing before anything is loaded.

    Raises:
        UsageError: the adapter is not known, or its package is not installed.
    """
    if adapter.kind != "lora":
        raise UsageError(f"adapter '{adapter.kind}' is not known; use 'lora'")
    if find_spec("peft") is None:
        raise UsageError(
            f"method '{adapter.kind}' needs the package peft, which is not installed; "
            "install it with: pip install 'zolr[lora]'"
        )


def wrap(model: nn.Module, adapter: Adapter, *, classifier: bool = False, seed: int = 0) -> Any:
    """Put an adapter into a transformers model, in place; afterwards its parameters alone ask for gradients.

    Args:
        model: a plain model. Activation checkpointing is switched on after this, not before: PEFT would make the
            embeddings' output ask for a gradient, which is as large as a layer's input.
        adapter: kind and rank; everything else is PEFT's default.
        classifier: the model ends in a fresh classification head, which is trained with the adapter.
        seed: of the adapter's first matrices; the global random state is left as it was.

    Returns:
        PEFT's view of the same model, for `save`.

    Raises:
        UsageError: the package is missing, or it finds nothing in this model to adapt, or adapts what is no linear map, or the
            rank is larger than every one of them.
    """
    check_installed(adapter)
    longest = _longest(model)
    if longest is not None and adapter.rank > longest:
        raise UsageError(
            f"rank {adapter.rank} of an adapter is larger than every linear map (longest side {longest}); use a smaller rank"
        )
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with _quietly(), torch.random.fork_rng(devices=[]):
        from peft import LoraConfig, TaskType, get_peft_model

        torch.manual_seed(seed)
        task = TaskType.SEQ_CLS if classifier else None
        config = LoraConfig(r=adapter.rank, target_modules="all-linear", task_type=task)
        try:
            wrapped: Any = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise UsageError(
                f"{type(model).__name__} cannot be adapted by peft: {' '.join(str(error).split())}"
            ) from error
        place = _past_forward(model)
        if place is not None:
            wrapped.unload()
            for parameter, was in asked:
                parameter.requires_grad_(was)
            raise UsageError(
                f"the adapter of weight '{place}' of {type(model).__name__} is read past its modules' forward, so method "
                f"'{adapter.kind}' cannot train it; use --method stiefel --train attention --hold, which ends in an adapter too"
            )
        return wrapped


def _longest(model: nn.Module) -> int | None:
    """The longest side of the linear maps but for the head, which PEFT does not adapt; None where there is none."""
    loose: Any = model
    found: list[Any] = [module for module in model.modules() if module is not loose.get_output_embeddings()]
    sides = [max(each.in_features, each.out_features) for each in found if hasattr(each, "in_features")]
    sides += [max(each.weight.shape) for each in found if type(each).__name__ == "Conv1D"]
    return max(sides, default=None)


def _past_forward(model: nn.Module) -> str | None:
    """The first weight that PEFT adapts as a parameter (routers and experts of mixtures), not by a layer beside a linear map."""
    for name, module in model.named_modules():
        if type(module).__name__ == "ParamWrapper":
            loose: Any = module
            return f"{name}.{loose.parameter_name}".replace(".base_layer", "")
    return None


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep back what the packages that PEFT looks for say of themselves, and its use of older names of transformers."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", r"The following \w+_pattern keys")  # PEFT's own, of mixtures
            yield
    finally:
        logging.disable(before)


def trained(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of a wrapped model is one that the adapter trains, for `Engine(select=...)`."""
    return parameter.requires_grad


def save(wrapped: Any, folder: Path) -> None:
    """Write the adapter as `PeftModel.from_pretrained(base, folder)` loads it.

    Args:
        wrapped: what `wrap` returned, its engine detached.
        folder: where to; it is created.
    """
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)


def merged(wrapped: Any) -> nn.Module:
    """The plain model with the adapter added to its weights; the adapter is gone afterwards."""
    return wrapped.merge_and_unload()
