"""Laws of engine.py: a step is what torch would do on an explicit W + lift(B); a run can be stopped, resumed, left."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
)
from torch.utils._python_dispatch import TorchDispatchMode

from zolr import checkpoints
from zolr.engine import Engine
from zolr.errors import UsageError
from zolr.estimators import changed, setting
from zolr.estimators.backprop import Backprop
from zolr.estimators.spsa import Spsa
from zolr.keys import Key
from zolr.kinds import categories
from zolr.methods import METHODS, SGD, Method, compose
from zolr.optim import OPTIMIZERS, OptimizerRule
from zolr.optim.averaged import Averaged
from zolr.optim.factored import Factored
from zolr.optim.mofasgd import MomentumFactorizedSgd
from zolr.probes import Layout, Probe, Space
from zolr.projectors.dependent import Dependent
from zolr.projectors.gaussian import Gaussian
from zolr.projectors.identity import Identity
from zolr.projectors.stiefel import Stiefel
from zolr.projectors.two_sided import TwoSidedHaar
from zolr.subspaces import TwoSided
from zolr.transports import TRANSPORTS
from zolr.transports.keep import Keep
from zolr.transports.reset import Reset

ROWS = [(name, paradigm) for name, row in METHODS.items() for paradigm in row.paradigms]
PARADIGMS = ("fo", "zo", "fwd")
Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """A small language model with a padded embedding, a norm and two layers of one shape."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 6, padding_idx=0), nn.LayerNorm(8)
        self.up, self.same, self.again = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.head, self.dropout = nn.Linear(8, 9), nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.up(self.embed(ids))))
        return self.head(self.dropout(x + self.again(torch.tanh(self.same(x)))))


