"""Laws of random subspaces (P1-P3) and of optimal sampling, against closed forms.

Notation: weight `(m, n)`, basis `P (n, r)`, `E[P Pᵀ] = c I`, and `kappa` with `E[(P Pᵀ)²] = c² kappa I`. A mean over
draws is compared with its closed form within five standard errors of that mean.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from math import gcd, sqrt
from typing import Any

import pytest
import torch
from conftest import threads
from torch import Tensor

from zolr.errors import UsageError
from zolr.keys import Key
from zolr.probes import Layout, Probe, Space
from zolr.projectors import PROJECTORS, haar, is_right, orthonormal, projected_length
from zolr.projectors.dependent import Dependent
from zolr.projectors.srht import hadamard_columns
from zolr.projectors.stiefel import Stiefel
from zolr.spectra import Moments, Sketch, Spectrum, inclusion_probabilities, isotropic, sample
from zolr.subspaces import Full, Left, Right, Subspace, TwoSided, Viewed

F64 = torch.float64
LIKE = torch.zeros(0, dtype=F64)
KEY = Key(20)

UNBIASED = [name for name, cls in PROJECTORS.items() if cls.unbiased]
ONE_SIDED = [name for name, cls in PROJECTORS.items() if "side" in {f.name for f in fields(cls)}]
# P'P = (c n / r) I in every draw: the least second moment that a law blind to the gradient can have
STIEFEL_CLASS = ["stiefel", "dependent", "coordinate", "srht"]  # dependent: until it has seen something

GOES_ON = [
    "power_iteration",
    "tracking",
    "walk",
    "jump",
]  # from the subspace before, and a gradient's at first

# E‖lift(project(G))‖² / (c² ‖G‖²), of the projected length n, the other length m and the rank r <= n
SECOND_MOMENT: dict[str, Callable[[int, int, int], float]] = {
    **{name: lambda n, m, r: n / r for name in STIEFEL_CLASS},
    "gaussian": lambda n, m, r: (n + r + 1) / r,
    "two_sided": lambda n, m, r: n / r * (m / min(r, m)),
    # a Gaussian law of length n / c and its own rank
    "viewed": lambda n, m, r: 1 + (n // gcd(16, n) + 1) / min(r, n // gcd(16, n)),
    "identity": lambda n, m, r: 1.0,
}


def make(name: str, **settings: Any) -> Any:
    """A projector of the registry, with those of the settings that it has."""
    known = {f.name for f in fields(PROJECTORS[name])}
    return PROJECTORS[name](**{key: value for key, value in settings.items() if key in known})


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def rotation(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(n, n, seed=seed))[0]


def assert_mean(
    samples: Tensor, expected: Tensor | float, sigmas: float = 5.0, rounding: float = 1e-9
) -> None:
    """The mean over the first axis lies within `sigmas` standard errors of `expected`, in every entry."""
    error = (samples.mean(0) - expected).abs()
    scale = samples.abs().mean() + torch.as_tensor(expected, dtype=F64).abs().max()
    allowed = sigmas * samples.std(0) / sqrt(len(samples)) + rounding * scale
    worst = float((error / allowed.clamp_min(1e-300)).max())
    assert worst <= 1, (
        f"off by {worst * sigmas:.1f} standard errors; mean {samples.mean(0)}, expected {expected}"
    )


@cache
def bases(projector: Any, n: int, count: int, spectrum: Spectrum | None = None) -> Tensor:
    """`(count, n, r)` independent bases of the input side."""
    drawn = [
        projector.draw((1, n), KEY.fold_in("basis", i), like=LIKE, spectrum=spectrum) for i in range(count)
    ]
    return torch.stack([subspace.basis for subspace in drawn])


def operators(basis: Tensor) -> Tensor:
    return basis @ basis.mT


def mixed(sigma: Tensor, rank: int, alpha: float) -> Tensor:
    """The probabilities that the dependent law draws with."""
    pi = inclusion_probabilities(sigma, rank)
    free = pi == 0
    pi = torch.where(free, (rank - pi.sum()) / free.sum().clamp_min(1), pi)
    return (1 - alpha) * pi + alpha * rank / len(sigma)


def spectrum_of(q: Tensor, sigma: Tensor, named: int) -> Spectrum:
    """`Q diag(sigma) Qᵀ` as an estimate of so many named pairs would hold it."""
    rest = float(sigma[named:].mean()) if named < len(sigma) else 0.0
    return Spectrum(q[:, :named], sigma[:named], rest)


def dense(spectrum: Spectrum) -> Tensor:
    n = spectrum.vectors.shape[0]
    return spectrum.vectors * (
        spectrum.values - spectrum.rest
    ) @ spectrum.vectors.T + spectrum.rest * torch.eye(n, dtype=F64)


# ---- P1: unbiased, with the second moment of the closed form ------------------------------------------------------------


def test_every_unbiased_projector_has_a_closed_form_here() -> None:
    assert sorted(SECOND_MOMENT) == sorted(UNBIASED), (
        "state E‖lift(project(G))‖² of a new projector in SECOND_MOMENT"
    )


def check_first_and_second_moment(projector: Any, name: str, shape: tuple[int, int], count: int) -> None:
    grad = random(*shape, seed=3)
    c = getattr(projector, "c", 1.0)
    lifted = []
    for i in range(count):
        subspace = projector.draw(shape, KEY.fold_in(i), like=LIKE, gradient=grad)
        lifted.append(subspace.lift(subspace.project(grad)))
    samples = torch.stack(lifted)
    assert_mean(samples, c * grad)
    side = getattr(projector, "side", "right")
    n = projected_length(side, shape)
    m = shape[0] + shape[1] - n
    rank = min(getattr(projector, "rank", n), n)
    energy = samples.square().sum((1, 2)) / grad.square().sum()
    assert_mean(energy, c**2 * SECOND_MOMENT[name](n, m, rank))
    error = (samples - grad).square().sum((1, 2)) / grad.square().sum()
    assert_mean(error, c**2 * SECOND_MOMENT[name](n, m, rank) - 2 * c + 1)


# n = 8 and 16 are powers of two, 12 and 5 are not (srht has two cases)
@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("shape", [(5, 12), (12, 8)], ids=str)
def test_lifting_a_projection_gives_the_gradient_on_average(name: str, shape: tuple[int, int]) -> None:
    check_first_and_second_moment(make(name, rank=3), name, shape, 300 if name == "srht" else 800)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize(
    ("shape", "side", "rank", "c"),
    [
        ((6, 16), "right", 4, 1.0),
        ((6, 16), "left", 4, 1.0),
        ((16, 5), "right", 2, 0.25),
        ((16, 5), "short", 1, 1.0),
        ((7, 7), "short", 5, 3.0),
        ((5, 12), "right", 4, 4 / 12),
    ],
)
def test_moments_hold_on_every_side_and_scale(
    name: str, shape: tuple[int, int], side: str, rank: int, c: float
) -> None:
    check_first_and_second_moment(
        make(name, rank=rank, side=side, c=c), name, shape, 600 if name == "srht" else 1500
    )


@pytest.mark.parametrize("name", [n for n in UNBIASED if "c" in {f.name for f in fields(PROJECTORS[n])}])
def test_c_scales_what_is_lifted(name: str) -> None:
    grad = random(6, 16, seed=3)
    for c in (0.25, 2.0):
        one, other = make(name, rank=4), make(name, rank=4, c=c)
        a, b = (p.draw((6, 16), KEY, like=LIKE) for p in (one, other))
        torch.testing.assert_close(
            b.lift(b.project(grad)), c * a.lift(a.project(grad)), rtol=1e-12, atol=1e-12
        )


def check_isotropy_and_kappa(name: str, n: int, r: int, count: int) -> None:
    p = operators(bases(make(name, rank=r), n, count))
    eye = torch.eye(n, dtype=F64)
    assert_mean(p, eye)
    assert_mean(p @ p, SECOND_MOMENT[name](n, 1, r) * eye)
    trace = (p @ p).diagonal(dim1=1, dim2=2).sum(1) / n
    assert_mean(trace, SECOND_MOMENT[name](n, 1, r))
    if name in STIEFEL_CLASS:
        assert float((trace - n / r).abs().max()) < 1e-10


ISOTROPIC = [name for name in ONE_SIDED if name in UNBIASED]


@pytest.mark.parametrize("name", ISOTROPIC)
def test_isotropy_and_kappa(name: str) -> None:
    """T2, T3: `E[P Pᵀ] = c I` and `E[(P Pᵀ)²] = c² kappa I`, entry by entry.

    With 9 of 16 rows, the last row of a cut Hadamard matrix is unlike the others.
    """
    check_isotropy_and_kappa(name, 9, 4, 300)


@pytest.mark.slow
@pytest.mark.parametrize("n", [16, 9])
@pytest.mark.parametrize("name", ISOTROPIC)
def test_isotropy_and_kappa_at_length(name: str, n: int) -> None:
    check_isotropy_and_kappa(name, n, 4, 2000 if name == "srht" else 12000)


def test_the_table_of_kappa() -> None:
    """Section 6 of the theory notes."""
    assert [SECOND_MOMENT["stiefel"](n, 1, r) for n, r in ((16, 4), (32, 8))] == [4.0, 4.0]
    assert [SECOND_MOMENT["gaussian"](n, 1, r) for n, r in ((16, 4), (32, 8))] == [5.25, 5.125]


# ---- exact scale and edges (T1, T24) -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STIEFEL_CLASS)
@pytest.mark.parametrize("n", [4096, 3000])  # a power of two or not
def test_the_stiefel_class_has_orthogonal_columns_of_one_length(name: str, n: int) -> None:
    like, r, c = torch.zeros(0), 64, 0.5
    basis = make(name, rank=r, c=c).draw((8, n), KEY, like=like).basis
    assert basis.dtype == torch.float32
    gram = basis.double().T @ basis.double() * r / (c * n)
    assert float((gram - torch.eye(r, dtype=F64)).abs().max()) < 1e-5


def test_a_gaussian_basis_has_orthogonal_columns_on_average_only() -> None:
    basis = make("gaussian", rank=64).draw((8, 4096), KEY, like=torch.zeros(0)).basis
    gram = basis.T @ basis * 64 / 4096
    assert float((gram - torch.eye(64)).abs().max()) > 0.02


def test_both_bases_of_two_sided_are_orthogonal() -> None:
    subspace = make("two_sided", rank=8, c=0.5).draw((300, 500), KEY, like=torch.zeros(0))
    assert isinstance(subspace, TwoSided)
    for basis, side, c in ((subspace.left, 300, 0.5), (subspace.right, 500, 1.0)):
        gram = basis.double().T @ basis.double() * 8 / (c * side)
        assert float((gram - torch.eye(8, dtype=F64)).abs().max()) < 1e-5


def test_a_learned_basis_has_orthogonal_columns() -> None:
    q = haar(512, 40, Key(1), torch.zeros(0))
    spectrum = Spectrum(q, torch.linspace(9, 1, 40, dtype=F64), 0.3)
    basis = Dependent(rank=32).draw((8, 512), KEY, like=torch.zeros(0), spectrum=spectrum).basis.double()
    lengths = basis.norm(dim=0)
    cosines = basis.T @ basis / lengths[:, None] / lengths
    assert float((cosines - torch.eye(32, dtype=F64)).abs().max()) < 1e-5


@pytest.mark.parametrize("name", [*STIEFEL_CLASS, "two_sided", "identity"])
@pytest.mark.parametrize("rank", [8, 9, 100])
@pytest.mark.parametrize("n", [8, 6])
def test_a_rank_as_large_as_the_side_loses_nothing(name: str, rank: int, n: int) -> None:
    grad = random(5, n, seed=3)
    subspace = make(name, rank=rank, c=1.0).draw((5, n), KEY, like=LIKE, gradient=grad)
    torch.testing.assert_close(subspace.lift(subspace.project(grad)), grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in PROJECTORS if n != "identity"])
def test_the_rank_is_capped_at_the_projected_length(name: str) -> None:
    for shape, rank in (((5, 8), 8), ((5, 8), 50), ((2, 8), 4), ((1, 8), 4), ((8, 1), 4)):
        subspace = make(name, rank=rank).draw(shape, KEY, like=LIKE, gradient=random(*shape))
        if isinstance(subspace, TwoSided):
            assert subspace.coords_shape == (min(rank, shape[0]), min(rank, shape[1]))
        elif isinstance(subspace, Viewed):
            length = shape[1] // subspace.parts
            assert subspace.coords_shape == (shape[0] * subspace.parts, min(rank, length))
        else:
            right = isinstance(subspace, Right)
            most = shape[1] if right else shape[0]
            if PROJECTORS[name].needs == "gradient":
                most = min(shape)  # no gradient has more directions
            assert subspace.coords_shape == (
                (shape[0], min(rank, most)) if right else (min(rank, most), shape[1])
            )


@pytest.mark.parametrize("name", PROJECTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_draw_has_the_dtype_asked_for(name: str, dtype: torch.dtype) -> None:
    like = torch.zeros(0, dtype=dtype)
    subspace = make(name, rank=3).draw((5, 12), KEY, like=like, gradient=random(5, 12).to(dtype))
    tensors = [t for t in subspace.tensors().values() if t.dim() == 2]
    assert all(t.dtype == dtype for t in tensors)


@pytest.mark.parametrize("name", [n for n in PROJECTORS if n != "identity"])
def test_a_setting_that_means_nothing_is_refused(name: str) -> None:
    known = {f.name for f in fields(PROJECTORS[name])}
    for settings in (
        {"rank": 0},
        {"rank": -1},
        {"rank": 2.5},
        {"rank": True},
        {"c": 0.0},
        {"c": -1.0},
        {"side": "up"},
    ):
        if set(settings) <= known:
            with pytest.raises(UsageError, match="use"):
                make(name, **settings)


def test_settings_of_the_dependent_law_are_checked() -> None:
    for settings in ({"alpha": 0.0}, {"alpha": 1.5}, {"rate": 0.0}, {"rate": 2.0}, {"named": 0}):
        with pytest.raises(UsageError):
            Dependent(**settings)  # type: ignore[arg-type]


def test_identity_keeps_the_gradient() -> None:
    for shape in ((4, 6), (5,), ()):
        subspace = PROJECTORS["identity"]().draw(shape, KEY, like=LIKE)
        assert isinstance(subspace, Full) and subspace.shape == shape
        grad = random(*shape)
        assert torch.equal(subspace.lift(subspace.project(grad)), grad) if shape else True


# ---- P2: a draw is a function of its arguments ----------------------------------------------------------------------------


def tensors(subspace: Subspace) -> list[Tensor]:
    return list(subspace.tensors().values())


def some_spectrum(n: int) -> Spectrum:
    q = haar(n, n // 4, Key(1), LIKE)
    return Spectrum(q, torch.linspace(9, 1, n // 4, dtype=F64), 0.3)


def equal(a: Subspace, b: Subspace) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", PROJECTORS)
def test_a_draw_depends_on_its_arguments_alone(name: str, learned: bool) -> None:
    projector, shape = make(name, rank=32), (130, 512)
    extra = {"spectrum": some_spectrum(512) if learned else None, "gradient": random(*shape)}
    if name in GOES_ON:  # from the gradient of the first window, which no key has a part in
        extra["previous"] = make("stiefel", rank=32, side="left").draw(shape, Key(2), like=torch.zeros(0))
    like = torch.zeros(0)

    def draw(key: Key) -> Subspace:
        return projector.draw(shape, key, like=like, **extra)

    before = torch.get_rng_state()
    with threads(1):
        first = draw(KEY.fold_in("subspace", 0, "w"))
    assert torch.equal(torch.get_rng_state(), before)
    for other in PROJECTORS:
        make(other, rank=3).draw((6, 9), KEY, like=like, gradient=random(6, 9))
    torch.manual_seed(5)
    with threads(2):
        assert equal(draw(KEY.fold_in("subspace", 0, "w")), first)
    torch.set_rng_state(before)
    if name != "identity" and projector.needs != "gradient":
        for key in (KEY.fold_in("subspace", 1, "w"), KEY.fold_in("subspace", 0, "v"), Key(0).fold_in("w")):
            assert not equal(draw(key), first)


def test_what_is_learned_does_not_depend_on_the_number_of_threads() -> None:
    dependent, n = Dependent(rank=64), 512

    def learned() -> Spectrum:
        spectrum = None
        for i in range(3):
            subspace = dependent.draw((64, n), KEY.fold_in(i), like=torch.zeros(0), spectrum=spectrum)
            grad = (Key(1).fold_in(i).normal((64, n)) * torch.linspace(3, 0.1, n)) @ subspace.basis
            spectrum = dependent.learn(
                spectrum, subspace, dependent.observe(subspace, None, grad), exact=True
            )
        assert spectrum is not None
        return spectrum

    with threads(1):
        one = learned()
    with threads(2):
        two = learned()
    assert (
        torch.equal(one.vectors, two.vectors) and torch.equal(one.values, two.values) and one.rest == two.rest
    )


@pytest.mark.parametrize("name", [n for n in UNBIASED if n not in ("identity", "coordinate")])
def test_draws_of_different_windows_and_weights_are_independent(name: str) -> None:
    """T23: `E‖UᵀU'‖² = r² / n`, and `E[UᵀU'] = 0` (raw coordinates of two windows share nothing)."""
    n, r, count = 16, 4, 300 if name == "srht" else 800
    projector = make(name, rank=r)

    def unit(i: int, weight: str) -> Tensor:
        subspace = projector.draw((16, n), KEY.fold_in("subspace", i, weight), like=LIKE)
        basis = subspace.right if isinstance(subspace, TwoSided) else subspace.basis
        return basis * sqrt(r / n)

    draws = torch.stack([unit(i, "w") for i in range(count)])
    others = torch.stack([unit(i, "v") for i in range(200)])
    for cross in (draws[1:].mT @ draws[:-1], draws[:200].mT @ others):
        assert_mean(cross, 0.0)
        if name in STIEFEL_CLASS:
            assert_mean(cross.square().sum((1, 2)), r**2 / n)


def test_the_two_bases_of_two_sided_are_independent() -> None:
    drawn = [make("two_sided", rank=3).draw((9, 9), KEY.fold_in(i), like=LIKE) for i in range(1000)]
    cross = torch.stack([s.left.T @ s.right for s in drawn]) / 3
    assert_mean(cross, 0.0)
    assert_mean(cross.square().sum((1, 2)), 9 / 9)


@pytest.mark.slow
def test_overlap_of_two_windows_at_the_published_size() -> None:
    q = torch.stack([haar(64, 8, KEY.fold_in(i), LIKE) for i in range(6000)])
    assert_mean((q[1::2].mT @ q[::2]).square().sum((1, 2)), 1.0)


# ---- svd: the best approximation of one gradient --------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left", "short"])
@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (6, 6)], ids=str)
def test_svd_keeps_the_leading_part_of_its_gradient(shape: tuple[int, int], side: str) -> None:
    grad = random(*shape, seed=3)
    values = torch.linalg.svdvals(grad)
    for rank in (1, 3, 50):
        subspace = make("svd", rank=rank, side=side).draw(shape, KEY, like=LIKE, gradient=grad)
        kept = subspace.lift(subspace.project(grad))
        rest = float((grad - kept).square().sum())
        assert rest == pytest.approx(float(values[rank:].square().sum()), abs=1e-10)
        basis = tensors(subspace)[0]
        torch.testing.assert_close(
            basis.T @ basis, torch.eye(basis.shape[1], dtype=F64), rtol=1e-12, atol=1e-12
        )
        assert basis.untyped_storage().nbytes() == basis.numel() * 8  # no view of the whole factor
    with pytest.raises(UsageError, match="'svd' needs a dense gradient"):
        make("svd").draw(shape, KEY, like=LIKE)


# ---- P3: transposes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_SIDED)
@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (16, 4), (6, 6), (1, 9), (9, 1)], ids=str)
def test_tall_and_wide_weights_are_transposes_of_each_other(name: str, shape: tuple[int, int]) -> None:
    grad = random(*shape, seed=3)
    for spectrum in (None, some_spectrum(12) if shape[1] == 12 else None):
        a = make(name, rank=3, side="right").draw(shape, KEY, like=LIKE, gradient=grad, spectrum=spectrum)
        b = make(name, rank=3, side="left").draw(
            shape[::-1], KEY, like=LIKE, gradient=grad.T, spectrum=spectrum
        )
        assert isinstance(a, Right) and isinstance(b, Left)
        assert torch.equal(a.basis, b.basis)
        torch.testing.assert_close(a.project(grad), b.project(grad.T).T, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            a.lift(a.project(grad)), b.lift(b.project(grad.T)).T, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("name", ONE_SIDED)
def test_the_short_side_is_the_shorter_one(name: str) -> None:
    projector = make(name, rank=3, side="short")
    grad = random(12, 5)
    tall, wide = (projector.draw(tuple(g.shape), KEY, like=LIKE, gradient=g) for g in (grad, grad.T))
    assert isinstance(tall, Right) and isinstance(wide, Left)
    assert torch.equal(tall.basis, wide.basis) and tall.basis.shape == (5, 3)
    assert is_right("short", (6, 6))


@pytest.mark.parametrize("name", ["two_sided", "identity"])
def test_projectors_without_a_side_have_the_same_law_on_the_transpose(name: str) -> None:
    check_first_and_second_moment(make(name, rank=3), name, (4, 9), 1000)
    check_first_and_second_moment(make(name, rank=3), name, (9, 4), 1000)


# ---- the Haar measure (T4) -------------------------------------------------------------------------------------------------


def haar_moments(q: Tensor) -> None:
    n, r = q.shape[1:]
    assert_mean(q, 0.0)
    assert_mean(q.pow(4).mean((1, 2)), 3 / (n * (n + 2)))
    squares = q.square()
    in_row = (squares.sum(2).square() - q.pow(4).sum(2)).mean(1) / (r * (r - 1))
    assert_mean(in_row, 1 / (n * (n + 2)))
    pairs = squares.sum((1, 2)).square()  # all pairs of entries: in a row, in a column, in neither
    same_row, same_column = squares.sum(2).square().sum(1), squares.sum(1).square().sum(1)
    neither = (pairs - same_row - same_column + q.pow(4).sum((1, 2))) / (n * (n - 1) * r * (r - 1))
    assert_mean(neither, (n + 1) / ((n - 1) * n * (n + 2)))
    crossed = torch.stack(
        [
            q[:, i, j] * q[:, i, k] * q[:, h, j] * q[:, h, k]
            for j in range(r)
            for k in range(j)
            for i in range(n)
            for h in range(i)
        ]
    ).mean(0)
    assert_mean(crossed, -1 / ((n - 1) * n * (n + 2)))
    a, b = random(n, seed=1), random(r, seed=2)
    along = torch.einsum("i,bij,j->b", a / a.norm(), q, b / b.norm())
    assert_mean(along.pow(4), 3 / (n * (n + 2)))
    assert_mean(along, 0.0)


def test_haar_has_the_moments_of_the_invariant_measure() -> None:
    haar_moments(torch.stack([haar(8, 3, KEY.fold_in(i), LIKE) for i in range(2000)]))


@pytest.mark.slow
def test_haar_has_the_moments_of_the_invariant_measure_at_length() -> None:
    haar_moments(torch.stack([haar(8, 3, KEY.fold_in("long", i), LIKE) for i in range(30000)]))


@pytest.mark.slow
def test_haar_is_invariant_under_rotations() -> None:
    q = torch.stack([haar(6, 2, KEY.fold_in(i), LIKE) for i in range(8000)])
    # the law of any one direction: its square is Beta(1/2, 5/2)
    for direction in rotation(6, seed=3).T:
        t = torch.einsum("i,bij->bj", direction, q).square()
        for power, expected in ((1, 1 / 6), (2, 3 / 48), (3, 15 / 480)):
            assert_mean(t.pow(power), expected)


def test_orthonormal_spans_what_it_was_given() -> None:
    matrix = random(9, 4)
    q = orthonormal(matrix)
    torch.testing.assert_close(q.T @ q, torch.eye(4, dtype=F64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(q @ (q.T @ matrix), matrix, rtol=1e-12, atol=1e-12)
    assert bool(
        (torch.linalg.inv(q.T @ matrix).diagonal() > 0).all()
    )  # the triangular factor has a positive diagonal


def test_hadamard_columns_are_those_of_sylvesters_matrix() -> None:
    h = torch.ones(1, 1)
    for _ in range(4):
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    columns = torch.tensor([3, 0, 15, 7])
    assert torch.equal(hadamard_columns(columns, 16), h[:, columns])
    assert torch.equal(hadamard_columns(columns, 11), h[:11, columns])


def test_srht_of_a_power_of_two_has_entries_of_one_size() -> None:
    basis = make("srht", rank=5).draw((3, 16), KEY, like=LIKE).basis
    torch.testing.assert_close(basis.abs(), torch.full((16, 5), sqrt(1 / 5), dtype=F64), rtol=1e-6, atol=0)


# ---- error of backprop in a subspace (T5, T6, numbers of section 6) ---------------------------------------------------------


class Noisy:
    """`G = M + E`, `E[EᵀE] = Sx`, with the traces of the theory notes' table; m = 6, n = 16."""

    m, n, r = 6, 16, 4
    mean = random(6, 16, seed=1) * torch.linspace(2, 0.3, 16, dtype=F64)
    mean = mean * sqrt(38.83) / mean.norm()
    root = rotation(16, seed=5) * torch.linspace(3, 0.1, 16, dtype=F64) @ rotation(16, seed=6)
    root = root * sqrt(16.69 / 6) / root.norm()  # rows of E: root.T z
    noise = 6 * root.T @ root
    sigma = mean.T @ mean + noise

    @classmethod
    def draw(cls, count: int) -> Tensor:
        return cls.mean + random(count, cls.m, cls.n, seed=8) @ cls.root

    @classmethod
    def spectrum(cls) -> Spectrum:
        values, vectors = torch.linalg.eigh(cls.sigma)
        return Spectrum(vectors.flip(1), values.flip(0), 0.0)


