"""Every row of METHODS on one fine-tuning task and one small pretraining run: loss, state, peak and step time.

    ZOLR_DATA=../shared/data python benchmarks/methods.py                  # all rows; what has a result is not run again
    ZOLR_DATA=../shared/data python benchmarks/methods.py --only galore    # one row
    python benchmarks/methods.py --task finetune --smoke                   # three steps, one rate
    python benchmarks/methods.py --markdown                                # the table of what there is, and no run

`finetune` is the demo model on its own task: 80 steps of 16 examples by backprop, 300 forward passes of 32 examples without
it. `pretrain` is a llama of width 96 from random weights on a children's-stories corpus, 30,720 tokens for every row. A row is as
`zolr finetune` has it (rank, selection, probes), but for windows and turns of blocks, which are a fifth of a run where they are
longer, so that every row refreshes at least four times.

The rate of a row is the best of a grid of factors, the same for all: 0.01, 0.03, 0.1 and so on to 100, walked from 1 and 3 on in
the direction in which the loss falls for as long as it does. The factor multiplies the row's own rate (for pretraining four times that), and for
forward-only rows, whatever rate they were published with, the one that the engine measures; those with a published rate are run
at it too. What chooses is the loss on held-out rows; in `finetune` the table has that of other rows. All runs are made by one
process on one thread, with one seed. Losses, metrics and state bytes are of the end of a run; the peak is that of live tensors
over further steps, one of which begins a new window; times are processor time of a step at factor 1, the worst one without the
first. Results are merged into `benchmarks/results/methods.json`, with the settings and versions they were made with.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import zolr

RESULTS = Path(__file__).parent / "results" / "methods.json"
DATA = Path(os.environ.get("ZOLR_DATA", Path(__file__).parents[2] / "shared" / "data"))
FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
START = (1.0, 3.0)
PRETRAINING = 4.0  # random weights stand more than trained ones: 1e-3 against 2.5e-4 for the default method
UNMEASURED = {
    "dpzero": "mezo"
}  # a private rule may not look at losses; it gets the rate of the same rule without noise
PUBLISHED = "published"  # in place of a factor
MODEL = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
LENGTH, ROWS, STEPS = 64, 8, 60  # of pretraining
EXAMPLES, TURNS = 16, 80  # a step and steps of fine-tuning by backprop
FORWARD_EXAMPLES, FORWARDS = 32, 300  # without
WINDOWS = 5  # at least, of a run


def measured(engine: Any, batches: Callable[[int], Sequence[Any]], steps: int) -> dict[str, Any]:
    """Train, and what it took."""
    from zolr.memory import LiveBytes, kept, measure

    times, loss, skipped, forwards = [], 0.0, 0, 0
    for step in range(steps):
        ready = batches(step)
        started = time.process_time()  # of one thread: a busy machine would be all that a clock shows
        info = engine.step(ready)
        times.append(time.process_time() - started)
        skipped, forwards = skipped + info.skipped, forwards + info.forwards
        loss = loss if info.skipped else info.loss
    counted = LiveBytes()
    counted.track(engine.model)  # whole coordinates are the weights themselves and count once
    state = {part: counted.track(*tensors) for part, tensors in kept(engine).items()}
    return {
        "train_loss": loss,
        "skipped": skipped,
        "forwards": forwards,
        "state_bytes": state["optimizer"],
        "coords_bytes": state["coords"],
        "cpu_median_s": statistics.median(times),
        "cpu_worst_s": max(times[1:] or times),
        "cpu_first_s": times[0],
        "trained_share": engine.trained_share,
        "lr": engine.base_lr,
        "_peak": lambda: _peak(engine, batches(steps), measure),
    }


def _peak(engine: Any, batch: Sequence[Any], measure: Any) -> int:
    with measure(engine, *batch) as found:
        engine.step(batch)
        if engine.method.refresh_every:
            engine.refresh()
            engine.step(batch)
    return found.peak_bytes


def peaked(case: dict[str, Any], found: dict[str, Any]) -> dict[str, int]:
    """The peak, which is the same at every rate."""
    peak = found.pop("_peak")
    return {"peak_bytes": peak()} if case["name"] == "1" else {}


def windows(method: Any, steps: int) -> dict[str, int]:
    """Lives of subspaces and turns of blocks, cut so that a run has several."""
    longest = max(1, steps // WINDOWS)
    every = setting_of(method.layers, "every")
    found = {"refresh_every": method.refresh_every, "switch_every": every}
    return {name: min(value, longest) for name, value in found.items() if value is not None}


def setting_of(part: Any, name: str) -> Any:
    """A number of a part, or None."""
    return getattr(part, name, None)


def scaled(course: Callable[[int], float] | None, factor: float) -> Callable[[int], float]:
    """A schedule times a factor, which so reaches a rate that the engine measures."""
    return lambda step: factor * (course(step) if course is not None else 1.0)


def finetuned(case: dict[str, Any]) -> dict[str, Any]:
    """One run on the demo."""
    from dataclasses import dataclass

    from zolr.cli.choices import schedule_of
    from zolr.cli.finetune import Finetune
    from zolr.cli.job import Job
    from zolr.methods import METHODS

    @dataclass(frozen=True)
    class Measured(Finetune):
        """Settings under which every rate that can be measured is."""

        def learning_rate(self, method: Any, width: int) -> float | None:
            """None where the engine can choose one."""
            free = method.tunable and self.lr is None and not case["published"]
            return None if free else super().learning_rate(method, width)

    method = METHODS[case["row"]].build(case["paradigm"])
    forward_only = case["paradigm"] != "fo"
    size = FORWARD_EXAMPLES if forward_only else EXAMPLES
    steps = case["steps"] or (FORWARDS // method.estimator.forwards(1) if forward_only else TURNS)
    settings = Measured(
        method=case["row"],
        paradigm=case["paradigm"],
        steps=steps,
        batch_size=size,
        lr=case["lr"],
        threads=1,
        **windows(method, steps),
    ).filled()
    job = Job(settings, scaled(schedule_of(settings.schedule, 0, steps), case["factor"]))
    before = job.work.evaluate(job.test, job.batch_size)["loss"] if case["name"] == "1" else None
    found = measured(job.engine, job.batches, steps)
    held_out = job.work.evaluate(job.validation, job.batch_size)
    test = job.work.evaluate(job.test, job.batch_size)
    found |= {"chosen_by": held_out["loss"], "loss": test["loss"], "accuracy": test["accuracy"]}
    found |= {"examples": job.step_size * steps, "steps": steps, "loss_before": before}
    peak = peaked(case, found)
    return found | peak


@cache
def text() -> tuple[int, Any, Any]:
    """Size of the vocabulary, rows to train on, and rows to evaluate on."""
    from zolr.models import load_tokenizer
    from zolr.tasks.shards import pack
    from zolr.tasks.streams import TokenStream
    from zolr.tasks.texts import sources

    tokenizer: Any = load_tokenizer(str(DATA / "models" / "stories260K"))
    train, valid = (
        TokenStream.of_ids(pack(files, tokenizer), tokenizer, length=LENGTH, batch_size=ROWS, seed=0)
        for files in sources([DATA / "corpus" / "tinystories"])
    )
    return len(tokenizer), train, valid


def pretrained(case: dict[str, Any]) -> dict[str, Any]:
    """One run from random weights."""
    from functools import partial

    import torch
    from transformers import AutoConfig

    from zolr.cli.choices import schedule_of
    from zolr.engine import Engine
    from zolr.errors import UsageError
    from zolr.methods import METHODS, compose
    from zolr.models import build, lm_loss, lm_losses

    row, paradigm = METHODS[case["row"]], case["paradigm"]
    if row.adapter is not None:
        raise UsageError(f"method '{row.name}' trains an adapter beside weights that stay random")
    vocabulary, stream, held_out = text()
    config = AutoConfig.for_model("llama", vocab_size=vocabulary, tie_word_embeddings=True, **MODEL)
    model, steps = build(config, seed=0), case["steps"] or STEPS
    method = compose(row.name, paradigm, **windows(row.build(paradigm), steps))
    own = row.lr[paradigm]
    usual = own and own * (PRETRAINING if paradigm == "fo" else 1.0)
    rate = case["lr"] or (usual if case["published"] or not method.tunable else None)
    loss = partial(lm_loss, chunk=1024)

    def evaluated() -> float:
        model.eval()
        with torch.no_grad():
            sums = [loss(model, batch) for batch in held_out.evaluation(96)]
        model.train()
        return sum(float(s) for s, _ in sums) / sum(int(n) for _, n in sums)

    before = evaluated() if case["name"] == "1" else None
    engine = Engine(
        model,
        method,
        lr=rate,
        loss=lm_losses if method.private else loss,
        select=row.trained(paradigm),
        schedule=scaled(schedule_of("linear", min(15, steps // 4), steps), case["factor"]),
    )
    found = measured(engine, lambda step: [stream.batch(step)], steps)
    mean = evaluated()
    found |= {"chosen_by": mean, "loss": mean, "tokens": steps * ROWS * LENGTH, "loss_before": before}
    peak = peaked(case, found)
    return found | {"steps": steps} | peak


TASKS = {"finetune": finetuned, "pretrain": pretrained}


def one(case: dict[str, Any]) -> dict[str, Any]:
    """One run, or why there is none."""
    try:
        found = TASKS[case["task"]](case)
        return found | {"lr": found["lr"] * case["factor"]}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def numbers(rates: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Runs of the grid that have a loss."""
    return {
        f: r
        for f, r in rates.items()
        if f != PUBLISHED and "failed" not in r and r["chosen_by"] == r["chosen_by"]
    }


