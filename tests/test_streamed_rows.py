"""Laws of the rows that stream dense gradients: equal to loops written from their papers, and to one another at the edges."""

import sys
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from typing import Any

import pytest
import torch
from oracle import adafactor, flora, gum, lomo, mofasgd, plumage, q_galore, vlorp
from test_methods import BATCHES, WINDOW, distance, little, loss, trained, weights
from torch import Tensor, nn

from zolr.engine import Engine
from zolr.errors import UsageError
from zolr.factorizations import triples
from zolr.keys import Key
from zolr.methods import METHODS, Method, compose
from zolr.optim import OptimizerRule
from zolr.optim.averaged import Averaged
from zolr.optim.factored import Factored
from zolr.optim.mofasgd import MomentumFactorizedSgd, advanced
from zolr.projectors import PROJECTORS
from zolr.projectors.dependent import Dependent
from zolr.projectors.gaussian import Gaussian
from zolr.projectors.identity import Identity
from zolr.projectors.plumage import Plumage
from zolr.projectors.stiefel import Stiefel
from zolr.projectors.svd import LazySvd, Svd
from zolr.projectors.two_sided import TwoSidedHaar
from zolr.projectors.viewed import View
from zolr.residuals import Window
from zolr.residuals.compensate import Compensate
from zolr.residuals.drop import Drop
from zolr.residuals.precondition import Precondition
from zolr.residuals.projfactor import ProjFactor
from zolr.spectra import inclusion_probabilities
from zolr.subspaces import Coded, TwoSided, Viewed

F64 = torch.float64
KEY = Key(4)
MATRICES = [f"{name}.weight" for name in ("query", "value", "up", "down", "head")]
PROJECTED = {"rank": 3, "every": WINDOW, "projected": MATRICES}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def with_rank(name: str, **settings: Any) -> Method:
    return compose(name, rank=3, refresh_every=WINDOW, **settings)


# ---- M1: rows and their oracles ----------------------------------------------------------------------------------------

MOFASGD = {"rank": 3, "beta": 0.95, "factored": MATRICES}
EQUAL: dict[str, tuple[Method, Callable[..., list[dict[str, Tensor]]], dict[str, Any]]] = {
    "galore, adafactor": (
        with_rank("galore", optimizer="adafactor"),
        adafactor.run,
        {**PROJECTED, "scale": 0.25},
    ),
    "galore, adafactor, both sides": (
        with_rank("galore", optimizer="adafactor", side="both"),
        adafactor.run,
        {**PROJECTED, "scale": 0.25, "both": True},
    ),
    "plumage": (with_rank("plumage"), plumage.run, PROJECTED),
    "gum": (
        replace(with_rank("gum"), residual=Compensate(q=0.4)),
        gum.run,
        {**PROJECTED, "q": 0.4},
    ),
    "mofasgd": (compose("mofasgd", rank=3), mofasgd.run, MOFASGD),
    "mofasgd, and what lies outside": (
        compose("mofasgd", rank=3, set=["optimizer.outside=0.5"]),
        mofasgd.run,
        {**MOFASGD, "outside": 0.5},
    ),
    "mofasgd, released": (
        replace(compose("mofasgd"), optimizer=OptimizerRule("mofasgd", {"rank": 3, "released": True})),
        mofasgd.run,
        {**MOFASGD, "released": True},
    ),
    "lomo": (compose("lomo"), lomo.run, {}),
    "sgd": (compose("sgd"), lomo.run, {}),
    "adalomo": (compose("adalomo"), lomo.run, {"adaptive": True}),
    "vlorp": (
        replace(with_rank("vlorp"), projector=View(rank=2, granularity=4)),
        vlorp.run,
        {**PROJECTED, "rank": 2, "parts": 4},
    ),
    "flora": (with_rank("flora"), flora.run, PROJECTED),
}


@pytest.mark.parametrize("realization", ["side", "rebuild"])
@pytest.mark.parametrize("case", EQUAL)
def test_m1_a_row_equals_the_loop_written_from_its_paper(case, realization):
    method, oracle, constants = EQUAL[case]
    expected = oracle(little(), loss, BATCHES, lr=1e-2, **constants)
    assert distance(trained(method, realization=realization), expected[4::5]) < 1e-10
    start = {name: p.detach() for name, p in little().named_parameters()}
    moved = {name: float((expected[-1][name] - start[name]).abs().max()) for name in start}
    # what starts at zero moves by a thousandth of the rate under a rate that is scaled by the weight
    assert all(size > (1e-5 if not start[name].any() else 1e-4) for name, size in moved.items()), moved


