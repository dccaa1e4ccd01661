"""What a method makes of a gradient: how much of it lies in the subspaces, how flat it is, and how the estimates of it scatter.

A diagnosis looks at one batch, always the same, with dropout off. Every figure is relative to the dense gradient `G (m, n)` of that
batch at the weights of the moment, `P` the basis of a window and `E` one estimate of `G`, drawn in a subspace (and along a
probe) of its own as the next window would be:

- energy: `|Pi G|² / |G|²`, `Pi` the orthogonal projection on the span of the current subspace, whatever kind and scale it has; 1 in
  the whole space, r / n on average for a random subspace that knows nothing of `G`;
- effective rank: `exp(-sum p_i log p_i)`, `p_i = s_i / sum s`, of the singular values `s` of `G` (Roy and Vetterli 2007); stable rank:
  `|G|² / s_1²`;
- gain: mean of `<E, G> / |G|²`, 1 for an unbiased estimate, with its standard error;
- bias: `|mean(E) - G|² / |G|²`, estimated without the part that the scatter of few draws adds (so it may be below zero);
- variance: `mean |E - mean(E)|² / |G|²`, and what the theory says where there is a closed form;
- cosine: mean over the draws of that between `E` and `G`;
- moments kept: of the last change of a subspace, `|M'|² / |M|²` and the cosine between `M'` and `M`, the first moment before and
  after the transport, each read as the gradient in its span.

Nothing of a run is changed: weights are exchanged for a copy by reference and put back, draws have names of their own, the
optimizer is not asked. It costs a forward and backward pass and small factorizations; under paradigms without backprop also the
forward passes of the draws. Beside the model it holds a copy of the projected weights while it lasts, and without backprop
dense gradients and their sum; on a GPU that counts in the peak that a run has measured.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zolr.engine import Engine
from zolr.errors import UsageError
from zolr.estimators import same_noise
from zolr.estimators.backprop import Backprop
from zolr.estimators.forward import Forward
from zolr.estimators.spsa import Spsa
from zolr.keys import Key
from zolr.modes import mode
from zolr.projectors import oriented, projected_length
from zolr.projectors.coordinate import Coordinate
from zolr.projectors.dependent import Dependent
from zolr.projectors.gaussian import Gaussian
from zolr.projectors.identity import Identity
from zolr.projectors.plumage import Plumage
from zolr.projectors.srht import Srht
from zolr.projectors.stiefel import Stiefel
from zolr.projectors.two_sided import TwoSidedHaar
from zolr.spectra import Spectrum, mixed_probabilities
from zolr.subspaces import Full, Subspace
from zolr.variables import Variable, widen

DRAWS = 8

TINY = torch.finfo(torch.float64).tiny


class Clock(Protocol):
    """What a diagnosis asks of the progress of a run."""

    @property
    def step(self) -> int:
        """Steps done."""
        ...


# ---- what theory expects ---------------------------------------------------------------------------------------------


def second_moment(
    projector: Any, shape: tuple[int, ...], gradient: Tensor, spectrum: Spectrum | None = None
) -> float | None:
    """`E|G P Pᵀ|² / |G|²` of a projector's law at c = 1; None where there is no closed form.

    Args:
        gradient: `G (m, n)`; only laws that are made for one look at it.
        spectrum: what a law has learned.

    Reference: arXiv 2603.20632; arXiv 2505.18313 (sampled singular directions).
    """
    if isinstance(projector, TwoSidedHaar):
        m, n = shape
        return m * n / (min(projector.rank, m) * min(projector.rank, n))
    if not isinstance(projector, Stiefel | Coordinate | Srht | Gaussian | Dependent | Plumage):
        return None
    n = projected_length(projector.side, shape)
    r = min(projector.rank, n)
    if isinstance(projector, Gaussian):
        return (n + r + 1) / r
    if isinstance(projector, Plumage):
        squares = torch.linalg.svdvals(gradient.double()).square()
        pi = mixed_probabilities(_padded(squares, n), r, projector.alpha)[: len(squares)].to(squares)
        return _share((squares / pi.clamp_min(TINY))[squares > 0].sum(), gradient)
    if isinstance(projector, Dependent) and spectrum is not None:
        turned = oriented(projector.side, gradient, gradient).double()  # the projected side comes last
        vectors = spectrum.vectors.to(turned)
        held = (turned @ vectors).square().sum(0).cpu()  # (k,)
        rest = torch.full((n - len(held),), spectrum.rest, dtype=torch.float64)
        pi = mixed_probabilities(torch.cat((spectrum.values, rest)), r, projector.alpha)
        named, others = pi[: len(held)], pi[len(held) :]
        total = (held / named.clamp_min(TINY)).sum()
        if len(others):
            total = total + (turned.square().sum().cpu() - held.sum()).clamp_min(0) / others[0].clamp_min(
                TINY
            )
        return _share(total, gradient)
    return n / r


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.cat((values, values.new_zeros(max(0, length - len(values)))))


def _share(value: Tensor, gradient: Tensor) -> float:
    return float(value / gradient.double().square().sum().clamp_min(TINY))


@dataclass(frozen=True)
class _Probing:
    """How probes multiply a gradient: `E|c z_l|² = size (d_l |g|² + own |g_l|²)` over `d_l` of all `d` coordinates."""

    size: float
    own: float
    probes: int


def _probing(estimator: Any, coordinates: int) -> _Probing | None:
    """The second moment of an estimator's probes; None where it has no closed form."""
    central = isinstance(estimator, Spsa) and estimator.sides == 2 and not estimator.normalize
    if not (central and estimator.directions == "fresh") and not isinstance(estimator, Forward):
        return None
    size = coordinates / (coordinates + 2) if estimator.law == "sphere" else 1.0
    return _Probing(size, 0.0 if estimator.law == "rademacher" else 2.0, estimator.probes)


