"""Laws of residuals, of subspaces that go on from the one before, and of projection-aware moments."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import pi, sqrt
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from zolr.engine import Engine
from zolr.errors import UsageError
from zolr.keys import Key
from zolr.methods import METHODS, Method, compose
from zolr.optim import ADAM_DEGREES, OptimizerRule
from zolr.projectors import Fixed, Side, one_sided
from zolr.projectors.jump import Jump
from zolr.projectors.power_iteration import PowerIteration
from zolr.projectors.svd import Svd
from zolr.projectors.tracking import Tracking
from zolr.projectors.walk import Walk
from zolr.residuals import Window
from zolr.residuals.drop import Drop
from zolr.residuals.error_feedback import ErrorFeedback
from zolr.residuals.recover import Recover
from zolr.residuals.replace import Replace
from zolr.subspaces import Left, Right, Subspace, TwoSided
from zolr.transports import TRANSPORTS
from zolr.transports.align import Align
from zolr.transports.aware import Aware
from zolr.transports.keep import Keep
from zolr.transports.reset import Reset

F64 = torch.float64
KEY = Key(7)
RATE = 0.1


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def basis(n: int, r: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(n, r, seed=seed))[0]


def signs(coords: Tensor) -> Tensor:
    """A step that no scale of the gradient changes, as Adam's."""
    return -RATE * coords.sign()


def moved(
    rule: Any, gradients: list[Tensor], subspace: Subspace, scale: float = 1.0, state: Any = None
) -> list[Tensor]:
    """What each of the gradients moves a weight by."""
    state = {} if state is None else state
    result = []
    for age, gradient in enumerate(gradients):
        weight = torch.zeros_like(gradient)
        window = Window(subspace, False, RATE, scale, age, {"betas": (0.9, 0.999)})
        rule(weight, rule.receive(gradient.clone(), state), window, signs, state)
        result.append(weight)
    return result


SIDES: dict[str, Callable[..., Subspace]] = {
    "right": lambda m, n, seed=1: Right(basis(n, 3, seed), m),
    "left": lambda m, n, seed=1: Left(basis(m, 3, seed), n),
    "two_sided": lambda m, n, seed=1: TwoSided(basis(m, 3, seed), basis(n, 2, seed + 1)),
}