def test_m1_both_branches_of_the_coin_were_compared():
    coins = [Compensate(q=0.4).whole(coin(name, window)) for name in MATRICES for window in range(4)]
    assert 0 < sum(coins) < len(coins)


def coin(name: str, window: int) -> Key:
    return Key(0).fold_in("subspace", window, name, "whole")


# ---- reductions --------------------------------------------------------------------------------------------------------

FEW = BATCHES[:10]


def test_m1_gum_without_the_whole_branch_is_galore_with_muon():
    gum_row = replace(with_rank("gum"), residual=Compensate(q=0.0))
    plain = replace(gum_row, residual=Drop())
    assert distance(trained(gum_row, batches=FEW), trained(plain, batches=FEW)) == 0.0
    named = replace(with_rank("galore", optimizer="muon", transport="reset"), scale=1.0)
    named = replace(named, optimizer=plain.optimizer)
    assert named == plain


def test_m1_lomo_is_sgd_and_adalomo_is_its_rule_after_the_backward_pass():
    assert distance(trained(compose("lomo"), batches=FEW), trained(compose("sgd"), batches=FEW)) < 1e-12
    batched = replace(compose("adalomo"), dense=False)
    assert distance(trained(compose("adalomo"), batches=FEW), trained(batched, batches=FEW)) < 1e-12


def test_m1_mofasgd_at_full_rank_is_the_polar_factor_of_plain_momentum():
    method = compose("mofasgd", rank=12)
    model, momentum, history = little(), {}, []
    matrices = {n: p for n, p in model.named_parameters() if n in MATRICES}
    for batch in FEW[:5]:  # the tables and vectors are frozen in both
        gradients = torch.autograd.grad(loss(model, batch), list(matrices.values()))
        with torch.no_grad():
            for (name, w), g in zip(matrices.items(), gradients, strict=True):
                momentum[name] = 0.95 * momentum.get(name, 0) + g
                u, s, v = torch.linalg.svd(momentum[name], full_matrices=False)
                kept = s > s[0] * 12 * torch.finfo(F64).eps
                w -= 1e-3 * 0.2 * max(w.shape) ** 0.5 * u @ torch.diag(kept.double()) @ v
    history = {n: p.detach() for n, p in matrices.items()}
    other = little()
    engine = Engine(other, method, lr=1e-3, loss=loss, select=lambda n, p: n in MATRICES)
    for batch in FEW[:5]:
        engine.step([batch])
    got = weights(engine)
    assert max(float((got[n] - history[n]).abs().max()) for n in MATRICES) < 1e-8


def test_m1_flora_in_a_space_as_large_as_the_weight_is_adafactor_with_momentum():
    whole = replace(with_rank("flora"), projector=Stiefel(rank=12, side="short"))
    rule = OptimizerRule("adafactor", {"beta": 0.9, "scaled": True})
    plain = replace(compose("adamw"), optimizer=rule)
    assert distance(trained(whole, batches=FEW), trained(plain, batches=FEW)) < 1e-10


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize(
    "projector", [View(rank=12, granularity=4, around=Stiefel()), View(rank=12, granularity=2, around=Svd())]
)
def test_m1_a_view_of_full_rank_is_plain_sgd(projector, every):
    method = replace(
        with_rank("galore", optimizer="sgd"), scale=1.0, projector=projector, refresh_every=every
    )
    assert distance(trained(method, 0.1, FEW), trained(compose("sgd"), 0.1, FEW)) < 1e-10


def test_m1_a_view_of_one_part_is_no_view():
    around = Stiefel(rank=3)
    one = replace(with_rank("stiefel", paradigm="fo"), projector=View(rank=3, granularity=1, around=around))
    plain = with_rank("stiefel", paradigm="fo")
    assert distance(trained(one, batches=FEW), trained(plain, batches=FEW)) < 1e-12