def optimal_phi(sigma: Tensor, rank: int) -> float:
    """The dual lower bound of `tr(Sigma E[P²])` at c = 1, with lambda by bisection."""
    root = sigma.clamp_min(0).sqrt()
    low, high = 0.0, float(root.sum())
    if int((root > 0).sum()) <= rank:
        return float(sigma.sum())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((root / middle).clamp_max(1).sum()) > rank else (low, middle)
    y = root.clamp_min(high)
    # sum of the squares of y times s, minus the r largest squares: see section 2.4
    return float((2 * y * root).sum() - y.square().sort(descending=True).values[:rank].sum())


def phi(name: str) -> float:
    sigma = Noisy.sigma
    if name == "dependent":
        return optimal_phi(torch.linalg.eigvalsh(sigma), Noisy.r)
    return SECOND_MOMENT[name](16, 6, 4) * float(sigma.trace())


def test_the_table_of_errors() -> None:
    """MSE(c) = c² Phi + (1 - 2c) ‖M‖² reproduces the table of section 6."""
    signal = float(Noisy.mean.square().sum())
    assert signal == pytest.approx(38.83) and float(Noisy.noise.trace()) == pytest.approx(16.69)
    for name, rows in {
        "stiefel": [(1.0, 183.24), (0.25, 33.294), (0.1748, 32.040)],
        "gaussian": [(1.0, 252.64), (0.25, 37.631), (0.1332, 33.656)],
    }.items():
        for c, error in rows:
            assert c**2 * phi(name) + (1 - 2 * c) * signal == pytest.approx(error, rel=1e-3)
        assert signal / phi(name) == pytest.approx(rows[-1][0], rel=1e-3)  # the best c


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stiefel", "coordinate", "gaussian", "srht", "dependent"])
def test_the_error_of_a_noisy_gradient_is_the_closed_form(name: str) -> None:
    count = 2000 if name == "srht" else 8000
    signal, best = float(Noisy.mean.square().sum()), float(Noisy.mean.square().sum()) / phi(name)
    gradients = Noisy.draw(count)
    errors = {}
    for c in (1.0, 0.25, best, 0.8 * best, 1.2 * best):
        projector = make(name, rank=4, c=1.0, alpha=1e-12)
        spectrum = Noisy.spectrum() if name == "dependent" else None
        basis = bases(projector, 16, count, spectrum_once(spectrum)) * sqrt(c)  # c scales: see above
        lifted = gradients @ basis @ basis.mT
        error = (lifted - Noisy.mean).square().sum((1, 2))
        assert_mean(error, c**2 * phi(name) + (1 - 2 * c) * signal)
        errors[c] = float(error.mean())
    assert errors[best] < min(errors[0.8 * best], errors[1.2 * best])  # T6