# ---- recover, replace -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("level", ["channel", "tensor"])
def test_what_is_recovered_is_orthogonal_to_the_subspace_and_as_large_as_the_step_says(side, level):
    subspace, gradient = SIDES[side](6, 9), random(6, 9)
    inside = subspace.lift(subspace.project(gradient))
    step = subspace.lift(signs(subspace.project(gradient)))
    (change,) = moved(Recover(level=level), [gradient], subspace)
    rest = change - step
    assert float(subspace.project(rest).abs().max()) < 1e-12
    axis = {"right": 1, "left": 0}.get(side) if level == "channel" else None
    # each channel of the rest is enlarged as the step enlarges it inside
    sizes = [x.norm() if axis is None else x.norm(dim=axis) for x in (rest, gradient - inside, step, inside)]
    torch.testing.assert_close(sizes[0] / sizes[1], sizes[2] / sizes[3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("side", SIDES)
def test_the_scale_of_a_basis_counts_as_part_of_the_scale(side):
    subspace = SIDES[side](6, 9)
    tensors = {k: 2.5 * t if k != "right" and t.dim() else t for k, t in subspace.tensors().items()}
    scaled = type(subspace)(*(int(t) if not t.dim() else t for t in tensors.values()))
    gradients = [random(6, 9, seed=i) for i in range(3)]
    a, b = moved(Recover(), gradients, scaled, 1.0), moved(Recover(), gradients, subspace, 2.5)
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    assert float((a[0] - moved(Recover(), gradients, subspace, 1.0)[0]).abs().max()) > 0.05


def test_axes_of_a_basis_need_not_be_orthogonal():
    skew = Right(basis(9, 3) @ random(3, 3, seed=5), 6)
    gradient = random(6, 9)
    step = skew.lift(signs(skew.project(gradient)))
    (change,) = moved(Recover(), [gradient], skew)
    assert float(skew.project(change - step).abs().max()) < 1e-12


@pytest.mark.parametrize("rule", [Recover(growth=1.05), Replace(growth=1.05)], ids=["recover", "replace"])
def test_the_norm_grows_by_the_limit_at_most_and_by_that_where_it_would_more(rule):
    subspace = SIDES["right"](6, 9)
    gradients = [random(6, 9, seed=i) * 1.5**i for i in range(6)] + [random(6, 9, seed=9) * 1e-3]
    state: dict[str, Tensor] = {}
    changes = moved(rule, gradients, subspace, state=state)
    free = moved(replace(rule, growth=None), gradients, subspace)
    rest = isinstance(rule, Recover)
    norms = [
        [
            float((c - (subspace.lift(signs(subspace.project(g))) if rest else 0)).norm())
            for c, g in zip(cs, gradients, strict=True)
        ]
        for cs in (changes, free)
    ]
    for i in range(1, len(gradients)):
        assert norms[0][i] <= 1.05 * norms[0][i - 1] * (1 + 1e-12)
        assert norms[0][i] == pytest.approx(min(norms[1][i], 1.05 * norms[0][i - 1]), rel=1e-9)
    assert norms[0][1] < norms[1][1] * 0.999  # it was in force
    assert set(state) == {"norm"} and state["norm"].shape == ()
    assert float(state["norm"]) * RATE == pytest.approx(norms[0][-1], rel=1e-9)


def test_a_gradient_of_zero_does_not_hold_down_what_follows():
    subspace, gradient = SIDES["right"](6, 9), random(6, 9)
    for rule in (Recover(), Replace()):
        state: dict[str, Tensor] = {}
        moved(rule, [torch.zeros(6, 9, dtype=F64)], subspace, state=state)
        assert float(state["norm"]) == 0
        again = moved(rule, [gradient], subspace, state=state)
        torch.testing.assert_close(again, moved(rule, [gradient], subspace), rtol=0, atol=0)


def test_the_limiter_asks_the_device_nothing():
    with FakeTensorMode():  # a value that is asked for raises
        subspace = Right(torch.zeros(9, 3), 6)
        for rule in (Recover(), Replace(), Recover(released=True), Replace(released=True, level="tensor")):
            state: dict[str, Tensor] = {}
            for age in range(3):
                window = Window(subspace, False, RATE, 0.25, age, {"betas": (0.9, 0.999)})
                rule(torch.zeros(6, 9), torch.ones(6, 9), window, signs, state)


def test_replace_keeps_the_direction_of_the_gradient_in_every_channel():
    gradient = random(6, 9)
    for side in SIDES:
        subspace = SIDES[side](6, 9)
        (change,) = moved(Replace(), [gradient], subspace, 3.0)
        ratio = change / -gradient
        coords, axis = subspace.project(gradient), {"right": 1, "left": 0}.get(side)
        phi = (
            signs(coords).norm() / coords.norm()
            if axis is None
            else (signs(coords).norm(dim=axis, keepdim=True) / coords.norm(dim=axis, keepdim=True))
        )
        torch.testing.assert_close(ratio, (3 * phi).expand(6, 9), rtol=1e-6, atol=0)


def test_levels_and_limits_that_mean_nothing_are_refused():
    for cls in (Recover, Replace):
        with pytest.raises(UsageError, match="level 'row' is not known; use 'channel' or 'tensor'"):
            cls(level="row")
        for growth in (0.5, float("nan"), float("inf")):
            with pytest.raises(UsageError, match=f"growth = {growth} .*use at least 1"):
                cls(growth=growth)


# ---- error feedback ---------------------------------------------------------------------------------------------------


class Maps(nn.Module):
    """A tall, a wide and a square map, one after another."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.tall, self.square, self.wide = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 5)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.tanh(self.square(torch.tanh(self.tall(x)))))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def batches(count: int, dtype: torch.dtype = F64) -> list[tuple[Tensor, Tensor]]:
    x = random(count, 16, 6, seed=11).to(dtype)
    return [(part, torch.stack([part.sin().roll(i, 1)[:, :5] for i in range(2)]).sum(0)) for part in x]


def run(
    method: Method, steps: int = 10, lr: float = 1e-2, dtype: torch.dtype = F64, **settings: Any
) -> Engine:
    engine = Engine(Maps(dtype), method, lr=lr, loss=loss, **settings)
    for batch in batches(steps, dtype):
        engine.step([batch])
    return engine


def weights(engine: Engine) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in engine.export().named_parameters()}


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("transport", [Aware(), Reset()], ids=["aware", "reset"])
@pytest.mark.parametrize("projector", [PowerIteration(rank=2), Jump(rank=2)], ids=["power", "jump"])
def test_error_feedback_loses_nothing(optimizer, transport, projector):
    """`sum of steps / lr = sum of gradients − E − b / (1 − b) M_P`: what has not moved the weight is still to come."""
    base = compose("ldadam", rank=2, optimizer=optimizer)
    method = replace(base, projector=projector, transport=transport, refresh_every=2)
    engine = Engine(Maps(), method, lr=0.05, loss=loss)
    beginning = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    total = {v.name: torch.zeros(v.shape, dtype=F64) for v in engine.variables}
    begun: dict[str, Tensor] = {}
    for batch in batches(7):
        plain = engine.export()
        found = torch.autograd.grad(loss(plain.requires_grad_(True), batch), list(plain.parameters()))
        names = [n for n, _ in plain.named_parameters()]
        for name, gradient in zip(names, found, strict=True):
            total[name] += gradient
        before = weights(engine)
        # torch's momentum starts at the first gradient itself: 1 / (1 - b) times its usual share
        fresh = [v.name for v in engine.variables if not engine.optimizer.state.get(engine.trained(v))]
        if isinstance(transport, Reset):
            fresh += [n for n, c in engine.windows.cores.items() if engine.step_count % 2 == 0]
        engine.step([batch])
        after = weights(engine)
        for name in engine.windows.cores:
            if name in fresh and optimizer == "momentum":
                begun[name] = begun.get(name, 0) + 9 * (before[name] - after[name]) / 0.05
    for variable in engine.variables:
        name = variable.name
        if name not in engine.windows.cores:
            continue
        core = engine.windows.cores[name]
        waiting = core.kept["error"].clone()
        if optimizer == "momentum":
            mean = engine.optimizer.state[core.value]["momentum_buffer"]
            waiting += 9 * core.subspace.lift(core.subspace.dual(mean)) - begun[name]
        steps = (beginning[name] - weights(engine)[name]) / 0.05
        torch.testing.assert_close(steps, total[name] - waiting, rtol=1e-9, atol=1e-11)
        assert set(core.kept) == {"error"} and float(core.kept["error"].norm()) > 1e-3


def test_a_step_of_rate_zero_leaves_the_error_as_it_is():
    method = compose("ldadam", rank=2)
    engine = Engine(Maps(), method, lr=1e-2, loss=loss, schedule=lambda step: 0.0 if step == 2 else 1.0)
    errors = []
    for batch in batches(4):
        engine.step([batch])
        errors.append(engine.windows.cores["wide.weight"].kept["error"].clone())
    assert torch.equal(errors[1], errors[2]) and not torch.equal(errors[2], errors[3])
    assert set(engine.windows.cores["wide.weight"].kept) == {"error"}


# ---- subspaces that go on from the one before ---------------------------------------------------------------------------


SHAPES = [(7, 12), (12, 7), (9, 9)]


def draw(projector: Any, shape: tuple[int, int], key: Key, **extra: Any) -> Any:
    return projector.draw(shape, key, like=torch.zeros(0, dtype=F64), **extra)


def angles(a: Tensor, b: Tensor) -> Tensor:
    """Principal angles between spans of orthonormal bases, exact for small ones too."""
    return torch.linalg.svdvals(b - a @ (a.T @ b)).clamp(max=1).asin()


GOING_ON = {
    "walk": Walk(rank=3),
    "jump": Jump(rank=3),
    "power_iteration": PowerIteration(rank=3),
    "tracking": Tracking(rank=3),
    "tracking, by a step": Tracking(rank=3, step=0.02),
}


@pytest.mark.parametrize("name", GOING_ON)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_subspace_of_a_long_sequence_is_orthonormal_and_moves(name, shape):
    subspace = None
    for i in range(60):
        gradient, before = random(*shape, seed=i), subspace
        momentum = None if before is None else before.project(random(*shape, seed=100 + i))
        subspace = draw(
            GOING_ON[name], shape, KEY.fold_in(i), gradient=gradient, previous=before, momentum=momentum
        )
        p = subspace.basis
        assert p.shape == (min(shape), 3) and p.is_contiguous()
        assert float((p.T @ p - torch.eye(3, dtype=F64)).abs().max()) < 1e-12
        if before is not None:
            assert float(angles(before.basis, p).max()) > 1e-3


@pytest.mark.parametrize("name", GOING_ON)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_goes_on_is_a_transpose_of_itself(name, shape):
    """P3: a tall weight moves as its transpose does, windows after the first included."""
    a = b = None
    for i in range(4):
        gradient = random(*shape, seed=i)
        projector, key = GOING_ON[name], KEY.fold_in(i)
        means = [None if s is None else s.project(random(*shape, seed=50)) for s in (a,)]
        a = draw(
            replace(projector, side="right"), shape, key, gradient=gradient, previous=a, momentum=means[0]
        )
        turned = None if means[0] is None else means[0].T
        b = draw(
            replace(projector, side="left"),
            shape[::-1],
            key,
            gradient=gradient.T,
            previous=b,
            momentum=turned,
        )
        assert isinstance(a, Right) and isinstance(b, Left)
        torch.testing.assert_close(a.basis, b.basis, rtol=0, atol=1e-12)


@pytest.mark.parametrize("angle", [0.01, 0.5, pi / 2])
@pytest.mark.parametrize(("n", "r"), [(128, 16), (12, 3), (5, 4)])
def test_a_walk_steps_by_its_angle(angle, n, r):
    projector = Walk(rank=r, side="right", angle=angle)
    subspace = draw(projector, (3, n), KEY)
    for i in range(3):
        before, subspace = subspace, draw(projector, (3, n), KEY.fold_in(i), previous=subspace)
        found = angles(before.basis, subspace.basis)
        assert float(found.max()) == pytest.approx(angle, abs=1e-7)
        # the other angles are in the ratios of the singular values of a random tangent
        x = KEY.fold_in(i).normal((n, r)).double()
        s = torch.linalg.svdvals(x - before.basis @ (before.basis.T @ x))
        torch.testing.assert_close(found, angle * s / s[0], rtol=1e-6, atol=1e-7)


def test_a_walk_starts_from_the_gradient_or_from_anywhere():
    gradient = random(9, 6)
    from_gradient = draw(Walk(rank=3), (9, 6), KEY, gradient=gradient)
    svd = draw(Svd(rank=3), (9, 6), KEY, gradient=gradient)
    assert torch.equal(from_gradient.basis, svd.basis)
    assert not torch.equal(
        draw(Walk(rank=3), (9, 6), KEY).basis, draw(Walk(rank=3), (9, 6), KEY.fold_in(1)).basis
    )
    # a gradient of fewer directions than the rank: the others are random
    few = draw(Walk(rank=5, side="right"), (2, 8), KEY, gradient=random(2, 8))
    assert few.basis.shape == (8, 5)
    assert float((few.basis.T @ few.basis - torch.eye(5, dtype=F64)).abs().max()) < 1e-12
    kept = few.lift(few.project(random(2, 8)))
    torch.testing.assert_close(kept, random(2, 8), rtol=1e-10, atol=1e-10)
    # where the subspace is everything there is nowhere to go
    everything = draw(Walk(rank=6), (9, 6), KEY)
    assert (
        angles(everything.basis, draw(Walk(rank=6), (9, 6), Key(1), previous=everything).basis).max() < 1e-12
    )


def test_a_walk_from_a_haar_draw_is_unbiased_at_every_window():
    gradient, count, n, r = random(2, 8), 1500, 8, 2
    projector = Walk(rank=r, side="right", angle=0.7, c=1.0)
    lifted = []
    for i in range(count):
        subspace = draw(projector, (2, n), KEY.fold_in(i, 0))
        subspace = draw(projector, (2, n), KEY.fold_in(i, 1), previous=subspace)
        lifted.append(subspace.lift(subspace.project(gradient)))
    samples = torch.stack(lifted)
    assert bool(((samples.mean(0) - gradient).abs() < 5 * samples.std(0) / sqrt(count)).all())
    energy = samples.square().sum((1, 2)) / gradient.square().sum()
    assert abs(float(energy.mean()) - n / r) < 5 * float(energy.std()) / sqrt(count)


def test_a_jump_forgets():
    gradient = random(9, 6)
    first = draw(Jump(rank=3), (9, 6), KEY, gradient=gradient)
    assert torch.equal(first.basis, draw(Svd(rank=3), (9, 6), KEY, gradient=gradient).basis)
    then = [
        draw(Jump(rank=3), (9, 6), Key(1), gradient=g, previous=p)
        for g, p in ((gradient, first), (None, first))
    ]
    assert torch.equal(then[0].basis, then[1].basis) and not torch.equal(first.basis, then[0].basis)


def test_power_iteration_finds_the_leading_directions():
    u, v = basis(20, 12), basis(12, 12, seed=1)
    gradient = u @ torch.diag(0.5 ** torch.arange(12.0, dtype=F64)) @ v.T
    subspace = draw(PowerIteration(rank=3), (20, 12), KEY, gradient=random(20, 12))
    errors = []
    for _ in range(12):
        subspace = draw(PowerIteration(rank=3), (20, 12), KEY, gradient=gradient, previous=subspace)
        errors.append(float(angles(v[:, :3], subspace.basis).max().sin()))
    # each step shrinks the error by (s_4 / s_3)² = 1/4
    assert errors[-1] < 1e-5
    for i in range(5, 10):
        assert errors[i + 1] / errors[i] == pytest.approx(0.25, rel=0.02)


def test_power_iteration_mixes_the_momentum_in_by_its_weight():
    first = draw(PowerIteration(rank=3), (9, 6), KEY, gradient=random(9, 6))
    gradient, mean = random(9, 6, seed=1), random(9, 3, seed=2)
    got = draw(PowerIteration(rank=3, rho=0.6), (9, 6), KEY, gradient=gradient, previous=first, momentum=mean)
    mix = 0.6 * mean @ first.basis.T + 0.4 * gradient
    q, upper = torch.linalg.qr(mix.T @ mix @ first.basis)
    torch.testing.assert_close(got.basis, q * upper.diagonal().sign(), rtol=1e-10, atol=1e-10)
    with pytest.raises(UsageError, match="rho = 1.0 .*use at least 0"):
        PowerIteration(rho=1.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tracking_turns_toward_what_it_missed(shape):
    first = draw(Tracking(rank=3), shape, KEY, gradient=random(*shape))
    gradient = random(*shape, seed=1)

    def missed(subspace: Subspace) -> float:
        return float((gradient - subspace.lift(subspace.project(gradient))).square().sum())

    steps = [1e-4, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2]
    turned = [draw(Tracking(rank=3, step=s), shape, KEY, gradient=gradient, previous=first) for s in steps]
    best = draw(Tracking(rank=3), shape, KEY, gradient=gradient, previous=first)
    assert missed(turned[0]) < missed(first)
    assert missed(best) <= min(map(missed, turned)) + 1e-12
    # the derivative along the geodesic is minus the square of the tangent's length
    p, g = first.basis, gradient if isinstance(first, Right) else gradient.T
    sigma = torch.linalg.svdvals(2 * (g - g @ p @ p.T).T @ (g @ p))[0]
    tiny = draw(Tracking(rank=3, step=1e-7), shape, KEY, gradient=gradient, previous=first)
    assert float(angles(p, tiny.basis).max()) == pytest.approx(1e-7 * float(sigma), rel=1e-3)
    assert (missed(tiny) - missed(first)) / 1e-7 == pytest.approx(-(float(sigma) ** 2), rel=1e-3)


def test_tracking_stays_where_nothing_is_missed():
    first = draw(Tracking(rank=3), (9, 6), KEY, gradient=random(9, 6))
    inside = random(9, 3) @ first.basis.T
    for step in (None, 1e4):  # rounding is no direction to turn to, however long the step
        again = draw(Tracking(rank=3, step=step), (9, 6), KEY, gradient=inside, previous=first)
        assert float(angles(first.basis, again.basis).max()) < 1e-12


@pytest.mark.parametrize("settings", [{"angle": 0.0}, {"angle": 2.0}, {"c": 0.0}])
def test_a_walk_of_no_meaning_is_refused(settings):
    with pytest.raises(UsageError, match="use"):
        Walk(**settings)
    with pytest.raises(UsageError, match="step = 0.0 .*use a positive number"):
        Tracking(step=0.0)


def test_an_embedding_of_a_frozen_row_walks_on():
    model = nn.Sequential(nn.Embedding(7, 12, padding_idx=2), nn.Linear(12, 5)).double()
    method = replace(compose("grasswalk", rank=3, refresh_every=2), projects="all")
    engine = Engine(model, method, lr=1e-2, loss=lambda m, b: m(b).square().mean())
    for _ in range(6):
        engine.step([torch.arange(7)])
    core = next(c for n, c in engine.windows.cores.items() if n == "0.weight")
    assert isinstance(core.subspace, Left) and bool((core.subspace.basis[2] == 0).all())
    assert float(engine.detach()[0].weight[2].detach().abs().max()) == 0.0  # type: ignore[index]


# ---- projection-aware moments ------------------------------------------------------------------------------------------

BETAS = (0.9, 0.999)
SETTINGS = {"betas": BETAS}


def adam(gradients: Tensor, betas: tuple[float, float] = BETAS) -> dict[str, Tensor]:
    """Adam's state after gradients `(steps, ...)`."""
    first = second = torch.zeros_like(gradients[0])
    for gradient in gradients:
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
    return {"step": torch.tensor(float(len(gradients))), "exp_avg": first, "exp_avg_sq": second}


@pytest.mark.parametrize("side", SIDES)
def test_aware_moments_of_an_unchanged_subspace_are_the_same(side):
    subspace = SIDES[side](6, 9)
    state = adam(torch.stack([subspace.project(random(6, 9, seed=i)) for i in range(5)]))
    got = Aware()(state, ADAM_DEGREES, subspace.change_from(subspace), SETTINGS)
    for name, value in state.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("side", ["right", "left"])
def test_aware_moments_are_those_of_the_samples(side):
    """For gradients with uncorrelated coordinates: the mean exactly, the second moment within 1 % of what they give."""
    shape, r = ((1, 8) if side == "right" else (8, 1)), 8
    mean, spread = random(*shape, seed=1), random(*shape, seed=2).abs() + 0.2
    samples = mean + spread * random(200_000, *shape, seed=3)
    turn = basis(r, r, seed=4)
    kind = Right if side == "right" else Left
    old, new = (kind(b, 1) for b in (torch.eye(r, dtype=F64), turn))
    state = {
        "step": torch.tensor(1e6),
        "exp_avg": samples.mean(0),
        "exp_avg_sq": samples.square().mean(0),
    }
    seen = samples @ turn if side == "right" else turn.T @ samples
    got = Aware()(state, ADAM_DEGREES, new.change_from(old), SETTINGS)
    torch.testing.assert_close(got["exp_avg"], seen.mean(0), rtol=1e-9, atol=1e-12)
    exact = seen.square().mean(0)
    error = float((got["exp_avg_sq"] - exact).norm() / exact.norm())
    assert error < 0.01
    # neither keeping the second moment nor squaring the map does it
    for other in (state["exp_avg_sq"], (new.change_from(old)).variances(state["exp_avg_sq"])):  # type: ignore[union-attr]
        assert float((other - exact).norm() / exact.norm()) > 0.1


def test_bias_corrections_are_taken_off_and_put_back():
    """After few steps the moments are far from their means; the rule is about the means."""
    gradients = random(4, 1, 6, seed=1)
    state, turn = adam(gradients), basis(6, 6, seed=4)
    change = Right(turn, 1).change_from(Right(torch.eye(6, dtype=F64), 1))
    got = Aware()(state, ADAM_DEGREES, change, SETTINGS)
    c1, c2 = 1 - 0.9**4, 1 - 0.999**4
    mean, square = state["exp_avg"] / c1, state["exp_avg_sq"] / c2
    expected = c2 * ((square - mean**2) @ turn**2 + (mean @ turn) ** 2).abs()
    torch.testing.assert_close(got["exp_avg_sq"], expected, rtol=1e-9, atol=1e-15)
    assert float(got["step"]) == 4


# what is kept of a first moment's energy and of a second moment's mass where two subspaces of n have nothing to do with each other
LEFT_OF: dict[str, tuple[Callable[[int, int], float], Callable[[int, int], float]]] = {
    "keep": (lambda r, n: 1.0, lambda r, n: 1.0),
    "reset": (lambda r, n: 0.0, lambda r, n: 0.0),
    "align": (lambda r, n: r / n, lambda r, n: 1.0),
    "reproject": (lambda r, n: r / n, lambda r, n: 1.0),
    "aware": (lambda r, n: r / n, lambda r, n: r / n),
}


@pytest.mark.parametrize("name", TRANSPORTS)
def test_what_a_jump_leaves_of_the_moments(name):
    n, r, count = 32, 4, 200
    kept = torch.zeros(count, 2, dtype=F64)
    for i in range(count):
        old, new = (Right(basis(n, r, seed=2 * i + j), 5) for j in (0, 1))
        moment = 1e-6 * random(5, r, seed=i)  # so that a second moment of one is all variance
        state = {"step": torch.tensor(1e6), "exp_avg": moment, "exp_avg_sq": torch.ones(5, r, dtype=F64)}
        given = {key: value.clone() for key, value in state.items()}
        got = TRANSPORTS[name]()(given, ADAM_DEGREES, new.change_from(old), SETTINGS)
        if got:
            kept[i, 0] = got["exp_avg"].square().sum() / moment.square().sum()
            kept[i, 1] = got["exp_avg_sq"].mean()
    for part, expected in zip(kept.T, LEFT_OF[name], strict=True):
        assert abs(float(part.mean()) - expected(r, n)) <= 5 * float(part.std()) / sqrt(count) + 1e-9


@pytest.mark.parametrize("side", ["right", "left"])
def test_aligned_second_moments_are_those_of_the_samples(side):
    """For uncorrelated coordinates of mean zero, within 1 %."""
    shape = (1, 8) if side == "right" else (8, 1)
    samples = (random(*shape, seed=2).abs() + 0.2) * random(200_000, *shape, seed=3)
    turn, kind = basis(8, 8, seed=4), Right if side == "right" else Left
    change = kind(turn, 1).change_from(kind(torch.eye(8, dtype=F64), 1))
    state = {"step": torch.tensor(1e6), "exp_avg": samples.mean(0), "exp_avg_sq": samples.square().mean(0)}
    seen = samples @ turn if side == "right" else turn.T @ samples
    got = Align()(state, ADAM_DEGREES, change, SETTINGS)
    exact = seen.square().mean(0)
    assert float((got["exp_avg_sq"] - exact).norm() / exact.norm()) < 0.01
    assert float((state["exp_avg_sq"] - exact).norm() / exact.norm()) > 0.1


def test_aware_refuses_moments_that_it_does_not_know():
    change = Right(basis(6, 2), 3).change_from(Right(basis(6, 2, 1), 3))
    with pytest.raises(UsageError, match="'aware' does not know the state 'row_var'; use transport 'reset'"):
        Aware()({"row_var": torch.ones(3)}, ADAM_DEGREES, change, SETTINGS)
    with pytest.raises(
        UsageError, match="needs a mean beside the second moment 'exp_avg_sq'; use transport 'align'"
    ):
        Aware()({"exp_avg_sq": torch.ones(3, 2)}, ADAM_DEGREES, change, SETTINGS)
    assert Aware()({"exp_avg": torch.ones(3)}, ADAM_DEGREES, None, SETTINGS) == {}
    momentum = {"momentum_buffer": random(3, 2), "step": None}
    got = Aware()(momentum, {"momentum_buffer": 1, "step": 0}, change, {"momentum": 0.9})
    torch.testing.assert_close(got["momentum_buffer"], change.gradients(momentum["momentum_buffer"]))  # type: ignore[union-attr]


# ---- combinations ----------------------------------------------------------------------------------------------------


COMBINED: dict[str, tuple[dict[str, Any], type]] = {
    "stiefel with recovery": ({"method": "stiefel", "paradigm": "fo", "residual": "recover"}, Recover),
    "gaussian with recovery": ({"method": "rso", "residual": "recover"}, Recover),
    "two sides with recovery": (
        {"method": "stiefel", "paradigm": "fo", "projector": "two_sided", "residual": "recover"},
        Recover,
    ),
    "learned directions with recovery": ({"method": "dependent", "residual": "recover"}, Recover),
    "adafactor under replace": ({"method": "apollo", "optimizer": "adafactor"}, Replace),
    "muon with error feedback": ({"method": "ldadam", "optimizer": "muon"}, ErrorFeedback),
    "a walk with error feedback": ({"method": "grasswalk", "residual": "error_feedback"}, ErrorFeedback),
    "galore on a walk": ({"method": "galore", "projector": "walk"}, Drop),
    "a jump that starts afresh": ({"method": "grassjump", "transport": "reset"}, Recover),
    "a jump that keeps its mass": ({"method": "grassjump", "transport": "align"}, Recover),
}


@pytest.mark.parametrize("name", COMBINED)
def test_parts_that_nobody_put_together_work_together(name):
    settings, residual = COMBINED[name]
    method = compose(**settings, rank=2, refresh_every=4)
    assert type(method.residual) is residual and method.dense
    engine = Engine(Maps(), method, lr=1e-2, loss=loss)
    (batch,) = batches(1)
    losses = [engine.step([batch]).loss for _ in range(25)]
    assert min(losses[-5:]) < 0.97 * losses[0]
    assert engine.windows.cores


def test_a_walk_works_without_gradients():
    method = compose("grasswalk", "zo", rank=2, refresh_every=3, eps=1e-3)
    assert method.residual == Drop() and not method.dense
    engine = Engine(Maps(), method, lr=1e-2, loss=loss)
    bases = []
    for batch in batches(9):
        engine.step([batch])
        bases.append(
            next(v for v in engine.variables if v.name == "square.weight").subspace.basis * sqrt(2 / 10)
        )
    for i in range(1, 9):
        expected = 0.5 if i % 3 == 0 else 0.0
        assert float(angles(bases[i - 1], bases[i]).max()) == pytest.approx(expected, abs=1e-6)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"residual": "recovr"}, "residual 'recovr' is not known; did you mean 'recover'"),
    (
        {"method": "stiefel", "paradigm": "zo", "residual": "recover"},
        "residual 'recover' needs dense gradients, which paradigm 'zo' does not give; use residual 'drop', or --paradigm fo",
    ),
    (
        {"method": "stiefel", "paradigm": "fwd", "residual": "error_feedback"},
        "residual 'error_feedback' needs dense gradients, which paradigm 'fwd' does not give",
    ),
    ({"method": "grasswalk", "paradigm": "zo", "residual": "replace"}, "which paradigm 'zo' does not give"),
    (
        {"method": "adamw", "residual": "recover"},
        "'recover' .*projector 'identity' holds all; use residual 'drop'",
    ),
    (
        {"method": "ldadam", "optimizer": "adafactor", "transport": "keep"},
        "residual 'error_feedback' does not know the state of optimizer 'adafactor'",
    ),
    (
        {"method": "subtrack", "optimizer": "adafactor"},
        "transport 'aware' does not know .*'adafactor'; use transport",
    ),
    ({"method": "ldadam", "projector": "power_iteration", "paradigm": "zo"}, "runs under fo"),
]


