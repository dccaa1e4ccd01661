"""The command line: instant help, one clear line for every mistake, and runs that plain transformers can use."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run

from zolr.cli import VERBS

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("ZOLR_DATA", ROOT.parent / "shared" / "data"))
MODEL = DATA / "models" / "stories260K"


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Own data that a very small model can learn."""
    source, lines = random.Random(0), ["review,verdict"]
    happy = ("the day was big and happy", "they play and they like to play", "she was so happy with the ball")
    sad = ("he was not nice", "the day was sad and she was scared", "they did not like it")
    for i in range(40):
        lines += [f"{source.choice(happy)} {i},happy", f"{source.choice(sad)} {i},sad"]
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def predicting() -> None:
    """Asked for by the tests that want a memory prediction, which takes longer than the runs here."""


@pytest.fixture
def learn(
    reviews: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    """Arguments of a small run; paths are inside `tmp_path`, where nothing else is."""
    from zolr.cli.job import Job

    if "predicting" not in request.fixturenames:
        monkeypatch.setattr(Job, "predicted", None)
    if not MODEL.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{MODEL} is absent; set ZOLR_DATA")
        pytest.skip(f"{MODEL} is absent; set ZOLR_DATA to the folder that has models/stories260K")
    columns = ["--text-column", "review", "--label-column", "verdict"]
    return ["finetune", "--model", MODEL, "--data", reviews, *columns, *WORDS, "--output", tmp_path / "run"]


WORDS = ("--label-words", "happy=happy,sad=little")
FO = ("--paradigm", "fo", "--rank", 4, "--steps", 6, "--eval-every", 3, "--lr", 1e-3)
ZO = (
    "--paradigm",
    "zo",
    "--rank",
    2,
    "--steps",
    6,
    "--eval-every",
    3,
    "--lr",
    1e-4,
    "--eps",
    1e-3,
    "--refresh-every",
    4,
)


# ---- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_instant_and_needs_no_torch(verb: str) -> None:
    """By what it imports: some 430 modules take 0.3 s of a processor, torch alone has a thousand more."""
    heavy = "{'torch', 'transformers', 'datasets', 'torchmetrics', 'numpy'}"
    others = (
        f"{{'zolr.cli.' + v for v in {list(VERBS)!r} if v != {verb!r}}}"
        if verb not in ("compare", "evaluate", "pretrain")
        else "set()"
    )
    code = (
        "import sys; from zolr.cli import main; "
        f"code = main({[*([verb] if verb else []), '--help']!r}); "
        f"wrong = ({heavy} | {others}) & set(sys.modules); "
        "sys.exit(f'imported: {wrong}' if wrong else f'{len(sys.modules)} modules' if len(sys.modules) > 500 else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Usage: zolr" in done.stdout, done.stderr


def test_help_is_grouped(zolr: Run) -> None:
    code, out, _ = zolr("finetune", "--help")
    places = [
        out.index(f"─ {panel} ─") for panel in ("Model", "Data", "Method", "Training", "Memory", "Output")
    ]
    assert code == 0 and places == sorted(places)
    assert "--model-name-or-path" not in out and "--output-dir" not in out


def test_every_verb_is_listed(zolr: Run) -> None:
    code, out, _ = zolr()
    assert code == 0 and all(f" {verb} " in out for verb in VERBS)


# ---- settings -----------------------------------------------------------------------------------------------------


def test_defaults_then_file_then_flags(zolr: Run, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('paradigm = "fo"\nbatch_size = 4\nlr = 1\nlabel-words = "yes,no"\n')
    code, out, _ = zolr("finetune", "--config", config, "--lr", "0.5", "--print-config")
    assert code == 0
    assert (
        'paradigm = "fo"' in out
        and "batch-size = 4" in out
        and "lr = 0.5" in out
        and 'label-words = ["yes,no"]' in out
    )
    assert 'model = "demo"' in out and 'task = "questions"' in out and "output" not in out
    again = tmp_path / "again.toml"
    again.write_text(out)
    assert zolr("finetune", "--config", again, "--print-config")[1] == out


def test_other_spellings(zolr: Run) -> None:
    short = zolr(
        "finetune", "--model", "m", "--task", "sst2", "--batch-size", 4, "--lr", 0.1, "--print-config"
    )
    words = (
        "--model_name_or_path",
        "m",
        "--per_device_train_batch_size",
        4,
        "--learning_rate",
        0.1,
        "--output_dir",
        "x",
    )
    assert zolr("finetune", *words, "--task", "sst2", "--print-config") == short
    assert short[0] == 0
    code, _, err = zolr("finetune", "--lr", 1, "--learning-rate", 2)
    assert code == 2 and "--learning-rate and --lr are the same setting" in err


@pytest.mark.parametrize(
    "content, message",
    [
        ("bacth-size = 4", "unknown setting 'bacth-size' in .*did you mean 'batch-size'"),
        ('rank = "4"', "--rank '4' in .*integer"),
        ("lr = true", "--lr True in .*number"),
        ("lr = nan", "--lr nan in .*finite"),
        ('schedule = "liner"', "--schedule 'liner' in .*did you mean 'linear'"),
        ("steps = 0", "--steps 0 in .*greater than or equal to 1"),
        ("steps = 1.5", "--steps 1.5 in .*integer"),
        ("steps = 3\nsteps = 4", "not valid TOML"),
        ("batch-size = 3\nbatch_size = 4", "sets 'batch-size' twice"),
        ("[run]\nsteps = 3", "unknown setting 'run'"),
        ("text-column = [1]", "--text-column"),
        ("lr = ", "not valid TOML"),
    ],
)
def test_bad_config_files(zolr: Run, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(content)
    failed(zolr("finetune", "--config", tmp_path / "run.toml"), 2, message)


# ---- mistakes -----------------------------------------------------------------------------------------------------


def failed(outcome: tuple[int, str, str], code: int, message: str) -> None:
    """One line on stderr with the cause and the way out, the right code, nothing on stdout."""
    import re

    assert outcome[0] == code, outcome
    lines = outcome[2].strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in outcome[2], outcome[2]
    assert sum(line.startswith("error") for line in lines) == 1
    assert re.search(message, lines[-1]), lines[-1]


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["finetune", "--projctor", "stiefel"], 2, "No such option: --projctor.*--projector"),
        (["finetun"], 2, "No such command 'finetun'.*'finetune'"),
        (["--verbose"], 2, "No such option"),
        (["finetune", "extra"], 2, "unexpected extra argument"),
        (["finetune", "--task", "sst3"], 2, "task 'sst3' is not known; did you mean 'sst[25]'"),
        (["finetune", "--method", "stifel"], 2, "method 'stifel' is not known.*stiefel"),
        (["finetune", "--projector", "stiefl"], 2, "projector 'stiefl' is not known.*stiefel"),
        (["finetune", "--optimizer", "adamW2"], 2, "optimizer 'adamW2' is not known"),
        (["finetune", "--transport", "kep"], 2, "transport 'kep' is not known.*keep"),
        (["finetune", "--paradigm", "first"], 2, "--paradigm 'first': .*fo"),
        (["finetune", "--method", "mezo", "--paradigm", "fo"], 2, "method 'mezo' runs under zo.*stiefel, dependent.*zolr methods lists"),
        (["finetune", "--method", "mezo", "--rank", 4], 2, "identity'? has no setting 'rank'; leave it out"),
        (["finetune", "--dtype", "float8"], 2, "--dtype 'float8': did you mean 'float"),
        (["finetune", "--device", "gpu"], 2, "--device 'gpu' is not there; .*cpu"),
        (["finetune", "--head", "class"], 2, "--head 'class': did you mean 'classes'"),
        (["finetune", "--rank", 0], 2, "rank"),
        (["finetune", "--rank", "four"], 2, "--rank.*integer"),
        (["finetune", "--eps", 0], 2, "eps = 0.0 .*positive"),
        (["finetune", "--eps", "nan"], 2, "--eps nan: .*finite"),
        (["finetune", "--lr", -1], 2, "--lr -1.0: .*greater than 0"),
        (["finetune", "--lr", "nan"], 2, "--lr nan: .*finite"),
        (["finetune", "--batch-size", 0], 2, "--batch-size 0: .*greater than or equal to 1"),
        (["finetune", "--steps", 0], 2, "--steps 0"),
        (["finetune", "--refresh-every", 0], 2, "refresh_every = 0"),
        (["finetune", "--probes", 0], 2, "0 probes.*at least 1"),
        (["finetune", "--signs", "both"], 2, "signs 'both' is not known.*together"),
        (["finetune", "--law", "cauchy"], 2, "law 'cauchy' is not known.*sphere"),
        (["finetune", "--sides", 3], 2, "sides = 3"),
        (["finetune", "--paradigm", "fo", "--signs", "together"], 2, "paradigm 'fo' has no setting 'signs'"),
        (["finetune", "--realization", "hook"], 2, "--realization 'hook': .*rebuild"),
        (["finetune", "--k", 3, "--train-rows", 9], 2, "k = 3 and train_rows = 9"),
        (["finetune", "--steps", 3, "--epochs", 1], 2, "--epochs 1.0 and --steps 3"),
        (["finetune", "--steps", 3, "--warmup", 3], 2, "--warmup 3 leaves none of 3 steps"),
        (["finetune", "--paradigm", "fo", "--objective", "accuracy"], 2, "--objective accuracy has no derivative.*--paradigm zo"),
        (["finetune", "--paradigm", "zo", "--checkpointing"], 2, "--checkpointing is for backprop.*leave it out"),
        (["finetune", "--paradigm", "fo", "--checkpointing", "selectiv"], 2, "'selectiv': did you mean 'selective'"),
        (["finetune", "--config", "absent.toml"], 2, "cannot read config file absent.toml"),
        (["finetune", "--model", "x", "--paradigm", "fo"], 2, "nothing to train on; give --task"),
        (["finetune", "--data-dir", "absent", "--task", "sst2"], 3, "absent: there is no train.tsv of task 'sst2'"),
        (["finetune", "--data", "absent.csv"], 3, "absent.csv: there is no such file"),
        (["finetune", "--data", "a.csv", "--data-dir", "D"], 2, "--data a.csv is read instead of .* --data-dir D; leave one"),
        (["finetune", "--task", "sst2", "--label-column", "x"], 2, "--label-column is about a file of your own; give .*--data"),
        (["finetune", "--validation", "v.csv"], 2, "--validation is about a file of your own"),
        (["evaluate", "demo", "--text-column", "x"], 2, "--text-column is about a file of your own"),
        (["evaluate", "demo", "--data", "a.csv", "--data-dir", "D"], 2, "--data a.csv is read instead of .*leave one"),
        (["evaluate", "demo", "--data-seed", 1], 2, "No such option: --data-seed"),
        (["finetune", "--head", "classes", "--template", "{text} {mask}"], 2, "--template is about the prompt, but .*classes.*leave it"),
        (["finetune", "--head", "classes", "--label-words", "a,b"], 2, "--label-words is about the prompt"),
        (["finetune", "--hold-rank", 8], 2, "--hold-rank 8 .*give --hold, or leave it out"),
        (["finetune", "--method", "galore", "--clip-by", "twice"], 2, "--clip-by twice says how to clip.*give --clip"),
        (["pretrain", "--data", "x", "--method", "galore", "--clip-by", "twice"], 2, "--clip-by twice says how.*give --clip"),
        (["finetune", "--method", "adamw", "--transport", "align"], 2, "--transport align is about .*leave it out"),
        (["pretrain", "--data", "x", "--transport", "keep"], 2, "--transport keep is about .*leave it out"),
        (["finetune", "--method", "lomo", "--scale", 0.25], 2, "--scale 0.25 is a factor on what is lifted.*leave it out"),
        (["finetune", "--resume"], 2, "--resume needs the run to go on with; give --output"),
        (["finetune", "--resume", "--output", "absent"], 4, "run folder absent does not exist"),
        (["evaluate", "absent/run", "--task", "sst5", "--data-dir", "."], 3, "train.tsv"),
        (["evaluate", "/absent"], 3, "model folder '/absent' does not exist"),
        (["evaluate", "hub/name"], 3, "there is no folder 'hub/name'; give a run folder, or --task or --data too .*of the hub"),
        (["evaluate", "absent"], 3, "there is no folder 'absent'; give a run folder"),
        (["evaluate", "llama-20m"], 2, "nothing to evaluate on; give --task"),
        (["finetune", "--model", "/absent", "--steps", 2], 3, "model folder '/absent' does not exist"),
        (["finetune", "--device", "cuda:99"], 2, "--device 'cuda:99' is not there; .*(without CUDA|no GPU|cuda:0)"),
        (["finetune", "--device", "meta"], 2, "holds no numbers"),
        (["predict"], 2, "needs a run folder"),
        (["predict", "absent"], 3, "absent is no finished run"),
        (["compare"], 2, "nothing to compare; give --methods"),
        (["compare", "--methods", "stiefel,mezzo"], 2, "method 'mezzo' is not known; did you mean 'mezo'"),
        (["compare", "--methods", "mezo:fo"], 2, "method 'mezo' runs under zo"),
        (["compare", "--methods", "adamw@lr"], 2, "'lr' in 'adamw@lr' is no setting; write it as @lr=1e-3"),
        (["compare", "--methods", "adamw@rl=1"], 2, "rl.*did you mean"),
        (["compare", "--methods", "adamw@lr=-1"], 2, "lr -1.*greater than 0"),
        (["methods", "galor"], 2, "method 'galor' is not known"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(
    zolr: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[object],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    failed(zolr(*arguments), code, message)
    assert list(tmp_path.iterdir()) == []


BAD_FILES = {
    "empty": (b"", 3, "the file is empty"),
    "header": (b"review,verdict\n", 3, "no row of data"),
    "renamed": (b"reviews,verdict\na,happy\n", 3, "no column 'review'; .*'reviews'"),
    "shifted": (b"review,verdict\na,b,happy\n", 3, "line 2: 3 fields.*quotes"),
    "one class": (b"review,verdict\n" + b"".join(b"text %d,happy\n" % i for i in range(20)), 3, "class"),
    "latin": ("review,verdict\ncaf\u00e9,happy\n".encode("latin1"), 3, "line 2: .*not UTF-8; .*iconv"),
    "null": (b"review,verdict\n\0,happy\n", 3, "NUL"),
    "no label": (b"review,verdict\ntext,\n", 3, "line 2"),
    "quote": (b'review,verdict\n"text,happy\n', 3, "line 2: a quote"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_end_in_one_line(zolr: Run, learn: list[object], tmp_path: Path, name: str) -> None:
    content, code, message = BAD_FILES[name]
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    failed(zolr(*learn, "--data", path), code, message)
    assert not (tmp_path / "run").exists()


def test_a_label_out_of_range(zolr: Run, learn: list[object], tmp_path: Path) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text("verdict\treview\n0\tno\n5\tyes\n")
    failed(zolr(*learn, "--data", path, "--task", "sst2", "--label-words", "happy,little"), 3, "line 3.*5")


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--label-words", "happy,terrible"], 2, "label word 'terrible' is .* tokens .*another word"),
        (["--label-words", "happy"], 2, "1 label words .*for 2 classes"),
        (["--label-words", "happy=happy,sadd=little"], 2, "no class 'sadd'; did you mean 'sad'"),
        (["--template", "{review} It was"], 2, "{mask} 0 times"),
        (["--template", "{text} It was {mask}"], 2, "unknown field 'text'"),
        (["--label-column", "verdikt"], 3, "no column 'verdikt'; .*'verdict'"),
        (["--max-length", 4000], 2, "--max-length 4000 is more than .* can read; use 512 or less"),
        (["--max-length", 2], 2, "no room for a text"),
        (["--rank", 4000], 2, "rank 4000 is larger than every trained matrix"),
        (["--train", "linaer"], 2, "'linaer' is no kind of weight.*linear"),
        (["--batch-size", 4000], 2, "--batch-size 4000 .*training rows; use less"),
        (["--k", 500], 3, "needs 1000"),
        (["--model", "/nowhere/model"], 3, "'/nowhere/model' does not exist"),
        (["--model", "stories.bin/../x/y"], 3, "does not exist"),
        (["--model", "llama-20m"], 2, "preset 'llama-20m' has no tokenizer"),
        (["--output", "/proc/zolr-run"], 4, "/proc/zolr-run"),
        (["--output", "/dev/null"], 4, "/dev/null is a file"),
        (["--output", "/dev/null/run"], 4, "/dev/null/run .*another --output"),
    ],
)  # fmt: skip
def test_mistakes_found_with_the_model(
    zolr: Run, learn: list[object], tmp_path: Path, arguments: list[object], code: int, message: str
) -> None:
    given = learn[:-2] if "--label-words" not in arguments else [a for a in learn[:-2] if a not in WORDS]
    output = [] if "--output" in arguments else learn[-2:]
    failed(zolr(*given, *output, *ZO, *arguments), code, message)
    assert list(tmp_path.iterdir()) == []


def test_a_projector_that_needs_a_gradient_is_refused_without_one(zolr: Run, tmp_path: Path) -> None:
    from zolr.projectors import PROJECTORS

    needing = [name for name, cls in PROJECTORS.items() if getattr(cls, "needs", "nothing") == "gradient"]
    if not needing:
        pytest.skip("no projector needs a gradient")
    for name in needing:
        failed(
            zolr("finetune", "--paradigm", "zo", "--projector", name),
            2,
            f"projector '{name}' needs a gradient.*--paradigm fo",
        )


def test_a_residual_is_refused_without_gradients(zolr: Run) -> None:
    for name in ("recover", "replace", "error_feedback"):
        failed(
            zolr("finetune", "--paradigm", "zo", "--residual", name),
            2,
            f"residual '{name}' needs dense gradients, which paradigm 'zo' does not give.*--paradigm fo",
        )
    failed(
        zolr("finetune", "--residual", "recovr"), 2, "residual 'recovr' is not known; did you mean 'recover'"
    )


def test_where_to_write_is_checked_before_anything_is_loaded(zolr: Run, tmp_path: Path) -> None:
    from zolr.cli.runs import check_free
    from zolr.errors import StorageError

    failed(
        zolr("finetune", "--model", "/absent", "--output", "/proc/zolr-run"),
        4,
        "output folder /proc/zolr-run",
    )
    (tmp_path / "taken.txt").write_text("mine")
    with pytest.raises(
        StorageError, match="is not empty; choose another --output$"
    ):  # replay has no other way
        check_free(tmp_path, overwrite=False, resume=False, way_out="")
    check_free(tmp_path / "deep" / "run", overwrite=False, resume=False)
    assert [p.name for p in tmp_path.iterdir()] == ["taken.txt"]


def test_only_a_run_is_replaced(tmp_path: Path) -> None:
    from zolr.cli.runs import check_free
    from zolr.errors import StorageError

    def replaces(folder: Path) -> bool:
        before = sorted(folder.rglob("*"))
        try:
            check_free(folder, overwrite=True, resume=False)
        except StorageError as error:
            assert "holds files and no run of zolr" in str(error)
            return False
        finally:
            assert sorted(folder.rglob("*")) == before
        return True

    settings = 'model = "demo"\nmethod = "adamw"\nparadigm = "fo"\nsteps = 2\n'
    ours = {"config.toml": settings, "metrics.jsonl": ""}
    cases = {
        "project": ({"README.md": "mine", "config.json": "{}", "model-best.safetensors": ""}, False),
        "model": ({"config.json": "{}", "model.safetensors": ""}, False),
        "empty": ({}, True),
        "finished": ({**ours, "result.json": "{}", "README.md": "", "notes.txt": "mine"}, True),
        "killed": (ours, True),
        "killed before its first metrics": (
            {"config.toml": settings, "data.json": "{}", "journal": ""},
            True,
        ),
        "settings beside a project": ({"config.toml": settings, "README.md": "mine"}, False),
        "of another program": ({**ours, "config.toml": "[tool]\nsteps = 2\n"}, False),
        "no text": ({**ours, "config.toml": "\0 = "}, False),
    }
    for name, (files, replaced) in cases.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        assert replaces(tmp_path / name) == replaced, name


def test_replacing_a_run_removes_what_runs_write(tmp_path: Path) -> None:
    from zolr.cli.runs import claimed

    run = tmp_path / "run"
    ours = (
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "adapter/adapter_config.json",
        "journal",
    )
    ours += ("checkpoints/step-2/manifest.json", "checkpoints/best-2/manifest.json")
    mine = ("model-best.safetensors", "adapter/notes.txt", "checkpoints/best-of-all/a", "notes.txt")
    for name in (*ours, *mine, "metrics.jsonl"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("old")
    (run / "config.toml").write_text('method = "adamw"\nparadigm = "fo"\nsteps = 2\n')

    def fill(folder: Path) -> None:
        (folder / "adapter").mkdir()
        for name in ("adapter/adapter_model.safetensors", "model.safetensors", "result.json"):
            (folder / name).write_text("new")

    with claimed(run, overwrite=True, resume=False) as place:
        (place.work / "checkpoints" / "step-4").mkdir(parents=True)
        place.complete(fill)
    new = ["adapter/adapter_model.safetensors", "checkpoints/step-4", "model.safetensors", "result.json"]
    kept = [*mine, "checkpoints/best-of-all", "config.toml", "metrics.jsonl", "adapter", "checkpoints"]
    assert sorted(str(p.relative_to(run)) for p in run.rglob("*")) == sorted(new + kept)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", [".", "..", "sub/..", "link"])
def test_a_folder_may_be_named_by_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from zolr.cli.runs import claimed

    run, far = tmp_path / "run", tmp_path / "far"
    inside = run / "sub" if name == ".." else tmp_path if name == "link" else run
    (run / "sub").mkdir(parents=True)
    far.mkdir()
    (tmp_path / "link").symlink_to(far)
    if name == ".":
        (run / "sub").rmdir()
    monkeypatch.chdir(inside)
    (Path(name) / "config.toml").write_text('method = "adamw"\nparadigm = "fo"\nsteps = 2\n')
    (Path(name) / "metrics.jsonl").touch()
    for text in ("new", "newer"):
        with claimed(Path(name), overwrite=True, resume=False) as place:
            assert place.work.resolve().parent == Path(name).resolve().parent
            place.complete(lambda folder, text=text: (folder / "result.json").write_text(text))
        assert (Path(name) / "result.json").read_text() == text
    with claimed(Path(name), overwrite=False, resume=True) as place:
        place.complete(lambda folder: (folder / "result.json").write_text("resumed"))
    assert (Path(name) / "result.json").read_text() == "resumed"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["far", "link", "run"]
    expected = {"config.toml", "metrics.jsonl", "result.json"}
    assert {p.name for p in Path(name).iterdir()} - {"sub"} == expected


def test_folders_that_name_nothing_to_evaluate_on(zolr: Run, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"verb": "pretrain"}')
    failed(
        zolr("evaluate", tmp_path), 2, "is a run of zolr pretrain, whose held-out loss is in .*give --task"
    )
    (tmp_path / "result.json").unlink()
    (tmp_path / "config.toml").write_text("")
    failed(zolr("evaluate", tmp_path), 3, "is no finished run: .*--resume --output")


def test_a_run_is_read_as_it_was_trained(zolr: Run, tmp_path: Path) -> None:
    from zolr.cli.workload import described
    from zolr.tasks import TASKS

    told = {"task": described(TASKS["sst2"]), "head": "classes", "metric": "accuracy"}
    (tmp_path / "task.json").write_text(json.dumps(told))
    failed(
        zolr("evaluate", tmp_path, "--head", "prompt"), 2, "was trained with --head classes.*leave --head out"
    )
    for flag, value in (("--template", "{sentence} {mask}"), ("--label-words", "bad,good")):
        found = zolr("evaluate", tmp_path, "--task", "sst2", flag, value)
        failed(found, 2, f"{flag} is about the prompt, but .* was trained with --head classes.*leave it out")
    failed(zolr("evaluate", tmp_path, "--label-column", "x"), 2, "--label-column is about a file of your own")


def test_a_folder_in_use_is_left_alone(zolr: Run, learn: list[object], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    failed(zolr(*learn, *FO), 4, "run is not empty; choose another --output, or --overwrite, or --resume")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_loss_that_is_not_finite(
    zolr: Run, learn: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zolr.cli.workload import Workload

    monkeypatch.setattr(
        Workload, "objective", lambda self, name: lambda model, batch: batch["labels"] * float("nan")
    )
    failed(zolr(*learn, *ZO, "--steps", 30), 5, "not finite in 20 steps in a row.*--lr")
    assert not (tmp_path / "run" / "result.json").exists()


def test_debugging_shows_the_traceback(zolr: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOLR_DEBUG", "1")
    with pytest.raises(ValueError, match="galor"):
        zolr("methods", "galor")


def test_the_unexpected_is_one_line_too(zolr: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from zolr.cli import doctor

    def broken() -> None:
        raise ZeroDivisionError("three\nlines\nhere")

    monkeypatch.setattr(doctor, "examined", broken)
    assert zolr("doctor") == (
        1,
        "",
        "error: unexpected ZeroDivisionError: three lines here (set ZOLR_DEBUG=1 for the traceback)\n",
    )


# ---- runs ---------------------------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("paradigm", ["fo", "zo"])
@pytest.mark.usefixtures("predicting")
def test_a_run_from_end_to_end(
    zolr: Run,
    learn: list[object],
    reviews: Path,
    tmp_path: Path,
    paradigm: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from zolr.cli import job

    numbers = FO if paradigm == "fo" else ZO
    run = tmp_path / "run"
    code, out, err = zolr(*learn, *numbers, "--json")
    assert code == 0, err
    assert (
        err.count("prompt  ") == 2
        and "0.0% of the training rows cut" in err
        and "step 6, validation rows: accuracy" in err
    )

    files = {p.name for p in run.iterdir()}
    expected = {
        "config.toml",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "metrics.jsonl",
        "memory.json",
        "task.json",
    }
    assert expected | {"result.json", "README.md"} <= files and "checkpoints" not in files
    assert {p.name for p in tmp_path.iterdir()} == {"run"}
    result = json.loads((run / "result.json").read_text())
    assert {**result, "folder": str(run)} == json.loads(out)
    assert (
        result["steps"] == 6
        and result["forwards"] == (18 if paradigm == "fo" else 24)  # zo: two batches a step
        and result["metric"] == "accuracy"
    )
    assert 0 < result["tokens_seen"] < result["tokens"] and result["peak_bytes_measured"] > 260_032 * 4
    assert result["peak_bytes_predicted"] == pytest.approx(result["peak_bytes_measured"], rel=0.25)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval" in line] == [0, 3, 6]
    card = (run / "README.md").read_text()
    assert f"paradigm `{paradigm}`" in card and "Stiefel(" in card and "library_name: transformers" in card

    # plain transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    model: Any = AutoModelForCausalLM.from_pretrained(run)
    assert type(model).__name__ == "LlamaForCausalLM"
    write = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(run))
    assert write("she was", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("she was")

    # the other verbs say the same of it
    code, out, err = zolr("evaluate", run, "--json")
    assert code == 0 and json.loads(out)["rows"] == result["rows"]["test"], err
    after = result["metrics"]["test"]["after"]
    assert json.loads(out)["accuracy"] == after["accuracy"] and json.loads(out)["loss"] == pytest.approx(
        after["loss"], rel=1e-5
    )
    code, out, err = zolr("evaluate", run, "--data", reviews)
    assert code == 0 and "80 rows" in " ".join(out.split()) and "accuracy" in out, (
        err
    )  # titles may be wrapped
    (tmp_path / "lines.txt").write_text("the day was happy\nhe was sad\n")
    code, out, _ = zolr("predict", run, tmp_path / "lines.txt")
    assert code == 0 and [line.split("\t")[0] in ("happy", "sad") for line in out.splitlines()] == [
        True,
        True,
    ]
    code, out, _ = zolr("predict", run, reviews, "--text-column", "review", "--json")
    first = json.loads(out.splitlines()[0])
    assert code == 0 and len(out.splitlines()) == 80
    assert first["probability"] == max(first["probabilities"].values()) and sum(
        first["probabilities"].values()
    ) == pytest.approx(1)

    # its config file repeats it, elsewhere
    monkeypatch.setattr(job.Job, "predicted", None)
    monkeypatch.chdir(tmp_path)
    code, out, err = zolr("finetune", "--config", run / "config.toml", "--quiet")
    again = tmp_path / "runs" / f"reviews-stiefel-{paradigm}-0"
    assert code == 0 and err == "" and f"run folder: runs/reviews-stiefel-{paradigm}-0" in out
    assert same(run, again) and (run / "config.toml").read_text() == (again / "config.toml").read_text()


def test_an_evaluation_names_what_was_measured(zolr: Run, learn: list[object], tmp_path: Path) -> None:
    numbers = ("--paradigm", "zo", "--method", "mezo", "--objective", "f1", "--steps", 1, "--lr", 1e-6)
    assert zolr(*learn, *numbers, "--batch-size", 4)[0] == 0
    run, other = tmp_path / "run", tmp_path / "other.csv"
    other.write_text("review,verdict\nshe was happy,happy\nhe was sad,sad\n")
    written = json.loads((run / "result.json").read_text())
    for given, name in (((), "reviews.csv"), (("--data", other), "other.csv")):
        code, out, err = zolr("evaluate", run, *given, "--json")
        assert code == 0, err
        found = json.loads(out)
        assert (found["task"], found["metric"]) == (name, written["metric"]) == (name, "f1")
        assert f"on {name}," in " ".join(zolr("evaluate", run, *given)[1].split())
    code, out, _ = zolr(
        "evaluate",
        MODEL,
        "--data",
        other,
        "--text-column",
        "review",
        "--label-column",
        "verdict",
        *WORDS,
        "--json",
    )
    assert code == 0 and json.loads(out)["task"] == "other.csv"


def test_a_classification_head(zolr: Run, learn: list[object], tmp_path: Path) -> None:
    numbers = ("--head", "classes", "--paradigm", "fo", "--steps", 2, "--lr", 1e-3, "--checkpointing")
    code, _, err = zolr(*[a for a in learn if a not in WORDS], *numbers)
    assert code == 0, err
    from transformers import pipeline

    told = pipeline("text-classification", model=str(tmp_path / "run"))("she was happy")
    assert told[0]["label"] in ("happy", "sad")
    code, out, _ = zolr("evaluate", tmp_path / "run", "--json")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert code == 0 and json.loads(out)["loss"] == pytest.approx(
        result["metrics"]["test"]["after"]["loss"], rel=1e-5
    )


NOTE = "note: model family 'llama' is computed by its stock forward, which holds full logits"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("verb", ["finetune", "pretrain"])
def test_a_warning_is_a_note_and_said_once(
    zolr: Run, learn: list[object], reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    from zolr import models

    monkeypatch.delitem(models.HEADS, "llama")
    sizes = ("--batch-size", 4, "--steps", 2, "--eval-every", 1)
    asked = [*learn[:-2], *sizes, "--paradigm", "fo"]
    if verb == "pretrain":
        asked = ["pretrain", "--model", MODEL, "--data", reviews, "--length", 16, *sizes]
    code, _, err = zolr(*asked, "--output", tmp_path / "loud")
    assert code == 0 and err.splitlines().count(NOTE) == 1, err
    assert err.count("stock forward") == 1 and "Warning" not in err
    code, _, err = zolr(*asked, "--output", tmp_path / "quiet", "--quiet")
    assert code == 0 and err == ""
    if verb == "finetune":
        code, _, err = zolr("evaluate", tmp_path / "quiet", "--json")
        assert code == 0 and err.splitlines() == [NOTE]


@pytest.mark.parametrize("objective", ["accuracy", "f1"])
def test_objectives_without_a_derivative(
    zolr: Run, learn: list[object], tmp_path: Path, objective: str
) -> None:
    code, _, err = zolr(
        *learn, *ZO, "--steps", 2, "--objective", objective, "--accumulate", 2, "--batch-size", 4
    )
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["loss"] <= 1 for line in lines if "loss" in line)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metric"] == (
        "f1" if objective == "f1" else "accuracy"
    )


@pytest.mark.parametrize("numbers", [FO, ZO], ids=["fo", "zo"])
def test_stopped_and_resumed_equals_uninterrupted(
    zolr: Run,
    learn: list[object],
    tmp_path: Path,
    numbers: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from zolr.cli.screen import Screen

    assert zolr(*learn, *numbers)[0] == 0
    cut, stepped = tmp_path / "cut", Screen.stepped

    def stopping(self: Screen, progress: Any, info: Any) -> None:
        stepped(self, progress, info)
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Screen, "stepped", stopping)
        code, _, err = zolr(*learn, *numbers, "--output", cut)
    said = f"interrupted by SIGTERM after step 5; saved, go on with --resume --output {cut}"
    assert code == 143 and err.splitlines()[-1] == said
    failed(zolr(*learn, *numbers, "--output", cut), 4, "not empty")
    peak = json.loads((cut / "memory.json").read_text())["peak_bytes_measured"]  # of the steps that were done
    assert peak > 0
    failed(
        zolr("finetune", "--resume", "--output", cut, "--steps", 3), 2, "--steps 3: .* has done 5 .*give 5 or"
    )
    failed(
        zolr("finetune", "--resume", "--output", cut, "--batch-size", 3),
        2,
        "--batch-size 3 differs from the run to resume",
    )
    code, _, err = zolr("finetune", "--resume", "--output", cut)
    assert code == 0, err
    assert same(tmp_path / "run", cut)
    whole, resumed = (json.loads((p / "result.json").read_text()) for p in (tmp_path / "run", cut))
    unequal = ("seconds", "peak_bytes_measured")
    assert resumed["peak_bytes_measured"] and "batch 0 x 0" not in (cut / "README.md").read_text()
    assert {k: v for k, v in whole.items() if k not in unequal} == {
        k: v for k, v in resumed.items() if k not in unequal
    }
    code, out, err = zolr("finetune", "--resume", "--output", cut, "--json")
    assert (
        code == 0 and "is finished; nothing to resume" in err and json.loads(out)["after"] == resumed["after"]
    )


def test_a_run_that_is_given_more_steps_says_so(zolr: Run, learn: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert zolr(*learn, *FO[:4], "--steps", 2, "--lr", 1e-3, "--eval-rows", 7, "--save-every", 2)[0] == 0
    was = json.loads((run / "result.json").read_text())
    code, out, _ = zolr("evaluate", run, "--json")  # on the rows of the run
    assert code == 0 and json.loads(out)["rows"] == 7 and json.loads(out)["accuracy"] == was["after"]
    code, _, err = zolr("finetune", "--resume", "--output", run, "--steps", 3)
    assert code == 0 and "from here on the rate follows the linear course of 3 steps" in err, err
    is_now = json.loads((run / "result.json").read_text())
    assert is_now["steps"] == 3 and is_now["peak_bytes_measured"] >= was["peak_bytes_measured"] > 0


def test_replacing_a_run(
    zolr: Run, learn: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zolr.cli import record

    run = tmp_path / "run"
    assert zolr(*learn, *FO, "--save-every", 2)[0] == 0
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.name.startswith("step")) == [
        "step-4",
        "step-6",
    ]
    (run / "notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for asked, said in (
        ((), "it has done 6 steps, and --steps 6 asks for no more"),
        (("--steps", 4), "--steps 4 asks for no more"),
    ):
        code, _, err = zolr("finetune", "--resume", "--output", run, *asked)
        assert code == 0 and "is finished; nothing to resume" in err and said in err, err
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before

    def fails(*_: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:  # the new run fails at the last moment
        patch.setattr(record, "card", fails)
        failed(zolr(*learn, *ZO, "--overwrite"), 4, "cannot write into output folder .*No space left")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    failed(zolr(*learn, *ZO, "--overwrite", "--rank", 4000), 2, "rank 4000")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before

    assert zolr(*learn, *ZO, "--overwrite")[0] == 0
    assert (
        json.loads((run / "result.json").read_text())["paradigm"] == "zo"
        and 'paradigm = "zo"' in (run / "config.toml").read_text()
    )
    assert (run / "notes.txt").read_text() == "mine" and not (run / "checkpoints").exists()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6 + 3


def test_two_processes_do_not_share_a_folder(zolr: Run, learn: list[object], tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    held = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        failed(zolr(*learn, *FO), 4, "another process is working in .*run")
    finally:
        os.close(held)


@pytest.mark.usefixtures("predicting")
def test_a_dry_run_writes_nothing(zolr: Run, learn: list[object], tmp_path: Path) -> None:
    code, out, err = zolr(*learn, *ZO, "--dry-run")
    assert (
        code == 0 and "predicted peak memory" in out and "memory -" not in out and err.count("prompt  ") == 2
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.usefixtures("predicting")
def test_why_there_is_no_prediction_is_said(zolr: Run, learn: list[object], dry: bool) -> None:
    away = ("--device-map", "cpu", "--device", "cpu")
    code, _, err = zolr(*learn, *ZO, *away, *(["--dry-run"] if dry else []))
    assert code == 0 and err.count("note: no memory prediction for weights that are away") == 1, err


def test_comparing_keeps_rows_that_failed(zolr: Run, learn: list[object], tmp_path: Path) -> None:
    small = (
        "--steps",
        2,
        "--eval-rows",
        4,
        "--batch-size",
        4,
        "--train-rows",
        8,
        "--checkpointing",
        "--json",
    )
    code, out, err = zolr("compare", *learn[1:-1], tmp_path / "all", "--methods", "sgd,stiefel:zo", *small)
    assert code == 0, err
    done, refused = json.loads(out)
    assert (
        done["method"] == "sgd"
        and done["steps"] == 2
        and done["seconds"] > 0
        and done["peak_bytes_measured"] > 0
    )
    assert refused["paradigm"] == "zo" and "--checkpointing is for backprop" in refused["error"]
    assert (tmp_path / "all" / "sgd-fo" / "result.json").is_file()
    code, out, err = zolr("compare", *learn[1:-1], tmp_path / "none", "--methods", "mezo", *small)
    assert code == 2 and len(json.loads(out)) == 1 and "every method failed" in err


# ---- tables -------------------------------------------------------------------------------------------------------


def test_methods(zolr: Run) -> None:
    from zolr.methods import METHODS

    code, out, _ = zolr("methods", "--json")
    rows = json.loads(out)
    assert code == 0 and [row["name"] for row in rows] == list(METHODS)
    for row in rows:
        assert all(f"{p}: learning rate " in row["fine-tuning"] for p in row["paradigms"])
        assert (
            list(row["composition"]) == row["paradigms"]
            and row["equation"]
            and row["reference"]
            and row["follows"]
        )
    code, out, _ = zolr("methods")
    assert code == 0 and all(f" {name} " in out for name in METHODS)
    code, out, _ = zolr("methods", "stiefel")
    assert code == 0 and "Stiefel(rank" in out and "equation" in out and "follows" in out


def test_doctor(zolr: Run) -> None:
    code, out, _ = zolr("doctor", "--json")
    found = json.loads(out)
    assert (
        code == 0
        and found["packages"]["torch"]
        and found["device"]["threads"] >= 1
        and found["disk"]["free_here_bytes"] > 0
    )
    code, out, _ = zolr("doctor")
    assert code == 0 and "torch" in out and "demo" in out and "matplotlib" in out


def test_the_demo_recipe_is_the_default() -> None:
    from zolr.cli.choices import DEFAULTS
    from zolr.cli.finetune import Finetune
    from zolr.methods import METHODS

    root = Path(__file__).parent.parent / "recipes"
    for paradigm in ("zo", "fo"):
        written = Finetune.gather({}, root / f"demo-{paradigm}.toml")
        typed = Finetune.gather({"paradigm": paradigm, "projector": "stiefel"}, None)
        assert written.filled().composed() == typed.filled().composed()
        numbers = DEFAULTS[paradigm]
        assert (written.steps, written.batch_size, written.accumulate or 1) == (
            numbers.steps,
            numbers.batch_size,
            numbers.accumulate,
        )
        assert (written.eval_every, written.schedule) == (numbers.eval_every, typed.schedule)
        assert written.train == METHODS["stiefel"].trained(paradigm)


def test_every_part_of_a_method_has_a_flag() -> None:
    import inspect

    from zolr.cli.choices import PARTS
    from zolr.cli.finetune import Finetune
    from zolr.methods import compose

    flags = {field.name for field in dataclasses.fields(Finetune)}
    arguments = set(inspect.signature(compose).parameters) - {"method", "paradigm", "estimator"}
    assert set(PARTS) == arguments and set(PARTS) <= flags
    given = {"law": "gaussian", "sides": 1, "directions": "orthonormal", "signs": "together", "probes": 2}
    made = Finetune.gather({"paradigm": "zo", **given}, None).composed().estimator
    assert {name: getattr(made, name) for name in given} == given


SWITCHED: list[tuple[tuple[str, ...], str]] = [
    ((), "false"),
    (("--checkpointing",), "true"),
    (("--checkpointing", "--lr", "1e-3"), "true"),
    (("--checkpointing", "on"), "true"),
    (("--checkpointing", "true"), "true"),
    (("--checkpointing", "false"), "false"),
    (("--checkpointing=off",), "false"),
    (("--no-checkpointing",), "false"),
    (("--checkpointing", "selective"), '"selective"'),
]


@pytest.mark.parametrize("written", ["true", '"true"', '"on"'])
def test_a_switch_of_a_config_file(zolr: Run, tmp_path: Path, written: str) -> None:
    (tmp_path / "run.toml").write_text(f'paradigm = "fo"\ncheckpointing = {written}\n')
    code, out, err = zolr("finetune", "--config", tmp_path / "run.toml", "--print-config")
    assert code == 0 and "checkpointing = true\n" in out, err


@pytest.mark.parametrize(("words", "expected"), SWITCHED)
def test_a_switch_goes_with_and_without_a_word(
    zolr: Run, tmp_path: Path, words: tuple[str, ...], expected: str
) -> None:
    code, out, err = zolr("finetune", "--paradigm", "fo", *words, "--print-config")
    assert code == 0 and f"checkpointing = {expected}\n" in out, err
    (tmp_path / "run.toml").write_text(out)
    code, again, err = zolr("finetune", "--config", tmp_path / "run.toml", "--print-config")
    assert code == 0 and again == out, err


def test_help_names_every_part_that_a_flag_takes(zolr: Run) -> None:
    from zolr.cli.choices import Composition
    from zolr.methods import PROJECTORS, RESIDUALS, TRANSPORTS

    told = {field.name: field.metadata["flag"].help for field in dataclasses.fields(Composition)}
    for flag, registry in (("projector", PROJECTORS), ("transport", TRANSPORTS), ("residual", RESIDUALS)):
        assert all(name in told[flag] for name in registry), (flag, told[flag])


def test_a_log_that_nobody_watches_has_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from zolr.cli import screen

    info: Any = SimpleNamespace(loss=2.0, skipped=False, slope=None, lr=1e-3)
    monkeypatch.setattr(screen, "SECONDS", 0.0)
    with screen.watching(screen.console(), lambda: (1, 2), 0, 9, rows="validation") as shown:
        progress: Any = SimpleNamespace(step=1, seconds=1.0, skipped=0, best_step=1)
        shown.stepped(progress, info)
        shown.evaluated(progress, {"accuracy": 0.5})
    said = capsys.readouterr().err
    assert "step 1/9 loss 2.0000" in said and "step 1, validation rows: accuracy 0.5000 (best so far)" in said


def test_the_printed_settings_say_what_is_chosen_later(zolr: Run, tmp_path: Path) -> None:
    code, out, _ = zolr("finetune", "--accumulate", 3, "--print-config")
    assert code == 0 and "\n# batch-size = 32, or less where" in out and "zolr methods stiefel" in out
    (tmp_path / "again.toml").write_text(out)  # comments are no settings
    assert zolr("finetune", "--config", tmp_path / "again.toml", "--print-config")[1] == out
