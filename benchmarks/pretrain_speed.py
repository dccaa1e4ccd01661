"""What a pretraining step costs beside full AdamW and beside published packages: time, evenness of steps, memory.

    pip install -e ".[peers]"
    python benchmarks/pretrain_speed.py                      # llama-60m, batch 4 x 256, float32, one thread
    python benchmarks/pretrain_speed.py --model llama-20m --only time --rounds 9
    python benchmarks/pretrain_speed.py --only peak --peak-batch 2

Three parts, merged into `benchmarks/results/pretrain_speed.json`:

- `time`: a step of each of our rows over a step of torch's AdamW (fused), paired rounds in alternating order, the same model, batch
  and chunked loss for both; and over AdamW with the loss of transformers, whose logits exist as a whole;
- `even`: steps of one run over several refreshes, the worst step over the median one;
- `peak`: live bytes at most in the first three steps (refreshes of bases included) of every row trained by backprop and
  of the packages, counted by one tracker with weights, batch and optimizer state. Every contestant trains all weights:
  linear maps in subspaces of one rank, embedding, head and norms whole.

Times are seconds of this process's processor.
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
from peers import held, installed, reason
from torch import Tensor, nn

import zolr
from zolr.cli.pretraining import chunk_rows
from zolr.memory import LiveBytes, kept, size_of
from zolr.methods import METHODS, compose
from zolr.models import build, lm_loss

RESULTS = Path(__file__).parent / "results" / "pretrain_speed.json"
GAP, LR = 200, 1e-6


def timed(run: Callable[[], Any]) -> float:
    """Seconds of this process's processor, which other work on the machine moves less than it moves the clock."""
    start = time.process_time()
    run()
    return time.process_time() - start


Step = Callable[[], Any]
Made = tuple[Step, Callable[[], list[Tensor]]]
# rows of ours that are timed: name -> parts of a method
TIMED: dict[str, dict[str, Any]] = {
    "stiefel": dict(method="stiefel", paradigm="fo"),
    "gaussian": dict(method="stiefel", paradigm="fo", projector="gaussian"),
    "dependent": dict(method="dependent", paradigm="fo"),
    "galore": dict(method="galore"),
}


def rows_of_backprop() -> list[str]:
    """Methods that train all weights by backprop."""
    return [n for n, row in METHODS.items() if "fo" in row.paradigms and row.adapter is None]


