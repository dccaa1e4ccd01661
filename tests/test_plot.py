"""Pictures of runs: what is read from a run folder, how runs and layers are named, and that every picture is drawn."""

import json
from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from zolr.cli import plot
from zolr.cli.picture import curve
from zolr.cli.plot import FIGURES, labels, short_names, smoothed, traced

LAYERS = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.self_attn.{w}_proj.weight" for i in range(3) for w in "qk"),
]


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder of 40 steps with evaluations and diagnoses."""

    def written(name: str, speed: float = 1.0, **settings: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        lines: list[dict[str, Any]] = [{"step": 0, "eval": {"loss": 7.0, "perplexity": exp(7.0)}}]
        for step in range(1, 41):
            spent = {
                "forwards": 3 * step,
                "tokens": 300 * step,
                "tokens_seen": 100 * step,
                "seconds": step / speed,
            }
            lines.append(
                {"step": step, "loss": 7 * 0.98**step, "slope": None, "lr": 1e-3, "skipped": False, **spent}
            )
            if step % 10 == 0:
                figures = {f.key: 0.1 + 0.01 * step for f in FIGURES.values()} | {"variance_expected": 0.5}
                layers = {
                    layer: {k: v * (i + 1) for k, v in figures.items()} for i, layer in enumerate(LAYERS)
                }
                lines.append({"step": step, "diagnosis": {"loss": 1.0, "total": figures, "layers": layers}})
                lines.append(
                    {"step": step, "eval": {"loss": 7 * 0.98**step, "perplexity": exp(7 * 0.98**step)}}
                )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        spelled = {"method": "stiefel", "lr": 0.001, "threads": 1} | settings
        (folder / "config.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in spelled.items()))
        return folder

    return written


def test_runs_are_named_by_the_settings_in_which_they_differ(made: Callable[..., Path]) -> None:
    folders = [made("a"), made("b", lr=0.003, threads=2), made("c", method="galore", rank=8), made("d")]
    traces = [traced(folder) for folder in folders]
    assert labels(traces[:3]) == [
        "a: stiefel, lr 0.001",
        "b: stiefel, lr 0.003",
        "c: galore, lr 0.001, rank 8",
    ]
    assert labels(traces[:1]) == ["a"]
    assert labels([traces[0], traces[3]]) == ["a: stiefel", "d: stiefel"]


def figure_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn from here on."""
    found, canvas = [], plot._canvas
    monkeypatch.setattr(plot, "_canvas", lambda *size: found.append(canvas(*size)) or found[-1])
    return found


