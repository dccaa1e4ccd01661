"""Runs of every kind made again from their journal on the command line: equal bits, and folders that can be used."""

import json
from pathlib import Path

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file

ZO = ("--paradigm", "zo", "--rank", 2, "--lr", 1e-3, "--eps", 1e-3, "--steps", 6, "--quiet")
TASK = ("finetune", *ZO, "--batch-size", 4, "--max-length", 24, "--k", 4, "--eval-rows", 8, "--eval-every", 3)
TEXTS = "the answer is no\nwho was first\n"


@pytest.fixture(autouse=True)
def unpredicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without a memory prediction, which takes longer than they do."""
    from zolr.cli.job import Job

    monkeypatch.setattr(Job, "predicted", None)


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names and names == sorted(path.name for path in other.glob("*.safetensors"))
    for name in names:
        a, b = load_file(one / name), load_file(other / name)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    return True


def used(zolr: Run, run: Path, again: Path, texts: Path) -> None:
    """The folder of a replay labels texts, and measures, as that of the run does."""
    said = []
    for verb in (("predict", "{}", texts), ("evaluate", "{}", "--json")):
        for folder in (run, again):
            code, out, err = zolr(*(folder if part == "{}" else part for part in verb))
            assert code == 0, err
            said.append(out.replace(str(folder), ""))
    assert said[0] == said[1] and said[2] == said[3]


KINDS = {
    "lora": ("--method", "lora"),
    "lora, classes": ("--method", "lora", "--head", "classes"),
    "held": ("--hold", "--refresh-every", 2),
    "int8": ("--quantize", "int8", "--refresh-every", 2),
    "away": ("--device-map", "cpu", "--device", "cpu", "--refresh-every", 2),
}
SLOW = ("lora, classes", "int8")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in KINDS])
def test_a_run_made_again_is_the_run_and_can_be_used(zolr: Run, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("torchao" if kind == "int8" else "peft")
    run, again, texts = tmp_path / "run", tmp_path / "again", tmp_path / "texts.txt"
    texts.write_text(TEXTS)
    code, _, err = zolr(*TASK, *KINDS[kind], "--output", run)
    assert code == 0, err
    code, out, err = zolr("replay", run, "--output", again)
    assert code == 0 and "hashes of weights and state compared" in out, err
    assert same(run, again)
    used(zolr, run, again, texts)


def test_a_journal_that_was_given_away_makes_a_folder_that_can_be_used(zolr: Run, tmp_path: Path) -> None:
    run, given, again, texts = (tmp_path / name for name in ("run", "given", "again", "texts.txt"))
    texts.write_text(TEXTS)
    code, _, err = zolr(*TASK, "--output", run)
    assert code == 0, err
    for arguments in (
        ("export", run, "--journal", given),
        ("replay", given, "--base", "demo", "--output", again),
    ):
        code, _, err = zolr(*arguments)
        assert code == 0, err
    assert same(run, again)
    said = [zolr("predict", folder, texts) for folder in (run, again)]
    assert said[0] == said[1] and len(said[0][1].splitlines()) == 2
    code, _, err = zolr("evaluate", again)
    assert code == 3 and "does not say what the run was tested on; give --task or --data" in err
    code, out, err = zolr("evaluate", again, "--task", "questions", "--eval-rows", 12, "--json")
    assert code == 0 and json.loads(out)["rows"] == 12, err
    (again / "task.json").unlink()
    code, _, err = zolr("predict", again, texts)
    assert code == 3 and "copy task.json of the run into it" in err


def test_a_pretrained_run_is_made_again_from_its_first_numbers(zolr: Run, tmp_path: Path) -> None:
    text, run, again = tmp_path / "text.txt", tmp_path / "run", tmp_path / "again"
    text.write_text("".join(f"The {i} mice of house {i % 7} met {i * i % 11} cats.\n\n" for i in range(300)))
    shape = ("--hidden-size", 16, "--layers", 1, "--heads", 2, "--vocab-size", 280, "--length", 16)
    course = (
        "--method",
        "stiefel",
        "--batch-size",
        4,
        "--eval-rows",
        4,
        "--refresh-every",
        2,
        "--train",
        "all",
        "--output",
        run,
    )
    code, _, err = zolr("pretrain", "--data", text, "--train-tokenizer", *shape, *ZO, *course)
    assert code == 0, err
    code, out, err = zolr("replay", run, "--output", again)
    assert code == 0, err
    assert same(run, again)
    assert (again / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    code, _, err = zolr(*("replay", run, "--base", "demo"))
    assert code in (2, 3) and "journal" in err


def test_what_was_made_again_is_said() -> None:
    from zolr.cli.replay import made_again

    assert made_again(7, 11) == "steps 1 to 7 of 11 made again"
    assert made_again(0, 11) == "none of 11 steps made again: the weights before the first"


def test_a_journal_that_was_put_aside_is_named(zolr: Run, tmp_path: Path) -> None:
    for words in ("was damaged, and is", "is no run without backprop"):
        for line in (("replay", tmp_path), ("export", tmp_path, "--journal", tmp_path / "given")):
            (tmp_path / "journal.damaged").write_text("")
            if "damaged" not in words:
                (tmp_path / "journal.damaged").unlink()
            code, _, err = zolr(*line)
            assert code == 3 and words in err, err