def net(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net(dropout).to(dtype)


def rows(model: nn.Module, batch: Batch) -> Tensor:
    """Losses per example."""
    logits = model(batch[0])
    return F.cross_entropy(
        logits.float().mT if logits.dtype.itemsize < 4 else logits.mT, batch[1], reduction="none"
    ).mean(1)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return rows(model, batch).mean()


def sum_and_count(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return rows(model, batch).sum(), torch.tensor(len(batch[0]))


def draw_batches(count: int, size: int = 4) -> list[Batch]:
    ids = torch.randint(9, (count, size, 5), generator=torch.Generator().manual_seed(7))
    return list(zip(ids, (2 * ids + 1) % 9, strict=True))


BATCHES = draw_batches(20)


def small(name: str, paradigm: str | None = None, every: int = 3, **settings: Any) -> Method:
    """A row at a size that fits the net, with windows short enough to end within a test."""
    method = compose(name, paradigm, **settings)
    if hasattr(method.projector, "rank"):
        rank = min(3, method.projector.rank)
        method = replace(method, projector=replace(method.projector, rank=rank), refresh_every=every)  # type: ignore[type-var]
    if setting(method.estimator, "probes", 1) > 3:
        method = replace(method, estimator=changed(method.estimator, probes=3))
    if method.layers.every and "switch_every" not in settings:
        method = replace(method, layers=replace(method.layers, every=1))  # type: ignore[type-var]
    return method


def chosen(name: str, paradigm: str) -> float | None:
    """A rate where an engine may not choose one."""
    return None if METHODS[name].build(paradigm).tunable else 1e-2


def rate(method: Method) -> float:
    return 0.1 if method.optimizer.name in ("sgd", "momentum") and method.paradigm == "fo" else 1e-2


def live(model: nn.Module, engine: Engine) -> dict[str, Tensor]:
    """The weights that the model computes with now, from the definition `decay * W + lift(B)`."""
    result = {name: p.detach().clone() for name, p in model.named_parameters()}
    for v in engine.variables:
        if not v.is_full:
            lifted = v.subspace.lift(v.value.detach())
            result[v.name] = v.decay * result[v.name] + (lifted.T if v.transposed else lifted)
    return result


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert list(a) == list(b)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two nested states are not the same bits."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) ^ set(b))
        return keys + [d for key in a if key in b for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    else:
        same = type(a) is type(b) and a == b
    return [] if same else [path]


# ---- T18, T19, T21: identities of one step -------------------------------------------------------------------------


class Fresh(TorchDispatchMode):
    """Shapes of all tensors made in the context that have memory of their own, not that of `known`."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.pointer = known.untyped_storage().data_ptr()
        self.shapes: set[tuple[int, ...]] = set()

    def holds(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        return (
            storage.data_ptr() != self.pointer and storage.nbytes() >= tensor.numel() * tensor.element_size()
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and not tensor._is_zerotensor() and self.holds(tensor):
                self.shapes.add(tuple(tensor.shape))
        return out


SIDES = [
    (projector, side) for projector in ("stiefel", "gaussian", "coordinate") for side in ("right", "left")
]
SIDES += [("two_sided", None)]


@pytest.mark.parametrize(("projector", "side"), SIDES)
def test_t18_the_gradient_in_the_coordinates_is_the_projected_gradient(projector, side):
    model, twin = net(), net()
    method = compose("stiefel", "fo", projector=projector, rank=3, side=side, optimizer="sgd")
    engine = Engine(model, method, lr=1.0, loss=loss)
    got: dict[str, Tensor] = {}
    Backprop()(
        partial(loss, model),
        BATCHES[:1],
        engine.variables,
        lambda v, g: got.update({v.name: g.clone()}),
        Key(0),
    )
    dense = dict(
        zip(
            dict(twin.named_parameters()),
            torch.autograd.grad(loss(twin, BATCHES[0]), list(twin.parameters())),
            strict=True,
        )
    )
    for v in engine.variables:
        assert torch.allclose(
            v.mask(got[v.name]), v.mask(v.subspace.project(dense[v.name])), rtol=0, atol=1e-12
        )
        assert float(got[v.name].abs().max()) > 1e-6


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_t18_nothing_as_large_as_the_weight_is_made(paradigm):
    model = nn.Linear(40, 24)
    batch = torch.ones(5, 40), torch.zeros(5, 24)
    method = compose(
        "stiefel", paradigm, rank=3, optimizer="sgd", **({"eps": 1e-2} if paradigm == "zo" else {})
    )
    realization = "side" if paradigm == "zo" else "auto"
    engine = Engine(
        model, method, lr=1e-3, loss=lambda m, b: F.mse_loss(m(b[0]), b[1]), realization=realization
    )
    with Fresh(model.weight) as made:
        assert not engine.step([batch]).skipped
    assert (24, 3) in made.shapes and not {(24, 40), (40, 24)} & made.shapes


@pytest.mark.parametrize(("projector", "side"), SIDES)
def test_t19_one_sgd_step_and_a_fold_is_a_step_along_the_projected_gradient(projector, side):
    model, twin = net(), net()
    method = compose(
        "stiefel", "fo", projector=projector, rank=3, side=side, optimizer="sgd", refresh_every=1
    )
    engine = Engine(model, method, lr=0.2, loss=loss)
    weights = {name: p.detach().clone() for name, p in twin.named_parameters()}
    for batch in BATCHES[:4]:
        for name, p in twin.named_parameters():
            p.data.copy_(weights[name])
        gradients = torch.autograd.grad(loss(twin, batch), list(twin.parameters()))
        for v, (name, g) in zip(engine.variables, zip(weights, gradients, strict=True), strict=True):
            bare = compose("stiefel", projector=projector, rank=3, side=side).projector
            if g.dim() == 2:  # W - eta G P Pᵀ with a basis drawn anew, by name
                key = Key(0).fold_in("subspace", engine.step_count, name)
                space = bare.draw(tuple(g.shape), key, like=g)
                g = space.lift(space.project(g))
                if name == "embed.weight" and side != "right":
                    kept = v.without_frozen_row(space)  # the padding row is no direction
                    g = kept.lift(kept.project(gradients[0]))
            weights[name] = weights[name] - 0.2 * g
        engine.step([batch])
        assert gap(live(model, engine), weights) < 1e-12


@pytest.mark.parametrize(("name", "paradigm"), ROWS)
@pytest.mark.parametrize("realization", ["side", "rebuild"])
def test_r3_folding_changes_no_output_and_twice_is_once(name, paradigm, realization):
    model = net()
    engine = Engine(model, small(name, paradigm), lr=1e-2, loss=rows, realization=realization)
    for batch in BATCHES[:5]:  # mid-window
        engine.step([batch])
    with torch.no_grad():
        before, weights = model(BATCHES[0][0]), live(model, engine)
        engine.fold()
        assert torch.allclose(model(BATCHES[0][0]), before, rtol=0, atol=1e-12)
    assert gap(live(model, engine), weights) < 1e-12
    assert all(v.is_full or not v.value.any() for v in engine.variables)
    once = engine.state_dict()
    engine.fold()
    assert not differences(once, engine.state_dict())


@pytest.mark.parametrize(
    ("name", "paradigm"), [("stiefel", "fo"), ("stiefel", "zo"), ("lozo-m", "zo"), ("lozo", "zo")]
)
def test_r3_a_fold_in_the_middle_of_a_window_does_not_change_the_run(name, paradigm):
    models = net(), net()
    runs = [Engine(m, small(name, paradigm, every=4), lr=1e-2, loss=loss, weight_decay=0.3) for m in models]
    for step, batch in enumerate(BATCHES[:10]):
        if step % 3 == 2:
            runs[0].fold()
        for engine in runs:
            engine.step([batch])
    assert gap(live(models[0], runs[0]), live(models[1], runs[1])) < 1e-10


@pytest.mark.parametrize("c", [1.0, 0.25])
def test_t21_an_adam_step_moves_a_weight_by_lr_times_the_root_of_c_m_n(c):
    signs = OptimizerRule("adamw", {"eps": 0.0})  # the first step of Adam is the sign of the gradient
    model = nn.Linear(16, 6, bias=False).double()
    start = model.weight.detach().clone()
    engine = Engine(
        model,
        Method(Backprop(), Stiefel(rank=4, c=c), signs),
        lr=1e-3,
        loss=lambda m, b: m(b).square().mean(),
    )
    engine.step([torch.randn(5, 16, dtype=torch.float64)])
    moved = float((live(model, engine)["weight"] - start).norm())
    assert abs(moved / (1e-3 * math.sqrt(c * 6 * 16)) - 1) < 1e-12


# ---- T20: contraction on a quadratic ---------------------------------------------------------------------------------


def contraction(method: Method, lr: float, steps: int, chains: int, shape: tuple[int, int]) -> float:
    """Mean of ‖W‖² after some steps on ‖W‖² / 2 over independent chains, relative to its start."""
    total = 0.0
    for seed in range(chains):
        model = nn.ModuleList(
            nn.Linear(shape[1], shape[0], bias=False) for _ in range(60 if method.paradigm == "fo" else 1)
        ).double()
        for layer in model:
            nn.init.eye_(layer.weight)
        start = sum(float(p.detach().square().sum()) for p in model.parameters())
        eye = torch.eye(shape[1], dtype=torch.float64)
        engine = Engine(
            model, method, lr=lr, loss=lambda m, b: sum(layer(b).square().sum() for layer in m) / 2, seed=seed
        )
        for _ in range(steps):
            engine.step([eye])
        total += sum(float(w.square().sum()) for w in live(model, engine).values()) / start
    return total / chains


@pytest.mark.slow
@pytest.mark.parametrize(
    ("projector", "lr", "inner", "refreshes", "expected"),
    [
        (Stiefel(rank=4), 4 / 16, 1, 5, (1 - 4 / 16) ** 5),
        (Gaussian(rank=4), 4 / 21, 1, 5, (1 - 4 / 21) ** 5),
        *[(Stiefel(rank=4), 0.3 * 4 / 16, k, 3, (0.75 + 0.25 * 0.7 ** (2 * k)) ** 3) for k in (1, 3, 10)],
    ],
)
def test_t20_the_subspace_loop_contracts_a_quadratic_as_the_closed_form_says(
    projector, lr, inner, refreshes, expected
):
    method = Method(Backprop(), projector, SGD, Reset(), inner)
    got = contraction(method, lr, inner * refreshes, 6, (16, 16))
    assert abs(got / expected - 1) < 0.015


@pytest.mark.slow
@pytest.mark.parametrize("projector", [Stiefel(rank=2), Identity()])
def test_t20_the_forward_only_loop_contracts_a_quadratic_as_the_closed_form_says(projector):
    m, n, r = 4, 8, 2
    whole = isinstance(projector, Identity)
    size = m * n + 2 if whole else m * n + 2 * n / r
    method = Method(
        Spsa(eps=0.5, law="gaussian"), projector, SGD, Keep() if whole else Reset(), None if whole else 1
    )
    assert abs(contraction(method, 1 / size, 5, 700, (m, n)) / (1 - 1 / size) ** 5 - 1) < 0.015


# ---- O1: torch.optim on explicit weights -----------------------------------------------------------------------------

TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9, dampening=0.9),
    "adamw": partial(torch.optim.AdamW, weight_decay=0),
    "Adafactor": partial(torch.optim.Adafactor, weight_decay=0),
    "muon": partial(torch.optim.Muon, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
    # rules that torch lacks, which have laws of their own
    "adafactor": Factored,
    "adalomo": partial(Factored, scaled=True),
    "averaged": Averaged,
    "flora": Averaged,
    "mofasgd": MomentumFactorizedSgd,
}
FACTORED = partial(Factored, beta=0.9, scaled=True)
# what takes vectors, and what takes embeddings and heads, whose rows are vectors of their own
APART: dict[str, tuple[Callable[..., torch.optim.Optimizer], Callable[..., torch.optim.Optimizer]]] = {
    "muon": (TORCH["adamw"], partial(TORCH["adamw"], betas=(0.9, 0.95))),
    "mofasgd": (TORCH["adamw"], partial(TORCH["adamw"], betas=(0.9, 0.95))),
    "averaged": (TORCH["adamw"], TORCH["adamw"]),
    "flora": (FACTORED, FACTORED),
}


class Explicit:
    """The same run with torch alone: dense weights, parameters B, an optimizer of torch over them.

    Zolr gives the numbers (bases and probes by name); weight decay multiplies the dense weight every step.
    """

    def __init__(
        self,
        method: Method,
        lr: float,
        clip: float | None = None,
        decay: float = 0.0,
        scheduler: Any = None,
    ) -> None:
        self.model, self.method, self.clip, self.rate, self.decay = net(), method, clip, lr, decay
        self.weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.count = 0
        self.spaces: dict[str, Any] = {}
        self.values: dict[str, nn.Parameter] = {}
        self.draw()
        vectors = [p for p in self.values.values() if p.dim() == 1]
        matrices = [p for p in self.values.values() if p.dim() == 2]
        make = partial(TORCH[method.optimizer.name], **method.optimizer.settings)
        if method.optimizer.name in APART:
            kinds = categories(self.model)
            tables = [p for n, p in self.values.items() if kinds[n] in ("embedding", "head")]
            hidden = [p for p in matrices if all(p is not q for q in tables)]
            others = zip(APART[method.optimizer.name], (vectors, tables), strict=True)
            self.optimizers = [make(hidden, lr=lr), *(build(ps, lr=lr) for build, ps in others)]
        else:
            self.optimizers = [make(matrices + vectors, lr=lr)]
        self.scheduler = scheduler(self.optimizers[0]) if scheduler else None

    def draw(self) -> None:
        for name, w in self.weights.items():
            projector = self.method.projector if w.dim() == 2 else Identity()
            window = self.count // self.method.refresh_every if self.method.refresh_every else 0
            space = projector.draw(tuple(w.shape), Key(0).fold_in("subspace", window, name), like=w)
            if name == "embed.weight" and isinstance(space, TwoSided):
                space.left[0] = 0  # the padding row is in no subspace
            self.spaces[name] = space
            if self.whole(name):
                # the value is the weight itself: adafactor's steps depend on its size
                if name not in self.values:
                    self.values[name] = nn.Parameter(w.clone())
                    w.zero_()
            elif name in self.values:
                self.values[name].data.zero_()
            else:
                self.values[name] = nn.Parameter(w.new_zeros(self.spaces[name].coords_shape))

    def whole(self, name: str) -> bool:
        return self.weights[name].dim() == 1 or isinstance(self.method.projector, Identity)

    def at(self, shift: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        points = {n: b + shift[n] if shift else b for n, b in self.values.items()}
        return {n: w + self.spaces[n].lift(points[n]) for n, w in self.weights.items()}

    def loss(self, batch: Batch, shift: dict[str, Tensor] | None = None) -> Tensor:
        logits = functional_call(self.model, self.at(shift), (batch[0],))
        return F.cross_entropy(logits.mT, batch[1], reduction="none").mean(1).mean()

    def differentiate(self, batch: Batch) -> None:
        if self.method.paradigm == "fo":
            for p, g in zip(
                self.values.values(),
                torch.autograd.grad(self.loss(batch), list(self.values.values())),
                strict=True,
            ):
                p.grad = g
        else:
            eps, key = self.method.estimator.eps, Key(0).fold_in("step", self.count).fold_in("probe", 0)
            layout = Layout([Space(n, tuple(p.shape)) for n, p in self.values.items()])
            probe = Probe(layout, self.method.estimator.law, key)
            z = {n: probe(n).double() for n in self.values}
            if not isinstance(self.spaces["embed.weight"], TwoSided):
                z["embed.weight"] = z["embed.weight"].clone()
                z["embed.weight"][0] = 0  # the padding row is not perturbed
            with torch.no_grad():
                sides = [self.loss(batch, {n: s * eps * d for n, d in z.items()}) for s in (1, -1)]
            for name, p in self.values.items():
                p.grad = (sides[0] - sides[1]) / (2 * eps) * z[name]
        if not isinstance(self.spaces["embed.weight"], TwoSided):
            self.values["embed.weight"].grad[0] = 0

    def step(self, batch: Batch) -> None:
        every = self.method.refresh_every
        if every and self.count and self.count % every == 0:
            self.weights = {n: w.detach() for n, w in self.at().items()}
            for n in self.weights:
                if self.whole(n):
                    self.weights[n] = torch.zeros_like(self.weights[n])
                elif isinstance(self.method.transport, Reset):
                    for optimizer in self.optimizers:
                        optimizer.state.pop(self.values[n], None)
            self.draw()
        self.differentiate(batch)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(list(self.values.values()), self.clip)
        now = self.optimizers[0].param_groups[0]["lr"]
        for name, w in self.weights.items():
            if w.dim() == 2:  # W <- (1 - lr wd) W, the trained part of it included
                w.mul_(1 - now * self.decay)
                self.values[name].data.mul_(1 - now * self.decay)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.count += 1


def compared(
    method: Method,
    lr: float,
    steps: int = 10,
    streams: bool | None = None,
    realization: Any = "auto",
    **shared: Any,
) -> float:
    """Largest difference of a weight, or of the learning rate, between an engine and the explicit run."""
    names = {"decay": "weight_decay", "scheduler": "schedule", "clip": "clip"}
    model = net()
    engine = Engine(
        model, method, lr=lr, loss=loss, realization=realization, **{names[k]: v for k, v in shared.items()}
    )
    if streams is not None:
        engine.streams = streams
    reference, worst = Explicit(method, lr, **shared), 0.0
    for batch in BATCHES[:steps]:
        expected = reference.optimizers[0].param_groups[0]["lr"]
        assert abs(engine.step([batch]).lr - expected) < 1e-12
        reference.step(batch)
        worst = max(worst, gap(live(model, engine), {n: w.detach() for n, w in reference.at().items()}))
    start = {name: p.detach() for name, p in net().named_parameters()}
    assert gap(live(model, engine), start) > 1e-4  # it went somewhere
    return worst


O1 = [
    (paradigm, projector, optimizer)
    for paradigm in ("fo", "zo")
    for projector in ("stiefel", "two_sided", "identity")
    for optimizer in TORCH
    if projector != "two_sided" or optimizer in ("sgd", "muon", "mofasgd")
]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("paradigm", "projector", "optimizer"), O1)
def test_o1_streamed_and_batched_steps_are_those_of_torch_on_explicit_weights(
    paradigm, projector, optimizer, streams
):
    eps = {"eps": 1e-2} if paradigm == "zo" else {}
    method = small("stiefel", paradigm, every=4, projector=projector, optimizer=optimizer, **eps)
    assert compared(method, 1e-2, steps=6, streams=streams) < 1e-8  # a refresh after four


@pytest.mark.parametrize("transport", ["keep", "reset"])
def test_o1_holds_over_refreshes_with_state_kept_or_reset(transport):
    method = small("stiefel", "fo", every=3, optimizer="adamw", transport=transport)
    assert compared(method, 1e-2) < 1e-8


WAYS = [
    ("fo", "auto"),
    ("fo", "rebuild"),
    ("zo", "side"),
    ("zo", "rebuild"),
    ("zo", "inplace"),
    ("zo", "together"),
]
DECAYED = [(*way, projector, "sgd") for way in WAYS for projector in ("stiefel", "two_sided", "identity")]
DECAYED += [(*way, "stiefel", "adamw") for way in WAYS]


@pytest.mark.parametrize(("paradigm", "realization", "projector", "optimizer"), DECAYED)
def test_weight_decay_is_that_of_the_dense_weight_at_every_step(paradigm, realization, projector, optimizer):
    method = small(
        "stiefel",
        paradigm,
        every=4,
        projector=projector,
        optimizer=optimizer,
        **({"eps": 1e-2} if paradigm == "zo" else {}),
    )
    if realization == "together":
        method, realization = replace(method, estimator=replace(method.estimator, signs="together")), "auto"  # type: ignore[type-var]
    assert compared(method, 1e-2, decay=3.0, steps=6, realization=realization) < 1e-8


def test_weight_decay_spares_vectors_and_is_exact_without_a_gradient():
    model = net()
    method = small("stiefel", "zo", every=4, optimizer="sgd", eps=1e-2)
    engine = Engine(model, method, lr=0.1, loss=lambda m, b: m(b).sum() * 0, weight_decay=0.5)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(1, 10):
        engine.step([BATCHES[0][0]])
        for name, weight in live(model, engine).items():
            expected = start[name] * (1 - 0.1 * 0.5) ** (step if weight.dim() == 2 else 0)
            assert torch.allclose(weight, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("clip", [1e-2, 0.3, 1e3])
def test_clipping_is_that_of_torch_by_the_global_norm(paradigm, clip):
    if paradigm == "fwd":
        model = net()
        engine = Engine(model, small("stiefel", "fwd", optimizer="sgd"), lr=1.0, loss=loss, clip=clip)
        before = live(model, engine)
        engine.step(BATCHES[:1])
        values = [v.value.detach() - (before[v.name] if v.is_full else 0) for v in engine.variables]
        assert float(torch.cat([v.flatten() for v in values]).norm()) <= clip * (1 + 1e-12)
    else:
        eps = {"eps": 1e-2} if paradigm == "zo" else {}
        for projector in ("stiefel", "identity"):
            method = small("stiefel", paradigm, projector=projector, optimizer="sgd", **eps)
            assert compared(method, 0.1 / clip if clip < 1 else 1e-2, clip=clip, steps=5) < 1e-8


def test_forward_only_steps_that_could_be_streamed_are_not_where_they_are_clipped():
    assert Engine(net(), compose("mezo"), lr=1e-3, loss=loss).streams
    assert not Engine(net(), compose("mezo"), lr=1e-3, loss=loss, clip=0.5).streams


# ---- schedules ---------------------------------------------------------------------------------------------------------


def warmup(step: int) -> float:
    return (step + 1) / 4 if step < 4 else 1.0 - (step - 4) / 20


FACTORIES: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "lambda": lambda optimizer: LambdaLR(optimizer, warmup),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=10),
    "partial": partial(CosineAnnealingLR, T_max=7, eta_min=1e-4),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=1e-2, total_steps=12, cycle_momentum=False),
}


@pytest.mark.parametrize("paradigm", ["fo", "zo"])
@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
@pytest.mark.parametrize("schedule", FACTORIES)
def test_a_schedule_gives_the_rates_of_torch(schedule, optimizer, paradigm):
    factory = FACTORIES[schedule]
    parameter = nn.Parameter(torch.zeros(1))
    plain = torch.optim.SGD([parameter], lr=1e-2)
    scheduler, expected = factory(plain), []
    for _ in range(10):
        expected.append(plain.param_groups[0]["lr"])
        plain.step()
        scheduler.step()
    method = small("stiefel", paradigm, optimizer=optimizer, **({"eps": 1e-2} if paradigm == "zo" else {}))
    for given in (factory, warmup) if schedule == "lambda" else (factory,):
        engine = Engine(net(), method, lr=1e-2, loss=loss, schedule=given)
        infos = [engine.step([batch]) for batch in BATCHES[:10]]
        assert [i.lr for i in infos] == pytest.approx(expected, rel=1e-12)
        assert {group["lr"] for group in engine.optimizer.param_groups} == {
            infos[-1].lr * 0 + engine.optimizer.param_groups[0]["lr"]
        }


@pytest.mark.parametrize(
    ("schedule", "what"),
    [(ReduceLROnPlateau, "a ReduceLROnPlateau"), (lambda step: torch.tensor(0.5), "a Tensor")],
)
def test_a_schedule_that_does_not_follow_the_step_is_refused_before_training(schedule, what):
    model = net()
    with pytest.raises(UsageError, match=f"schedule gives {what}.*give a factor"):
        Engine(model, small("stiefel", "fo"), lr=1e-2, loss=loss, schedule=schedule)
    Engine(model, small("stiefel", "fo"), lr=1e-2, loss=loss).detach()  # the model was left as it came


def test_a_scheduled_rate_is_the_one_that_is_used():
    assert compared(small("stiefel", "fo", optimizer="adamw"), 1e-2, scheduler=FACTORIES["cosine"]) < 1e-8
    assert (
        compared(
            small("stiefel", "zo", eps=1e-2, optimizer="sgd"), 1e-2, scheduler=FACTORIES["lambda"], decay=1.0
        )
        < 1e-8
    )
    model = net()
    engine = Engine(model, small("stiefel", "fo"), lr=1e-2, loss=loss, schedule=lambda step: 0.0)
    start = live(model, engine)
    engine.step(BATCHES[:1])
    assert gap(live(model, engine), start) == 0.0


# ---- micro-batches -----------------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[Any, Sequence[Sequence[int]]]] = {
    "mean": (loss, [(4,), (2, 2), (1, 1, 1, 1)]),
    "sum and count": (sum_and_count, [(4,), (1, 3), (2, 1, 1)]),
    "per example": (rows, [(4,), (3, 1), (1, 2, 1)]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("projector", ["stiefel", "identity"])
def test_micro_batches_are_the_whole_batch(paradigm, form, projector):
    function, splits = FORMS[form]
    method = small(
        "stiefel",
        paradigm,
        every=2,
        projector=projector,
        optimizer="sgd",
        **({"eps": 1e-2} if paradigm == "zo" else {}),
    )
    results = []
    for split in splits:
        model = net()
        engine = Engine(model, method, lr=0.1, loss=function)
        infos = [
            engine.step(list(zip(batch[0].split(list(split)), batch[1].split(list(split)), strict=True)))
            for batch in BATCHES[:3]
        ]
        results.append((live(model, engine), infos))
        assert [i.forwards for i in infos] == [len(split) * {"fo": 3, "zo": 2, "fwd": 2}[paradigm]] * 3
    for weights, infos in results[1:]:
        assert gap(weights, results[0][0]) < 1e-12
        assert [i.loss for i in infos] == pytest.approx([i.loss for i in results[0][1]], abs=1e-12)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_the_three_forms_of_a_loss_are_one_loss(paradigm):
    method = small("stiefel", paradigm, **({"eps": 1e-2} if paradigm == "zo" else {}))
    results = []
    for function, _ in FORMS.values():
        model = net()
        engine = Engine(model, method, lr=1e-2, loss=function)
        for batch in BATCHES[:3]:
            engine.step([batch])
        results.append(live(model, engine))
    assert max(gap(results[0], other) for other in results[1:]) < 1e-12


@pytest.mark.parametrize(("name", "paradigm"), ROWS)
def test_the_forwards_of_a_step_are_counted(name, paradigm):
    calls = []

    def counted(model: nn.Module, batch: Batch) -> Tensor:
        calls.append({"fo": 3 if torch.is_grad_enabled() else 1, "zo": 1, "fwd": 2}[paradigm])
        return rows(model, batch)

    method = small(name, paradigm)
    if setting(method.estimator, "signs") == "together":  # vmap calls once for all
        method = replace(method, estimator=changed(method.estimator, signs="sequence"))
    engine = Engine(net(), method, lr=chosen(name, paradigm), loss=counted)
    for step, batch in enumerate(BATCHES[:4]):
        calls.clear()
        info = engine.step([batch, batch])
        if step or not getattr(method.estimator, "within", False):  # has no subspace to probe in at first
            assert info.forwards == sum(calls)


# ---- R2: resume ----------------------------------------------------------------------------------------------------------

STATE_TYPES = (Tensor, int, float, str, bool, type(None))


def saved(state: Any) -> Any:
    """The state after a trip through JSON and a table of contiguous tensors; anything else fails."""
    table: list[Tensor] = []

    def encode(part: Any) -> Any:
        if isinstance(part, dict):
            assert all(isinstance(key, str) for key in part), part.keys()
            return {key: encode(value) for key, value in part.items()}
        if isinstance(part, list):
            return [encode(value) for value in part]
        assert isinstance(part, STATE_TYPES), type(part)
        if isinstance(part, Tensor):
            table.append(part.detach().clone(memory_format=torch.contiguous_format))
            return {"tensor": len(table) - 1}
        return part

    def decode(part: Any) -> Any:
        if isinstance(part, dict) and set(part) == {"tensor"}:
            return table[part["tensor"]].clone()
        if isinstance(part, dict):
            return {key: decode(value) for key, value in part.items()}
        return [decode(value) for value in part] if isinstance(part, list) else part

    return decode(json.loads(json.dumps(encode(state))))


def resumed(
    make: Callable[[], Engine], stops: Sequence[int], trip: Callable[[Any], Any] = saved
) -> list[str]:
    """What differs between a run and the same run stopped, saved, loaded into a fresh engine and continued."""
    whole, losses, states, wrong, total = make(), [], {}, [], 7
    for step, batch in enumerate(BATCHES[:total]):
        if step in stops:
            states[step] = trip(whole.state_dict())  # a copy: that this run goes on does not reach it
        losses.append(whole.step([batch]).loss)
    for stop, state in states.items():
        again = make()
        with torch.no_grad():
            for p in again.model.parameters():
                p.add_(1.0)  # every trained weight comes from the state
        again.load_state_dict(state)
        if [again.step([batch]).loss for batch in BATCHES[stop:total]] != losses[stop:]:
            wrong.append(f"loss after step {stop}")
        wrong += differences(whole.state_dict(), again.state_dict())
    return wrong


@pytest.mark.parametrize(("name", "paradigm"), ROWS)
def test_r2_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, paradigm):
    def make() -> Engine:
        lr = None if METHODS[name].lr[paradigm] is None else 1e-2
        return Engine(net(torch.float32), small(name, paradigm), lr=lr, loss=rows, weight_decay=0.1)

    assert resumed(make, (0, 4, 6)) == []  # before the first step, mid-window, right before a refresh


MORE: dict[str, tuple[Method, dict[str, Any]]] = {
    **{
        f"{optimizer}, {paradigm}": (
            small("stiefel", paradigm, optimizer=optimizer, **({"eps": 1e-2} if paradigm == "zo" else {})),
            {},
        )
        for optimizer in (*OPTIMIZERS, "RMSprop")
        for paradigm in ("fo", "zo")
    },
    "keep": (small("stiefel", "fo", transport="keep"), {}),
    "align": (small("stiefel", "fo", transport="align"), {}),
    "align two-sided": (small("stiefel", "fo", projector="two_sided", transport="align"), {}),
    "left": (small("stiefel", "fo", side="left"), {}),
    "streamed": (replace(small("stiefel", "fo"), dense=True), {}),
    "likelihood ratio": (
        small("stiefel", "zo", estimator="likelihood_ratio", probes=2, eps=1e-2),
        {"lr": 1e-6},
    ),
    "orthonormal": (
        replace(small("stiefel", "zo"), estimator=Spsa(eps=1e-2, probes=3, directions="orthonormal")),
        {},
    ),
    "one-sided": (replace(small("stiefel", "zo"), estimator=Spsa(eps=1e-2, probes=2, sides=1)), {}),
    "rate chosen, eps given": (small("stiefel", "zo", eps=1e-2), {"lr": None}),
    "eps chosen, rate given": (small("stiefel", "zo"), {"lr": 1e-3}),
    "clip": (small("stiefel", "fo"), {"clip": 0.1}),
    "schedule": (small("stiefel", "fo"), {"schedule": warmup}),
    "schedule and a chosen rate": (small("stiefel", "zo"), {"schedule": warmup, "lr": None}),
    "torch's schedule and a chosen rate": (
        small("stiefel", "zo"),
        {"schedule": FACTORIES["cosine"], "lr": None},
    ),
    **{
        f"torch's {name}": (small("stiefel", "fo"), {"schedule": factory})
        for name, factory in FACTORIES.items()
    },
    "muon, torch's cosine": (small("stiefel", "fo", optimizer="muon"), {"schedule": FACTORIES["cosine"]}),
    "dropout": (small("stiefel", "fo"), {"dropout": 0.3}),
    **{
        f"{name} in {dtype}": (small(name, "zo", eps=1e-2), {"dtype": dtype})
        for name in ("lozo-m", "mezo")
        for dtype in (torch.bfloat16, torch.float16)
    },
    "adamw in bfloat16": (small("adamw"), {"dtype": torch.bfloat16}),
    "stiefel in bfloat16": (small("stiefel", "fo"), {"dtype": torch.bfloat16}),
    "in place": (small("lozo"), {"realization": "inplace"}),
    # a period that ends in the middle, and one that ends where the run is saved
    **{
        f"{name}, every {every}": (small(name, switch_every=every), {})
        for name in ("badam", "lisa")
        for every in (2, 3)
    },
    "streamed, clipped by the last norm": (small("galore"), {"clip": 0.1, "schedule": warmup}),
    "streamed, clipped twice": (small("galore", clip_by="twice"), {"clip": 0.1, "schedule": warmup}),
    "galore, cycle": (small("galore", blocks="cycle", switch_every=2), {}),
    "stiefel zo, sampled": (small("stiefel", "zo", blocks="sampled", switch_every=3, eps=1e-2), {}),
}


@pytest.mark.parametrize("case", MORE)
def test_r2_holds_for_every_part_of_the_state(case, tmp_path):
    method, settings = MORE[case]

    def make() -> Engine:
        extra = {"lr": 1e-2, **settings}
        model = net(extra.pop("dtype", torch.float32), extra.pop("dropout", 0.0))
        return Engine(model, method, loss=loss, **extra)

    def trip(state: Any) -> Any:
        checkpoints.save(tmp_path / "step-4", saved(state))
        return checkpoints.load(tmp_path / "step-4")

    assert resumed(make, (4,), trip) == []


@pytest.mark.parametrize(
    "method",
    [
        small("stiefel", "fo"),
        small("subtrack"),
        small("ldadam"),
        small("galore", optimizer="Adagrad"),
        small("grasswalk", blocks="cycle", switch_every=2),
    ],
    ids=["stiefel", "subtrack", "ldadam", "galore, Adagrad", "grasswalk, cycle"],
)
def test_r2_a_run_can_go_back_to_an_earlier_state(method):
    model = net(torch.float32)
    engine = Engine(model, method, lr=1e-2, loss=loss, schedule=FACTORIES["cosine"])
    losses, states = [], []
    for batch in BATCHES[:8]:
        states.append(engine.state_dict())
        losses.append(engine.step([batch]).loss)
    for start in (7, 5, 0):
        engine.load_state_dict(states[start])
        assert [engine.step([batch]).loss for batch in BATCHES[start:8]] == losses[start:]


class Eager(torch.optim.Adagrad):
    """State is made with the optimizer and never again, as Adagrad's is before torch 2.13."""

    def __init__(self, params, **more):
        super().__init__(params, **more)
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(p)}

    def _init_group(self, group, *more):
        assert all(self.state.get(p) for p in group["params"] if p.grad is not None)
        return super()._init_group(group, *more)


@pytest.mark.parametrize(
    "parts",
    [
        {"name": "galore"},
        {"name": "stiefel", "paradigm": "fo"},
        {"name": "stiefel", "paradigm": "zo"},
        {"name": "galore", "blocks": "cycle", "switch_every": 2},
    ],
    ids=["galore", "stiefel", "stiefel zo", "galore cycle"],
)
def test_state_that_an_optimizer_makes_only_once_is_made_for_new_windows_too(monkeypatch, parts):
    monkeypatch.setattr(torch.optim, "Eager", Eager, raising=False)

    def run(optimizer: str) -> list[float]:
        engine = Engine(net(), small(**parts, optimizer=optimizer, transport="reset"), lr=1e-2, loss=loss)
        first = engine.state_dict()
        losses = [engine.step([batch]).loss for batch in BATCHES[:8]]
        engine.load_state_dict(first)
        return losses + [engine.step([batch]).loss for batch in BATCHES[:8]]

    assert run("Eager") == run("Adagrad")


def test_a_state_of_another_run_is_refused():
    state = Engine(net(), small("lozo"), lr=1e-2, loss=loss).state_dict()
    with pytest.raises(UsageError, match="seed 0, this run 5; use the same seed"):
        Engine(net(), small("lozo"), lr=1e-2, loss=loss, seed=5).load_state_dict(state)
    with pytest.raises(UsageError, match="other weights .*use the same selection"):
        Engine(net(), small("lozo"), lr=1e-2, loss=loss, select="linear").load_state_dict(state)


@pytest.mark.parametrize("name", ["stiefel", "adamw", "galore"])
def test_a_state_that_does_not_fit_changes_nothing(name):
    def run(width: int, dtype: torch.dtype = torch.float32) -> Engine:
        model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, width)).to(dtype)
        engine = Engine(model, small(name, "fo"), lr=1e-2, loss=lambda m, x: m(x.to(dtype)).square().mean())
        engine.step([torch.randn(5, 8)])
        return engine

    engine = run(5)
    before = {n: t.clone() for n, t in engine.model.state_dict().items()}
    normless = run(5).state_dict()
    normless["statistics"] = {n: t.reshape(-1)[:0] for n, t in normless["statistics"].items()}
    incomplete = {n: part for n, part in run(5).state_dict().items() if n != "base_lr"}
    for state, why in (
        (run(3).state_dict(), r"weight '3.weight' is \(3, 6\) in the saved state and \(5, 6\) here"),
        (run(5, torch.float64).state_dict(), "weight '0.weight' is torch.float64 .* and torch.float32 here"),
        (normless, r"buffer '2.running_mean' is \(0,\)"),
        (incomplete, "no state of an engine"),
        (None, "no state of an engine"),
    ):
        with pytest.raises(UsageError, match=why):
            engine.load_state_dict(state)
        assert engine.step_count == 1 and not engine.torn
        assert all(torch.equal(t, before[n]) for n, t in engine.model.state_dict().items())


