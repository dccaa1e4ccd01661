"""Engine: one model, one method, one optimizer; step, fold, save."""

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import inf, isfinite, prod, sqrt
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from zolr.attaching import attach, detach, is_attached
from zolr.compiled import Compiled
from zolr.dense import Core
from zolr.distributed import Share, Team, digest
from zolr.errors import StorageError, UsageError
from zolr.estimators import (
    SIGNS,
    Estimate,
    Measuring,
    Repeatable,
    changed,
    mean_loss,
    owners,
    rows_of,
    same_noise,
    setting,
)
from zolr.estimators.spsa import Spsa
from zolr.held import RANK, is_sharded, shapes
from zolr.keys import Key
from zolr.kinds import TABLES, categories, left_alone, selection
from zolr.layers import blocks_of
from zolr.methods import Method
from zolr.modes import mode
from zolr.norms import Running, put_back
from zolr.projectors.identity import Identity
from zolr.reads import Reads, TakenApart
from zolr.refusals import (
    check_arguments,
    check_held,
    check_pair,
    check_rank,
    check_readable,
    check_sparse,
    is_compiled,
)
from zolr.rows import NotByRows, repeated
from zolr.subspaces import Subspace
from zolr.tuning import Caution, Tuning, tune
from zolr.undo import Undo
from zolr.variables import Gathered, Realization, Variable, Variables, commit
from zolr.verify import verify
from zolr.windows import Windows, check_alike

NON_FINITE_LIMIT = 20  # steps in a row without a finite loss: by then waiting longer has never helped
NOTED_LOSS = 0.01  # share of what held weights were moved by; a user hears of more

LARGEST_SLOPE = torch.finfo(torch.float32).max

Loss = Callable[[nn.Module, Any], Any]
Schedule = Callable[[Any], Any]


@dataclass(frozen=True)
class Info:
    """What a step did; for people, nothing the next step needs is in it.

    Args:
        loss: mean loss before the update.
        slope: root mean square of the step's directional derivatives; None under backprop.
        lr: learning rate of the step.
        skipped: the loss or a gradient was not finite, and nothing was changed.
        forwards: forward passes spent so far in this step (a backward counts as two), tuning included.
        refreshed: a new window began.
    """

    loss: float
    slope: float | None
    lr: float
    skipped: bool
    forwards: int
    refreshed: bool


@dataclass(frozen=True)
class Made:
    """What a step without backprop was made from: with the run's seed all that `Engine.again` needs to make it again.

    Args:
        loss, lr: as in `Info`.
        slopes: as `estimators.Found.recorded` has them.
        forwards: as in `Info`.
        tuning: what was chosen on this step, as `tuning.Tuning.as_dict` gives it.
        signs: how signs are evaluated from this step on, where that was settled on it.
        bases: hash of the subspaces of a window that began with this step.
        skipped: as in `Info`.
    """

    loss: float
    lr: float
    slopes: tuple[float, ...]
    forwards: int
    tuning: dict[str, Any] | None = None
    signs: str | None = None
    bases: str | None = None
    skipped: bool = False


@dataclass(frozen=True)
class _Seen:
    """What the host knows of a step: mean loss, root mean square of the slopes, whether all of it is finite, and its record."""

    loss: float
    slope: float | None
    finite: bool
    record: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Numbers:
    """What of an engine is no tensor of a variable, as it was when a step began."""

    counts: dict[str, Any]
    choices: dict[str, Any]
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any] | None

    @staticmethod
    def of(engine: "Engine") -> "_Numbers":
        """Those of an engine."""
        counts = ("step_count", "_refreshed_at", "_period", "active", "_resting", "_norm")
        choices = ("method", "tuning", "_tune", "_signs", "base_lr", "_scheduler")
        scheduler = engine._scheduler
        return _Numbers(
            {name: getattr(engine, name) for name in counts},
            {name: getattr(engine, name) for name in choices} | {"_caution": copy.copy(engine._caution)},
            [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups],
            None if scheduler is None else copy.deepcopy(_plain(scheduler.state_dict())),
        )

    def put_back(self, engine: "Engine", choices: bool) -> None:
        """Have the engine have them again.

        Args:
            choices: those too that were made for all steps.
        """
        vars(engine).update(self.counts)
        if choices:
            vars(engine).update(self.choices)
            for group, old in zip(engine.optimizer.param_groups, self.groups, strict=True):
                own = group["params"]
                group.clear()
                group.update(old, params=own)
            if self.scheduler is not None and engine._scheduler is not None:
                engine._scheduler.load_state_dict(self.scheduler)


@dataclass(frozen=True)
class _ByRows:
    """A loss that may be given the rows of a batch several times, where the model keeps rows apart.

    Args:
        loss: of a batch.
        apart: says why rows that are added to a batch would not leave the others as they are; empty where they do.
    """

    loss: Callable[[Any], Any]
    apart: Callable[[], str]

    def __call__(self, batch: Any) -> Any:
        return self.loss(batch)

    def on_rows(self, batch: Any, count: int) -> Any:
        """The same of a batch whose rows are there so often (see `estimators.evaluate`)."""
        if why := self.apart():
            raise NotByRows(why)
        return self.loss(repeated(batch, count))


class _NonFinite(Exception):
    """The loss of a streamed step is not finite."""