class Contest:
    """One model, batch and loss for all.

    Args:
        options: of the command line.
        rows: rows of the batch.
    """

    def __init__(self, options: argparse.Namespace, rows: int) -> None:
        self.rank, self.plain = options.rank, build(options.model, dtype=torch.float32)
        vocabulary: int = self.plain.config.vocab_size  # type: ignore[assignment]
        ids = torch.randint(
            vocabulary, (rows, options.length + 1), generator=torch.Generator().manual_seed(0)
        )
        self.data = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        self.chunk = chunk_rows(self.plain)

    def loss(self, model: nn.Module, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum over tokens, and their number."""
        return lm_loss(model, data, chunk=self.chunk)

    def ours(self, gap: int, **parts: Any) -> Made:
        """A step of an engine."""
        method = compose(**parts)
        if getattr(method.projector, "rank", None) is not None:
            parts |= {"rank": self.rank}
        if method.refresh_every:
            parts |= {"refresh_every": gap}
        if any(getattr(method.projector, name, None) is not None for name in ("rank",)):
            parts |= {"tables": "full"}
        model = copy.deepcopy(self.plain)
        engine = zolr.Engine(model, compose(**parts), lr=LR, loss=self.loss)
        return lambda: engine.step([self.data]), lambda: [
            *model.parameters(),
            *(t for part in kept(engine).values() for t in part),
        ]

    def theirs(self, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> Made:
        """A step of an ordinary optimizer."""
        model = copy.deepcopy(self.plain).train()
        optimizer = build_optimizer(model)

        def step() -> None:
            total, count = self.loss(model, self.data)
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step, lambda: [*model.parameters(), *held(optimizer.state.values())]

    def groups(self, model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
        """Linear maps of the layers, which packages project, and all other weights."""
        projected = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
        chosen = {id(p) for p in projected}
        others = [p for p in model.parameters() if id(p) not in chosen]
        return [
            {"params": others},
            {"params": projected, "rank": self.rank, "update_proj_gap": GAP, **settings},
        ]

    def peers(self) -> dict[str, tuple[str, Callable[[nn.Module], torch.optim.Optimizer]]]:
        """Packages, and how each builds its optimizer."""

        def galore(model: nn.Module) -> torch.optim.Optimizer:
            from galore_torch import GaLoreAdamW

            return GaLoreAdamW(self.groups(model, scale=0.25, proj_type="std"), lr=LR)

        def apollo(mini: bool) -> Callable[[nn.Module], torch.optim.Optimizer]:
            def made(model: nn.Module) -> torch.optim.Optimizer:
                from apollo_torch import APOLLOAdamW

                more = dict(proj="random", proj_type="std")
                more |= (
                    dict(scale_type="tensor", scale=128, rank=1)
                    if mini
                    else dict(scale_type="channel", scale=1.0)
                )
                return APOLLOAdamW(self.groups(model, **more), lr=LR)

            return made

        def fira(model: nn.Module) -> torch.optim.Optimizer:
            from fira import FiraAdamW

            return FiraAdamW(self.groups(model, alpha=0.25, proj_type="std"), lr=LR)

        return {
            "galore-torch GaLoreAdamW": ("galore-torch", galore),
            "apollo-torch APOLLO": ("apollo-torch", apollo(False)),
            "apollo-torch APOLLO-Mini, rank 1": ("apollo-torch", apollo(True)),
            "fira FiraAdamW": ("fira", fira),
        }

    def stock(self) -> Step:
        """AdamW as transformers computes the loss."""
        model = copy.deepcopy(self.plain).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

        def step() -> None:
            model(
                input_ids=self.data["input_ids"], shift_labels=self.data["labels"], labels=self.data["labels"]
            ).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def adamw(self) -> Made:
        """The reference."""
        return self.theirs(lambda model: torch.optim.AdamW(model.parameters(), lr=LR, fused=True))


def times(contest: Contest, rounds: int, wanted: list[str]) -> dict[str, dict[str, Any]]:
    """Ratios of every row to AdamW, each timed once in every round."""
    reference, _ = contest.adamw()
    steps = {name: contest.ours(GAP, **parts)[0] for name, parts in TIMED.items() if name in wanted}
    steps["AdamW, loss of transformers"] = contest.stock()
    for run in (reference, *steps.values()):
        run(), run()
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    seconds = []
    for i in range(rounds):
        order = ["", *steps]
        found = {name: timed(steps.get(name, reference)) for name in (order if i % 2 else order[::-1])}
        seconds.append(found[""])
        for name in steps:
            ratios[name].append(found[name] / found[""])
    result = {}
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        result[name] = {"ratio": middle, "lower": low, "upper": high, "rounds": rounds}
        result[name]["adamw_seconds"] = statistics.median(seconds)
        print(f"{name:12} {middle:.3f} ({low:.3f} to {high:.3f}) of AdamW", flush=True)
    return result


def even(contest: Contest, steps: int, gap: int, wanted: list[str]) -> dict[str, dict[str, Any]]:
    """Worst step over the median, of a run over several refreshes."""
    result = {}
    for name, parts in TIMED.items():
        if name not in wanted:
            continue
        step, _ = contest.ours(gap, **parts)
        step(), step()
        spent, refreshed = [], []
        for _ in range(steps):
            start = time.process_time()
            info = step()
            spent.append(time.process_time() - start)
            refreshed.append(info.refreshed)
        median = statistics.median(spent)
        at_refresh = [s for s, new in zip(spent, refreshed, strict=True) if new]
        result[name] = {"steps": steps, "refresh_every": gap, "median_seconds": median}
        result[name] |= {"worst": max(spent) / median}
        if at_refresh:
            result[name] |= {
                "refreshes": len(at_refresh),
                "at_refresh": statistics.median(at_refresh) / median,
            }
        print(f"{name:12} {json.dumps({k: round(v, 3) for k, v in result[name].items()})}", flush=True)
    return result


def peaks(contest: Contest, wanted: list[str], keep: Callable[[dict[str, Any]], None]) -> None:
    """Live bytes at most in three steps, all that a step needs included; each row is kept as it comes."""
    result: dict[str, dict[str, Any]] = {}
    makers: dict[str, Callable[[], Made]] = {
        f"zolr {name}": lambda name=name: contest.ours(GAP, method=name, paradigm="fo")
        for name in rows_of_backprop()
    }
    makers["torch AdamW"] = contest.adamw
    for name, (package, optimizer) in contest.peers().items():
        if installed(package) is None:
            result[name] = {"failed": f"package '{package}' is not installed"}
            continue
        makers[name] = lambda optimizer=optimizer: contest.theirs(optimizer)
    for name, make in makers.items():
        if wanted and not any(word in name for word in wanted):
            continue
        try:
            step, keeps = make()
            live = LiveBytes()
            live.track(contest.data, *keeps())
            with live:
                for _ in range(3):
                    step()
        except Exception as error:  # a package's own fault or a row's: the line says which
            result[name] = {"failed": reason(error)}
            print(f"{name:34} {result[name]['failed']}", flush=True)
            keep(result)
            continue
        result[name] = {"peak_bytes": live.peak}
        print(f"{name:34} {live.peak / 1e6:8.1f} MB", flush=True)
        keep(result)


def main() -> None:
    """Run what is asked for, print and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-60m", help="preset")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--peak-batch", type=int, default=4, help="rows where peaks are counted")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=24, help="of the part 'even'")
    parser.add_argument("--gap", type=int, default=8, help="steps between refreshes in that part")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", choices=("", "time", "even", "peak"))
    parser.add_argument("--rows", default="", help="names of rows, joined by commas; all of them else")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file the results are merged into")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2; figures that are kept need 9")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    contest = Contest(options, options.batch_size)
    rows = [row for row in options.rows.split(",") if row]
    conditions = {
        "model": f"{options.model}, random weights",
        "weights_bytes": size_of(contest.plain),
        "rank": options.rank,
        "dtype": "float32",
        "threads": options.threads,
        "machine": f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(conditions), flush=True)
    case = f"{options.model}, rank {options.rank}"
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    entry = results.setdefault(case, {})
    entry["conditions"] = conditions
    batch = f"{options.batch_size} x {options.length}"

    def keep(part: str, found: dict[str, Any]) -> None:
        entry[part] = {**entry.get(part, {}), **found}
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")

    if options.only in ("", "time"):
        keep(f"time over AdamW, {batch}", times(contest, options.rounds, rows or list(TIMED)))
    if options.only in ("", "even"):
        keep(f"evenness, {batch}", even(contest, options.steps, options.gap, rows or list(TIMED)))
    if options.only in ("", "peak"):
        contest = Contest(options, options.peak_batch)
        part = f"peak, {options.peak_batch} x {options.length}"
        peaks(contest, rows, lambda found: keep(part, found))


if __name__ == "__main__":
    main()
