"""The benchmarks run: every line of the one for GPUs on tiny models, and rows that cannot be filled say why."""

import json
import os
import warnings
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import begun

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def ran(script: str, *arguments: object, path: Path | None = None) -> str:
    """Standard output of a benchmark on one thread."""
    folders = [str(path)] if path else []
    where = os.pathsep.join([*folders, str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": where, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        done = begun(str(BENCHMARKS / script), [str(a) for a in arguments], environment, out, err)
        done.join(900)
        assert done.exitcode == 0, err.read_text()
        return out.read_text()


def smoke(tmp_path: Path, only: str, *more: object) -> dict[str, dict[str, Any]]:
    # a machine with a GPU need not have the data sets' library
    (tmp_path / "datasets.py").write_text("raise ImportError('there is no datasets here')\n")
    output = tmp_path / "gpu.json"
    arguments = ("--device", "cpu", "--smoke", "--lanes", 1, "--only", only, "--output", output)
    ran("gpu.py", *arguments, *more, path=tmp_path)
    found = json.loads(output.read_text())
    assert found["smoke"] is True and found["conditions"]["device"] == "cpu"
    return found["rows"]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_tiny_models_without_a_gpu(tmp_path: Path) -> None:
    rows = smoke(tmp_path, "opt-1.3b", "--case-seconds", 300, "--seconds", 800)
    memory = {row["method"] + row["paradigm"]: row for row in rows.values() if row["kind"] == "memory"}
    assert set(memory) == {"forward", "stiefelzo", "mezozo", "stiefelfo"}
    for row in memory.values():
        assert "failed" not in row, row
        assert 0.9 < row["predicted_over_measured"] < 1.1 and row["peak_bytes"] > 0
    (timed,) = (row for row in rows.values() if row["kind"] == "time")
    assert len(timed["ratios"]) == len(timed["launches"]) - 2 >= 9
    for name, row in timed["ratios"].items():
        assert row["lower"] <= row["ratio"] <= row["upper"] and timed["launches"][name] > 0


@pytest.mark.slow
def test_a_case_that_cannot_be_run_is_one_row(tmp_path: Path) -> None:
    (row,) = smoke(tmp_path, "int8, 64 x 128, stiefel zo").values()
    assert row.get("peak_bytes", 0) > 0 or "not available" in row["failed"]
    (row,) = smoke(tmp_path, "float32, 64 x 128, mezo zo", "--case-seconds", 1).values()
    assert row["failed"] == "out of time" and row["cut_after_s"] == 1
    (row,) = smoke(tmp_path, "float32, 64 x 128, mezo zo", "--seconds", 1).values()
    assert row["failed"].startswith("left out")


def test_what_is_asked_of_a_card_is_asked_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    # lines that no machine without a card gets to: a stand-in has no names but torch's own
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = import_module("gpu")
    card = SimpleNamespace(name="a card", total_memory=80 * 10**9)
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    conditions = gpu.machine("cuda")
    assert conditions["name"] == "a card" and conditions["memory_bytes"] == 80 * 10**9
    assert {"driver", "cuda", "torch", "transformers"} <= conditions.keys()
    assert gpu.kernels(lambda: torch.ones(3) + 1, True) == (0, 0.0)  # nothing was launched
    warned = gpu.waits(lambda: warnings.warn("called a synchronizing operation", stacklevel=1), True)
    assert warned == 1 and modes == ["warn", "default"]


def test_the_cases_are_told_apart_and_the_first_ones_matter_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = [case.name for case in import_module("gpu").cases()]
    assert len(names) == len(set(names)) > 30
    assert names[1] == "memory, roberta-large, float32, 64 x 128, stiefel zo"
    from zolr.methods import METHODS

    for row in METHODS.values():
        for paradigm in row.paradigms:
            assert f"memory, roberta-large, float32, 64 x 128, {row.name} {paradigm}" in names


@pytest.mark.slow
def test_the_speed_benchmark_keeps_ratios_and_shares(tmp_path: Path) -> None:
    size = ("--layers", 1, "--width", 32, "--batch-size", 2, "--length", 8)
    tiny = (*size, "--rounds", 2, "--output", tmp_path / "speed.json")
    ran("speed.py", *tiny, "--only", "stiefel, attention, rank 16")
    ran("speed.py", *tiny, "--profile")
    (case,) = json.loads((tmp_path / "speed.json").read_text()).values()
    assert {"zo stiefel, attention, rank 16 (default) / two forwards"} < set(case["rows"])
    shares = case["profile"]["shares"]
    assert shares["two plain forwards"] == 1 and shares["whole step"] > 0


@pytest.mark.slow
def test_peers_that_are_not_there_are_rows_that_say_so(tmp_path: Path) -> None:
    tiny = ("--layers", 1, "--vocabulary", 300, "--batch-size", 2, "--length", 8, "--rounds", 2)
    ran("peers.py", *tiny, "--only", "zo", "--output", tmp_path / "peers.json")
    (case,) = json.loads((tmp_path / "peers.json").read_text()).values()
    ours = case["rows"]["zolr stiefel zo"]
    assert ours["ratio"] > 0 and ours["peak_bytes"] > case["conditions"]["weights_bytes"]
    for row in case["rows"].values():
        assert ("failed" in row) != ("ratio" in row)


@pytest.mark.slow
def test_the_benchmark_of_transports_shows_which_moments_survive_a_jump() -> None:
    rows = [line.split("|")[1:-1] for line in ran("transports.py").splitlines()[2:]]
    sizes = {name.strip(): [float(x) for x in numbers] for name, *numbers in rows}
    assert set(sizes) >= {"reset", "keep", "align", "aware"}
    assert sizes["aware"][4] > 2 * sizes["aware"][0]  # 20 steps after
    assert abs(sizes["reset"][4] - sizes["reset"][0]) < 0.05


@pytest.mark.slow
def test_the_benchmark_of_all_methods_goes_on_where_it_stopped(tmp_path: Path) -> None:
    output = tmp_path / "methods.json"
    arguments = ("--task", "finetune", "--only", "adamw", "--smoke", "--output", output)
    ran("methods.py", *arguments)
    (case,) = json.loads(output.read_text())["cases"].values()
    (first,) = case.values()
    assert "failed" not in first and first["state_bytes"] > 0 and first["peak_bytes"] > first["state_bytes"]
    before = output.read_text()
    assert "adamw:fo" in ran("methods.py", *arguments)
    assert json.loads(output.read_text()) == json.loads(before)
    assert "| adamw:fo | 1 |" in ran("methods.py", "--markdown", "--output", output)


def test_the_rate_of_a_row_is_searched_by_descent_on_one_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    methods = import_module("methods")

    def walked(losses: dict[float, float]) -> tuple[list[float], Any]:
        rates = {f"{f:g}": {"chosen_by": losses[f]} for f in methods.START}
        while (factor := methods.following(rates)) is not None:
            rates[f"{factor:g}"] = {"chosen_by": losses[factor]}
        return [float(f) for f in rates], methods.best_of(rates)

    grid = methods.FACTORS
    falling, rising = (dict(zip(grid, losses, strict=True)) for losses in (range(9, 0, -1), range(9)))
    assert walked(falling) == ([1, 3, 10, 30, 100], ("100", True))
    assert walked(rising) == ([1, 3, 0.3, 0.1, 0.03, 0.01], ("0.01", True))
    assert walked({**falling, 10: 9.0}) == ([1, 3, 10], ("3", False))
    assert walked({**rising, 0.3: 9.0}) == ([1, 3, 0.3], ("1", False))
    assert walked({**falling, 10: float("nan")}) == ([1, 3, 10], ("3", False))  # diverged
    published = {"1": {"chosen_by": 2.0}, "3": {"chosen_by": 3.0}, "published": {"chosen_by": 0.0}}
    assert methods.best_of(published)[0] == "1" and methods.best_of({"1": {"failed": "why"}}) == (None, False)


@pytest.mark.slow
def test_the_pretraining_table_goes_on_where_it_stopped(tmp_path: Path) -> None:
    data = Path(os.environ.get("ZOLR_DATA", BENCHMARKS.parent.parent / "shared" / "data"))
    if not (data / "corpus" / "tinystories").is_dir():
        pytest.skip("there is no corpus; set ZOLR_DATA")
    output, page, picture = tmp_path / "found.json", tmp_path / "table.md", tmp_path / "table.png"
    arguments = ("--model", "smoke", "--rows", "adamw,stiefel", "--output", output)
    ran("pretraining.py", *arguments, "--most", 1)
    first = json.loads(output.read_text())["groups"]
    ((group, found),) = first.items()
    assert "rank 8, 4 steps" in group and set(found["runs"]) == {"adamw/0.001/0"}
    told = ran("pretraining.py", *arguments, "--most", 1, "--markdown", page, "--plot", picture)
    again = json.loads(output.read_text())["groups"][group]["runs"]
    assert set(again) == {"adamw/0.001/0", "stiefel/0.003/0"}  # every row before any other rate
    assert all(again[key] == run for key, run in found["runs"].items())
    for run in again.values():
        assert (
            run["tokens"] == 4 * 4 * 32 and run["state_bytes"] > 0 and run["peak_bytes"] > run["weight_bytes"]
        )
    full, drawn = again["adamw/0.001/0"], again["stiefel/0.003/0"]
    assert (
        full["state_bytes"] > 2 * full["weight_bytes"] > 2 * drawn["state_bytes"] * 0.5
    )  # two moments a weight
    assert "adamw" in told and page.read_text().count("\n") == 4 and picture.stat().st_size > 20_000


def test_recipes_that_were_predicted_are_those_that_there_are(tmp_path: Path) -> None:
    kept = json.loads((BENCHMARKS / "results" / "recipes.json").read_text())["cuda"]
    recipes = {
        f"{path.parent.name}/{path.stem}" for path in (BENCHMARKS.parent / "recipes").glob("llama-*/*.toml")
    }
    assert kept.keys() <= recipes
    for name, found in kept.items():
        assert sum(found["parts"].values()) == found["peak_bytes"] > found["forward_peak_bytes"], name
        micro, parts, length = found["batch"]
        assert (micro * parts, length) == (512, 256)
    told = ran("recipes.py", "--table").strip()
    row = kept["llama-130m/stiefel"]
    assert f"| 130m/stiefel | 8 x 64 x 256 | {row['peak_bytes'] / 1e9:.2f} |" in told
    assert told in (BENCHMARKS.parent / "docs" / "recipes.md").read_text()


@pytest.mark.slow
def test_a_recipe_is_predicted_as_it_was(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    ran("recipes.py", "--only", "llama-20m/stiefel", "--output", output)
    found, kept = (
        json.loads(path.read_text())["cuda"]["llama-20m/stiefel"]
        for path in (output, BENCHMARKS / "results" / "recipes.json")
    )
    assert found["peak_bytes"] == pytest.approx(kept["peak_bytes"], rel=0.02)
    assert found["parts"]["optimizer"] == pytest.approx(kept["parts"]["optimizer"], rel=0.02)


def test_the_page_on_scaling_shows_what_its_script_prints() -> None:
    page = (BENCHMARKS.parent / "docs" / "scaling.md").read_text()
    assert ran("scaling.py").strip() in page
    more = json.loads(ran("scaling.py", "--json", "--inside", 900.0))
    assert len(more) == page.count("| yes |") + page.count("| no |")


@pytest.mark.slow
def test_the_row_and_the_package_of_apollo_mini_take_the_same_steps(tmp_path: Path) -> None:
    pytest.importorskip("apollo_torch")
    output = tmp_path / "results.json"
    ran("apollo_mini.py", "--smoke", "--output", output)
    found = json.loads(output.read_text())
    assert found["identical"]["apart after 3"] < 1e-4
    assert found["package|1"][0]["loss"] > 0