# ---- T1: transports ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "projector", [Stiefel(rank=3), Gaussian(rank=3), Stiefel(rank=3, side="left"), TwoSidedHaar(rank=3)]
)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_t1_transports_on_an_unchanged_subspace(transport, projector):
    space = projector.draw((6, 9), Key(1), like=torch.zeros(1, dtype=torch.float64))
    numbers = torch.Generator().manual_seed(0)
    state = {
        "step": torch.tensor(7.0),
        "exp_avg": torch.randn(space.coords_shape, generator=numbers, dtype=torch.float64),
        "exp_avg_sq": torch.rand(space.coords_shape, generator=numbers, dtype=torch.float64),
    }
    rule = TRANSPORTS[transport]()
    copied = {k: v.clone() for k, v in state.items()}
    got = rule(copied, OPTIMIZERS["adamw"].degrees, space.change_from(space), {"betas": (0.9, 0.999)})
    if transport == "reset":
        assert got == {}
    else:
        assert set(got) == set(state)
        if transport == "reproject":  # a gradient's stand-in is lifted, and met again as any gradient is
            state["exp_avg"] = space.project(space.lift(state["exp_avg"]))
        assert all(torch.allclose(got[k], state[k], rtol=1e-9, atol=1e-12) for k in state)


@pytest.mark.parametrize(("name", "paradigm"), ROWS)
def test_t1_a_transport_leaves_the_state_of_whole_weights_alone(name, paradigm):
    model = net()
    engine = Engine(model, small(name, paradigm, every=100), lr=1e-2, loss=rows)
    for batch in BATCHES[:3]:
        engine.step([batch])
    whole = {
        v.name: dict(engine.optimizer.state[v.value])
        for v in engine.variables
        if v.is_full and engine.trained(v) is v.value
    }
    before = live(model, engine)
    engine.refresh()
    values = {v.name: v.value for v in engine.variables}
    assert not differences(whole, {name: dict(engine.optimizer.state[values[name]]) for name in whole})
    assert gap(live(model, engine), before) < 1e-12  # a refresh moves no weight
    held = {id(p) for g in engine.optimizer.param_groups for p in g["params"]}
    assert (
        held == {id(engine.trained(v)) for v in engine.variables}
        and {id(p) for p in engine.optimizer.state} <= held
    )


