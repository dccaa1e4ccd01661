"""What a step costs against what it is made of: two forward passes (zo), or a full AdamW step (fo).

    python benchmarks/speed.py                  # 6 layers of width 768, batch 16 x 64, float32, one thread
    python benchmarks/speed.py --dtype bfloat16 --threads 2

Every row is the median over paired rounds of one process: the step and its reference are timed one after the other in
each round, in alternating order, and the ratio is taken within the round. The quartiles of the ratio are printed beside it.
Random weights and random tokens; the loss of a prompt (one position a row through the head).
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import zolr
from zolr.models import build, prompt_loss

RESULTS = Path(__file__).parent / "results" / "speed.json"
WORDS = (5, 6)

ZO = {
    "stiefel, attention, rank 16 (default)": (dict(method="stiefel", paradigm="zo"), "attention"),
    "stiefel, all weights, rank 4": (dict(method="stiefel", paradigm="zo", rank=4), "all"),
    "lozo, all weights, rank 2": (dict(method="lozo"), "all"),
    "mezo, all weights": (dict(method="mezo"), "all"),
}
FO = {
    "stiefel, all weights, rank 16": (dict(method="stiefel", paradigm="fo"), "all"),
    "stiefel, linear maps, rank 16": (dict(method="stiefel", paradigm="fo"), "linear"),
}


def batch(rows: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tokens without padding."""
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary, (rows, length), generator=numbers)
    labels = torch.randint(len(WORDS), (rows,), generator=numbers)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "positions": torch.full((rows,), length - 1),
        "labels": labels,
    }


def paired(step: Callable[[], Any], reference: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Median and quartiles of the ratio of two times, and the median time of the reference in seconds."""

    def timed(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    for run in (step, reference):  # allocators, thread pools and optimizer state
        run(), run()
    ratios, seconds = [], []
    for i in range(rounds):
        if i % 2:
            own, other = timed(step), timed(reference)
        else:
            other, own = timed(reference), timed(step)
        ratios.append(own / other)
        seconds.append(other)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": middle, "lower": low, "upper": high, "reference_seconds": statistics.median(seconds)}


def main() -> None:
    """Time all rows and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--only", default="", help="a part of the names of the rows to run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    plain = build("roberta-base", num_hidden_layers=options.layers, dtype=dtype, dropout=0.0)
    data = batch(options.batch_size, options.max_length, 50000)
    loss = prompt_loss(WORDS)
    found: dict[str, dict[str, float]] = {}

    def two_forwards() -> None:
        with torch.no_grad():
            loss(plain, data).mean().item()
            loss(plain, data).mean().item()

    def engine(parts: dict[str, Any], train: str, lr: float) -> zolr.Engine:
        net = copy.deepcopy(plain)
        return zolr.Engine(net, zolr.compose(**parts), lr=lr, loss=loss, select=train)

    for name, (parts, train) in ZO.items():
        if options.only in name:
            run = engine({**parts, "eps": 1e-3}, train, 1e-6)
            found[f"zo {name} / two forwards"] = paired(
                lambda run=run: run.step([data]), two_forwards, options.rounds
            )
    if any(options.only in name for name in FO):
        full = copy.deepcopy(plain).train()
        optimizer = torch.optim.AdamW(full.parameters(), lr=1e-6)

        def adamw() -> None:
            loss(full, data).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        for name, (parts, train) in FO.items():
            if options.only in name:
                run = engine(parts, train, 1e-6)
                found[f"fo {name} / AdamW"] = paired(lambda run=run: run.step([data]), adamw, options.rounds)
    conditions = {
        "model": f"roberta-base with {options.layers} layers, random weights",
        "batch": f"{options.batch_size} x {options.max_length}",
        "dtype": options.dtype,
        "threads": options.threads,
        "rounds": options.rounds,
        "machine": f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    for name, row in found.items():
        print(f"{name:62} {row['ratio']:.3f}  ({row['lower']:.3f} to {row['upper']:.3f})")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    case = f"{options.dtype}, {options.threads} threads, {options.layers} layers"
    results[case] = {"conditions": conditions, "rows": {**results.get(case, {}).get("rows", {}), **found}}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