def test_what_has_cost_nothing_is_drawn_on_a_wide_axis(
    zolr: Run, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    found = figure_of(monkeypatch)
    folders = made("a"), made("b", speed=100.0, lr=0.003)
    assert zolr("plot", *folders, "--x", "seconds", "--output", tmp_path / "p.png")[0] == 0
    (panel,) = found[0].axes
    assert panel.get_xscale() == "symlog"
    left, right = panel.get_xlim()
    for line in panel.get_lines():
        if line.get_marker() not in ("None", ""):
            pixels = panel.transData.transform(line.get_xydata())[:, 0]
            assert line.get_xdata()[0] == left == 0 and 20 < pixels[1] - pixels[0] < panel.bbox.width


def test_a_map_lies_under_its_curve_and_has_a_name_of_its_own(
    zolr: Run, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    found = figure_of(monkeypatch)
    monkeypatch.chdir(tmp_path)
    folder = made("a")
    for what, name in (("energy", "plot-energy.png"), ("loss", "plot.png")):
        code, out, err = zolr("plot", folder, "--what", what)
        assert code == 0 and out.strip() == str(tmp_path / name) and (tmp_path / name).is_file(), err
    above, below = found[0].axes[:2]
    assert above.get_xlim() == below.get_xlim()
    assert above.get_position().x0 == pytest.approx(below.get_position().x0, abs=1e-6)
    assert above.get_position().x1 == pytest.approx(below.get_position().x1, abs=1e-6)


def test_costs_are_those_of_the_step(made: Callable[..., Path]) -> None:
    trace = traced(made("a", speed=2.0))
    assert len(trace.steps) == 40 and len(trace.evaluations) == 5 and len(trace.diagnoses) == 4
    assert [trace.at(20, axis) for axis in ("tokens", "seconds", "steps", "forwards")] == [2000, 10, 20, 60]
    assert trace.at(0, "tokens") == 0
    assert [p[:2] for p in curve(trace.folder, "loss")][:2] == [(0, 0), (30, 5)]  # zolr compare's picture


def test_figures_of_all_weights_are_those_of_projected_ones(made: Callable[..., Path]) -> None:
    folder = made("a")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "diagnosis" in line and line["step"] > 10:  # the first one is as where no weight has a subspace
            line["diagnosis"]["projected"] = {"energy": 0.25, "norm": 9.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace = traced(folder)
    assert plot._totals(trace, "energy", "tokens") == [
        (1000, 0.2),
        *((t, 0.25) for t in (2000, 3000, 4000)),
    ]
    assert [value for _, value in plot._totals(trace, "norm", "steps")] == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert plot._totals(trace, "gain", "steps") == [(10, 0.2)]


def test_layers_have_short_names_that_differ() -> None:
    assert short_names(LAYERS)[:3] == ["embed_tokens", "0 q_proj", "0 k_proj"]
    bert = [
        f"bert.encoder.layer.{i}.{part}.dense.weight" for i in range(2) for part in ("intermediate", "output")
    ]
    odd = ["model.layers.0.a.proj.weight", "model.layers.0.b.proj.weight", "head.weight"]
    for names in (bert, odd):
        short = short_names(names)
        assert len(set(short)) == len(names) and all(
            len(s) < len(n) for s, n in zip(short, names, strict=True)
        )


def test_a_running_mean_begins_with_what_there_is() -> None:
    assert smoothed([5.0] * 9, 4) == pytest.approx([5.0] * 9)
    found = smoothed([float(i) for i in range(200)], 10)
    assert found[0] == 0 and found[-1] == pytest.approx(199 - 9, abs=0.1)


@pytest.mark.parametrize("what", ["loss", "perplexity", "energy", "variance"])
def test_every_picture_is_drawn(zolr: Run, made: Callable[..., Path], tmp_path: Path, what: str) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "new" / "picture.png"
    code, out, err = zolr("plot", made("a"), made("b", lr=0.003), "--what", what, "--output", target)
    assert code == 0 and out.strip() == str(target), err
    assert target.read_bytes()[:4] == b"\x89PNG" and target.stat().st_size > 20_000


def test_a_killed_run_is_drawn_as_far_as_it_went(
    zolr: Run, made: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    folder = made("a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "los')
    assert len(traced(folder).steps) == 40
    assert zolr("plot", folder, "--x", "steps", "--output", tmp_path / "a.svg")[0] == 0


def test_what_cannot_be_drawn_says_why(
    zolr: Run, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made("a")
    assert zolr("plot")[0] == 2
    for words, code, said in [
        (("--what", "enrgy"), 2, "did you mean 'energy'"),
        (("--output", "a.gif"), 2, ".png, .pdf or .svg"),
        (("--x", "step"), 2, "did you mean 'steps'"),
    ]:
        found, _, err = zolr("plot", folder, *words)
        assert found == code and said in err, err
    found, _, err = zolr("plot", folder.parent)
    assert found == 3 and "holds no metrics.jsonl" in err
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(line for line in lines if "diagnosis" not in line) + "\n")
    found, _, err = zolr("plot", folder, "--what", "energy")
    assert found == 3 and "--diagnose-every" in err
    (folder / "metrics.jsonl").write_text("nonsense\n")
    found, _, err = zolr("plot", folder)
    assert found == 3 and "damaged in line 1" in err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found, _, err = zolr("plot", folder)
    assert found == 2 and "pip install 'zolr[plot]'" in err and plot.__doc__
