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
        UsageError: the package is missing, or it finds nothing in this model to adapt.
    """
    check_installed(adapter)
    with _quietly(), torch.random.fork_rng(devices=[]):
        from peft import LoraConfig, TaskType, get_peft_model

        torch.manual_seed(seed)
        task = TaskType.SEQ_CLS if classifier else None
        config = LoraConfig(r=adapter.rank, target_modules="all-linear", task_type=task)
        try:
            return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise UsageError(
                f"{type(model).__name__} cannot be adapted by peft: {' '.join(str(error).split())}"
            ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep back what the packages that PEFT looks for say of themselves, and its use of older names of transformers."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
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