def best_of(rates: dict[str, dict[str, Any]]) -> tuple[str | None, bool]:
    """The factor with the least held-out loss, and whether it is at an end of those that ran."""
    done = numbers(rates)
    if not done:
        return None, False
    best = min(done, key=lambda f: done[f]["chosen_by"])
    ordered = sorted(float(f) for f in rates if f != PUBLISHED)
    return best, len(ordered) > 1 and float(best) in (ordered[0], ordered[-1])


def following(rates: dict[str, dict[str, Any]]) -> float | None:
    """The next factor: from the start on in the direction in which the loss falls, None where it falls no more."""
    best = best_of(rates)[0]
    if best is None:
        return None
    at = FACTORS.index(float(best))
    beside = [FACTORS[i] for i in (at + 1, at - 1) if 0 <= i < len(FACTORS)]
    return next((f for f in beside if f"{f:g}" not in rates), None)


def cells_of(name: str, case: dict[str, Any]) -> list[str]:
    """One line of the table."""
    best, at_end = best_of(case)
    if best is None:
        return [name, next(iter(case.values()), {}).get("failed", "not run")]
    r, published = case[best], case.get(PUBLISHED, {})
    fact = f"{best}{'*' if at_end else ''}"
    cells = [name, fact, f"{r['lr']:.2g}", f"{r['loss']:.3f}"]
    cells += [f"{r['accuracy']:.3f}" if "accuracy" in r else "-"]
    cells += [f"{published['loss']:.3f} at {published['lr']:.2g}" if "loss" in published else ""]
    cells += [
        f"{(r['state_bytes'] + r['coords_bytes']) / 2**20:.2f}",
        f"{case['1']['peak_bytes'] / 2**20:.1f}",
    ]
    if "cpu_median_s" in case["1"]:
        cells += [f"{1e3 * case['1'][f'cpu_{which}_s']:.0f}" for which in ("median", "worst")]
    else:
        cells += ["", ""]
    return cells + [str(r["skipped"])]