# ---- one gradient ----------------------------------------------------------------------------------------------------


def energy(subspace: Subspace, gradient: Tensor) -> float:
    """Share of the squared norm of `G (m, n)` inside the span of a subspace.

    >>> from zolr.subspaces import Right
    >>> energy(Right(3 * torch.eye(4)[:, :1], 2), torch.ones(2, 4))
    0.25
    """
    if isinstance(subspace, Full):
        return 1.0
    coords = widen(subspace, torch.float64).project(gradient.double())
    inside = (coords * widen(subspace, torch.float64).dual(coords)).sum()
    return _share(inside, gradient)


def ranks(gradient: Tensor) -> tuple[float, float]:
    """Effective rank (exponential of the entropy of the singular values' shares) and stable rank of a matrix.

    >>> effective, stable = ranks(torch.diag(torch.tensor([2.0, 2.0, 0.0])))
    >>> round(effective, 6), round(stable, 6)
    (2.0, 2.0)
    """
    tall = gradient if gradient.shape[0] >= gradient.shape[1] else gradient.mT
    # the smaller Gram matrix: a k x k eigenproblem instead of the singular values of the whole
    values = torch.linalg.eigvalsh((tall.mT.double() @ tall.double()).cpu()).clamp_min(0)
    values = torch.where(values > 1e-14 * values[-1], values, 0.0)  # squares of what is rounding in float64
    if not float(values[-1]) > 0:
        return 0.0, 0.0
    single = values.sqrt()
    p = single / single.sum()
    entropy = -torch.special.xlogy(p, p).sum()
    return float(entropy.exp()), float(values.sum() / values[-1])


# ---- the model as it stands ------------------------------------------------------------------------------------------


@contextmanager
def _standing(variables: Sequence[Variable]) -> Iterator[None]:
    """The weights that the model computes with now in place of the stored ones, so that a window may be left for a moment.

    The stored tensors are exchanged, not written, and come back as they were.
    """
    exchanged = [v for v in variables if not v.is_full and (v.moved or v.decay != 1.0)]
    before = [(v, v.weight.data, v.decay, v.moved) for v in exchanged]
    try:
        with torch.no_grad():
            for variable in exchanged:
                dense = variable.dense(variable.value.detach())
                assert dense is not None
                variable.weight.data, variable.decay, variable.moved = dense, 1.0, False
        yield
    finally:
        for variable, data, decay, moved in before:
            variable.weight.data, variable.decay, variable.moved = data, decay, moved


@contextmanager
def _still(engine: Engine) -> Iterator[None]:
    """No dropout, and no flag of a run changed."""
    wanted = [(v.value, v.value.requires_grad) for v in engine.variables]
    try:
        with mode(engine.model, training=False):
            yield
    finally:
        for value, flag in wanted:
            value.requires_grad_(flag)