_kept: list[Spectrum] = []


def spectrum_once(spectrum: Spectrum | None) -> Spectrum | None:
    """One object for one spectrum, so that its bases are drawn once."""
    if spectrum is None:
        return None
    if not _kept:
        _kept.append(spectrum)
    return _kept[0]


# ---- water-filling and sampling (T7-T9) --------------------------------------------------------------------------------------

I12 = torch.arange(1, 13, dtype=F64)
# sigma, tau, largest probability before clipping, Phi of the dependent, stiefel and gaussian laws; n = 12, r = 4
SPECTRA: dict[str, tuple[Tensor, int, float, float, float, float]] = {
    "flat": (torch.ones(12, dtype=F64), 0, 0.333, 36.000, 36.0, 51.0),
    "1/i": (1 / I12, 0, 0.713, 7.871, 9.310, 13.189),
    "1/i²": (1 / I12**2, 1, 1.289, 2.4745, 4.695, 6.651),
    "0.3^i": (0.3 ** (I12 - 1), 2, 1.810, 1.5189, 4.286, 6.071),
    "100, 50, ones": (torch.tensor([100, 50] + [1] * 10, dtype=F64), 2, 1.478, 200.00, 480, 680),
    "3, 2, 1": (torch.tensor([3, 2, 1] + [0] * 9, dtype=F64), 3, 1.671, 6.000, 18.0, 25.5),
    "6 to 1": (torch.tensor([6, 5, 4, 3, 2, 1] + [0] * 6, dtype=F64), 0, 0.905, 29.332, 63.0, 89.25),
}
MORE_SPECTRA = {
    "ties": torch.tensor([4.0, 4, 4, 1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1], dtype=F64),
    "ties at the clip": torch.tensor([9.0, 9, 9, 9, 9] + [1e-4] * 7, dtype=F64),
    "as many as the rank": torch.tensor([5.0, 4, 3, 2] + [0] * 8, dtype=F64),
    "nothing": torch.zeros(12, dtype=F64),
    "far apart": 10.0**-I12,
    "one": torch.tensor([1.0] + [0] * 11, dtype=F64),
}
ALL_SPECTRA = {**{k: v[0] for k, v in SPECTRA.items()}, **MORE_SPECTRA}


