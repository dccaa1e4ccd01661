"""`zolr estimate`: figures that add up, budgets that are kept, the number that a run predicts, and one line for every mistake."""

import dataclasses
import json
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, begun
from transformers import AutoConfig

from zolr.cli import estimate
from zolr.cli.config import spelled
from zolr.cli.estimate import MOST_ROWS, PLACES, assumed, bytes_of, expanded
from zolr.cli.variants import variant
from zolr.errors import UsageError
from zolr.memory import OVERHEAD, PARTS
from zolr.methods import METHODS

NUMBERS = dict(
    vocab_size=512, hidden_size=32, num_hidden_layers=2, max_position_embeddings=66, pad_token_id=1
)
FAMILY = {
    "roberta": dict(num_attention_heads=2, intermediate_size=128),
    "llama": dict(num_attention_heads=2, intermediate_size=128),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with nothing but a config in it."""
    return written(tmp_path / "model", "roberta")


def written(folder: Path, family: str, **changes: Any) -> Path:
    AutoConfig.for_model(family, **{**NUMBERS, **FAMILY[family], **changes}).save_pretrained(folder)
    return folder


SMALL = ("--batch-size", 4, "--max-length", 16)


def rows_of(outcome: tuple[int, str, str]) -> list[dict[str, Any]]:
    code, out, err = outcome
    assert code == 0, err
    return json.loads(out)["methods"]


def test_the_json_says_it_all(zolr: Run, folder: Path) -> None:
    code, out, err = zolr(
        "estimate", "--model", folder, *SMALL, "--method", "stiefel:zo,stiefel:fo", "--json"
    )
    found = json.loads(out)
    assert code == 0 and err.splitlines() == ["stiefel:zo ...", "stiefel:fo ..."]
    assert set(found) == {"model", "budget_bytes", "overhead", "methods"}
    assert found["overhead"] == OVERHEAD and found["budget_bytes"] is None
    for row, paradigm in zip(found["methods"], ("zo", "fo"), strict=True):
        assert (row["name"], row["method"], row["paradigm"]) == (f"stiefel:{paradigm}", "stiefel", paradigm)
        assert (row["batch_size"], row["max_length"], row["accumulate"]) == (4, 16, 1)
        assert (row["head"], row["dtype"], row["checkpointing"]) == ("prompt", "float32", False)
        assert row["device"] == "cuda"
        assert row["train"] == METHODS["stiefel"].trained(paradigm)
        assert list(row["parts"]) == list(PARTS) and sum(row["parts"].values()) == row["peak_bytes"]
        assert row["parts"]["weights"] == row["weights_bytes"]
        assert row["peak_bytes"] >= row["forward_peak_bytes"] > row["weights_bytes"] > 0
        assert row["assumptions"] and "largest_batch" not in row and "overhead" not in row
    zo, fo = found["methods"]
    assert zo["phase"] == "forward" and zo["module"].startswith("roberta.encoder.layer")
    assert fo["phase"] == "backward" and fo["peak_bytes"] > zo["peak_bytes"]


def test_the_readme_names_methods_and_flags_that_there_are() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    told = text.split("\n## Memory\n")[1].split("\n## ")[0]
    known = [f"--{spelled(f.name)}" for f in dataclasses.fields(estimate.Estimate)]
    for sentence in told.partition("before anything is downloaded")[2].split("`zolr finetune")[0].split(". "):
        flags = re.findall(r"(?<!\S)`?(--[a-z-]+)", re.sub(r"`?python benchmarks[^`]*", "", sentence))
        assert set(flags) <= set(known), sentence
    words = re.findall(r"[a-z]+:[a-z]+@[\w=@:.-]+", told)
    assert "stiefel:zo@train=all@rank=4" in words and all(variant(word) for word in words)


def test_a_config_file_is_the_folder_it_lies_in(zolr: Run, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "numbers of mine.json"
    other.write_text((folder / "config.json").read_text())
    asked = [
        rows_of(zolr("estimate", "--model", model, *SMALL, "--method", "adamw", "--json"))
        for model in (folder, folder / "config.json", other)
    ]
    assert asked[0] == asked[1] == asked[2]


@pytest.mark.parametrize("paradigm", ["zo", "fo"])
def test_the_number_is_that_of_a_dry_run(zolr: Run, paradigm: str) -> None:
    from zolr.cli.finetune import Finetune
    from zolr.cli.job import Job

    given: list[object] = ["--k", 4, "--batch-size", 3, "--eval-rows", 4]
    code, out, err = zolr("finetune", "--paradigm", paradigm, *given, "--dry-run", "--json", "--quiet")
    assert code == 0, err
    job = Job(Finetune.gather({"paradigm": paradigm, "k": 4, "batch_size": 3, "eval_rows": 4}, None))
    longest = max(len(one["input_ids"]) for one in job.train_set)
    size = ("--batch-size", 3, "--max-length", longest, "--method", f"stiefel:{paradigm}")
    (row,) = rows_of(zolr("estimate", *size, "--json"))
    assert row["peak_bytes"] == json.loads(out)["peak_bytes_predicted"]
    assert row["train"] == job.select


def test_a_step_on_the_host_is_predicted_as_a_run_there_does(zolr: Run, tmp_path: Path) -> None:
    """Of a model that drops out in attention, which keeps what it drops on the host alone."""
    from dataclasses import replace
    from shutil import copytree

    from zolr.cli.finetune import Finetune
    from zolr.cli.job import Job
    from zolr.models import located

    model = Path(copytree(located("demo")[0], tmp_path / "model"))
    numbers = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**numbers, "attention_dropout": 0.1}))
    given = {"model": str(model), "task": "questions", "method": "adamw", "paradigm": "fo", "device": "cpu"}
    job = Job(Finetune.gather({**given, "k": 8, "batch_size": 3, "eval_rows": 4}, None))

    def peak(batch: int) -> int:
        return job.peak(replace(job.settings, batch_size=batch))

    longest = max(len(one["input_ids"]) for one in job.train_set)
    budget = (peak(1) + peak(40)) // 2
    asked = ("estimate", "--model", model, "--batch-size", 3, "--max-length", longest, "--method", "adamw")
    asked = (*asked, "--budget", f"{budget}B", "--json")
    (host,) = rows_of(zolr(*asked, "--device", "cpu"))
    assert host["device"] == "cpu" and host["peak_bytes"] == job.predicted
    assert 1 < host["largest_batch"] < 40
    assert peak(host["largest_batch"]) <= budget < peak(host["largest_batch"] + 1)
    (card,) = rows_of(zolr(*asked))
    assert card["device"] == "cuda" and card["largest_batch"] > host["largest_batch"]


def test_the_largest_batch_fits_and_one_more_does_not(zolr: Run, folder: Path) -> None:
    def peak(batch: int) -> int:
        size = ("--batch-size", batch, "--max-length", 16)
        (row,) = rows_of(zolr("estimate", "--model", folder, *size, "--method", "stiefel:fo", "--json"))
        return row["peak_bytes"]

    budget = (peak(1) + peak(24)) // 2
    size = ("--batch-size", 1, "--max-length", 16, "--budget", f"{budget / 2**20:.6f}MiB")
    code, out, err = zolr("estimate", "--model", folder, *size, "--method", "stiefel:fo", "--json")
    assert code == 0, err
    limit, (row,) = json.loads(out)["budget_bytes"], json.loads(out)["methods"]
    assert limit == pytest.approx(budget, abs=2)
    assert 1 < row["largest_batch"] < 24
    assert peak(row["largest_batch"]) <= limit < peak(row["largest_batch"] + 1)


def test_a_budget_that_not_one_row_fits(zolr: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    asked = ("estimate", "--model", folder, *SMALL, "--method", "stiefel:zo,adamw")
    zo, adamw = rows_of(zolr(*asked, "--json"))
    between = (zo["peak_bytes"] + adamw["parts"]["weights"] + adamw["optimizer_bytes"]) // 2
    assert zo["peak_bytes"] < between  # a forward takes less than weights and moments alone
    code, out, err = zolr(*asked, "--budget", f"{between}B", "--json")
    zo, adamw = json.loads(out)["methods"]
    assert code == 0 and zo["largest_batch"] >= 4 and zo["one_row_bytes"] <= between, err
    assert adamw["largest_batch"] == 0 and adamw["one_row_bytes"] > between
    code, out, _ = zolr(*asked, "--budget", f"{between}B")
    assert code == 0 and re.search(r"adamw:fo .*none: one row takes \d", out)
    code, out, _ = zolr(*asked[:-1], "stiefel:zo@max-length=1", "--budget", "9TiB")
    assert code == 0 and re.search(rf"stiefel:zo@max-length=1 .* {MOST_ROWS} or more", out)


def test_the_largest_batch_names_the_accumulation_that_it_is_of() -> None:
    """Two batches of a step are both there: with --batch-size 59 alone, there is one of them, and 59 fits."""
    assert estimate._fitting({"largest_batch": 58, "accumulate": 2}, 1) == "58 with --accumulate 2"
    assert estimate._fitting({"largest_batch": 59, "accumulate": 1}, 1) == "59"


@pytest.mark.parametrize(
    "text, size",
    [
        ("4GiB", 4 * 2**30),
        ("4GB", 4 * 10**9),
        ("4096MiB", 4 * 2**30),
        ("3.5G", 7 * 2**29),
        ("3.5g", 7 * 2**29),
        (" 512 kb ", 512_000),
        ("0.5TiB", 2**39),
        ("700B", 700),
    ],
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize(
    "text", ["", "4", "GiB", "four GB", "-4GB", "0GiB", "nan GB", "4GiBs", "4 G B", "1e3MB", "4,5GB"]
)
def test_what_is_no_amount_of_memory(zolr: Run, text: str) -> None:
    with pytest.raises(UsageError, match="such as 4GiB"):
        bytes_of(text)
    code, out, err = zolr("estimate", f"--budget={text}")
    assert (code, out) == (2, "") and f"--budget '{text}' is no amount of memory" in err
    assert len(err.splitlines()) == 1


def test_all_stands_for_every_row_under_every_paradigm() -> None:
    pairs = [f"{name}:{paradigm}" for name, row in METHODS.items() for paradigm in row.paradigms]
    assert expanded(["all"]) == pairs and len(pairs) > len(METHODS)
    assert expanded(["all:fo@rank=4"]) == [f"{pair}@rank=4" for pair in pairs if pair.endswith(":fo")]
    assert expanded(["mezo, all:fwd", "lozo"]) == ["mezo", "stiefel:fwd", "lozo"]
    ranks = "@ranks=q_proj=16,up_proj=8"
    assert expanded([f"mezo,all:fwd{ranks},lozo"]) == ["mezo", f"stiefel:fwd{ranks}", "lozo"]


def test_every_method_has_its_row(zolr: Run, tmp_path: Path) -> None:
    folder = written(tmp_path / "model", "llama", num_hidden_layers=1)
    size = ("--batch-size", 2, "--max-length", 8)
    some = expanded(["all"])[::4]  # what each is predicted to be is held against real steps elsewhere
    rows = rows_of(
        zolr(
            "estimate",
            "--model",
            folder,
            *size,
            "--method",
            ",".join(f"{p}@train=all" for p in some),
            "--json",
        )
    )
    assert [row["name"] for row in rows] == [f"{pair}@train=all" for pair in some]
    for row in rows:
        assert "error" not in row, row
        assert sum(row["parts"].values()) == row["peak_bytes"]
        assert row["train"] == ("adapter" if METHODS[row["method"]].adapter else "all")


def test_a_method_that_cannot_be_predicted_keeps_its_row(zolr: Run, folder: Path) -> None:
    asked = ("estimate", "--model", folder, *SMALL, "--method")
    unknown = "adamw@memory-budget=1MiB,adamw@device=mps,stiefel@shard=true"
    budget, away, pieces, _ = rows_of(zolr(*asked, f"{unknown},mezo", "--json"))
    assert "weights in pieces is not predicted" in pieces["error"]
    assert "leave it out, and give --budget" in budget["error"] and "use one of them" in away["error"]
    rows = rows_of(zolr(*asked, "mezo@checkpointing=true,stiefel@rank=4000,stiefel:fo", "--json"))
    refused, ranked, fine = rows
    assert refused["name"] == "mezo:zo@checkpointing=true" and "is for backprop" in refused["error"]
    assert "rank 4000 is larger than every trained matrix" in ranked["error"] and ranked["paradigm"] == "zo"
    assert fine["peak_bytes"] > 0 and "error" not in fine
    code, out, _ = zolr(*asked, "stiefel@rank=4000,mezo")
    assert code == 0 and "stiefel:zo@rank=4000 is not predicted: rank 4000 is larger" in out
    code, out, err = zolr(*asked, "stiefel@rank=4000", "--json")
    assert code == 2 and len(json.loads(out)["methods"]) == 1
    assert err.splitlines()[-1].startswith("error: no method can be predicted; the first one: rank 4000")


def test_methods_have_settings_of_their_own(zolr: Run, folder: Path) -> None:
    own = "adamw@batch-size=2@max-length=8@dtype=bfloat16@head=classes,adamw,stiefel@train=all"
    asked = ("estimate", "--model", folder, *SMALL, "--checkpointing", "--method", own, "--json")
    low, plain, every = rows_of(zolr(*asked))
    assert (low["batch_size"], low["max_length"], low["dtype"], low["head"]) == (2, 8, "bfloat16", "classes")
    assert (plain["batch_size"], plain["max_length"], plain["head"]) == (4, 16, "prompt")
    assert low["weights_bytes"] < 0.7 * plain["weights_bytes"]
    assert (low["checkpointing"], plain["checkpointing"]) == (True, True)
    # backprop is all that recomputes; under zo the flag has nothing to do
    assert (every["paradigm"], every["checkpointing"], every["train"]) == ("zo", False, "all")


def test_settings_of_a_run_change_the_figures(zolr: Run, folder: Path) -> None:
    size = ("--batch-size", 16, "--max-length", 64)
    asked = ("estimate", "--model", folder, *size, "--method", "adamw", "--json")
    (plain,) = rows_of(zolr(*asked))
    (checkpointed,) = rows_of(zolr(*asked, "--checkpointing"))
    (every_token,) = rows_of(zolr(*asked, "--head", "lm"))
    (classes,) = rows_of(zolr(*asked, "--head", "classes", "--classes", 300))
    (fewer,) = rows_of(zolr(*asked, "--head", "classes"))
    assert checkpointed["parts"]["activations"] < plain["parts"]["activations"]
    assert every_token["parts"]["logits"] >= 16 * 64 * NUMBERS["vocab_size"] * 4 > plain["parts"]["logits"]
    assert classes["weights_bytes"] - fewer["weights_bytes"] == pytest.approx(298 * 33 * 4, abs=1024)


def test_batches_are_those_of_finetune_unless_given(zolr: Run, folder: Path) -> None:
    from zolr.cli.choices import DEFAULTS

    asked = ("estimate", "--model", folder, "--max-length", 4, "--method", "sgd,mezo", "--json")
    for row in rows_of(zolr(*asked)):
        numbers = DEFAULTS[row["paradigm"]]
        assert (row["batch_size"], row["accumulate"]) == (numbers.batch_size, numbers.accumulate)
    for row in rows_of(zolr(*asked, "--accumulate", 3)):
        assert row["accumulate"] == 3


def test_the_tables(zolr: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = zolr("estimate", "--model", folder, *SMALL, "--method", "stiefel:zo,adamw", "--quiet")
    assert (code, err) == (0, "")
    for heading in (*PARTS[:-1], "method", "peak", "x forward", "phase", "module"):
        assert f" {heading} " in out
    assert re.search(r"stiefel:zo +4 x 16 +\d+ [KMG]iB", out) and re.search(r"adamw:fo +backward", out)
    assert f"overhead, in none of the figures: {OVERHEAD}" in out
    assert out.count(f"assumed: {PLACES['cuda']}\n") == 1
    assert out.count("assumed: 4 x 16 tokens a micro-batch, float32 weights\n") == 1
    assert "trains attention, prompt loss, accumulates 1 (stiefel:zo)" in out


def test_the_tables_break_no_word_where_there_is_little_room(
    zolr: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    methods = ",".join(f"stiefel:zo@eps=1e-{i}@rank={i}" for i in range(2, 6))
    code, out, err = zolr("estimate", "--model", folder, *SMALL, "--method", methods, "--quiet")
    assert (code, err) == (0, "")
    turned = out.split("what the peak is made of")
    assert len(turned) > 2  # in parts, one below the other
    for part in PARTS[:-1]:
        assert all(re.search(rf"^ {part} .*\d", each, re.MULTILINE) for each in turned[1:]), part
    for i in range(2, 6):
        assert len(re.findall(rf"stiefel:zo@eps=1e-{i}@rank={i}\s", out)) >= 3


def test_assumptions_that_differ_name_their_methods() -> None:
    shared = dict(assumptions=["rows are padded"], head="prompt", accumulate=1, checkpointing=False)
    shared |= {"device": "cpu"}
    lines = assumed([{"name": "a", "train": "all", **shared}, {"name": "b", "train": "bias", **shared}])
    assert lines[:2] == ["rows are padded", PLACES["cpu"]]
    assert lines[2].endswith("(a)") and lines[3].endswith("(b)")


CONFIGS = {
    "no JSON": ("{", 3, "is damaged"),
    "a list": ("[1]", 3, "names no 'model_type'"),
    "no family": ('{"hidden_size": 4}', 3, "names no 'model_type'; give a config.json, a folder or a preset"),
    "unknown family": ('{"model_type": "robberta"}', 3, "is no config that transformers can use: .*robberta"),
    "bad number": (
        '{"model_type": "llama", "hidden_size": "many"}',
        3,
        "no config that transformers can use: .*'hidden_size': TypeError: .* expected int, got str",
    ),
    "numbers that contradict each other": (
        '{"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}',
        3,
        r"The hidden size \(65\) is not a multiple of the number of attention heads \(4\); correct it",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files_that_cannot_be_used(zolr: Run, tmp_path: Path, name: str) -> None:
    text, code, message = CONFIGS[name]
    path = tmp_path / "config.json"
    path.write_text(text)
    failed(zolr("estimate", "--model", path, "--method", "sgd"), code, message)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_is_not_predicted_and_says_why(zolr: Run, tmp_path: Path, family: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": family}))
    given = ("estimate", "--model", path, "--head")
    failed(
        zolr(*given, "classes"), 2, f"'{family}' is an encoder-decoder, whose classification head looks for"
    )
    failed(zolr(*given, "prompt"), 2, f"'{family}' is an encoder-decoder; use a masked or a causal model")


def failed(outcome: tuple[int, str, str], code: int, message: str) -> None:
    """One line on stderr with the cause and the way out, the right code, nothing on stdout."""
    assert outcome[:2] == (code, ""), outcome
    (line,) = outcome[2].strip().splitlines()
    assert line.startswith("error: ") and re.search(message, line), line


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--method", "mezzo"], 2, "--method: method 'mezzo' is not known; did you mean 'mezo'"),
        (["--method", "mezo:fo"], 2, "method 'mezo' runs under zo"),
        (["--method", "all:first"], 2, "no method runs under 'first'; use one of .*fo"),
        (["--method", "adamw@method=sgd"], 2, "--method: 'method=sgd' in .* comes first in such a word; write sgd$"),
        (["--method", "adamw@output=x"], 2, "--method: 'output' in 'adamw@output=x': where and how often .*; leave it out$"),
        (["--method", "all@json=true"], 2, "'json' in .*; leave it out$"),
        (["--method", "adamw@lr"], 2, "--method: 'lr' in 'adamw@lr' is no setting"),
        (["--method", "adamw@bacth-size=2"], 2, "unknown setting 'bacth-size'; did you mean 'batch-size'"),
        (["--method", ""], 2, "nothing to estimate; give --method"),
        (["--model", "roberta-larg"], 3, "did you mean 'roberta-large'"),
        (["--model", "/nowhere/model"], 3, "'/nowhere/model' does not exist"),
        (["--batch-size", 10**20], 2, "--batch-size 1000.*: .*less than or equal to 2147483648$"),
        (["--batch-size", 0], 2, "--batch-size 0: .*greater than or equal to 1"),
        (["--max-length", 0], 2, "--max-length 0: .*greater than or equal to 1"),
        (["--classes", 1], 2, "--classes 1: .*greater than or equal to 2"),
        (["--dtype", "float8"], 2, "--dtype 'float8': did you mean 'float"),
        (["--head", "class"], 2, "--head 'class': did you mean 'classes'"),
        (["--budgt", "4GB"], 2, "No such option: --budgt.*--budget"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(
    zolr: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[object], code: int, message: str
) -> None:
    # no way out to the hub, so that an unknown name costs no time
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    failed(zolr("estimate", *arguments), code, message)


def test_a_length_that_the_model_cannot_read(zolr: Run, folder: Path) -> None:
    asked = ("estimate", "--model", folder, "--max-length", 65, "--batch-size", 1)
    message = "^error: --max-length 65 is more than model .*; use 64 or less$"
    failed(zolr(*asked, "--method", "sgd,mezo"), 2, message)  # once, not in every row
    own = rows_of(zolr(*asked, "--method", "sgd,sgd@max-length=8", "--json"))
    assert "use 64 or less" in own[0]["error"] and own[1]["max_length"] == 8


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(num_attention_heads=4, num_key_value_heads=3),
            "^error: .*num_attention_heads = 4.*num_key_value_heads = 3; correct",
        ),
        (dict(vocab_size=-5), "^error: .* has vocab_size = -5; write at least 1 there$"),
        (dict(num_hidden_layers=0), "^error: .* has num_hidden_layers = 0; write at least 1 there$"),
        (dict(vocab_size=1), "has vocab_size = 1 and pad_token_id = 1, where padding has no row; correct"),
        (dict(attention_dropout="much"), "no config that transformers can use"),
    ],
)
def test_numbers_that_no_model_can_have(
    zolr: Run, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "numbers.json"
    path.write_text(json.dumps({"model_type": "llama", **NUMBERS, **FAMILY["llama"], **changes}))
    code, _, err = zolr("estimate", "--model", path, *SMALL, "--method", "stiefel:zo")
    last = err.strip().splitlines()[
        -1
    ]  # transformers warns of token ids, and rows say what building a model said
    assert code == 3 and last.startswith("error: ") and re.search(message, last), err


def test_a_head_that_the_family_does_not_have(zolr: Run, tmp_path: Path) -> None:
    AutoConfig.for_model("granite", **NUMBERS).save_pretrained(tmp_path)
    outcome = zolr("estimate", "--model", tmp_path, *SMALL, "--head", "classes", "--method", "sgd,mezo")
    failed(outcome, 2, "^error: model family 'granite' has no classification head .*; use --head prompt")


@pytest.mark.slow
def test_methods_predicted_side_by_side_are_those_one_by_one(
    zolr: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "WORTH_IT", 0.0)
    methods = "stiefel:zo,adamw,stiefel@rank=4000,stiefel:fo"
    asked = ("estimate", "--model", folder, *SMALL, "--budget", "1MiB", "--method", methods, "--json")
    alone, beside = (zolr(*asked, "--processes", number) for number in (1, 2))
    assert rows_of(alone) == rows_of(beside) and alone[2] == beside[2]
    assert [line.split(" ")[0] for line in alone[2].splitlines()] == [
        "stiefel:zo",
        "adamw:fo",
        "stiefel:zo@rank=4000",
        "stiefel:fo",
    ]
    assert len(rows_of(alone)) == 4


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="helpers are found by what the system lists")
def test_an_interrupted_run_leaves_no_helper(tmp_path: Path) -> None:
    mark = f"MARK={tmp_path}".encode()

    def helpers() -> int:
        found = 0
        for place in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                found += mark in place.read_bytes().split(b"\0")
        return found

    def until(reached: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not reached():
            assert time.monotonic() < end, (tmp_path / "err").read_text()
            time.sleep(0.1)

    asked = ["estimate", "--model", "roberta-base", "--batch-size", "4", "--max-length", "64"]
    asked += ["--method", "all", "--processes", "2"]
    process = begun("zolr", asked, {"MARK": str(tmp_path)}, tmp_path / "out", tmp_path / "err")
    until(lambda: helpers() >= 3)  # the one that others are forked from, and two
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    until(lambda: helpers() == 0)
