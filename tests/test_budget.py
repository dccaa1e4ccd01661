"""`--memory-budget`: the pick is the fastest that fits, nothing given is overruled, and below the floor nothing runs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Run

from zolr.cli import compare, estimate
from zolr.cli.budget import PASS_ROWS, SIZE, Way, advice, plan, told, verdict, ways
from zolr.errors import BudgetError, UsageError
from zolr.methods import Method, compose

EVERYTHING = {*SIZE, "checkpointing", "signs", "realization"}
ASKED = Way(16, 2)


def peak(way: Way) -> int:
    """A model of 1,000 bytes whose rows take 100, fewer where they are computed again, twice that for both signs."""
    row = {False: 100, "selective": 60, True: 30}[way.checkpointing]
    row *= 2 if way.signs == "together" else 1
    return 1000 + row * way.batch_size + (0 if way.realization == "side" else 50)


def test_every_way_takes_the_same_examples_and_the_fastest_comes_first() -> None:
    for paradigm in ("fo", "zo", "fwd"):
        found = ways(ASKED, paradigm, EVERYTHING)
        assert {way.batch_size * way.accumulate for way in found} == {32}
        assert [way.cost for way in found] == sorted(way.cost for way in found)
        assert len(found) == len(set(found)) and found[0] == Way(32, 1)
        kinds = {False, "selective", True} if paradigm == "fo" else {False}
        assert {way.checkpointing for way in found} == kinds
        assert any(way.signs == "together" for way in found) == (paradigm == "zo")


@pytest.mark.parametrize("given", [*sorted(EVERYTHING), None])
@pytest.mark.parametrize("paradigm", ["fo", "zo", "fwd"])
def test_what_is_given_stays(given: str | None, paradigm: str) -> None:
    free = EVERYTHING - {given}
    for way in ways(ASKED, paradigm, free):
        for name in {given} & EVERYTHING | (set(SIZE) if given in SIZE else set()):
            assert getattr(way, name) == getattr(ASKED, name)
    assert ways(ASKED, paradigm, ()) == [ASKED]


@pytest.mark.parametrize("paradigm", ["fo", "zo", "fwd"])
@pytest.mark.parametrize("free", [EVERYTHING, set(SIZE), {"checkpointing", "signs"}, set()])
def test_the_pick_is_the_fastest_that_fits(paradigm: str, free: set[str]) -> None:
    found = ways(ASKED, paradigm, free)
    floor, top = min(map(peak, found)), max(map(peak, found))
    for budget in range(floor - 60, top + 60, 20):
        fitting = [way for way in found if peak(way) <= budget]
        asked: list[Way] = []

        def counted(way: Way, asked: list[Way] = asked) -> int:
            asked.append(way)
            return peak(way)

        if not fitting:
            with pytest.raises(BudgetError):
                plan(counted, ASKED, paradigm, free, budget)
            continue
        picked = plan(counted, ASKED, paradigm, free, budget)
        assert picked.way.cost == min(way.cost for way in fitting)
        assert picked.peak == peak(picked.way) <= budget
        assert len(asked) == len(set(asked)) <= {"fo": 12, "zo": 16, "fwd": 4}[paradigm]
        if picked.faster is not None:
            way, size = picked.faster
            assert way.cost < picked.way.cost and size > budget


def test_below_the_floor_the_error_names_what_would_fit() -> None:
    mib = 2**20
    floor = min(peak(way) for way in ways(ASKED, "fo", EVERYTHING))
    with pytest.raises(BudgetError) as error:
        plan(lambda way: peak(way) * mib, ASKED, "fo", EVERYTHING, (floor - 1) * mib)
    assert error.value.exit_code == 7
    assert f"--memory-budget {floor}MiB would do" in str(error.value)
    assert "--batch-size 1 --accumulate 32 --checkpointing --realization auto" in str(error.value)
    assert "--paradigm zo" in str(error.value)
    # the smallest budget that is named is enough
    assert plan(lambda way: peak(way) * mib, ASKED, "fo", EVERYTHING, floor * mib).peak == floor * mib


def test_the_error_names_what_would_fit_if_less_were_given() -> None:
    budget = peak(Way(8, 4))
    with pytest.raises(BudgetError, match="within the budget --batch-size 16 .*--checkpointing.* would fit"):
        plan(lambda way: peak(way) + 10**6 * (not way.checkpointing), Way(32, 1), "fo", (), 2100)
    with pytest.raises(BudgetError, match=r"within the budget --batch-size 8 --accumulate 4 .*would fit"):
        plan(lambda way: peak(way) + 10**6 * way.checkpointing, ASKED, "fo", (), budget)


def test_a_step_that_must_stay_whole_keeps_its_batch() -> None:
    asked = list[Way]()

    def noted(way: Way) -> int:
        asked.append(way)
        return peak(way)

    least = min(peak(way) for way in ways(ASKED, "zo", EVERYTHING - set(SIZE)))
    assert plan(noted, ASKED, "zo", EVERYTHING, least, "f1 is").way == Way(16, 2, realization="side")
    for free in (EVERYTHING, {"signs"}):
        with pytest.raises(BudgetError, match=r"the batch size stays: f1 is") as error:
            plan(noted, ASKED, "zo", free, least - 1, "f1 is")
        assert "would fit" not in str(error.value)
    assert "the batch size stays: f1 is" in str(advice(noted, ASKED, "zo", least - 1, MemoryError(), "f1 is"))
    assert {(way.batch_size, way.accumulate) for way in asked} == {(16, 2)}


def test_a_budget_leaves_macro_f1_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over micro-batches is another number for others, unlike that of a loss or an error rate."""
    from zolr.cli.finetune import Finetune
    from zolr.cli.job import Job

    monkeypatch.setattr(Job, "foretell", lambda self, settings: 1000 * settings.batch_size)
    given = dict(k=6, eval_rows=4, max_length=16, paradigm="zo", lr=1e-3, eps=1e-3, device="cpu")

    def run(objective: str, **more: Any) -> Job:
        return Job(Finetune.gather({**given, "objective": objective, **more}, None))

    free = run("f1")
    assert (free.settings.batch_size, free.settings.accumulate) == (32, 1) and free.predicted is not None
    budget = f"{free.predicted - 1}B"
    for objective in ("loss", "accuracy"):
        split = run(objective, memory_budget=budget).settings
        assert (split.batch_size, split.accumulate) == (16, 2)
    with pytest.raises(BudgetError, match="the batch size stays: --objective f1 is the mean of"):
        run("f1", memory_budget=budget)
    kept = run("f1", memory_budget=f"{free.predicted}B").settings
    assert (kept.batch_size, kept.accumulate) == (32, 1)


