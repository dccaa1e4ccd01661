"""What each weight of a model is, and which of them to train by that."""

import re
from collections.abc import Callable

from torch import Tensor, nn

from zolr.errors import UsageError
from zolr.held import shapes

CATEGORIES = ("attention", "linear", "head", "embedding", "bias", "norm")

TABLES = ("embedding", "head")  # what has a row for each token

# modules that only a classifier has, by the names that families give them, and the pooler that it alone reads
CLASSIFIER = re.compile(
    r"^(classifier|pre_classifier|classification_head|score|sequence_summary|logits_proj|head\.dense|head\.norm|pooler)\.|\.pooler\."
)


def categories(model: nn.Module) -> dict[str, str]:
    """What each parameter of a model is, by its first name: attention (a matrix of a module whose name says so), linear
    (any other), head, embedding, bias or norm.

    A head is a linear map to as many outputs as an embedding of the model has rows; a weight that is both (tied) counts
    as an embedding.
    """
    vocabulary = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    result, sizes = {}, shapes(model)
    for name, parameter in model.named_parameters():
        shape = sizes[name]
        if id(parameter) in embeddings:
            result[name] = "embedding"
        elif len(shape) >= 2:
            big = shape[0] in vocabulary and shape[0] > 2 * shape[1]
            inner = "attention" if re.search(r"attn|attention", name) else "linear"
            result[name] = "head" if big else inner
        else:
            result[name] = "bias" if name.endswith("bias") else "norm"
    return result


def selection(model: nn.Module, select: str | Callable[[str, nn.Parameter], bool]) -> Callable[..., bool]:
    """A predicate on parameters from a word: "all", or categories joined by "+", such as "linear+norm".

    "linear" includes the matrices of attention; "attention" is these alone. "head" includes all of a classification head, which
    has no kind of its own.

    Raises:
        UsageError: an unknown category.
    """
    if callable(select):
        return select
    wanted = set(CATEGORIES) if select == "all" else set(select.split("+"))
    unknown = sorted(wanted - set(CATEGORIES))
    if unknown:
        raise UsageError(
            f"'{unknown[0]}' is no kind of weight; train 'all', or some of {', '.join(CATEGORIES)} joined by '+'"
        )
    if "linear" in wanted:
        wanted.add("attention")
    kinds = categories(model)
    return lambda name, _: kinds.get(name) in wanted or ("head" in wanted and bool(CLASSIFIER.search(name)))


def left_alone(model: nn.Module) -> set[str]:
    """Names of plain parameters that the model's owner has frozen; codes, sharded and offloaded weights say nothing by that."""
    return {
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if not p.requires_grad
        and p.is_floating_point()
        and type(p.data) is Tensor
        and p.device.type != "meta"
    }
