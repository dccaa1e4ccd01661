"""Pictures of runs: what is read from a run folder, how runs and layers are named, and that every picture is drawn."""

import json
from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from zolr.cli import plot
from zolr.cli.lettering import fitted, log_ticks, plain_numbers
from zolr.cli.picture import curve
from zolr.cli.plot import FIGURES, smoothed
from zolr.cli.traces import folder_names, labels, short_names, traced

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


def test_settings_that_do_nothing_or_are_off_name_no_run(made: Callable[..., Path]) -> None:
    learned = {"train-tokenizer": True, "vocab-size": 512, "schedule": "wsd", "decay": 0.2}
    given = {"train-tokenizer": False, "vocab-size": 8192, "tokenizer": "some/where", "schedule": "wsd"}
    folders = [made("a", **learned), made("b", **given, decay=0.5), made("c", **given, **{"keep-last": 3})]
    assert labels([traced(folder) for folder in folders]) == [
        "a: stiefel, train-tokenizer, decay 0.2",
        "b: stiefel, decay 0.5, tokenizer where",
        "c: stiefel, tokenizer where",
    ]
    two = [made("d", **learned), made("e", **(learned | {"vocab-size": 1024, "schedule": "cosine"}))]
    assert labels([traced(folder) for folder in two]) == [
        "d: stiefel, vocab-size 512, schedule wsd",
        "e: stiefel, vocab-size 1024, schedule cosine",
    ]


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    same = tmp_path / "a" / "run"
    assert folder_names([same, tmp_path / "b" / "run", same, tmp_path / "c"]) == [
        "a/run",
        "b/run",
        "a/run",
        "c",
    ]


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


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The run, after a change of its diagnoses."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "diagnosis" in line:
            change(line["diagnosis"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rounded_off(found: dict[str, Any]) -> None:
    """A table that is trained as a whole: no variance but for rounding, of either sign."""
    found["layers"][LAYERS[0]] |= {"variance": -3e-9, "bias": 3e-9}
    found["layers"][LAYERS[1]] |= {"variance": 2e-8, "bias": -2e-8}


def all_rounded_off(found: dict[str, Any]) -> None:
    for figures in (found["total"], *found["layers"].values()):
        figures |= {"variance": 4e-9, "variance_expected": 0.0}


def shown(axis: Any) -> list[str]:
    """The numbers on an upright axis as they are drawn, from below, none of them on another."""
    axis.axes.figure.draw_without_rendering()
    low, high = axis.get_view_interval()
    ticks = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_text()]
    ticks = ticks or [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high and t.label2.get_text()]
    texts = [t.label1 if t.label1.get_visible() else t.label2 for t in ticks]
    boxes = [text.get_window_extent() for text in texts]
    assert all(a.y1 < b.y0 for a, b in zip(boxes, boxes[1:], strict=False))
    return [text.get_text() for text in texts]


def test_runs_without_the_figure_are_left_out_by_name(
    zolr: Run, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    found = figure_of(monkeypatch)
    whole, plain = made("whole"), made("plain", method="adamw")
    changed(plain, lambda d: [figures.pop("moment_kept") for figures in (d["total"], *d["layers"].values())])
    bare = made("bare")
    lines = (bare / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if "diagnosis" not in line and "eval" not in line]
    (bare / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    target = ("--output", tmp_path / "p.png")
    code, _, err = zolr("plot", plain, whole, bare, "--what", "moments", *target)
    notes = err.splitlines()
    assert code == 0 and len(notes) == 2 and all(note.startswith("note: ") for note in notes), err
    assert str(plain) in notes[0] and "change of the subspace" in notes[0]
    assert str(bare) in notes[1] and "--diagnose-every" in notes[1]
    assert len(found[0].axes) == 3  # of the whole run, the totals, and the colors
    code, _, err = zolr("plot", bare, whole, "--what", "perplexity", *target)
    assert code == 0 and f"note: {bare}" in err and "no evaluation of it has perplexity" in err
    code, _, err = zolr("plot", bare, plain, "--what", "moments", *target)
    assert code == 3 and err.count("\n") == 1 and str(bare) in err and str(plain) in err


def test_what_is_zero_to_rounding_has_no_place_on_the_scale(
    zolr: Run, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    found = figure_of(monkeypatch)
    part, none = changed(made("part"), rounded_off), changed(made("none"), all_rounded_off)
    target = ("--output", tmp_path / "p.png")
    for folders in ((part,), (part, none), (none, part)):
        code, _, err = zolr("plot", *folders, "--what", "variance", *target)
        assert code == 0 and not err, err
        figure = found.pop()
        above, *maps, bar = figure.axes
        norm = maps[0].collections[0].norm
        assert norm.vmin == pytest.approx(0.2 * 3) and norm.vmax == pytest.approx(0.5 * 7)
        cells = maps[folders.index(part)].collections[0]
        assert [tuple(cells.cmap(cells.norm(v))) for v in cells.get_array()[:2, 0]] == [(1, 1, 1, 1)] * 2
        assert "zero to rounding (at most 10⁻⁶)" in [t.get_text() for t in figure.legends[1].get_texts()]
        assert len(shown(bar.yaxis)) >= 2 and len(shown(above.yaxis)) >= 2
        assert above.get_ylim()[0] > -0.1 if none in folders else above.get_ylim()[0] > 0.1
    assert zolr("plot", none, "--what", "variance", *target)[0] == 0
    (cells,) = found.pop().axes[1].collections
    assert not cells.get_array().any() and cells.norm.vmax == 1
    assert zolr("plot", part, "--what", "bias", *target)[0] == 0
    assert not found.pop().axes[1].collections[0].get_array()[:2].any()


def test_zeros_lie_below_a_logarithmic_axis(
    zolr: Run, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    found = figure_of(monkeypatch)

    def scattered(d: dict[str, Any]) -> None:
        for figures in (d["total"], *d["layers"].values()):
            figures |= {"variance": 3e5 * figures["variance"], "variance_expected": 2e5}

    folders = made("a"), changed(made("b"), scattered), changed(made("c"), all_rounded_off)
    assert zolr("plot", *folders, "--what", "variance", "--output", tmp_path / "p.png")[0] == 0
    above, *_, bar = found[0].axes
    marks = [line for line in above.get_lines() if line.get_marker() == "v" and len(line.get_xdata())]
    assert above.get_yscale() == "log" and [list(line.get_ydata()) for line in marks] == [[0.0] * 4]
    for numbers in (shown(above.yaxis), shown(bar.yaxis)):
        assert {"1", "100", "10,000"} <= set(numbers)


@pytest.mark.parametrize("low", [1e-9, 0.37, 0.99, 6.2, 200.0, 3e5])
def test_a_logarithmic_axis_always_has_numbers_with_room_between(low: float) -> None:
    pytest.importorskip("matplotlib")
    for ratio in (1 + 1e-7, 1.001, 1.3, 2.0, 3.0, 9.9, 11.0, 90.0, 1e4, 1e7, 1e13):
        for most in (5, 7, 10, 40):
            ticks = log_ticks(low, low * ratio, most)
            assert 2 <= len(ticks) <= min(most, 10) + 1, (ratio, most)
            assert low * (1 - 1e-6) <= ticks[0] and ticks[-1] <= low * ratio * (1 + 1e-6)
            gaps = [b / a for a, b in zip(ticks, ticks[1:], strict=False)]
            assert min(gaps) >= ratio ** (1 / min(most, 10)) * (1 - 1e-9)
            assert len(set(plain_numbers(ticks))) == len(ticks)


@pytest.mark.parametrize("what", ["loss", "variance"])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_every_name_and_line_sample_is_in_the_picture(
    zolr: Run,
    made: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    count: int,
) -> None:
    pytest.importorskip("matplotlib")
    found = figure_of(monkeypatch)
    odd = ["_begins-so", "cost$x$_{y}", "long-" * 40 + "0", "long-" * 40 + "1", "x" * 200, "f", "g", "h"]
    folders = [
        made(name, rank=i, lr=0.1 * i, ranks="q_proj=8," * (12 * i), **{f"setting-{k}": i for k in range(9)})
        for i, name in enumerate(odd[-count:] if count < 3 else odd[:count])
    ]
    words = ("--what", what, "--x", "steps", "--output", tmp_path / "p.png")
    code, _, err = zolr("plot", *folders, *words)
    assert code == 0 and not err, err
    (figure,) = found
    figure.draw_without_rendering()  # places in its own pixels, not in those of the file
    key = figure.legends[0]
    texts = key.get_texts()
    assert len(texts) == len(key.get_lines()) == count + (what == "variance")
    for folder, text in zip(folders, texts, strict=False):
        assert text.get_text().startswith(folder.name[:5]) and text.get_text().count("\n") < 3
    assert len({text.get_text() for text in texts}) == len(texts)
    boxes = [artist.get_window_extent() for artist in (*texts, *key.get_lines(), key.get_title())]
    titles = [p.title.get_window_extent() for p in figure.axes if p.title.get_text()]
    assert len(titles) == (count if what == "variance" and count > 1 else 0)
    for box in (*boxes, *titles):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    assert not any(a.overlaps(b) for i, a in enumerate(titles) for b in titles[:i])
    assert min(panel.bbox.height for panel in figure.axes) > 80 and key.get_window_extent().y0 > max(
        panel.bbox.y1 for panel in figure.axes
    )


def test_a_name_loses_its_middle_and_its_last_settings() -> None:
    assert fitted("a: stiefel, fo, rank 4", 30, len) == "a: stiefel, fo, rank 4"
    assert fitted("a-name-of-a-run-0: stiefel, fo, rank 4", 12, len) == "a-name…un-0:\nstiefel, fo,\nrank 4"
    assert fitted("a-name-of-a-run-0: stiefel, fo, rank 4", 12, len, 2) == "a-name…un-0:\nstiefel, …"


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
        (("--smooth", "-7"), 2, "--smooth -7.0: "),
        (("--smooth", "0"), 2, "greater than or equal to 1"),
    ]:
        found, _, err = zolr("plot", folder, *words)
        assert found == code and said in err, err
    found, _, err = zolr("plot", folder.parent)
    assert found == 3 and "holds no metrics.jsonl" in err
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(line for line in lines if "diagnosis" not in line) + "\n")
    found, _, err = zolr("plot", folder, "--what", "energy")
    assert found == 3 and "--diagnose-every" in err
    for content, said in [
        (b"nonsense\n", "damaged in line 1: no JSON"),
        (b'{"step": 1, "loss": 2.0}\n[1, 2]\n', "damaged in line 2: [1, 2] where an object should be"),
        (b'{"step": 1, "loss": 2.0}\n5\n', "damaged in line 2: 5 where"),
        (b'{"step": 1, "los\n{"step": 1, "loss": 2.0}\n', "damaged in line 1: no JSON"),  # not the last one
        (b'{"step": 1, "loss": 2.0}\n{"step": 2, "l\xff": 2.0}\n', "damaged in line 2: not UTF-8"),
        (b'{"loss": 2.0}\n', "it names no step"),
        (b'{"step": 1, "loss": 2.0, "seconds": "x"}\n', "seconds is no number"),
        (b'{"step": 1, "eval": 2.0}\n', "eval is no object"),
        (b'{"step": 1, "diagnosis": {"layers": {"a": 1}, "total": {}}}\n', "no figures of layers"),
        (b"", "holds no step and no evaluation"),
        (b'\n{"step": 1, "lo', "holds no step and no evaluation"),
        (b'{"step": 1, "other": 1}\n', "holds no step and no evaluation"),
    ]:
        (folder / "metrics.jsonl").write_bytes(content)
        found, _, err = zolr("plot", folder)
        assert found == 3 and said in err and str(folder / "metrics.jsonl") in err, err
        assert err.count("\n") == 1 and not (folder / "plot.png").exists()
    other = made("other")
    for content in (b"method = \n", b"method = '\xff'\n"):
        (other / "config.toml").write_bytes(content)
        found, _, err = zolr("plot", other)
        assert found == 3 and f"{other / 'config.toml'} is damaged" in err and "remove it" in err, err
        assert err.count("\n") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found, _, err = zolr("plot", folder)
    assert found == 2 and "pip install 'zolr[plot]'" in err and plot.__doc__
