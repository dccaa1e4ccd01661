"""A diagnosis says what closed forms say, and changes nothing of the run that it looks into."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from torch import Tensor, nn

from zolr import Engine, compose
from zolr.diagnostics import Diagnostics, dense_gradients, diagnose, energy, kept_of, ranks
from zolr.errors import UsageError
from zolr.keys import Key
from zolr.projectors import haar
from zolr.projectors.stiefel import Stiefel
from zolr.subspaces import Full, Left, Right, TwoSided, Viewed
from zolr.training import train


class Net(nn.Module):
    """An embedding, two maps, a norm and dropout, in float64."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(11, 16)
            self.wide = nn.Linear(16, 24)
            self.out = nn.Linear(24, 5)
        self.drop = nn.Dropout(0.1)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.drop(torch.tanh(self.wide(self.embedding(ids)).mean(1))))


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["input_ids"]), batch["labels"])


def batches(step: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 11, (12, 4), generator=torch.Generator().manual_seed(step))
    return [{"input_ids": ids, "labels": ids.sum(1) % 5}]


def run(method: str = "stiefel", paradigm: str = "fo", select: str = "all", **settings: Any) -> Engine:
    decay = settings.pop("weight_decay", 0.0)
    method = compose(method, paradigm, **settings)
    return Engine(Net(), method, lr=1e-2, loss=loss, select=select, seed=3, weight_decay=decay)


def near(values: list[float], expected: float) -> None:
    """The mean of independent values is within five standard errors of what is expected."""
    found = torch.tensor(values, dtype=torch.float64)
    error = float(found.std()) / math.sqrt(len(values))
    assert abs(float(found.mean()) - expected) <= 5 * error + 1e-9 * abs(expected), (
        found.mean(),
        expected,
        error,
    )


# ---- one gradient ----------------------------------------------------------------------------------------------------


def test_energy_is_that_of_the_orthogonal_projection_for_every_kind_and_scale() -> None:
    g = Key(1).normal((12, 8)).double()
    p, q = Key(2).normal((8, 3)).double(), Key(3).normal((12, 4)).double()
    on_p, on_q = p @ torch.linalg.pinv(p), q @ torch.linalg.pinv(q)
    short = Key(4).normal((4, 2)).double()
    seen = g.reshape(24, 4) @ short @ torch.linalg.pinv(short)
    cases = {
        Right(p, 12): g @ on_p,
        Left(7 * q, 8): on_q @ g,
        TwoSided(q, 0.1 * p): on_q @ g @ on_p,
        Viewed(short, 12, 2): seen,
        Full((12, 8)): g,
    }
    for subspace, inside in cases.items():
        share = float(inside.square().sum() / g.square().sum())
        assert energy(subspace, g) == pytest.approx(share, rel=1e-10)


def test_a_haar_subspace_holds_r_of_n_of_a_gradient_that_it_knows_nothing_of() -> None:
    n, r = 24, 6
    g = Key(0).normal((1, n)).double()  # of rank 1, whose share has the largest scatter
    found = [energy(Stiefel(rank=r).draw((1, n), Key(5).fold_in(i), like=g), g) for i in range(200)]
    near(found, r / n)
    scatter = torch.tensor(found).var()  # theory: 2 r (n - r) / (n² (n + 2))
    assert float(scatter) == pytest.approx(2 * r * (n - r) / (n**2 * (n + 2)), rel=0.5)


def test_ranks_of_known_spectra() -> None:
    q, p = (
        haar(9, 4, Key(1), torch.zeros((), dtype=torch.float64)),
        haar(6, 4, Key(2), torch.zeros((), dtype=torch.float64)),
    )
    s = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    effective, stable = ranks(q * s @ p.mT)
    share = s / s.sum()
    assert effective == pytest.approx(float((-(share * share.log()).sum()).exp()), rel=1e-6)
    assert stable == pytest.approx(22 / 16, rel=1e-9)
    assert ranks(q @ p.mT) == (pytest.approx(4, rel=1e-6), pytest.approx(4, rel=1e-9))
    assert ranks(torch.zeros(3, 2)) == (0.0, 0.0)


@pytest.mark.parametrize("method", ["stiefel", "galore", "adamw"])
def test_dense_gradients_are_those_of_the_plain_model_in_the_middle_of_a_window(method: str) -> None:
    settings = {} if method == "adamw" else {"rank": 2, "refresh_every": 4}
    engine = run(method, weight_decay=0.1, **settings)
    for step in range(6):
        engine.step(batches(step))
    plain = engine.export()
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    expected = loss(plain, batches(0)[0])
    expected.backward()
    found: dict[str, Tensor] = {}
    value = dense_gradients(engine, batches(0)[0], lambda v, g: found.update({v.name: g.clone()}))
    assert value == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