@pytest.mark.parametrize("name", ALL_SPECTRA)
@pytest.mark.parametrize("rank", [1, 4, 11, 12])
def test_probabilities_fill_up_to_the_rank(name: str, rank: int) -> None:
    """T7: they sum to the rank, are proportional to the root of sigma below 1, and meet the optimality conditions."""
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    sigma = ALL_SPECTRA[name][shuffled]
    root, pi = sigma.sqrt(), inclusion_probabilities(sigma, rank)
    support = int((sigma > 0).sum())
    assert float(pi.sum()) == pytest.approx(min(rank, support), abs=1e-12)
    assert bool((pi >= 0).all() and (pi <= 1).all())
    assert bool((pi[sigma == 0] == 0).all() and (pi[sigma > 0] > 0).all())
    if support > rank:
        below = (pi < 1 - 1e-12) & (pi > 0)
        level = root[below] / pi[below]  # lambda
        torch.testing.assert_close(level, level[:1].expand_as(level), rtol=1e-12, atol=0)
        assert bool((root[~below & (pi > 0)] >= level[0] * (1 - 1e-12)).all())


@pytest.mark.parametrize("name", SPECTRA)
def test_the_table_of_spectra(name: str) -> None:
    sigma, tau, largest, inst, blind, gaussian = SPECTRA[name]
    pi = inclusion_probabilities(sigma, 4)
    assert int((pi > 1 - 1e-12).sum()) == tau
    assert float(4 * sigma.sqrt().max() / sigma.sqrt().sum()) == pytest.approx(largest, abs=6e-4)
    support = sigma > 0
    assert float((sigma[support] / pi[support]).sum()) == pytest.approx(inst, rel=2e-4)
    assert optimal_phi(sigma, 4) == pytest.approx(float((sigma[support] / pi[support]).sum()), rel=1e-9)
    assert SECOND_MOMENT["stiefel"](12, 1, 4) * float(sigma.sum()) == pytest.approx(blind, rel=2e-4)
    assert SECOND_MOMENT["gaussian"](12, 1, 4) * float(sigma.sum()) == pytest.approx(gaussian, rel=2e-4)