@pytest.mark.parametrize(("choice", "message"), REFUSED, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_what_cannot_work_is_refused_with_a_reason(choice, message):
    with pytest.raises(UsageError, match=message):
        compose(**choice)


def test_a_residual_of_its_own_needs_dense_gradients():
    with pytest.raises(UsageError, match="'recover' needs dense gradients, which this method never forms"):
        replace(compose("stiefel", "fo"), residual=Recover())


# ---- reductions --------------------------------------------------------------------------------------------------------


def difference(a: Engine, b: Engine) -> float:
    one, other = weights(a), weights(b)
    return max(float((one[n] - other[n]).abs().max()) for n in one)


@pytest.mark.parametrize("name", ["fira", "subtrack", "grasswalk", "grassjump", "ldadam"])
def test_m1_with_full_rank_nothing_is_left_outside(name):
    """Recovery adds nothing then, and error feedback remembers nothing: the row is the same with `drop`."""
    method = replace(compose(name, rank=10), scale=1.0)
    got, plain = run(method), run(replace(method, residual=Drop()))
    assert difference(got, plain) < 1e-8
    small = replace(method, projector=replace(method.projector, rank=2))  # type: ignore[type-var]
    assert difference(run(small), run(replace(small, residual=Drop()))) > 1e-4


def test_m1_reductions_between_rows():
    fira = compose("fira", rank=2, refresh_every=4)
    galore = compose("galore", rank=2, refresh_every=4)
    assert difference(run(replace(fira, residual=Drop())), run(galore)) == 0.0
    # scale 1 and no limit: the released code differs in nothing
    free, released = Recover(growth=None), Recover(growth=None, released=True)
    assert difference(*(run(replace(fira, scale=1.0, residual=r)) for r in (free, released))) < 1e-12
    assert difference(*(run(replace(fira, residual=r)) for r in (free, released))) > 1e-4
    # one window: a track, a walk and a jump are all fira
    one = run(compose("fira", rank=2, refresh_every=100))
    for name in ("subtrack", "grasswalk", "grassjump"):
        assert difference(run(compose(name, rank=2, refresh_every=100)), one) == 0.0
    # rank 1 has one coordinate a channel
    mini = compose("apollo-mini", refresh_every=4)
    assert difference(run(replace(mini, residual=Replace())), run(replace(mini))) > 1e-4
    apollo = replace(
        compose("apollo", rank=1, refresh_every=4), scale=128**0.5, residual=Replace(level="tensor")
    )
    assert difference(run(apollo), run(mini)) == 0.0


def test_m1_sgd_under_replace_is_sgd():
    """`phi = 1` where the step is the gradient."""
    method = replace(compose("apollo", rank=2, optimizer="sgd"), residual=Replace(growth=None))
    assert difference(run(method, lr=0.05), run(compose("sgd"), lr=0.05)) < 1e-6  # 1e-8 a norm


@pytest.mark.parametrize("transport", [Reset(), Keep(), Align()], ids=["reset", "keep", "align"])
def test_the_limiter_starts_again_where_the_optimizer_does(transport):
    method = replace(compose("fira", rank=2, refresh_every=4), transport=transport)
    engine = Engine(Maps(), method, lr=1e-2, loss=loss)
    for batch in batches(4):
        engine.step([batch])
    core = engine.windows.cores["wide.weight"]
    core.kept["norm"].mul_(1e-6)  # as after a gradient that was nearly nothing
    engine.step(batches(5)[4:])
    assert (float(core.kept["norm"]) > 1e-3) == isinstance(transport, Reset)


def test_the_limiter_goes_on_where_the_optimizer_keeps_nothing():
    engine = Engine(Maps(), compose("fira", rank=2, refresh_every=2, optimizer="sgd"), lr=1e-2, loss=loss)
    data = batches(3)
    for batch in data[:2]:
        engine.step([batch])
    core = engine.windows.cores["wide.weight"]
    core.kept["norm"].mul_(1e-6)
    engine.step(data[2:])
    assert float(core.kept["norm"]) < 1e-3


# ---- R2: resume --------------------------------------------------------------------------------------------------------


RESUMED: dict[str, Method] = {
    **{name: compose(name, rank=1 if name == "apollo-mini" else 2, refresh_every=3) for name in METHODS if name in (
        "fira", "apollo", "apollo-mini", "subtrack", "grasswalk", "grassjump")},
    "ldadam": compose("ldadam", rank=2),
    "released": replace(compose("fira", rank=2, refresh_every=3), residual=Recover(released=True)),
    "feedback of a walk": compose("grasswalk", rank=2, refresh_every=3, residual="error_feedback"),
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("stop", [1, 5, 6])
def test_r2_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, stop):
    data = batches(9, torch.float32)
    whole = Engine(Maps(torch.float32), RESUMED[name], lr=1e-2, loss=loss)
    for batch in data[:stop]:
        whole.step([batch])
    state = whole.state_dict()
    losses = [whole.step([batch]).loss for batch in data[stop:]]
    again = Engine(Maps(torch.float32), RESUMED[name], lr=1e-2, loss=loss)
    again.load_state_dict(state)
    assert [again.step([batch]).loss for batch in data[stop:]] == losses
    for n, w in weights(whole).items():
        assert torch.equal(w, weights(again)[n]), n


# ---- side by side with the packages ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Orientation(Fixed):
    """SVD as the packages call it: of the gradient as it is, in single precision."""

    rank: int = 2
    side: Side = "short"
    needs: ClassVar[Any] = "gradient"
    unbiased: ClassVar[bool] = False

    def draw(self, shape: tuple[int, ...], key: Key, *, like: Tensor, gradient: Tensor, **_: Any) -> Subspace:
        u, _s, vt = torch.linalg.svd(gradient.float(), full_matrices=False)
        vectors = vt[: self.rank].T if shape[0] >= shape[1] else u[:, : self.rank]
        return one_sided(self.side, shape, vectors.to(like).contiguous())


@dataclass(frozen=True)
class Seeded(Fixed):
    """Gaussian bases from the seeds of the package, which numbers the weights."""

    rank: int = 2
    side: Side = "short"
    needs: ClassVar[Any] = "nothing"
    unbiased: ClassVar[bool] = False

    def draw(self, shape: tuple[int, ...], key: Key, *, like: Tensor, **_: Any) -> Subspace:
        from apollo_torch.random_projector import next_seed, stable_randn

        window, name = int(key.path[1]), str(key.path[2])
        seed = 1 + [n for n, p in Maps().named_parameters() if p.dim() == 2].index(name)
        for _ in range(window):
            seed = next_seed(seed)
        right = shape[0] >= shape[1]
        size = (self.rank, shape[1]) if right else (shape[0], self.rank)
        drawn = stable_randn(size, seed=seed) / sqrt(self.rank)
        return one_sided(self.side, shape, (drawn.T if right else drawn).to(like).contiguous())


ADAM = OptimizerRule("adamw", {"eps": 1e-30})  # where epsilon stands differs from torch's Adam to theirs


def theirs(
    optimizer: Callable[..., Any], group: dict[str, Any], steps: int, **settings: Any
) -> dict[str, Tensor]:
    """Weights after steps of a package's optimizer on the maps, matrices projected."""
    model = Maps()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    made = optimizer([{"params": matrices, **group}, {"params": vectors}], lr=1e-2, eps=1e-30, **settings)
    for batch in batches(steps):
        made.zero_grad()
        loss(model, batch).backward()
        made.step()
    return {n: p.detach() for n, p in model.named_parameters()}


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a)


