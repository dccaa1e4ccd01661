"""Base optimizers: torch.optim classes over the values, chosen by name, and only the rules that torch lacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from zolr.errors import UsageError

ADAM_DEGREES = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


@dataclass(frozen=True)
class OptimizerRule:
    """An optimizer class of torch with settings; weight decay is the engine's and passed as 0.

    Args:
        name: key in `OPTIMIZERS`, or the name of any class of torch.optim.
        settings: keyword arguments other than `lr` and `weight_decay`.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = str(self.name)
        if name not in (*OPTIMIZERS, *PACKAGED) and not _is_torch_class(name):
            close = get_close_matches(name, (*OPTIMIZERS, *PACKAGED), n=1, cutoff=0.4)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise UsageError(
                f"optimizer '{name}' is not known; {hint}use one of {', '.join(OPTIMIZERS)}, or a class of torch.optim"
            )
        if name in OPTIMIZERS and not isinstance(OPTIMIZERS[name], Entry):
            raise UsageError(
                f"OPTIMIZERS['{name}'] is no zolr.optim.Entry; register the class as Entry(cls), with what is known of its state"
            )

    @property
    def degrees(self) -> Mapping[str, int] | None:
        """Homogeneity of each state tensor in the gradient, None when unknown."""
        return OPTIMIZERS[self.name].degrees if self.name in OPTIMIZERS else None

    @property
    def normalizes(self) -> bool:
        """Whether a step's size does not depend on that of the gradient."""
        return OPTIMIZERS[self.name].normalizes if self.name in OPTIMIZERS else self.name != "SGD"

    @property
    def reads_values(self) -> bool:
        """Whether a step depends on where the values are, or may: the rates of some rules grow with their size."""
        known = OPTIMIZERS.get(self.name)
        return known is None or bool({**known.settings, **self.settings}.get("scaled"))

    @property
    def has_momentum(self) -> bool:
        """Whether plain steps go on in the direction of earlier ones."""
        known = OPTIMIZERS[self.name].settings if self.name in OPTIMIZERS else {}
        settings = {**known, **self.settings}
        return not self.normalizes and bool(settings.get("momentum", 0) or settings.get("beta", 0))

    @property
    def owns_rank(self) -> bool:
        """Whether the rule has subspaces of its own, whose rank is a setting of it."""
        return self.name in OPTIMIZERS and "rank" in OPTIMIZERS[self.name].settings

    @property
    def known(self) -> tuple[str, ...]:
        """Names of its settings; the rate and the decay are the engine's."""
        if self.name in PACKAGED:
            cls: Any = _packaged(self.name)
        else:
            cls = OPTIMIZERS[self.name].cls if self.name in OPTIMIZERS else getattr(torch.optim, self.name)
        return tuple(n for n in list(signature(cls).parameters)[1:] if n not in ("lr", "weight_decay"))

    def build(
        self, values: Sequence[nn.Parameter], lr: float, tables: Sequence[nn.Parameter] = ()
    ) -> torch.optim.Optimizer:
        """The optimizer over the values.

        Args:
            tables: those of the values that belong to embeddings and heads. Their rows are vectors that meet gradients
                one by one: a rule that moves a matrix as a whole (Muon) leaves them to AdamW (Jordan et al. 2024).
        """
        if self.name not in OPTIMIZERS:
            cls = _packaged(self.name) if self.name in PACKAGED else getattr(torch.optim, self.name)
            return _construct(cls, values, lr, dict(self.settings))
        entry = OPTIMIZERS[self.name]
        settings = {**entry.settings, **self.settings}
        if entry.matrices_only is None:
            return _construct(entry.cls, values, lr, settings)
        apart = {id(v) for v in tables}
        matrices = [v for v in values if v.dim() == 2 and id(v) not in apart]
        vectors = [v for v in values if v.dim() != 2]
        inner = [_construct(entry.cls, matrices, lr, settings)] if matrices else []
        if vectors:
            inner.append(_construct(entry.matrices_only, vectors, lr, dict(entry.vectors)))
        if apart:
            inner.append(_construct(entry.matrices_only, tables, lr, dict(entry.tables)))
        return inner[0] if len(inner) == 1 else ByShape(inner)


@dataclass(frozen=True)
class Entry:
    """One known optimizer.

    Args:
        cls: class of torch.optim.
        settings: our defaults where they differ from torch's.
        degrees: homogeneity of each state tensor in the gradient; None refuses transport 'align'.
        matrices_only: class that takes all tensors but matrices between hidden states, for a rule that refuses them.
        tables: its settings for embeddings and heads.
        vectors: its settings for everything else.
        normalizes: a step's size does not depend on that of the gradient.
    """

    cls: type[torch.optim.Optimizer]
    settings: Mapping[str, Any] = field(default_factory=dict)
    degrees: Mapping[str, int] | None = None
    matrices_only: type[torch.optim.Optimizer] | None = None
    tables: Mapping[str, Any] = field(default_factory=dict)
    vectors: Mapping[str, Any] = field(default_factory=dict)
    normalizes: bool = True


