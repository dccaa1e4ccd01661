"""Attaching: how a model computes with its variables, and how it is given back.

The class of every module that uses a trained weight is swapped for a subclass that evaluates the weight at the variable's
current point. `detach` swaps it back. Names, keys, hooks and `deepcopy` are unaffected, and no weight is written between folds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from math import prod
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from zolr import beside, merged
from zolr.errors import UsageError
from zolr.held import (
    RANK,
    compute,
    execution_device,
    is_decoded,
    is_packed,
    is_sharded,
    keep_codes,
    shape_of,
)
from zolr.probes import BLOCK
from zolr.rows import NotByRows
from zolr.subspaces import Left, Right, TwoSided
from zolr.variables import (
    BINDINGS,
    REALIZATIONS,
    Kind,
    Realization,
    Site,
    Variable,
    Variables,
    in_dtype,
    readable,
    tokens,
    widen,
)

# matrices that are trained whole and are together at most this share of the model are not worked on one by one
SMALL = 1 / 32


def _kind(module: nn.Module, parameter: str) -> Kind:
    """How a module uses a parameter; subclasses of the known types may do anything, so only exact types count."""
    if parameter == "weight":
        cls = type(module)
        if [base.__name__ for base in cls.__bases__[:1]] == [
            "FSDPModule"
        ]:  # what fully_shard makes of a class
            cls = cls.__bases__[1]
        if cls is nn.Linear or is_packed(module, parameter):
            return "linear"
        if isinstance(module, nn.Embedding) and cls is nn.Embedding:
            usual = module.max_norm is None and not (module.sparse or module.scale_grad_by_freq)
            return "embedding" if usual else "other"
        if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
            return "conv1d"
    return "other"


@contextmanager
def _shadowed(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Let the module read `tensors` instead of its parameters of the same names.

    The instance dictionary is looked up before `nn.Module.__getattr__` finds a parameter; the parameter itself stays
    registered and untouched.
    """
    try:
        for name, tensor in tensors.items():
            module.__dict__[name] = tensor
        yield
    finally:
        for name in tensors:
            if torch.compiler.is_compiling():  # torch 2.11 compiles no removal; `detach` removes it
                module.__dict__[name] = module._parameters[name]
            else:
                module.__dict__.pop(name, None)


@cache
def _attached(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `cls` that evaluates its bound weights at their variables' points."""
    around = _around(cls)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensors: dict[str, Tensor] | None = None
        side: tuple[Variable, Kind, Tensor | None] | None = None
        bindings: dict[str, tuple[Variable, Kind]] = self.__dict__[BINDINGS]
        for name, (variable, kind) in bindings.items():
            variable.touched = True
            if variable.watch is not None and (kind in ("linear", "conv1d") or isinstance(self, nn.Linear)):
                inputs = args[0] if args else next(iter(kwargs.values()), None)
                if isinstance(inputs, Tensor) and inputs.shape[-1:] == (variable.shape[1],):
                    variable.watch(inputs)
            point = variable.point()
            if variable._rows is None and args and variable.prefers_side(kind, tokens(args[0])):
                side = variable, kind, point
            else:
                dense = variable.dense(point)
                if dense is not None:
                    tensors = tensors or {}
                    tensors[name] = dense
        run = partial(compute, self, cls.forward) if side is None else partial(_with_side, cls, self, side)
        if tensors is None and around is None:
            return run(*args, **kwargs)
        with _shadowed(self, tensors or {}), nullcontext() if around is None else around(self):
            return run(*args, **kwargs)

    # a state of the model is that of the weights it computes with, and loading one makes it compute with those

    def save(self: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        cls._save_to_state_dict(self, destination, prefix, keep_vars)
        for name, (variable, _) in self.__dict__[BINDINGS].items():
            if prefix + name in destination and (live := variable.live()) is not None:
                destination[prefix + name] = live

    def load(self: Any, state: Mapping[str, Any], prefix: str, *others: Any) -> None:
        cls._load_from_state_dict(self, state, prefix, *others)  # pyright: ignore[reportArgumentType]
        for name, (variable, _) in self.__dict__[BINDINGS].items():
            if prefix + name in state:
                variable.settle()

    own = {"_save_to_state_dict": save, "_load_from_state_dict": load, "_zolr_original": cls}
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, **own})


def _around(cls: type[nn.Module]) -> Callable[[Any], AbstractContextManager[None]] | None:
    """What the forward of a module of torch has to run in that reads weights of its parts past them; None for all others."""
    if cls is nn.MultiheadAttention:
        return lambda module: as_read(module.out_proj)
    if issubclass(cls, nn.TransformerEncoder | nn.TransformerEncoderLayer):
        return _part_by_part
    return None