# ---- non-finite losses and interrupts ----------------------------------------------------------------------------------


class Poison:
    """A loss that fails at chosen calls of the step."""

    def __init__(self, calls: Sequence[int], value: float | BaseException, form: str = "mean") -> None:
        self.calls, self.value, self.form, self.count, self.armed = set(calls), value, form, 0, False

    def __call__(self, model: nn.Module, batch: Batch) -> Any:
        result = FORMS[self.form][0](model, batch)
        if self.armed:
            self.count += 1
            if self.count - 1 in self.calls:
                if isinstance(self.value, BaseException):
                    raise self.value
                total, *count = result if isinstance(result, tuple) else (result,)
                total = total * self.value
                return (total, *count) if count else total
        return result


STREAMS = [
    ("stiefel", "fo", False),
    ("stiefel", "fo", True),
    ("adamw", "fo", False),
    ("adamw", "fo", True),
    ("stiefel", "zo", False),
    ("lozo-m", "zo", False),
    ("mezo", "zo", True),
    ("stiefel", "fwd", False),
]


def poisoned(name: str, paradigm: str, streams: bool, poison: Poison) -> tuple[Net, Engine]:
    method = small(name, paradigm, **({"eps": 1e-2} if paradigm == "zo" else {}))
    model = net(torch.float32)
    engine = Engine(
        model, replace(method, dense=streams and paradigm == "fo"), lr=1e-2, loss=poison, weight_decay=0.1
    )
    assert engine.streams == streams
    return model, engine