def test_ways_that_cannot_be_predicted_are_left_out_with_their_reason() -> None:
    def peak_at(way: Way) -> int:
        if way.signs == "together":
            raise UsageError("realization 'inplace' holds one sign at a time")
        return peak(way)

    picked = plan(peak_at, ASKED, "zo", EVERYTHING, 1300)
    assert picked.way.signs == "sequence"
    assert all("--signs together" in line and "holds one sign" in line for line in picked.skipped)
    assert picked.skipped and set(picked.skipped) <= set(told(picked, "zo", 1300))

    def never(way: Way) -> int:
        raise UsageError("no rule")

    with pytest.raises(UsageError, match="nothing to choose; .*no rule"):
        plan(never, ASKED, "zo", EVERYTHING, 1300)


def test_more_passes_cost_more_and_so_does_recomputing() -> None:
    assert Way(32, 1).cost < Way(16, 2).cost < Way(1, 32).cost == 32 * (1 + PASS_ROWS)
    recomputing = [Way(32, 1, checkpointing=how).cost for how in (False, "selective", True)]
    assert recomputing == sorted(set(recomputing)) and recomputing[-1] < Way(1, 32).cost


@pytest.mark.parametrize("paradigm", ["fo", "fwd"])
def test_what_ways_leave_out_would_change_nothing(paradigm: str) -> None:
    """With a derivative the side path is taken in any case, so that asking for it is no way of its own."""
    from zolr.memory import predict
    from zolr.methods import compose
    from zolr.models import PRESETS

    shape = PRESETS["gpt2"].config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)
    peaks = {
        predict(
            shape, compose("stiefel", paradigm, rank=4), batch_size=2, max_length=8, realization=how
        ).peak_bytes
        for how in ("auto", "side")
    }
    assert len(peaks) == 1
    assert {way.realization for way in ways(ASKED, paradigm, EVERYTHING)} == {"auto"}