@contextmanager
def _part_by_part(_: nn.Module) -> Iterator[None]:
    """Keep encoder layers from the kernel that takes all of their weights at once, in evaluation without gradients."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _with_side(
    cls: type[nn.Module],
    module: nn.Module,
    side: tuple[Variable, Kind, Tensor | None],
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Output of a linear or embedding module plus the side path of its variable."""
    variable, kind, point = side
    decay = variable.decay
    if variable.stacked:
        if kind == "embedding":
            raise NotByRows(f"{variable.name} is looked up by row")
        plain = lambda x: compute(module, cls.forward, x, *args, **kwargs)  # noqa: E731
        return _rows_beside(plain, variable, x, cast(Tensor, point))
    if kind == "embedding":
        out = cls.forward(module, x, *args, **kwargs)
        out = out if decay == 1.0 else out * decay
        if point is None:
            return out
        ids = x.flatten()
        rows = variable.subspace.lift(point.to(out.dtype), ids)
        if variable.stack is not None:
            rows = rows + (variable.stack.left[ids] @ variable.stack.right.mT).to(out.dtype)
        rows = rows.reshape(out.shape)
        in_place = variable._plain and not torch.is_grad_enabled()
        return out.add_(rows) if in_place else out + rows
    if point is not None and not args and not kwargs and variable.merges(module, kind, x, point):
        subspace: Any = variable.subspace
        # what is recorded once has to hold when the coordinates have moved
        still = point is variable.value and not variable.moved and not variable.steady
        out = merged.linear(x, variable.weight, decay, subspace, point, still)
        variable.folding = variable.folds
        loose: Any = module
        return out if loose.bias is None else out + loose.bias
    if point is not None and not args and not kwargs and variable.goes_beside(module, kind, x):
        widened: Any = widen(variable.subspace, x.dtype)
        loose: Any = module
        return beside.linear(x, loose.weight, loose.bias, decay, widened, point.to(x.dtype))
    # W (decay x) + bias: the decay multiplies the weight and not the bias
    out = compute(module, cls.forward, x if decay == 1.0 else x * decay, *args, **kwargs)
    if point is None:
        return out
    stack = variable.stack
    if variable._plain and not torch.is_grad_enabled() and out.is_contiguous():
        rows = x.reshape(-1, x.shape[-1])
        if stack is None:
            factors = variable.subspace.factors(rows, in_dtype(point, x.dtype))
        else:  # one product for the window and the stack: they read x and write out once
            live = widen(variable.subspace, x.dtype).outer(point.to(x.dtype))
            left = torch.cat([live[0], stack.left.to(x.dtype)], dim=1)  # (m, r + k)
            factors = rows @ torch.cat([live[1].mT, stack.right.to(x.dtype)], dim=1), left.mT
        assert factors is not None  # Full subspaces never take the side path
        # under autocast the output is narrower than the factors, and in-place products do not cast
        out.view(-1, out.shape[-1]).addmm_(in_dtype(factors[0], out.dtype), in_dtype(factors[1], out.dtype))
        return out
    if stack is None:
        return out + variable.subspace.apply(x, point.to(x.dtype))
    # apart from the window's product: autograd saves the inputs of that one alone
    out = out + widen(variable.subspace, x.dtype).apply(x, point.to(x.dtype))
    return out + (x @ stack.right.to(x.dtype)) @ stack.left.mT.to(x.dtype)


def _rows_beside(plain: Callable[[Tensor], Tensor], variable: Variable, x: Tensor, points: Tensor) -> Tensor:
    """Output of a linear module plus the side path of its variable, at one point for each of equal parts of the rows.

    Args:
        plain: the module itself.
        x: `(k b, ..., n)`, the rows of `k` parts behind each other.
        points: `(k, *coords_shape)`.
    """
    # without an axis between, rows may be those that the model has picked for this module, as many of each part or not
    if x.dim() < 3 or len(x) % len(points):
        raise NotByRows(
            f"the inputs {tuple(x.shape)} of {variable.name} do not say which rows they belong to"
        )
    subspace = variable.subspace
    if not isinstance(subspace, Right | Left | TwoSided):
        raise NotByRows(f"{variable.name} has coordinates in a {type(subspace).__name__.lower()} subspace")
    out = plain(x if variable.decay == 1.0 else x * variable.decay)
    if not out.is_contiguous():
        raise NotByRows(f"the output of {variable.name} is a view")
    parts = x.reshape(len(points), -1, x.shape[-1])
    inner, outer = (
        in_dtype(factor, out.dtype) for factor in subspace.factors(parts, in_dtype(points, x.dtype))
    )
    out.view(len(points), -1, out.shape[-1]).baddbmm_(inner, outer.expand(len(points), -1, -1))
    if variable.stack is not None:
        left, right = variable.stack.left.to(x.dtype), variable.stack.right.to(x.dtype)
        seen = x.reshape(-1, x.shape[-1]) @ right
        out.view(-1, out.shape[-1]).addmm_(in_dtype(seen, out.dtype), in_dtype(left.mT, out.dtype))
    return out


