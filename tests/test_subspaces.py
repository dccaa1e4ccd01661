"""Laws of the linear maps between a weight and its coordinates (S1-S3), for every kind of subspace."""

import dataclasses
from collections.abc import Callable
from math import sqrt

import pytest
import torch
from torch import Tensor

from zolr.subspaces import BLOCK, Coded, Full, Left, Right, Subspace, TwoSided, Viewed, rebuild

F64 = torch.float64
# rounding of the longest chain below (a solve of an 8 by 8 Gram matrix) is within 1e3 units of the last place
EXACT = {"rtol": 1e-11, "atol": 1e-11}

SHAPES = {"tall": (9, 5), "wide": (5, 9), "square": (6, 6), "row": (1, 7), "column": (7, 1)}
RANKS = (1, 3, 8)  # 8 is beyond every side but 9: more directions than the side has axes


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed + 1000 * len(shape)))


def orthonormal(*shape: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(*shape, seed=seed))[0]


# bases are neither orthogonal nor of equal lengths: a law that holds here holds for every projector
KINDS: dict[str, Callable[[int, int, int, int], Subspace]] = {
    "full": lambda m, n, r, seed: Full((m, n)),
    "right": lambda m, n, r, seed: Right(random(n, r, seed=seed), m),
    "left": lambda m, n, r, seed: Left(random(m, r, seed=seed), n),
    "two_sided": lambda m, n, r, seed: TwoSided(random(m, r, seed=seed), random(n, r + 1, seed=seed + 1)),
    "viewed": lambda m, n, r, seed: viewed(m, n, max(1, r // 2), seed),
    "coded, input side": lambda m, n, r, seed: Coded.of(Right(random(n, r, seed=seed), m), 4),
    "coded, output side": lambda m, n, r, seed: Coded.of(Left(random(m, r, seed=seed), n), 8),
}


def viewed(m: int, n: int, r: int, seed: int) -> Viewed:
    """Rows in two or three parts where their length allows it."""
    parts = next((c for c in (2, 3) if n % c == 0), 1)
    return Viewed(random(n // parts, r, seed=seed), m, parts)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    return SHAPES[request.param]


@pytest.fixture(params=RANKS)
def subspace(request: pytest.FixtureRequest, kind: str, shape: tuple[int, int]) -> Subspace:
    return KINDS[kind](*shape, request.param, 3)


def coords_of(subspace: Subspace, seed: int = 7) -> Tensor:
    return random(*subspace.coords_shape, seed=seed)


# ---- S1, S2 -----------------------------------------------------------------------------------------------------------


def test_lift_is_the_adjoint_of_project(subspace: Subspace, shape: tuple[int, int]) -> None:
    grad, coords = random(*shape, seed=5), coords_of(subspace)
    assert subspace.shape == shape
    assert subspace.project(grad).shape == subspace.coords_shape
    assert subspace.lift(coords).shape == shape
    torch.testing.assert_close(
        (subspace.project(grad) * coords).sum(), (grad * subspace.lift(coords)).sum(), **EXACT
    )


def test_project_is_the_gradient_of_the_lifted_function(subspace: Subspace, shape: tuple[int, int]) -> None:
    weight, coords = random(*shape, seed=5), coords_of(subspace).requires_grad_()
    moved = weight + subspace.lift(coords)
    moved.sin().sum().backward()
    assert coords.grad is not None
    torch.testing.assert_close(coords.grad, subspace.project(moved.detach().cos()), **EXACT)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3)])
def test_apply_equals_the_product_with_the_lifted_weight(
    subspace: Subspace, shape: tuple[int, int], leading: tuple[int, ...]
) -> None:
    x, coords = random(*leading, shape[1], seed=9), coords_of(subspace)
    out = subspace.apply(x, coords)
    assert out.shape == (*leading, shape[0])
    torch.testing.assert_close(out, x @ subspace.lift(coords).T, **EXACT)


def test_factors_multiply_to_apply(subspace: Subspace, shape: tuple[int, int]) -> None:
    x, coords = random(4, shape[1], seed=9), coords_of(subspace)
    factors = subspace.factors(x, coords)
    if isinstance(subspace, Full):
        assert factors is None
        return
    assert factors is not None
    a, b = factors
    assert a.shape[1] == b.shape[0] <= max(subspace.coords_shape) and b.shape[1] == shape[0]
    torch.testing.assert_close(a @ b, subspace.apply(x, coords), **EXACT)


def test_the_dual_gives_the_orthogonal_projection_on_the_span(
    subspace: Subspace, shape: tuple[int, int]
) -> None:
    """Idempotent, self-adjoint, nothing left for `project`, and all that `lift` reaches stays."""

    def span(grad: Tensor) -> Tensor:
        return subspace.lift(subspace.dual(subspace.project(grad)))

    loose = {
        "rtol": 1e-8,
        "atol": 1e-8,
    }  # a pseudo-inverse of a Gram matrix, whose condition is that of the basis squared
    a, b = random(*shape, seed=5), random(*shape, seed=6)
    torch.testing.assert_close(span(span(a)), span(a), **loose)
    torch.testing.assert_close((span(a) * b).sum(), (a * span(b)).sum(), **loose)
    torch.testing.assert_close(
        subspace.project(a - span(a)), torch.zeros(subspace.coords_shape, dtype=F64), **loose
    )
    lifted = subspace.lift(coords_of(subspace))
    torch.testing.assert_close(span(lifted), lifted, **loose)


def test_the_dual_of_an_orthonormal_basis_is_the_coordinates() -> None:
    for subspace in (Right(orthonormal(9, 3), 5), Left(orthonormal(9, 3), 5)):
        coords = coords_of(subspace)
        torch.testing.assert_close(subspace.dual(coords), coords, **EXACT)
        half = dataclasses.replace(subspace, basis=subspace.basis.bfloat16())
        assert half.dual(coords.bfloat16()).dtype == torch.bfloat16


def test_lift_is_linear(subspace: Subspace) -> None:
    a, b = coords_of(subspace, 1), coords_of(subspace, 2)
    torch.testing.assert_close(subspace.lift(2.5 * a - b), 2.5 * subspace.lift(a) - subspace.lift(b), **EXACT)


def test_lifted_rows_are_rows_of_the_lifted(subspace: Subspace, shape: tuple[int, int]) -> None:
    coords = coords_of(subspace)
    whole = subspace.lift(coords)
    m = shape[0]
    for rows in (slice(None), slice(0, 1), slice(m // 2, m), slice(-1, None), slice(0, 0), slice(0, m, 2)):
        torch.testing.assert_close(subspace.lift(coords, rows), whole[rows], **EXACT)
    for index in ([0], [m - 1, 0, 0, m // 2], []):
        rows = torch.tensor(index, dtype=torch.long)
        torch.testing.assert_close(subspace.lift(coords, rows), whole[rows], **EXACT)


def test_a_kind_computes_in_the_dtype_it_is_given(kind: str) -> None:
    kinds = {name: getattr(KINDS[kind](5, 7, 2, 0), name) for name in KINDS[kind](5, 7, 2, 0).tensors()}
    small = {
        k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else torch.as_tensor(v)
        for k, v in kinds.items()
    }
    subspace = rebuild(type(KINDS[kind](5, 7, 2, 0)).__name__, small)
    coords = coords_of(subspace).bfloat16()
    assert subspace.lift(coords).dtype == torch.bfloat16
    assert subspace.apply(random(3, 7).bfloat16(), coords).dtype == torch.bfloat16


def test_the_side_path_has_no_tensor_of_the_weights_size(kind: str) -> None:
    if kind == "full":
        return
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                Largest.size = max(Largest.size, out.numel())
            return out

    subspace = KINDS[kind](40, 50, 2, 0)
    x, coords = random(3, 50), coords_of(subspace)
    with Largest():
        subspace.apply(x, coords)
        subspace.factors(x, coords)
    assert 0 < Largest.size <= (BLOCK if isinstance(subspace, Coded) else 150)


# ---- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_codes_are_nearest_in_blocks_of_their_own_scale_and_small(bits: int, dtype: torch.dtype) -> None:
    basis = random(100, 7, seed=1)
    basis[40:80] *= 100  # blocks of their own scale
    basis[90:] = 0
    basis = basis.to(dtype)
    coded = Coded.of(Right(basis, 9), bits)
    flat = basis.flatten().double()
    for start in range(0, 700, BLOCK):
        part = flat[start : start + BLOCK]
        step = float(part.clamp_min(0).max() - part.clamp_max(0).min()) / (2**bits - 1)
        error = (coded.basis.flatten().double()[start : start + BLOCK] - part).abs().max()
        assert float(error) <= step / 2 + 8 * torch.finfo(dtype).eps * float(part.abs().max())
    assert not coded.basis[90:].any() and coded.basis.dtype == dtype  # zero has a code of its own
    held = sum(t.numel() * t.element_size() for t in (coded.codes, coded.step, coded.zero))
    assert held == 3 * (BLOCK * bits // 8 + basis.element_size() + 1)
    torch.testing.assert_close(Coded.of(Right(coded.basis, 9), bits).basis, coded.basis, rtol=2e-2, atol=0)
    empty = Coded.of(Left(torch.zeros(4, 2, dtype=dtype), 3), bits)
    assert not empty.basis.any() and empty.shape == (4, 3)


# ---- S3: changing the basis -------------------------------------------------------------------------------------------


def on_each_side(kind: str, left: Tensor, right: Tensor, old: Subspace) -> Subspace:
    """The subspace whose bases are those of `old` times `left` and `right`."""
    if isinstance(old, Right):
        return Right(old.basis @ right, old.m)
    if isinstance(old, Left):
        return Left(old.basis @ left, old.n)
    assert isinstance(old, TwoSided)
    return TwoSided(old.left @ left, old.right @ right)


def orthogonal_kind(kind: str, m: int, n: int, r: int, seed: int) -> Subspace:
    """Orthogonal columns of one length, as the Stiefel class of projectors draws them."""
    if kind == "right":
        return Right(orthonormal(n, r, seed=seed) * sqrt(n / r), m)
    if kind == "left":
        return Left(orthonormal(m, r, seed=seed) * sqrt(m / r), n)
    return TwoSided(
        orthonormal(m, r, seed=seed) * sqrt(m / r), orthonormal(n, r, seed=seed + 1) * sqrt(n / r)
    )


NARROW = ("right", "left", "two_sided")


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_change_to_the_same_subspace_changes_nothing(kind: str, shape: tuple[int, int], rank: int) -> None:
    rank = min(rank, *shape) - (kind == "two_sided" and rank >= min(shape) > 1)
    for old in (KINDS[kind](*shape, rank, 3), orthogonal_kind(kind, *shape, rank, 3)):
        if min(t.shape[0] - t.shape[1] for t in old.tensors().values() if t.dim() == 2) < 0:
            continue  # dependent columns: coordinates are not unique
        change = old.change_from(old)
        assert change is not None
        coords = coords_of(old)
        torch.testing.assert_close(change.coords(coords), coords, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(change.squares(coords.square()), coords.square(), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(change.variances(coords.square()), coords.square(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", NARROW)
def test_another_basis_of_the_same_span_lifts_to_the_same(kind: str) -> None:
    for seed in range(5):
        old = KINDS[kind](9, 7, 3, seed)
        for left, right in (
            (
                orthonormal(3, 3, seed=1),
                orthonormal(4, 4, seed=2) if kind == "two_sided" else orthonormal(3, 3),
            ),
            (torch.diag(torch.tensor([0.5, 2, -3], dtype=F64)),) * 2,
            (random(3, 3, seed=4),) * 2,
            (torch.eye(3, dtype=F64)[[2, 0, 1]],) * 2,
        ):
            if kind == "two_sided" and right.shape[0] == 3:
                right = torch.block_diag(right, torch.tensor([[2.0]], dtype=F64))
            new = on_each_side(kind, left, right, old)
            change = new.change_from(old)
            assert change is not None
            coords = coords_of(old)
            torch.testing.assert_close(
                new.lift(change.coords(coords)), old.lift(coords), rtol=1e-8, atol=1e-8
            )


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("ranks", [(3, 3), (2, 4), (4, 2), (4, 1)])
def test_a_change_is_the_orthogonal_projection(kind: str, ranks: tuple[int, int]) -> None:
    old, new = KINDS[kind](9, 7, ranks[0], 3), KINDS[kind](9, 7, ranks[1], 40)
    change = new.change_from(old)
    assert change is not None
    lifted = old.lift(coords_of(old))
    expected = lifted
    if isinstance(new, Right | TwoSided):
        basis = new.basis if isinstance(new, Right) else new.right
        expected = expected @ basis @ torch.linalg.pinv(basis)
    if isinstance(new, Left | TwoSided):
        basis = new.basis if isinstance(new, Left) else new.left
        expected = basis @ torch.linalg.pinv(basis) @ expected
    torch.testing.assert_close(new.lift(change.coords(coords_of(old))), expected, rtol=1e-8, atol=1e-8)


def test_a_change_to_dependent_directions_is_still_a_projection() -> None:
    # a padding row is cut out of a basis of rows, and a weak spectrum gives fewer directions than the rank
    column = random(7, 1, seed=3)
    for basis in (torch.cat((column, column), 1), torch.cat((column, torch.zeros(7, 1, dtype=F64)), 1)):
        old, new = Right(random(7, 2, seed=1), 4), Right(basis, 4)
        change = new.change_from(old)
        assert change is not None
        expected = old.lift(coords_of(old)) @ basis @ torch.linalg.pinv(basis)
        torch.testing.assert_close(new.lift(change.coords(coords_of(old))), expected, rtol=1e-7, atol=1e-7)
        assert bool(torch.isfinite(change.squares(coords_of(old).square())).all())
        back = old.change_from(new)
        assert back is not None
        assert bool(torch.isfinite(back.squares(coords_of(new).square())).all())


@pytest.mark.parametrize("kind", NARROW)
def test_second_moments_turn_with_a_rotation(kind: str) -> None:
    """`v -> v (R o R)`, exact for independent coordinates of mean zero."""
    old = orthogonal_kind(kind, 9, 7, 3, 3)
    left, right = orthonormal(3, 3, seed=1), orthonormal(3, 3, seed=2)
    change = on_each_side(kind, left, right, old).change_from(old)
    assert change is not None
    squares = coords_of(old).square()
    expected = squares
    if kind != "left":
        expected = expected @ right.square()
    if kind != "right":
        expected = left.square().T @ expected
    torch.testing.assert_close(change.squares(squares), expected, **EXACT)


@pytest.mark.parametrize("kind", NARROW)
def test_second_moments_of_gradients_scale_with_the_square_of_the_basis(kind: str) -> None:
    for old in (orthogonal_kind(kind, 9, 7, 3, 3), KINDS[kind](9, 7, 3, 3)):
        sizes = torch.tensor([0.5, 2, 3], dtype=F64)
        more = torch.tensor([0.5, 2, 3, 1], dtype=F64)
        scale = (
            torch.diag(sizes),
            torch.diag(more if isinstance(old, TwoSided) and old.right.shape[1] == 4 else sizes),
        )
        new = on_each_side(kind, *scale, old)
        change = new.change_from(old)
        assert change is not None
        grad = random(9, 7, seed=5)  # one gradient: its second moment is its square
        torch.testing.assert_close(
            change.squares(old.project(grad).square()), new.project(grad).square(), rtol=1e-8, atol=1e-8
        )


@pytest.mark.parametrize("kind", NARROW)
def test_first_and_second_moments_of_gradients_scale_alike(kind: str) -> None:
    """A gradient seen in a longer basis is longer; Adam's `m / sqrt(v)` must not notice."""
    old = orthogonal_kind(kind, 9, 7, 3, 3)
    scale = torch.diag(torch.tensor([0.5, 2, 3], dtype=F64))
    new = on_each_side(kind, scale, scale, old)
    change = new.change_from(old)
    assert change is not None
    grad = random(9, 7, seed=5)
    torch.testing.assert_close(change.gradients(old.project(grad)), new.project(grad), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", NARROW)
def test_second_moments_keep_their_mass_between_unrelated_subspaces(kind: str) -> None:
    """Each new axis takes an average: plain squaring would leave the share r / n."""
    old, new = orthogonal_kind(kind, 90, 70, 3, 3), orthogonal_kind(kind, 90, 70, 3, 50)
    change = new.change_from(old)
    assert change is not None
    squares = torch.full(old.coords_shape, 2.5, dtype=F64)
    torch.testing.assert_close(change.squares(squares), squares, **EXACT)
    varied = coords_of(old).square()
    assert bool((change.squares(varied) >= 0).all())
    assert float(change.squares(varied).max()) <= float(varied.max()) * (1 + 1e-12)


def test_second_moments_reach_directions_orthogonal_to_all_old_ones() -> None:
    q = orthonormal(8, 6, seed=1)
    old, new = Right(q[:, :3], 4), Right(q[:, 3:], 4)
    change = new.change_from(old)
    assert change is not None
    squares = coords_of(old).square()
    torch.testing.assert_close(change.squares(squares), squares.mean(1, keepdim=True).expand(4, 3), **EXACT)
    assert float(change.coords(coords_of(old)).abs().max()) < 1e-12


def test_a_view_changes_as_its_basis_does() -> None:
    old = viewed(4, 15, 3, 1)
    assert old.parts == 3 and old.coords_shape == (12, 3)
    turned = Viewed(old.basis @ random(3, 3, seed=4), 4, 3)
    change = turned.change_from(old)
    assert change is not None
    coords = coords_of(old)
    torch.testing.assert_close(turned.lift(change.coords(coords)), old.lift(coords), rtol=1e-8, atol=1e-8)
    grad = old.lift(coords)  # inside the old span
    torch.testing.assert_close(
        change.gradients(old.project(grad)), turned.project(grad), rtol=1e-8, atol=1e-8
    )
    other = viewed(4, 15, 2, 9)
    change = other.change_from(old)
    assert change is not None
    inner = other.basis @ torch.linalg.pinv(other.basis)  # (5, 5)
    expected = (grad.reshape(12, 5) @ inner).reshape(4, 15)
    torch.testing.assert_close(other.lift(change.coords(coords)), expected, rtol=1e-8, atol=1e-8)
    assert Viewed(random(3, 3), 4, 5).change_from(old) is None  # other parts


@pytest.mark.parametrize("kind", ["right", "left", "two_sided", "viewed"])
def test_what_is_lifted_is_met_again_by_the_new_basis(kind: str) -> None:
    old, new = KINDS[kind](6, 8, 4, 3), KINDS[kind](6, 8, 2, 40)
    change = new.change_from(old)
    assert change is not None
    coords = coords_of(old)
    torch.testing.assert_close(change.lifted(coords), new.project(old.lift(coords)), **EXACT)


def test_full_changes_into_itself_alone() -> None:
    change = Full((4, 3)).change_from(Full((4, 3)))
    assert change is not None
    coords = random(4, 3)
    assert torch.equal(change.coords(coords), coords)
    assert torch.equal(change.squares(coords), coords)
    assert torch.equal(change.variances(coords), coords)
    assert Full((4, 3)).change_from(Full((3, 4))) is None


def test_subspaces_of_other_kinds_or_weights_have_no_common_coordinates() -> None:
    subspaces = [make(6, 6, 2, 0) for make in KINDS.values()]
    for new in subspaces:
        for old in subspaces:
            assert (new.change_from(old) is None) == ((type(new), new.channel) != (type(old), old.channel))
    for make in KINDS.values():
        assert make(6, 5, 2, 0).change_from(make(7, 5, 2, 0)) is None


# ---- rebuilding -------------------------------------------------------------------------------------------------------


def test_a_subspace_is_rebuilt_from_its_tensors(subspace: Subspace, shape: tuple[int, int]) -> None:
    copy = rebuild(type(subspace).__name__, {k: v.clone() for k, v in subspace.tensors().items()})
    assert type(copy) is type(subspace)
    assert copy.shape == subspace.shape and copy.coords_shape == subspace.coords_shape
    coords, grad = coords_of(subspace), random(*shape, seed=5)
    assert torch.equal(copy.lift(coords), subspace.lift(coords))
    assert torch.equal(copy.project(grad), subspace.project(grad))


@pytest.mark.parametrize("size", [(), (5,), (2, 3, 4)])
def test_a_full_space_has_any_number_of_axes(size: tuple[int, ...]) -> None:
    full = Full(size)
    assert full.shape == full.coords_shape == size
    copy = rebuild("Full", full.tensors())
    assert isinstance(copy, Full) and copy.size == size


def test_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Diagonal.*Full, Right, Left, TwoSided, Viewed or Coded"):
        rebuild("Diagonal", {})


def test_subspaces_are_frozen(kind: str) -> None:
    subspace = KINDS[kind](4, 3, 2, 0)
    field = dataclasses.fields(subspace)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(subspace, field, None)