def test_m1_both_sides_at_full_rank_are_plain_sgd():
    method = replace(with_rank("galore", optimizer="sgd", side="both"), scale=1.0, refresh_every=1)
    method = replace(method, projector=Svd(rank=12, side="both"))
    assert distance(trained(method, 0.1, FEW), trained(compose("sgd"), 0.1, FEW)) < 1e-10
    space = Svd(rank=2, side="both").draw((5, 9), KEY, like=random(1), gradient=random(5, 9))
    assert isinstance(space, TwoSided) and space.coords_shape == (2, 2)
    turned = Svd(rank=2, side="both").draw((9, 5), KEY, like=random(1), gradient=random(5, 9).T)
    torch.testing.assert_close(turned.project(random(5, 9).T), space.project(random(5, 9)).T)


def test_m1_adafactor_is_torchs_where_that_scales_as_it_does():
    torch_rule = replace(compose("adamw"), optimizer=OptimizerRule("Adafactor", {"eps": (1e-15, 1e-3)}))
    ours = replace(compose("adamw"), optimizer=OptimizerRule("adalomo"))
    assert distance(trained(ours, batches=FEW), trained(torch_rule, batches=FEW)) < 1e-9


# ---- adafactor and adalomo ------------------------------------------------------------------------------------------------


def test_a_factored_rule_moves_coordinates_that_begin_at_zero_by_the_rate():
    for name, size in (("adafactor", 1.0), ("adalomo", 1e-3), ("Adafactor", 1e-3)):
        value = nn.Parameter(torch.zeros(6, 4, dtype=F64))
        optimizer = OptimizerRule(name).build([value], 0.1)
        value.grad = random(6, 1) @ random(1, 4, seed=1)  # of rank one, which factors hold exactly
        optimizer.step()
        torch.testing.assert_close(value.data, -0.1 * size * value.grad.sign(), rtol=1e-6, atol=0)


def test_ten_steps_of_adalomo_are_those_of_pytorch_optimizer():
    peers = pytest.importorskip("pytorch_optimizer")
    ours, theirs = little(torch.float32), little(torch.float32)
    engine = Engine(ours, compose("adalomo"), lr=1e-2, loss=loss)
    # padding rows, loss scales and clipping are out of it
    peer = peers.AdaLOMO(theirs, lr=1e-2, loss_scale=0.0)
    for batch in FEW:
        engine.step([batch])
        peer.fused_backward(loss(theirs, batch), 1e-2)
    worst = max(
        float((a - b).detach().abs().max())
        for a, b in zip(weights(engine).values(), theirs.parameters(), strict=True)
    )
    assert worst < 1e-5


# ---- plumage: closed forms -------------------------------------------------------------------------------------------------


def assert_mean(samples: Tensor, expected: Tensor | float) -> None:
    """Within five standard errors, in every entry."""
    allowed = 5 * samples.std(0) / sqrt(len(samples)) + 1e-9
    assert bool(((samples.mean(0) - expected).abs() <= allowed).all())


def spectral(m: int, n: int, power: float = 1.0) -> Tensor:
    """A gradient with singular values `i^-power`."""
    left, right = (torch.linalg.qr(random(x, min(m, n), seed=x))[0] for x in (m, n))
    return left * torch.arange(1, min(m, n) + 1, dtype=F64) ** -power @ right.T


@pytest.mark.parametrize(("shape", "side"), [((12, 8), "short"), ((6, 10), "short"), ((6, 10), "right")])
def test_plumage_has_the_mean_marginals_and_variance_of_its_law(shape, side):
    grad, rank, count = spectral(*shape), 3, 1500
    values = torch.linalg.svdvals(grad)
    p = inclusion_probabilities(values.square(), rank)
    assert float(p.sum()) == pytest.approx(rank, abs=1e-12) and float(p[0]) == 1.0 > float(p[1])
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    lifted, drawn = [], []
    for i in range(count):
        space = Plumage(rank, side=side).draw(shape, KEY.fold_in(i), like=grad, gradient=grad)
        lifted.append(space.lift(space.project(grad)))
        vectors = space.basis / space.basis.norm(dim=0)
        axes = right if space.coords_shape[0] == shape[0] else left.T
        drawn.append((axes @ vectors).square().sum(1))
    picked = torch.stack(drawn)
    assert float((picked.sum(1) - rank).abs().max()) < 1e-9  # exactly r of the singular directions
    assert float((picked - picked.round()).abs().max()) < 1e-9
    assert_mean(picked, p)
    samples = torch.stack(lifted)
    assert_mean(samples, grad)
    error = (samples - grad).square().sum((1, 2))
    assert_mean(error, float((values.square() * (1 / p - 1)).sum()))