@pytest.mark.parametrize("name", ALL_SPECTRA)
def test_no_other_probabilities_do_better(name: str) -> None:
    sigma = ALL_SPECTRA[name]
    support = sigma > 0
    pi = inclusion_probabilities(sigma, 4)
    best = float((sigma[support] / pi[support]).sum())
    for seed in range(50):
        push = (random(12, seed=seed) * 0.1 * pi * (1 - pi))[support]
        other = (pi[support] + push - push.mean()).clamp(1e-9, 1)
        other = (other * pi.sum() / other.sum()).clamp_max(1)
        assert float((sigma[support] / other).sum()) >= best * (1 - 1e-9)


def test_order_does_not_matter_to_probabilities() -> None:
    sigma = ALL_SPECTRA["0.3^i"]
    assert torch.equal(inclusion_probabilities(sigma.flip(0), 4), inclusion_probabilities(sigma, 4).flip(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flat", "1/i²", "0.3^i", "6 to 1", "ties"])
def test_a_sample_has_a_fixed_size_and_the_probabilities_asked_for(name: str) -> None:
    """T8"""
    pi = inclusion_probabilities(ALL_SPECTRA[name], 4)
    count = 4000
    hits = torch.zeros(count, 12, dtype=F64)
    for i in range(count):
        drawn = sample(pi, KEY.fold_in(i))
        assert len(set(drawn.tolist())) == len(drawn) == 4
        hits[i, drawn] = 1
    assert_mean(hits, pi)


def test_a_sample_has_a_fixed_size() -> None:
    for n, r in ((12, 4), (200, 17), (5, 5), (3, 1), (1, 1)):
        for i in range(100):
            pi = inclusion_probabilities(random(n, seed=i).square(), r)
            drawn = sample(pi, KEY.fold_in(i))
            assert len(set(drawn.tolist())) == len(drawn) == r


def test_every_pair_can_be_drawn_together() -> None:
    """In fixed order systematic sampling never draws neighbors together: the order must be random."""
    pi = torch.full((6,), 2 / 6, dtype=F64)
    pairs = {tuple(sorted(sample(pi, KEY.fold_in(i)).tolist())) for i in range(400)}
    assert len(pairs) == 15


# ---- the dependent law ---------------------------------------------------------------------------------------------------------


def test_the_first_draw_of_the_dependent_law_is_stiefels() -> None:
    for shape, side in (((5, 12), "right"), ((12, 5), "left"), ((7, 7), "short")):
        a, b = (cls(rank=3, side=side, c=0.5).draw(shape, KEY, like=LIKE) for cls in (Dependent, Stiefel))
        assert equal(a, b)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_dependent_law_reaches_the_bound_in_every_draw(name: str) -> None:
    """T9: with `Sigma` known, `tr(Sigma P²)` is the dual bound itself, and never above Stiefel's."""
    sigma, q = SPECTRA[name][0], rotation(12, seed=4)
    full = q * sigma @ q.T
    bound = optimal_phi(sigma, 4)
    for i in range(30):
        basis = (
            Dependent(rank=4, alpha=1e-12)
            .draw((3, 12), KEY.fold_in(i), like=LIKE, spectrum=spectrum_of(q, sigma, 12))
            .basis
        )
        p = basis @ basis.T
        assert float((full @ p @ p).trace()) == pytest.approx(bound, rel=1e-8)
    assert bound <= SECOND_MOMENT["stiefel"](12, 1, 4) * float(sigma.sum()) * (1 + 1e-12)


def test_a_gradient_of_rank_at_most_r_loses_nothing() -> None:
    q = rotation(12, seed=4)
    sigma = torch.tensor([5.0, 3, 1] + [0] * 9, dtype=F64)
    grad = random(6, 3) @ q[:, :3].T
    subspace = Dependent(rank=4, alpha=1e-12).draw(
        (6, 12), KEY, like=LIKE, spectrum=spectrum_of(q, sigma, 12)
    )
    torch.testing.assert_close(subspace.lift(subspace.project(grad)), grad, rtol=1e-9, atol=1e-9)


def check_wrong_spectrum(named: int, side: Any, count: int) -> None:
    sigma = SPECTRA["0.3^i"][0].clone()
    sigma[7:] = 0
    wrong = spectrum_of(rotation(12, seed=9), sigma, named)
    dependent = Dependent(rank=4, alpha=0.2, c=0.5, side=side)
    shape = (3, 12) if side == "right" else (12, 3)
    grad = random(*shape, seed=3)
    lifted = []
    for i in range(count):
        subspace = dependent.draw(shape, KEY.fold_in(i), like=LIKE, spectrum=wrong)
        lifted.append(subspace.lift(subspace.project(grad)))
    assert_mean(torch.stack(lifted), 0.5 * grad)


@pytest.mark.parametrize("named", [12, 4], ids=["all", "hybrid"])
def test_a_wrong_spectrum_leaves_the_dependent_law_unbiased(named: int) -> None:
    """T10: also for gradients outside the range of the estimate."""
    check_wrong_spectrum(named, "right", 600)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("named", "side"),
    [(12, "right"), (4, "right"), (4, "left"), (2, "right")],
    ids=["all", "hybrid", "left", "few"],
)
def test_a_wrong_spectrum_leaves_the_dependent_law_unbiased_at_length(named: int, side: str) -> None:
    check_wrong_spectrum(named, side, 3000)


def test_the_price_of_mixing_is_as_stated() -> None:
    sigma = SPECTRA["0.3^i"][0]
    best = optimal_phi(sigma, 4)
    for alpha, price in ((0.05, 0.028), (0.2, 0.13), (0.5, 0.45)):
        assert float((sigma / mixed(sigma, 4, alpha)).sum()) / best - 1 == pytest.approx(price, abs=0.006)


@pytest.mark.slow
def test_the_hybrid_law_has_the_second_moment_of_its_formula() -> None:
    """k named pairs, the rest Haar at the mean eigenvalue: `sum_named sigma / pi + (tr Sigma - sum_named) / pi_rest`."""
    n, r, k, alpha = 24, 5, 4, 0.1
    sigma = torch.cat((torch.tensor([20.0, 12, 6, 5], dtype=F64), torch.linspace(2, 0.4, 20, dtype=F64)))
    q = rotation(n, seed=2)
    held = spectrum_of(q, sigma, k)
    known = torch.cat((sigma[:k], torch.full((n - k,), held.rest, dtype=F64)))
    pi = mixed(known, r, alpha)
    expected = float((sigma[:k] / pi[:k]).sum() + sigma[k:].sum() / pi[k])
    p = operators(bases(Dependent(rank=r, alpha=alpha), n, 4000, held))
    assert_mean(p, torch.eye(n, dtype=F64))
    assert_mean(torch.einsum("ij,bjk,bki->b", q * sigma @ q.T, p, p), expected)
    assert optimal_phi(sigma, r) < expected < n / r * float(sigma.sum())
    plain = mixed(known, r, 1e-12)
    assert float((sigma[:k] / plain[:k]).sum() + sigma[k:].sum() / plain[k]) < expected


# ---- learning the spectrum -------------------------------------------------------------------------------------------------------


def test_an_update_shows_what_was_seen_and_changes_nothing_orthogonal_to_it() -> None:
    q = rotation(9, seed=1)
    before = spectrum_of(q, torch.linspace(9, 5, 9, dtype=F64), 9)
    u = torch.linalg.qr(random(9, 3, seed=2))[0]
    moment = before.within(u) + 0.1 * torch.diag(torch.tensor([1.0, -1, 2], dtype=F64))
    after = before.updated(u, moment, named=9)
    torch.testing.assert_close(after.within(u), moment, rtol=1e-10, atol=1e-10)
    difference = dense(after) - dense(before)
    torch.testing.assert_close(u @ u.T @ difference @ u @ u.T, difference, rtol=1e-9, atol=1e-9)
    half = before.updated(u, moment, named=9, rate=0.5)
    torch.testing.assert_close(dense(half) - dense(before), 0.5 * difference, rtol=1e-9, atol=1e-9)


def test_an_update_without_news_changes_nothing() -> None:
    before = spectrum_of(rotation(9, seed=1), torch.linspace(9, 5, 9, dtype=F64), 4)
    u = torch.linalg.qr(random(9, 3, seed=2))[0]
    torch.testing.assert_close(
        dense(before.updated(u, before.within(u), named=4)), dense(before), rtol=1e-9, atol=1e-9
    )


def test_cutting_the_estimate_keeps_its_trace() -> None:
    before = spectrum_of(rotation(9, seed=1), torch.linspace(9, 5, 9, dtype=F64), 9)
    u = torch.linalg.qr(random(9, 3, seed=2))[0]
    for named in (1, 3, 8):
        after = before.updated(u, before.within(u), named=named)
        assert len(after.values) == named and after.vectors.shape == (9, named)
        assert float(dense(after).trace()) == pytest.approx(float(dense(before).trace()))
        torch.testing.assert_close(after.values, before.values[:named], rtol=1e-9, atol=1e-9)


def test_names_of_directions_that_are_as_the_rest_is_mean_nothing() -> None:
    """Whichever vectors rounding gave them, with either sign of all others, the same subspaces are drawn."""
    n, values = 9, torch.tensor([5.0, 3.0], dtype=F64)
    q = rotation(n, seed=1)
    other = torch.cat((q[:, :2], q[:, 2:] @ rotation(n - 2, seed=2)[:, :3]), dim=1)
    few = Spectrum(q[:, :2], values, 0.5)
    many = Spectrum(-other, torch.cat((values, torch.full((3,), 0.5, dtype=F64))), 0.5)
    for i in range(20):
        a, b = (
            Dependent(rank=3).draw((4, n), KEY.fold_in(i), like=LIKE, spectrum=held) for held in (few, many)
        )
        torch.testing.assert_close(a.basis, b.basis, rtol=0, atol=1e-12)  # type: ignore[attr-defined]
    u = torch.linalg.qr(random(n, 3, seed=2))[0]
    learned = [held.updated(u, torch.diag(torch.arange(1.0, 4).double()), 4) for held in (few, many)]
    torch.testing.assert_close(*map(dense, learned), rtol=1e-9, atol=1e-9)


def test_an_estimate_stays_positive() -> None:
    before = isotropic(6, 1.0, LIKE)
    u = torch.linalg.qr(random(6, 3, seed=2))[0]
    after = before.updated(u, torch.diag(torch.tensor([-5.0, 2, 0], dtype=F64)), named=6)
    assert bool((after.values >= 0).all()) and after.rest >= 0
    assert bool((after.values[:-1] >= after.values[1:]).all())


def test_an_update_contracts_the_error_at_the_rate_of_randomized_kaczmarz() -> None:
    """`E‖D - U Uᵀ D U Uᵀ‖² = ‖D‖² - (a + b) ‖D‖² - b tr(D)²` for Haar `U`, with a, b of section 2.3."""
    n, r = 8, 3
    a = r * (r * (n + 1) - 2) / (n * (n - 1) * (n + 2))
    b = r * (n - r) / (n * (n - 1) * (n + 2))
    q = rotation(n, seed=1)
    true = q * torch.linspace(12, 8, n, dtype=F64) @ q.T
    guess = isotropic(n, 9.0, LIKE)
    d = true - dense(guess)
    errors = []
    for i in range(1000):
        u = haar(n, r, KEY.fold_in(i), LIKE)
        errors.append((true - dense(guess.updated(u, u.T @ true @ u, named=n))).square().sum())
    assert_mean(torch.stack(errors), float((1 - a - b) * d.square().sum() - b * d.trace().square()))


def window(
    dependent: Dependent, grad: Tensor, i: int, spectrum: Spectrum | None, probes: int = 0, exact: bool = True
) -> Spectrum | None:
    """One window on the linear function with gradient `grad`: exact gradients, or so many probes."""
    subspace = dependent.draw(tuple(grad.shape), KEY.fold_in("window", i), like=LIKE, spectrum=spectrum)
    true = subspace.project(grad)
    if not probes:
        return dependent.learn(spectrum, subspace, dependent.observe(subspace, None, true), exact=exact)
    z = Probe(Layout([Space("z", (probes, *true.shape))]), "rademacher", KEY.fold_in(i))("z").double()
    seen = (z * true).sum((1, 2), keepdim=True) * z  # (probes, *coords_shape)
    squares = seen.mT @ seen if isinstance(subspace, Right) else seen @ seen.mT
    return dependent.learn(spectrum, subspace, Moments(seen.sum(0), squares.sum(0), probes), exact=exact)


def test_moments_add_up() -> None:
    dependent = Dependent(rank=3)
    grads = random(4, 5, 3, seed=1)
    for side, seen in (("right", grads), ("left", grads.mT)):
        subspace = replace(dependent, side=side).draw((5, 5), KEY, like=LIKE)
        moments = None
        for grad in seen:
            moments = dependent.observe(subspace, moments, grad)
        assert moments is not None and moments.count == 4
        torch.testing.assert_close(moments.total, seen.sum(0))
        torch.testing.assert_close(moments.squares, sum(g.T @ g for g in grads))


def steep_gradient(m: int, n: int) -> Tensor:
    """Singular values squared 0.3^i, the steep spectrum of section 6."""
    k = min(m, n)
    values = (0.3 ** torch.arange(k, dtype=F64)).sqrt()
    return rotation(m, seed=1)[:, :k] * values @ rotation(n, seed=2)[:, :k].T


def phi_under(spectrum: Spectrum, dependent: Dependent, true: Tensor) -> float:
    """`tr(Sigma E[P²])` of draws from an estimate, in closed form."""
    n, named = len(true), len(spectrum.values)
    sigma = torch.cat((spectrum.values, torch.full((n - named,), spectrum.rest, dtype=F64)))
    pi = mixed(sigma, dependent.rank, dependent.alpha)
    seen = (spectrum.vectors * (true @ spectrum.vectors)).sum(0)
    outside = float(true.trace() - seen.sum())
    return float((seen / pi[:named]).sum()) + (outside / float(pi[named]) if named < n else 0.0)


@pytest.mark.parametrize(("shape", "side"), [((12, 12), "right"), ((12, 15), "left"), ((14, 12), "short")])
def test_the_estimate_converges_to_the_second_moment_of_exact_gradients(
    shape: tuple[int, int], side: str
) -> None:
    grad = steep_gradient(*shape)
    true = grad.T @ grad if is_right(side, shape) else grad @ grad.T
    dependent = Dependent(
        rank=3, side=side, alpha=0.2, named=4, rate=1.0
    )  # 4 times the rank: every pair is named
    spectrum, errors = None, []
    for i in range(250):
        spectrum = window(dependent, grad, i, spectrum)
        assert spectrum is not None
        errors.append(float((dense(spectrum) - true).norm() / true.norm()))
    # an orthogonal projection onto the set that agrees with what was seen never moves away from the truth
    assert all(b <= a * (1 + 1e-9) + 1e-12 for a, b in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.02 * errors[0]
    best = float((torch.linalg.eigvalsh(true) / mixed(torch.linalg.eigvalsh(true), 3, 0.2)).sum())
    assert phi_under(spectrum, dependent, true) == pytest.approx(best, rel=0.03)


def gain(dependent: Dependent, spectrum: Spectrum, true: Tensor) -> float:
    """Share of what the known spectrum saves against stiefel that draws from the estimate save."""
    values = torch.linalg.eigvalsh(true)
    best = float((values / mixed(values, dependent.rank, dependent.alpha)).sum())
    blind = len(true) / dependent.rank * float(true.trace())
    return (blind - phi_under(spectrum, dependent, true)) / (blind - best)


def test_an_estimate_of_few_named_pairs_is_enough_on_a_steep_spectrum() -> None:
    grad = steep_gradient(10, 24)
    true = grad.T @ grad
    dependent, spectrum = Dependent(rank=4, alpha=0.1, named=2), None
    for i in range(100):
        spectrum = window(dependent, grad, i, spectrum)
    assert spectrum is not None and len(spectrum.values) == 8
    assert gain(dependent, spectrum, true) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "side"), [((6, 12), "right"), ((12, 6), "left")])
