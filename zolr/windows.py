"""Windows: the subspaces of all trained weights over time, and the optimizer state that follows them."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from zolr.dense import Core
from zolr.distributed import digest
from zolr.errors import UsageError
from zolr.keys import Key
from zolr.methods import Method
from zolr.projectors import Learner, Patient
from zolr.projectors.identity import Identity
from zolr.spectra import Moments, Sketch, Spectrum
from zolr.subspaces import Full, Subspace, rebuild
from zolr.undo import Undo
from zolr.variables import Variable, Variables

_OF_A_WINDOW = ("value", "state", "space", "moments", "spectrum", "stack")  # what a new window changes
_OF_A_CORE = ("state", "kept", "core", "moments", "spectrum")

# of a variable, and its subspace and optimizer state before and after a change
Watcher = Callable[[Variable, tuple[Subspace | None, dict[str, Any]], tuple[Subspace, dict[str, Any]]], None]


class Windows:
    """What a run knows of each trained weight besides the weight: subspace, what was learned of it, optimizer state.

    Args:
        method: as composed; what it chooses while it runs is no concern of windows.
        variables: of the model.
        projected: whether a matrix is projected, by its name and parameter.
        key: of the run.
        undo: where what a step overwrites is kept.

    Attributes:
        optimizer: what `build` made.
        cores: of the weights that a dense method projects, by name.
        moments: of the gradients of the present window, by name, where the projector learns from them.
        spectra: what the projector has learned, by name.
        watchers: told of every subspace that follows another one.
    """

    def __init__(
        self,
        method: Method,
        variables: Variables,
        projected: Callable[[str, nn.Parameter], bool],
        key: Key,
        undo: Undo,
    ) -> None:
        self.method, self.variables, self.key, self.undo = method, variables, key, undo
        self._projected = projected
        self.optimizer: torch.optim.Optimizer
        self.cores: dict[str, Core] = {}
        self.moments: dict[str, Moments] = {}
        self.spectra: dict[str, Spectrum] = {}
        self.watchers: list[Watcher] = []
        self._places: dict[int, tuple[int, int]] = {}  # by the id of a value

    def __deepcopy__(self, memo: dict[int, Any]) -> "Windows":
        """A copy with the whole optimizer: of one of its own, torch copies groups and state alone."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        optimizer: torch.optim.Optimizer = object.__new__(type(self.optimizer))
        memo[id(self.optimizer)] = optimizer
        # a scheduler wraps the step of its own optimizer
        own = {name: part for name, part in vars(self.optimizer).items() if name != "step"}
        optimizer.__dict__ |= copy.deepcopy(own, memo)
        twin.__dict__ |= copy.deepcopy(vars(self), memo)
        return twin

    def build(self, lr: float, tables: set[str]) -> None:
        """Make the optimizer of all coordinates.

        Args:
            lr: its rate.
            tables: names of embeddings and heads.
        """
        own = [self.trained(v) for v in self.variables if v.name in tables]
        self.optimizer = self.method.optimizer.build([self.trained(v) for v in self.variables], lr, own)

    # ---- what there is -------------------------------------------------------------------------------------------

    def is_projected(self, variable: Variable) -> bool:
        """Whether a weight is a matrix that the method projects."""
        return len(variable.shape) == 2 and self._projected(variable.name, variable.weight)

    def projector(self, variable: Variable) -> Any:
        """The rule by which the subspaces of a weight are drawn."""
        return self.method.projector_of(variable.name) if self.is_projected(variable) else Identity()

    def trained(self, variable: Variable) -> nn.Parameter:
        """What the optimizer knows of a variable: its coordinates."""
        core = self.cores.get(variable.name)
        return variable.value if core is None else core.value

    def subspace(self, variable: Variable) -> Subspace:
        """The space that these coordinates are in; all of it where a dense method has not met a gradient yet."""
        core = self.cores.get(variable.name)
        return variable.subspace if core is None or core.space is None else core.space

    def drawn(self, variable: Variable, key: Key | None = None) -> Any:
        """The subspace of the next window, or the one that another key names."""
        previous = None if variable.window < 0 else variable.subspace
        key = key or self._name(variable, variable.window + 1)
        return self._draw(variable, key, variable.weight, previous=previous)

    def first(self, variable: Variable) -> Subspace:
        """The subspace of the first window, drawn again."""
        return self._draw(variable, self._name(variable, 0), variable.weight, previous=None)

    def _name(self, variable: Variable, window: int) -> Key:
        """The key of a window."""
        return self.key.fold_in("subspace", window, variable.name)

    def _draw(self, variable: Variable, key: Key, like: Tensor, **seen: Any) -> Any:
        return self.projector(variable).draw(
            variable.shape, key, like=like.data, spectrum=self.spectra.get(variable.name), **seen
        )

    def group_of(self, value: nn.Parameter) -> dict[str, Any]:
        """The optimizer's settings for a value."""
        group, _ = self._place(value)
        return self.optimizer.param_groups[group]

    def replace(self, before: nn.Parameter, after: nn.Parameter) -> None:
        """Have the optimizer know one value in the place of another."""
        if before is after:
            return
        group, index = self._place(before)
        self.optimizer.param_groups[group]["params"][index] = after
        self._places[id(after)] = self._places.pop(id(before))

    def _place(self, value: nn.Parameter) -> tuple[int, int]:
        """Which group of the optimizer has a value, and where in it.

        Groups are others' to change (by a scale, by torch), and an id may be one of a value that is gone: what is known is
        looked at, and all of it found again where it does not hold.
        """
        groups = self.optimizer.param_groups
        group, index = self._places.get(id(value), (len(groups), 0))
        if group < len(groups) and index < len(own := groups[group]["params"]) and own[index] is value:
            return group, index
        self._places = {id(p): (i, j) for i, g in enumerate(groups) for j, p in enumerate(g["params"])}
        return self._places[id(value)]

    # ---- one window after another ----------------------------------------------------------------------------------

    def open(self) -> None:
        """Draw the first subspace of every variable; those of a dense method wait for the first gradient."""
        for variable in self.variables:
            projected = not isinstance(self.projector(variable), Identity)
            if self.method.dense and projected:
                variable.open(Full(variable.shape))
                self.cores[variable.name] = Core(variable)
            else:
                variable.open(self.drawn(variable))

    def refresh(self, step: int) -> None:
        """Fold every window and open the next one; optimizer state goes through the transport.

        Args:
            step: steps before this one.
        """
        number = step // (self.method.refresh_every or 1)
        self.keep([v for v in self.variables if v.name in self.cores])
        for core in self.cores.values():
            core.due = core.due or number % core.gap == 0
        for variable in self.variables:
            if variable.is_full:
                continue
            folded = variable.stack is None and (variable.moved or variable.decay != 1.0)
            self.keep([variable], *_OF_A_WINDOW, *(["weight"] if folded else []))
            self._learn(variable, variable.subspace)
            variable.fold(exact=self.method.paradigm != "fo", key=self.key.fold_in("fold", variable.window))
            old, new = variable.subspace, self.drawn(variable)
            with self._transported(variable, old, new):
                variable.open(new)

    def _learn(self, variable: Variable, subspace: Subspace) -> None:
        """Put what a window has shown into the spectrum of the next one."""
        moments = self.moments.pop(variable.name, None)
        if moments is not None:
            seen, exact = self.spectra.get(variable.name), self.method.estimator.exact
            learned = self.projector(variable).learn(seen, subspace, moments, exact=exact)
            if learned is not None:
                self.spectra[variable.name] = learned

    def renew(self, variable: Variable, core: Core, gradient: Tensor) -> None:
        """Open the next window of a weight whose dense gradient is at hand."""
        self.keep([variable], *_OF_A_CORE)
        if core.space is not None:
            self._learn(variable, core.space)
        new = self._draw(
            variable,
            self._name(variable, core.window + 1),
            variable.value,
            gradient=gradient,
            previous=core.subspace,
            momentum=None if core.whole else self._first_moment(core.value),
        )
        projector = self.projector(variable)
        if isinstance(projector, Patient) and core.subspace is not None:
            core.likeness.append(float(projector.likeness(core.subspace, new)))
            core.gap = projector.gap(core.gap, core.likeness)
        whole = self.comes_whole(variable, core.window + 1)
        old, before = core.space, dict(self.optimizer.state.get(core.value, {}))
        with self._transported(variable, old, Full(variable.shape) if whole else new):
            core.open(new, whole)
        variable.steps_in = core.space
        if old is not None and core.space is not None:
            after = self.optimizer.state.get(core.value, {})
            settings = self.group_of(core.value)
            self.method.residual.carried(core.kept, (old, before), (core.space, after), settings)

    def comes_whole(self, variable: Variable, window: int) -> bool:
        """Whether a dense method's optimizer has all of that weight in a window (see `Residual.whole`)."""
        return self.method.residual.whole(self._name(variable, window).fold_in("whole"))

    def _first_moment(self, value: nn.Parameter) -> Tensor | None:
        """Mean gradient in the coordinates, as the optimizer keeps it; None where it keeps none."""
        state, degrees = self.optimizer.state.get(value, {}), self.method.optimizer.degrees or {}
        name = next((n for n in state if degrees.get(n) == 1), None)
        if name is None or state[name] is None:
            return None
        betas = self.group_of(value).get("betas")
        if betas is None or "step" not in state:
            return state[name]
        return state[name] / (1 - betas[0] ** float(state["step"]))

    @contextmanager
    def _transported(self, variable: Variable, old: Subspace | None, new: Subspace) -> Iterator[None]:
        """Carry the optimizer state of a variable over to the window that is opened inside the context."""
        needed = self.method.transport.needs_change and old is not None
        change = new.change_from(cast(Subspace, old)) if needed else None
        before = self.trained(variable)
        state = given = self.optimizer.state.pop(before, {})
        if state:
            settings = self.group_of(before)
            state = self.method.transport(state, self.method.optimizer.degrees, change, settings)
        yield
        after = self.trained(variable)
        self.replace(before, after)
        if before.shape != after.shape and change is None:
            state = {}  # nothing says how it reads in a space of another shape
        if state:
            self.optimizer.state[after] = state
        for told in self.watchers:
            told(variable, (old, given), (self.subspace(variable), state))

    @torch.no_grad()
    def watch(self, run: Callable[[], Any]) -> None:
        """Estimate spectra from the inputs that every linear site has while something runs."""
        named = self.method.projector.eigenpairs
        sketches = {}
        for variable in self.variables:
            if not variable.is_full:
                key = self.key.fold_in("sketch", variable.name)
                sketches[variable.name] = Sketch(variable.shape[1], named + 8, key, variable.value)
                variable.watch = sketches[variable.name].add
        try:
            run()
        finally:
            for variable in self.variables:
                variable.watch = None
        self.keep([v for v in self.variables if v.name in sketches], "spectrum")
        for name, sketch in sketches.items():
            spectrum = sketch.spectrum(named)
            if spectrum is not None:
                self.spectra[name] = spectrum

    def observe(self, variable: Variable, gradient: Tensor) -> None:
        """Let the projector see a gradient in the coordinates."""
        subspace = self.subspace(variable)
        if self.method.projector.learns_from == "gradients" and not isinstance(subspace, Full):
            learner = cast(Learner, self.method.projector)
            seen = self.moments.get(variable.name)
            self.moments[variable.name] = learner.observe(subspace, seen, gradient)

    # ---- saving --------------------------------------------------------------------------------------------------

    def state(self, v: Variable) -> dict[str, Any]:
        """Tensors, numbers and strings of a variable from which `load` continues bit for bit."""
        result: dict[str, Any] = {
            "weight": None if v.held else v.weight.data.clone(),
            # a full value is the weight itself, unless it is the float32 master of a smaller one, or a copy
            "value": None if v.shares else v.value.data.clone(),
            "subspace": type(v.subspace).__name__,
            "tensors": {name: tensor.clone() for name, tensor in v.subspace.tensors().items()},
            "window": v.window,
            "decay": v.decay,
            "moved": v.moved,
            "optimizer": _copied(self.optimizer.state.get(self.trained(v), {})),
        }
        if v.name in self.cores:
            result["core"] = self.cores[v.name].state()
        if v.stack is not None and v.stack.rank:
            result["stack"] = v.stack.tensors()
        if v.name in self.moments:
            result["moments"] = dict(vars(self.moments[v.name]))
        if v.name in self.spectra:
            result["spectrum"] = self.spectra[v.name].tensors()
        return result

    def check(self, v: Variable, saved: dict[str, Any]) -> None:
        """Refuse what `load` cannot continue from, before anything is written.

        Raises:
            UsageError: a weight, or its coordinates, of another shape or dtype, or held only here or there.
            KeyError: a part is missing.
        """
        space, weight, value = rebuild(saved["subspace"], saved["tensors"]), saved["weight"], saved["value"]
        if v.held != (weight is None):
            raise UsageError(
                f"weight '{v.name}' is {'held' if v.held else 'written'} here, but not in the saved state; use the "
                "same hold, and quantize or offload the same weights"
            )
        alike = [(space.shape, v.shape)]
        if weight is not None:
            alike += [(weight.shape, v.weight.shape), (weight.dtype, v.weight.dtype)]
        if value is not None:
            alike += [(value.shape, space.coords_shape), (value.dtype, v.dtype)]
        if v.name in self.cores and saved["core"]["tensors"]:
            core = rebuild(saved["core"]["subspace"], saved["core"]["tensors"])
            alike.append((core.shape, v.shape))
        check_alike(f"weight '{v.name}'", alike)
        for name in ("window", "decay", "moved", "optimizer"):
            saved[name]  # is there

    @torch.no_grad()
    def load(self, v: Variable, saved: dict[str, Any]) -> None:
        """Continue a variable from what `state` gave."""
        if not v.held:
            v.weight.data.copy_(saved["weight"])
        if v.stack is not None:
            v.stack.load(saved.get("stack"))
        before = self.trained(v)
        # the copy of a whole held weight is there; to make it anew would ask all ranks for a sharded one
        if not (v.held and v.is_full and saved["subspace"] == "Full"):
            tensors = {k: t.to(v.weight.device) for k, t in saved["tensors"].items()}
            v.open(rebuild(saved["subspace"], tensors))
        if saved["value"] is not None:
            v.value.data.copy_(saved["value"])
        v.window, v.decay, v.moved = saved["window"], saved["decay"], saved["moved"]
        if v.name in self.cores:
            self.cores[v.name].load(saved["core"])
            v.steps_in = self.cores[v.name].space
        self.optimizer.state.pop(before, None)
        self.replace(before, self.trained(v))
        if saved["optimizer"]:
            self.optimizer.state[self.trained(v)] = _copied(saved["optimizer"])
        self.moments.pop(v.name, None)
        self.spectra.pop(v.name, None)
        if "moments" in saved:
            self.moments[v.name] = Moments(**_copied(saved["moments"]))
        if "spectrum" in saved:
            s = saved["spectrum"]
            self.spectra[v.name] = Spectrum(s["vectors"], s["values"], float(s["rest"]))

    def digest(self, v: Variable) -> Tensor:
        """A number for the bits of a weight, its coordinates and their subspace, and its optimizer state."""
        parts = [] if v.held else [v.weight.data]
        parts += [v.value.data, *v.subspace.tensors().values()]
        parts += [t for t in self.optimizer.state.get(self.trained(v), {}).values() if isinstance(t, Tensor)]
        core = self.cores.get(v.name)
        if core is not None and core.subspace is not None:
            parts += core.subspace.tensors().values()
        if v.stack is not None:
            parts += [v.stack.left, v.stack.right]
        return torch.stack([digest(p).cpu() * (2 * i + 1) for i, p in enumerate(parts)]).sum()

    # ---- going back ----------------------------------------------------------------------------------------------

    def keep(self, variables: Sequence[Variable], *parts: str) -> None:
        """Keep parts of variables that are about to be written."""
        self.undo.keep({v.name: partial(self._part, v) for v in variables}, ("numbers", *parts))

    def keep_values(self, variables: Sequence[Variable]) -> None:
        """Keep what an update writes."""
        shared, own = [], []
        for v in variables:
            (shared if v.shares else own).append(v)
        more = ("kept",) if self.cores else ()
        more += ("moments",) if self.method.projector.learns_from == "gradients" else ()
        self.keep(shared, "weight", "state", *more)
        self.keep(own, "value", "state", *more)

    def _part(self, v: Variable, part: str) -> Any:
        """A part of the state of a variable: tensors, numbers and strings."""
        core = self.cores.get(v.name)
        if part == "numbers":
            own = {"window": v.window, "decay": v.decay, "moved": v.moved}
            return own | ({} if core is None else {"core": core.numbers()})
        if part == "weight":
            return v.weight.data
        if part == "value":
            return v.value.data
        if part == "state":
            return dict(self.optimizer.state.get(self.trained(v), {}))
        if part == "kept":
            return {} if core is None else core.kept
        if part in ("moments", "spectrum"):
            learned = self._learned(part)[0].get(v.name)
            return None if learned is None else dict(vars(learned))
        if part == "stack":
            return None if v.stack is None else v.stack.tensors()
        space = v.subspace if part == "space" else None if core is None else core.subspace
        return None if space is None else {"kind": type(space).__name__, "tensors": space.tensors()}

    def _learned(self, part: str) -> tuple[dict[str, Any], type]:
        """What that part is of all weights, and its kind."""
        return (self.moments, Moments) if part == "moments" else (self.spectra, Spectrum)

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo what this step has written."""
        for variable in self.variables:
            variable.value.grad = self.trained(variable).grad = None
            if variable.name in self.undo.old:
                self._put_one_back(variable, self.undo.old[variable.name])

    def _put_one_back(self, v: Variable, old: dict[str, Any]) -> None:
        back = self.undo.fresh
        before, core = self.trained(v), self.cores.get(v.name)
        state = self.optimizer.state.pop(before, {})
        if "space" in old:
            v.open(rebuild(old["space"]["kind"], back(old["space"]["tensors"])))
        if "weight" in old:
            self.undo.into(old["weight"], v.weight.data)
        if "value" in old:
            self.undo.into(old["value"], v.value.data)
            if "weight" not in old:
                v.commit()
        if old.get("stack") is not None:
            assert v.stack is not None
            v.stack.load(back(old["stack"]))
        if core is not None:
            if "core" in old:
                space = old["core"]
                core.subspace = None if space is None else rebuild(space["kind"], back(space["tensors"]))
            core.put_back(old["numbers"]["core"])
            v.steps_in = core.space
            core.kept = back(old["kept"], core.kept) if "kept" in old else core.kept
        self.replace(before, self.trained(v))
        state = back(old["state"], state) if "state" in old else state
        if state:
            self.optimizer.state[self.trained(v)] = state
        for part in ("moments", "spectrum"):
            if part in old:
                learned, kind = self._learned(part)
                learned.pop(v.name, None)
                if old[part] is not None:
                    learned[v.name] = kind(**back(old[part]))
        v.window, v.decay, v.moved = (old["numbers"][name] for name in ("window", "decay", "moved"))


def check_alike(what: str, pairs: Iterable[tuple[Any, Any]]) -> None:
    """Refuse shapes and dtypes of a saved state that are not those of here."""
    for there, here in pairs:
        if there != here:
            there, here = (x if isinstance(x, torch.dtype) else tuple(x) for x in (there, here))
            raise UsageError(
                f"{what} is {there} in the saved state and {here} here; use the model that it was saved from, in that dtype"
            )


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in state.items()}