class Engine:
    """Trains a model by a method.

    Args:
        model: any torch module; it computes with the live coordinates until `detach`. A step runs it in training mode under `fo`, also
            where it is given in evaluation mode (dropout is then on), and in evaluation mode under `zo` and `fwd`; modules in
            evaluation mode inside a model in training mode (frozen batch norms) stay in it.
        method: what to do (see `methods.compose`).
        lr: learning rate, positive. None, under zo, is chosen on the first step, as `eps` is when the method has
            none (see `tuning`).
        loss: of the model and a batch; a scalar mean, a `(sum, count)` pair, or per-example losses. Any pair of numbers is taken
            for a sum and how many numbers it has: an accuracy, or a number of hits, does not belong there.
        select: which weights to train: "all", categories joined by "+", or a predicate of name and parameter. By words, parameters
            with `requires_grad=False` stay as they are (quantized, offloaded and sharded ones have no say); a predicate decides alone.
        seed: of all directions and subspaces.
        weight_decay: decoupled decay of matrices (not of biases and norms), exact inside a window.
        schedule: factor on `lr` as a function of the step, or a function of the optimizer that gives a torch
            scheduler.
        clip: largest norm of the gradient over all coordinates; None for no clipping. A dense method, which has one gradient
            at a time, clips as `Method.clipping` says, by the norm of its dense gradients (of the coordinates where these are
            all that micro-batches leave).
        realization: how a perturbation reaches a weight: "auto", "side", "rebuild" or "inplace".
        guard: skip steps whose loss is not finite; costs the one host synchronization of a step. False makes every step without
            looking, and `Info.loss` and `Info.slope` are NaN.
        hold: never write the weights (True), or those a predicate of name and parameter names: what they are moved by
            stays beside them as thin factors, from which `adapters.write` makes a LoRA adapter. Quantized and offloaded
            weights are held in any case.
        hold_rank: rank at most of what is kept beside a held matrix; a refresh beyond it drops the smallest part.
        compile: compile the loss (see `zolr.compiled`); where that fails, a warning says why and it runs as it is.
        check: a batch; if given, the attached model is compared with dense weights on it before training.
        undo: what a step overwrites before it is sure is kept aside (see `zolr.aside`), so that one that raises, or meets a
            gradient that is not finite, leaves weights and state bit for bit as they were. None does so but for two cases:
            realization "inplace" stands off its weights by rounding, and matrices on a card that one call of an
            optimizer updates as a whole (`adamw`), where an optimizer hardly fails and the copy would cost more than the
            step. True covers these too. False keeps nothing: methods that stream gradients keep those that they have
            applied, and a step that begins a window has folded the one before it. An engine that was cut short while it
            wrote, with nothing kept, refuses to go on until a state is loaded.
        team: the processes of the run (see `zolr.distributed`); each has the whole model and is given all batches of a step.

    Attributes:
        ahead: called with what a step is made from before it is applied; of engines that are `repeatable`.

    Raises:
        UsageError: a setting out of range, a rank above every trained matrix, or a method that held weights do not
            allow.

    >>> import torch, zolr
    >>> model = torch.nn.Linear(8, 1)
    >>> x = torch.randn(32, 8); y = x.sum(1, keepdim=True)
    >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> engine = zolr.Engine(model, zolr.compose("stiefel", "fo", rank=2), lr=0.1, loss=loss)
    >>> engine.step([(x, y)]).loss > engine.step([(x, y)]).loss
    True
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        lr: float | None,
        loss: Loss,
        select: str | Callable[[str, nn.Parameter], bool] = "all",
        seed: int = 0,
        weight_decay: float = 0.0,
        schedule: Schedule | None = None,
        clip: float | None = None,
        realization: Realization = "auto",
        guard: bool = True,
        hold: bool | Callable[[str, nn.Parameter], bool] = False,
        hold_rank: int = RANK,
        compile: bool = False,
        check: Any = None,
        undo: bool | None = None,
        team: Team | None = None,
    ) -> None:
        check_arguments(
            method,
            lr,
            model=model,
            loss=loss,
            select=select,
            seed=seed,
            weight_decay=weight_decay,
            schedule=schedule,
            clip=clip,
            realization=realization,
            hold=hold,
            hold_rank=hold_rank,
            compile=compile,
            team=team,
        )
        check_readable(model)
        self.team = team or Team()
        self.model, self.method, self.seed = model, method, int(seed)
        self.key = Key(self.seed)
        self.weight_decay, self.clip, self.guard = weight_decay, clip, guard
        self.undo = undo
        self._numbers: _Numbers | None = None  # as they were when this step began
        self.tuning: Tuning | None = None
        self.step_count = 0
        self.ahead: Callable[[Made], None] | None = None
        self._repeated: Made | None = None  # the step that is made again
        self._told_ahead: dict[str, Any] = {}  # what was chosen on this step, for `ahead`
        self._torn = ""  # why the weights are between two steps
        self._left = False  # the model has been given back
        self._skipped = 0  # steps in a row that changed nothing
        self._writing = False  # weights or state are being written
        self._within = False  # a step has begun
        self._loss = loss
        self._lr = lr
        self._tune = _chooses(method, lr)
        self._trainable = [n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
        self._blocks = blocks_of(shapes(model), method.layers.outside)
        chosen, kinds = selection(model, select), categories(model)
        tables = {name for name, kind in kinds.items() if kind in TABLES}
        frozen = tables if method.tables == "frozen" else set()
        alone = set() if callable(select) or is_attached(model) else left_alone(model)
        predicate = lambda name, p: (  # noqa: E731
            name in self._blocks and name not in frozen | alone and chosen(name, p)
        )
        if method.adapter and not any(
            "lora_" in name and predicate(name, p) for name, p in model.named_parameters()
        ):
            warnings.warn(
                "this method is one for an adapter, and the model has none that is selected, so weights of its own are trained; wrap it by "
                "zolr.lora.wrap, and select zolr.lora.trained",
                stacklevel=2,
            )
        if alone and not any(predicate(name, p) for name, p in model.named_parameters()):
            raise UsageError(
                f"no weight is left to train: {len(alone)} parameters have requires_grad=False; unfreeze what is to be trained, or "
                "name it by a predicate, such as select=lambda name, parameter: True"
            )
        total = sum(map(prod, shapes(model).values()))
        projected = selection(model, method.projects)
        own = tables if method.tables is not None else set()
        project = lambda n, p: method.tables == "subspace" if n in own else projected(n, p)  # noqa: E731
        check_rank(method, model, lambda name, p: predicate(name, p) and project(name, p))
        self.variables = attach(model, predicate, realization, hold=hold, cap=hold_rank)
        try:
            self.windows = Windows(method, self.variables, project, self.key, Undo(undo))
            self.active, self._period = self.variables, 0
            self.trained_share = sum(v.weight.numel() for v in self.variables) / total
            self._running = Running(model)
            # running ones, and what they were before the step
            self._statistics: list[tuple[Tensor, Tensor]] = []
            self._evaluated: set[int] = set()  # micro-batches of this step that statistics have counted
            self._fast = Compiled(self._loss_of, self.variables, self._trains) if compile else self._loss_of
            self._looked = False  # for weights that a step does not come by
            # weights that the loss reads past their modules, by the line; what is compiled is not looked into
            self._past: dict[str, str] | None = {} if compile or is_compiled(model, loss) else None
            self._told = False  # that held weights have lost something
            self._sharded = any(is_sharded(parameter) for parameter in model.parameters())
            self.base_lr = lr
            self._schedule = schedule
            self._scheduler: LRScheduler | None = None
            self._refreshed_at = 0
            self._dropped = False  # a streamed gradient of this step was not finite
            self._norm: Tensor | None = None  # of the streamed gradients of the step before
            self._measured = 0  # passes of this step that only measured a norm
            # only for a rate that the engine chose, and that the slopes go into
            self._caution: Caution | None = None
            self._signs: str | None = None  # how signs are evaluated since both ways have been compared
            self._begin(check)
        except BaseException:
            detach(model, self._trainable)  # a run that never began leaves the model as it was
            raise

    def _begin(self, check: Any) -> None:
        method, clip = self.method, self.clip
        for part, _ in method.ranks:
            if not any(
                part in v.name and not isinstance(self.windows.projector(v), Identity) for v in self.variables
            ):
                raise UsageError(
                    f"ranks: no projected weight has '{part}' in its name; there are "
                    f"{', '.join(sorted({v.name.removesuffix('.weight').split('.')[-1] for v in self.variables}))}"
                )
        check_held(method, self.variables, self.weight_decay)
        check_sparse(method, self.variables)
        self.windows.open()
        tables = {name for name, kind in categories(self.model).items() if kind in TABLES}
        self.windows.build(self.base_lr or 1.0, tables)
        self._divide_groups()
        self._set_schedule()
        self._activate(0)
        for variable in self.variables:
            # ranks see batches of other lengths, or none, and all have to fold alike; a recorded pass notes nothing
            variable.folds = self.team.size == 1 and not method.optimizer.reads_values and not variable.steady
        # a direction as large as a weight is applied one weight at a time, so that one of them is alive
        self.streams = method.dense or (
            method.paradigm == "zo" and clip is None and any(v.space.blocked for v in self.variables)
        )
        if check is not None:
            try:
                self.verify(check)
            except UsageError:
                raise
            except Exception as error:
                error.add_note("check takes one batch, as the loss does, and no list of them")
                raise

    @property
    def lost(self) -> float:
        """Share of what held weights were moved by, in squared Frobenius norm, that `hold_rank` has dropped."""
        stacks = [v.stack for v in self.variables if v.stack is not None]
        lost = sum(float(s.lost) for s in stacks)
        return lost / total if (total := lost + sum(float(s.energy) for s in stacks)) else 0.0

    def _tell_loss(self) -> None:
        if self._told or not self.guard or not any(v.stack is not None for v in self.variables):
            return
        if (lost := self.lost) > NOTED_LOSS:
            self._told = True
            warnings.warn(
                f"held weights have lost {lost:.1%} of what they were moved by (squared norm) up to step "
                f"{self.step_count}; use a larger hold_rank (--hold-rank), a smaller rank, or refresh less often",
                stacklevel=5,
            )

    # ---- layers --------------------------------------------------------------------------------------------------

    def active_in(self, period: int) -> Variables:
        """The variables that are active in a period of the method's layer policy."""
        blocks = list(dict.fromkeys(b for v in self.variables if (b := self._blocks[v.name]) is not None))
        if not blocks or self.method.layers.every is None:
            return self.variables
        chosen = {
            blocks[i] for i in self.method.layers.active(len(blocks), period, self.key.fold_in("layers"))
        }
        return Variables(v for v in self.variables if self._blocks[v.name] in (None, *chosen))

    def _activate(self, period: int) -> None:
        """Begin a period: what is not active in it rests, and loses its optimizer state unless the policy keeps it."""
        self._period, self.active = period, self.active_in(period)
        working = {v.name for v in self.active}
        self._resting = [v for v in self.variables if v.name not in working]
        dropped = [] if self.method.layers.keeps else self._resting
        self.windows.keep(dropped, "state", "kept")
        for variable in dropped:
            self.optimizer.state.pop(self.trained(variable), None)
            if variable.name in self.windows.cores:
                self.windows.cores[variable.name].due = True
                self.windows.cores[variable.name].kept.clear()

    def _divide_groups(self) -> None:
        """Give what `Method.scale` acts on, where nothing is lifted, groups of its own; their "lr" is that of all others."""
        if self.method.scale == 1.0 or self.method.dense:
            return
        scaled = {id(self.trained(v)) for v in self.variables if self.windows.is_projected(v)}
        divided = []
        for group in self.optimizer.param_groups:
            for factor in (1.0, self.method.scale):
                own = [p for p in group["params"] if (id(p) in scaled) == (factor != 1.0)]
                divided += [{**group, "params": own, "factor": factor}] if own else []
        self.optimizer.param_groups = divided

    # ---- windows -------------------------------------------------------------------------------------------------

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of all coordinates."""
        return self.windows.optimizer

    def trained(self, variable: Variable) -> nn.Parameter:
        """What the optimizer knows of a variable: its coordinates."""
        return self.windows.trained(variable)

    def subspace(self, variable: Variable) -> Subspace:
        """The space that these coordinates are in; all of it where a dense method has not met a gradient yet."""
        return self.windows.subspace(variable)

    def refresh(self) -> None:
        """Fold every window and open the next one; optimizer state goes through the transport."""
        self._check_there()
        self.windows.refresh(self.step_count)
        self._tell_loss()

    @property
    def _watches(self) -> bool:
        return self.method.projector.learns_from == "inputs"

    def _run_unseen(self, batches: Sequence[Any]) -> None:
        """Forward passes that leave generators and running statistics as they were."""
        with same_noise(self.variables[0].value.device), self._running.unchanged():
            mean_loss(self._loss_of, batches)

    def fold(self) -> None:
        """`W <- decay * W + lift(value)` and `value <- 0` everywhere; the model's output does not change."""
        self._check_there()
        self._fold(self.variables)

    def _fold(self, variables: Sequence[Variable]) -> None:
        for variable in variables:
            key = self.key.fold_in("fold", variable.window, self.step_count)
            variable.fold(exact=self.method.paradigm != "fo", key=key)

    # ---- one step ------------------------------------------------------------------------------------------------

    def step(self, batches: Sequence[Any]) -> Info:
        """One optimizer step on the mean loss over the micro-batches.

        Raises:
            UsageError: no batch, or a model that has been given back by `detach`.
        """
        self._check_there()
        if isinstance(batches, str) or not isinstance(batches, Sequence):
            raise UsageError(
                f"a step takes a list of micro-batches, and this is a {type(batches).__name__}; use step([batch])"
            )
        if not batches:
            raise UsageError("a step needs at least one batch")
        if len({(part.dtype, part.dim()) for part in batches if isinstance(part, Tensor)}) > 1:
            raise UsageError(
                f"a step takes a list of micro-batches, and these {len(batches)} tensors are of different kinds, as the parts of one batch are; "
                "use step([batch])"
            )
        if self.team.spread == "batches" and len(batches) % self.team.size and self._sharded:
            raise UsageError(
                f"{len(batches)} micro-batches do not go evenly into {self.team.size} ranks, which put sharded weights "
                "together in step with each other; use a multiple"
            )
        rates = [group["lr"] for group in self.optimizer.param_groups]
        # not those in tensors: a look at one waits for the device
        rate = next((r for r in rates if isinstance(r, Real) and not 0 <= float(r) < inf), None)
        if rate is not None:
            raise UsageError(
                f"the schedule gives a rate of {rate} for step {self.step_count + 1}; it has to be a number of at least 0"
            )
        moved = next((v.name for v in self.active if v.replaced), None)
        if moved is not None:
            raise UsageError(
                f"weight '{moved}' has other memory than when this engine was made (model.to, .data = ..., or load_state_dict with "
                "assign=True), so steps would not reach it; make the Engine after that"
            )
        self._check_left_alone()
        with mode(self.model, self.method.paradigm == "fo"), self._whole_or_nothing(), self._seen(batches):
            info = self._step(batches)
        self._fold_at_once()
        if not self._looked:
            self._looked = True
            self._tell_unread(batches[0])
        self._skipped = self._skipped + 1 if info.skipped else 0
        if self._skipped == NON_FINITE_LIMIT + 1:  # `training.train` has ended by then
            warnings.warn(
                f"more than {NON_FINITE_LIMIT} steps in a row had a loss or a gradient that is not finite, and changed nothing; look at the "
                "loss, and use a smaller lr or eps",
                stacklevel=2,
            )
        return info

    @contextmanager
    def _seen(self, batches: Sequence[Any]) -> Iterator[None]:
        """Notice, in the first step, the parts of one batch that were given as micro-batches."""
        if self._looked or len(batches) < 2 or not all(isinstance(batch, Tensor) for batch in batches):
            yield
            return
        advice = "a step takes a list of micro-batches; where these tensors are the parts of one batch, use step([batch])"
        try:
            with TakenApart(batches) as seen:
                yield
        except Exception as error:
            error.add_note(advice)
            raise
        if seen.found:
            warnings.warn(
                f"the loss takes each of {len(batches)} micro-batches apart: {advice}", stacklevel=4
            )

    def _check_left_alone(self) -> None:
        """Refuse parameters that were unfrozen, or put into the model, since the engine was made: steps do not reach them.

        At the first step and at every refresh, as it walks the model.
        """
        every = self.method.refresh_every
        if self._looked and not (every and self.step_count % every == 0):
            return
        values = {id(v.value) for v in self.variables}
        found = next(
            (n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in values), None
        )
        if found is not None:
            raise UsageError(
                f"weight '{found}' requires gradients and was frozen, or not there, when this engine was made, so steps do not reach it; "
                "detach, and make the Engine after that"
            )

    def _tell_unread(self, batch: Any) -> None:
        """Say which weights no forward of the first step came by: what reads them otherwise trains nothing."""
        if self.model.training and not self._sharded and not all(v.touched for v in self.active):
            # in training a layer may be left out by chance, in evaluation it is not
            with mode(self.model, False), same_noise(self.variables[0].value.device), torch.no_grad():
                self._loss(self.model, batch)
        unread = [v.name for v in self.active if not v.touched]
        idle = self.team.size > 1 and len(unread) == len(self.active)  # a rank without a micro-batch
        if unread and not idle:
            more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
            fate = "moved by chance alone" if self.method.paradigm == "zo" else "not trained"
            warnings.warn(
                f"no forward of the first step used weight '{unread[0]}'{more} through its module: what it does not use, or reads past the "
                f"module, is {fate}; leave it out by select (--train), or compare by check=batch",
                stacklevel=3,
            )

        past = next((found for found in (self._past or {}).items() if found[0] not in unread), None)
        if past is not None:  # one says it; a penalty reads them all
            lacking = "without the probe" if self.method.paradigm == "zo" else "without a derivative"
            warnings.warn(
                f"the loss reads weight '{past[0]}' itself ({past[1]}), where it is as it is stored, {lacking}: what comes of that "
                "trains nothing, and differs in the weights that are saved; compute with the module alone, and use weight_decay for a "
                "penalty",
                stacklevel=3,
            )

    def _fold_at_once(self) -> None:
        """Fold the step where the next one would put the weight together twice (see `zolr.merged`).

        The step is sure by now. Coordinates that could not be folded stay, and say the same.
        """
        for variable in self.active:
            if variable.folding:
                variable.folding = False
                with suppress(Exception):
                    variable.fold()

    @property
    def repeatable(self) -> str | None:
        """Why steps cannot be made again from what `ahead` is told; None where they can."""
        method = self.method
        if method.paradigm == "fo":
            return "paradigm 'fo' has gradients, not scalars"
        if self._watches:
            return "its subspaces are drawn from the activations of the data, which scalars do not tell"
        if any(v.realization == "inplace" for v in self.variables):
            return "realization 'inplace' leaves rounding in the weights at every forward pass"
        if not isinstance(method.estimator, Repeatable):
            return f"estimator '{type(method.estimator).__name__}' does not say how"
        return None

    @property
    def portable(self) -> bool:
        """Whether a step made again has the same bits on every machine that draws the same subspaces.

        That takes products of a number and signs, and sums in a stated order; roots, quotients and factorizations of
        floats differ by machine.
        """
        method = self.method
        estimator = method.estimator
        return (
            method.optimizer.name in ("sgd", "momentum")
            and set(method.optimizer.settings) <= {"momentum", "dampening"}
            and isinstance(estimator, Spsa)
            and (estimator.law, estimator.directions, estimator.normalize) == ("rademacher", "fresh", False)
            and (estimator.probes == 1 or not any(v.space.blocked for v in self.variables))
            and self.clip is None
            and not any(v.stack is not None for v in self.variables)
        )

    def again(self, made: Made) -> Info:
        """Make a step that another run of this model and method has made, from its scalars; no loss, no data.

        Raises:
            UsageError: the method's steps cannot be made again.
            StorageError: a subspace comes out otherwise here than where the step was made.
        """
        if (why := self.repeatable) is not None:
            raise UsageError(f"a step cannot be made again from its scalars: {why}; train with the data")
        self._repeated = made
        try:
            with self._whole_or_nothing():
                return self._step(())
        finally:
            self._repeated = None

    @contextmanager
    def _whole_or_nothing(self) -> Iterator[None]:
        """A step that raises leaves things as they were, or is remembered to have torn them."""
        self._check_whole()
        if self._within:
            raise UsageError(
                "a step was begun inside of another one of the same engine; a loss computes a loss alone"
            )
        self._told_ahead, self._writing, self._within = {}, False, True
        self._begin_undo()
        try:
            yield
        except BaseException as error:
            returns = self.windows.undo.returns
            if self._writing or returns:  # the second: what follows may be cut short too
                self._torn = f"a step was cut short by {type(error).__name__} while weights were written"
            if returns:
                self._put_back()
                self._torn = ""
            raise
        finally:
            self._writing, self._within, self._numbers, self._statistics = False, False, None, []
            self.windows.undo.end()

    # ---- going back ----------------------------------------------------------------------------------------------

    @property
    def torn(self) -> bool:
        """Whether the weights are between two steps (see `undo`)."""
        return bool(self._torn)

    def _begin_undo(self) -> None:
        self.windows.undo.begin()
        if self.windows.undo.keeps:
            self._statistics = self._running.kept()
            self._numbers = _Numbers.of(self)
        if self.undo:
            self.windows.keep([v for v in self.variables if v.realization == "inplace"], "weight")

    def _keep_values(self, variables: Sequence[Variable]) -> None:
        """Keep what an update writes."""
        if self.undo is None and not self.streams:
            if any(v.value.is_cuda and v.is_full and len(v.shape) > 1 for v in variables):
                self.windows.undo.give_up("matrices that one call updates")  # see `undo`
                return
        self.windows.keep_values(variables)

    def _put_back(self, choices: bool = True) -> None:
        """Undo what this step has written.

        Args:
            choices: what it has chosen for all steps, and counted, too.
        """
        assert self._numbers is not None
        put_back(self._statistics)
        self.windows.put_back()
        self._numbers.put_back(self, choices)

    def _check_counts(self, count: int) -> None:
        """Refuse a step that ranks were given different numbers of micro-batches for: they would wait, or drift apart."""
        if self.team.size == 1 or self._repeated is not None:
            return
        counts = self.team.joined(torch.tensor([count]), [1] * self.team.size, "control").tolist()
        if len(set(counts)) > 1:
            raise UsageError(
                f"the ranks were given {', '.join(map(str, counts))} micro-batches for step {self.step_count + 1}; give every rank all of "
                "them, of which it takes its share itself (a loader that accelerate has prepared gives each rank others)"
            )

    def _check_there(self) -> None:
        if self._left:
            raise UsageError("the model has been given back by detach; make a new Engine to train on")

    def _check_whole(self) -> None:
        if self._torn:
            raise UsageError(
                f"{self._torn}; go back by load_state_dict to a state before it (Engine(undo=True) does so by itself)"
            )

    def _step(self, batches: Sequence[Any]) -> Info:
        forwards = 0
        self._check_counts(len(batches))
        share = Share(batches, self.team, self._judge_loss, self.variables[0].value.device)
        if self.method.layers.every and self.step_count // self.method.layers.every != self._period:
            self._activate(self.step_count // self.method.layers.every)
        every = self.method.refresh_every
        refreshed = bool(every and self.step_count % every == 0 and self.step_count != self._refreshed_at)
        begins = self.step_count == 0 and not self.windows.spectra
        if self._watches and (refreshed or begins) and not all(v.is_full for v in self.variables):
            self.windows.watch(lambda: self._run_unseen(batches))
            forwards += len(batches)
            refreshed = True
        if refreshed:
            self._writing = True
            self.refresh()
            self._refreshed_at = self.step_count
            self._writing = False
        if self.ahead is not None or self._repeated is not None:
            self._name_bases(refreshed)
        if self._repeated is not None:
            self._settle(self._repeated)
        if self._tune:
            forwards += self._choose(share)
        if self._compares_signs:
            forwards += self._try_signs(share)
        key = self.key.fold_in("step", self.step_count)
        forwards += self.method.estimator.forwards(share.total)
        before = self._running.kept() if share.split else []
        with self._cautious() as lr:
            seen = self._advance(share, key, lr, forwards)
        if before:
            self._running.combine(before, self.team, share.lengths)
        self.team.steps += 1
        forwards += self.method.estimator.forwards(share.total) * self._measured
        if self._repeated is not None:
            lr, forwards = self._repeated.lr, self._repeated.forwards
        slope, finite = seen.slope, seen.finite
        if not finite and self.windows.undo.returns:
            self._put_back(choices=False)
            refreshed = False
        if finite:
            self.step_count += 1
            if self._caution is not None and slope is not None:
                self._caution.observe(slope)
            if self._scheduler is not None:
                self._scheduler.step()
            self._follow_schedule()
        return Info(
            loss=seen.loss,
            slope=slope,
            lr=lr,
            skipped=not finite,
            forwards=forwards,
            refreshed=refreshed,
        )

    @contextmanager
    def _cautious(self) -> Iterator[float]:
        """The rate of this step, lowered by what the slopes have shown; schedules go on from the rate without that.

        Inside, groups have it times their own factor (see `Method.scale`).
        """
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        factor = 1.0 if self._caution is None else self._caution.factor
        rate = float(rates[0] * factor) if self._repeated is None else self._repeated.lr
        try:
            for group in groups:
                own = group["lr"] * factor if self._repeated is None else rate
                group["lr"] = own * group.get("factor", 1.0)
            yield rate
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def _name_bases(self, refreshed: bool) -> None:
        """Give the subspaces of a new window a name by which another machine can tell whether it has the same."""
        if not refreshed and self.step_count:
            return
        found = hashlib.sha256()
        for variable in self.variables:
            if not variable.is_full:
                found.update(variable.name.encode())
                for tensor in variable.subspace.tensors().values():
                    found.update(
                        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                    )
        name = found.hexdigest()[:16]
        self._told_ahead["bases"] = name
        expected = None if self._repeated is None else self._repeated.bases
        if expected not in (None, name):
            raise StorageError(
                f"the subspaces of step {self.step_count + 1} are {name} here and were {expected} there: another model or "
                "method, or a machine that factorizes otherwise; replay where the run was made, or use projector 'srht'"
            )

    def _settle(self, made: Made) -> None:
        """Choose what was chosen on a step that is made again."""
        if made.tuning is not None and self._tune:
            self._chosen(Tuning(**made.tuning))
        if self._tune:
            raise StorageError(
                f"step {self.step_count + 1} does not say what rate was chosen; the record is incomplete"
            )
        if self._compares_signs:
            self._evaluate_signs(made.signs or "together")

    def _advance(self, batches: Share, key: Key, lr: float, forwards: int) -> "_Seen":
        """Estimate and apply; what was seen, and whether it was applied."""
        self._dropped, self._measured = False, 0
        self._evaluated.clear()
        for variable in self.active:
            variable.folding = False
        squares: list[Tensor] = []
        if not self.method.estimator.exact:
            seen = self._advance_by_slopes(batches, key, lr, forwards, squares)
        elif self.streams:
            seen = self._advance_streamed(batches, key, lr, squares)
        else:
            received: list[tuple[Variable, Tensor]] = []
            with self._gathering(batches.total):
                estimate = self._estimate(self._fast, batches, lambda v, g: received.append((v, g)), key)
            seen = self._judged(estimate, [gradient for _, gradient in received])
            if seen.finite:
                self._apply(received, lr)
        if seen.finite and squares:
            self._norm = torch.stack(squares).sum().sqrt()
        return seen

    def _advance_streamed(self, batches: Share, key: Key, lr: float, squares: list[Tensor]) -> "_Seen":
        """Apply dense gradients as backprop has them; one that is not finite ends the step (see `undo`)."""

        def run(emit: Callable[[Variable, Tensor], None]) -> Estimate:
            with self._gathering(batches.total):
                return self._estimate(self._fast, batches, emit, key)

        try:
            if batches.split and self.method.accumulate != "dense":
                self._open_windows_due(self._fast, batches, key)
            factor = self._clip_factor(run)
            estimate = run(self._stream(lr, factor, squares))
        except _NonFinite:
            estimate = Estimate(torch.tensor(float("nan")))
        return self._judged(estimate)

    @torch.no_grad()
    def _advance_by_slopes(
        self, batches: Share, key: Key, lr: float, forwards: int, squares: list[Tensor]
    ) -> "_Seen":
        """Measure, judge, tell `ahead`, then make the gradients and apply them."""
        estimator, made = cast(Measuring, self.method.estimator), self._repeated
        if made is None:
            found = estimator.measure(self._fast, batches, self.active, key)
        elif made.skipped:
            return _Seen(made.loss, _root_mean_square(made.slopes), False)
        else:
            device = self.variables[0].value.device
            loss, slopes = (
                torch.tensor(x, dtype=torch.float64, device=device) for x in (made.loss, made.slopes)
            )
            found = cast(Repeatable, estimator).from_slopes(loss, slopes, self.active, key)
        ahead = self.ahead if made is None else None
        seen = self._judged(Estimate(found.loss, found.slopes), record=found.recorded if ahead else None)
        if made is not None:  # a journal that was given away has no losses
            seen = replace(seen, loss=made.loss, finite=True)
        if ahead is not None:
            ahead(Made(seen.loss, lr, seen.record, forwards, **self._told_ahead, skipped=not seen.finite))
        if not seen.finite:
            return seen
        hand_over = partial(found.hand_over, self.active)
        if self.streams:
            factor = self._clip_factor(hand_over)
            self._measured = 0  # the second norm cost no forward
            hand_over(self._stream(lr, factor, squares))
        else:
            received: list[tuple[Variable, Tensor]] = []
            hand_over(lambda v, g: received.append((v, g)))
            self._apply(received, lr)
        return seen

    @torch.no_grad()
    def _clip_factor(self, run: Callable[[Callable[[Variable, Tensor], None]], Any]) -> Tensor | None:
        """What streamed gradients are multiplied by: from their own norm, by a pass of its own, or from that of the step before.

        The first step has none before it.

        Args:
            run: hands all gradients of the step to what it is given.
        """
        if self.clip is None:
            return None
        norm = self._norm
        if self.method.clipping == "twice" or norm is None:
            squares: list[Tensor] = []

            @torch.no_grad()
            def measure(variable: Variable, gradient: Tensor) -> None:
                squares.append(self._square(variable, variable.mask(gradient, own=True)))

            self._measured = 1
            run(measure)
            norm = torch.stack(squares).sum().sqrt()
        return (self.clip / (norm + 1e-6)).clamp(max=1.0)

    def _square(self, variable: Variable, gradient: Tensor) -> Tensor:
        """Squared norm of a streamed gradient: dense, or in the coordinates where other micro-batches left no more."""
        core, gathered = self.windows.cores.get(variable.name), variable.gathered
        if (
            core is not None
            and core.space is not None
            and gathered is not None
            and gathered.total is not None
        ):
            gradient = core.space.project(gradient) + gathered.total
        return gradient.double().square().sum()

    @contextmanager
    def _gathering(self, batches: int) -> Iterator[None]:
        """Accumulate the gradients of micro-batches in the coordinates, if the method wants that."""
        chosen = [v for v in self.active if v.name in self.windows.cores]
        if self.method.accumulate == "dense" or batches == 1:
            chosen = []
        for variable in chosen:
            variable.gathered = Gathered(
                partial(self._projected_part, variable, self.windows.cores[variable.name])
            )
        try:
            yield
        finally:
            for variable in chosen:
                variable.gathered = None

    def _projected_part(
        self, variable: Variable, core: Core, gradient: Tensor, count: Tensor | float
    ) -> Tensor:
        """The gradient of a micro-batch in the coordinates; the first one of a window gives the subspace."""
        gradient = variable.mask(gradient, own=True)
        if core.due and self.guard:
            self._dropped = self._dropped or not _is_finite(gradient)
        if self._dropped:
            return gradient.new_zeros(())
        if core.due:
            self._writing = True
            self.windows.renew(variable, core, gradient / count)
        assert core.space is not None
        return core.space.project(gradient)

    def _try_signs(self, batches: Share) -> int:
        """Evaluate both signs together and in sequence once, and go on in sequence where they differ on some rank.

        Returns:
            forward passes that it took.
        """
        prober = cast(Spsa, owners(self.method.estimator, "signs")[0])
        loss = _ByRows(self._loss_of, self._rows_depend)
        settled, reason, passes = prober.tried(loss, batches, self.active, self.key.fold_in("signs"))
        way = SIGNS[_agreed(self.team, SIGNS.index(settled.signs) if len(batches) else None)]
        if way == "sequence":
            reason = reason or "so it is on another rank"
            warnings.warn(f"signs are evaluated in sequence, not together: {reason}", stacklevel=4)
        self._evaluate_signs(way)
        self._told_ahead["signs"] = self._signs
        return passes * batches.total

    @property
    def _compares_signs(self) -> bool:
        """Whether both ways to evaluate signs are still to be compared."""
        return self._signs is None and setting(self.method.estimator, "signs", "sequence") != "sequence"

    def _evaluate_signs(self, way: str) -> None:
        """Evaluate both signs of a probe in this way from now on, and compare no more."""
        self._signs = way
        if setting(self.method.estimator, "signs") != way:
            self.method = replace(self.method, estimator=changed(self.method.estimator, signs=way))

    def _rows_depend(self) -> str:
        """Why a row's loss depends on the rows beside it; empty where it does not as far as a model tells."""
        if self._trains():
            return "a model in training draws its noise, or takes statistics, over all rows"
        return "the model normalizes over the rows of a batch" if self._running.mixing else ""

    def _trains(self) -> bool:
        return self.model.training

    def _loss_of(self, batch: Any) -> Any:
        device = self.variables[0].value.device
        derived = self.method.paradigm == "fo"
        if self._past is None and (torch.is_grad_enabled() or not derived):
            with Reads(self.variables, derived) as reads:
                loss = self._loss(self.model, batch)
            self._past = reads.found
            check_pair(loss)
        else:
            loss = self._loss(self.model, batch)
        # a number is a loss like any other where none asks for its derivative
        if isinstance(loss, Real):
            return torch.tensor(float(loss), device=device)
        if isinstance(loss, tuple) and len(loss) == 2 and isinstance(loss[0], Real):
            return torch.tensor(float(loss[0]), device=device), loss[1]
        return loss

    def _open_windows_due(self, loss: Any, batches: Share, key: Key) -> None:
        """Open the windows that the first micro-batch of a step would open, on every rank from that very micro-batch."""
        due = [v for v in self.active if v.name in self.windows.cores and self.windows.cores[v.name].due]
        if not self.team.largest(bool(due)):
            return
        alone = Share(batches.all[:1], seen=self._judge_loss)
        counted = batches.first == 0 and len(batches) > 0  # here, where this micro-batch is evaluated again

        @torch.no_grad()
        def emit(variable: Variable, gradient: Tensor) -> None:
            if variable in due:
                self._projected_part(variable, self.windows.cores[variable.name], gradient, 1.0)

        with nullcontext() if counted else self._running.unchanged():
            self._estimate(loss, alone, emit, key)

    def _estimate(self, loss: Any, batches: Share, emit: Any, key: Key) -> Estimate:
        estimator = self.method.estimator
        for variable in self._resting:
            variable.value.requires_grad_(False)
        device = self.variables[0].value.device
        noise = key.fold_in("dropout")

        # torch.manual_seed asks for accelerators, and writes down who did where there are none
        seed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed

        def named(batch: Any) -> Any:
            seed((noise.fold_in(batches.at) if batches.at else noise).integer() >> 1)
            again = batches.at in self._evaluated
            self._evaluated.add(batches.at)
            # a batch counts once in running statistics, however often a step evaluates it
            with self._running.unchanged() if again else nullcontext():
                return loss(batch)

        # dropout draws from the global generators: give it a name a micro-batch, and leave them as found
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return estimator(_ByRows(named, self._rows_depend), batches, self.active, emit, key)

    def _judged(
        self, estimate: Estimate, gradients: Sequence[Tensor] = (), record: Tensor | None = None
    ) -> "_Seen":
        """What a step saw, and whether it may be applied: all of it in the one wait for the device of a step."""
        if not self.guard and record is None:
            return _Seen(float("nan"), None, True)
        parts = [estimate.loss.double().reshape(1)]
        if estimate.slopes is not None:  # gradients are these numbers times finite directions
            parts.append(estimate.slopes.double())
        elif gradients and not self._dropped:
            parts.append(nn.utils.get_total_norm(gradients).double().reshape(1))
        told = 0 if record is None else len(record)
        if record is not None:
            parts.append(record.double())
        loss, *rest = torch.cat(parts).tolist()
        rest, recorded = rest[: len(rest) - told], tuple(rest[len(rest) - told :])
        slope = None if estimate.slopes is None else _root_mean_square(rest)
        finite = not self._dropped and all(map(isfinite, (loss, *rest)))
        if estimate.slopes is not None:  # a gradient is float32
            finite = finite and all(abs(s) <= LARGEST_SLOPE for s in rest)
        return _Seen(loss, slope, finite or not self.guard, recorded)

    def _judge_loss(self, total: Tensor) -> None:
        """Leave a streamed step before its first gradient, if its loss is not finite."""
        if self.streams and self.guard and not bool(torch.isfinite(total)):
            raise _NonFinite

    def _decay(self, variable: Variable, lr: float) -> None:
        """Decoupled decay of the weight: of the coordinates now, of the rest by a factor until the fold."""
        if self.weight_decay and len(variable.shape) >= 2:
            factor = 1.0 - lr * self.weight_decay
            variable.value.data.mul_(factor)
            if not variable.is_full:
                variable.decay *= factor

    @torch.no_grad()
    def _apply(self, received: Sequence[tuple[Variable, Tensor]], lr: float) -> None:
        self._keep_values([variable for variable, _ in received])
        self._writing = True
        gradients = [variable.mask(gradient, own=True) for variable, gradient in received]
        for (variable, _), gradient in zip(received, gradients, strict=True):
            self.windows.observe(variable, gradient)
        if self.clip is not None:
            norm = nn.utils.get_total_norm(gradients)
            factor = (self.clip / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor)
        for (variable, _), gradient in zip(received, gradients, strict=True):
            self._decay(variable, lr)
            variable.value.grad = _as_laid_out(gradient, variable.value)
        self.optimizer.step()
        for variable, _ in received:
            variable.value.grad = None
            variable.moved = True
        commit([variable for variable, _ in received])

    def _stream(
        self, lr: float, factor: Tensor | None, squares: list[Tensor]
    ) -> Callable[[Variable, Tensor], None]:
        """An `emit` that applies each gradient at once, while no other is alive.

        A gradient that is not finite, and all that follow it, are dropped; what earlier ones have changed is put back at
        the end of the step.

        Args:
            factor: on all gradients, from clipping.
            squares: receives their squared norms before that.
        """

        @torch.no_grad()
        def emit(variable: Variable, gradient: Tensor) -> None:
            if self.guard and self.method.estimator.exact and not self._dropped:
                self._dropped = not _is_finite(gradient)
                if variable.gathered is not None and variable.gathered.total is not None:
                    self._dropped |= not _is_finite(variable.gathered.total)
            if self._dropped:
                return
            self._keep_values([variable])
            self._writing = True
            gradient = variable.mask(gradient, own=True)
            gathered = None if variable.gathered is None else variable.gathered.total
            if factor is not None:
                squares.append(self._square(variable, gradient))
                gradient = gradient.mul_(factor)
                gathered = None if gathered is None else gathered * factor
            core, residual = self.windows.cores.get(variable.name), self.method.residual
            if core is None:
                self.windows.observe(variable, gradient)
                self._decay(variable, lr)
                self._step_alone(variable.value, gradient)
            else:
                gradient = residual.receive(gradient, core.kept)
                if core.due:
                    self.windows.renew(variable, core, gradient)

                def step(coords: Tensor) -> Tensor:
                    coords = coords if gathered is None else coords + gathered
                    self.windows.observe(variable, coords)
                    self._step_alone(core.value, coords.clone())  # optimizers may use gradients up
                    return core.value.data

                self._decay(variable, lr)
                settings = self.windows.group_of(core.value)
                core.move(gradient, residual, step, lr, self.method.scale, settings)
            variable.moved = True
            variable.commit()

        return emit

    def _step_alone(self, value: nn.Parameter, gradient: Tensor) -> None:
        """One step of the optimizer on one value; visiting all others for each one would be quadratic."""
        groups = self.optimizer.param_groups
        own = self.windows.group_of(value)
        value.grad = _as_laid_out(gradient, value)
        self.optimizer.param_groups = [{**own, "params": [value]}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
            value.grad = None

    # ---- learning rate -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _choose(self, batches: Share) -> int:
        """Choose eps and lr from measurements on the first batches."""
        estimator = self.method.estimator
        self.tuning = tune(
            lambda: mean_loss(self._loss_of, batches),
            self.active,
            self.key.fold_in("tuning"),
            eps=self.method.radius,
            normalized=self.method.optimizer.normalizes,
            unit=setting(estimator, "normalize", False),
            momentum=self.method.optimizer.has_momentum,
            probes=setting(estimator, "probes", 1),
            rows=rows_of(self._loss_of, batches),
            elsewhere=self._elsewhere,
        )
        self._told_ahead["tuning"] = self.tuning.as_dict()
        self._chosen(self.tuning)
        return (self.tuning.forwards + 1) * batches.total

    def _chosen(self, tuning: Tuning) -> None:
        if self.base_lr is not None:  # the user's own rate stands; only eps was open
            tuning = replace(tuning, lr=self.base_lr)
        elif not self.method.normalizes:
            self._caution = Caution()
        self._adopt(tuning)

    @contextmanager
    def _elsewhere(self, number: int) -> Iterator[None]:
        """Put every variable into a subspace that no window uses, for measurements around the weights."""
        with ExitStack() as stack:
            for variable in self.variables:
                if not variable.is_full:
                    key = self.key.fold_in("elsewhere", number, variable.name)
                    first = partial(self.windows.first, variable) if variable.window == 0 else None
                    stack.enter_context(variable.within(self.windows.drawn(variable, key), first))
            yield

    def _adopt(self, tuning: Tuning) -> None:
        self.tuning = tuning
        estimator = self.method.estimator
        if self.method.has_radius:
            self.method = replace(self.method, estimator=changed(estimator, eps=tuning.eps))
        self._tune = False
        self.base_lr = tuning.lr
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr
        self._set_schedule()

    def _forget(self, lr: float | None) -> None:
        """Have chosen nothing, as before the first step.

        Args:
            lr: the rate; None for the one that was given.
        """
        self.method, self._signs, self.tuning = self.windows.method, None, None
        self.base_lr = self._lr if lr is None else lr
        self._tune = _chooses(self.method, self.base_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr or 1.0
        self._scheduler = None
        self._set_schedule()

    def _set_schedule(self) -> None:
        if self._schedule is None or self.base_lr is None:
            return
        if _takes_a_step(self._schedule):
            self._follow_schedule()
        else:
            try:
                self._scheduler = self._schedule(self.optimizer)
            except ValueError as error:
                if "cycle_momentum" not in str(error):
                    raise
                raise UsageError(
                    f"schedule moves a momentum, and not all groups of optimizer '{self.method.optimizer.name}' have one of the same "
                    "name; give it cycle_momentum=False"
                ) from error
            if not isinstance(self._scheduler, LRScheduler) or isinstance(self._scheduler, ReduceLROnPlateau):
                raise UsageError(
                    f"schedule gives a {type(self._scheduler).__name__}, which does not follow the step; give a factor (a number) as "
                    "a function of the step, which may look at what you measured, or a function that gives another "
                    "torch.optim.lr_scheduler"
                )

    def _follow_schedule(self) -> None:
        if self._schedule is not None and self._scheduler is None and self.base_lr is not None:
            factor = float(self._schedule(self.step_count))
            for group in self.optimizer.param_groups:
                group["lr"] = self.base_lr * factor

    # ---- checks, saving and leaving ------------------------------------------------------------------------------

    @torch.no_grad()
    def verify(self, batch: Any, tolerance: float | None = None) -> None:
        """Compare the attached model with dense weights, moved by random coordinates, on one batch.

        Raises:
            UsageError: a weight whose effect is not the same, by name (read past its module's forward, usually).
        """
        self._check_there()
        with mode(self.model, training=False):
            verify(
                self.variables,
                lambda: float(mean_loss(self._loss_of, [batch])),
                self.key.fold_in("verify"),
                tolerance,
            )

    def digests(self, *, all_weights: bool = False) -> dict[str, Tensor]:
        """A number for each trained weight, of its bits, its coordinates and their subspace, and of its optimizer state.

        Running statistics have theirs too.

        Args:
            all_weights: those that are not trained too.
        """
        result = {v.name: self.windows.digest(v) for v in self.variables}
        result |= {name: digest(buffer).cpu() for name, buffer in self._running.named()}
        if all_weights:
            for name, parameter in self.model.named_parameters():
                if name not in result and parameter.device.type != "meta" and not is_sharded(parameter):
                    result[name] = digest(parameter.data).cpu()
        return result

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings from which `load_state_dict` continues bit for bit."""
        self._check_whole()
        return {
            "version": 1,
            "method": _lasting(self.method),
            "step": self.step_count,
            "refreshed_at": self._refreshed_at,
            "period": self._period,
            "norm": None if self._norm is None else self._norm.clone(),
            "seed": self.seed,
            "lr": [float(group["lr"]) for group in self.optimizer.param_groups],
            # schedules move momenta too
            "groups": [_numbers_of(group) for group in self.optimizer.param_groups],
            "base_lr": self.base_lr,
            "tuning": None if self.tuning is None else self.tuning.as_dict(),
            "scheduler": None if self._scheduler is None else _plain(self._scheduler.state_dict()),
            "caution": None if self._caution is None else asdict(self._caution),
            "signs": self._signs,
            "statistics": {name: buffer.clone() for name, buffer in self._running.named()},
            "variables": {v.name: self.windows.state(v) for v in self.variables},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state of the same model and method; what had not been chosen then is chosen again.

        Raises:
            UsageError: the state is of another method, other variables, another seed, of weights of another shape or dtype, or that
                were held where these are not; nothing has been changed.
        """
        self._check_there()
        try:
            self._check_state(state)
        except (AttributeError, KeyError, TypeError) as error:  # whatever it is
            raise UsageError("this is no state of an engine; give what state_dict returned") from error
        self._torn = "loading a state was cut short"
        self.step_count, self._refreshed_at = state["step"], state["refreshed_at"]
        self._forget(state["base_lr"])
        if state["tuning"] is not None:
            self._adopt(Tuning(**state["tuning"]))
        for v in self.variables:
            self.windows.load(v, state["variables"][v.name])
        self._activate(state.get("period", 0))
        norm = state.get("norm")
        self._norm = None if norm is None else norm.to(self.variables[0].value.device, copy=True)
        self._caution = None if state["caution"] is None else Caution(**state["caution"])
        for name, buffer in self._running.named():
            if name in state.get("statistics", {}):
                buffer.copy_(state["statistics"][name])
        if self._compares_signs and state.get("signs") is not None:
            self._evaluate_signs(state["signs"])
        if self._scheduler is not None and state["scheduler"] is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        if state["base_lr"] is not None:  # else these are none yet
            for group, lr in zip(self.optimizer.param_groups, state["lr"], strict=True):
                group["lr"] = lr
        for group, numbers in zip(self.optimizer.param_groups, state.get("groups", ()), strict=False):
            group.update(
                {k: tuple(x) if isinstance(x, list) else x for k, x in numbers.items() if k in group}
            )
        self._torn = ""

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that this run cannot continue from, before anything is written; see `load_state_dict`."""
        own = _lasting(self.method)
        for part, said in state.get("method", own).items():
            if said != own.get(part):
                raise UsageError(
                    f"the saved state is of a method with {part} {said}, and this one has {own.get(part)}; use the same method"
                )
        names = {v.name for v in self.variables}
        if set(state["variables"]) != names:
            different = sorted(set(state["variables"]) ^ names)
            raise UsageError(
                f"the saved state is of other weights (such as '{different[0]}'); use the same selection"
            )
        if state["seed"] != self.seed:
            raise UsageError(
                f"the saved state has seed {state['seed']}, this run {self.seed}; use the same seed"
            )
        if len(state["lr"]) != len(self.optimizer.param_groups):
            raise UsageError(
                f"the saved state has rates for {len(state['lr'])} groups of weights, and this run {len(self.optimizer.param_groups)} "
                "groups; use the same scale"
            )
        for v in self.variables:
            self.windows.check(v, state["variables"][v.name])
        for name, buffer in self._running.named():
            old = state.get("statistics", {}).get(name, buffer)
            check_alike(f"buffer '{name}'", [(old.shape, buffer.shape), (old.dtype, buffer.dtype)])
        for kind, name in ((Tuning, "tuning"), (Caution, "caution")):
            if state[name] is not None:
                kind(**state[name])
        for name in ("step", "refreshed_at", "base_lr", "scheduler"):
            state[name]  # is there

    def detach(self) -> nn.Module:
        """Fold, and give the model back as it was before attaching, with the trained weights.

        Held weights are as they were: take their adapter first (`adapters.write`). A second time it does nothing: another engine
        may have the model by then.
        """
        if self._left:
            return self.model
        self.fold()
        self._left = True
        return detach(self.model, self._trainable)

    def export(self) -> nn.Module:
        """A folded, plain copy of the model; the run goes on untouched.

        Raises:
            UsageError: weights are held.
        """
        self._check_there()
        held = next((v.name for v in self.variables if v.held), None)
        if held is not None:
            raise UsageError(
                f"weight '{held}' is held: a plain model cannot hold what it was moved by; use adapters.write"
            )
        self._check_whole()
        # the model alone: what the loss and the schedule hold may be large, or not to be copied
        model, variables = copy.deepcopy((self.model, self.variables))
        self._fold(variables)
        return detach(model, self._trainable).eval()


def _agreed(team: Team, way: int | None) -> int:
    """The number of what every rank that had something to try has settled on; 0 where they differ.

    Args:
        way: of this rank; None where it had nothing to try.
    """
    highest = team.largest(-1 if way is None else way)
    lowest = -team.largest(-len(SIGNS) if way is None else -way)
    return highest if highest == lowest else 0


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite, by one pass that makes no second tensor of that size."""
    return not tensor.numel() or bool(torch.isfinite(torch.linalg.vector_norm(tensor, float("inf"))))


def _root_mean_square(numbers: Sequence[float]) -> float:
    return sqrt(sum(x * x for x in numbers) / len(numbers))


def _chooses(method: Method, lr: float | None) -> bool:
    """Whether a rate or a radius is to be chosen on the first step."""
    return method.has_radius and (lr is None or method.radius is None)


def _lasting(method: Method) -> dict[str, str]:
    """What of a method no step changes, part by part."""
    parts = {
        name: getattr(method, name) for name in ("projector", "optimizer", "transport", "residual", "layers")
    }
    numbers = {name: getattr(method, name) for name in ("paradigm", "refresh_every", "ranks", "dense")}
    return {name: repr(part) for name, part in (numbers | parts).items()}


def _as_laid_out(gradient: Tensor, value: Tensor) -> Tensor:
    """The gradient, row-major where the value is: a fused rule pairs their entries by memory."""
    return gradient.contiguous() if value.is_contiguous() else gradient


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without the callables in it."""
    return {k: v for k, v in state.items() if isinstance(v, int | float | str | bool | list | type(None))}


def _numbers_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an optimizer's group that are numbers, or several."""
    found = {k: list(x) if isinstance(x, tuple) else x for k, x in group.items() if k not in ("params", "lr")}
    several = {k: x if isinstance(x, list) else [x] for k, x in found.items()}
    return {k: found[k] for k, x in several.items() if x and all(type(n) in (int, float) for n in x)}


def _takes_a_step(schedule: Schedule) -> bool:
    """Whether a schedule is a function of the step (and not of the optimizer)."""
    try:
        return isinstance(schedule(0), Real)
    except (AttributeError, TypeError):
        return False