def test_the_estimate_converges_from_noisy_probes(shape: tuple[int, int], side: str) -> None:
    grad = steep_gradient(*shape)
    true = grad.T @ grad if side == "right" else grad @ grad.T
    dependent, spectrum, naive = Dependent(rank=3, side=side, alpha=0.2, rate=0.2), None, None
    for i in range(150):
        spectrum = window(dependent, grad, i, spectrum, probes=2000, exact=False)
        naive = window(dependent, grad, i, naive, probes=2000, exact=True)
    assert spectrum is not None and naive is not None
    assert gain(dependent, spectrum, true) > 0.9
    # taking the second moment of noisy probes at face value adds (coordinates) times the noise to every direction
    assert float(dense(naive).trace()) > 5 * float(true.trace())
    assert gain(dependent, naive, true) < 0.6


@pytest.mark.slow
def test_products_of_different_steps_estimate_the_second_moment_without_noise() -> None:
    """`E[(ΣgᵀΣg - Σ gᵀg) / (T (T - 1))] = (G P)ᵀ (G P)`; one update of a full subspace at rate 1 shows it."""
    grad = 2 * rotation(6)[:, :4]  # far enough from singular for a noisy moment to stay positive
    dependent = Dependent(rank=4, named=1, rate=1.0)
    estimates, at_face_value = [], []
    for i in range(500):
        for exact, into in ((False, estimates), (True, at_face_value)):
            if exact and i >= 50:
                continue
            spectrum = window(dependent, grad, i, None, probes=400, exact=exact)
            assert spectrum is not None
            into.append(dense(spectrum))
    assert_mean(torch.stack(estimates), grad.T @ grad)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_mean(torch.stack(at_face_value), grad.T @ grad)