def test_plumage_loses_nothing_where_the_rank_holds_the_gradient():
    grad = random(9, 2) @ random(2, 7, seed=1)
    space = Plumage(rank=4).draw((9, 7), KEY, like=grad, gradient=grad)
    assert space.coords_shape == (9, 4)
    torch.testing.assert_close(space.lift(space.project(grad)), grad, rtol=1e-9, atol=1e-9)
    with pytest.raises(UsageError, match="plumage.*needs a dense gradient"):
        Plumage().draw((9, 7), KEY, like=grad)


def test_a_share_of_the_uniform_law_makes_plumage_unbiased_for_other_gradients_too():
    grad, other = spectral(10, 6, 2.0), random(10, 6, seed=5)
    spaces = [
        Plumage(3, alpha=0.3).draw((10, 6), KEY.fold_in(i), like=grad, gradient=grad) for i in range(1500)
    ]
    assert_mean(torch.stack([s.lift(s.project(other)) for s in spaces]), other)


def test_half_of_the_weight_gives_rules_without_a_scale_the_mean_square_of_the_whole_space():
    """A step of signs: m n in the mean square, whatever the marginals; all of the weight would give `m sum 1 / p`."""
    grad, rank = spectral(12, 8), 3
    p = inclusion_probabilities(torch.linalg.svdvals(grad).square(), rank)
    half, whole = [], []
    for i in range(1500):
        space = Plumage(rank).draw((12, 8), KEY.fold_in(i), like=grad, gradient=grad)
        step = space.project(grad).sign()
        half.append(space.lift(step).square().sum())
        whole.append(space.lift(step * space.basis.norm(dim=0)).square().sum())
    assert_mean(torch.stack(half), 12 * 8)
    assert_mean(torch.stack(whole), float((12 / p).sum()))
    assert float((12 / p).sum()) > 2 * 12 * 8


# ---- gum: closed forms -------------------------------------------------------------------------------------------------------


SIDED = [Gaussian(rank=3, side="left"), View(3, 2)]
LAWS = [*(cls() if name == "identity" else cls(rank=3) for name, cls in PROJECTORS.items()), *SIDED]


@pytest.mark.parametrize("projector", [law for law in LAWS if not isinstance(law, Identity)], ids=repr)
def test_what_momentum_is_fed_has_the_mean_of_the_gradient_over_the_coin(projector):
    grad, q, residual = random(6, 10), 0.3, Compensate(q=0.3)
    space = projector.draw((6, 10), KEY, like=grad, gradient=grad)
    fed = {}
    for whole in (False, True):

        def step(coords: Tensor, whole: bool = whole) -> Tensor:
            fed[whole] = coords.clone()
            return torch.zeros_like(coords)

        residual(torch.zeros(6, 10, dtype=F64), grad.clone(), Window(space, whole, 0.1, 1.0, 0), step, {})
    mean = (1 - q) * space.lift(fed[False]) + q * fed[True]
    torch.testing.assert_close(mean, grad, rtol=1e-12, atol=1e-12)


def test_coins_are_fair_and_each_weight_and_window_has_its_own():
    tosses = torch.tensor([Compensate(0.3).whole(KEY.fold_in(i)) for i in range(3000)]).double()
    assert_mean(tosses, 0.3)
    engine = Engine(little(), replace(with_rank("gum"), residual=Compensate(0.5)), lr=1e-3, loss=loss)
    seen = set()
    for batch in BATCHES:
        engine.step([batch])
        for variable in engine.variables:
            core = engine.windows.cores.get(variable.name)
            if core is not None:
                assert core.whole == Compensate(0.5).whole(coin(variable.name, core.window))
                buffer = engine.optimizer.state[core.value]["momentum_buffer"]
                assert (
                    buffer.shape == core.value.shape == (variable.shape if core.whole else core.value.shape)
                )
                seen.add((variable.name, core.whole))
    assert len(seen) > len(MATRICES)  # some weight has had both
    for q in (-0.1, 1.0, float("nan")):
        with pytest.raises(UsageError, match=f"q = {q} is no probability"):
            Compensate(q)


