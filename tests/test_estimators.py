"""Laws of gradient estimators (E1, E2) and their variances, against closed forms.

Notation: weight `(m, n)`, basis `P (n, r)`, probe `Z` in the coordinates, gradient `G`; the lifted estimate is
`Ghat = slope * lift(Z)` and `X = E‖Ghat‖² / ‖G‖²` at `c = 1`. A mean over draws is compared with its closed form within
five standard errors of that mean.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from zolr.attaching import attach
from zolr.engine import Engine
from zolr.errors import UsageError
from zolr.estimators import (
    ESTIMATORS,
    PARADIGMS,
    Estimate,
    Found,
    _MappedMasks,
    changed,
    mean_loss,
    setting,
    totals,
)
from zolr.estimators.backprop import Backprop
from zolr.estimators.coordinates import Coordinates
from zolr.estimators.forward import Forward
from zolr.estimators.likelihood_ratio import LikelihoodRatio
from zolr.estimators.mixture import Mixture
from zolr.estimators.private_spsa import PrivateSpsa, delta_of, epsilon_of
from zolr.estimators.spsa import Spsa
from zolr.keys import Key
from zolr.methods import Method
from zolr.optim import OptimizerRule
from zolr.probes import LAWS, Layout, Probe, Space
from zolr.projectors import PROJECTORS
from zolr.projectors.dependent import Dependent
from zolr.projectors.gaussian import Gaussian
from zolr.projectors.identity import Identity
from zolr.projectors.stiefel import Stiefel
from zolr.spectra import Spectrum
from zolr.subspaces import Right, TwoSided, Viewed
from zolr.transports.reset import Reset
from zolr.variables import Variable, layout

F64 = torch.float64
KEY = Key(40)
LIKE = torch.zeros(0, dtype=F64)

CASES: dict[str, Callable[[], Any]] = {
    "backprop": Backprop,
    "spsa": lambda: Spsa(eps=1e-4),
    "spsa gaussian": lambda: Spsa(eps=1e-4, law="gaussian", probes=2),
    "spsa sphere": lambda: Spsa(eps=1e-4, law="sphere"),
    "spsa one-sided": lambda: Spsa(eps=1e-6, sides=1, probes=2),
    "spsa orthonormal": lambda: Spsa(eps=1e-4, directions="orthonormal", probes=3),
    "spsa together": lambda: Spsa(eps=1e-4, signs="together"),
    "spsa normalized": lambda: Spsa(eps=1e-6, sides=1, probes=3, signs="together", normalize=True),
    "private": lambda: PrivateSpsa(eps=1e-4, probes=2, limit=1e3, noise=0.5, law="rademacher"),
    "coordinates": lambda: Coordinates(eps=1e-4, blocks=3),
    "mixture": lambda: Mixture(
        Spsa(eps=1e-4, probes=2), Coordinates(eps=1e-4, blocks=2, law="gaussian"), share=0.3
    ),
    "likelihood_ratio": lambda: LikelihoodRatio(eps=0.1, probes=2),
    "forward": lambda: Forward(probes=2),
    "forward gaussian": lambda: Forward(law="gaussian"),
}
FORWARD_ONLY = [name for name in CASES if name != "backprop"]
# those whose gradient is the mean of slopes times directions over the whole space, and unbiased for any loss
PLAIN = [
    name for name in FORWARD_ONLY if name not in ("spsa normalized", "private", "coordinates", "mixture")
]


def make(name: str, **settings: Any) -> Any:
    known = PROJECTORS[name].__dataclass_fields__
    return PROJECTORS[name](**{key: value for key, value in settings.items() if key in known})


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def assert_mean(
    samples: Tensor, expected: Tensor | float, sigmas: float = 5.0, rounding: float = 1e-6
) -> None:
    """The mean over the first axis lies within `sigmas` standard errors of `expected`, in every entry."""
    error = (samples.mean(0) - expected).abs()
    scale = samples.abs().mean() + torch.as_tensor(expected, dtype=F64).abs().max()
    allowed = sigmas * samples.std(0) / sqrt(len(samples)) + rounding * scale  # probes are float32
    worst = float((error / allowed.clamp_min(1e-300)).max())
    assert worst <= 1, (
        f"off by {worst * sigmas:.1f} standard errors; mean {samples.mean(0)}, expected {expected}"
    )


# ---- a linear function, and a small network with every kind of site ---------------------------------------------------------


class Functional:
    """`f(W)` of one weight `(m, n)`, evaluated through the forward of a linear layer."""

    def __init__(self, f: Callable[[Tensor], Tensor], m: int, n: int, start: Tensor | None = None) -> None:
        self.model = nn.Linear(n, m, bias=False).double()
        self.model.weight.data.copy_(torch.zeros(m, n) if start is None else start)
        (self.variable,) = attach(self.model, lambda name, p: True)
        self.eye = torch.eye(n, dtype=F64)
        self.f = f

    def loss(self, batch: Any = None) -> Tensor:
        return self.f(self.model(self.eye).mT)

    def estimate(self, estimator: Any, projector: Any, key: Key) -> Tensor:
        """The lifted estimate in a fresh subspace."""
        variable, received = self.variable, []
        variable.open(projector.draw(variable.shape, key.fold_in("subspace"), like=LIKE))
        estimator(self.loss, [None], [variable], lambda v, g: received.append(g), key.fold_in("step"))
        (gradient,) = received
        return variable.subspace.lift(gradient.detach())


class Net(nn.Module):
    """Tied embedding and head, a Conv1D, two linear maps of one shape, biases and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = Conv1D(8, 6)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.back = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embedding(ids)).tanh()
        x = x + self.second(self.first(x).tanh())
        return self.head(self.norm(self.back(x).tanh()))


def fresh_net() -> Net:
    net = Net().double()
    for i, parameter in enumerate(net.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=i) * 0.5 + (parameter.dim() == 1))
    return net


def batch_of(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (rows, 5), generator=g), torch.randint(0, 11, (rows, 5), generator=g)


def token_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="none")


LOSSES: dict[str, Callable[[nn.Module, tuple[Tensor, Tensor]], Any]] = {
    "mean": lambda model, batch: token_losses(model, batch).mean(),
    "sum and count": lambda model, batch: (token_losses(model, batch).sum(), float(batch[1].numel())),
    "sum and tensor count": lambda model, batch: (
        token_losses(model, batch).sum(),
        torch.tensor(batch[1].numel(), dtype=F64),
    ),
    "per example": lambda model, batch: token_losses(model, batch).view(len(batch[0]), -1).mean(1),
}