def dense_gradients(engine: Engine, batch: Any, take: Callable[[Variable, Tensor], None]) -> float:
    """Give `take` the dense gradient `(m, n)` of every active weight on a batch, one at a time, and return the loss."""
    with _still(engine), _standing(engine.active), ExitStack() as stack:
        for variable in engine.active:
            if not variable.is_full:
                stack.enter_context(variable.within(Full(variable.shape)))
                variable.value = nn.Parameter(variable._whole())
        found = Backprop()(
            engine._loss_of, [batch], engine.active, lambda v, g: take(v, v.mask(g)), engine.key
        )
    return float(found.loss)


def drawn(
    engine: Engine, variable: Variable, before: Subspace, key: Key, gradient: Tensor | None = None
) -> Subspace:
    """A subspace as the method would draw the next one after `before`, for this gradient."""
    subspace = engine.windows.projector(variable).draw(
        variable.shape,
        key,
        like=variable.weight.data,
        gradient=gradient,
        previous=None if isinstance(before, Full) else before,
        spectrum=engine.windows.spectra.get(variable.name),
    )
    return variable.without_frozen_row(subspace)


# ---- estimates -------------------------------------------------------------------------------------------------------


class _Scatter:
    """Running sums over the estimates of one gradient."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient
        self.square = float(gradient.double().square().sum())
        self.total: Tensor | None = None
        self.sizes: list[float] = []  # |E|²
        self.along: list[float] = []  # <E, G>

    def add(self, estimate: Tensor) -> None:
        self.sizes.append(float(estimate.double().square().sum()))
        self.along.append(float((estimate.double() * self.gradient.double()).sum()))
        self.total = estimate.clone() if self.total is None else self.total.add_(estimate)

    def sums(self) -> "_Sums":
        assert self.total is not None
        together = float(self.total.double().square().sum())
        return _Sums(self.square, together, tuple(self.sizes), tuple(self.along))


@dataclass(frozen=True)
class _Sums:
    """What is known of some estimates: numbers, that those of several weights add up in."""

    square: float  # |G|²
    together: float  # |sum of E|²
    sizes: tuple[float, ...]
    along: tuple[float, ...]

    def __add__(self, other: "_Sums") -> "_Sums":
        pairs = [
            tuple(map(sum, zip(a, b, strict=True)))
            for a, b in ((self.sizes, other.sizes), (self.along, other.along))
        ]
        return _Sums(self.square + other.square, self.together + other.together, pairs[0], pairs[1])

    def figures(self) -> dict[str, float]:
        """Gain, bias, variance and cosine."""
        k, square = len(self.sizes), max(self.square, TINY)
        gains = torch.tensor(self.along, dtype=torch.float64) / square
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        # products of different draws have no scatter in them
        crossed = (self.together - float(sizes.sum())) / (k * (k - 1)) / square
        return {
            "gain": float(gains.mean()),
            "gain_error": float(gains.std() / k**0.5),
            "bias": crossed - 2 * float(gains.mean()) + 1,
            "variance": (float(sizes.sum()) - self.together / k) / (k - 1) / square,
            "cosine": float((torch.tensor(self.along) / (sizes * square).clamp_min(TINY).sqrt()).mean()),
        }


@dataclass
class _Layer:
    """What is found of one weight."""

    shape: tuple[int, ...]
    found: dict[str, float]
    square: float
    kappa: float | None  # second moment of the projection
    sums: _Sums | None = None


def _look(engine: Engine, variable: Variable, space: Subspace, gradient: Tensor) -> _Layer:
    """What a gradient and the current subspace alone say."""
    square = float(gradient.double().square().sum())
    found = {"norm": square**0.5, "energy": energy(space, gradient)}
    if len(variable.shape) == 2:
        found["rank_effective"], found["rank_stable"] = ranks(gradient)
    whole = isinstance(engine.windows.projector(variable), Identity) or len(variable.shape) != 2
    spectrum = engine.windows.spectra.get(variable.name)
    kappa = (
        1.0
        if whole
        else second_moment(engine.windows.projector(variable), variable.shape, gradient, spectrum)
    )
    return _Layer(variable.shape, found, square, kappa)


def diagnose(engine: Engine, batch: Any, key: Key, draws: int = DRAWS) -> dict[str, Any]:
    """One diagnosis: figures of the whole, and of every matrix by name.

    Args:
        engine: a run between two steps; nothing of it is changed.
        batch: one batch of its loss.
        key: name of the draws.
        draws: estimates per weight, at least 2.

    Returns:
        `loss`, `draws`, `total`, `projected` (as `total`, of the weights that have a subspace, where there are any) and `layers`, see
        above. Without a probe radius yet (it is chosen in the first step) there are no figures of estimates.
    """
    layers: dict[str, _Layer] = {}
    kept: dict[str, _Scatter] = {}
    spaces = {v.name: engine.subspace(v) for v in engine.active}  # before any of them is left for a moment
    backprop = engine.method.paradigm == "fo"

    def take(variable: Variable, gradient: Tensor) -> None:
        layer = layers[variable.name] = _look(engine, variable, spaces[variable.name], gradient)
        scatter = _Scatter(gradient)
        if not backprop:
            kept[variable.name] = scatter
            return
        for i in range(draws):
            subspace = drawn(
                engine, variable, spaces[variable.name], key.fold_in("subspace", i, variable.name), gradient
            )
            subspace = widen(subspace, gradient.dtype)
            scatter.add(subspace.lift(subspace.project(gradient)))
        layer.sums = scatter.sums()

    with torch.no_grad(), same_noise(engine.variables[0].value.device):
        loss = dense_gradients(engine, batch, take)
        if not backprop and not engine._tune:
            _probe(engine, batch, key, draws, kept)
            for name, scatter in kept.items():
                layers[name].sums = scatter.sums()
    layers = {name: layers[name] for name in spaces}  # gradients come from the last layer on
    _expect(engine, layers, backprop)
    projected = [layers[name] for name, space in spaces.items() if not isinstance(space, Full)]
    return {
        "loss": loss,
        "draws": draws,
        "total": _together(list(layers.values())),
        **({"projected": _together(projected)} if projected else {}),
        "layers": {name: layer.found for name, layer in layers.items() if len(layer.shape) == 2},
    }


def _together(layers: Sequence[_Layer]) -> dict[str, float | None]:
    """The figures of several weights as if they were one."""
    whole = sum(layer.square for layer in layers)
    inside = sum(layer.square * layer.found["energy"] for layer in layers)
    total: dict[str, float | None] = {"norm": whole**0.5, "energy": inside / max(whole, TINY)}
    sums = [layer.sums for layer in layers if layer.sums is not None]
    if sums:
        added = sums[0]
        for more in sums[1:]:
            added = added + more
        total |= added.figures()
        scatters = [layer.found.get("variance_expected") for layer in layers]
        if None not in scatters:
            weighted = zip(scatters, layers, strict=True)
            total["variance_expected"] = sum(s * la.square for s, la in weighted if s is not None) / max(
                whole, TINY
            )
    return total


def _probe(engine: Engine, batch: Any, key: Key, draws: int, kept: Mapping[str, _Scatter]) -> None:
    """Estimates of a method without backprop, each in subspaces and along probes of its own."""
    for i in range(draws):
        with _still(engine), _standing(engine.active), ExitStack() as stack:
            for variable in engine.active:
                if not variable.is_full:
                    name = key.fold_in("subspace", i, variable.name)
                    subspace = drawn(engine, variable, engine.subspace(variable), name)
                    stack.enter_context(variable.within(subspace))

            def emit(variable: Variable, gradient: Tensor) -> None:
                space = widen(variable.subspace, gradient.dtype)
                kept[variable.name].add(space.lift(variable.mask(gradient)))

            engine.method.estimator(engine._loss_of, [batch], engine.active, emit, key.fold_in("probe", i))


def _expect(engine: Engine, layers: Mapping[str, _Layer], backprop: bool) -> None:
    """Put the variance that theory expects beside the measured one."""
    spaces = {v.name: v for v in engine.active}
    sizes = {name: prod(engine.subspace(spaces[name]).coords_shape) for name in layers}
    probing = None if backprop else _probing(engine.method.estimator, sum(sizes.values()))
    whole = sum(layer.square for layer in layers.values())
    for name, layer in layers.items():
        if layer.sums is None:
            continue
        layer.found |= layer.sums.figures()
        if layer.kappa is None or (not backprop and probing is None) or not layer.square:
            continue
        expected, projector = layer.kappa - 1, engine.windows.projector(spaces[name])
        if probing is not None:
            # lengths are multiplied by kappa where the columns of a basis are orthonormal up to one factor
            if layer.kappa != 1.0 and not isinstance(projector, Stiefel | Coordinate | Srht):
                continue
            # E|lift(x)|² = kappa |x|², d coordinates of m n / kappa; E|g|² = |G|²
            one = probing.size * (prod(layer.shape) * whole / layer.square + probing.own * layer.kappa)
            expected += (one - layer.kappa) / probing.probes
        layer.found["variance_expected"] = getattr(projector, "c", 1.0) ** 2 * expected


# ---- a run -----------------------------------------------------------------------------------------------------------


class Diagnostics:
    """Diagnoses a run every so many steps, an observer of `training.train`.

    Args:
        engine: of the run.
        batch: one micro-batch, the same at every diagnosis; on the device of the model.
        every: steps between two diagnoses.
        draws: estimates per weight.

    Raises:
        UsageError: numbers out of range, a private method (a diagnosis looks at the data without noise), or weights that
            are held (which have no dense gradient).
    """

    def __init__(self, engine: Engine, batch: Any, *, every: int, draws: int = DRAWS) -> None:
        if every < 1 or draws < 2:
            raise UsageError(
                f"a diagnosis every {every} steps with {draws} draws is not possible; use at least 1 step, and 2 draws"
            )
        if engine.method.private:
            raise UsageError(
                "a diagnosis looks at gradients without noise, so a private run would not be private; leave it out"
            )
        held = next((v.name for v in engine.variables if v.held), None)
        if held is not None:
            raise UsageError(
                f"weight '{held}' is never written (quantized, offloaded, or held on request) and has no dense gradient; "
                "diagnose a run of plain weights"
            )
        self.engine, self.batch, self.every, self.draws = engine, batch, every, draws
        self.moments: dict[str, dict[str, float]] = {}
        engine.windows.watchers.append(self.changed)

    def __call__(self, progress: Clock) -> Iterator[dict[str, Any]]:
        """The line of `metrics.jsonl` that is due after this step, if one is."""
        if progress.step % self.every:
            return
        started = time.perf_counter()
        found = diagnose(
            self.engine, self.batch, self.engine.key.fold_in("diagnosis", progress.step), self.draws
        )
        for name, moments in self.moments.items():
            found["layers"].setdefault(name, {}).update(moments)
        self.moments = {}
        found["seconds"] = time.perf_counter() - started
        yield {"step": progress.step, "diagnosis": _rounded(found)}

    def state_dict(self) -> dict[str, Any]:
        """What has been seen since the last diagnosis, of which the next one is to tell."""
        return {"moments": {name: dict(moments) for name, moments in self.moments.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.moments = {name: dict(moments) for name, moments in state["moments"].items()}

    @torch.no_grad()
    def changed(
        self,
        variable: Variable,
        before: tuple[Subspace | None, Mapping[str, Any]],
        after: tuple[Subspace | None, Mapping[str, Any]],
    ) -> None:
        """What a transport has made of the first moment of one weight."""
        (old, given), (new, state) = before, after
        degrees = self.engine.method.optimizer.degrees or {}
        name = next((n for n in given if degrees.get(n) == 1 and isinstance(given[n], Tensor)), None)
        if name is None or old is None or new is None:
            return
        self.moments[variable.name] = kept_of(old, given[name], new, state.get(name))


def kept_of(old: Subspace, moment: Tensor, new: Subspace, carried: Tensor | None) -> dict[str, float]:
    """Energy and direction that a first moment keeps at a change.

    Args:
        moment: mean gradient in the coordinates of `old`.
        carried: what became of it in those of `new`; None where it begins afresh.
    """
    if carried is None or carried.shape != new.coords_shape:
        return {"moment_kept": 0.0, "moment_cosine": 0.0}
    old, new = widen(old, torch.float64), widen(new, torch.float64)
    m, c = moment.double(), carried.double()
    inside, outside = old.dual(m), new.dual(c)  # whose lifts are the gradients in the spans
    sizes = float((m * inside).sum()), float((c * outside).sum())
    shared = float((outside * new.project(old.lift(inside))).sum())
    return {
        "moment_kept": sizes[1] / max(sizes[0], TINY),
        "moment_cosine": shared / max((sizes[0] * sizes[1]) ** 0.5, TINY),
    }


def _rounded(value: Any) -> Any:
    """Six digits are more than a figure from a few draws has."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) and isfinite(value) else value