# ---- estimates -------------------------------------------------------------------------------------------------------

ESTIMATES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "stiefel": ("stiefel", "fo", {}),
    "gaussian": ("stiefel", "fo", {"projector": "gaussian"}),
    "coordinate": ("stiefel", "fo", {"projector": "coordinate"}),
    "srht": ("stiefel", "fo", {"projector": "srht"}),
    "two_sided": ("stiefel", "fo", {"projector": "two_sided"}),
    "dependent": ("dependent", "fo", {}),
    "plumage": ("plumage", "fo", {"rank": 2}),
    "stiefel zo": ("stiefel", "zo", {"eps": 1e-4, "probes": 2}),
    "stiefel zo gaussian": ("stiefel", "zo", {"eps": 1e-4, "law": "gaussian"}),
    "stiefel zo sphere": ("stiefel", "zo", {"eps": 1e-4, "law": "sphere"}),
    "mezo": ("mezo", "zo", {"eps": 1e-4}),
    "stiefel fwd": ("stiefel", "fwd", {}),
}


@pytest.mark.parametrize("case", ESTIMATES)
def test_estimates_have_the_mean_and_the_scatter_of_their_closed_form(case: str) -> None:
    method, paradigm, settings = ESTIMATES[case]
    if method != "mezo":
        settings = {"rank": 4, "refresh_every": 3, **settings}
    engine = run(method, paradigm, select="linear", **settings)
    for step in range(8):  # laws that learn have learned, and the run is in the middle of a window
        engine.step(batches(step))
    found = [diagnose(engine, batches(0)[0], Key(i), draws=6)["total"] for i in range(25)]
    near([f["gain"] for f in found], 1.0)
    near([f["bias"] for f in found], 0.0)
    (expected,) = {round(f["variance_expected"], 9) for f in found}
    assert expected > 0.1
    near([f["variance"] for f in found], expected)


def test_leading_directions_are_biased_by_what_they_leave_out_and_do_not_scatter() -> None:
    engine = run("galore", rank=2, refresh_every=3, select="linear")
    for step in range(4):
        engine.step(batches(step))
    found = diagnose(engine, batches(0)[0], Key(0))
    gradients: dict[str, Tensor] = {}
    dense_gradients(engine, batches(0)[0], lambda v, g: gradients.update({v.name: g.clone()}))
    for name, layer in found["layers"].items():
        s = torch.linalg.svdvals(gradients[name]).square()
        left = float(s[2:].sum() / s.sum())
        assert layer["bias"] == pytest.approx(left, abs=1e-9) and layer["variance"] == pytest.approx(
            0, abs=1e-9
        )
        assert layer["cosine"] == pytest.approx(math.sqrt(1 - left), rel=1e-6)
        # the subspace of the run is that of another gradient, which holds less of this one
        assert 0 < layer["energy"] < 1 - left and "variance_expected" not in layer


@pytest.mark.parametrize(("method", "paradigm"), [("stiefel", "fo"), ("stiefel", "zo"), ("galore", "fo")])
def test_energy_is_that_in_the_subspace_of_the_run(method: str, paradigm: str) -> None:
    settings = {"eps": 1e-3} if paradigm == "zo" else {}
    engine = run(method, paradigm, select="linear+embedding", rank=3, refresh_every=4, **settings)
    for step in range(6):
        engine.step(batches(step))
    gradients: dict[str, Tensor] = {}
    dense_gradients(engine, batches(0)[0], lambda v, g: gradients.update({v.name: g.clone()}))
    found, inside, projected = diagnose(engine, batches(0)[0], Key(0), draws=2), 0.0, [0.0, 0.0]
    assert list(found["layers"]) == [v.name for v in engine.variables if len(v.shape) == 2]
    for variable in engine.variables:
        space, g = engine.subspace(variable), gradients[variable.name]
        share = 1.0
        if not isinstance(space, Full):
            assert isinstance(space, Right | Left)
            q = torch.linalg.qr(space.basis)[0]
            share = float((g @ q if isinstance(space, Right) else q.mT @ g).square().sum() / g.square().sum())
            assert share < 0.99
            projected[0] += share * float(g.square().sum())
            projected[1] += float(g.square().sum())
        if len(variable.shape) == 2:
            assert found["layers"][variable.name]["energy"] == pytest.approx(share, rel=1e-9)
        inside += share * float(g.square().sum())
    whole = sum(float(g.square().sum()) for g in gradients.values())
    assert found["total"]["energy"] == pytest.approx(inside / whole, rel=1e-9)
    assert found["total"]["norm"] == pytest.approx(whole**0.5, rel=1e-9)
    assert found["projected"]["energy"] == pytest.approx(projected[0] / projected[1], rel=1e-9)
    assert found["projected"]["norm"] == pytest.approx(projected[1] ** 0.5, rel=1e-9)


