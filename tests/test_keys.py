"""Laws of names and draws: Philox, purity (P2), fairness, and the laws that probes follow."""

import random
from collections.abc import Callable
from itertools import product
from math import sqrt

import pytest
import torch
from conftest import threads
from torch import Tensor

import zolr.probes
from zolr.errors import UsageError
from zolr.keys import Key, name_hash, philox
from zolr.probes import LAWS, Layout, Probe, Space, counters, orthonormal, row_blocks

HOST = torch.device("cpu")
SPACES = (Space("a", (3, 4)), Space("b", (7,)), Space("c", (5, 9)))


def assert_mean(samples: Tensor, expected: Tensor | float, sigmas: float = 5.0) -> None:
    """The mean over the first axis lies within `sigmas` standard errors of `expected`, in every entry."""
    samples = samples.double()
    error = (samples.mean(0) - expected).abs()
    allowed = sigmas * samples.std(0) / sqrt(len(samples)) + 1e-6  # draws are float32
    worst = float((error / allowed).max())
    assert worst <= 1, f"off by {worst * sigmas:.1f} standard errors"


# ---- Philox and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox(torch.tensor([counter]), key[0] | key[1] << 32).tolist() == [list(words)]


def test_philox_of_many_counters_is_philox_of_each() -> None:
    many = torch.randint(0, 1 << 32, (50, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(philox(many, 12345), torch.cat([philox(one[None], 12345) for one in many]))


def test_philox_equals_integer_arithmetic_of_python() -> None:
    def reference(counter: list[int], key: int) -> list[int]:
        c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    draw = random.Random(1)
    inputs = [[draw.getrandbits(32) for _ in range(4)] for _ in range(200)]
    for key in (0, 1, (1 << 64) - 1, draw.getrandbits(64)):
        assert philox(torch.tensor(inputs), key).tolist() == [reference(c, key) for c in inputs]


def test_names_are_pinned() -> None:
    # runs are replayed from their seed on other machines and by later versions: these numbers must never change
    assert name_hash("model.layers.0.weight") == 0x1BBECF2814E0CD9A
    assert Key(0).fold_in("step", 3).fold_in("probe", 0).integer() == 0xC13DD3A1840D6B96
    signs = Key(7).fold_in("step", 1).signs(counters("w", 0, 32, HOST))[:32]
    assert int("".join("1" if s > 0 else "0" for s in signs.tolist()), 2) == 0xB3A2D2EE
    expected = torch.tensor([0.7220148, 0.6188258, 0.1341260])
    # the host's logarithm and cosine may differ in the last bit from machine to machine
    assert torch.allclose(
        Key(7).fold_in("subspace", 0, "w").normal((4, 5)).flatten()[:3], expected, rtol=1e-5
    )


def test_folding_in_step_by_step_equals_folding_in_at_once() -> None:
    assert Key(3).fold_in("a").fold_in(1, "b") == Key(3).fold_in("a", 1, "b")
    assert Key(3).fold_in("a").fold_in(1, "b").integer() == Key(3).fold_in("a", 1, "b").integer()


def test_different_names_are_different_keys() -> None:
    parts: tuple[int | str, ...] = (
        "a",
        "b",
        "",
        "/",
        "%",
        "%2F",
        "a/s:b",
        "s:a",
        "1",
        "-1",
        "i:1",
        1,
        -1,
        0,
        11,
    )
    paths = [path for length in range(4) for path in product(parts, repeat=length)]
    names = [(seed, *path) for seed in (0, 1, 11, -1) for path in paths]
    keys = {Key(seed).fold_in(*path).integer() for seed, *path in names}  # type: ignore[arg-type]
    assert len(keys) == len(names)
    assert all(0 <= key < 1 << 64 for key in keys)


# ---- P2: a draw is a function of its name ----------------------------------------------------------------------------

DRAWS: dict[str, Callable[[Key], Tensor]] = {
    "normal": lambda key: key.normal((13, 5)),
    "uniform": lambda key: key.uniform((9,)),
    "permutation": lambda key: key.permutation(31),
    "signs": lambda key: key.signs(counters("w", 128, 500, HOST)),
    "orthonormal": lambda key: torch.stack([d("a") for d in orthonormal(Layout(SPACES), 5, key)]),
    **{f"probe {law}": lambda key, law=law: Probe(Layout(SPACES), law, key)("c") for law in LAWS},
    **{
        f"blocked {law}": lambda key, law=law: Probe(Layout([Space("c", (50, 9), blocked=True)]), law, key)(
            "c"
        )
        for law in LAWS
    },
}


@pytest.fixture(params=DRAWS)
def draw(request: pytest.FixtureRequest) -> Callable[[Key], Tensor]:
    return DRAWS[request.param]


def test_a_draw_does_not_depend_on_earlier_draws_or_global_state(draw: Callable[[Key], Tensor]) -> None:
    first = draw(Key(5).fold_in("x"))
    for other in DRAWS.values():
        other(Key(5).fold_in("y"))
    torch.manual_seed(99)
    assert torch.equal(draw(Key(5).fold_in("x")), first)


def test_a_draw_leaves_global_generators_alone(draw: Callable[[Key], Tensor]) -> None:
    before, host = torch.get_rng_state(), random.getstate()
    draw(Key(5).fold_in("x"))
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == host


def test_draws_of_different_names_differ(draw: Callable[[Key], Tensor]) -> None:
    first = draw(Key(5).fold_in("x", 0))
    for other in (Key(5).fold_in("x", 1), Key(6).fold_in("x", 0), Key(5).fold_in("y", 0)):
        assert not torch.equal(draw(other), first)


@pytest.mark.parametrize("law", LAWS)
def test_a_probe_does_not_depend_on_the_order_of_spaces(law: str) -> None:
    key = Key(1).fold_in("step", 4)
    probe = Probe(Layout(SPACES), law, key)
    for spaces in (SPACES[::-1], SPACES[1:], SPACES[:1]):
        other = Probe(Layout(spaces), law, key)
        assert all(torch.equal(other(s.name), probe(s.name)) for s in spaces)


@pytest.mark.parametrize("law", [*LAWS, "orthonormal"])
def test_a_probe_does_not_depend_on_the_number_of_threads(law: str) -> None:
    large = Layout([Space("w", (256, 8)), Space("v", (300, 400), blocked=law != "orthonormal")])
    small = Layout(large.spaces[:1])

    def drawn() -> Tensor:
        if law == "orthonormal":
            return torch.stack([d("w") for d in orthonormal(small, 256, Key(2))])
        probe = Probe(large, law, Key(2))
        return torch.cat((probe("w").flatten(), probe("v").flatten()))

    with threads(1):
        one = drawn()
    with threads(2):
        assert torch.equal(drawn(), one)


# ---- fairness and independence of signs -----------------------------------------------------------------------------


def test_signs_are_plus_and_minus_one() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        signs = Key(0).signs(counters("w", 0, 1000, HOST), dtype)
        assert signs.dtype == dtype and signs.shape == (1024,)
        assert set(signs.tolist()) == {-1.0, 1.0}


def test_signs_are_fair_at_every_bit_of_a_counter() -> None:
    signs = Key(3).signs(counters("w", 0, 1 << 18, HOST)).view(-1, 128)  # (2048, 128)
    assert_mean(signs, 0.0)
    assert_mean(signs.flatten(), 0.0)


@pytest.mark.parametrize("lag", [1, 2, 31, 32, 64, 127, 128, 129, 1024])
def test_signs_of_one_name_are_independent(lag: int) -> None:
    signs = Key(4).signs(counters("w", 0, 1 << 17, HOST))
    assert_mean(signs[lag:] * signs[:-lag], 0.0)


def test_signs_are_independent_across_names_steps_seeds_and_probes() -> None:
    size = 1 << 14
    keys = [
        Key(seed).fold_in("step", step).fold_in("probe", i)
        for seed in (0, 1)
        for step in (0, 1)
        for i in (0, 1)
    ]
    rows = torch.stack(
        [key.signs(counters(name, 0, size, HOST)) for key in keys for name in ("w.0", "w.1", "w.10")]
    )
    gram = rows.double() @ rows.double().T / sqrt(size)  # off the diagonal: standard normal
    off = gram[~torch.eye(len(rows), dtype=torch.bool)]
    assert float(off.abs().max()) < 5
    assert float(off.square().mean()) == pytest.approx(1, abs=5 * sqrt(2 / (len(off) / 2)))


def test_numbers_of_a_space_do_not_repeat_between_blocks() -> None:
    words = philox(counters("w", 0, 128 << 12, HOST), Key(0).integer())
    assert len(torch.unique(words.flatten())) > 0.999 * words.numel()  # about n²/2³³ repeats by chance


def test_uniform_and_permutation_have_their_moments() -> None:
    u = Key(0).uniform((20000,))
    assert bool((u >= 0).all() and (u < 1).all())
    assert_mean(u, 0.5)
    assert_mean((u - 0.5).square(), 1 / 12)
    places = torch.stack([Key(0).fold_in(i).permutation(5) for i in range(2000)])
    assert torch.equal(places.sort(1).values, torch.arange(5).expand(2000, 5))
    assert_mean(torch.nn.functional.one_hot(places), 1 / 5)


# ---- laws of probes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("shape", [(37, 5), (5, 37), (300,), (6, 4, 7), (1, 130)])
def test_a_blocked_draw_equals_the_whole_draw(
    law: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zolr.probes, "BLOCK", 64)
    key = Key(8).fold_in("step", 2)
    whole = Probe(Layout([Space("w", shape)]), law, key)("w")
    blocked = Probe(Layout([Space("w", shape, blocked=True)]), law, key)
    assert whole.shape == shape
    assert torch.equal(blocked("w"), whole)
    assert torch.equal(torch.cat([blocked("w", rows) for rows in row_blocks(shape)]), whole)
    for step in (1, 7):
        pieces = [blocked("w", slice(start, start + step)) for start in range(0, shape[0], step)]
        assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(blocked("w", slice(-1, None)), whole[-1:])


@pytest.mark.parametrize("law", LAWS)
def test_a_space_larger_than_a_block_is_drawn_by_rows(law: str) -> None:
    shape = (700, 2000)  # 1.4 million entries; rows of no multiple of 128
    key = Key(8).fold_in("step", 2)
    whole = Probe(Layout([Space("w", shape)]), law, key)("w")
    blocked = Probe(Layout([Space("w", shape, blocked=True)]), law, key)
    for rows in (slice(0, 3), slice(519, 530), slice(699, 700)):
        assert torch.equal(blocked("w", rows), whole[rows])


def test_row_blocks_cover_every_row_once() -> None:
    for shape in ((5,), (1, 1), (3, 1 << 21), (1 << 12, 1 << 10), (0, 4)):
        blocks = list(row_blocks(shape))
        assert [i for b in blocks for i in range(b.start, b.stop)] == list(range(shape[0]))
        assert all((b.stop - b.start) == 1 or (b.stop - b.start) * shape[-1] <= 1 << 20 for b in blocks[:3])


@pytest.mark.parametrize("law", LAWS)
def test_every_law_has_the_identity_as_second_moment(law: str) -> None:
    count = 3000
    layout = Layout([Space(f"{i}", (2, 4)) for i in range(count)])
    probe = Probe(layout, law, Key(11))
    z = torch.stack([probe(f"{i}").flatten() for i in range(count)]).double()  # (count, 8)
    assert_mean(z, 0.0)
    assert_mean(z[:, :, None] * z[:, None, :], torch.eye(8, dtype=torch.float64))
    fourth = {"rademacher": 1.0, "gaussian": 3.0, "sphere": 3 * 8 / 10}  # E z⁴; on the sphere 3 n / (n + 2)
    assert_mean(z.pow(4), fourth[law])


def test_parts_of_one_probe_are_independent() -> None:
    for law in LAWS:
        probes = [
            Probe(Layout([Space("a", (4,)), Space("b", (4,))]), law, Key(2).fold_in(i)) for i in range(400)
        ]
        a, b = (torch.stack([p(name) for p in probes]).double() for name in "ab")
        assert_mean(a[:, :, None] * b[:, None, :], 0.0)
    names = Layout([Space(f"w.{i}", (2, 4)) for i in range(1000)])  # equal shapes, neighboring names
    for law in LAWS:
        probe = Probe(names, law, Key(2))
        z = torch.stack([probe(s.name).flatten() for s in names.spaces]).double()
        assert_mean(z[1:, :, None] * z[:-1, None, :], 0.0)


@pytest.mark.parametrize("blocked", [False, True])
def test_a_sphere_draw_lies_on_the_sphere_of_every_space(
    blocked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zolr.probes, "BLOCK", 64)
    for shape in ((40, 3), (1,), (9,), (2, 300)):
        probe = Probe(Layout([Space("w", shape, blocked=blocked)]), "sphere", Key(1))
        z = probe("w")
        assert float(z.double().square().sum()) == pytest.approx(z.numel(), rel=1e-6)


def test_a_probe_of_a_scalar_space_has_no_axes() -> None:
    for law in LAWS:
        assert Probe(Layout([Space("scale", ())]), law, Key(1))("scale").shape == ()


def test_an_unknown_law_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="uniform.*rademacher"):
        Probe(Layout(SPACES), "uniform", Key(0))


# ---- orthonormal directions -----------------------------------------------------------------------------------------


def flattened(layout: Layout, count: int, key: Key) -> Tensor:
    """`(count, size)`"""
    return torch.stack(
        [torch.cat([d(s.name).flatten() for s in layout.spaces]) for d in orthonormal(layout, count, key)]
    ).double()


@pytest.mark.parametrize("count", [1, 5, 64])
def test_orthonormal_directions_are_orthogonal_and_of_full_length(count: int) -> None:
    layout = Layout(SPACES)
    assert layout.size == 64
    z = flattened(layout, count, Key(3))
    gram = z @ z.T / layout.size
    assert (
        float((gram - torch.eye(count, dtype=torch.float64)).abs().max())
        < 64 * torch.finfo(torch.float32).eps
    )


def test_orthonormal_directions_are_uniform() -> None:
    layout = Layout([Space("a", (2, 2)), Space("b", (2,))])
    z = torch.stack([flattened(layout, 3, Key(0).fold_in(i)) for i in range(2000)])  # (2000, 3, 6)
    assert_mean(z, 0.0)  # without the sign rule of QR the diagonal is never positive
    assert_mean(z[..., :, None] * z[..., None, :], torch.eye(6, dtype=torch.float64))
    assert_mean(z.pow(4), 3 * 6 / 8)


def test_more_orthonormal_directions_than_coordinates_are_refused() -> None:
    with pytest.raises(UsageError, match="65 orthonormal probes do not fit in 64"):
        orthonormal(Layout(SPACES), 65, Key(0))
    with pytest.raises(UsageError, match="weight 'w' is trained as a whole"):
        orthonormal(Layout([Space("w", (4, 4), blocked=True)]), 2, Key(0))


def test_orthonormal_directions_do_not_depend_on_how_many_follow() -> None:
    few, many = flattened(Layout(SPACES), 3, Key(3)), flattened(Layout(SPACES), 9, Key(3))
    assert torch.allclose(few, many[:3], atol=64 * torch.finfo(torch.float32).eps)
