"""Recipes are runs, and `zolr reproduce` says whether one still gives what it gave."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from zolr.cli import pretrain
from zolr.cli.planned import Planned
from zolr.cli.rates import RATES, USUAL, rate_of
from zolr.cli.reproduce import Recorded, recipe_of, text_hash
from zolr.errors import UsageError
from zolr.tasks.texts import SUFFIXES

ROOT = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(ROOT.rglob("*.toml"))
SIZES = ("20m", "60m", "100m", "130m", "350m", "1b", "7b")
# the rows of the results table, and those of which there are published figures beside them
ROWS = {
    *("adamw", "muon", "stiefel", "dependent", "gaussian", "coordinate", "galore", "flora", "grasswalk", "grassjump"),
    *("plumage", "gum", "fira", "apollo-mini", "mofasgd", "adalomo", "apollo", "q-galore", "subtrack", "ldadam"),
}  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_is_a_run(path: Path) -> None:
    recipe = recipe_of(path)
    settings = recipe.settings()
    assert settings.composed().paradigm in ("fo", "zo")
    if recipe.recorded is not None:
        values = recipe.recorded.values
        assert recipe.recorded.mean == pytest.approx(sum(values) / len(values), abs=2e-4)
        assert all(map(recipe.recorded.holds, values)) and recipe.recorded.conditions


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_every_row_of_the_results_table(size: str) -> None:
    from zolr.models import PRESETS

    folder = ROOT / f"llama-{size}"
    assert {path.stem for path in folder.glob("*.toml")} == ROWS
    numbers = PRESETS[folder.name].settings
    for path in folder.glob("*.toml"):
        settings = recipe_of(path).settings()
        assert settings.rows == 512 and settings.length == 256 and settings.model == folder.name
        assert settings.warmup * 10 == settings.steps and settings.floor == 0.1
        rank = getattr(settings.composed().projector, "rank", 1)
        assert 1 <= rank <= numbers["hidden_size"] // 2
        text = path.read_text()
        assert "# Published: " in text and ("# Not run by us." in text or "[recorded]" in text)
    # the published ones, as they are published
    lines = tomllib.loads((folder / "galore.toml").read_text())
    if size in ("60m", "130m", "350m"):
        assert (lines["lr"], lines["scale"], lines["refresh-every"]) == (0.01, 0.25, 200)
        assert lines["rank"] == {"60m": 128, "130m": 256, "350m": 256}[size]


def test_rates_of_pretraining_are_of_rows_that_have_backprop() -> None:
    from zolr.methods import METHODS

    for name, (rate, why, scale, transport) in RATES.items():
        assert "fo" in METHODS[name].paradigms and METHODS[name].adapter is None and rate > 0 and why
        assert pretrain.Pretrain(data=("x",), method=name).filled().lr == rate
        apart = pretrain.Pretrain(data=("x",), method=name).filled().composed().scale
        assert apart == (scale or METHODS[name].build("fo").scale)
        kept = pretrain.Pretrain(data=("x",), method=name, lr=1e-3).filled().transport
        assert kept == transport and (transport is None or name in ("stiefel", "dependent"))
    for given in ({"transport": "reset"}, {"paradigm": "zo"}):
        filled = pretrain.Pretrain(data=("x",), method="stiefel", **given).filled()
        assert filled.transport == given.get("transport")
    for given, apart in (({"lr": 3e-3}, 0.3), ({"scale": 1.0}, 1.0), ({"tables": "subspace"}, 1.0)):
        assert pretrain.Pretrain(data=("x",), method="stiefel", **given).filled().composed().scale == apart
    whole = pretrain.Pretrain(data=("x",), method="stiefel", projector="identity").filled()
    assert whole.transport is None and whole.filled() == whole  # which is what --resume reads
    assert pretrain.Pretrain(data=("x",), method="adamw").filled().lr == USUAL.lr
    assert pretrain.Pretrain(data=("x",), method="galore", lr=2e-3).filled().lr == 2e-3
    # where the protocol of a recipe publishes a rate, that is the default too
    for name in ("galore", "fira", "apollo", "q-galore"):
        assert recipe_of(ROOT / "llama-60m" / f"{name}.toml").settings().lr == rate_of(name).lr


@pytest.mark.parametrize("row", ["stiefel", "galore"])
def test_a_recipe_is_predicted_without_weights(row: str) -> None:
    import torch

    from zolr.cli.pretraining import prediction
    from zolr.models import PRESETS

    settings = recipe_of(ROOT / "llama-20m" / f"{row}.toml").settings(batch_size=2, accumulate=1, length=16)
    peak = prediction(settings, PRESETS["llama-20m"].config(), torch.device("cpu")).peak_bytes
    # weights of 19.5 million parameters in bfloat16 are 39 MB, and the tables have masters and moments in float32
    assert 150e6 < peak < 600e6


TEXT = "\n\n".join(
    f"The {a} fox saw {b} dogs and went to the old house." for a in "red big sad".split() for b in range(60)
)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a small recipe of pretraining, with a record or without."""
    monkeypatch.setattr(Planned, "predicted", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)

    def written(**recorded: Any) -> Path:
        lines = ['verb = "pretrain"', 'data = ["text.txt"]', "train-tokenizer = true", "vocab-size = 300"]
        lines += ["hidden-size = 16", "layers = 1", "heads = 2", "length = 16", "batch-size = 2", "steps = 3"]
        lines += ['method = "stiefel"', 'paradigm = "fo"', "rank = 4", "eval-rows = 4", "threads = 1"]
        if recorded:
            lines += ["[recorded]", *(f"{key} = {json.dumps(value)}" for key, value in recorded.items())]
        path = tmp_path / "small.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    return written