class Each(torch.optim.Optimizer):
    """A rule that moves one value after the other; a subclass says how."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        if closure is not None:
            raise ValueError(f"{type(self).__name__} takes no closure; compute gradients before the step")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)

    def _move(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """One step on one parameter."""
        raise NotImplementedError


from zolr.optim.averaged import Averaged  # noqa: E402  (the files build on what is above)
from zolr.optim.by_shape import ByShape  # noqa: E402
from zolr.optim.factored import Factored  # noqa: E402
from zolr.optim.mofasgd import MomentumFactorizedSgd  # noqa: E402
from zolr.optim.optimistic import Optimistic  # noqa: E402
from zolr.optim.portable import Portable  # noqa: E402

_MEAN = {"step": 0, "exp_avg": 1}
FUSED = {"fused": True}
_ADAFACTOR = {"beta": 0.9, "scaled": True}
OPTIMIZERS: dict[str, Entry] = {
    "sgd": Entry(Portable, degrees={"momentum_buffer": 1}, normalizes=False),
    "momentum": Entry(
        Portable, {"momentum": 0.9, "dampening": 0.9}, {"momentum_buffer": 1}, normalizes=False
    ),
    "optimistic": Entry(Optimistic, degrees={"previous": 1}, normalizes=False),
    # fused: one kernel, and no temporaries as large as all values together, which foreach has
    "adamw": Entry(torch.optim.AdamW, FUSED, ADAM_DEGREES),
    # torch's own scales by the size of the parameter, which is zero where coordinates begin
    "adafactor": Entry(Factored),
    "adalomo": Entry(Factored, {"scaled": True}),
    "averaged": Entry(
        Averaged, {"beta": 0.9}, {**_MEAN, **ADAM_DEGREES}, matrices_only=torch.optim.AdamW, normalizes=False
    ),
    # a mean of what was divided before it came here (residual `precondition`); all else by Adafactor itself
    "flora": Entry(
        Averaged, {"beta": 0.9}, _MEAN, matrices_only=Factored, tables=_ADAFACTOR, vectors=_ADAFACTOR
    ),
    "mofasgd": Entry(
        MomentumFactorizedSgd,
        {"rank": 16},
        matrices_only=torch.optim.AdamW,
        tables={"betas": (0.9, 0.95)},
    ),
    "muon": Entry(
        torch.optim.Muon,
        {"adjust_lr_fn": "match_rms_adamw"},
        {"momentum_buffer": 1, **ADAM_DEGREES},
        matrices_only=torch.optim.AdamW,
        tables={"betas": (0.9, 0.95), "fused": True},
    ),
}

PACKAGED: dict[str, tuple[str, str]] = {"adamw8bit": ("bitsandbytes.optim", "AdamW8bit")}
"""Rules of packages that a run needs only if it asks for them, by module and class (extra 'quant')."""

_REFUSED = {"LBFGS": "it needs several evaluations a step", "SparseAdam": "it needs sparse gradients"}


def _packaged(name: str) -> type[torch.optim.Optimizer]:
    module, cls = PACKAGED[name]
    try:
        return getattr(import_module(module), cls)
    except ImportError as error:
        raise UsageError(
            f"optimizer '{name}' needs the package {module.split('.')[0]} ({error}); pip install 'zolr[quant]', or use "
            "optimizer 'adamw'"
        ) from error


def _is_torch_class(name: str) -> bool:
    if name in _REFUSED:
        raise UsageError(
            f"optimizer '{name}' cannot be used ({_REFUSED[name]}); use adamw, sgd or another class"
        )
    cls = getattr(torch.optim, name, None)
    return (
        isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    )


def _construct(
    cls: type[torch.optim.Optimizer], values: Sequence[nn.Parameter], lr: float, settings: dict[str, Any]
) -> torch.optim.Optimizer:
    if settings.get("fused") and not all(value.is_contiguous() for value in values):
        # torch's fused kernels go by memory and not by strides: entries would meet the gradients of others
        settings = {**settings, "fused": False, "foreach": False}
    try:
        optimizer = cls(list(values), lr=lr, **settings)  # type: ignore[call-arg]
    except (ValueError, TypeError, IndexError) as error:
        given = f" with {settings}" if settings else ""
        near = f", or optimizer '{cls.__name__.lower()}'" if cls.__name__.lower() in OPTIMIZERS else ""
        raise UsageError(
            f"optimizer '{cls.__name__}'{given} cannot train these weights: {error}; use other settings{near}"
        ) from error
    if optimizer.state:
        optimizer.register_step_pre_hook(_begin)
    for group in optimizer.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0  # decay acts on the weight and is the engine's
    return optimizer


def _begin(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Make state for values that have none, for a class that makes it when it is made itself (Adagrad before torch 2.13)."""
    values = [p for group in optimizer.param_groups for p in group["params"]]
    new = [p for p in values if p.grad is not None and not optimizer.state.get(p)]
    if new:
        made: Any = type(optimizer)
        optimizer.state.update(made(new, **optimizer.defaults).state)