# ---- mofasgd ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6), (1, 7)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_factors_move_as_the_truncated_sum_of_dense_matrices_does(shape, rank):
    rank = min(rank, *shape)
    u, s, v = (x[..., :rank] for x in torch.svd(random(*shape)))
    grad = random(*shape, seed=5)
    got = advanced(u, s, v, grad, 0.9)
    assert [tuple(x.shape) for x in got] == [(shape[0], rank), (rank,), (shape[1], rank)]
    inside = u @ u.T @ grad + grad @ v @ v.T - u @ u.T @ grad @ v @ v.T
    left, values, right = torch.linalg.svd(0.9 * u * s @ v.T + inside, full_matrices=False)
    expected = left[:, :rank] * values[:rank] @ right[:rank]
    torch.testing.assert_close(got[0] * got[1] @ got[2].T, expected, rtol=1e-10, atol=1e-10)


def test_factors_that_hold_nothing_move_nothing():
    value = nn.Parameter(torch.zeros(6, 4, dtype=F64))
    optimizer = MomentumFactorizedSgd([value], lr=1.0, rank=3)
    value.grad = torch.zeros(6, 4, dtype=F64)
    optimizer.step()
    assert not value.any()
    value.grad = torch.outer(random(6), random(4, seed=1))  # of rank one: one direction, not three
    optimizer.state.clear()
    optimizer.step()
    singular = torch.linalg.svdvals(value.data)
    assert float(singular[0]) == pytest.approx(0.2 * sqrt(6)) and float(singular[1]) < 1e-12


def test_the_rank_of_mofasgd_is_given_as_any_rank_is():
    engine = Engine(little(), compose("mofasgd", rank=2), lr=1e-3, loss=loss)
    engine.step(BATCHES[:1])
    for variable in engine.variables:
        state = engine.optimizer.state[variable.value]
        assert (state["values"].shape == (2,)) if variable.name in MATRICES else "exp_avg" in state
    with pytest.raises(UsageError, match="rank 0 is not possible"):
        Engine(little(), compose("mofasgd", rank=0), lr=1e-3, loss=loss)
    with pytest.raises(UsageError, match="factors matrices, not shape"):
        MomentumFactorizedSgd([nn.Parameter(torch.zeros(3))])


# ---- vlorp ------------------------------------------------------------------------------------------------------------------


def test_a_view_holds_its_budget_of_coordinates_and_a_row_and_a_column():
    method = replace(with_rank("vlorp"), projector=View(rank=2, granularity=4))
    engine = Engine(little(), method, lr=1e-3, loss=loss)
    engine.step(BATCHES[:1])
    for variable in engine.variables:
        if variable.name in MATRICES:
            m, n = variable.shape
            core = engine.windows.cores[variable.name]
            assert isinstance(core.subspace, Viewed) and core.value.shape == (4 * m, 2)
            assert {k: v.numel() for k, v in core.kept.items()} == {"steps": 1, "rows": m, "columns": n}


def test_what_a_view_cannot_go_around_is_refused():
    with pytest.raises(UsageError, match="cannot go around Dependent"):
        View(around=Dependent())
    with pytest.raises(UsageError, match="granularity 0 is no number of parts"):
        View(granularity=0)
    with pytest.raises(UsageError, match="projects another side"):
        View(around=TwoSidedHaar()).draw((4, 8), KEY, like=random(1))
    assert View(around=Svd()).needs == "gradient" and View(around=Stiefel()).needs == "nothing"
    with pytest.raises(UsageError, match="needs dense gradients"):
        replace(compose("stiefel", "fo"), projector=View(around=Svd()))


@pytest.mark.parametrize("paradigm", ["fo", "zo", "fwd"])
def test_a_view_works_at_every_site_and_leaves_the_padding_row_alone(paradigm):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Embedding(7, 8, padding_idx=2), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 7)
        )
    model = model.double()
    ids = torch.arange(14).reshape(2, 7) % 7
    measure = lambda m, b: nn.functional.cross_entropy(m(b).flatten(0, 1), b.flatten())  # noqa: E731
    method = compose("stiefel", paradigm, projector="viewed", rank=2, refresh_every=3)
    engine = Engine(
        model, method, lr=1e-3 if paradigm == "zo" else 1e-2, loss=measure, weight_decay=0.1, check=ids
    )
    losses = [engine.step([ids]).loss for _ in range(12)]
    assert losses[-1] < losses[0]
    before = measure(model, ids)
    engine.fold()
    torch.testing.assert_close(measure(model, ids), before, rtol=1e-12, atol=0)
    assert not engine.detach()[0].weight[2].any()  # type: ignore[index]