def test_a_recipe_gives_again_what_it_gave(zolr: Run, recipe: Callable[..., Path], tmp_path: Path) -> None:
    code, out, err = zolr("reproduce", recipe(), "--quiet")
    assert code == 0 and "has no recorded result to compare with" in out, err
    result = json.loads((tmp_path / "runs" / "reproduce-small" / "result.json").read_text())
    loss = result["after"]
    record = {"metric": "loss", "seeds": [0], "values": [loss], "text": text_hash(["text.txt"])}

    code, out, err = zolr("reproduce", recipe(**record, mean=loss, spread=1e-4), "--quiet", "--json")
    told = json.loads(out)
    assert code == 0 and told["within"] is True and told["value"] == pytest.approx(loss, rel=1e-6), err
    assert told["folder"] == "runs/reproduce-small-2" and told["recorded"]["seeds"] == [0]

    code, out, err = zolr("reproduce", recipe(**record, mean=loss + 0.1, spread=0.05), "--quiet")
    assert code == 8 and "is outside of what was recorded: loss" in err and err.count("\n") == 1

    # another seed is another run, and perplexity another metric of the same one
    record["metric"] = "perplexity"
    path = recipe(**record, mean=2.718281828**loss, spread=1e-3)
    code, out, _ = zolr("reproduce", path, "--seed", 5, "--quiet", "--json", "--output", tmp_path / "five")
    assert code == 8 and json.loads(out)["seed"] == 5 and json.loads(out)["within"] is False

    (tmp_path / "other.txt").write_text(TEXT + " x")
    code, _, err = zolr("reproduce", path, "--data", tmp_path / "other.txt", "--quiet")
    assert code == 3 and "was recorded on another text" in err


def test_a_text_is_known_by_every_file_that_a_run_would_read(tmp_path: Path) -> None:
    found = {text_hash([str(tmp_path)])}
    for name in (f"part{suffix}" for suffix in SUFFIXES):
        for content in ("one", "other"):
            (tmp_path / name).write_text(content)
            found.add(text_hash([str(tmp_path)]))
    assert len(found) == 1 + 2 * len(SUFFIXES)
    (tmp_path / "notes.md").write_text("no text")
    (tmp_path / "folder.txt").mkdir()
    assert text_hash([str(tmp_path)]) in found


def test_a_recipe_of_fine_tuning_is_reproduced(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zolr.cli.job import Job

    monkeypatch.setattr(Job, "predicted", None)
    rows = "\n".join(f"what is number {i}?,NUM\nwho is person {i}?,HUM" for i in range(12))
    (tmp_path / "rows.csv").write_text("text,label\n" + rows + "\n")
    path = tmp_path / "fine.toml"
    path.write_text(
        f'model = "demo"\ndata = "{tmp_path}/rows.csv"\nhead = "classes"\nparadigm = "fo"\nsteps = 1\nbatch-size = 4\n'
        '[recorded]\nmetric = "accuracy"\nmean = 0.5\nspread = 0.5\nseeds = [3]\nvalues = [0.5]\n'
    )
    code, out, err = zolr("reproduce", path, "--quiet", "--json", "--output", tmp_path / "run")
    assert code == 0 and json.loads(out)["verb"] == "finetune" and json.loads(out)["seed"] == 3, err


WRONG = [
    ({"metric": "loss"}, "mean"),
    (dict(metric="loss", mean=1.0, spread=0.0, seeds=[0], values=[1.0]), "positive spread"),
    (dict(metric="loss", mean=1.0, spread=0.1, seeds=[0, 1], values=[1.0]), "a value for each"),
    (dict(metric="loss", mean=1.0, spread=0.1, seeds=[0], values=[1.0], text_="x"), "has no key 'text_'"),
]


@pytest.mark.parametrize(("record", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_record_that_is_none_is_refused(
    recipe: Callable[..., Path], record: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        recipe_of(recipe(**record))


def test_a_recipe_is_run_by_its_own_verb_only(zolr: Run, recipe: Callable[..., Path], tmp_path: Path) -> None:
    code, _, err = zolr("finetune", "--config", recipe(), "--print-config")
    assert code == 2 and "is a recipe of `zolr pretrain`" in err
    code, _, err = zolr("reproduce", tmp_path / "none.toml")
    assert code == 2 and "cannot read recipe" in err
    (tmp_path / "odd.toml").write_text('verb = "pretrian"\n')
    code, _, err = zolr("reproduce", tmp_path / "odd.toml")
    assert code == 2 and "did you mean 'pretrain'" in err
    assert zolr("reproduce")[0] == 2


def test_a_value_that_is_not_finite_is_never_within() -> None:
    record = Recorded("loss", 1.0, 0.5, (0,), (1.0,))
    assert (
        record.holds(1.5) and record.holds(0.5) and not record.holds(1.51) and not record.holds(float("nan"))
    )