def test_a_window_that_shows_nothing_leaves_the_estimate_alone() -> None:
    dependent = Dependent(rank=3)
    subspace = dependent.draw((5, 8), KEY, like=LIKE)
    before = isotropic(8, 1.0, LIKE)
    one = dependent.observe(subspace, None, random(5, 3))
    assert dependent.learn(before, subspace, one, exact=False) is before
    assert dependent.learn(None, subspace, one, exact=False) is None
    bad = dependent.observe(subspace, one, torch.full((5, 3), float("nan"), dtype=F64))
    assert dependent.learn(before, subspace, bad, exact=True) is before


def test_the_learned_block_undoes_the_lengths_of_the_basis() -> None:
    grad = random(5, 8, seed=3)
    for basis in (random(8, 3, seed=4), rotation(8)[:, :3] * torch.tensor([3.0, 1, 0.2], dtype=F64)):
        subspace = Right(basis, 5)
        dependent = Dependent(rank=3, rate=1.0)
        spectrum = dependent.learn(
            None, subspace, dependent.observe(subspace, None, grad @ basis), exact=True
        )
        assert spectrum is not None
        u = torch.linalg.qr(basis)[0]
        torch.testing.assert_close(spectrum.within(u), u.T @ grad.T @ grad @ u, rtol=1e-9, atol=1e-9)