FAULTS = [
    ((0,), "mean", float("inf")),
    ((1,), "sum and count", float("nan")),
    ((2,), "per example", float("-inf")),
    ((0, 1, 2, 3), "mean", float("inf")),
]


@pytest.mark.parametrize(("calls", "form", "value"), FAULTS)
@pytest.mark.parametrize(("name", "paradigm", "streams"), STREAMS)
def test_f1_a_step_with_a_non_finite_loss_changes_nothing(name, paradigm, streams, calls, form, value):
    poison = Poison(calls if paradigm == "zo" else [c % 2 for c in calls], value, form)
    model, engine = poisoned(name, paradigm, streams, poison)
    for batch in BATCHES[:4]:
        engine.step([batch, BATCHES[9]])
    before, parameters = engine.state_dict(), {n: p.clone() for n, p in model.named_parameters()}
    poison.armed = True
    info = engine.step(
        [BATCHES[4], BATCHES[9]]
    )  # two micro-batches: calls 0, 1 are of one sign, 2, 3 of the other
    assert info.skipped and not math.isfinite(info.loss) and engine.step_count == 4
    assert not differences(before, engine.state_dict())
    assert not differences(parameters, dict(model.named_parameters()))
    assert all(v.value.grad is None for v in engine.variables) and all(
        p.grad is None for p in model.parameters()
    )
    poison.armed = False
    assert not engine.step([BATCHES[4], BATCHES[9]]).skipped and engine.step_count == 5


