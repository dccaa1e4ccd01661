"""The loop: resuming equals never having stopped, the best weights come back, signals and bad losses leave nothing broken."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from torch import Tensor, nn

from zolr import Engine, compose
from zolr.errors import NonFiniteError, UsageError
from zolr.training import NON_FINITE_LIMIT, Interrupted, Progress, score, train

STEPS = 24


class Toy(nn.Module):
    """A model with an embedding, a matrix, a norm and a bias."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(17, 12)
            self.norm = nn.LayerNorm(12)
            self.out = nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.norm(torch.tanh(self.embedding(ids)).mean(1)))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["input_ids"]), batch["labels"], reduction="none")


def batches(step: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 17, (2, 8, 5), generator=generator)
    mask = torch.ones(8, 5, dtype=torch.long)
    mask[:, 4] = 0  # one token in five is padding
    return [{"input_ids": part, "attention_mask": mask, "labels": part.sum(1) % 3} for part in ids]


def engine(paradigm: str, **changes: Any) -> Engine:
    paradigm, _, measured = paradigm.partition(" ")
    method = compose("stiefel", paradigm, rank=2, refresh_every=5, eps=changes.pop("eps", None))
    lr = None if measured else changes.pop("lr", 1e-2)
    return Engine(Toy(), method, lr=lr, loss=loss, seed=1, **changes)


def weights(run: Engine) -> dict[str, Tensor]:
    return run.export().state_dict()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def evaluation(run: Engine) -> Callable[[], dict[str, float]]:
    def evaluate() -> dict[str, float]:
        with torch.no_grad():
            (held, _) = batches(10_000)
            return {"accuracy": -float(loss(run.model, held).mean())}

    return evaluate


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


