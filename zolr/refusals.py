"""What an engine refuses before it trains: arguments, models and losses that would fail later, or train nothing."""

import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from zolr.distributed import Team
from zolr.errors import UsageError, check_numbers, is_count
from zolr.estimators import setting
from zolr.estimators.forward import Forward
from zolr.estimators.spsa import Spsa
from zolr.held import shapes
from zolr.methods import Method
from zolr.projectors.identity import Identity
from zolr.variables import Variable


def check_arguments(
    method: Any,
    lr: float | None,
    *,
    model: Any,
    loss: Any,
    select: Any,
    seed: Any,
    weight_decay: float,
    schedule: Any,
    clip: float | None,
    realization: str,
    hold: Any,
    hold_rank: Any,
    compile: bool,
    team: Any,
) -> None:
    """Refuse arguments of `Engine` that are of another kind, out of range, or contradict each other.

    Raises:
        UsageError: as said.
    """
    if not isinstance(method, Method):
        raise UsageError(
            f"method = {method!r} is no method; use zolr.compose({str(method)!r}, 'zo') or the like"
        )
    for name, value, fits, wanted in (
        ("model", model, isinstance(model, nn.Module), "a torch.nn.Module"),
        ("loss", loss, callable(loss), "a function of the model and a batch"),
        (
            "select",
            select,
            isinstance(select, str) or callable(select),
            "words joined by '+', or a predicate of name and parameter",
        ),
        (
            "schedule",
            schedule,
            schedule is None or callable(schedule),
            "a function of the step or of the optimizer",
        ),
        (
            "hold",
            hold,
            isinstance(hold, bool) or callable(hold),
            "True, or a predicate of name and parameter",
        ),
        ("team", team, isinstance(team, Team | None), "a zolr.distributed.Team"),
        ("seed", seed, isinstance(seed, Integral) and not isinstance(seed, bool), "a whole number"),
    ):
        if not fits:
            raise UsageError(f"{name} = {value!r} cannot be used; give {wanted}")
    check_numbers(lr=lr, weight_decay=weight_decay, clip=clip)
    if lr is not None and not 0 < lr < float("inf"):
        raise UsageError(f"lr = {lr} is no learning rate; use a positive number")
    if lr is None and (method.paradigm != "zo" or method.private):
        why = "a private method" if method.private else f"paradigm '{method.paradigm}'"
        raise UsageError(f"{why} needs a learning rate; give lr")
    if lr is None and (not method.tunable or not method.has_radius):
        raise UsageError("the rate of this estimator cannot be measured; give lr")
    if not method.measurable and method.has_radius and method.radius is None:
        raise UsageError(
            "this estimator has no slope between two points that a radius could be measured by; give eps"
        )
    if not 0 <= weight_decay < float("inf") or (clip is not None and not clip > 0):
        raise UsageError(
            f"weight_decay = {weight_decay} or clip = {clip} is out of range; use a finite decay of at least 0, and a "
            "positive norm"
        )
    if not is_count(hold_rank):
        raise UsageError(f"hold_rank = {hold_rank!r} is no rank; use a whole number of at least 1")
    if realization == "inplace" and setting(method.estimator, "signs", "sequence") != "sequence":
        raise UsageError(
            "realization 'inplace' holds one sign at a time; use signs 'sequence', or realization 'auto'"
        )
    if compile and method.dense:
        raise UsageError(
            "compile records the backward pass as a whole, and a dense method takes its gradients one by one; "
            "leave compile out"
        )
    if team is not None and team.spread == "probes" and not isinstance(method.estimator, Spsa | Forward):
        raise UsageError(
            f"estimator '{type(method.estimator).__name__.lower()}' has no probes that ranks could share; spread batches"
        )


