"""Every row on the command line: it pretrains and fine-tunes causal and masked models, and goes on after a kill as if there was none."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from zolr.cli import main
from zolr.methods import METHODS

ROWS = [(name, paradigm) for name, row in METHODS.items() for paradigm in row.paradigms]
WORDS = "the cat sat on a mat and who knows why it was there at noon with seven other cats".split()
STEPS, KILLED = 4, 3  # checkpoints after every second step: one before the kill, one step lost
KINDS = {"clm": 0, "mlm": 1}


def pretrain(folder: Path, objective: str, *more: object) -> list[str]:
    numbers = "--hidden-size 16 --heads 2 --layers 1 --length 16 --batch-size 4 --threads 1 --device cpu --eval-rows 4"
    given = ["--objective", objective, "--output", folder, "--quiet", "--steps", STEPS, "--save-every", 2]
    return ["pretrain", *numbers.split(), *map(str, (*given, *more))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a tokenizer, examples with two labels, and a model of either kind."""
    folder = tmp_path_factory.mktemp("rows")
    source = random.Random(0)
    lines = [" ".join(source.choices(WORDS, k=source.randint(3, 12))) for _ in range(300)]
    (folder / "corpus.txt").write_text("\n\n".join(lines) + "\n")
    examples = [f"{line} {source.choice(('cat', 'mat'))}" for line in lines[:60]]
    table = "".join(f"{x},{'one' if x.endswith('cat') else 'two'}\n" for x in examples)
    (folder / "examples.csv").write_text("text,label\n" + table)
    for objective in KINDS:
        more = ("--data", folder / "corpus.txt", "--train-tokenizer", "--vocab-size", 400)
        assert main(pretrain(folder / objective, objective, *more)) == 0
    return folder


def killed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of a process that runs the command and dies, without a last word, when a step begins."""
    from zolr.engine import Engine

    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    step, taken = Engine.step, [0]

    def dying(self: Any, batches: Any) -> Any:
        taken[0] += 1
        return step(self, batches) if taken[0] < KILLED + 1 else os._exit(77)

    monkeypatch.setattr(Engine, "step", dying)
    try:
        main(arguments)
    finally:
        os._exit(1)


def wrong_with(
    arguments: Callable[[Path], list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> str | None:
    """What differs between a run and the same run killed and resumed; None where nothing does."""
    whole, cut = folder / "whole", folder / "cut"
    if (code := main(arguments(whole))) != 0:
        return f"ended with {code}"
    if (code := killed(arguments(cut), monkeypatch)) != 77:
        return f"was to be killed and ended with {code}"
    if (code := main([*arguments(cut), "--resume"])) != 0:
        return f"could not be resumed: {code}"
    names = [p.relative_to(whole) for p in whole.rglob("*.safetensors") if "checkpoints" not in p.parts]
    if not names:
        return "left no weights"
    for name in names:
        a, b = load_file(whole / name), load_file(cut / name)
        different = [key for key in a if not torch.equal(a[key], b[key])]
        if a.keys() != b.keys() or different:
            return f"{name}: other weights {different[:3]} after a kill"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("objective", KINDS)
@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_every_row_runs_and_goes_on_after_a_kill_to_the_same_weights(
    verb: str, objective: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zolr.cli.planned import Planned

    # predictions have tests of their own, and take most of the time
    monkeypatch.setattr(Planned, "predicted", None)
    wrong = {}
    # the four ways take turns among the rows, which are many; adapters are for one of the verbs
    turn = 2 * (verb == "pretrain") + (objective == "clm")
    for i, (name, paradigm) in enumerate(ROWS):
        row = METHODS[name]
        if turn != (i % 2 if row.adapter is not None else i % 4):
            continue
        method = row.methods[paradigm]
        small = ["--method", name, "--paradigm", paradigm, "--lr", "1e-3"]
        if hasattr(method.projector, "rank") and name != "apollo-mini":
            small += ["--rank", "2"]
        if method.refresh_every is not None and method.refresh_every > 2:
            small += ["--refresh-every", "2"]

        def arguments(folder: Path, small: list[str] = small) -> list[str]:
            if verb == "pretrain":
                more = ("--data", place / "corpus.txt", "--tokenizer", place / objective, *small)
                return pretrain(folder, objective, *more)
            given = [
                "--model",
                place / objective,
                "--data",
                place / "examples.csv",
                "--template",
                "{text}{mask}",
            ]
            given += [
                "--label-words",
                "one=cat,two=mat",
                "--output",
                folder,
                "--steps",
                STEPS,
                "--save-every",
                2,
            ]
            given += ["--batch-size", 4, "--accumulate", 1, "--eval-every", STEPS, "--quiet", "--threads", 1]
            return ["finetune", *map(str, given), *small]

        found = wrong_with(arguments, tmp_path / f"{name}-{paradigm}", monkeypatch)
        if found is not None:
            wrong[f"{name}:{paradigm}"] = found
    assert not wrong