class Stopper:
    """A reporter that sends this process a signal after some step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number, self.notes = step, number, []

    def stepped(self, progress: Progress, info: Any) -> None:
        if progress.step == self.step:
            os.kill(os.getpid(), self.number)

    def evaluated(self, progress: Progress, metrics: Any) -> None:
        pass

    def noted(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("paradigm", ["fo", "zo", "fwd"])
@pytest.mark.parametrize(
    "stop", [7, 10, 23]
)  # inside a window, at a refresh and an evaluation, just before the end
def test_stopped_and_resumed_equals_uninterrupted(paradigm: str, stop: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": STEPS, "eval_every": 5, "save_every": 4}
    whole = engine(paradigm)
    outcome = train(whole, batches, evaluate=evaluation(whole), folder=tmp_path / "whole", **settings)

    first = engine(paradigm)
    with pytest.raises(Interrupted) as stopped:
        train(
            first,
            batches,
            evaluate=evaluation(first),
            folder=tmp_path / "cut",
            reporter=Stopper(stop),
            **settings,
        )
    assert stopped.value.exit_code == 130 and f"after step {stop}; saved" in str(stopped.value)

    second = engine(paradigm)
    resumed = train(
        second, batches, evaluate=evaluation(second), folder=tmp_path / "cut", resume=True, **settings
    )
    assert equal(weights(whole), weights(second))
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    assert (
        resumed.before == outcome.before
        and resumed.after == outcome.after
        and resumed.kept_step == outcome.kept_step
    )
    counted = ("step", "forwards", "tokens", "tokens_seen", "skipped", "best", "best_step", "stale")
    assert all(getattr(resumed.progress, name) == getattr(outcome.progress, name) for name in counted)


@pytest.mark.parametrize("paradigm", ["fo", "zo"])
def test_a_damaged_checkpoint_falls_back_and_says_so(paradigm: str, tmp_path: Path) -> None:
    whole = engine(paradigm)
    train(whole, batches, steps=STEPS, folder=tmp_path / "whole", save_every=4)
    first = engine(paradigm)
    with pytest.raises(Interrupted):
        train(first, batches, steps=STEPS, folder=tmp_path / "cut", save_every=4, reporter=Stopper(14))
    assert sorted(p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()) == ["step-12", "step-14"]
    tensors = tmp_path / "cut" / "checkpoints" / "step-14" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    second, watcher = engine(paradigm), Stopper(-1)
    train(second, batches, steps=STEPS, folder=tmp_path / "cut", save_every=4, resume=True, reporter=watcher)
    assert (
        len(watcher.notes) == 1
        and "step-14 is damaged" in watcher.notes[0]
        and "from step 12" in watcher.notes[0]
    )
    assert equal(weights(whole), weights(second)) and rows(tmp_path / "whole") == rows(tmp_path / "cut")


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    run = engine("fo")
    train(run, batches, steps=8, evaluate=evaluation(run), folder=tmp_path, save_every=4)
    again = engine("fo")
    outcome = train(
        again, batches, steps=8, evaluate=evaluation(again), folder=tmp_path, save_every=4, resume=True
    )
    assert outcome.progress.step == 8 and equal(weights(run), weights(again))
    assert [line["step"] for line in rows(tmp_path) if "eval" not in line] == list(range(1, 9))


def test_evaluation_and_saving_leave_the_run_alone(tmp_path: Path) -> None:
    busy, bare = engine("zo"), engine("zo")
    train(
        busy,
        batches,
        steps=12,
        evaluate=evaluation(busy),
        eval_every=1,
        best=None,
        folder=tmp_path,
        save_every=1,
    )
    train(bare, batches, steps=12)
    assert equal(weights(busy), weights(bare))


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("best", ["max", "min"])
def test_the_best_weights_come_back(best: Any, on_disk: bool, tmp_path: Path) -> None:
    run, seen = engine("fo"), {}
    course = iter([0.9, 0.2, 0.5, 0.3, 0.3] if best == "max" else [0.1, 0.9, 0.4, 0.5, 0.5])

    def evaluate() -> dict[str, float]:
        value = next(course)
        seen[run.step_count] = weights(run)
        return {"accuracy": value}

    folder = tmp_path if on_disk else None
    outcome = train(run, batches, steps=16, evaluate=evaluate, eval_every=4, best=best, folder=folder)
    assert outcome.kept_step == 8 and equal(weights(run), seen[8]) and not equal(weights(run), seen[16])
    assert outcome.before == {"accuracy": 0.9 if best == "max" else 0.1}
    assert outcome.after == {"accuracy": 0.5 if best == "max" else 0.4}
    if on_disk:
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["best-8"]


def test_among_equals_the_smaller_loss_wins() -> None:
    run, course = engine("fo"), iter([(0.5, 9.0), (0.5, 3.0), (0.5, 2.0), (0.5, 4.0)])
    outcome = train(
        run,
        batches,
        steps=3,
        eval_every=1,
        evaluate=lambda: dict(zip(("accuracy", "loss"), next(course), strict=True)),
    )
    assert outcome.kept_step == 2


def test_patience_stops_early(tmp_path: Path) -> None:
    run, course = engine("fo"), iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.1])
    outcome = train(
        run,
        batches,
        steps=100,
        eval_every=2,
        evaluate=lambda: {"accuracy": next(course)},
        patience=2,
        folder=tmp_path,
    )
    assert outcome.stopped_early and outcome.progress.step == 6 and outcome.kept_step == 2


@pytest.mark.parametrize("best", ["max", "min"])
@pytest.mark.parametrize("paradigm", ["fo", "zo"])
def test_an_interrupted_run_stops_early_where_the_uninterrupted_one_did(
    paradigm: str, best: Any, tmp_path: Path
) -> None:
    """Wherever it is cut: before, at and after the best evaluation, between bad ones, and when it has just stopped."""
    course = {0: 0.1, 3: 0.3, 6: 0.5, 9: 0.4, 12: 0.6, 15: 0.2, 18: 0.6, 21: 0.3, 24: 0.9}  # best at 12

    def run(folder: Path, stop: int = -1, number: int = signal.SIGTERM, **more: Any) -> Any:
        made = engine(paradigm)
        sign = 1 if best == "max" else -1
        outcome = train(
            made,
            batches,
            steps=STEPS,
            eval_every=3,
            save_every=4,
            best=best,
            patience=3,
            folder=folder,
            evaluate=lambda: {"accuracy": sign * course[made.step_count]},
            reporter=Stopper(stop, number),
            **more,
        )
        return outcome, weights(made)

    whole, expected = run(tmp_path / "whole")
    assert whole.stopped_early and (whole.progress.step, whole.kept_step, whole.progress.stale) == (21, 12, 3)
    for stop in (4, 12, 13, 15, 19, 20):
        folder = tmp_path / str(stop)
        with pytest.raises(Interrupted):
            run(folder, stop)
        outcome, found = run(folder, resume=True)
        assert replace(outcome, progress=whole.progress) == whole, stop
        assert equal(found, expected) and rows(folder) == rows(tmp_path / "whole"), stop
    again, found = run(tmp_path / "whole", resume=True)  # of a run that had stopped
    assert again.stopped_early and again.progress.step == 21 and equal(found, expected)


def test_patience_without_a_best_is_refused() -> None:
    for more in ({"best": None, "evaluate": lambda: {"accuracy": 0.0}}, {"best": "max"}):
        with pytest.raises(UsageError, match="patience = 2 goes by evaluations"):
            train(engine("fo"), batches, steps=2, patience=2, **more)


def test_counts() -> None:
    for paradigm, forwards in (("fo", 6), ("zo", 4)):  # two micro-batches; a backward counts as two
        outcome = train(engine(paradigm, eps=None if paradigm == "fo" else 1e-3), batches, steps=3)
        assert outcome.progress.forwards == 3 * forwards
        assert (
            outcome.progress.tokens_seen == 3 * 2 * 8 * 4 and outcome.progress.tokens == 3 * forwards * 8 * 4
        )


def test_a_loss_that_stays_bad_ends_the_run_and_keeps_the_best(tmp_path: Path) -> None:
    run = engine("zo")
    good = run._loss

    def spoiled(model: nn.Module, batch: Any) -> Tensor:
        return good(model, batch) * (float("nan") if run.step_count >= 4 else 1.0)

    run._loss = spoiled
    with pytest.raises(
        NonFiniteError,
        match=rf"loss or the gradient was not finite in {NON_FINITE_LIMIT} steps in a row.*step 4\) are kept in .*best-4.*--lr",
    ):
        train(run, batches, steps=100, evaluate=evaluation(run), eval_every=4, folder=tmp_path)
    assert run.step_count == 4
    lines = rows(tmp_path)
    assert [line["skipped"] for line in lines if "loss" in line] == [False] * 4 + [True] * NON_FINITE_LIMIT
    assert lines[-1]["loss"] == "nan"  # shown as it is, and the line is still JSON


def test_single_bad_steps_are_skipped_exactly() -> None:
    run = engine("zo", eps=1e-3)
    good, calls = run._loss, []

    def spoiled(model: nn.Module, batch: Any) -> Tensor:
        calls.append(None)
        return good(model, batch) * (float("inf") if 5 <= len(calls) <= 8 else 1.0)

    run._loss = spoiled
    outcome = train(run, batches, steps=6)
    other = engine("zo", eps=1e-3)
    for step in (0, 2, 3, 4, 5):
        other.step(batches(step))
    assert outcome.progress.skipped == 1 and equal(weights(run), weights(other))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_an_evaluation_ends_it_at_once(number: int, tmp_path: Path) -> None:
    run = engine("fo")

    def evaluate() -> dict[str, float]:
        if run.step_count == 4:
            os.kill(os.getpid(), number)
            raise AssertionError("the evaluation went on")
        return {"accuracy": 0.0}

    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped:
        train(run, batches, steps=8, evaluate=evaluate, eval_every=2, folder=tmp_path)
    assert stopped.value.exit_code == 128 + number and signal.getsignal(number) is before
    again = engine("fo")
    train(
        again,
        batches,
        steps=8,
        evaluate=lambda: {"accuracy": 0.0},
        eval_every=2,
        folder=tmp_path,
        resume=True,
    )
    assert [line["step"] for line in rows(tmp_path) if "eval" in line] == [0, 2, 4, 6, 8]


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:  # the exit below must not run pytest's own clean-up
        run = engine("fo")

        def evaluate() -> dict[str, float]:
            return {"accuracy": 0.0}

        class Twice(Stopper):
            def stepped(self, progress: Progress, info: Any) -> None:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)

        train(run, batches, steps=8, evaluate=evaluate, folder=tmp_path, reporter=Twice(0))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


def test_scores() -> None:
    predicted, labels = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 2, 2, 0])
    assert score("accuracy", predicted, labels, 3) == pytest.approx(4 / 6, abs=1e-6)
    # per class: precision and recall (1, 2/3), (1/2, 1), (1/2, 1/2)
    assert score("f1", predicted, labels, 3) == pytest.approx((4 / 5 + 2 / 3 + 1 / 2) / 3, abs=1e-6)
    # R_K = (c s - sum p t) / sqrt((s^2 - sum p^2)(s^2 - sum t^2)) with c = 4, s = 6, p = (2, 2, 2), t = (3, 1, 2)
    assert score("matthews", predicted, labels, 3) == pytest.approx((24 - 12) / (24 * 22) ** 0.5, abs=1e-6)


def test_what_is_all_of_one_class_correlates_with_nothing() -> None:
    mixed = torch.tensor([0] * 3 + [1] * 7)
    for constant in (torch.zeros_like(mixed), torch.ones_like(mixed)):
        assert score("matthews", constant, mixed, 2) == score("matthews", mixed, constant, 2) == 0.0
        assert score("matthews", constant, constant, 2) == 0.0
    assert score("matthews", mixed, mixed, 2) == 1.0


def test_pretraining_stops_early_and_keeps_the_lowest_loss(zolr: Run, tmp_path: Path) -> None:
    """At a rate that undoes what it has learned; gone on with, it is over."""
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("".join(f"The {i} mice of house {i % 7} met {i * i % 11} cats.\n\n" for i in range(300)))
    shape = ("--hidden-size", 16, "--layers", 1, "--heads", 2, "--vocab-size", 280, "--length", 16)
    course = ("--method", "adamw", "--lr", 3.0, "--schedule", "constant", "--steps", 40, "--eval-every", 1)
    line = (
        "pretrain",
        "--data",
        text,
        "--train-tokenizer",
        *shape,
        *course,
        "--batch-size",
        4,
        "--eval-rows",
        4,
    )
    code, _, err = zolr(*line, "--early-stopping-patience", 2, "--save-every", 50, "--quiet", "--output", run)
    assert code == 0, err
    result = json.loads((run / "result.json").read_text())
    losses = {line["step"]: line["eval"]["loss"] for line in rows(run) if "eval" in line and line["step"]}
    best = min(losses, key=losses.__getitem__)
    assert result["stopped_early"] and result["kept_step"] == best and result["steps"] == best + 2 < 40
    assert result["after"] == losses[best] == min(losses.values())
    weights_before = (run / "model.safetensors").read_bytes()
    (run / "result.json").unlink()
    code, _, err = zolr("pretrain", "--resume", "--quiet", "--output", run)
    assert code == 0, err
    assert json.loads((run / "result.json").read_text())["steps"] == best + 2
    assert (run / "model.safetensors").read_bytes() == weights_before