def test_a_zero_gradient_leaves_a_law_that_still_draws() -> None:
    dependent, spectrum = Dependent(rank=3), None
    for i in range(3):
        spectrum = window(dependent, torch.zeros(5, 8, dtype=F64), i, spectrum)
    basis = dependent.draw((5, 8), KEY, like=LIKE, spectrum=spectrum).basis
    assert basis.shape == (8, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=F64) * 8 / 3, rtol=1e-9, atol=1e-9)


def test_registries_name_frozen_rules() -> None:
    for name, cls in PROJECTORS.items():
        projector = make(name, rank=3)
        assert projector == make(name, rank=3) and hash(projector) == hash(make(name, rank=3))
        assert cls.needs in ("nothing", "gradient", "spectrum")
        if "rank" in {f.name for f in fields(cls)}:
            assert replace(projector, rank=5).rank == 5


# ---- learning from inputs ---------------------------------------------------------------------------------------------


def test_a_sketch_of_inputs_has_their_trace_and_leading_eigenpairs() -> None:
    n, named = 24, 4
    scales = torch.tensor([6.0, 4.0, 2.5, 1.5] + [0.1] * (n - named), dtype=F64)
    x = random(400, n, seed=8) * scales @ rotation(n, 9).T + 0.5 * rotation(n, 9)[:, 7]
    sketch = Sketch(n, named + 8, KEY, torch.zeros(1))
    for part in x.view(4, 10, 10, n):
        sketch.add(part)
    found = sketch.spectrum(named)
    assert found is not None
    values, vectors = torch.linalg.eigh(x.mT @ x)
    torch.testing.assert_close(found.values, values.flip(0)[:named], rtol=1e-2, atol=0)
    overlap = (found.vectors.double().mT @ vectors.flip(1)[:, :named]).abs().diagonal()
    assert float(overlap.min()) > 0.999
    torch.testing.assert_close(
        float(found.values.sum()) + found.rest * (n - named), float(x.square().sum()), rtol=1e-5, atol=0
    )
    assert Sketch(n, 8, KEY, torch.zeros(1)).spectrum(named) is None