# ---- moments ---------------------------------------------------------------------------------------------------------


def test_moments_are_read_as_gradients_in_their_spans() -> None:
    like = torch.zeros((), dtype=torch.float64)
    old, new = Right(3 * haar(10, 4, Key(1), like), 6), Right(0.5 * haar(10, 4, Key(2), like), 6)
    moment = Key(3).normal((6, 4)).double()
    change = new.change_from(old)
    assert change is not None
    whole = old.lift(old.dual(moment))
    inside = new.lift(new.dual(change.gradients(moment)))
    found = kept_of(old, moment, new, change.gradients(moment))
    assert found["moment_kept"] == pytest.approx(
        float(inside.square().sum() / whole.square().sum()), rel=1e-9
    )
    cosine = float((inside * whole).sum() / inside.norm() / whole.norm())
    assert found["moment_cosine"] == pytest.approx(cosine, rel=1e-9)
    assert kept_of(old, moment, old, moment) == {
        "moment_kept": pytest.approx(1.0),
        "moment_cosine": pytest.approx(1.0),
    }
    assert kept_of(old, moment, new, None) == {"moment_kept": 0.0, "moment_cosine": 0.0}


@pytest.mark.parametrize(("transport", "kept"), [("reset", 0.0), ("align", 4 / 16), ("keep", 1.0)])
def test_a_change_keeps_of_the_moments_what_its_transport_promises(transport: str, kept: float) -> None:
    engine = run(rank=4, refresh_every=1, transport=transport, select="linear")
    watch = Diagnostics(engine, batches(0)[0], every=10**6)
    shares = []
    for step in range(60):
        engine.step(batches(step))
        shares += [found["moment_kept"] for name, found in watch.moments.items() if name == "wide.weight"]
    if transport == "align":  # r / n between independent subspaces
        near(shares, kept)
    else:
        assert len(shares) > 50 and all(share == pytest.approx(kept, abs=1e-9) for share in shares)


# ---- a run -----------------------------------------------------------------------------------------------------------


def everything(engine: Engine) -> Iterator[tuple[str, Any]]:
    """What a run consists of."""

    def walk(name: str, part: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(part, dict):
            for key, value in part.items():
                yield from walk(f"{name}.{key}", value)
        else:
            yield name, part

    yield from walk("engine", engine.state_dict())
    yield from ((f"flag {v.name}", (v.value.requires_grad, v.value.grad)) for v in engine.variables)
    yield "global", torch.get_rng_state()


RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "stiefel": ("stiefel", "fo", {"rank": 3, "refresh_every": 4, "transport": "align"}),
    "decay": ("stiefel", "fo", {"rank": 3, "refresh_every": 4, "weight_decay": 0.1}),
    "dependent": ("dependent", "fo", {"rank": 3, "refresh_every": 4}),
    "galore": ("galore", "fo", {"rank": 3, "refresh_every": 4}),
    "gum": ("gum", "fo", {"rank": 3, "refresh_every": 2}),
    "ldadam": ("ldadam", "fo", {"rank": 3}),
    "zo": ("stiefel", "zo", {"rank": 3, "refresh_every": 4, "eps": 1e-3}),
    "zo inputs": ("dependent", "zo", {"rank": 3, "refresh_every": 4, "eps": 1e-3}),
    "fzoo": ("fzoo", "zo", {"eps": 1e-3}),
    "fwd": ("stiefel", "fwd", {"rank": 3, "refresh_every": 4}),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_diagnosed_run_is_the_same_to_the_last_bit(case: str, tmp_path: Path) -> None:
    method, paradigm, settings = RUNS[case]
    ends = []
    for every in (0, 1):
        torch.manual_seed(7)
        engine = run(method, paradigm, **settings)
        watch = Diagnostics(engine, batches(0)[0], every=every, draws=2) if every else None
        train(engine, batches, steps=6, folder=tmp_path / str(every), observer=watch)
        ends.append(dict(everything(engine)))
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        other = ends[1][name]
        same = torch.equal(value, other) if isinstance(value, Tensor) else value == other
        assert same, name
    plain, told = [(tmp_path / k / "metrics.jsonl").read_text().splitlines() for k in "01"]
    lines = [json.loads(line) for line in told]
    assert len(plain) == 6 and [line["step"] for line in lines if "diagnosis" in line] == list(range(1, 7))
    for line in lines:
        if "diagnosis" in line:
            assert set(line["diagnosis"]) - {"projected"} == {"loss", "draws", "total", "layers", "seconds"}
            assert {"norm", "energy", "gain", "bias", "variance", "cosine"} <= set(line["diagnosis"]["total"])
            assert all(0 <= layer["energy"] <= 1 + 1e-9 for layer in line["diagnosis"]["layers"].values())


def test_a_resumed_run_has_every_diagnosis_once(tmp_path: Path) -> None:
    def trained(steps: int, resume: bool) -> None:
        engine = run(rank=3, refresh_every=4)
        watch = Diagnostics(engine, batches(0)[0], every=2, draws=2)
        train(engine, batches, steps=steps, folder=tmp_path, save_every=3, resume=resume, observer=watch)

    trained(5, False)  # the newest checkpoint is that of step 3
    trained(8, True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "diagnosis" in line] == [2, 4, 6, 8]


def test_a_diagnosis_after_a_resume_tells_of_changes_before_it(tmp_path: Path) -> None:
    def lines(name: str, *sessions: int) -> list[dict[str, Any]]:
        for number, steps in enumerate(sessions):
            engine = run(rank=3, refresh_every=4)
            watch = Diagnostics(engine, batches(0)[0], every=7, draws=2)
            folder = tmp_path / name
            train(
                engine, batches, steps=steps, folder=folder, save_every=6, resume=number > 0, observer=watch
            )
        found = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        told = [line["diagnosis"] for line in found if "diagnosis" in line]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in told]

    whole = lines("whole", 7)  # the change of step 5 comes before the checkpoint of step 6
    assert any("moment_kept" in layer for layer in whole[0]["layers"].values())
    assert lines("resumed", 6, 7) == whole