@pytest.mark.parametrize("clip", [None, 1.0])
def test_f1_a_finite_loss_with_a_non_finite_gradient_changes_nothing(clip):
    def cusp(model: nn.Module, batch: Batch) -> Tensor:
        return (
            loss(model, batch) + (model(batch[0]) * 0).square().sum().sqrt()
        )  # 0 at 0, with an infinite slope

    engine = Engine(net(), small("adamw", "fo"), lr=1e-2, loss=cusp, clip=clip)
    before = engine.state_dict()
    assert engine.step(BATCHES[:1]).skipped
    assert not differences(before, engine.state_dict())


def test_f1_a_streamed_step_drops_a_gradient_that_is_not_finite_and_all_that_follow():
    def cusp(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch[0])
        return loss(model, batch) + (logits * 0).square().sum().sqrt()

    engine = Engine(net(), small("adamw", "fo"), lr=1e-2, loss=cusp)
    engine.streams = True
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    assert engine.step(BATCHES[:1]).skipped and engine.step_count == 0
    assert all(torch.equal(p, before[name]) for name, p in engine.model.named_parameters())


@pytest.mark.parametrize(("name", "paradigm", "streams"), STREAMS)
def test_f1_a_skipped_step_leaves_no_trace_in_the_run(name, paradigm, streams):
    results = []
    for broken in (False, True):
        poison = Poison((0,), float("nan"))
        model, engine = poisoned(name, paradigm, streams, poison)
        for step, batch in enumerate(BATCHES[:8]):
            if broken and step in (3, 4, 6):  # the first of a window, twice, and one in the middle
                poison.armed, poison.count = True, 0
                assert engine.step([batch]).skipped
                poison.armed = False
            engine.step([batch])
        results.append(engine.state_dict())
    assert not differences(*results)


INTERRUPTS = [
    (*row, call, error)
    for row in STREAMS
    for call, error in (
        (0, KeyboardInterrupt()),
        (1, RuntimeError("out of memory")),
        (3, KeyboardInterrupt()),
    )
    if row[1] == "zo" or call < 2  # one evaluation a micro-batch
]


@pytest.mark.parametrize(("name", "paradigm", "streams", "call", "error"), INTERRUPTS)
def test_e4_an_interrupted_step_changes_nothing(name, paradigm, streams, call, error):
    poison = Poison((call,), error)
    model, engine = poisoned(name, paradigm, streams, poison)
    for batch in BATCHES[:4]:
        engine.step([batch, BATCHES[9]])
    before, numbers, contents = engine.state_dict(), torch.get_rng_state(), attributes(model)
    poison.armed = True
    with pytest.raises(type(error)):
        engine.step([BATCHES[4], BATCHES[9]])
    assert not differences(before, engine.state_dict()) and torch.equal(numbers, torch.get_rng_state())
    assert attributes(model) == contents and all(v.value.grad is None for v in engine.variables)
    poison.armed = False
    _, other = poisoned(name, paradigm, streams, Poison((), 0.0))
    for batch in BATCHES[:4]:
        other.step([batch, BATCHES[9]])
    for run in (engine, other):
        run.step([BATCHES[4], BATCHES[9]])
    assert not differences(engine.state_dict(), other.state_dict())


def attributes(model: nn.Module) -> list[tuple[str, type, list[str], int, bool]]:
    """What interrupts leave behind: names in instance dictionaries, hooks, modes."""
    return [
        (n, type(m), sorted(m.__dict__), len(m._forward_hooks) + len(m._forward_pre_hooks), m.training)
        for n, m in model.named_modules()
    ]


@pytest.mark.parametrize(("name", "paradigm"), ROWS)
def test_e7_global_randomness_is_neither_used_nor_touched(name, paradigm):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        engine = Engine(
            net(torch.float32, dropout=0.3),
            small(name, paradigm),
            lr=chosen(name, paradigm),
            loss=rows,
        )
        before = torch.get_rng_state(), random.getstate()
        for batch in BATCHES[:5]:
            engine.step([batch])
        engine.export()
        assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
        results.append(engine.state_dict())
    assert not differences(*results)


def test_dropout_is_on_under_backprop_and_off_in_probes():
    seen: list[bool] = []

    def watched(model: nn.Module, batch: Batch) -> Tensor:
        seen.append(model.training)
        return loss(model, batch)

    for paradigm in PARADIGMS:
        for mode in (True, False):
            model = net().train(mode)
            Engine(
                model,
                small("stiefel", paradigm, **({"eps": 1e-2} if paradigm == "zo" else {})),
                lr=1e-2,
                loss=watched,
            ).step(BATCHES[:1])
            assert set(seen) == {paradigm == "fo"} and model.training is mode
            seen.clear()


@pytest.mark.parametrize("name", ["mezo", "lozo"])
def test_an_objective_without_derivative_trains_under_zo(name):
    def errors(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]).argmax(-1) != batch[1]).double().mean(1)

    method = replace(small(name, "zo", every=50, eps=0.3, optimizer="sgd"))
    method = replace(method, estimator=replace(method.estimator, probes=8))  # type: ignore[type-var]
    batch = tuple(torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    model = net()
    with torch.no_grad():
        before = float(errors(model, batch).mean())
    engine = Engine(model, method, lr=0.3, loss=errors)
    for _ in range(30):
        assert not engine.step([batch]).skipped
    with torch.no_grad():
        assert float(errors(model, batch).mean()) < before - 0.2


def test_an_objective_without_derivative_is_refused_under_backprop():
    engine = Engine(
        net(), small("stiefel", "fo"), lr=1e-2, loss=lambda m, b: (m(b[0]).argmax(-1) != b[1]).double().mean()
    )
    with pytest.raises(UsageError, match="no derivative.*--paradigm zo"):
        engine.step(BATCHES[:1])


# ---- low precision -------------------------------------------------------------------------------------------------------

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("name", "paradigm"), ROWS)
def test_a_low_precision_model_has_float32_coordinates_and_trains(name, paradigm, dtype):
    model = net(dtype)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    method = small(name, paradigm)
    engine = Engine(model, method, lr=chosen(name, paradigm), loss=rows)
    infos = [engine.step([batch]) for batch in BATCHES[:5] * (4 if method.layers.every else 1)]
    assert not any(i.skipped for i in infos)
    assert all(v.value.dtype == torch.float32 for v in engine.variables)
    assert all(
        s.dtype == torch.float32
        for state in engine.optimizer.state.values()
        for s in state.values()
        if isinstance(s, Tensor)
    )
    assert all(p.dtype == dtype for p in model.parameters())
    plain = engine.detach()
    moved = [n for n, p in plain.named_parameters() if not torch.equal(p, start[n])]
    assert len(moved) >= (len(start) if paradigm == "fo" else 1)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("exact", [False, True])
