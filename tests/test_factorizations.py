"""Singular vectors: against a singular value decomposition in float64, for every shape and dtype."""

import pytest
import torch
from torch import Tensor

from zolr.factorizations import leading, orthonormal, triples

SHAPES = [(24, 24), (40, 12), (12, 40), (1, 9), (9, 1), (1, 1)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """With singular values that fall by a third each, so that every vector is well defined."""
    numbers = torch.Generator().manual_seed(seed)
    left, _, right = torch.linalg.svd(
        torch.randn(shape, dtype=torch.float64, generator=numbers), full_matrices=False
    )
    return ((left * 1.5 ** -torch.arange(min(shape), dtype=torch.float64)) @ right).to(dtype)


def working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_triples_are_the_leading_ones(shape: tuple[int, int], dtype: torch.dtype):
    g = matrix(shape, dtype)
    rank = min(4, *shape)
    left, values, right = triples(g, rank)
    eps = torch.finfo(working(dtype)).eps
    u, s, vt = torch.linalg.svd(g.double(), full_matrices=False)
    assert {x.dtype for x in (left, values, right)} == {working(dtype)}
    assert all(x.is_contiguous() for x in (left, values, right))
    # each vector is known to eps of its matrix over the gap to the next value, here a third of the value itself
    torch.testing.assert_close(values.double(), s[:rank], rtol=8 * eps, atol=0)
    together = (left.double() * values.double()) @ right.double().mT
    torch.testing.assert_close(together, (u[:, :rank] * s[:rank]) @ vt[:rank], rtol=0, atol=8 * eps)
    for found, expected in ((left, u[:, :rank]), (right, vt[:rank].mT)):
        torch.testing.assert_close((found.double() * expected).sum(0).abs(), torch.ones(rank).double())
        torch.testing.assert_close(
            found.double(), expected * (found.double() * expected).sum(0).sign(), **near(eps)
        )
    alone = leading(g, rank)
    assert all(torch.equal(a, b) for a, b in zip(alone, (values, right), strict=True))


def near(eps: float) -> dict[str, float]:
    return {"rtol": 0.0, "atol": 64 * eps}


@pytest.mark.parametrize("rank", [1, 5, 12, 50])
def test_a_rank_is_capped_at_the_shorter_side(rank: int):
    for shape in ((40, 12), (12, 40)):
        for dtype in (torch.float32, torch.float64):
            left, values, right = triples(matrix(shape, dtype), rank)
            r = min(rank, 12)
            assert left.shape == (shape[0], r) and values.shape == (r,) and right.shape == (shape[1], r)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
@pytest.mark.parametrize("known", [0, 1, 3])
def test_where_a_gradient_has_fewer_directions_the_others_are_orthonormal(
    known: int, shape: tuple[int, int], dtype: torch.dtype
):
    g = torch.zeros(shape, dtype=dtype)
    for i in range(known):
        g[2 * i + 1, 3 * i] = 2.0 + i
    left, values, right = triples(g, 6)
    for side in (left, right):
        torch.testing.assert_close(side.mT @ side, torch.eye(6), rtol=0, atol=1e-6)
    assert (values[known:] == 0).all() and sorted(values[:known]) == [2.0 + i for i in range(known)]
    torch.testing.assert_close((left * values) @ right.mT, g.float())


def test_small_directions_are_found_beside_large_ones():
    # what a float32 decomposition loses: directions 1e-5 of the largest, whose squares are 1e-10
    numbers = torch.Generator().manual_seed(1)
    u = orthonormal(torch.randn(60, 4, dtype=torch.float64, generator=numbers))
    v = orthonormal(torch.randn(50, 4, dtype=torch.float64, generator=numbers))
    g = ((u * torch.tensor([1.0, 1e-1, 1e-3, 1e-5])) @ v.mT).float()
    exact = torch.linalg.svd(g.double(), full_matrices=False)[2][:4]
    plain = torch.linalg.svd(g, full_matrices=False)[2][:4]

    def off(found: Tensor) -> Tensor:
        return 1 - (found.double() * exact).sum(1).abs()

    assert off(leading(g, 4)[1].mT).max() < 1e-7
    assert off(leading(g, 4)[1].mT).max() <= off(plain).max()


def test_blocks_give_the_whole(monkeypatch: pytest.MonkeyPatch):
    g = matrix((40, 12), torch.float32)
    whole = triples(g, 5)
    monkeypatch.setattr("zolr.factorizations._BLOCK", 12 * 7)
    for found, expected in zip(triples(g, 5), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_the_number_of_threads_changes_no_bit():
    before = torch.get_num_threads()
    g, tall = matrix((200, 150), torch.float32), torch.randn(300, 80)
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append([*triples(g, 20), orthonormal(tall)])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_numbers_that_are_not_finite_are_refused():
    g = torch.ones(6, 4)
    g[2, 1] = float("nan")
    with pytest.raises(RuntimeError):
        leading(g, 2)