def test_what_cannot_be_diagnosed_is_refused() -> None:
    engine = run(rank=2)
    for every, draws in ((0, 8), (1, 1)):
        with pytest.raises(UsageError, match="at least 1 step, and 2 draws"):
            Diagnostics(engine, batches(0)[0], every=every, draws=draws)
    with pytest.raises(UsageError, match="would not be private"):
        Diagnostics(run("dpzero", "zo"), batches(0)[0], every=1)
    held = Engine(Net(), compose("stiefel", "fo", rank=2), lr=1e-2, loss=loss, hold=True)
    with pytest.raises(UsageError, match="has no dense gradient"):
        Diagnostics(held, batches(0)[0], every=1)


def test_a_diagnosis_is_a_flag(zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zolr.cli.finetune import Finetune
    from zolr.cli.planned import Planned

    monkeypatch.setattr(Planned, "predicted", None)
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"The fox saw {i} dogs in the old house." for i in range(200))
    )
    given = [
        "pretrain",
        "--data",
        tmp_path / "text.txt",
        "--train-tokenizer",
        "--vocab-size",
        300,
        "--length",
        16,
    ]
    given += ["--hidden-size", 16, "--layers", 1, "--heads", 2, "--batch-size", 2, "--steps", 4, "--quiet"]
    given += ["--method", "stiefel", "--paradigm", "fo", "--rank", 4, "--refresh-every", 2]
    for name, more in {"plain": [], "told": ["--diagnose-every", 2, "--diagnose-draws", 3]}.items():
        code, _, err = zolr(*given, *more, "--output", tmp_path / name)
        assert code == 0, err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "told")]
    assert weights[0] == weights[1]
    lines = [json.loads(line) for line in (tmp_path / "told" / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["diagnosis"] for line in lines if "diagnosis" in line}
    assert list(found) == [2, 4] and found[4]["draws"] == 3
    # subspaces changed before the third step, and moments were kept; embedding and head have none
    kept = {name: layer.get("moment_kept") for name, layer in found[4]["layers"].items()}
    assert {name for name, share in kept.items() if share is None} == {n for n in kept if "layers" not in n}
    assert set(kept.values()) == {None, 1.0} and "moment_kept" not in str(found[2])

    assert zolr(*given, "--diagnose-every", 0, "--output", tmp_path / "x")[0] == 2
    assert Finetune().observer(run(rank=2), batches(0)[0]) is None
    watch = Finetune(diagnose_every=7).observer(run(rank=2), batches(0)[0])
    assert isinstance(watch, Diagnostics) and watch.every == 7
