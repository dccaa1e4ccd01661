"""Training and evaluation mode of a model, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training mode or not inside the context, each module as it was after it.

    In a model in training mode, modules in evaluation mode (frozen batch norms) stay in it where training mode is asked for.
    """
    before = [(module, module.training) for module in model.modules()]
    if (training and model.training) or all(was is training for _, was in before):
        yield
        return
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was