# ---- q-galore ----------------------------------------------------------------------------------------------------------------


def test_a_lazy_law_draws_the_more_rarely_the_more_alike_its_draws_are():
    lazy = LazySvd(rank=2, threshold=0.4, memory=3)
    assert lazy.gap(2, [0.9, 0.9]) == 2  # too few were seen
    assert lazy.gap(2, [0.0, 0.1, 0.9, 0.9]) == 4 and lazy.gap(2, [0.9, 0.9, 0.1, 0.1, 0.1]) == 2
    a, b = (lazy.draw((6, 4), KEY, like=random(1), gradient=random(6, 4, seed=i)) for i in (0, 1))
    assert float(lazy.likeness(a, a)) == pytest.approx(1.0) and 0 <= float(lazy.likeness(a, b)) < 1
    turned = replace(a, basis=-a.basis)  # the same directions
    assert float(lazy.likeness(a, turned)) == pytest.approx(1.0)
    for settings in ({"threshold": 0.0}, {"threshold": 1.5}, {"memory": 0}):
        with pytest.raises(UsageError, match="out of range"):
            LazySvd(**settings)


def lazily(threshold: float) -> Engine:
    projector = LazySvd(rank=3, threshold=threshold, memory=2, bits=4)
    method = replace(compose("q-galore", refresh_every=1), projector=projector)
    return Engine(little(), method, lr=1e-3, loss=loss)


def test_m1_q_galore_with_a_likeness_that_is_never_met_is_galore():
    method = replace(with_rank("q-galore"), projector=LazySvd(rank=3, threshold=1.0))
    assert distance(trained(method, batches=FEW), trained(with_rank("galore"), batches=FEW)) == 0.0


def test_q_galore_waits_for_each_weight_by_itself_and_resumes_where_it_waited():
    engine, batch = lazily(0.4), BATCHES[0]  # one batch again and again: gradients hardly turn
    counts = []
    for _ in range(12):
        engine.step([batch])
        counts.append({core.variable.name: core.window + 1 for core in engine.windows.cores.values()})
    # drawn at 0, 1, 2, then (two alike) every second step, then every fourth, ...
    assert all(count == 3 for count in counts[2].values())
    assert all(3 < count < 8 for count in counts[-1].values())
    other = lazily(0.4)
    for _ in range(5):
        other.step([batch])
    state = other.state_dict()
    again = lazily(0.4)
    again.load_state_dict(state)
    for _ in range(7):
        again.step([batch])
    assert {c.variable.name: (c.window, c.gap, c.likeness) for c in again.windows.cores.values()} == {
        c.variable.name: (c.window, c.gap, c.likeness) for c in engine.windows.cores.values()
    }
    assert all(
        torch.equal(a, b) for a, b in zip(weights(again).values(), weights(engine).values(), strict=True)
    )


def test_m1_q_galore_draws_at_the_steps_of_the_loop_written_from_its_paper():
    drawn: dict[str, list[int]] = {}
    settings = {"bits": 4, "threshold": 0.5, "memory": 2}
    q_galore.run(
        *(little(), loss, BATCHES), lr=1e-2, rank=3, every=3, scale=0.25, projected=MATRICES, drawn=drawn, **settings
    )  # fmt: skip
    method = compose("q-galore", refresh_every=3)
    method = replace(method, projector=LazySvd(rank=3, **settings))  # type: ignore[arg-type]
    engine, found = Engine(little(), method, lr=1e-2, loss=loss), {name: [] for name in MATRICES}
    for step, batch in enumerate(BATCHES):
        before = {name: engine.windows.cores[name].window for name in MATRICES}
        engine.step([batch])
        for name in MATRICES:
            found[name] += [step] if engine.windows.cores[name].window > before[name] else []
    assert found == drawn and len({len(steps) for steps in drawn.values()}) > 1  # some wait, some do not