@contextmanager
def as_read(module: nn.Module) -> Iterator[None]:
    """Have a module's trained weights read as they are evaluated, by who does not go through its forward."""
    tensors: dict[str, Tensor] = {}
    bindings: dict[str, tuple[Variable, Kind]] = module.__dict__.get(BINDINGS, {})
    for name, (variable, _) in bindings.items():
        variable.touched = variable.lent = True
        dense = variable.dense(variable.point())
        if dense is not None:
            tensors[name] = dense
    try:
        with _shadowed(module, tensors):
            yield
    finally:
        for variable, _ in bindings.values():
            variable.lent = False


def multiplied_with(module: nn.Module) -> Tensor | None:
    """The matrix `W` for which a module gives `x Wᵀ` now and does nothing else, for who takes gradients of it by hand.

    None where it adds a bias or a path beside, is of another type, or is watched by hooks.
    """
    cls = getattr(type(module), "_zolr_original", type(module))
    loose: Any = module
    hooks = (loose._forward_hooks, loose._forward_pre_hooks, loose._backward_hooks, loose._backward_pre_hooks)
    if cls is not nn.Linear or module.bias is not None or "forward" in module.__dict__ or any(hooks):
        return None
    bindings: dict[str, tuple[Variable, Kind]] = module.__dict__.get(BINDINGS, {})
    if "weight" not in bindings:
        return None if is_packed(module, "weight") or is_sharded(loose.weight) else loose.weight
    variable, _ = bindings["weight"]
    if not variable.is_full or variable.held or not variable.plain or variable.watch is not None:
        return None
    variable.touched = True
    dense = variable.dense(variable.point())
    return loose.weight if dense is None else dense


def binds(module: Any, variable: Variable) -> bool:
    """Whether something is a module that computes with a variable."""
    bindings = module.__dict__.get(BINDINGS, {}) if isinstance(module, nn.Module) else {}
    return any(bound is variable for bound, _ in bindings.values())


def is_attached(model: nn.Module) -> bool:
    """Whether some module computes with the variables of a run."""
    return any(BINDINGS in module.__dict__ for module in model.modules())


def attach(
    model: nn.Module,
    select: Callable[[str, nn.Parameter], bool],
    realization: Realization = "auto",
    *,
    hold: Callable[[str, nn.Parameter], bool] | bool = False,
    cap: int = RANK,
) -> Variables:
    """Make variables of the selected weights of a model and let the model compute with them.

    Every use of a selected parameter becomes a site of the same variable. All parameters of the model stop requiring
    gradients (gradients are taken in the variables' values); `detach` restores that.

    Args:
        select: of a parameter's first name and the parameter, whether to train it.
        realization: how a perturbation reaches a weight; "auto" picks per site by the bytes moved.
        hold: of a parameter's first name and the parameter, whether never to write it (see `zolr.held`); quantized
            and offloaded weights are held in any case.
        cap: rank of what is kept beside a held matrix at most.

    Raises:
        UsageError: nothing selected, a model attached already, an unknown realization, or a weight that it, or the
            module it is in, does not allow.
    """
    if realization not in REALIZATIONS:
        raise UsageError(f"realization '{realization}' is not known; use one of {', '.join(REALIZATIONS)}")
    sites: dict[int, list[Site]] = {}
    first: dict[int, tuple[str, nn.Parameter]] = {}
    tied = _tied_while_away(model)
    for module_name, module in model.named_modules():
        if BINDINGS in module.__dict__:
            raise UsageError(f"module '{module_name}' is attached to a run already; detach that run first")
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full_name = f"{module_name}.{name}" if module_name else name
            code = tied.get(full_name, id(parameter))
            first.setdefault(code, (full_name, parameter))
            sites.setdefault(code, []).append(Site(module_name, module, name, _kind(module, name)))
    trained = {
        code: sites[code]
        for code, (name, p) in first.items()
        if (
            p.is_floating_point()
            or p.is_complex()
            or is_packed(sites[code][0].module, sites[code][0].parameter)
        )
        and p.numel()  # a layer without outputs has nothing to train
        and select(name, p)
    }
    for code, group in trained.items():
        _check_trainable(*first[code], group)
    chosen = list(trained.values())
    if not chosen:
        raise UsageError(
            "no weight of the model is selected for training (a head that is tied to an embedding counts as one); widen the "
            "selection (select='all', --train all)"
        )
    dtype = next((p.dtype for _, p in first.values() if p.is_floating_point()), torch.float32)
    held = [hold if isinstance(hold, bool) else hold(*first[code]) for code in trained]
    for group, wanted in zip(chosen, held, strict=True):
        _check_held(group, realization, wanted)
    variables = [
        Variable(group, realization, held=wanted, cap=cap, dtype=dtype)
        for group, wanted in zip(chosen, held, strict=True)
    ]
    _mark_small(variables, sum(parameter.numel() for _, parameter in first.values()))
    for variable in variables:
        for site in variable.sites:
            module = site.module
            if BINDINGS not in module.__dict__:
                module.__dict__[BINDINGS] = {}
                _become(module, _attached(type(module)))
            module.__dict__[BINDINGS][site.parameter] = (variable, site.kind)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if BINDINGS in module.__dict__:
            continue
        # not trained, but in the way of backward, or reads what is trained in its parts
        if is_decoded(module) or (_around(type(module)) is not None and is_attached(module)):
            module.__dict__[BINDINGS] = {}
            _become(module, _attached(type(module)))
    return Variables(variables)