GROUP = {"rank": 2, "update_proj_gap": 4, "proj_type": "std"}


@pytest.mark.filterwarnings("ignore")
def test_ten_steps_of_galore_torch():
    package = pytest.importorskip("galore_torch")
    expected = theirs(package.GaLoreAdamW, {**GROUP, "scale": 0.25}, 10, no_deprecation_warning=True)
    method = replace(compose("galore", refresh_every=4), projector=Orientation(), optimizer=ADAM)
    assert apart(weights(run(method)), expected) < 1e-10
    assert apart(weights(run(replace(method, scale=0.3))), expected) > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_ten_steps_of_fira():
    package = pytest.importorskip("fira")
    expected = theirs(package.FiraAdamW, {**GROUP, "alpha": 0.25}, 10, no_deprecation_warning=True)
    method = replace(compose("fira", refresh_every=4), projector=Orientation(), optimizer=ADAM)
    released = replace(method, residual=Recover(released=True))
    assert apart(weights(run(released)), expected) < 1e-7  # 1e-8 stands in the package's denominators
    assert apart(weights(run(method)), expected) > 1e-3  # the paper's rule is another one


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize(("level", "rank", "scale"), [("channel", 2, 1.0), ("tensor", 1, 128.0)])
def test_ten_steps_of_apollo_torch(level, rank, scale, front):
    package = pytest.importorskip("apollo_torch")
    group = {**GROUP, "rank": rank, "proj": "random", "scale": scale, "scale_type": level}
    expected = theirs(package.APOLLOAdamW, group, 10, scale_front=front)
    method = replace(
        compose("apollo" if level == "channel" else "apollo-mini", refresh_every=4),
        projector=Seeded(rank=rank),
        optimizer=ADAM,
    )
    released = replace(method, residual=Replace(level=level, released=True))
    assert apart(weights(run(released)), expected) < 1e-7
    assert apart(weights(run(method)), expected) > 1e-4