def test_no_peak_is_predicted_twice(zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zolr import memory

    asked: list[tuple[Any, ...]] = []
    predict = memory.predict

    def counted(*args: Any, **settings: Any) -> Any:
        asked.append(tuple(sorted((k, str(v)) for k, v in settings.items())))
        return predict(*args, **settings)

    monkeypatch.setattr(memory, "predict", counted)
    output = ("--paradigm", "fo", "--lr", 1e-3, "--output", tmp_path / "run")
    code, _, err = finetune(zolr, *output, "--memory-budget", "64MiB")
    assert code == 0, err
    assert asked and len(asked) == len(set(asked))


def test_a_measured_peak_over_the_budget_is_told() -> None:
    assert verdict(2**30, 2**30, "live tensors") is None and verdict(1, None, "") is None
    assert "is over --memory-budget 1.00 GiB" in str(verdict(2**30, 2**31, "live tensors"))


def test_sizes_that_round_to_the_same_are_told_in_bytes() -> None:
    """12 MiB that do not fit where 12 MiB would say nothing."""
    unit, budget = 12_290_000, 12_300_000
    with pytest.raises(
        BudgetError, match="memory-budget 12,300,000 B: the least is 12,300,030 B .* 12MiB would do"
    ):
        plan(lambda way: unit + 10_000 + 30 * way.batch_size, Way(1), "fo", (), budget)
    over = str(verdict(budget, budget + 9, ""))
    assert "peak, 12,300,009 B" in over and "--memory-budget 12,300,000 B" in over
    picked = plan(
        lambda way: budget + (0 if way.checkpointing else 9), Way(1), "fo", ["checkpointing"], budget
    )
    assert "12,300,000 B; the next faster way tried" in told(picked, "fo", budget)[0]
    least = {"status": compare.NOT_RUN, "peak_bytes_predicted": budget + 9, "budget": budget}
    assert compare._said(least) == "does not fit: predicted 12,300,009 B of 12,300,000 B"
    assert "12,300,009 B" in estimate._fitting({"largest_batch": 0, "one_row_bytes": budget + 9}, budget)


@pytest.mark.parametrize(("every", "method"), [(2, "stiefel"), (2, "galore"), (1, "stiefel"), (2, "gum")])
def test_a_run_that_is_over_before_its_subspaces_change_takes_less(
    zolr: Run, tmp_path: Path, every: int, method: str
) -> None:
    """Of two steps: a window of two never closes, one of one does; coins may leave any window the worst."""
    given = ("--method", method, "--paradigm", "fo", "--dtype", "bfloat16", "--lr", 1e-3)
    code, out, err = finetune(zolr, *given, "--refresh-every", every, "--output", tmp_path / "run")
    assert code == 0, err
    predicted, measured = (json.loads(out)[f"peak_bytes_{how}"] for how in ("predicted", "measured"))
    if method != "gum":
        assert predicted == pytest.approx(measured, rel=0.001)
    assert predicted >= 0.999 * measured


def test_steps_that_nobody_knows_are_predicted_with_a_change() -> None:
    from zolr.memory import predict

    def peak(steps: int | None, method: Method) -> int:
        size: Any = dict(batch_size=2, max_length=8, dtype=torch.bfloat16)
        return predict("demo", method, steps=steps, **size).peak_bytes

    stiefel, inputs = compose("stiefel", "fo", refresh_every=5), compose("dependent", "zo", refresh_every=5)
    assert peak(5, stiefel) < peak(6, stiefel) == peak(None, stiefel)
    assert inputs.projector.learns_from == "inputs"  # seen where a window begins, the first one too
    assert peak(5, inputs) == peak(None, inputs)


@pytest.mark.parametrize(("method", "paradigm", "told"), [("adamw", "fo", True), ("mezo", "zo", False)])
def test_what_ranks_exchange_is_said_to_come_on_top(method: str, paradigm: str, told: bool) -> None:
    from zolr.cli.finetune import Finetune
    from zolr.cli.job import Job

    given: dict[str, Any] = dict(
        method=method, paradigm=paradigm, lr=1e-3, steps=2, k=3, eval_rows=4, threads=1
    )
    alone, beside = (Job(Finetune(**given).filled()) for _ in range(2))
    loose: Any = beside
    loose.team = SimpleNamespace(size=2)
    assert alone.predicted == beside.predicted and alone.on_top == 0
    notes = [note for note in beside.notes if "what 2 ranks exchange of its gradients comes on top" in note]
    assert len(notes) == told and not any("on top" in note for note in alone.notes)
    # measured with two ranks: 22.2 MB more than predicted
    assert 22_200_000 < beside.on_top < 40_000_000 if told else beside.on_top == 0


def finetune(zolr: Run, *more: object) -> tuple[int, str, str]:
    given: list[object] = ["--k", 3, "--steps", 2, "--eval-rows", 4, "--max-length", 16, "--threads", 1]
    return zolr("finetune", *given, *more, "--json")


def test_a_run_keeps_its_budget(zolr: Run, tmp_path: Path) -> None:
    def run(name: str, *more: object) -> tuple[dict[str, Any], str]:
        output = ("--paradigm", "fo", "--lr", 1e-3, "--output", tmp_path / name)
        code, out, err = finetune(zolr, *output, *more)
        assert code == 0, err
        return json.loads(out), err

    free, _ = run("free", "--batch-size", 16)
    assert "within_budget" not in free
    budget = int(0.8 * free["peak_bytes_predicted"])
    tight, said = run("tight", "--memory-budget", f"{budget}B")
    assert "memory budget" in said and "would take" in said
    assert tight["peak_bytes_predicted"] <= budget == tight["memory_budget_bytes"]
    assert tight["peak_bytes_measured"] <= budget and tight["within_budget"] is True
    used = tight["settings"]
    assert used["batch_size"] * used["accumulate"] == 16
    # the config of the run says what was picked, and repeats it
    again = zolr(
        "finetune", "--config", tmp_path / "tight" / "config.toml", "--output", tmp_path / "again", "--json"
    )
    assert json.loads(again[1])["settings"] == used


def test_a_budget_that_nothing_fits_ends_before_training(zolr: Run, tmp_path: Path) -> None:
    code, out, err = finetune(
        zolr, "--paradigm", "fo", "--batch-size", 1, "--memory-budget", "1MiB", "--output", tmp_path / "run"
    )
    assert (code, out) == (7, "") and not (tmp_path / "run").exists()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "would do" in line and "the least is" in line
    code, _, err = finetune(zolr, "--memory-budget", "4", "--output", tmp_path / "run")
    assert code == 2 and "--memory-budget '4' is no amount of memory" in err


def test_a_size_that_was_given_is_never_changed(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zolr.cli.job import Job

    monkeypatch.setattr(Job, "foretell", lambda self, settings: settings.batch_size << 21)
    given = ("--paradigm", "fo", "--batch-size", 4, "--no-checkpointing", "--output", tmp_path / "run")
    code, _, err = finetune(zolr, *given, "--memory-budget", "6MiB", "--dry-run")
    assert code == 7 and "the least is" in err and "--batch-size 4 --accumulate 1 --no-checkpointing" in err


@pytest.mark.parametrize("documents", ["joined", "apart"])
def test_pretraining_keeps_its_budget(zolr: Run, tmp_path: Path, documents: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"The {i}th sentence of a text that has {i} more of them." for i in range(900))
    )
    shape = ("--hidden-size", 32, "--layers", 2, "--heads", 2, "--train-tokenizer", "--vocab-size", 300)
    given: tuple[object, ...] = ("--data", text, *shape, "--steps", 2, "--length", 32, "--threads", 1)
    given += ("--documents", documents)

    def run(name: str, *more: object) -> tuple[int, str, str]:
        return zolr("pretrain", *given, "--output", tmp_path / name, "--json", *more)

    code, out, err = run("free")
    assert code == 0, err
    free = json.loads(out)
    assert free["peak_bytes_predicted"] == pytest.approx(free["peak_bytes_measured"], rel=0.01)
    budget = int(0.6 * free["peak_bytes_predicted"])
    code, out, err = run("tight", "--memory-budget", f"{budget}B")
    assert code == 0 and "memory budget" in err, err
    tight = json.loads(out)
    assert tight["within_budget"] is True and tight["peak_bytes_measured"] <= budget
    assert tight["settings"]["batch_size"] * tight["settings"]["accumulate"] == 32
    code, out, err = run("none", "--memory-budget", "100KiB")
    assert code == 7 and "would do" in err