def check_readable(model: nn.Module) -> None:
    """Refuse a model whose weights are not there yet, or whose forward cannot be changed.

    Raises:
        UsageError: as said, with the weight or module.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UsageError(
            "the model is wrapped for gradients that are exchanged in full; give the module inside (model.module), and "
            "team=zolr.distributed.Processes() for several ranks"
        )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise UsageError(
                f"weight '{name}' has no shape before the first forward; call the model on a batch, and make the Engine after that"
            )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                f"module '{name}' is compiled by torch.jit, which leaves nothing to put a step into; train the module that it was made "
                "of"
            )


def check_rank(method: Method, model: nn.Module, predicate: Callable[..., bool]) -> None:
    """Refuse a rank above the longest side of every matrix that a predicate of name and parameter chooses.

    Raises:
        UsageError: as said.
    """
    rank = getattr(method.projector, "rank", None)
    if rank is None:
        return
    sizes = shapes(model)
    sides = [max(sizes[n]) for n, p in model.named_parameters() if len(sizes[n]) == 2 and predicate(n, p)]
    if sides and rank > max(sides):
        raise UsageError(
            f"rank {rank} is larger than every trained matrix (longest side {max(sides)}); "
            "use a smaller rank, or projector 'identity' for the whole space"
        )


def check_sparse(method: Method, variables: Sequence[Variable]) -> None:
    """Refuse embeddings whose gradients are sparse, under backprop.

    Raises:
        UsageError: as said, with the embedding.
    """
    for variable in variables if method.paradigm == "fo" else ():
        if any(
            isinstance(s.module, nn.Embedding | nn.EmbeddingBag) and s.module.sparse for s in variable.sites
        ):
            raise UsageError(
                f"embedding '{variable.name}' has sparse gradients, which no method takes; build it with sparse=False"
            )


def check_held(method: Method, variables: Sequence[Variable], weight_decay: float) -> None:
    """Refuse what held weights do not allow: decay, dense or whole updates, and offloading beside a backward pass.

    Raises:
        UsageError: as said, with the first such weight.
    """
    held = [v for v in variables if v.held]
    if not held:
        return
    first = f"weight '{held[0].name}' is never written (quantized, offloaded, sharded, or held on request)"
    if weight_decay:
        raise UsageError(
            f"{first}, so it cannot decay; leave out weight_decay = {weight_decay}, or train plain weights"
        )
    coded = any(v.stack is not None for v in held)
    if coded and method.dense and not isinstance(method.projector, Identity):
        raise UsageError(
            f"{first}, so a method that moves weights by their dense gradients at every step cannot train it; use one that "
            "moves coordinates, such as 'stiefel'"
        )
    if coded and isinstance(method.projector, Identity):
        raise UsageError(
            f"{first}, so it cannot be trained as a whole; use a method with subspaces, such as 'stiefel'"
        )
    if method.paradigm != "zo" and any(v.offloaded for v in held):
        raise UsageError(
            f"{first}, and offloaded weights are gone by the time of a backward pass; use paradigm 'zo'"
        )


def check_pair(loss: Any) -> None:
    """Refuse, or point at, a pair of numbers whose second one does not count.

    Raises:
        UsageError: a sum of something over nothing.
    """
    if not (isinstance(loss, tuple) and len(loss) == 2):
        return
    if not all(isinstance(x, Real) or (isinstance(x, Tensor) and x.numel() == 1) for x in loss):
        return  # `estimators.totals` says what that is
    try:
        total, count = (float(x.detach()) if isinstance(x, Tensor) else float(x) for x in loss)
    except RuntimeError:  # nobody can look at it: several points at once, or a prediction without numbers
        return
    said = f"the loss is the pair ({total:.4g}, {count:.4g}), which is read as (sum, count)"
    if count <= 0 and total != 0:
        raise UsageError(f"{said}; return the number of examples in the sum, or the loss alone")
    if not count.is_integer():
        warnings.warn(f"{said}; return the loss alone if the second is no number of examples", stacklevel=2)


def is_compiled(model: nn.Module, loss: Any) -> bool:
    """Whether the owner of a model and its loss has had any of them compiled."""
    own = hasattr(loss, "_torchdynamo_orig_callable")
    return own or any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())