class Attached:
    """The network in the middle of a window: every coordinate has moved."""

    def __init__(self, projector: Any = None, loss: str = "mean", moved: bool = True) -> None:
        self.model = fresh_net().eval()
        self.variables = attach(self.model, lambda name, p: True)
        for variable in self.variables:
            matrix = len(variable.shape) == 2
            rule = (projector or Stiefel(rank=3)) if matrix else Identity()
            gradient = random(*variable.shape) if matrix else None
            key = KEY.fold_in("subspace", 0, variable.name)
            variable.open(rule.draw(variable.shape, key, like=LIKE, gradient=gradient))
            if not variable.is_full and moved:
                variable.value.data.copy_(0.1 * random(*variable.subspace.coords_shape, seed=7))
                variable.moved = True
        self._loss = LOSSES[loss]

    def loss(self, batch: Any) -> Any:
        return self._loss(self.model, batch)

    def gradients(
        self, estimator: Any, batches: Sequence[Any], key: Key = KEY
    ) -> tuple[Estimate, dict[str, Tensor]]:
        received: dict[str, Tensor] = {}
        if isinstance(estimator, PrivateSpsa) and self._loss is LOSSES["mean"]:
            self._loss = LOSSES["per example"]  # of the same mean

        def emit(variable: Variable, gradient: Tensor) -> None:
            assert variable.name not in received, f"{variable.name} was emitted twice"
            received[variable.name] = gradient.detach().clone()

        estimate = estimator(self.loss, batches, self.variables, emit, key)
        assert set(received) == {v.name for v in self.variables}
        return estimate, received

    def dense_gradients(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        """Autograd's gradient in the plain weights, at `W + lift(value)`, in the variables' orientation."""
        plain = fresh_net().eval()
        with torch.no_grad():
            for variable in self.variables:
                if not variable.is_full:
                    lifted = variable.subspace.lift(variable.value)
                    plain.get_parameter(variable.name).add_(lifted.T if variable.transposed else lifted)
        mean_loss(lambda batch: self._loss(plain, batch), batches).backward()
        result = {}
        for variable in self.variables:
            grad = plain.get_parameter(variable.name).grad
            assert grad is not None
            result[variable.name] = grad.T if variable.transposed else grad
        return result


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert set(a) == set(b)
    scale = max(float(t.abs().max()) for t in b.values())
    for name in a:
        assert a[name].shape == b[name].shape
        assert float((a[name] - b[name]).abs().max()) <= tolerance * scale, name


def test_every_estimator_is_under_test() -> None:
    assert {type(build()) for build in CASES.values()} == set(ESTIMATORS.values())
    assert set(PARADIGMS) == {"fo", "zo", "fwd"} and set(PARADIGMS.values()) <= set(ESTIMATORS)
    assert all(ESTIMATORS[name].paradigm == paradigm for paradigm, name in PARADIGMS.items())


# ---- E1: one gradient a variable --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_every_variable_receives_one_gradient_of_its_shape(case: str, projector: str) -> None:
    estimator = CASES[case]()
    if projector == "identity" and getattr(estimator, "directions", "") == "orthonormal":
        pytest.skip("orthonormal directions need a subspace")
    run = Attached(make(projector, rank=3))
    estimate, received = run.gradients(estimator, [batch_of(4)])
    for variable in run.variables:
        assert received[variable.name].shape == variable.subspace.coords_shape
        assert received[variable.name].dtype == variable.value.dtype
        assert bool(torch.isfinite(received[variable.name]).all())
    assert estimate.loss.shape == ()
    if estimator.paradigm == "fo":
        assert estimate.slopes is None
    else:
        count = setting(estimator, "probes") or estimator.blocks
        assert estimate.slopes is not None and estimate.slopes.shape == (count,)


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("side", ["right", "left", "short"])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_backprop_gives_the_projected_gradient(projector: str, side: str, rank: int) -> None:
    """At every site: linear, Conv1D, a tied embedding and head, biases and norms; mid-window."""
    run = Attached(make(projector, rank=rank, side=side))
    batches = [batch_of(4, seed=1), batch_of(4, seed=2)]
    estimate, received = run.gradients(Backprop(), batches)
    dense = run.dense_gradients(batches)
    assert_same(received, {v.name: v.subspace.project(dense[v.name]) for v in run.variables})
    with torch.no_grad():
        assert float(estimate.loss) == pytest.approx(float(mean_loss(run.loss, batches)), rel=1e-12)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("projector", ["stiefel", "gaussian", "two_sided", "identity"])
def test_forward_mode_is_the_exact_directional_derivative(law: str, projector: str) -> None:
    run = Attached(make(projector, rank=3))
    batches = [batch_of(4, seed=1), batch_of(4, seed=2)]
    _, exact = run.gradients(Backprop(), batches)
    estimate, received = run.gradients(Forward(probes=3, law=law), batches)
    assert estimate.slopes is not None
    probes = [Probe(layout(run.variables), law, KEY.fold_in("probe", i)) for i in range(3)]
    for slope, probe in zip(estimate.slopes, probes, strict=True):
        expected = sum(float((exact[v.name] * probe(v.name)).sum()) for v in run.variables)
        assert float(slope) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    average = {
        v.name: sum(s * p(v.name).double() for s, p in zip(estimate.slopes, probes, strict=True)) / 3
        for v in run.variables
    }
    assert_same(received, average, 1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize(("sides", "order"), [(2, 2), (1, 1)])
@pytest.mark.parametrize("law", LAWS)
def test_slopes_approach_the_directional_derivative_at_their_order(sides: int, order: int, law: str) -> None:
    """E1: central differences are off by O(eps²), one-sided ones by O(eps)."""
    run = Attached(Stiefel(rank=3))
    exact, _ = run.gradients(Forward(probes=2, law=law), [batch_of(4)])  # the same directions: the same key
    assert exact.slopes is not None
    errors = []
    largest = 2e-3 if sides == 2 else 2e-5  # the next order must not show, nor the rounding of the loss
    for eps in (largest, largest / 2, largest / 4):
        estimate, _ = run.gradients(Spsa(eps=eps, probes=2, law=law, sides=sides), [batch_of(4)])
        assert estimate.slopes is not None
        errors.append(estimate.slopes - exact.slopes)
    for coarse, fine in zip(errors, errors[1:], strict=False):
        torch.testing.assert_close(coarse / fine, torch.full((2,), 2.0**order, dtype=F64), rtol=0.02, atol=0)


class Deep(nn.Module):
    """Small embeddings through many normalizations, each of which makes tangents larger; norms stay in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(6))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(6))
        with torch.no_grad():
            for part in (self.embed, *self.layers):
                part.weight.mul_(0.02)  # type: ignore[union-attr, operator]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = layer(norm(x))
        return x.float().square().mean() * 1e4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_forward_slopes_below_float32_are_those_of_float32(dtype, tolerance):
    torch.manual_seed(0)
    net = Deep()
    for part in (net.embed, *net.layers):
        part.to(dtype)
    slopes = []
    for model in (net, copy.deepcopy(net).float()):
        method = Method(Forward(), Stiefel(rank=4), OptimizerRule("sgd"), Reset(), 10)
        # the frozen layers are torch's own, and products in them do not mix dtypes
        engine = Engine(
            model,
            method,
            lr=1e-3,
            loss=lambda m, ids: m(ids),
            select=lambda name, _: name in ("embed.weight", "layers.0.weight", "layers.2.weight"),
        )
        slopes.append(engine.step([torch.arange(20)]).slope)
    assert slopes[0] == pytest.approx(slopes[1], rel=tolerance)


@pytest.mark.parametrize("case", [*PLAIN, "private"])
def test_the_gradient_is_the_mean_of_slopes_times_directions(case: str) -> None:
    """E2, T16: the direction applied is the direction probed, drawn again from the key."""
    estimator = CASES[case]()
    run = Attached(Stiefel(rank=3))
    estimate, received = run.gradients(estimator, [batch_of(4)])
    assert estimate.slopes is not None
    run.gradients(Spsa(eps=1e-3), [batch_of(4)], KEY.fold_in("another step"))
    torch.manual_seed(3)
    if isinstance(estimator, Spsa):
        directions: Sequence[Any] = estimator.draw(run.variables, KEY)
    else:
        law = getattr(estimator, "law", "gaussian")
        directions = [
            Probe(layout(run.variables), law, KEY.fold_in("probe", i)) for i in range(estimator.probes)
        ]
    for variable in run.variables:
        terms = [s * z(variable.name).double() for s, z in zip(estimate.slopes, directions, strict=True)]
        torch.testing.assert_close(received[variable.name], sum(terms) / len(terms), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [*PLAIN, "spsa normalized"])
def test_slopes_are_measured_along_the_directions(case: str) -> None:
    """Against the model evaluated at hand-moved coordinates."""
    estimator = CASES[case]()
    run = Attached(Stiefel(rank=3))
    estimate, _ = run.gradients(estimator, [batch_of(4)])
    assert estimate.slopes is not None
    law = getattr(estimator, "law", "gaussian")
    if isinstance(estimator, Spsa):
        directions: Sequence[Any] = estimator.draw(run.variables, KEY)
    else:
        directions = [
            Probe(layout(run.variables), law, KEY.fold_in("probe", i)) for i in range(estimator.probes)
        ]

    def value(direction: Any, scale: float) -> float:
        plain = fresh_net().eval()
        with torch.no_grad():
            for v in run.variables:
                z = direction(v.name).double()
                moved = v.subspace.lift(v.value + scale * z) - (v.value if v.is_full else 0.0)
                plain.get_parameter(v.name).add_(moved.T if v.transposed else moved)
            return float(token_losses(plain, batch_of(4)).mean())

    for slope, direction in zip(estimate.slopes.tolist(), directions, strict=True):
        if isinstance(estimator, Forward):
            expected = (value(direction, 1e-5) - value(direction, -1e-5)) / 2e-5
            assert slope == pytest.approx(expected, rel=1e-6)
        elif isinstance(estimator, LikelihoodRatio):
            assert slope == pytest.approx(value(direction, estimator.eps) / estimator.eps, rel=1e-12)
        else:
            eps = estimator.eps
            base = value(direction, -eps) if estimator.sides == 2 else value(direction, 0.0)
            expected = (value(direction, eps) - base) / (eps * estimator.sides)
            assert slope == pytest.approx(expected, rel=1e-7, abs=1e-15 / eps)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [(3, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("form", LOSSES)
def test_loss_forms_and_micro_batches_agree_with_the_full_batch(
    case: str, rows: tuple[int, ...], form: str
) -> None:
    if form == "mean" and len(set(rows)) > 1:
        pytest.skip("a mean says nothing of the size of its micro-batch")
    if case == "private" and form != "per example":
        pytest.skip("needs the loss of each example")
    ids, labels = batch_of(6, seed=3)
    parts = list(zip(ids.split(list(rows)), labels.split(list(rows)), strict=True))
    whole, expected = Attached(loss="mean").gradients(CASES[case](), [(ids, labels)])
    split, received = Attached(loss=form).gradients(CASES[case](), parts)
    # a slope divides the rounding of a loss by its radius
    radius = setting(CASES[case](), "eps") or 1.0
    assert_same(received, expected, max(1e-11, 1e-13 / radius))
    assert float(split.loss) == pytest.approx(float(whole.loss), rel=1e-12)


def test_totals_are_sums_and_counts_in_at_least_float32() -> None:
    half = torch.full((3000,), 1.001, dtype=torch.bfloat16)
    total, count = totals(half)
    assert total.dtype == torch.float32 and count == 3000.0
    assert float(total) == pytest.approx(3000 * float(half[0]), rel=1e-5)
    assert totals((half.sum(), 7))[0].dtype == torch.float32 and totals((half.sum(), 7))[1] == 7
    assert totals(torch.tensor(2.0, dtype=F64)) == (torch.tensor(2.0, dtype=F64), 1.0)


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_forwards_is_the_one_stated(case: str) -> None:
    estimator, calls = CASES[case](), []
    run = Attached()
    inner = run.loss

    def counted(batch: Any) -> Any:
        calls.append(1)
        return inner(batch)

    run.loss = counted  # type: ignore[method-assign]
    run.gradients(estimator, [batch_of(2), batch_of(2, seed=1), batch_of(2, seed=2)])
    # a backward counts as two forwards, a tangent as one; vmap runs both signs, or all one-sided probes, in one call
    together = 2 if getattr(estimator, "sides", 2) == 2 else estimator.probes + 1
    weight = {"fo": 3, "zo": together if getattr(estimator, "signs", "") == "together" else 1, "fwd": 2}
    assert estimator.forwards(3) == len(calls) * weight[estimator.paradigm]


def test_a_variable_without_a_path_to_the_loss_receives_zero() -> None:
    run = Attached()
    run.loss = lambda batch: run.model.embedding(batch[0]).square().mean()  # type: ignore[method-assign, operator]
    _, received = run.gradients(Backprop(), [batch_of(2)])
    for name, gradient in received.items():
        assert bool(gradient.any()) == (name == "embedding.weight")


def test_a_loss_without_a_derivative_is_refused_by_backprop() -> None:
    run = Attached()
    run.loss = lambda batch: torch.ones((), dtype=F64)  # type: ignore[method-assign]
    before = Snapshot(run)
    with pytest.raises(UsageError, match="no derivative.*zo"):
        run.gradients(Backprop(), [batch_of(2)])
    before.assert_unchanged()


def test_the_last_micro_batch_need_not_use_every_variable() -> None:
    run = Attached()
    full = run.loss
    parts = [batch_of(2), batch_of(2, seed=1)]

    def partial(batch: Any) -> Tensor:
        if batch is parts[1]:
            return run.model.embedding(batch[0]).square().mean()  # type: ignore[operator]
        return full(batch)

    run.loss = lambda batch: full(batch)  # type: ignore[method-assign]
    _, first = run.gradients(Backprop(), parts[:1])
    run.loss = partial  # type: ignore[method-assign]
    _, both = run.gradients(Backprop(), parts)
    for name in first:
        if name != "embedding.weight":
            torch.testing.assert_close(both[name], first[name] / 2, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("projector", ["stiefel", "two_sided", "identity"])
def test_a_padding_row_is_left_alone(projector: str) -> None:
    model = nn.Sequential(nn.Embedding(7, 5, padding_idx=2), nn.Linear(5, 3)).double()
    plain = copy.deepcopy(model)
    ids = torch.tensor([[0, 2, 2], [5, 2, 1]])
    (variable,) = attach(model, lambda name, p: name == "0.weight")
    for side in ("right", "left"):
        rule = make(projector, rank=3, side=side)
        variable.open(rule.draw(variable.shape, KEY, like=LIKE))
        seen: list[Tensor] = []
        masked = lambda v, g, seen=seen: seen.append(v.mask(g.detach()))  # noqa: E731
        for estimator in (Backprop(), Spsa(eps=1e-3)):
            estimator(lambda b: model(b).sin().sum(), [ids], [variable], masked, KEY)
        plain.zero_grad()
        plain(ids).sin().sum().backward()
        grad = plain[0].weight.grad
        assert isinstance(grad, Tensor) and not bool(grad[2].any())
        torch.testing.assert_close(seen[0], variable.subspace.project(grad), rtol=1e-10, atol=1e-12)
        for masked_gradient in seen:
            assert not bool(variable.subspace.lift(masked_gradient)[2].any())


# ---- E2: nothing else changes ---------------------------------------------------------------------------------------------------


class Snapshot:
    """All that a call must leave as it was."""

    def __init__(self, run: Attached) -> None:
        self.run = run
        self.numbers = self._numbers()
        self.random = torch.get_rng_state()
        self.facts = self._facts()

    def _numbers(self) -> list[Tensor]:
        values = [v.value.detach().clone() for v in self.run.variables]
        weights = [p.detach().clone() for p in self.run.model.parameters()]
        with torch.no_grad():
            return [*values, *weights, self.run.model(batch_of(2, seed=9)[0])]

    def _facts(self) -> list[Any]:
        run = self.run
        facts: list[Any] = [torch.is_grad_enabled(), torch.get_num_threads(), forward_ad._current_level]
        for v in run.variables:
            hooks = v.value._post_accumulate_grad_hooks  # type: ignore[attr-defined]
            facts += [id(v.value), v.value.grad, v.value.requires_grad, bool(hooks), v.value._backward_hooks]
            facts += [v.moved, v.decay, v.window, v._point, v._rows, v._plain]
        for module in run.model.modules():
            facts += [type(module), sorted(module.__dict__), len(module._forward_hooks), module.training]
            facts += [p.grad for p in module.parameters()]
        return facts

    def assert_unchanged(self) -> None:
        assert torch.equal(torch.get_rng_state(), self.random), "the global generator moved"
        assert self._facts() == self.facts
        for now, before in zip(self._numbers(), self.numbers, strict=True):
            assert torch.equal(now, before)


@contextmanager
def noisy(run: Attached) -> Iterator[None]:
    """A loss that draws from the global generator, as dropout does."""
    inner = run.loss
    run.loss = lambda batch: inner(batch) * (1 + torch.rand(()))  # type: ignore[method-assign]
    yield


@pytest.mark.parametrize("projector", ["stiefel", "two_sided", "identity"])
@pytest.mark.parametrize("case", CASES)
def test_a_call_leaves_everything_as_it_was(case: str, projector: str) -> None:
    if projector == "identity" and case == "spsa orthonormal":
        pytest.skip("orthonormal directions need a subspace")
    run = Attached(make(projector, rank=3))
    before = Snapshot(run)
    run.gradients(CASES[case](), [batch_of(2), batch_of(2, seed=1)])
    before.assert_unchanged()


@pytest.mark.parametrize("case", CASES)
def test_a_stochastic_loss_does_not_move_the_global_generator(case: str) -> None:
    run = Attached()
    torch.manual_seed(1)
    before = Snapshot(run)
    with noisy(run):
        run.gradients(CASES[case](), [batch_of(2), batch_of(2, seed=1)])
    before.assert_unchanged()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("case", CASES)
def test_an_interrupt_at_any_evaluation_leaves_everything_as_it_was(
    case: str, kind: type[BaseException]
) -> None:
    estimator = CASES[case]()
    for projector in ("stiefel", "identity"):
        if projector == "identity" and case == "spsa orthonormal":
            continue
        run = Attached(make(projector, rank=3))
        before = Snapshot(run)
        stop = 0
        while stopped(run, estimator, kind, stop):
            before.assert_unchanged()
            stop += 1
        before.assert_unchanged()
        assert stop >= 2  # it was stopped at every evaluation of every micro-batch


def stopped(run: Attached, estimator: Any, kind: type[BaseException], stop: int) -> bool:
    """Whether the estimator came to an evaluation after `stop` others, which raises."""
    inner, calls = run.loss, 0

    def interrupted(batch: Any) -> Any:
        nonlocal calls
        calls += 1
        value = inner(batch)
        if calls > stop:
            raise kind("stopped")
        return value

    run.loss = interrupted  # type: ignore[method-assign]
    try:
        run.gradients(estimator, [batch_of(2), batch_of(2, seed=1)])
    except kind:
        return True
    finally:
        run.loss = inner  # type: ignore[method-assign]
    return False


@pytest.mark.parametrize("case", CASES)
def test_an_error_while_emitting_leaves_everything_as_it_was(case: str) -> None:
    run = Attached(loss="per example")
    before = Snapshot(run)
    for stop in range(len(run.variables)):
        received: list[Variable] = []

        def emit(variable: Variable, gradient: Tensor) -> None:
            received.append(variable)  # noqa: B023
            if len(received) == stop + 1:  # noqa: B023
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            CASES[case]()(run.loss, [batch_of(2)], run.variables, emit, KEY)
        before.assert_unchanged()


@pytest.mark.parametrize("case", CASES)
def test_the_same_key_gives_the_same_bits(case: str) -> None:
    first, second = Attached(), Attached()
    second.gradients(CASES[case](), [batch_of(2)], KEY.fold_in("before"))
    torch.manual_seed(77)
    a, b = (run.gradients(CASES[case](), [batch_of(2)])[1] for run in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)
    if case != "backprop":
        c = second.gradients(CASES[case](), [batch_of(2)], KEY.fold_in("other"))[1]
        same = [name for name in a if torch.equal(a[name], c[name])]
        assert not any(bool(a[name].any()) for name in same)  # blocks that are not drawn have no slope
        assert len(same) < len(a) and (not same or case == "coordinates")


def test_the_order_of_variables_does_not_matter() -> None:
    for case in CASES:
        if case == "spsa orthonormal":
            continue  # its directions are orthogonal to each other in the order of the layout
        run = Attached()
        _, a = run.gradients(CASES[case](), [batch_of(2)])
        run.variables = run.variables[::-1]
        _, b = run.gradients(CASES[case](), [batch_of(2)])
        radius = setting(CASES[case](), "eps") or 1.0
        assert_same(a, b, max(1e-12, 1e-14 / radius))


@pytest.mark.parametrize("case", [name for name in FORWARD_ONLY if "likelihood" not in name])
def test_both_evaluations_see_the_same_noise(case: str) -> None:
    """An independent noise tau would add tau² / (2 eps²) times the coordinates to the second moment (section 3.3)."""
    plain, loud = Attached(), Attached()
    inner = loud.loss
    loud.loss = lambda batch: inner(batch) + 10.0 * torch.rand((), dtype=F64)  # type: ignore[method-assign]
    torch.manual_seed(1)
    a, _ = plain.gradients(CASES[case](), [batch_of(2), batch_of(2)])
    b, _ = loud.gradients(CASES[case](), [batch_of(2), batch_of(2)])
    assert a.slopes is not None and b.slopes is not None
    radius = setting(CASES[case](), "eps") or 1.0
    torch.testing.assert_close(b.slopes, a.slopes, rtol=0, atol=1e-13 / radius)


@pytest.mark.parametrize("projector", ["stiefel", "gaussian", "two_sided", "identity"])
@pytest.mark.parametrize("law", LAWS)
def test_signs_together_equal_signs_in_sequence(projector: str, law: str) -> None:
    run = Attached(make(projector, rank=3))
    sequence, a = run.gradients(Spsa(eps=1e-3, probes=2, law=law), [batch_of(2), batch_of(3)])
    together, b = run.gradients(
        Spsa(eps=1e-3, probes=2, law=law, signs="together"), [batch_of(2), batch_of(3)]
    )
    assert_same(b, a, 1e-10)
    assert float(together.loss) == pytest.approx(float(sequence.loss), rel=1e-13)


def test_an_objective_without_a_derivative_can_be_probed() -> None:
    run = Attached()
    run.loss = lambda batch: (run.model(batch[0]).argmax(-1) != batch[1]).double().mean(1)  # type: ignore[method-assign]
    estimate, _ = run.gradients(Spsa(eps=0.5, probes=4), [batch_of(30)])
    assert 0 < float(estimate.loss) < 1
    assert estimate.slopes is not None and bool(estimate.slopes.any())


def test_settings_that_mean_nothing_are_refused() -> None:
    for cls, settings in (
        (Spsa, {"eps": 0.0}),
        (Spsa, {"eps": -1e-3}),
        (Spsa, {"eps": float("nan")}),
        (Spsa, {"probes": 0}),
        (Spsa, {"probes": True}),
        (Spsa, {"law": "uniform"}),
        (Spsa, {"sides": 3}),
        (Spsa, {"directions": "random"}),
        (Spsa, {"signs": "both"}),
        (Spsa, {"normalize": True}),
        (PrivateSpsa, {"eps": None}),
        (PrivateSpsa, {"eps": 0.0}),
        (PrivateSpsa, {"probes": 0}),
        (PrivateSpsa, {"law": "uniform"}),
        (PrivateSpsa, {"limit": 0.0}),
        (PrivateSpsa, {"limit": float("inf")}),  # noise has no unit then
        (PrivateSpsa, {"noise": -1.0}),
        (PrivateSpsa, {"noise": float("nan")}),
        (PrivateSpsa, {"signs": "both"}),
        (Coordinates, {"blocks": 0}),
        (Coordinates, {"law": "uniform"}),
        (Coordinates, {"alpha": 0.0}),
        (Mixture, {"random": Spsa(), "guided": Coordinates(), "share": 1.5}),
        (Mixture, {"random": Spsa(probes=2, normalize=True), "guided": Coordinates()}),
        (LikelihoodRatio, {"eps": 0.0}),
        (LikelihoodRatio, {"probes": 1.5}),
        (Forward, {"probes": 0}),
        (Forward, {"law": "uniform"}),
    ):
        with pytest.raises(UsageError, match="use|positive|give|loses"):
            cls(**settings)
    run = Attached()
    for estimator in (Spsa(), LikelihoodRatio(), Coordinates()):
        with pytest.raises(UsageError, match="eps"):
            run.gradients(estimator, [batch_of(2)])
    with pytest.raises(UsageError, match="do not fit"):
        run.gradients(Spsa(eps=1e-3, directions="orthonormal", probes=10**4), [batch_of(2)])


# ---- T18: what backprop keeps and makes -----------------------------------------------------------------------------------------


class Made(TorchDispatchMode):
    """Shapes of all tensors made in the context, but for views of the storages given."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.shapes.append(tuple(tensor.shape))
        return out


def made_and_saved(projector: Any, conv: bool) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """Shapes that a backprop step makes, and shapes that its graph keeps (weights and bases aside)."""
    wide, narrow = 40, 24
    layers = [
        nn.Linear(wide, narrow),
        Conv1D(wide, narrow) if conv else nn.Linear(narrow, wide),
        nn.Linear(wide, narrow),
    ]
    model = nn.Sequential(*layers).double()
    variables = attach(model, lambda name, p: p.dim() == 2)
    for variable in variables:
        variable.open(projector.draw(variable.shape, KEY.fold_in(variable.name), like=LIKE))
    x = random(7, wide, seed=1)
    known = [*model.parameters(), *(v.value for v in variables), x]
    known += [t for v in variables for t in v.subspace.tensors().values()]
    made, saved = Made(known), []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in made.known or tensor is x:
            saved.append(tuple(tensor.shape))
        return tensor

    def loss(batch: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            return model(batch).sum()

    received: list[Tensor] = []
    with made:
        Backprop()(loss, [x], variables, lambda v, g: received.append(g.detach()), KEY)
    assert len(received) == 3
    return set(made.shapes), set(saved)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("name", ["stiefel", "gaussian", "coordinate", "srht", "dependent"])
def test_backprop_in_a_subspace_makes_no_gradient_of_the_weights_size(name: str, conv: bool) -> None:
    made, saved = made_and_saved(make(name, rank=3), conv)
    assert not {(40, 24), (24, 40)} & made
    assert (7, 3) in saved  # x P
    assert not [shape for shape in saved if shape[:1] == (7,) and shape[1] > 3], (
        "an input was kept for the backward"
    )


def test_backprop_in_the_whole_space_does_both() -> None:
    made, saved = made_and_saved(Identity(), conv=False)  # what the test above would show if it were so
    assert {(40, 24), (24, 40)} & made
    assert {(7, 40), (7, 24)} & saved


def test_the_two_ways_to_the_projected_gradient_agree() -> None:
    """`δᵀ (x P) = (δᵀ x) P`."""
    m, n, r = 9, 12, 4
    model = nn.Linear(n, m).double()
    (variable, _) = attach(model, lambda name, p: True)
    variable.open(Stiefel(rank=r).draw(variable.shape, KEY, like=LIKE))
    x = random(20, n, seed=2)
    received: list[Tensor] = []
    Backprop()(lambda b: model(b).sin().sum(), [x], [variable], lambda v, g: received.append(g), KEY)
    delta = (x @ model.weight.T + model.bias).cos().detach()
    basis = variable.subspace.basis  # type: ignore[union-attr]
    torch.testing.assert_close(received[0], delta.T @ (x @ basis), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(received[0], (delta.T @ x) @ basis, rtol=1e-12, atol=1e-12)


# ---- T11, T12: mean and second moment of one probe ------------------------------------------------------------------------------

M, N, R = 5, 8, 2
GRAD = random(M, N, seed=12) * torch.linspace(2, 0.5, N, dtype=F64)

CLASS = ("stiefel", "coordinate", "srht", "dependent")
GAUSSIAN_PROBE = {
    **{name: M * N + 2 * N / R for name in CLASS},
    "gaussian": M * N + 2 * (M + N + R + 1) / R,
    "two_sided": M * N * (1 + 2 / R**2),
    "identity": M * N + 2,
    "viewed": M * N
    + 2 * (M * N + 1 + 1 + 1),  # gaussian on (m n, 1): sixteen parts of a row of eight are eight
}
COORDINATES = {
    **dict.fromkeys((*CLASS, "gaussian"), M * R),
    "two_sided": R * R,
    "identity": M * N,
    "viewed": M * N,
}


def one_probe(projector: str, law: str) -> float:
    """X, the second moment of section 3.1."""
    value, d = GAUSSIAN_PROBE[projector], COORDINATES[projector]
    if law == "gaussian":
        return value
    if law == "sphere" or projector not in ("gaussian", "viewed"):
        return (
            value * d / (d + 2)
        )  # ‖lift(Z)‖² = m n is constant on the Stiefel class, as it is on the sphere
    m, r = (M * N, 1) if projector == "viewed" else (M, R)
    return (
        M * N + 2 * (m + r - 1) / r
    )  # Gaussian basis, Rademacher probe: its diagonal terms lose 2 (n + 2) / r


@cache
def directions(law: str, count: int, shape: tuple[int, ...]) -> Tensor:
    """`(count, *shape)` independent probes: one draw over so many spaces."""
    spaces = [Space(f"{i}", shape) for i in range(count)]
    probe = Probe(Layout(spaces), law, KEY.fold_in("directions"))
    return torch.stack([probe(space.name) for space in spaces]).double()


@cache
def windows(projector: Any, count: int, spectrum: Spectrum | None = None) -> Any:
    """Bases of `count` independent windows: `(count, n, r)`, or a pair of stacks."""
    drawn = [projector.draw((M, N), KEY.fold_in("w", i), like=LIKE, spectrum=spectrum) for i in range(count)]
    if isinstance(drawn[0], TwoSided):
        return torch.stack([s.left for s in drawn]), torch.stack([s.right for s in drawn])
    if isinstance(drawn[0], Right | Viewed):
        return torch.stack([s.basis for s in drawn])
    return None


def lifted_probes(projector: Any, law: str, count: int, spectrum: Spectrum | None = None) -> Tensor:
    """`(count, m, n)`: one probe in each of `count` windows, lifted."""
    basis = windows(projector, count, spectrum)
    if isinstance(basis, tuple):
        return basis[0] @ directions(law, count, (R, R)) @ basis[1].mT
    if basis is None:
        return directions(law, count, (M, N))
    rows = M * N // basis.shape[1]  # m, or as many more as a view has parts
    return (directions(law, count, (rows, basis.shape[2])) @ basis.mT).reshape(count, M, N)


def estimates(lifted: Tensor, grad: Tensor = GRAD) -> Tensor:
    """Ghat for a linear function: the slope along a lifted probe, times it (the estimator does just this, see above)."""
    return torch.einsum("bij,ij->b", lifted, grad)[:, None, None] * lifted


def check_table(projector: str, law: str, count: int) -> None:
    ghat = estimates(lifted_probes(make(projector, rank=R), law, count))
    assert_mean(ghat, GRAD)
    assert_mean((ghat * GRAD).sum((1, 2)) / GRAD.square().sum(), 1.0)
    assert_mean(ghat.square().sum((1, 2)) / GRAD.square().sum(), one_probe(projector, law))


def test_the_published_table_of_second_moments() -> None:
    """Section 6 of the theory notes, m = 5, n = 8, r = 2."""
    expected = {
        ("identity", "gaussian"): 42,
        ("stiefel", "gaussian"): 48,
        ("coordinate", "gaussian"): 48,
        ("gaussian", "gaussian"): 56,
        ("two_sided", "gaussian"): 60,
        ("stiefel", "sphere"): 40,
        ("gaussian", "sphere"): 46.667,
        ("stiefel", "rademacher"): 40,
    }
    for (projector, law), value in expected.items():
        assert one_probe(projector, law) == pytest.approx(value, rel=1e-4)
    assert sorted(GAUSSIAN_PROBE) == sorted(n for n, cls in PROJECTORS.items() if cls.unbiased), (
        "extend the table"
    )


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("projector", GAUSSIAN_PROBE)
def test_one_probe_has_the_mean_and_second_moment_of_the_table(projector: str, law: str) -> None:
    check_table(projector, law, 200 if projector == "srht" else 800)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("projector", GAUSSIAN_PROBE)
def test_one_probe_has_the_mean_and_second_moment_of_the_table_at_length(projector: str, law: str) -> None:
    check_table(projector, law, 1500 if projector == "srht" else 10000)


def test_a_basis_that_holds_the_row_space_leaves_the_noise_of_its_coordinates() -> None:
    """`m r + 2` instead of `m n + 2 n / r`: what an instance-dependent draw can gain."""
    q = torch.linalg.qr(random(N, N, seed=2))[0]
    grad = random(M, R, seed=3) @ q[:, :R].T
    spectrum = Spectrum(q, torch.tensor([3.0, 1.0] + [0.0] * (N - R), dtype=F64), 0.0)
    ghat = estimates(lifted_probes(Dependent(rank=R, alpha=1e-9), "gaussian", 1500, spectrum), grad)
    assert_mean(ghat, grad)
    assert_mean(ghat.square().sum((1, 2)) / grad.square().sum(), M * R + 2)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("projector", [Stiefel(rank=R, c=R / N), Gaussian(rank=R, c=R / N)])
def test_c_scales_the_estimate(projector: Any, law: str) -> None:
    """3.0 and 3.5 in the table for a Gaussian probe."""
    c = R / N
    name = "stiefel" if isinstance(projector, Stiefel) else "gaussian"
    ghat = estimates(lifted_probes(projector, law, 1500))
    assert_mean(ghat, c * GRAD)
    assert_mean(ghat.square().sum((1, 2)) / GRAD.square().sum(), c**2 * one_probe(name, law))


# ---- the estimators themselves, end to end --------------------------------------------------------------------------------------


def end_to_end(case: str, projector: Any, count: int) -> Tensor:
    linear = Functional(lambda w: (w * GRAD).sum(), M, N)
    estimator = CASES[case]()
    return torch.stack([linear.estimate(estimator, projector, KEY.fold_in(i)) for i in range(count)])


@pytest.mark.parametrize("case", ["spsa gaussian", "likelihood_ratio", "forward gaussian"])
def test_the_mean_estimate_is_the_gradient(case: str) -> None:
    """E1, over subspaces and probes together."""
    assert_mean(end_to_end(case, Stiefel(rank=R), 300), GRAD)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*PLAIN, "coordinates", "mixture"])
@pytest.mark.parametrize("projector", ["stiefel", "identity"])
def test_the_mean_estimate_is_the_gradient_for_every_estimator(case: str, projector: str) -> None:
    if projector == "identity" and case == "spsa orthonormal":
        pytest.skip("orthonormal directions need a subspace")
    samples = end_to_end(case, make(projector, rank=R), 400)
    assert_mean(samples, GRAD)
    assert_mean((samples * GRAD).sum((1, 2)) / GRAD.square().sum(), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("projector", ["stiefel", "gaussian"])
@pytest.mark.parametrize("sides", [1, 2])
def test_the_second_moment_of_the_estimator_is_that_of_the_table(projector: str, sides: int) -> None:
    linear = Functional(lambda w: (w * GRAD).sum(), M, N)
    estimator, rule = Spsa(eps=1e-3, law="gaussian", sides=sides), make(projector, rank=R)
    samples = torch.stack([linear.estimate(estimator, rule, KEY.fold_in(i)) for i in range(3000)])
    assert_mean(samples.square().sum((1, 2)) / GRAD.square().sum(), one_probe(projector, "gaussian"))


def test_the_one_point_form_pays_for_the_size_of_the_loss() -> None:
    """`X ‖G‖² + F² m n / s²` (section 3.3): 38588 in the table for F = 3, s = 0.1."""
    grad = GRAD * sqrt((38588 - 36000) / 48) / GRAD.norm()
    lifted = lifted_probes(Stiefel(rank=R), "gaussian", 2000)
    # Ghat = F(W + s Z) Z / s for F(W) = 3 + <G, W>
    ghat = (3 + 0.1 * torch.einsum("bij,ij->b", lifted, grad))[:, None, None] * lifted / 0.1
    assert_mean(ghat.square().sum((1, 2)), 38588.0)
    linear = Functional(lambda w: 3 + (w * grad).sum(), M, N)
    estimator = LikelihoodRatio(eps=0.1)
    samples = torch.stack([linear.estimate(estimator, Stiefel(rank=R), KEY.fold_in(i)) for i in range(400)])
    assert_mean(samples, grad)
    assert_mean(samples.square().sum((1, 2)), 38588.0)


def test_central_differences_of_a_quadratic_do_not_depend_on_the_radius() -> None:
    """T13"""
    start = random(M, N, seed=5)
    quadratic = Functional(lambda w: (w * GRAD).sum() + 1.5 * w.square().sum(), M, N, start)
    linear = Functional(lambda w: (w * (GRAD + 3 * start)).sum(), M, N, start)
    for projector in (Stiefel(rank=R), Identity()):
        for eps in (1.0, 1e-2):
            a = quadratic.estimate(Spsa(eps=eps), projector, KEY)
            b = linear.estimate(Spsa(eps=1.0), projector, KEY)
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_one_sided_differences_carry_the_curvature() -> None:
    """`(f(B + s z) - f(B)) / s = slope + (s / 2) zᵀ H z`, for the same probe."""
    quadratic = Functional(lambda w: (w * GRAD).sum() + 1.5 * w.square().sum(), M, N)
    variable = quadratic.variable
    variable.open(Stiefel(rank=R).draw(variable.shape, KEY, like=LIKE))
    slopes = []
    for sides in (2, 1):
        estimate = Spsa(eps=0.5, sides=sides)(quadratic.loss, [None], [variable], lambda v, g: None, KEY)
        assert estimate.slopes is not None
        slopes.append(float(estimate.slopes))
    # H = 3 I and ‖lift(z)‖² = m n
    assert slopes[1] - slopes[0] == pytest.approx(0.5 / 2 * 3 * M * N, rel=1e-6)  # lengths of float32 bases


CUBE = random(M, N, seed=15)


def test_the_error_of_a_cubic_is_the_closed_form() -> None:
    """T14: `f = <A, W>³ / 6` has no linear part; all that is seen is the O(s²) error of section 3.3."""
    cubic = Functional(lambda w: (w * CUBE).sum().pow(3) / 6, M, N)
    for law in LAWS:
        one, two = (cubic.estimate(Spsa(eps=s, law=law), Stiefel(rank=R), KEY) for s in (0.5, 1.0))
        torch.testing.assert_close(two, 4 * one, rtol=1e-9, atol=1e-12)
    # the estimator's slope is s² <A, lift(z)>³ / 6
    lifted = lifted_probes(Stiefel(rank=R), "gaussian", 2000)
    s = 0.5
    along = torch.einsum("bij,ij->b", lifted, CUBE)
    error = (s**2 * along.pow(3) / 6)[:, None, None] * lifted
    a = R * (R * (N + 1) - 2) / (N * (N - 1) * (N + 2))
    b = R * (N - R) / (N * (N - 1) * (N + 2))
    expected = s**2 / 2 * (N / R) ** 2 * (a * CUBE.square().sum() * CUBE + 2 * b * CUBE @ CUBE.T @ CUBE)
    assert_mean(error, expected)
    assert_mean((error * expected).sum((1, 2)) / expected.square().sum(), 1.0)
    basis = windows(Stiefel(rank=R), 2000)[0]
    z = directions("gaussian", 2000, (M, R))[0]
    slope = s**2 * ((z @ basis.T) * CUBE).sum() ** 3 / 6
    assert float(error[0].norm()) == pytest.approx(float((slope * z @ basis.T).norm()), rel=1e-12)


# ---- T15: several probes ----------------------------------------------------------------------------------------------------------


def relative_error(samples: Tensor) -> Tensor:
    return (samples - GRAD).square().sum((1, 2)) / GRAD.square().sum()


def shared(basis: Tensor, law: str, q: int) -> Tensor:
    """Mean of q probes in each window."""
    count = len(basis)
    z = directions(law, count * q, (M, R)).view(count, q, M, R)
    slopes = torch.einsum("bqij,bij->bq", z, GRAD @ basis)
    return torch.einsum("bq,bqij->bij", slopes / q, z) @ basis.mT


@pytest.mark.slow
@pytest.mark.parametrize("q", [1, 4, 10])
def test_several_probes_have_the_error_of_the_table(q: int) -> None:
    """Section 3.2; 4.7 (fresh subspaces), 7.4 (one subspace), 9.55 (one Gaussian subspace) for q = 10."""
    count = 3000
    fresh = estimates(lifted_probes(Stiefel(rank=R), "gaussian", 10000))[: 10000 // q * q]
    assert_mean(relative_error(fresh.view(-1, q, M, N).mean(1)), (M * N + 2 * N / R - 1) / q)
    stiefel, gaussian = windows(Stiefel(rank=R), count), windows(Gaussian(rank=R), count)
    blind = N / R - 1
    assert_mean(relative_error(shared(stiefel, "gaussian", q)), blind + (M * N + N / R) / q)
    assert_mean(relative_error(shared(stiefel, "rademacher", q)), blind + (M * N - N / R) / q)
    g = (N + R + 1) / R
    assert_mean(
        relative_error(shared(gaussian, "gaussian", q)), g - 1 + (one_probe("gaussian", "gaussian") - g) / q
    )


def test_the_published_errors_of_several_probes() -> None:
    g, x = (N + R + 1) / R, GAUSSIAN_PROBE["gaussian"]
    assert (M * N + 2 * N / R - 1) / 10 == pytest.approx(4.7)
    assert N / R - 1 + (M * N + N / R) / 10 == pytest.approx(7.4) and N / R - 1 + (
        M * N + N / R
    ) / 4 == pytest.approx(14)
    assert g - 1 + (x - g) / 10 == pytest.approx(9.55)
    assert M * N / 10 - 1 == pytest.approx(3.0) and M * N / 4 - 1 == pytest.approx(9.0)


@pytest.mark.slow
@pytest.mark.parametrize("q", [1, 4])
def test_orthonormal_probes_have_the_error_of_the_table(q: int) -> None:
    """`m n / q - 1`"""
    linear = Functional(lambda w: (w * GRAD).sum(), M, N)
    estimator = Spsa(eps=1e-3, directions="orthonormal", probes=q)
    samples = torch.stack([linear.estimate(estimator, Stiefel(rank=R), KEY.fold_in(i)) for i in range(1000)])
    assert_mean(samples, GRAD)
    assert_mean(relative_error(samples), M * N / q - 1)


@pytest.mark.parametrize("projector", [Stiefel(rank=R), Gaussian(rank=R), make("two_sided", rank=R)])
def test_as_many_orthonormal_probes_as_coordinates_give_the_exact_gradient(projector: Any) -> None:
    linear = Functional(lambda w: (w * GRAD).sum(), M, N)
    for i in range(5):
        linear.variable.open(projector.draw((M, N), KEY.fold_in(i, "subspace"), like=LIKE))
        size = linear.variable.space.size
        estimator = Spsa(eps=1e-3, directions="orthonormal", probes=size)
        exact = linear.estimate(Backprop(), projector, KEY.fold_in(i))
        # directions are orthonormal in float32: q q' = I up to about size units of its last place
        allowed = 4 * size * torch.finfo(torch.float32).eps * float(exact.abs().max())
        assert float((linear.estimate(estimator, projector, KEY.fold_in(i)) - exact).abs().max()) < allowed


def test_all_orthonormal_probes_of_a_network_give_its_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    variables = attach(model, lambda name, p: True)
    for v in variables:
        rule = Stiefel(rank=2) if len(v.shape) == 2 else Identity()
        v.open(rule.draw(v.shape, KEY.fold_in(v.name), like=LIKE))
    size = layout(variables).size
    x = random(6, 4)
    out: list[dict[str, Tensor]] = []
    for estimator in (Backprop(), Spsa(eps=1e-4, directions="orthonormal", probes=size)):
        got: dict[str, Tensor] = {}
        keep = lambda v, g, got=got: got.update({v.name: g})  # noqa: E731
        estimator(lambda b: model(b).square().mean(), [x], variables, keep, KEY)
        out.append(got)
    assert_same(out[1], out[0], 4 * size * torch.finfo(torch.float32).eps)


# ---- T17: several layers ------------------------------------------------------------------------------------------------------------


def two_layers(law: str, count: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    model = nn.Sequential(nn.Linear(N, M, bias=False), nn.Linear(N, M, bias=False)).double()
    variables = attach(model, lambda name, p: True)
    grads = GRAD, random(M, N, seed=21) * 1.5
    eye = torch.eye(N, dtype=F64)

    def loss(batch: Any) -> Tensor:
        return sum((layer(eye).mT * g).sum() for layer, g in zip(model, grads, strict=True))  # type: ignore[return-value]

    samples = []
    for i in range(count):
        for v in variables:
            v.open(Stiefel(rank=R).draw(v.shape, KEY.fold_in("subspace", i, v.name), like=LIKE))
        got: dict[str, Tensor] = {}
        keep = lambda v, g, got=got: got.update({v.name: v.subspace.lift(g)})  # noqa: E731
        Spsa(eps=1e-3, law=law)(loss, [None], variables, keep, KEY.fold_in(i))
        samples.append(torch.stack([got[v.name] for v in variables]))
    return torch.stack(samples), grads


def check_layers(law: str, count: int) -> None:
    """Every layer sees its own gradient; `sum_l E‖Ghat_l‖² = d ‖G‖² + sum_l (2 n / r) ‖G_l‖²` for Gaussian probes."""
    samples, grads = two_layers(law, count)
    assert_mean(samples, torch.stack(grads))
    total = float(sum(g.square().sum() for g in grads))
    expected = 2 * M * N * total + (2 * N / R * total if law == "gaussian" else 0.0)
    assert_mean(samples.square().sum((1, 2, 3)), expected)


def test_layers_of_equal_shape_see_their_own_gradients() -> None:
    check_layers("gaussian", 400)


@pytest.mark.slow
@pytest.mark.parametrize(("law", "count"), [("gaussian", 2000), ("rademacher", 600), ("sphere", 1000)])
def test_layers_of_equal_shape_see_their_own_gradients_at_length(law: str, count: int) -> None:
    check_layers(law, count)


# ---- through the engine: the direction applied is the direction probed --------------------------------------------------------------


def engine_on_a_linear_function(
    method: Method, m: int, n: int, grad: Tensor, seed: int, lr: float
) -> tuple[Engine, nn.Linear]:
    model = nn.Linear(n, m, bias=False).double()
    nn.init.zeros_(model.weight)
    eye = torch.eye(n, dtype=F64)
    loss = lambda model, batch: (model(eye).mT * grad).sum()  # noqa: E731
    return Engine(model, method, lr=lr, loss=loss, select="all", seed=seed), model


def weight_of(model: nn.Linear) -> Tensor:
    with torch.no_grad():
        return model(torch.eye(model.in_features, dtype=F64)).mT.clone()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_a_step_moves_along_the_direction_it_measured(projector: str, law: str) -> None:
    """T16: on a linear function `<G, step> = -lr slope²`, on steps that refresh the subspace and on others."""
    if PROJECTORS[projector].needs == "gradient":
        pytest.skip("needs a gradient")
    refresh = None if projector == "identity" else 2
    method = Method(Spsa(eps=1e-2, law=law), make(projector, rank=R), OptimizerRule("sgd"), Reset(), refresh)
    lr = 1e-3
    engine, model = engine_on_a_linear_function(method, M, N, GRAD, 0, lr)
    refreshed = 0
    for _ in range(6):
        before = weight_of(model)
        info = engine.step([None])
        assert info.slope is not None
        along = float(((weight_of(model) - before) * GRAD).sum())
        assert along == pytest.approx(-lr * info.slope**2, rel=1e-6)
        refreshed += info.refreshed
    assert refreshed == (0 if projector == "identity" else 2)


@pytest.mark.slow
def test_subspace_and_probe_are_independent_in_the_engine() -> None:
    """One generator for both would add the trace and the transpose of the gradient: square weights show it."""
    n = 6
    grad = random(n, n, seed=4) + 2 * torch.eye(n, dtype=F64)
    method = Method(Spsa(eps=1e-2, law="gaussian"), Gaussian(rank=n), OptimizerRule("sgd"), Reset(), 1)
    moves = []
    for seed in range(700):
        engine, model = engine_on_a_linear_function(method, n, n, grad, seed, 1.0)
        for _ in range(2):
            before = weight_of(model)
            engine.step([None])
            moves.append(before - weight_of(model))
    assert_mean(torch.stack(moves), grad)


# ---- normalized steps (FZOO) --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signs", ["sequence", "together"])
def test_a_normalized_step_is_the_plain_one_over_the_spread_of_the_losses(signs: Any) -> None:
    run = Attached(Stiefel(rank=3))
    plain, expected = run.gradients(Spsa(eps=1e-3, sides=1, probes=4), [batch_of(3)])
    _, received = run.gradients(Spsa(eps=1e-3, sides=1, probes=4, signs=signs, normalize=True), [batch_of(3)])
    assert plain.slopes is not None
    losses = plain.loss + 1e-3 * plain.slopes  # of the probes
    spread = (losses - losses.mean()).square().mean().sqrt() / 1e-3
    assert_same(received, {name: g / spread for name, g in expected.items()}, 1e-9)


def test_one_sided_probes_together_equal_those_in_sequence() -> None:
    for projector in ("stiefel", "identity"):
        run = Attached(make(projector, rank=3))
        sequence, a = run.gradients(Spsa(eps=1e-3, probes=3, sides=1), [batch_of(2), batch_of(3)])
        together, b = run.gradients(
            Spsa(eps=1e-3, probes=3, sides=1, signs="together"), [batch_of(2), batch_of(3)]
        )
        assert_same(b, a, 1e-9)
        assert float(together.loss) == pytest.approx(float(sequence.loss), rel=1e-13)


def test_a_normalized_step_does_not_depend_on_the_scale_of_the_loss() -> None:
    estimator = Spsa(eps=1e-2, sides=1, probes=4, normalize=True)
    one, other = (
        Functional(lambda w, f=f: f * (w * GRAD).sum(), M, N).estimate(estimator, Identity(), KEY)
        for f in (1.0, 1e4)
    )
    torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def test_probes_that_agree_give_no_normalized_step() -> None:
    flat = Functional(lambda w: 3.0 + 0.0 * w.sum(), M, N)
    step = flat.estimate(Spsa(eps=1e-2, sides=1, probes=4, normalize=True), Identity(), KEY)
    assert not bool(step.any())


@pytest.mark.parametrize("probes", [3, 8])
def test_a_normalized_step_goes_along_the_gradient_by_the_closed_form(probes: int) -> None:
    """`E<step, G> / ‖G‖`: N slopes are N(0, ‖G‖²), so `N s² / ‖G‖²` is chi squared with N - 1 degrees, their mean apart."""
    from math import gamma

    linear = Functional(lambda w: (w * GRAD).sum(), M, N)
    estimator = Spsa(eps=1e-2, sides=1, probes=probes, law="gaussian", normalize=True)
    samples = torch.stack([linear.estimate(estimator, Identity(), KEY.fold_in(i)) for i in range(400)])
    k = probes
    spread = sqrt(2 / k) * gamma(k / 2) / gamma((k - 1) / 2)
    inverse = sqrt(k / 2) * gamma((k - 2) / 2) / gamma((k - 1) / 2)
    along = (samples * GRAD).sum((1, 2)) / GRAD.norm()
    assert_mean(along, spread + inverse / k)
    across = samples - along[:, None, None] * GRAD / GRAD.norm()
    assert_mean(across, 0.0)


# ---- private slopes (DPZero) ------------------------------------------------------------------------------------------------------------


class Examples:
    """Linear losses of n examples in one weight `(M, N)`."""

    def __init__(self, grads: Tensor) -> None:
        self.model = nn.Linear(N, M, bias=False).double()
        self.model.weight.data.zero_()
        (self.variable,) = attach(self.model, lambda name, p: True)
        self.grads, self.eye = grads, torch.eye(N, dtype=F64)

    def loss(self, batch: Any = slice(None)) -> Tensor:
        return torch.einsum("ij,bij->b", self.model(self.eye).mT, self.grads[batch])

    def estimate(self, estimator: PrivateSpsa, key: Key, batches: Sequence[Any] = (slice(None),)) -> Any:
        received: list[Tensor] = []
        found = estimator(self.loss, batches, [self.variable], lambda v, g: received.append(g), key)
        assert found.slopes is not None
        return found.slopes, received[0]


EXAMPLES = Examples(random(6, M, N, seed=31) + GRAD)


def test_without_noise_and_limit_a_private_step_is_a_plain_one() -> None:
    run = Attached(Stiefel(rank=3), loss="per example")
    for signs in ("sequence", "together"):
        for law in LAWS:
            free = PrivateSpsa(eps=1e-3, probes=2, law=law, limit=float("inf"), noise=0.0, signs=signs)
            _, received = run.gradients(free, [batch_of(3), batch_of(2)])
            _, expected = run.gradients(Spsa(eps=1e-3, probes=2, law=law), [batch_of(3), batch_of(2)])
            assert_same(received, expected, 1e-10)


def test_private_slopes_have_the_mean_and_the_variance_of_their_noise() -> None:
    """E1: unbiased below the limit; `d ‖G‖² + d (sigma C / n)²` in signs."""
    estimator = PrivateSpsa(eps=1e-2, law="rademacher", limit=500.0, noise=0.2)
    samples = torch.stack([EXAMPLES.estimate(estimator, KEY.fold_in(i))[1] for i in range(500)])
    grad, added = EXAMPLES.grads.mean(0), 0.2 * 500.0 / 6
    assert_mean(samples, grad)
    assert_mean(samples.square().sum((1, 2)), M * N * (float(grad.square().sum()) + added**2))


def test_slopes_of_examples_are_clipped_one_by_one() -> None:
    probe = Probe(layout([EXAMPLES.variable]), "gaussian", KEY.fold_in("probe", 0))
    z = probe(EXAMPLES.variable.name).double()
    each = torch.einsum("ij,bij->b", z, EXAMPLES.grads)
    limit = float(each.abs().median())
    slopes, _ = EXAMPLES.estimate(PrivateSpsa(limit=limit, noise=0.0), KEY, [slice(0, 4), slice(4, 6)])
    expected = each.clamp(-limit, limit).mean()
    assert float(slopes) == pytest.approx(float(expected), rel=1e-9)
    assert abs(float(expected - each.mean())) > 0.1


def test_noise_is_named_by_the_key_and_has_the_stated_size() -> None:
    quiet, loud = (PrivateSpsa(limit=3.0, noise=noise, probes=2) for noise in (0.0, 2.0))
    noise = torch.stack(
        [
            EXAMPLES.estimate(loud, KEY.fold_in(i))[0] - EXAMPLES.estimate(quiet, KEY.fold_in(i))[0]
            for i in range(300)
        ]
    )
    assert_mean(noise, 0.0)
    assert_mean(noise.square(), (2.0 * 3.0 / 6) ** 2)
    assert_mean(noise.prod(1), 0.0)
    again = EXAMPLES.estimate(loud, KEY.fold_in(0))[0] - EXAMPLES.estimate(quiet, KEY.fold_in(0))[0]
    assert torch.equal(again, noise[0])


def test_whatever_replaces_an_example_moves_a_slope_by_the_stated_sensitivity() -> None:
    estimator = PrivateSpsa(limit=2.0, noise=0.0, probes=3)
    base = EXAMPLES.estimate(estimator, KEY)[0]
    for other in (random(M, N, seed=5) * 1e6, -random(M, N, seed=5) * 1e6, torch.full((M, N), float("nan"))):
        grads = EXAMPLES.grads.clone()
        grads[2] = other
        moved = Examples(grads).estimate(estimator, KEY)[0]
        assert bool(torch.isfinite(moved).all())
        assert float((moved - base).abs().max()) <= 2 * 2.0 / 6 * (1 + 1e-12)


@pytest.mark.parametrize("form", ["mean", "sum and count"])
def test_a_private_step_refuses_a_loss_that_hides_its_examples(form: str) -> None:
    run = Attached()
    run._loss = LOSSES[form]
    run.loss = lambda batch: LOSSES[form](run.model, batch)  # type: ignore[method-assign]
    with pytest.raises(
        UsageError, match=r"one loss an example.*return a tensor \(batch,\), or use method 'mezo'"
    ):
        run.gradients(PrivateSpsa(), [batch_of(2)])


def test_the_privacy_spent_is_the_known_one() -> None:
    # Balle and Wang (2018), analytic Gaussian mechanism: epsilon = 1, delta = 1e-5 is what this noise spends at sensitivity 1
    assert epsilon_of(1 / 3.730631634944469, 1e-5) == pytest.approx(1.0, rel=1e-8)
    assert delta_of(1.0, 1.0) == pytest.approx(0.12693673750664387, rel=1e-12)  # Dong, Roth and Su (2022)
    with pytest.raises(UsageError, match="in \\(0, 1\\)"):
        epsilon_of(1.0, 1.0)


@pytest.mark.parametrize(("mu", "epsilon"), [(0.3, 0.5), (1.0, 2.0), (4.0, 10.0), (30.0, 500.0)])
def test_delta_is_the_divergence_of_two_shifted_gaussians(mu: float, epsilon: float) -> None:
    """`delta = ∫ max(0, p(x) - e^epsilon q(x)) dx` for p = N(mu, 1), q = N(0, 1), by the midpoint rule."""
    x = torch.linspace(epsilon / mu + mu / 2, mu + 12, 2_000_001, dtype=F64)  # where p > e^epsilon q
    x = (x[1:] + x[:-1]) / 2
    step = float(x[1] - x[0])
    p, q = (torch.exp(-((x - mean) ** 2) / 2 + shift) for mean, shift in ((mu, 0.0), (0.0, epsilon)))
    assert delta_of(mu, epsilon) == pytest.approx(float((p - q).sum()) * step / sqrt(2 * torch.pi), rel=1e-8)


def test_composition_counts_how_often_an_example_is_used() -> None:
    spent = lambda **given: PrivateSpsa(noise=20.0, **given).epsilon  # noqa: E731
    run = {"batch_size": 8, "rows": 80, "delta": 1e-5}
    assert spent()(steps=10, **run) == epsilon_of(2 / 20, 1e-5)  # one epoch
    assert spent()(steps=11, **run) == epsilon_of(2 * sqrt(2) / 20, 1e-5)
    assert spent(probes=4)(steps=40, **run) == epsilon_of(2 * sqrt(16) / 20, 1e-5)
    odd = {**run, "rows": 81}  # a step may hold the end of one epoch and the beginning of the next
    assert spent()(steps=10, **odd) == epsilon_of(2 * sqrt(2) / 20, 1e-5)
    assert PrivateSpsa(noise=0.0).epsilon(steps=1, **run) == float("inf")
    # never more than what Rényi divergences of the same steps give: a mu² / 2 + log(1 / delta) / (a - 1)
    mu = 2 * sqrt(40) / 20
    renyi = min(a * mu**2 / 2 + 11.512925 / (a - 1) for a in torch.linspace(1.01, 100, 5000).tolist())
    assert 0.8 * renyi < spent()(steps=400, **run) < renyi


# ---- sampled blocks, and mixtures (ZO-HGD) ----------------------------------------------------------------------------------------------


def block_moment(grad: Tensor, blocks: int, alpha: float = 0.2) -> float:
    """`sum_b d_b ‖G_b‖² / p_b` for rows that are drawn uniformly."""
    return float(grad.square().sum()) * grad.shape[1] * grad.shape[0] / blocks


def lone_blocks(grad: Tensor, estimator: Any, count: int, start: Tensor | None = None) -> Tensor:
    linear = Functional(lambda w: (w * grad).sum(), *grad.shape, start=start)
    return torch.stack([linear.estimate(estimator, Identity(), KEY.fold_in(i)) for i in range(count)])


def test_sampled_rows_have_the_mean_and_second_moment_of_their_probabilities() -> None:
    samples = lone_blocks(GRAD, Coordinates(eps=1e-2, blocks=2), 500)
    assert_mean(samples, GRAD)
    assert_mean(samples.square().sum((1, 2)), block_moment(GRAD, 2))
    assert {int(s.any(1).sum()) for s in samples} == {2}


def test_rows_of_one_entry_are_partial_derivatives() -> None:
    start = random(7, 1, seed=3)
    cubic = Functional(lambda w: (w.sin() * random(7, 1, seed=4)).sum(), 7, 1, start)
    got = cubic.estimate(Coordinates(eps=1e-4, blocks=7), Identity(), KEY)
    torch.testing.assert_close(got, start.cos() * random(7, 1, seed=4), rtol=1e-7, atol=1e-8)


def test_a_guide_that_knows_the_gradient_leaves_the_least_second_moment() -> None:
    """Water-filling: `(sum_b sqrt(d_b) ‖G_b‖)² / |I|` where no probability reaches 1."""
    grad = GRAD * torch.linspace(0.2, 1.5, M, dtype=F64)[:, None]
    linear = Functional(lambda w: (w * grad).sum(), M, N)
    exact = Found(torch.zeros(()), torch.zeros(1), lambda v: grad)
    samples = []
    for i in range(500):
        key = KEY.fold_in(i)
        found = Coordinates(eps=1e-2, blocks=2, alpha=1e-9).measure(
            linear.loss, [None], [linear.variable], key, exact
        )
        samples.append(found.gradient(linear.variable))
    seen = torch.stack(samples)
    assert_mean(seen, grad)
    norms = N**0.5 * grad.norm(dim=1)
    assert float(2 * norms.max() / norms.sum()) < 1
    assert_mean(seen.square().sum((1, 2)), float(norms.sum() ** 2) / 2)
    assert float(norms.sum() ** 2) / 2 < 0.9 * block_moment(grad, 2)


def test_a_mixture_has_the_mean_and_second_moment_of_its_parts() -> None:
    """One probe of signs says nothing of where the gradient is, so the rows are drawn uniformly."""
    share = 0.3
    estimator = Mixture(Spsa(eps=1e-2), Coordinates(eps=1e-2, blocks=2), share)
    samples = lone_blocks(GRAD, estimator, 400)
    assert_mean(samples, GRAD)
    square = float(GRAD.square().sum())
    random_part, rows = M * N * square, block_moment(GRAD, 2)
    expected = share**2 * random_part + (1 - share) ** 2 * rows + 2 * share * (1 - share) * square
    assert_mean(samples.square().sum((1, 2)), expected)


def test_a_mixture_of_the_first_part_alone_is_that_part() -> None:
    run = Attached(Stiefel(rank=3))
    whole = Mixture(Spsa(eps=1e-3, probes=2), Coordinates(eps=1e-3), share=1.0)
    found, received = run.gradients(whole, [batch_of(3)])
    plain, expected = run.gradients(Spsa(eps=1e-3, probes=2), [batch_of(3)])
    assert all(torch.equal(received[name], expected[name]) for name in expected)
    assert found.slopes is not None and plain.slopes is not None and torch.equal(found.slopes, plain.slopes)
    assert whole.forwards(3) == Spsa(probes=2).forwards(3)


@pytest.mark.parametrize("case", ["coordinates", "mixture"])
def test_a_slope_that_is_not_finite_shows_in_every_gradient(case: str) -> None:
    run = Attached()
    inner, calls = run.loss, 0

    def broken(batch: Any) -> Any:
        nonlocal calls
        calls += 1
        return inner(batch) * (float("inf") if calls == CASES[case]().forwards(1) else 1.0)

    run.loss = broken  # type: ignore[method-assign]
    found, received = run.gradients(CASES[case](), [batch_of(2)])
    assert found.slopes is not None and not bool(torch.isfinite(found.slopes).all())
    assert not any(bool(torch.isfinite(g).any()) for g in received.values())


def test_settings_of_parts_inside_parts_are_read_and_changed() -> None:
    mixture = Mixture(Spsa(probes=2), Coordinates(blocks=3), share=0.3)
    assert setting(mixture, "probes") == 2 and setting(mixture, "blocks") == 3
    assert setting(mixture, "sign", "none") == "none" and setting(mixture, "eps", 1.0) is None
    other = changed(mixture, eps=1e-2, probes=5, share=0.4)
    assert other == Mixture(Spsa(eps=1e-2, probes=5), Coordinates(eps=1e-2, blocks=3), share=0.4)
    with pytest.raises(UsageError, match="no setting 'radius' in Mixture"):
        changed(mixture, radius=1.0)


def test_slopes_of_forward_mode_do_not_depend_on_who_counts_memory():
    import zolr
    from zolr.memory import LiveBytes

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 1))
    batches = [torch.randn(8, 16) for _ in range(20)]
    loss = lambda model, batch: (model(batch) * batch.sum(1, keepdim=True)).mean()  # noqa: E731
    engine = zolr.Engine(model, zolr.compose("stiefel", "fwd", rank=2), lr=1e-3, loss=loss)
    for i, batch in enumerate(batches):
        key = Key(i)
        seen = engine.method.estimator.measure(engine._loss_of, [batch], engine.variables, key).slopes
        with LiveBytes():
            counted = engine.method.estimator.measure(engine._loss_of, [batch], engine.variables, key).slopes
        assert torch.equal(seen, counted)


@pytest.mark.parametrize("kind", [torch.bool, torch.bfloat16])
def test_fused_attention_of_several_points_gets_masks_of_as_many_rows(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's rule for the kernel of a card, on tensors without data: queries of all points with the mask of one otherwise."""
    shapes: list[tuple[int, ...]] = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "efficient_attention" in str(function):
                shapes.extend((args[0].shape, args[3].shape))
            return function(*args, **(kwargs or {}))

    def on_a_card(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype) if attn_mask.dtype == torch.bool else attn_mask
        bias = bias.expand(-1, query.shape[1], -1, -1)
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, False)[0]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", on_a_card)
    with FakeTensorMode():
        x = torch.empty(3, 4, 8, 16, device="cuda", dtype=torch.bfloat16)
        mask = torch.ones(3, 1, 8, 8, device="cuda", dtype=kind)

        def attend(scale: Tensor) -> Tensor:
            return _MappedMasks(scale).__torch_function__(
                on_a_card, (), (x * scale, x, x), {"attn_mask": mask}
            )

        with Shapes():
            out = torch.func.vmap(attend)(torch.ones(2, device="cuda", dtype=torch.bfloat16))
    assert shapes == [(6, 4, 8, 16), (6, 4, 8, 8)] and out.shape == (2, 3, 4, 8, 16)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("by_place", [True, False])
def test_masks_of_several_points_mask_the_same(kind: torch.dtype, by_place: bool) -> None:
    numbers = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 4, 8, 16, generator=numbers) for _ in range(3))
    mask = torch.randn(3, 1, 8, 8, generator=numbers)
    mask = mask > -0.5 if kind == torch.bool else mask
    attention, scales = torch.nn.functional.scaled_dot_product_attention, torch.tensor([1.0, -2.0])

    def attend(scale: Tensor) -> Tensor:
        with _MappedMasks(scale):
            more = (mask, 0.0, False) if by_place else ()
            named = {} if by_place else {"attn_mask": mask}
            return attention(q * scale, k, v, *more, scale=0.3, **named)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the missing rule for this kernel on a host
        found = torch.func.vmap(attend)(scales)
    torch.testing.assert_close(found, torch.stack([attention(q * s, k, v, mask, scale=0.3) for s in scales]))