def test_bases_of_few_bits_are_kept_as_such_and_refused_where_they_cannot_be():
    engine = Engine(little(), with_rank("q-galore"), lr=1e-2, loss=loss)
    engine.step(BATCHES[:1])
    (core, *_) = engine.windows.cores.values()
    assert isinstance(core.subspace, Coded) and core.subspace.codes.dtype == torch.uint8
    assert core.subspace.bits == 4
    plain = Engine(little(), with_rank("q-galore", set=["projector.bits=null"]), lr=1e-2, loss=loss)
    plain.step(BATCHES[:1])
    basis = next(iter(plain.windows.cores.values())).subspace
    assert not isinstance(basis, Coded)
    with pytest.raises(UsageError, match="kept in 5 bits; use 4, 8"):
        LazySvd(bits=5)
    with pytest.raises(UsageError, match="has one side"):
        LazySvd(bits=4, side="both")


# ---- combinations that nobody published -----------------------------------------------------------------------------------------

COMBINED: dict[str, Method] = {
    "plumage with muon": with_rank("plumage", optimizer="muon"),
    "plumage with momentum": with_rank("plumage", optimizer="momentum"),
    "plumage on a view": replace(with_rank("plumage"), projector=View(2, 4, around=Plumage())),
    "coin with adam": with_rank("gum", optimizer="adamw"),
    "coin on a random subspace": with_rank("gum", projector="stiefel"),
    "coin on both sides": with_rank("gum", side="both"),
    "flora on both sides": replace(with_rank("flora"), projector=Svd(rank=3, side="both")),
    "flora without learning its directions": with_rank("flora", projector="coordinate"),
    "projfactor without a view": with_rank("vlorp", projector="plumage"),
    "projfactor after adam": with_rank("vlorp", optimizer="adamw", transport="align"),
    "preconditioned galore": with_rank("galore", residual="precondition", optimizer="momentum"),
    "a stiefel subspace with a coin": with_rank("stiefel", paradigm="fo", residual="compensate"),
    "mofasgd in a subspace": with_rank("galore", optimizer="mofasgd", transport="reset"),
    "adalomo by batches": replace(compose("adalomo"), dense=False),
}


@pytest.mark.parametrize("case", COMBINED)
def test_parts_combine(case):
    engine = Engine(little(), COMBINED[case], lr=1e-3, loss=loss, weight_decay=0.1)
    losses = [engine.step([BATCHES[0]]).loss for _ in range(2 * WINDOW + 1)]
    assert losses[-1] < losses[0]


# ---- precision and choices ------------------------------------------------------------------------------------------------------

NAMES = ("q-galore", "flora", "plumage", "gum", "mofasgd", "vlorp", "lomo", "adalomo")


@pytest.mark.parametrize("name", NAMES)
def test_states_are_float32_whatever_the_weights_are(name):
    method = METHODS[name].build()
    if hasattr(method.projector, "rank"):
        method = compose(name, rank=3, refresh_every=2)
    engine = Engine(little(torch.bfloat16), method, lr=1e-3, loss=loss)
    for batch in BATCHES[:4]:
        assert not engine.step([batch]).skipped
    tensors = [t for state in engine.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    tensors += [t for core in engine.windows.cores.values() for t in (core.value.data, *core.kept.values())]
    assert all(t.dtype == torch.float32 for t in tensors)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_of_zeros_moves_nothing(name):
    method = METHODS[name].build()
    if hasattr(method.projector, "rank"):
        method = compose(name, rank=3, refresh_every=2)
    model = little()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine = Engine(model, method, lr=1e-2, loss=lambda m, b: loss(m, b) * 0)
    for batch in BATCHES[:3]:
        engine.step([batch])
    assert all(torch.equal(w, start[n]) for n, w in weights(engine).items())


def test_residuals_without_dense_gradients_and_bad_settings_are_refused():
    for residual in ("compensate", "precondition", "projfactor"):
        with pytest.raises(UsageError, match=f"residual '{residual}' needs dense gradients"):
            compose("stiefel", "zo", residual=residual)
    for build in (
        lambda: Precondition(fresh=1.5),
        lambda: Precondition(decay=0.0),
        lambda: ProjFactor(beta=1.0),
        lambda: ProjFactor(eps=0.0),
        lambda: Plumage(alpha=-0.1),
        lambda: Averaged([nn.Parameter(torch.zeros(1))], beta=1.0),
        lambda: Factored([nn.Parameter(torch.zeros(1))], decay=0.0),
    ):
        with pytest.raises(UsageError, match="use"):
            build()
    with pytest.raises(UsageError, match="transport 'reproject' does not know"):
        compose("galore", optimizer="adafactor", transport="reproject")


# ---- 8-bit states ------------------------------------------------------------------------------------------------------------------


def eight_bits() -> Engine:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(96, 160), nn.Tanh(), nn.Linear(160, 96))
    method = compose("q-galore", rank=64, refresh_every=3, optimizer="adamw8bit")
    return Engine(model, method, lr=1e-2, loss=lambda m, b: (m(b) - b.flip(1)).square().mean())