def test_a_fold_below_float32_is_unbiased_and_moves_by_one_unit_at_most(dtype, exact):
    numbers = torch.Generator().manual_seed(0)
    layer = nn.Linear(24, 16, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(16, 24, generator=numbers))
        layer.weight[0] = 0
    layer.to(dtype)
    engine = Engine(layer, compose("stiefel", "fo", rank=3), lr=1.0, loss=lambda m, b: m(b).sum())
    (variable,) = engine.variables
    start, coords = layer.weight.detach().clone(), 2e-4 * torch.randn(16, 3, generator=numbers)
    coords[0] = 0
    target = start.double() + coords.double() @ variable.subspace.tensors()["basis"].double().T
    draws, total = 400, torch.zeros(16, 24, dtype=torch.float64)
    below, above = torch.full_like(total, -math.inf), torch.full_like(total, math.inf)
    for i in range(draws):
        layer.weight.data.copy_(start)
        variable.value.data.copy_(coords)
        variable.moved = True
        variable.fold(exact=exact, key=Key(i))
        folded = layer.weight.detach().double()
        total += folded
        below, above = (
            torch.where(folded <= target, folded, below).maximum(below),
            torch.where(folded >= target, folded, above).minimum(above),
        )
    error = total / draws - target
    unit = (torch.finfo(dtype).eps * target.abs()).clamp_min(torch.finfo(dtype).smallest_normal)
    assert (
        float((error.abs() / unit).max()) < 5 * 0.5 / math.sqrt(draws) * 1.2
    )  # five standard errors of a coin
    assert abs(float((error / unit).mean())) < 5 * 0.5 / math.sqrt(draws * error.numel())
    both = torch.isfinite(below) & torch.isfinite(above)
    assert (
        float(((above - below)[both] / unit[both]).max()) <= 1.0 + 1e-9
    )  # only the two neighbors are ever used
    assert bool((layer.weight[0] == 0).all())
    # without the noise almost everything would be lost
    assert float((target.to(dtype) == start).double().mean()) > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("name", ["mezo", "lozo", "subzero"])
def test_e1_estimates_leave_the_weights_alone(name, dtype):
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12)).to(dtype)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine = Engine(
        model, small(name, every=100, eps=1e-3), lr=1e-2, loss=lambda m, b: m(b).float().sum() * 0 + 1
    )
    batch = torch.ones(2, 12, dtype=dtype)
    for _ in range(60):
        engine.step([batch])
    assert not differences(start, {n: p.detach() for n, p in engine.detach().named_parameters()})


@pytest.mark.parametrize("name", ["mezo", "lozo", "subzero"])
def test_e1_the_walk_in_place_as_published_drifts(name):
    model = net(torch.float32)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    method = small(name, every=1000, eps=1e-3)
    engine = Engine(model, method, lr=1e-2, loss=lambda m, b: m(b[0]).sum() * 0 + 1, realization="inplace")
    for _ in range(50):
        engine.step(BATCHES[:1])
    assert sum(float((p - start[n]).norm()) for n, p in model.named_parameters()) > 1e-6


@pytest.mark.parametrize("dtype", LOW)
def test_e10_small_updates_are_not_lost(dtype):
    layer = nn.Linear(12, 10).to(dtype)
    method = compose("stiefel", "fo", rank=3, optimizer="sgd", refresh_every=1000)
    engine = Engine(layer, method, lr=1e-6, loss=lambda m, b: m(b).float().sum())
    batch = torch.ones(1, 12, dtype=dtype)
    first = {v.name: v.value.detach().clone() for v in engine.variables}
    engine.step([batch])
    once = {v.name: v.value.detach() - first[v.name] for v in engine.variables}
    for _ in range(149):
        engine.step([batch])
    weight = next(v for v in engine.variables if v.name == "weight")
    assert torch.allclose(weight.value.detach(), 150 * once["weight"], rtol=1e-3)
    assert float(once["weight"].abs().max()) > 0


# ---- leaving -------------------------------------------------------------------------------------------------------------


# the two take turns among the rows, which are many
@pytest.mark.parametrize(
    ("name", "paradigm", "schedule"),
    [(*row, (None, FACTORIES["cosine"])[i % 2]) for i, row in enumerate(ROWS)],
)
def test_an_export_is_the_live_model_and_leaves_the_run_alone(name, paradigm, schedule):
    models = net(), net()
    runs = [
        Engine(m, small(name, paradigm), lr=1e-2, loss=rows, weight_decay=0.1, schedule=schedule)
        for m in models
    ]
    for step, batch in enumerate(BATCHES[:5]):
        before = runs[0].state_dict()
        if step in (1, 4):
            plain = runs[0].export()
            assert not differences(before, runs[0].state_dict())
            with torch.no_grad():
                assert torch.allclose(plain(batch[0]), models[0].eval()(batch[0]), rtol=0, atol=1e-12)
            assert type(plain) is Net and [type(m) for m in plain.modules()] == [
                type(m) for m in net().modules()
            ]
            assert all(p.requires_grad for p in plain.parameters()) and not plain.training
            nn.init.zeros_(plain.head.weight)  # the copy is a copy
        for run in runs:
            run.step([batch])
    assert not differences(runs[0].state_dict(), runs[1].state_dict())


def test_an_export_copies_nothing_of_the_loss_and_the_schedule():
    class Once:
        def __deepcopy__(self, memo: Any) -> None:
            raise AssertionError("copied")

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return loss(model, batch)

        def __call__(self, step: int) -> float:
            return 1.0

    engine = Engine(net(), small("stiefel", "fo"), lr=1e-2, loss=Once().loss, schedule=Once())
    engine.step(BATCHES[:1])
    assert type(engine.export()) is Net


@pytest.mark.parametrize(("name", "paradigm"), ROWS)
def test_detach_gives_the_plain_model_back(name, paradigm):
    model, reference = net(), net()
    model.up.bias.requires_grad_(False)
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    needs = {n: p.requires_grad for n, p in model.named_parameters()}
    contents = [sorted(m.__dict__) for m in model.modules()]
    method = small(name, paradigm)
    engine = Engine(model, method, lr=1e-2, loss=rows, weight_decay=0.1, select="linear+embedding+norm")
    assert list(model.state_dict()) == keys and not any(p.requires_grad for p in model.parameters())
    for batch in BATCHES[:5] * (4 if method.layers.every else 1):
        engine.step([batch])
    weights = live(model, engine)
    plain = engine.detach()
    assert plain is model and list(model.state_dict()) == keys and [type(m) for m in model.modules()] == kinds
    assert {n: p.requires_grad for n, p in model.named_parameters()} == needs
    assert [sorted(m.__dict__) for m in model.modules()] == contents
    assert gap({n: p.detach() for n, p in model.named_parameters()}, weights) < 1e-12
    for n, p in reference.named_parameters():  # what was not selected did not move; what was did
        assert torch.equal(p, dict(model.named_parameters())[n]) == n.endswith("bias") and (
            n != "norm.bias" or True
        )
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(reference(BATCHES[0][0]), model(BATCHES[0][0]))
    loss(model, BATCHES[0]).backward()
    Engine(model, small(name, paradigm), lr=1e-2, loss=rows).step(BATCHES[:1])  # and it can be trained again


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0.0}, "lr = 0.0 .*use a positive number"),
        ({"lr": -1.0}, "lr = -1.0 .*use a positive number"),
        ({"lr": float("nan")}, "lr = nan .*use a positive number"),
        ({"lr": float("inf")}, "lr = inf .*use a positive number"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"clip": 0.0}, "clip = 0.0"),
        ({"select": "linears"}, "'linears' .*train 'all'"),
        ({"select": lambda n, p: False}, "no weight .*widen the selection"),
        ({"realization": "sideways"}, "realization 'sideways' .*use one of"),
        ({"schedule": lambda optimizer: optimizer.nothing}, None),
        ({"method": small("galore"), "compile": True}, "a dense method .*leave compile out"),
        (
            {
                "method": replace(small("lozo"), estimator=Spsa(eps=1e-3, signs="together")),
                "realization": "inplace",
            },
            "'inplace' .*use signs 'sequence'",
        ),
    ],
)
def test_a_bad_setting_is_refused_and_leaves_the_model_as_it_was(settings, words):
    model = net()
    kinds = [type(m) for m in model.modules()]
    arguments = {"method": small("lozo"), "lr": 1e-3, "loss": loss, **settings}
    with pytest.raises(UsageError if words else AttributeError, match=words):
        Engine(model, arguments.pop("method"), **arguments)
    assert [type(m) for m in model.modules()] == kinds and all(p.requires_grad for p in model.parameters())
    Engine(model, small("lozo"), lr=1e-3, loss=loss).step(BATCHES[:1])


