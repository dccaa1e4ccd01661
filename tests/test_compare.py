"""`zolr compare`: equal budgets that are kept, time against forwards, rows that failed for a reason, and what is shown of them."""

import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, begun
from test_cli import failed

from zolr.cli import compare, race
from zolr.cli.compare import DONE, FAILED, KILLED, NO_MEMORY, NOT_RUN, Terms, labels, markdown, outcome
from zolr.cli.race import Allowance, Price
from zolr.cli.variants import methods_in, variant
from zolr.errors import UsageError
from zolr.training import Progress

SMALL = ("--k", 4, "--eval-rows", 8, "--batch-size", 4, "--accumulate", 1)


def curves(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- real runs ----------------------------------------------------------------------------------------------------


def timed_in_few_pairs(*given: Any) -> None:
    """What the process of a run does, in less time."""
    race.PAIRS = (3, 3)
    race.main(*given)


def test_every_method_spends_the_same_forwards(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare.race, "main", timed_in_few_pairs)
    pytest.importorskip("matplotlib")
    out, plot, table = tmp_path / "all", tmp_path / "pictures" / "all.png", tmp_path / "all.md"
    methods = "adamw,stiefel:zo@rank=2"
    places = ("--output", out, "--plot", plot, "--markdown", table)
    equal = ("--equal", "forwards=150", "--memory-budget", "1TiB")
    code, printed, err = zolr("compare", "--methods", methods, *SMALL, *equal, *places, "--json")
    assert code == 0, err
    rows = json.loads(printed)
    adamw, stiefel = rows
    assert [row["status"] for row in rows] == [DONE] * 2
    assert [row["label"] for row in rows] == ["adamw", "stiefel:zo rank=2"]
    # a step of backprop is three forwards, of a probe two; stiefel finds its rate first, which counts
    assert adamw["steps"] == 50 and 0 < stiefel["steps"] < 75 and stiefel["batch_size"] == 4
    assert all(148 <= row["forwards"] <= 150 for row in rows)
    for row in rows:
        folder = Path(row["folder"])
        result = json.loads((folder / "result.json").read_text())
        assert {key: row[key] for key in ("before", "after", "forwards")} == {
            key: result[key] for key in ("before", "after", "forwards")
        }
        lines = curves(folder)
        assert sum("eval" in line for line in lines) >= 4
        assert lines[-1]["step"] == row["steps"] and lines[-2]["forwards"] == row["forwards"]
        rates = [line["lr"] for line in lines if "lr" in line]
        assert rates[-1] < 0.05 * rates[0]  # it falls to zero where the budget ends
        assert row["pairs"] == 3
        low, high = row["step_over_two_forwards_quartiles"]
        assert 0 < low <= row["step_over_two_forwards"] <= high
        assert row["step_over_adamw"] == pytest.approx(
            row["step_over_two_forwards"] / adamw["step_over_two_forwards"], abs=1e-3
        )
    saved = json.loads((out / "compare.json").read_text())
    assert saved["equal"] == ["forwards", 150] and saved["methods"] == rows
    text = table.read_text()
    assert text.count("\n| `") == 2 and "| `stiefel:zo rank=2` |" in text and "150 forward passes" in text
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 20_000
    # the resolved settings repeat the run without its budget, and no way of taking steps was changed for it
    config = out / "stiefel-zo-rank=2" / "config.toml"
    assert "memory-budget" not in config.read_text()
    code, printed, err = zolr("finetune", "--config", config, "--output", tmp_path / "again", "--json")
    assert code == 0 and json.loads(printed)["forwards"] == stiefel["forwards"], err
    weights = [(folder / "model.safetensors").read_bytes() for folder in (config.parent, tmp_path / "again")]
    assert weights[0] == weights[1]


def test_what_does_not_fit_is_kept_and_not_run(zolr: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    given = ("compare", *SMALL, "--steps", 2, "--no-timing", "--memory-budget", "12MiB")
    places = ("--output", tmp_path / "all", "--plot", tmp_path / "all.svg")
    code, out, err = zolr(*given, "--methods", "adamw,mezo", *places, "--json")
    assert code == 0, err
    adamw, mezo = json.loads(out)
    assert adamw["status"] == NOT_RUN and adamw["peak_bytes_predicted"] > 12 * 2**20 and "after" not in adamw
    assert not (tmp_path / "all" / "adamw-fo").exists()
    assert mezo["status"] == DONE and mezo["peak_bytes_measured"] < 12 * 2**20 and "pairs" not in mezo
    assert (
        "does not fit" in (tmp_path / "all.svg").read_text() or (tmp_path / "all.svg").stat().st_size > 9000
    )
    code, out, err = zolr(*given, "--methods", "adamw", "--output", tmp_path / "none")
    assert code == 7 and "no method fits the memory budget" in err and "adamw does not fit: predicted" in out
    assert not (tmp_path / "none").exists()


def test_a_budget_of_a_methods_own_is_refused_and_not_run(zolr: Run, tmp_path: Path) -> None:
    given = ("compare", *SMALL, "--steps", 1, "--no-timing", "--methods", "sgd@memory-budget=2MiB")
    code, out, err = zolr(*given, "--output", tmp_path / "none", "--json")
    (row,) = json.loads(out)
    assert row["status"] == NOT_RUN and "no way to take this step fits into" in row["error"]
    assert code == 7 and err.splitlines()[-1].startswith(
        "error: no method fits its memory budget; the first one: no way to take this step fits into"
    )
    assert f"sgd memory-budget=2MiB does not fit: {row['error'][7:]}" in markdown([row], TERMS)


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refused(*_: object) -> None:
    torch.empty(1 << 50)


def racing(train: Callable[..., None], *given: Any) -> None:
    """What the process of a run does, but for its training."""
    race.Job.train = train
    race.main(*given)


@pytest.mark.parametrize(
    ("train", "status", "message", "on_host"),
    [(killed, KILLED, "SIGKILL", True), (refused, NO_MEMORY, "out of memory", False)],
)
def test_a_run_without_memory_is_a_row_with_what_was_predicted(
    zolr: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train: Callable[..., None],
    status: str,
    message: str,
    on_host: bool,
) -> None:
    """The process of the run is the real one, as on the host or as for a card, but that training takes all there is."""
    monkeypatch.setattr(compare, "_on_host", lambda _: on_host)
    monkeypatch.setattr(compare.race, "main", partial(racing, train))
    given = ("compare", "--methods", "sgd", *SMALL, "--steps", 2, "--output", tmp_path / "all")
    code, out, err = zolr(*given, "--json")
    (row,) = json.loads(out)
    assert row["status"] == status and message in row["error"] and row["peak_bytes_predicted"] > 2**20
    assert code == 7 and "every method failed" in err
    # one that was killed may have been so by hand, and is run again; what found no memory finds none again
    ran: list[str] = []
    done = {"status": DONE, "before": 0.25, "after": 0.5, "forwards": 6, "seconds": 1.0}
    done["peak_bytes_measured"] = 9
    monkeypatch.setattr(compare, "_raced", lambda plan, terms: ran.append(plan.method) or done)
    code, out, _ = zolr(*given, "--json", "--resume")
    assert (code, json.loads(out)[0]["status"], ran) == (
        (0, DONE, ["sgd"]) if status == KILLED else (7, NO_MEMORY, [])
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_child_ends_with_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    """A terminal interrupts both, and the one ends the other besides; what kills the one alone tells the other nothing."""
    command = ["compare", "--methods", "sgd@steps=100000", *map(str, SMALL), "--no-timing"]
    out, said = tmp_path / "out", tmp_path / "said"
    parent = begun("zolr", [*command, "--output", str(tmp_path / "all")], {}, out, said)
    folder = tmp_path / "all" / "sgd-fo-steps=100000"
    log = folder / "metrics.jsonl"
    if not within(60, lambda: log.is_file() and '"lr"' in log.read_text()):  # a step has been taken
        parent.kill()
        pytest.fail(f"nothing began: {said.read_text()}")
    for process in _children(parent.pid) if how == signal.SIGINT else ():
        os.kill(process, how)
    os.kill(parent.pid or 0, how)
    parent.join(60)
    assert parent.exitcode == (-how if how == signal.SIGKILL else 128 + how), said.read_text()
    assert within(60, lambda: not _grows(log))
    # it had saved by then
    last = max(json.loads(line)["step"] for line in log.read_text().splitlines())
    assert (folder / "checkpoints" / f"step-{last}").is_dir()


def _children(process: int | None) -> list[int]:
    """Processes below one."""
    found, new = [], [process]
    while new:
        path = Path(f"/proc/{new.pop()}/task")
        below = [int(x) for file in path.glob("*/children") for x in file.read_text().split()]
        found, new = found + below, new + below
    return found


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Wait until something holds, and say whether it came to that."""
    end = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.1)
    return held


def _grows(path: Path) -> bool:
    before = path.stat().st_size
    time.sleep(1.0)
    return path.stat().st_size != before


def test_what_was_run_is_shown_when_the_rest_is_interrupted(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raced(plan: Any, terms: Terms) -> dict[str, Any]:
        if plan.method == "mezo":
            raise KeyboardInterrupt
        Path(plan.output).mkdir(parents=True)
        return {"status": FAILED, "error": "error: as it happens", "exit_code": 5, "folder": plan.output}

    monkeypatch.setattr(compare, "_raced", raced)
    root, table = tmp_path / "all", tmp_path / "all.md"
    given = ("compare", "--methods", "sgd,mezo,adamw", "--output", root)
    code, out, err = zolr(*given, "--markdown", table)
    assert code == 130 and "1 of 3 methods were run" in err and "as it happens" in out
    incomplete = f"incomplete: 1 of 3 methods were run, and mezo, adamw not; --resume --output {root} goes on"
    assert "".join(incomplete.split()) in "".join(out.split())
    assert "| `sgd` | failed |" in table.read_text() and f"\n- {incomplete}\n" in table.read_text()
    assert len(json.loads((root / "compare.json").read_text())["methods"]) == 1
    failed(zolr(*given), 4, "is not empty; choose another --output, or --resume if it holds this comparison$")


def test_what_was_promised_to_go_on_goes_on(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no method has come to write a file, and where one that is done comes after the one that is cut short."""
    ends: dict[str, str | None] = {"sgd": FAILED, "mezo": None, "adamw": DONE}
    ran: list[str] = []

    def raced(plan: Any, terms: Terms) -> dict[str, Any]:
        ran.append(plan.method)
        if (status := ends[plan.method]) is None:
            raise KeyboardInterrupt
        row = {"metric": "accuracy", "before": 0.25, "after": 0.5, "forwards": 6, "seconds": 1.0}
        row |= {"status": status, "error": "error: bad luck", "exit_code": 5, "peak_bytes_measured": 9}
        return {**row, "folder": plan.output}

    monkeypatch.setattr(compare, "_raced", raced)
    root = tmp_path / "all"
    code, _, err = zolr("compare", "--methods", "sgd,mezo", "--output", root)
    assert code == 130 and f"--resume --output {root}" in err and (root / "compare.json").is_file()
    given = ("compare", "--output", root, "--resume", "--methods")
    code, _, err = zolr(*given, "adamw")
    assert code == 0, err
    code, out, _ = zolr(*given, "mezo,adamw,sgd")
    assert code == 130 and "1 of 3 methods were run, and mezo, sgd not" in " ".join(out.split())
    saved = json.loads((root / "compare.json").read_text())["methods"]
    assert [row["method"] for row in saved] == ["adamw"]
    ends |= {"mezo": DONE, "sgd": DONE}
    assert zolr(*given, "mezo,adamw,sgd")[0] == 0
    assert ran == ["sgd", "mezo", "adamw", "mezo", "mezo", "sgd"]


def test_a_comparison_goes_on_with_what_is_missing(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    ends: dict[str, str | None] = {"sgd": DONE, "mezo": FAILED, "adamw": None}

    def raced(plan: Any, terms: Terms) -> dict[str, Any]:
        ran.append(plan.method)
        assert not Path(
            plan.output
        ).exists()  # what is left of an earlier start is not mixed with the new one
        Path(plan.output).mkdir(parents=True)
        if (status := ends[plan.method]) is None:
            raise KeyboardInterrupt
        row = {
            "status": status,
            "metric": "accuracy",
            "before": 0.25,
            "after": 0.5,
            "steps": 2,
            "seconds": 1.0,
            "forwards": 6,
            "peak_bytes_measured": 9,
        }
        return {**row, "error": "error: bad luck", "exit_code": 1, "folder": plan.output}

    monkeypatch.setattr(compare, "_raced", raced)
    root, table = tmp_path / "all", tmp_path / "all.md"
    given = ("compare", "--output", root, "--markdown", table, "--json", "--methods")
    failed(zolr(*given, "sgd", "--resume"), 4, "nothing to resume: .* does not exist")
    failed(
        zolr("compare", "--methods", "sgd", "--resume"), 2, "--resume needs the comparison .* give --output"
    )
    code, out, err = zolr(*given, "sgd,mezo,adamw")
    assert code == 130 and f"go on with --resume --output {root}" in err, err
    assert ran == ["sgd", "mezo", "adamw"]
    ends |= {"mezo": DONE, "adamw": DONE, "lomo": DONE}
    failed(
        zolr(*given, "sgd", "--resume", "--steps", 9),
        2,
        "--steps of 'sgd:fo' is 9 here and was 300 in .*compare.json",
    )
    failed(zolr(*given, "sgd", "--resume", "--no-timing"), 2, "'timing' is False here and True in")
    assert len(ran) == 3
    code, out, err = zolr(*given, "adamw,sgd,mezo,lomo", "--resume")
    assert code == 0, err
    assert ran[3:] == ["adamw", "mezo", "lomo"]  # one was done, one had failed, one was cut short, one is new
    assert [row["method"] for row in json.loads(out)] == ["adamw", "sgd", "mezo", "lomo"]
    assert {row["status"] for row in json.loads(out)} == {DONE} and table.read_text().count("| `") == 4
    assert json.loads((root / "compare.json").read_text())["methods"] == json.loads(out)
    code, again, _ = zolr(*given, "adamw,sgd,mezo,lomo", "--resume")
    assert code == 0 and json.loads(again) == json.loads(out) and len(ran) == 6
    code, one, _ = zolr(*given, "sgd", "--resume")  # of which the others are not lost
    assert code == 0 and len(json.loads(one)) == 1
    code, again, _ = zolr(*given, "adamw,sgd,mezo,lomo", "--resume")
    assert code == 0 and json.loads(again) == json.loads(out) and len(ran) == 6
    (root / "compare.json").unlink()
    failed(zolr(*given, "sgd", "--resume"), 4, "is no comparison to go on with: it has no compare.json")


def test_a_comparison_does_not_go_on_with_other_data(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"status": DONE, "metric": "accuracy", "before": 0.25, "after": 0.5, "forwards": 6, "seconds": 1.0}
    monkeypatch.setattr(compare, "_raced", lambda plan, terms: {**row, "peak_bytes_measured": 9})
    monkeypatch.chdir(tmp_path)
    own, folder = tmp_path / "d.csv", tmp_path / "tasks"
    (folder / "sst2").mkdir(parents=True)
    held = tmp_path / "held.csv"
    for file in (own, held, folder / "sst2" / "train.tsv"):
        file.write_text("text,label\na,b\n")
    own_data = ("--data", own, "--validation", held, "--model", "demo")
    for number, given in enumerate((own_data, ("--task", "sst2", "--data-dir", folder))):
        root = tmp_path / f"all{number}"
        root.mkdir()
        begun = ("compare", *given, "--output", root, "--methods")
        train = own if number == 0 else folder / "sst2" / "train.tsv"
        assert zolr(*begun, "sgd")[0] == 0
        assert zolr(*begun, "sgd,adamw", "--resume")[0] == 0
        kept, was = (root / "compare.json").read_text(), train.read_text()
        train.write_text(was + "c,d\n")
        flag = "--data" if number == 0 else "--data-dir: train.tsv"
        for methods in ("sgd,mezo", "mezo"):  # another method alone would not stand beside rows of these data
            code, message = (
                2,
                rf"{train} \({flag}\) is sha256:.* here and was sha256:.*; go on with the same data",
            )
            failed(zolr(*begun, methods, "--resume"), code, message)
        train.write_text(was)
        failed(
            zolr(*begun, "mezo", "--resume", "--k", 4), 2, "--k of 'mezo:zo' is 4 here and was not given in"
        )
        assert (root / "compare.json").read_text() == kept
        assert zolr(*begun, "mezo", "--resume")[0] == 0
    held.write_text("text,label\nc,d\n")
    given = ("compare", *own_data, "--output", tmp_path / "all0", "--methods", "mezo", "--resume")
    failed(zolr(*given), 2, "held.csv")


# ---- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["adamw", "--equal", "forwards"], 2, "'forwards' gives no amount of forwards; write --equal forwards=2000"),
        (["adamw", "--equal", "forward=20"], 2, "no 'forward' to share; did you mean 'forwards'"),
        (["adamw", "--equal", "seconds=-1"], 2, "write --equal seconds=60"),
        (["adamw", "--equal", "steps=2.5"], 2, "write --equal steps=300"),
        (["adamw", "--equal", "seconds=inf"], 2, "gives no amount"),
        (["adamw", "--equal", "forwards=1e999"], 2, "gives no amount"),
        (["mezo,adamw", "--equal", "forwards=3"], 2, "pays for no step of 'mezo:zo', which takes 4"),
        (["adamw,stiefel:zo", "--equal", "forwards=60"], 2, "does not pay for choosing the learning rate of 'stiefel:zo', which takes 98"),
        (["stiefel:zo@lr=1e-3", "--equal", "forwards=60"], 2, "does not pay for choosing"),
        (["adamw", "--equal", "seconds=9", "--steps", 9], 2, "--equal seconds=9 and --steps 9 both"),
        (["adamw", "--equal", "steps=9", "--epochs", 9], 2, "--epochs 9.0 both"),
        (["adamw", "--equal", "forwards=90", "--patience", 2], 2, "--patience 2 both"),
        (["adamw@steps=9", "--equal", "forwards=90"], 2, "'steps=9' in 'adamw:fo@steps=9' both"),
        (["adamw", "--memory-budget", "plenty"], 2, "--memory-budget 'plenty' is no amount"),
        (["adamw", "--memory-budget", "0GiB"], 2, "--memory-budget '0GiB' is no amount"),
        (["adamw@task=sst2"], 2, "'task' in 'adamw:fo@task=sst2' would make it another task; give --task for all"),
        (["adamw@output=x"], 2, "'output' in .*: where and how often a run is written is the same for all of them; leave it out$"),
        (["adamw@quiet=true"], 2, "'quiet' in .*: where and how often .*; leave it out$"),
        (["adamw@method=sgd"], 2, "--methods: 'method=sgd' in 'adamw@method=sgd' comes first in such a word; write sgd$"),
        (["stiefel:fo@paradigm=zo"], 2, "'paradigm=zo' in .* comes first in such a word; write stiefel:zo$"),
        (["stiefel:fo@save-every=1"], 2, "'save-every' in .*: where and how often .*; leave it out$"),
        (["stiefel:fo@ranks=q_proj=16,up_proj=8@taks=x"], 2, "unknown setting 'taks'"),
        (["adamw,galor@lr=1"], 2, "method 'galor' is not known"),
        (["adamw", "--plot", "out.jpeg"], 2, r"--plot out.jpeg: .*\.png or .*\.svg"),
        (["adamw", "--markdown", "out.txt"], 2, r"--markdown out.txt: .*\.md"),
        (["adamw", "--plot", "/dev/null/out.png"], 4, "--plot /dev/null/out.png cannot be written: a file is in the way: /dev/null"),
        (["adamw", "--markdown", "taken.md"], 4, "--markdown taken.md exists"),
        (["adamw", "--output", "taken"], 4, "output folder taken is not empty; choose another --output, or --resume"),
        (["adamw", "--output", "taken.md"], 4, "taken.md is a file"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_runs(
    zolr: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[object],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    for name in ("taken/notes.txt", "taken.md"):
        (tmp_path / name).write_text("mine")
    failed(zolr("compare", "--methods", *arguments), code, message)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} == {
        "taken",
        "taken.md",
        "taken/notes.txt",
    }
    assert (tmp_path / "taken.md").read_text() == "mine"


def test_a_missing_matplotlib_is_found_before_anything_runs(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    given = ("compare", "--methods", "adamw", "--plot", "out.png")
    failed(zolr(*given), 2, r"--plot needs the package matplotlib.*pip install 'zolr\[plot\]'")
    assert list(tmp_path.iterdir()) == []


# ---- budgets ------------------------------------------------------------------------------------------------------


def test_forwards_are_never_overspent() -> None:
    allowance = Allowance("forwards", 100, "linear", 0, Price(4))
    step, spent = 0, 0
    while not allowance(Progress(step=step, forwards=spent)):
        spent += 4 if step else 24  # the first step searches a rate
        step += 1
    assert spent == 100 and step == 20


def test_seconds_are_all_used_whatever_the_first_step_takes() -> None:
    allowance = Allowance("seconds", 10.0, "linear", 2)
    step, spent, factors = 0, 0.0, [allowance.factor(0)]
    while not allowance(Progress(step=step, seconds=spent)):
        spent += 0.5 if step else 4.0
        step += 1
        factors.append(allowance.factor(step))
    assert spent == 10.5 and step == 14
    assert factors[:2] == [0.5, 1.0] and factors[2] > 0.5 and factors[-2] == pytest.approx(0.0, abs=0.06)


@pytest.mark.parametrize(
    ("price", "said"),
    [
        (
            Price(2, choosing=98),
            "choosing its learning rate and its first step took 7.3 s; give its --lr and --eps",
        ),
        (Price(2), "its first step took 7.3 s; give more seconds"),
    ],
)
def test_seconds_that_are_gone_after_the_first_step_are_refused(price: Price, said: str) -> None:
    allowance = Allowance("seconds", 2.0, "linear", 0, price, name="stiefel")
    assert not allowance(Progress())
    with pytest.raises(UsageError, match=f"--equal seconds=2 pays for no step of 'stiefel': {said}"):
        allowance(Progress(step=1, seconds=7.3))
    within = Allowance("seconds", 8.0, "linear", 0, price)
    assert not within(Progress(step=1, seconds=7.3)) and within(Progress(step=2, seconds=8.3))


@pytest.mark.parametrize("course", ["constant", "linear", "cosine"])
def test_a_budget_of_forwards_has_the_course_of_as_many_steps(course: Any) -> None:
    from zolr.cli.choices import schedule_of

    usual = schedule_of(course, 0, 50) or (lambda step: 1.0)
    allowance = Allowance("forwards", 150, course, 0, Price(3), steps=50)
    for step in range(50):
        assert allowance.factor(step) == pytest.approx(usual(step))
        assert not allowance(Progress(step=step, forwards=3 * step))
    assert allowance(Progress(step=50, forwards=150))


@pytest.mark.parametrize(
    "own",
    [
        {"method": "galore", "paradigm": "fo", "rank": 2, "undo": False, "clip": 0.5},
        {
            "method": "stiefel",
            "paradigm": "zo",
            "rank": 2,
            "lr": 1e-3,
            "eps": 1e-3,
            "hold": True,
            "hold_rank": 3,
        },
    ],
    ids=["nothing kept", "held"],
)
def test_the_step_that_is_timed_is_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, Any]
) -> None:
    from zolr import Engine
    from zolr.cli.finetune import Finetune

    made, begin = list[dict[str, Any]](), Engine.__init__

    def noted(self: Engine, model: Any, method: Any, **settings: Any) -> None:
        made.append(settings)
        begin(self, model, method, **settings)

    monkeypatch.setattr(Engine, "__init__", noted)
    monkeypatch.setattr(race.Job, "predicted", None)
    monkeypatch.setattr(race, "PAIRS", (2, 2))
    sizes = dict(k=4, eval_rows=4, batch_size=4, accumulate=1, steps=1, device="cpu")
    settings = Finetune(**sizes, **own, output=str(tmp_path / "run")).filled()
    told: dict[str, Any] = {}
    race.race(settings, equal=None, budget=None, timing=True, metric="f1", say=told.update)
    ran, clocked = made
    of_the_run = {"schedule", "check", "team", "loss"}
    for name in ran.keys() - of_the_run:
        assert clocked[name] == ran[name], name
    assert told["after"] == told["metrics"]["test"]["after"]["f1"] and told["chosen_by"] == "accuracy"
    assert told["pairs"] == 2 and told["step_over_two_forwards"] > 0
    assert ran["undo"] == own.get("undo") and bool(ran["hold"]) == own.get("hold", False)


def test_weights_that_are_away_have_no_time_of_their_own() -> None:
    from types import SimpleNamespace

    from zolr.cli.race import UNTIMED, timed

    for settings in ({"device_map": "cpu", "shard": False}, {"device_map": None, "shard": True}):
        job: Any = SimpleNamespace(settings=SimpleNamespace(**settings), work=None)
        assert timed(job) is None
    row = outcome(0, json.dumps({"after": 0.5, "untimed": UNTIMED}), "")
    assert f"a is {UNTIMED}" in markdown([{**row, "label": "a", "metric": "accuracy"}], TERMS)


PRICED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "a gradient of its own": ("adamw", "fo", {}, {}),
    "clipped as a whole": ("stiefel", "fo", {"rank": 2}, {"clip": 0.5}),
    "dense": ("galore", "fo", {"rank": 2}, {}),
    "clipped by the norm before": ("galore", "fo", {"rank": 2}, {"clip": 0.5}),
    "clipped by its own norm": ("galore", "fo", {"rank": 2, "clip_by": "twice"}, {"clip": 0.5}),
    "a point besides": ("extrapolation", "fo", {}, {"clip": 0.5}),
    "probes of a point besides": ("lorenza", "fo", {"rank": 2}, {"clip": 0.5}),
    "fused with the way back": ("lomo", "fo", {}, {"clip": 0.5}),
    "forward": ("stiefel", "zo", {"rank": 2, "eps": 1e-2}, {}),
    "a rate to measure": ("stiefel", "zo", {"rank": 2}, {"lr": None}),
    "a radius to measure": ("stiefel", "zo", {"rank": 2}, {}),
    "several probes, one side": ("fzoo", "zo", {"eps": 1e-2}, {}),
    "signs to compare": ("stiefel", "zo", {"rank": 2, "eps": 1e-2, "signs": "together"}, {"clip": 0.5}),
    "inputs to see": ("dependent", "zo", {"rank": 2, "eps": 1e-2, "refresh_every": 3}, {}),
    "inputs to see once": ("dependent", "zo", {"rank": 2, "eps": 1e-2, "refresh_every": 100}, {}),
    "two kinds of probes": ("zo-hgd", "zo", {"rank": 2, "eps": 1e-2}, {}),
    "tangents": ("stiefel", "fwd", {"rank": 2}, {}),
}


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("case", PRICED)
def test_steps_are_planned_at_what_they_take(case: str, batches: int) -> None:
    import torch

    from zolr import Engine, compose

    name, paradigm, parts, more = PRICED[case]
    method = compose(name, paradigm, **parts)
    given = {"lr": 1e-3, **more}
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
    x, y = torch.randn(batches, 5, 8), torch.randn(batches, 5, 4)
    engine = Engine(model, method, loss=lambda m, b: (m(b[0]) - b[1]).square().mean(), **given)
    price = Price.of(method, given["lr"], given.get("clip"), batches)
    taken = [engine.step(list(zip(x, y, strict=True))).forwards for _ in range(7)]
    assert [price.step(number) for number in range(7)] == taken
    for steps in range(1, 8):  # so many are paid for by what they take, and by no forward less
        assert price.steps(sum(taken[:steps])) == steps and price.steps(sum(taken[:steps]) - 1) == steps - 1
    allowance, steps = Allowance("forwards", sum(taken), "linear", 0, price), 0
    while not allowance(Progress(step=steps, forwards=sum(taken[:steps]))):
        steps += 1
    assert steps == 7


# ---- what is shown ------------------------------------------------------------------------------------------------


def test_outcomes_are_told_apart() -> None:
    told = '{"batch_size": 4}\n{"peak_bytes_predicted": 9}\n'
    assert outcome(0, told + '{"fits": false}', "")["status"] == NOT_RUN
    assert outcome(7, told, "error: out of memory; try")["status"] == NO_MEMORY
    assert outcome(1, told, "torch.OutOfMemoryError: CUDA out of memory")["status"] == NO_MEMORY
    killed = outcome(-9, told + '{"before": 0.', "")
    assert killed["status"] == KILLED and killed["peak_bytes_predicted"] == 9
    crashed = outcome(-11, told, "some chatter")
    assert crashed["status"] == FAILED and "SIGSEGV" in crashed["error"]
    diverged = outcome(5, told, "note\nerror: the loss was not finite in 20 steps")
    assert diverged["status"] == FAILED and diverged["error"].startswith("error: the loss was not finite")
    assert outcome(2, "", "")["error"] == "ended with exit code 2"
    refused = outcome(7, "", "error: no way to take this step fits into --memory-budget 20 MiB")
    assert refused["status"] == NOT_RUN and refused["error"].startswith(
        "error: no way to take this step fits"
    )
    loading = outcome(7, "", "error: out of memory; try a smaller --batch-size")
    assert loading["status"] == NO_MEMORY
    step = "error: out of memory in a step with --batch-size 4, and no way to take this step fits into 20 MiB"
    assert outcome(7, told, step)["status"] == NO_MEMORY
    # a result that was reported stands, whatever happened to the timing after it
    assert outcome(-9, told + '{"after": 0.5}', "")["status"] == DONE


def test_labels_tell_the_rows_apart_in_few_words() -> None:
    words = "adamw@steps=4,adamw@checkpointing=true@steps=4,adamw@checkpointing=selective,lora:zo,mezo@steps=3,mezo@steps=5,stiefel:fo@lr=1e-3"
    named = list(labels(dict(variant(word) for word in words.split(","))).values())
    assert named == [
        "adamw",
        "adamw + checkpointing",
        "adamw + selective checkpointing",
        "lora:zo",
        "mezo steps=3",
        "mezo steps=5",
        "stiefel:fo lr=0.001",
    ]


MIB = 2**20


def made_up(folder: Path) -> list[dict[str, Any]]:
    """Rows as they come from runs of every kind."""
    rows = []
    names = ("stiefel:zo", "adamw", "adamw + checkpointing", "lora:fo + checkpointing", "mezo")
    for i, label in enumerate(names):
        row: dict[str, Any] = {"name": label, "label": label, "method": label.split(" ")[0].split(":")[0]}
        row |= {"paradigm": "fo", "checkpointing": "check" in label, "metric": "accuracy", "status": DONE}
        row |= {"batch_size": 32, "accumulate": 2, "before": 0.25, "after": 0.5 + 0.1 * i, "steps": 1000}
        row |= {"forwards": 4000, "tokens": 12_345_678, "seconds": 1234.5}
        row |= {"peak_bytes_predicted": 700 * MIB * (i + 1), "peak_bytes_measured": 690 * MIB * (i + 1)}
        row |= {"step_over_two_forwards": 1.0 + i, "step_over_adamw": 0.5 + i, "pairs": 21}
        place = folder / f"run{i}"
        place.mkdir(parents=True)
        lines: list[dict[str, Any]] = [{"step": 0, "eval": {"accuracy": 0.25, "loss": 2.0}}]
        for step in (500, 1000):
            lines.append({"step": step, "loss": 1.0, "forwards": 4 * step, "seconds": 1.2 * step * 10**i})
            lines.append({"step": step, "eval": {"accuracy": 0.3 + step * 1e-4 * i, "loss": "nan"}})
        (place / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        rows.append({**row, "folder": str(place)})
    gone = {"after", "before", "steps", "forwards", "tokens", "seconds", "peak_bytes_measured"}
    gone |= {"step_over_two_forwards", "step_over_adamw", "pairs"}
    for i, status in ((2, KILLED), (4, NOT_RUN)):
        rows[i] = {k: v for k, v in rows[i].items() if k not in gone} | {"status": status}
    rows[2]["error"] = "killed (SIGKILL), as the system does when memory runs out; --resume runs it again"
    rows[4]["folder"] = str(folder / "absent")
    return rows


TERMS = Terms("questions", "demo", "accuracy", ("forwards", 4000.0), 3 * 2**30, True)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_table_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows = made_up(tmp_path)
    compare._print(rows, TERMS)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    whole = " ".join(out.split())
    for word in {word for row in rows for word in row["label"].split()}:
        assert re.search(rf"(^|\s){re.escape(word)}(\s|$)", whole), word  # folded at spaces alone
    for cell in ("0.5000", "4,000", "700 MiB", "690 MiB", KILLED, "does not fit", "1.00"):
        assert cell in out, cell
    assert ("x adamw" in out) == (width > 80) and ("12,345,678" in out) == (width > 100)
    assert "memory budget 3.00 GiB" in whole and "adamw + checkpointing: killed (SIGKILL)" in whole


def test_the_markdown_is_a_table(tmp_path: Path) -> None:
    rows = made_up(tmp_path)
    rows[0]["label"] = "a|b"
    lines = markdown(rows, TERMS).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "| `a\\|b` | 0.5000 |" in table[2] and "32 x 2" in table[2] and lines[-1].startswith("- ")


def test_all_rows_show_one_metric_whatever_theirs_is(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zolr.cli.race import scored

    test = {"before": {"accuracy": 0.25, "f1": 0.1}, "after": {"accuracy": 0.5, "f1": 0.4}}

    def raced(plan: Any, terms: Terms) -> dict[str, Any]:
        result = {"metric": "f1" if plan.objective == "f1" else "accuracy", "metrics": {"test": test}}
        rest = {"status": DONE, "forwards": 6, "seconds": 1.0, "peak_bytes_measured": 9}
        return scored(result, terms.metric) | rest

    monkeypatch.setattr(compare, "_raced", raced)
    given = ("compare", "--methods", "mezo@objective=f1,adamw@objective=loss,mezo", "--markdown")
    shared: tuple[tuple[object, ...], ...] = ((), ("--objective", "f1"))
    for number, (more, metric, after) in enumerate(zip(shared, ("accuracy", "f1"), (0.5, 0.4), strict=True)):
        table = tmp_path / f"{number}.md"
        code, out, err = zolr(*given, table, "--output", tmp_path / f"{number}", *more, "--json")
        assert code == 0, err
        rows = json.loads(out)
        assert {(row["metric"], row["after"]) for row in rows} == {(metric, after)}
        text = table.read_text()
        assert f"| method | {metric} |" in text and text.count(f"| {after:.4f} |") == 3
        for row in rows:
            assert (
                f"- {row['label']}: its weights are those with the best validation {row['chosen_by']}" in text
            ) == (row["chosen_by"] != metric)
        # a metric that a run does not have
        unknown = [
            {**row, "metric": "matthews"} | scored({"metric": "f1", "metrics": {"test": test}}, "matthews")
            for row in rows
        ]
        assert markdown(unknown, TERMS).count("objective=f1` | - |") == 1 and " - -> -, " in compare._said(
            unknown[0]
        )


def test_steps_are_held_against_the_plainest_adamw() -> None:
    def row(name: str, ratio: float, **more: Any) -> dict[str, Any]:
        own = {
            "name": name,
            "label": name,
            "method": name.split(":")[0],
            "checkpointing": False,
            "metric": "f1",
        }
        return {**own, "status": DONE, "step_over_two_forwards": ratio, "pairs": 5, **more}

    part, plain = row("adamw:fo@train=norm", 1.0), row("adamw:fo", 2.0)
    less, again = (
        row("adamw:fo@train=norm@lr=0.1", 5.0),
        row("adamw:fo@checkpointing=true", 4.0, checkpointing=True),
    )
    rows = [again, less, part, plain]
    compare._against_adamw(rows)
    assert [each["step_over_adamw"] for each in rows] == [2.0, 2.5, 0.5, 1.0]
    assert "over x 2 fwd of adamw:fo, so" in markdown(rows, TERMS)
    compare._against_adamw(rows[:3])
    assert [each["step_over_adamw"] for each in rows[:3]] == [4.0, 5.0, 1.0]
    assert "over x 2 fwd of adamw:fo@train=norm, so" in markdown(rows[:3], TERMS)
    compare._against_adamw([again])
    assert again["step_over_adamw"] == 4.0  # nothing to hold it against anew: what is known stays


def test_rows_that_come_later_are_held_against_the_adamw_of_before(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = {"adamw": 2.0, "mezo": 1.0, "sgd": 1.5}

    def raced(plan: Any, terms: Terms) -> dict[str, Any]:
        Path(plan.output).mkdir(parents=True)
        row = {"metric": "accuracy", "before": 0.25, "after": 0.5, "forwards": 6, "seconds": 1.0}
        row |= {"status": DONE, "peak_bytes_measured": 9, "pairs": 5}
        return {**row, "step_over_two_forwards": ratios[plan.method]}

    monkeypatch.setattr(compare, "_raced", raced)
    monkeypatch.setenv("COLUMNS", "140")
    root = tmp_path / "all"
    given = ("compare", "--output", root, "--methods")
    assert zolr(*given, "adamw,mezo")[0] == 0
    for methods in ("mezo", "sgd"):  # one that is known, and a new one
        code, out, err = zolr(*given, methods, "--resume")
        assert code == 0 and "over x 2 fwd of adamw, so" in " ".join(out.split()), err
    saved = json.loads((root / "compare.json").read_text())["methods"]
    assert {row["method"]: row["step_over_adamw"] for row in saved} == {
        "adamw": 1.0,
        "mezo": 0.5,
        "sgd": 0.75,
    }


def test_curves_are_read_with_their_costs(tmp_path: Path) -> None:
    from zolr.cli.picture import curve

    row = made_up(tmp_path)[1]
    assert curve(Path(row["folder"]), "accuracy") == [
        (0.0, 0.0, 0.25),
        (2000.0, 6000.0, 0.35),
        (4000.0, 12000.0, pytest.approx(0.4)),
    ]
    assert curve(Path(row["folder"]), "loss") == [(0.0, 0.0, 2.0)]  # a loss that is not finite is no point
    assert curve(tmp_path / "absent", "accuracy") == []


def test_bars_are_labeled_with_three_digits_and_no_loose_point() -> None:
    from zolr.cli.picture import _digits

    told = [_digits(value) for value in (1.0, 42.5, 99.949, 99.95, 500.0, 1023.4)]
    assert told == ["1.00", "42.5", "99.9", "100", "500", "1023"]


def test_the_picture_shows_every_row(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from zolr.cli.picture import draw

    rows = made_up(tmp_path / "runs")
    draw(rows, 3 * 2**30, tmp_path / "out.svg", title="questions")
    text = (tmp_path / "out.svg").read_text()
    for words in (
        "stiefel:zo",
        KILLED,
        "does not fit",
        "budget",
        "predicted",
        "measured",
        "seconds",
    ):
        assert f"<!-- {words}" in text, words
    draw(rows[4:], None, tmp_path / "alone.png", title="questions")  # nothing was run at all
    assert (tmp_path / "alone.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [1, 3, 9, 12])
def test_long_names_and_the_budget_cover_nothing_in_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    from matplotlib.legend import Legend

    drawn, save = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    from zolr.cli.picture import draw

    row = made_up(tmp_path / "runs")[1]
    names = [f"stiefel:fo lr=0.00{i} rank=4 projector=gaussian switch-every=5" for i in range(12)]
    names[5] = "adamw + selective checkpointing"
    draw([{**row, "label": name} for name in names[:count]], 1402 * MIB, tmp_path / "a.png", title="a")
    (whole,) = drawn
    whole.canvas.draw()  # the file had other pixels
    keys = sorted(whole.findobj(match=Legend), key=lambda key: key.get_window_extent().x0)
    texts = [text for key in keys for text in key.get_texts()]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == 2 + count
    for i, box in enumerate(boxes):
        assert 0 <= box.x0 and box.x1 <= whole.bbox.x1 and not any(box.overlaps(b) for b in boxes[:i])
    assert not keys[0].get_window_extent().overlaps(keys[1].get_window_extent())
    values = [text for text in whole.subfigs[0].axes[0].texts if text.get_text() != "budget"]
    assert len(values) == 2 * count and all(value.get_bbox_patch() for value in values)
    beside = [label.get_window_extent() for label in whole.subfigs[0].axes[0].get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in zip(beside, beside[1:], strict=False))


def test_a_variant_that_cannot_be_is_a_row(zolr: Run, tmp_path: Path) -> None:
    given = ("compare", "--methods", "mezo@objective=accuracy@checkpointing=true", "--output", tmp_path / "x")
    code, out, err = zolr(*given)
    assert code == 2 and "every method failed; the first one with: --checkpointing is for" in err
    assert "--checkpointing is for backprop" in out
    assert not (tmp_path / "x").exists()


def test_a_value_may_have_a_comma() -> None:
    ((name, own),) = [variant(word) for word in methods_in(["stiefel:fo@ranks=q_proj=16,up_proj=8"])]
    assert name == "stiefel:fo@ranks=q_proj=16,up_proj=8" and own["ranks"] == "q_proj=16,up_proj=8"
    words = methods_in(["adamw, stiefel@ranks=a=1, b=2@lr=1e-3,sgd@lr=1", "up_proj=8"])
    assert words == ["adamw", "stiefel@ranks=a=1,b=2@lr=1e-3", "sgd@lr=1", "up_proj=8"]


def test_a_title_has_the_width_of_the_console() -> None:
    from rich.console import Console

    from zolr.cli.screen import table

    console = Console(width=60, record=True, quiet=False, file=io.StringIO())
    console.print(table("runs/a-long-name[1] on questions, 200 rows", ["accuracy", "loss"], [[0.5, 0.25]]))
    console.print(table("long " * 14, ["accuracy", "loss"], [[0.5, 0.25]]))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines[0] == "runs/a-long-name[1] on questions, 200 rows" and "long " * 11 + "long" in lines


def test_amounts() -> None:
    assert compare._equal(" seconds = 1.5 ") == ("seconds", 1.5)
    with pytest.raises(UsageError, match="gives no amount of steps"):
        compare._equal("steps=0")