def test_states_of_eight_bits_are_small_and_resume_bit_for_bit():
    pytest.importorskip("bitsandbytes")
    x = random(32, 96).float()
    engine = eight_bits()
    losses = [engine.step([x]).loss for _ in range(5)]
    state = engine.state_dict()
    losses += [engine.step([x]).loss for _ in range(5)]
    assert losses[-1] < 0.8 * losses[0]
    again = eight_bits()
    again.load_state_dict(state)
    assert [again.step([x]).loss for _ in range(5)] == losses[5:]
    for core in engine.windows.cores.values():
        held = engine.optimizer.state[core.value]
        assert held["state1"].dtype == held["state2"].dtype == torch.uint8
        assert held["state1"].shape == core.value.shape


def test_states_of_eight_bits_without_their_package_are_refused_with_a_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)  # as if it were not installed
    with pytest.raises(
        UsageError, match=r"'adamw8bit' needs the package bitsandbytes.*pip install 'zolr\[quant\]'"
    ):
        eight_bits()
    with pytest.raises(UsageError, match="did you mean 'adamw8bit'"):
        OptimizerRule("adam8bit")


# ---- peers ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_ten_steps_of_galore_are_those_of_galore_torch(optimizer, monkeypatch):
    """Two windows. Moments that are kept see the signs of singular vectors, which mean nothing: theirs are made ours."""
    peers = pytest.importorskip("galore_torch")
    plain = torch.linalg.svd

    def svd(matrix: torch.Tensor, full_matrices: bool = True):
        u, s, vh = plain(matrix, full_matrices=full_matrices)
        r = len(s)
        signs = (vh[:r] * triples(matrix, r)[2].mT).sum(1).sign()
        return torch.cat((u[:, :r] * signs, u[:, r:]), 1), s, torch.cat((vh[:r] * signs[:, None], vh[r:]))

    monkeypatch.setattr(torch.linalg, "svd", svd)
    ours, theirs = little(torch.float32), little(torch.float32)
    method = replace(compose("galore", rank=3, refresh_every=5, optimizer=optimizer))
    engine = Engine(ours, method, lr=1e-2, loss=loss)
    matrices = [p for n, p in theirs.named_parameters() if n in MATRICES]
    others = [p for n, p in theirs.named_parameters() if n not in MATRICES]
    groups = [
        {"params": others},
        {"params": matrices, "rank": 3, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"},
    ]
    if optimizer == "adamw":
        peer = peers.GaLoreAdamW(groups, lr=1e-2, eps=1e-8, no_deprecation_warning=True)
    else:
        settings = {"scale_parameter": False, "relative_step": False}
        peer = peers.GaLoreAdafactor(groups, lr=1e-2, **settings)
    for batch in FEW:
        engine.step([batch])
        loss(theirs, batch).backward()
        peer.step()
        theirs.zero_grad()
    worst = {
        n: float((a - b.detach()).abs().max())
        for (n, b), a in zip(theirs.named_parameters(), weights(engine).values(), strict=True)
    }
    assert max(worst.values()) < 1e-4, worst


def test_ten_steps_of_muon_are_those_of_torch():
    ours, theirs = little(), little()
    engine = Engine(ours, compose("muon"), lr=1e-2, loss=loss, weight_decay=0.1)
    matrices = [p for n, p in theirs.named_parameters() if n in MATRICES]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    peers = [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs.embed.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW(vectors, lr=1e-2, weight_decay=0.0),
    ]
    for batch in FEW:
        engine.step([batch])
        loss(theirs, batch).backward()
        for peer in peers:
            peer.step()
            peer.zero_grad()
    got = weights(engine)
    assert max(float((got[n] - p.detach()).abs().max()) for n, p in theirs.named_parameters()) < 1e-10