def test_a_model_is_attached_once_and_a_step_has_a_batch():
    model = net()
    engine = Engine(model, small("lozo"), lr=1e-3, loss=loss)
    with pytest.raises(UsageError, match="attached to a run already; detach that run first"):
        Engine(model, small("lozo"), lr=1e-3, loss=loss)
    with pytest.raises(UsageError, match="at least one batch"):
        engine.step([])
    with pytest.raises(UsageError, match="paradigm 'fo' needs a learning rate; give lr"):
        Engine(net(), small("stiefel", "fo"), lr=None, loss=loss)


def test_evaluation_needs_no_fold():
    model, twin = net(), net()
    engine = Engine(model, small("stiefel", "fo"), lr=1e-2, loss=loss, weight_decay=0.5)
    for batch in BATCHES[:5]:
        engine.step([batch])
    twin.load_state_dict(live(model, engine))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(model(BATCHES[0][0]), twin(BATCHES[0][0]), rtol=0, atol=1e-12)
    assert 0 < engine.trained_share <= 1 and abs(engine.trained_share - 1) < 1e-12


def test_every_kind_of_parameter_can_be_trained():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.conv = nn.Linear(4, 3), nn.Conv1d(2, 3, 2)
            self.scale = nn.Parameter(torch.tensor(0.7))
            self.stack = nn.Parameter(torch.ones(2, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return (
                self.linear(x) @ self.stack.sum(0) * self.scale
                + self.conv(torch.ones(1, 2, 3, dtype=x.dtype)).mean()
            )

    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for paradigm in PARADIGMS:
        for realization in ("auto", "rebuild", "inplace"):
            model = Odd().double()
            start = {n: p.detach().clone() for n, p in model.named_parameters()}
            method = small(
                "stiefel", paradigm, optimizer="sgd", **({"eps": 1e-3} if paradigm == "zo" else {})
            )
            engine = Engine(
                model,
                method,
                lr=1e-2,
                loss=lambda m, b: m(b).square().mean(),
                realization=realization,
                check=x,
            )
            for _ in range(5):
                engine.step([x])
            engine.load_state_dict(engine.state_dict())
            assert all(not torch.equal(p, start[n]) for n, p in engine.detach().named_parameters())


# ---- learning from inputs ---------------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("paradigm", ["zo", "fo"])
def test_each_window_sees_the_inputs_of_its_first_batch(paradigm):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TwoLayers().double()
    batches = [torch.randn(16, 6, generator=torch.Generator().manual_seed(i)).double() + 1 for i in range(4)]
    parts = {"zo": Spsa(eps=1e-3), "fo": Backprop()}
    projector = Dependent(2, source="inputs")
    chosen = replace(compose("stiefel", paradigm), projector=projector, estimator=parts[paradigm])
    chosen = replace(chosen, refresh_every=2)
    engine = Engine(model, chosen, lr=1e-2, loss=lambda m, x: m(x).square().mean())
    for step, x in enumerate(batches):
        with torch.no_grad():
            inputs = {"first.weight": x, "second.weight": torch.tanh(model.first(x))}
        before = torch.random.get_rng_state()
        info = engine.step([x])
        assert torch.equal(before, torch.random.get_rng_state())
        assert info.refreshed == (step % 2 == 0)
        assert info.forwards == chosen.estimator.forwards(1) + info.refreshed
        if not info.refreshed:
            continue
        for variable in engine.variables:
            if variable.name not in inputs:
                continue
            seen = engine.state_dict()["variables"][variable.name]["spectrum"]
            exact = torch.linalg.eigvalsh(inputs[variable.name].mT @ inputs[variable.name]).flip(0)
            assert torch.allclose(seen["values"][:2], exact[:2], rtol=1e-4)


# ---- manners ------------------------------------------------------------------------------------------------------------


def simple() -> tuple[nn.Module, Tensor, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, torch.randn(16, 6), lambda model, x: model(x).square().mean()


@pytest.mark.parametrize("paradigm", ["fo", "zo"])
def test_what_is_frozen_stays_as_it_is(paradigm):
    model, x, loss = simple()
    model[0].weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine = Engine(model, compose("stiefel", paradigm, rank=2), lr=1e-2, loss=loss)
    engine.step([x])
    after = dict(engine.detach().named_parameters())
    moved = {n: not torch.equal(after[n], w) for n, w in before.items()}
    assert moved == {n: n != "0.weight" for n in before}
    # a predicate decides alone, and a model that is frozen as a whole has nothing to train by words
    model.requires_grad_(False)
    chosen = Engine(model, compose("stiefel", paradigm, rank=2), lr=1e-2, loss=loss, select=lambda n, p: True)
    assert len(chosen.variables) == 4
    chosen.detach()
    with pytest.raises(UsageError, match="no weight is left to train: 4 parameters have requires_grad=False"):
        Engine(model, compose("stiefel", paradigm, rank=2), lr=1e-2, loss=loss)


def test_a_model_that_was_given_back_is_not_trained_on():
    model, x, loss = simple()
    engine = Engine(model, compose("stiefel", "fo", rank=2), lr=1e-2, loss=loss)
    engine.detach()
    with pytest.raises(UsageError, match="given back by detach"):
        engine.step([x])


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (compose("stiefel", "fo", rank=3), "projector"),
        (compose("stiefel", "zo", rank=2), "paradigm"),
        (compose("stiefel", "fo", rank=2, optimizer="sgd"), "optimizer"),
        (compose("galore", "fo", rank=2), "refresh_every"),
    ],
)
def test_a_state_of_another_method_is_refused(other, part):
    model, x, loss = simple()
    engine = Engine(model, compose("stiefel", "fo", rank=2), lr=1e-2, loss=loss)
    engine.step([x])
    another = Engine(simple()[0], other, lr=1e-2, loss=loss)
    before = {n: p.detach().clone() for n, p in another.model.named_parameters()}
    with pytest.raises(UsageError, match=f"of a method with {part} "):
        another.load_state_dict(engine.state_dict())
    assert all(torch.equal(p, before[n]) for n, p in another.model.named_parameters())
    with pytest.raises(UsageError, match="no state of an engine"):
        engine.load_state_dict({})


def test_a_loss_may_be_a_number_where_none_asks_for_its_derivative():
    model, x, loss = simple()
    plain = lambda model, x: loss(model, x).item()  # noqa: E731
    numbers, tensors = (
        Engine(simple()[0], compose("stiefel", "zo", rank=2, eps=1e-3), lr=1e-2, loss=one)
        for one in (plain, loss)
    )
    for _ in range(3):
        assert numbers.step([x]).loss == pytest.approx(tensors.step([x]).loss, rel=1e-5)
    assert (
        Engine(simple()[0], compose("stiefel", "zo", rank=2), lr=None, loss=plain).step([x]).loss > 0
    )  # chosen rate
    backprop = Engine(model, compose("stiefel", "fo", rank=2), lr=1e-2, loss=plain)
    with pytest.raises(UsageError, match="no derivative in any trained weight; use paradigm 'zo'"):
        backprop.step([x])


def test_mistakes_of_a_script_are_named():
    model, x, loss = simple()
    with pytest.raises(UsageError, match=r"method = 'stiefel' is no method; use zolr.compose\('stiefel'"):
        Engine(model, "stiefel", lr=1e-2, loss=loss)
    with pytest.raises(UsageError, match="lr = '1e-2' is no number"):
        Engine(model, compose("stiefel"), lr="1e-2", loss=loss)
    engine = Engine(model, compose("stiefel", "zo", rank=2), lr=1e-2, loss=loss)
    with pytest.raises(UsageError, match=r"use step\(\[batch\]\)"):
        engine.step(x)
    for wrong in ("", 3):
        with pytest.raises(UsageError, match=f"method '{wrong}' is not known"):
            compose(wrong)


def test_the_public_names_are_listed():
    import zolr

    assert set(zolr.__all__) <= set(dir(zolr)) and "Engine" in dir(zolr)
