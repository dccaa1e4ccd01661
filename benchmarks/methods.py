"""Every row of METHODS on one fine-tuning task and one small pretraining run: loss, state, peak and step time.

    ZOLR_DATA=../shared/data python benchmarks/methods.py                  # all rows; what has a result is not run again
    ZOLR_DATA=../shared/data python benchmarks/methods.py --only galore    # one row
    python benchmarks/methods.py --task finetune --smoke                   # three steps, one rate

`finetune` is the demo model on its own task, with the steps and batches that `zolr finetune` has for the paradigm;
`pretrain` is a llama of width 96 from random weights on a children's-stories corpus, the same tokens for every row. Each row's
rate is its own (for pretraining four times that) times one of `FACTORS`, the same for all, chosen by the loss on held-out rows;
where the best factor is at an end of the grid the table says so. Forward-only rows without a rate measure one, which is then
multiplied. Every run is a process of its own on one thread. Losses, metrics and state bytes are of the end of a run; the peak
is that of live tensors over further steps, one of which begins a new window; the worst step leaves out the first. Results are
merged into `benchmarks/results/methods.json`, with the settings and versions they were made with.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "methods.json"
DATA = Path(os.environ.get("ZOLR_DATA", Path(__file__).parents[2] / "shared" / "data"))
FACTORS = (1.0, 0.3, 3.0)  # 1 first: where the rate is measured, the others multiply what it was
PRETRAINING = 4.0  # random weights stand more than trained ones: 1e-3 against 2.5e-4 for the default method
MODEL = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
LENGTH, ROWS, STEPS = 128, 16, 600


def measured(engine: Any, batches: Callable[[int], Sequence[Any]], steps: int) -> dict[str, Any]:
    """Train, and what it took."""
    from zolr.memory import LiveBytes, kept, measure

    times, loss, skipped, forwards = [], 0.0, 0, 0
    for step in range(steps):
        ready = batches(step)
        started = time.perf_counter()
        info = engine.step(ready)
        times.append(time.perf_counter() - started)
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
        "step_median_s": statistics.median(times),
        "step_worst_s": max(times[1:] or times),
        "step_first_s": times[0],
        "trained_share": engine.trained_share,
        "lr": engine.base_lr,
        "_peak": lambda: _peak(engine, batches(steps), measure, kept),
    }


def _peak(engine: Any, batch: Sequence[Any], measure: Any, kept: Any) -> int:
    held = [tensor for tensors in kept(engine).values() for tensor in tensors]
    with measure(engine.model, *held, *batch) as found:
        engine.step(batch)
        if engine.method.refresh_every:
            engine.refresh()
            engine.step(batch)
    return found.peak_bytes


def finetuned(case: dict[str, Any]) -> dict[str, Any]:
    """One run on the demo."""
    from zolr.cli.finetune import Finetune, Job
    from zolr.cli.workload import width_of

    common = dict(method=case["row"], paradigm=case["paradigm"], steps=case["steps"], threads=1)
    settings = Finetune(**common).filled()
    job = Job(settings)
    usual = case["measured"] or settings.learning_rate(settings.composed(), width_of(job.work.model))
    if usual is not None and case["factor"] != 1.0:
        job = Job(Finetune(**common, lr=usual * case["factor"]).filled())
    found = measured(job.engine, job.batches, job.settings.steps or 0)
    held_out = job.work.evaluate(job.validation, job.batch_size)
    test = job.work.evaluate(job.test, job.batch_size)
    found |= {"chosen_by": held_out["loss"], "loss": test["loss"], "accuracy": test["accuracy"]}
    examples = job.step_size * (job.settings.steps or 0)
    return found | {"examples": examples, "peak_bytes": found.pop("_peak")()}


def pretrained(case: dict[str, Any]) -> dict[str, Any]:
    """One run from random weights."""
    from functools import partial

    import torch
    from transformers import AutoConfig

    from zolr.cli.finetune import schedule_of
    from zolr.engine import Engine
    from zolr.errors import UsageError
    from zolr.methods import METHODS
    from zolr.models import build, lm_loss, load_tokenizer
    from zolr.tasks.streams import TokenStream
    from zolr.tasks.texts import text_files

    row, paradigm = METHODS[case["row"]], case["paradigm"]
    if row.adapter is not None:
        raise UsageError(f"method '{row.name}' trains an adapter beside weights that stay random")
    tokenizer: Any = load_tokenizer(str(DATA / "models" / "stories260K"))
    train, valid = text_files([DATA / "corpus" / "tinystories"])
    stream = TokenStream.of_text(train, tokenizer, length=LENGTH, batch_size=ROWS, seed=0)
    held_out = TokenStream.of_text(valid, tokenizer, length=LENGTH, batch_size=ROWS, seed=0)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=True, **MODEL)
    model, steps = build(config, seed=0), case["steps"] or STEPS
    rate = case["measured"] or (row.lr[paradigm] and row.lr[paradigm] * PRETRAINING)
    loss = partial(lm_loss, chunk=1024)
    engine = Engine(
        model,
        row.build(paradigm),
        lr=rate and rate * case["factor"],
        loss=loss,
        select=row.trained(paradigm),
        schedule=schedule_of("linear", min(20, steps // 4), steps),
    )
    found = measured(engine, lambda step: [stream.batch(step)], steps)
    model.eval()
    with torch.no_grad():
        sums = [loss(model, batch) for batch in held_out.evaluation(256)]
    mean = sum(float(s) for s, _ in sums) / sum(int(n) for _, n in sums)
    found |= {"chosen_by": mean, "loss": mean, "tokens": steps * ROWS * LENGTH}
    return found | {"peak_bytes": found.pop("_peak")()}


TASKS = {"finetune": finetuned, "pretrain": pretrained}


def ran(case: dict[str, Any]) -> dict[str, Any]:
    """One run in a process of its own, or why there is none."""
    command = [sys.executable, __file__, "--one", json.dumps(case)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def best_of(rates: dict[str, dict[str, Any]]) -> tuple[str | None, bool]:
    """The factor with the least held-out loss, and whether it is at an end of those that ran."""
    done = {f: r for f, r in rates.items() if "failed" not in r and r["chosen_by"] == r["chosen_by"]}
    if not done:
        return None, False
    best = min(done, key=lambda f: done[f]["chosen_by"])
    ordered = sorted(map(float, rates))
    return best, len(ordered) > 1 and float(best) in (ordered[0], ordered[-1])


def shown(results: dict[str, Any]) -> None:
    """The table."""
    head = (
        "case",
        "factor",
        "lr",
        "loss",
        "acc",
        "state MiB",
        "peak MiB",
        "median ms",
        "worst ms",
        "skipped",
    )
    print(f"{head[0]:34}" + "".join(f"{name:>11}" for name in head[1:]))
    for name, case in sorted(results["cases"].items()):
        best, at_end = best_of(case)
        if best is None:
            print(f"{name:34} {next(iter(case.values()))['failed']}")
            continue
        r = case[best]
        cells = [f"{best}{'*' if at_end else ''}", f"{r['lr']:.2g}", f"{r['loss']:.4f}"]
        cells += [f"{r['accuracy']:.3f}" if "accuracy" in r else "-"]
        cells += [f"{(r['state_bytes'] + r['coords_bytes']) / 2**20:.2f}", f"{r['peak_bytes'] / 2**20:.1f}"]
        cells += [f"{1e3 * r['step_median_s']:.1f}", f"{1e3 * r['step_worst_s']:.1f}", str(r["skipped"])]
        print(f"{name:34}" + "".join(f"{cell:>11}" for cell in cells))
    print("* the best factor is at an end of the grid")


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
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        case = json.loads(options.one)
        print(json.dumps(TASKS[case["task"]](case)))
        return
    from zolr.methods import METHODS

    if options.only is not None and options.only not in METHODS:
        parser.error(f"--only {options.only}: no such row; use one of {', '.join(METHODS)}")
    results = json.loads(options.output.read_text()) if options.output.exists() else {"cases": {}}
    results["conditions"] = {p: version(p) for p in ("zolr", "torch", "transformers")}
    results["conditions"] |= {"smoke": options.smoke, "factors": FACTORS, "model": MODEL}
    for task in TASKS if options.task is None else (options.task,):
        for row in METHODS.values() if options.only is None else (METHODS[options.only],):
            for paradigm in row.paradigms:
                rates = results["cases"].setdefault(f"{task}/{row.name}:{paradigm}", {})
                for factor in FACTORS[:1] if options.smoke else FACTORS:
                    if f"{factor:g}" in rates and not options.again:
                        continue
                    known = row.lr[paradigm] is not None or factor == 1.0
                    first = rates.get("1", {}).get("lr")
                    if not known and first is None:
                        continue  # nothing to multiply
                    case = {"task": task, "row": row.name, "paradigm": paradigm, "factor": factor}
                    steps = 3 if options.smoke else options.steps
                    rates[f"{factor:g}"] = ran({**case, "measured": None if known else first, "steps": steps})
                    options.output.parent.mkdir(exist_ok=True)
                    options.output.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    shown(results)


if __name__ == "__main__":
    main()