def _mark_small(variables: Sequence[Variable], entries: int) -> None:
    """Say which matrices are so small beside the model, all together, that a direction over them may be drawn and applied whole.

    A draw for each of them, at every use anew, would cost many times as many calls as the forward pass itself: adapters are
    hundreds of such matrices.

    Args:
        entries: of all weights of the model.
    """
    left = entries * SMALL
    for variable in sorted(variables, key=lambda variable: prod(variable.shape)):
        left -= prod(variable.shape)
        variable.small = left >= 0 and prod(variable.shape) <= BLOCK // 4


def _check_trainable(name: str, parameter: nn.Parameter, sites: Sequence[Site]) -> None:
    """Refuse what would be trained by nobody, without a word."""
    if parameter.is_complex():
        raise UsageError(
            f"weight '{name}' is complex, which no method here trains; leave it out with a narrower selection, or make it of two "
            "real ones"
        )
    for site in sites:
        for hook in site.module._forward_pre_hooks.values():
            kind = type(hook).__name__
            if kind in ("WeightNorm", "SpectralNorm") and type(hook).__module__.startswith("torch.nn.utils."):
                raise UsageError(
                    f"{kind} of torch.nn.utils puts weight '{name}' to use before the forward of its module, where nothing moves it; "
                    "use torch.nn.utils.parametrizations, which does not"
                )
            if isinstance(hook, BasePruningMethod):
                raise UsageError(
                    f"pruning ({kind}) puts weight '{name}' to use before the forward of its module, where nothing moves it; make it "
                    "lasting by torch.nn.utils.prune.remove, or mask by a parametrization"
                )


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a module, also below a hook of accelerate, which keeps the forward that it calls."""
    module.__class__ = cls
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = MethodType(cls.forward, module)


def _tied_while_away(model: nn.Module) -> dict[str, int]:
    """Identities of weights that transformers ties: offloaded ones are no longer the same object in both places."""
    names: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: id(parameters[source])
        for name, source in names.items()
        if name in parameters and source in parameters and parameters[name].device.type == "meta"
    }


def _check_held(sites: Sequence[Site], realization: Realization, wanted: bool) -> None:
    """Refuse what a weight that is not written, or cannot be read, does not allow."""
    name, places = sites[0].name, [(site.module, site.parameter) for site in sites]
    all_there = all(readable(*place) for place in places)
    if all_there and not wanted:
        return
    away = "is sharded" if is_sharded(sites[0].weight) else "is offloaded"
    why = "is held" if all_there else "is quantized" if is_packed(*places[0]) else away
    if realization == "inplace" or (realization == "rebuild" and not all_there):
        raise UsageError(
            f"weight '{name}' {why}, so realization '{realization}' cannot reach it; use 'auto' or 'side'"
        )
    dims = len(shape_of(*places[0]))
    if (not all_there and dims > 1 and any(site.kind == "other" for site in sites)) or dims > 2:
        raise UsageError(
            f"weight '{name}' {why}, and what {type(sites[0].module).__name__} does with it is not known; "
            "leave it out with a narrower selection (--train attention, or the like)"
        )
    if sites[0].weight.device.type == "meta" and execution_device(sites[0].module) is None:
        raise UsageError(f"weight '{name}' holds no numbers (device 'meta'); load the model first")
    for module, _ in places:
        keep_codes(module)


def detach(model: nn.Module, trainable: Sequence[str] | None = None) -> nn.Module:
    """Give every module its own class back; weights are left as they are (fold first).

    Args:
        trainable: names of parameters that shall require gradients again.
    """
    for module in model.modules():
        if BINDINGS in module.__dict__:
            del module.__dict__[BINDINGS]
            for parameter in module._parameters:
                module.__dict__.pop(parameter, None)  # see `_shadowed`
            _become(module, type(module)._zolr_original)  # type: ignore[attr-defined]
    if trainable is not None:
        wanted = set(trainable)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in wanted:
                parameter.requires_grad_(True)
    return model