HEAD = ("row", "factor", "lr", "loss", "accuracy", "published rate", "state MiB", "peak MiB")
HEAD += ("median CPU ms", "worst", "skipped")


def shown(results: dict[str, Any], markdown: bool) -> None:
    """A table for each task, rows by loss within a paradigm."""
    for task in TASKS:
        cases = {n.partition("/")[2]: c for n, c in results["cases"].items() if n.startswith(f"{task}/")}

        def order(name: str, cases: dict[str, Any] = cases) -> tuple[str, float]:
            best = best_of(cases[name])[0]
            return name.partition(":")[2], float("inf") if best is None else cases[name][best]["loss"]

        lines = [cells_of(name, cases[name]) for name in sorted(cases, key=order)]
        before = [r["loss_before"] for c in cases.values() for r in c.values() if r.get("loss_before")]
        if not lines:
            continue
        print(f"\n{task}" + (f"; loss before training {before[0]:.3f}" if before else "") + "\n")
        if markdown:
            print("| " + " | ".join(HEAD) + " |")
            print("|" + "---|" * len(HEAD))
        else:
            print(f"{HEAD[0]:18}" + "".join(f"{name:>18}" for name in HEAD[1:]))
        for cells in lines:
            if markdown:
                print("| " + " | ".join(cells + [""] * (len(HEAD) - len(cells))) + " |")
            else:
                print(f"{cells[0]:18}" + "".join(f"{cell:>18}" for cell in cells[1:]))
    print("\n* the best factor is at an end of the grid")


def cases_of(
    task: str, row: Any, paradigm: str, results: dict[str, Any], options: Any
) -> list[dict[str, Any]]:
    """The runs of one row that every row has."""
    like = results["cases"].get(f"{task}/{UNMEASURED.get(row.name)}:{paradigm}", {}).get("1", {}).get("lr")
    case = dict(task=task, row=row.name, paradigm=paradigm, published=False, lr=like)
    case["steps"] = 3 if options.smoke else options.steps
    grid = [{**case, "factor": f, "name": f"{f:g}"} for f in (START[:1] if options.smoke else START)]
    method, rate = row.methods[paradigm], row.lr[paradigm]
    if rate is not None and (method.tunable or like is not None) and not options.smoke:
        grid.append({**case, "factor": 1.0, "lr": None, "published": True, "name": PUBLISHED})
    return grid


def main() -> None:
    """Run the cases that have no result, and print all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="one row of METHODS")
    parser.add_argument("--task", choices=tuple(TASKS), help="one of the two tasks")
    parser.add_argument("--steps", type=int, help="steps of a run, instead of the usual number")
    parser.add_argument("--smoke", action="store_true", help="three steps and one rate")
    parser.add_argument("--again", action="store_true", help="run cases that have a result too")
    parser.add_argument(
        "--markdown", action="store_true", help="print the results that there are, and run nothing"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    import torch

    from zolr.methods import METHODS

    torch.set_num_threads(1)
    if options.only is not None and options.only not in METHODS:
        parser.error(f"--only {options.only}: no such row; use one of {', '.join(METHODS)}")
    results = json.loads(options.output.read_text()) if options.output.exists() else {"cases": {}}
    if options.markdown:
        shown(results, True)
        return
    results["conditions"] = {p: version(p) for p in ("torch", "transformers")} | {"zolr": zolr.__version__}
    results["conditions"] |= {"smoke": options.smoke, "factors": FACTORS, "model": MODEL}
    results["conditions"] |= {"pretraining": [STEPS, ROWS, LENGTH], "forwards": [FORWARDS, FORWARD_EXAMPLES]}
    results["conditions"] |= {"backprop": [TURNS, EXAMPLES]}
    options.output.parent.mkdir(exist_ok=True)
    rows = METHODS.values() if options.only is None else (METHODS[options.only],)
    tasks = TASKS if options.task is None else (options.task,)

    def save(found: dict[str, Any], rates: dict[str, Any]) -> None:
        rates.update(found)
        aside = options.output.with_name(options.output.name + ".tmp")
        aside.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        aside.replace(options.output)  # a kill must not cost what is known

    for paradigm, task, row in product(("fo", "fwd", "zo"), tasks, rows):
        if paradigm not in row.paradigms:
            continue
        rates = results["cases"].setdefault(f"{task}/{row.name}:{paradigm}", {})
        if options.again:
            rates.clear()

        cases = cases_of(task, row, paradigm, results, options)
        for case in cases:
            if case["name"] not in rates:
                save({case["name"]: one(case)}, rates)
        while not options.smoke and (factor := following(rates)) is not None:
            save({f"{factor:g}": one({**cases[0], "factor": factor, "name": f"{factor:g}"})}, rates)
    for name, rates in results["cases"].items():  # results of a version that did not time, or not count
        counted = "failed" in rates["1"] or {"cpu_median_s", "peak_bytes"} <= rates["1"].keys()
        if not counted and options.only is None:
            task, _, who = name.partition("/")
            row, _, paradigm = who.partition(":")
            save({"1": one(cases_of(task, METHODS[row], paradigm, results, options)[0])}, rates)
    shown(results, False)


if __name__ == "__main__":
    main()
