"""Pretraining on real text at equal tokens: full training, subspaces that are drawn, and subspaces taken from gradients.

    ZOLR_DATA=../shared/data python benchmarks/pretraining.py            # a small llama on a CPU; goes on where it stopped
    python benchmarks/pretraining.py --table --markdown table.md         # what there is, and nothing is run
    python benchmarks/pretraining.py --plot table.png
    python benchmarks/pretraining.py --estimates                         # bias and variance of the rows on one real gradient
    python benchmarks/pretraining.py --optimizer averaged --most-seeds 1 # drawn rows without Adam's divisor
    python benchmarks/pretraining.py --trace stiefel@0.003 --seeds 000,222,220,002 --until 150  # which seed makes a run go astray
    python benchmarks/pretraining.py --model llama-20m --prepare         # pack the text first, where the text is, then
    python benchmarks/pretraining.py --model llama-20m --device cuda --seconds 540 --rows stiefel,galore,adamw

One protocol for all rows: the same architecture, text, tokens, order of rows, warm-up and cosine to a tenth, no decay and no
clipping (that of GaLore's C4 runs); rank a quarter of the width (apollo-mini: 1) and the same life of a subspace (`--refresh-every`); embeddings,
head and norms in their whole space, by Adam at one rate for every row (adalomo and flora, whose steps are shares of a weight's
size, have a rate for all weights). The learning rate of matrices, which the row is about, comes from one grid for all, times
the factor that a row is published with (GaLore's 0.25): it begins where it was
published, or is usual, and goes on to the neighbors until the best one has a neighbor on either side. The held-out loss of
seed 0 chooses, on text that no run has seen; then come two more seeds of that rate. A seed names weights, the order of rows and
subspaces.

State is what a run holds from step to step beside the weights, with that of embeddings and head; peak is that of live tensors
over a step that opens a window (CUDA: `max_memory_allocated`); both are taken after training. Every run is a process of its own
on one thread, and its tokens a second are of that thread's processor time (CUDA: of wall-clock time). Results are merged into `benchmarks/results/pretraining.json` (and `pretraining-MODEL.json`), with the settings
and versions they were made with. `--rank`, `--steps` and `--refresh-every` other than the usual ones are groups of their own in the same file, and so are
`--optimizer`: drawn rows whose coordinates are trained by another rule than Adam, with all that has no subspace by Adam as ever, and
`--transport`: drawn rows whose moments at a new subspace begin at zero, or are turned; here they are kept, as GaLore's are.
"""

import argparse
import json
import lzma
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import cos, exp, isfinite, pi
from pathlib import Path
from typing import Any

import zolr

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("ZOLR_DATA", Path(__file__).parents[2] / "shared" / "data"))
SCRATCH = Path("runs") / "pretraining-tokens"

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# rules that do not divide by one number a coordinate: their grids, and the rate to begin with
OPTIMIZERS: dict[str, tuple[tuple[float, ...], float]] = {
    "averaged": ((1e-2, 3e-2, 1e-1, 3e-1, 1.0), 1e-1),  # SGD along a running mean of gradients
    "muon": (GRID, 3e-3),
}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Protocol:
    """What all rows of a model share.

    Args:
        numbers: of a llama; empty for a preset.
        vocabulary: tokens of the tokenizer that is learned from the text.
        text: of `corpus/`, to train on.
        most_tokens: packed at most.
        length, rows, micro: tokens of a row, rows of a step and of a forward pass.
        steps, refresh_every, rank: as they say.
        held_out: rows of an evaluation.
    """

    numbers: dict[str, int]
    vocabulary: int
    text: tuple[str, ...]
    most_tokens: int
    length: int
    rows: int
    micro: int
    steps: int
    refresh_every: int
    rank: int
    held_out: int


BOTH = ("wiki/train-*", "novels/train-*")
PROTOCOLS = {
    "small": Protocol(
        # a vocabulary so small that three quarters of the weights are in matrices: what a row does to them decides
        dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=352),
        1024, ("wiki/train-00.txt.xz", "novels/train-00.txt.xz"), 2_000_000,
        length=64, rows=16, micro=16, steps=600, refresh_every=20, rank=32, held_out=192,
    ),
    # 82 million tokens each, some three epochs of what is packed (which fits into 64 MiB)
    "llama-20m": Protocol(
        {}, 32000, BOTH, 25_000_000, length=256, rows=128, micro=128, steps=2500, refresh_every=100, rank=64, held_out=512,
    ),
    "llama-60m": Protocol(
        {}, 32000, BOTH, 25_000_000, length=256, rows=128, micro=64, steps=2500, refresh_every=100, rank=128, held_out=512,
    ),
    "smoke": Protocol(
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
        512, ("tinystories/train.txt",), 50_000,
        length=32, rows=4, micro=2, steps=4, refresh_every=2, rank=8, held_out=8,
    ),
}  # fmt: skip

TABLES_RATE = 1e-2  # of embeddings, head and norms
# rules that move a weight by a share of its own size: one rate for all weights
RELATIVE = ("adalomo", "flora")

# how each row is composed, and the rate of the grid that it begins with
FULL: dict[str, tuple[dict[str, Any], float]] = {
    "adamw": ({"method": "adamw"}, 1e-3),
    "muon": ({"method": "muon"}, 3e-3),
    "adalomo": ({"method": "adalomo"}, 3e-2),
}
DRAWN: dict[str, tuple[dict[str, Any], float]] = {
    "stiefel": ({"method": "stiefel", "transport": "keep"}, 3e-3),
    "dependent": ({"method": "dependent", "transport": "keep"}, 3e-3),
    "gaussian": ({"method": "stiefel", "projector": "gaussian", "transport": "keep"}, 3e-3),
    "coordinate": ({"method": "stiefel", "projector": "coordinate", "transport": "keep"}, 3e-3),
}
TAKEN: dict[str, tuple[dict[str, Any], float]] = {
    "galore": ({"method": "galore"}, 1e-2),
    "flora": ({"method": "flora"}, 3e-2),
    "grasswalk": ({"method": "grasswalk"}, 1e-2),
    "grassjump": ({"method": "grassjump"}, 1e-2),
    "plumage": ({"method": "plumage"}, 3e-3),
    "gum": ({"method": "gum"}, 3e-3),
    "fira": ({"method": "fira"}, 1e-2),
    "apollo-mini": ({"method": "apollo-mini", "rank": 1}, 1e-2),
    "mofasgd": ({"method": "mofasgd"}, 3e-3),
}
APART = (*FULL, "mofasgd")  # rows without windows: other lives of subspaces are not theirs
ROWS = {"adamw": FULL["adamw"], "muon": FULL["muon"], **DRAWN, **TAKEN, "adalomo": FULL["adalomo"]}


def method_of(
    name: str,
    rank: int,
    refresh_every: int,
    factor: float = 1.0,
    optimizer: str | None = None,
    transport: str | None = None,
) -> Any:
    """The method of a row, whose matrices are trained at `factor` of the rate, times the factor that the row has anyway."""
    from zolr.methods import METHODS, compose

    given, _ = ROWS[name]
    usual = METHODS[given["method"]].build("fo")
    settings: dict[str, Any] = {"rank": rank} if usual.refresh_every or name == "mofasgd" else {}
    if usual.refresh_every is not None:
        settings |= {"refresh_every": refresh_every}
    if name not in RELATIVE:
        settings |= {"scale": usual.scale * factor}
    asked = {"optimizer": optimizer, "transport": transport}
    asked = {part: value for part, value in asked.items() if value is not None}
    return compose(paradigm="fo", tables="full", **{**settings, **given, **asked})


def schedule(steps: int) -> Callable[[int], float]:
    """A tenth of the steps up, then a cosine down to a tenth of the rate."""
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        share = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.1 + 0.45 * (1.0 + cos(pi * share))

    return factor


# ---- text ------------------------------------------------------------------------------------------------------------


def prepared(name: str, protocol: Protocol) -> Path:
    """A folder with the tokenizer and the packed ids of a protocol, made where it is missing; no text is read otherwise."""
    import numpy as np

    from zolr.models import load_tokenizer
    from zolr.tasks.streams import train_tokenizer

    folder = SCRATCH / name
    wanted = {key: asdict(protocol)[key] for key in ("vocabulary", "text", "most_tokens")}
    stamp = folder / "made.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == json.loads(json.dumps(wanted)):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    train = [file for part in protocol.text for file in sorted((DATA / "corpus").glob(part))]
    valid = [
        file for root in dict.fromkeys(file.parent for file in train) for file in root.glob("valid.txt*")
    ]
    train_tokenizer(train, protocol.vocabulary, folder / "tokenizer", max_characters=20_000_000)
    tokenizer = load_tokenizer(folder / "tokenizer")
    for part, files in (("train", train), ("valid", valid)):
        # of every file the same share, so that all kinds of text are in it
        most = protocol.most_tokens // len(files)
        np.save(folder / f"{part}.npy", np.concatenate([packed(file, tokenizer)[:most] for file in files]))
    stamp.write_text(json.dumps(wanted))
    return folder


def packed_tokens(folder: Path) -> int:
    """How many there are to train on."""
    import numpy as np

    return len(np.load(folder / "train.npy", mmap_mode="r"))


def packed(file: Path, tokenizer: Any) -> Any:
    """The ids of a text, with an end after each document; documents end at blank lines."""
    import numpy as np

    text = lzma.open(file, "rt", encoding="utf-8").read() if file.suffix == ".xz" else file.read_text("utf-8")
    ids: list[int] = []
    for document in re.split(r"\n(?:[^\S\n]*\n)+", text):
        if document.strip():
            for row in tokenizer(list(parts(document.strip("\n"))), add_special_tokens=False, verbose=False)[
                "input_ids"
            ]:
                ids += row
            ids.append(tokenizer.eos_token_id)
    return np.array(ids, dtype=np.uint16 if len(tokenizer) <= 1 << 16 else np.int32)


def parts(document: str) -> Iterator[str]:
    """A document in whole lines of at most 65,536 characters together: a novel at once would cost a tokenizer its memory."""
    held, size = [], 0
    for line in re.findall(r"[^\n]{0,65535}\n|[^\n]{1,65536}", document):
        if held and size + len(line) > 1 << 16:
            yield "".join(held)
            held, size = [], 0
        held.append(line)
        size += len(line)
    yield "".join(held)


def streams(name: str, protocol: Protocol, seed: int) -> tuple[Any, Any, int]:
    """Rows to train on and to evaluate on, and the size of the vocabulary."""
    import numpy as np

    from zolr.models import load_tokenizer
    from zolr.tasks.streams import TokenStream

    folder = prepared(name, protocol)
    ids = {part: np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("train", "valid")}
    rows = dict(length=protocol.length, seed=seed)
    return (
        TokenStream(ids["train"], batch_size=protocol.rows, **rows),
        TokenStream(ids["valid"], batch_size=protocol.micro, **rows),
        len(load_tokenizer(folder / "tokenizer")),
    )


# ---- one run ---------------------------------------------------------------------------------------------------------


def one(case: dict[str, Any]) -> dict[str, Any]:
    """One run, and what it took."""
    import torch
    from transformers import AutoConfig

    from zolr.engine import Engine
    from zolr.memory import LiveBytes, kept, measure
    from zolr.models import build, lm_loss

    protocol = PROTOCOLS[case["model"]]
    device = torch.device(case["device"])
    seeds = dict.fromkeys(("weights", "rows", "subspaces"), case["seed"]) | case.get("seeds", {})
    train, valid, vocabulary = streams(case["model"], protocol, seeds["rows"])
    if protocol.numbers:
        more = dict(max_position_embeddings=protocol.length, tie_word_embeddings=False, rms_norm_eps=1e-6)
        config = AutoConfig.for_model("llama", vocab_size=vocabulary, **protocol.numbers, **more)
        model: Any = build(config, seed=seeds["weights"])
    else:
        model = build(case["model"], seed=seeds["weights"], vocab_size=vocabulary)
    model = model.to(device)
    low = case["compute"] == "bfloat16"

    def loss(model: Any, batch: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            return lm_loss(model, batch, chunk=512 if device.type == "cpu" else None)

    def evaluated() -> float:
        model.eval()
        with torch.no_grad():
            found = [loss(model, on(batch)) for batch in valid.evaluation(protocol.held_out)]
        return sum(float(s) for s, _ in found) / sum(int(n) for _, n in found)

    def on(batch: dict[str, Any]) -> dict[str, Any]:
        return {key: value.to(device) for key, value in batch.items()}

    def batches(step: int) -> list[dict[str, Any]]:
        whole, size = on(train.batch(step)), protocol.micro
        return [
            {key: value[i : i + size] for key, value in whole.items()} for i in range(0, protocol.rows, size)
        ]

    steps = case["steps"]
    rate = case["lr"] if case["row"] in RELATIVE else TABLES_RATE
    engine = Engine(
        model,
        method_of(
            case["row"],
            case["rank"],
            case["refresh_every"],
            case["lr"] / rate,
            case.get("optimizer"),
            case.get("transport"),
        ),
        lr=rate,
        loss=loss,
        seed=seeds["subspaces"],
        schedule=schedule(steps),
        clip=case.get("clip"),
    )
    # one thread's processor time, which other work on the machine moves little; a card is waited for
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    curve, times, skipped = [(0, evaluated())], [], 0
    trained: list[float] = []
    for step in range(case.get("until", steps)):
        ready = batches(step)
        _wait(device)
        started = clock()
        info = engine.step(ready)
        _wait(device)
        times.append(clock() - started)
        skipped += info.skipped
        trained.append(info.loss)
        if (step + 1) % max(1, steps // 4) == 0 or step + 1 == steps:
            curve.append((step + 1, evaluated()))
        if skipped > 20:
            break
    counted = LiveBytes()
    weights = counted.track(model)  # whole coordinates are the weights themselves and count once
    state = {part: counted.track(*tensors) for part, tensors in kept(engine).items()}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        engine.step(batches(steps))
        if engine.method.refresh_every:
            engine.refresh()
            engine.step(batches(steps))
        peak = torch.cuda.max_memory_allocated(device)
    else:
        with measure(engine, *batches(steps)) as found:
            engine.step(batches(steps))
            if engine.method.refresh_every:
                engine.refresh()
                engine.step(batches(steps))
        peak = found.peak_bytes
    tokens = protocol.rows * protocol.length
    last = curve[-1][1]
    return {
        "loss": last,
        "perplexity": exp(min(last, 700.0)),
        "curve": [(step * tokens, value) for step, value in curve],
        "skipped": skipped,
        **({"trained": trained} if "until" in case else {}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": weights,
        "state_bytes": state["optimizer"] + state["coords"],
        "peak_bytes": peak,
        "tokens": steps * tokens,
        "step_median_s": statistics.median(times),
        "step_worst_s": max(times[1:] or times),
        "tokens_per_s": tokens * len(times) / sum(times),
    }


ESTIMATED = ("stiefel", "dependent", "gaussian", "coordinate", "galore", "plumage", "grasswalk", "grassjump")


def estimates(case: dict[str, Any]) -> dict[str, Any]:
    """What each row makes of the same real gradient: weights after some steps of AdamW, and three short windows to learn from."""
    import copy

    from transformers import AutoConfig

    from zolr.diagnostics import diagnose
    from zolr.engine import Engine
    from zolr.keys import Key
    from zolr.models import build, lm_loss

    protocol = PROTOCOLS[case["model"]]
    train, _, vocabulary = streams(case["model"], protocol, case["seed"])
    more = dict(max_position_embeddings=protocol.length, tie_word_embeddings=False, rms_norm_eps=1e-6)
    config = AutoConfig.for_model("llama", vocab_size=vocabulary, **protocol.numbers, **more)

    def loss(model: Any, batch: Any) -> Any:
        return lm_loss(model, batch, chunk=512)

    steps, window = case["steps"], 4
    full = Engine(build(config, seed=case["seed"]), method_of("adamw", 1, 1), lr=case["lr"], loss=loss)
    for step in range(steps):
        full.step([train.batch(step)])
    weights, found = full.detach(), {}
    for row in ESTIMATED:
        method = method_of(row, case["rank"], window)
        engine = Engine(
            copy.deepcopy(weights), method, lr=1e-7, loss=loss, select="linear", seed=case["seed"]
        )
        for step in range(steps, steps + 3 * window + 1):
            engine.step([train.batch(step)])
        parts = [diagnose(engine, train.batch(0), Key(i), draws=16) for i in range(2)]
        total = {
            key: statistics.mean(part["total"][key] for part in parts)
            for key in parts[0]["total"]
            if key != "norm"
        }
        total["gain_error"] /= 2**0.5
        layers = parts[0]["layers"].values()
        total["rank_effective"] = statistics.mean(layer["rank_effective"] for layer in layers)
        total["rank_stable"] = statistics.mean(layer["rank_stable"] for layer in layers)
        found[row] = total
    return found


def shown_estimates(found: dict[str, Any]) -> str:
    """A line a row."""
    lines = [f"{'row':12}{'energy':>9}{'gain':>16}{'bias':>9}{'variance':>10}{'theory':>9}{'cosine':>9}"]
    for row, total in found.items():
        theory = f"{total['variance_expected']:9.3f}" if "variance_expected" in total else f"{'-':>9}"
        lines.append(
            f"{row:12}{total['energy']:9.3f}{total['gain']:9.3f} +-{total['gain_error']:.3f}{total['bias']:9.3f}"
            f"{total['variance']:10.3f}{theory}{total['cosine']:9.3f}"
        )
    return "\n".join(lines)


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ran(case: dict[str, Any], limit: float | None) -> dict[str, Any]:
    """One run in a process of its own, or why there is none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", json.dumps(case)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": "out of time"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def traced(case: dict[str, Any], seeds: Sequence[str], found: dict[str, Any], window: int) -> None:
    """Run the beginning of a row with seeds mixed, and print where its loss goes: means of windows, and the largest jump at their ends."""
    for mix in seeds:
        own = dict(zip(("weights", "rows", "subspaces"), map(int, mix), strict=True))
        run = ran({**case, "seeds": own}, None)
        changed = "".join(
            f", {name} {case[name]}" for name in ("optimizer", "clip", "transport") if name in case
        )
        found[f"{case['row']}/{case['lr']:g}/{mix}{changed}"] = run
        if "failed" in run:
            print(f"{mix}{changed}: {run['failed']}", flush=True)
            continue
        losses = run["trained"]
        means = [statistics.mean(losses[i : i + window]) for i in range(0, len(losses) - window + 1, window)]
        # of the first three steps of a window over the last three of the one before
        jumps = [
            statistics.mean(losses[i : i + 3]) - statistics.mean(losses[i - 3 : i])
            for i in range(window, len(losses) - 2, window)
        ]
        held_out = ", ".join(f"{value:.3f}" for _, value in run["curve"])
        print(
            f"{mix}{changed}: held-out {held_out}; windows {' '.join(f'{m:.2f}' for m in means)}; "
            f"jumps at their ends {' '.join(f'{j:+.2f}' for j in jumps)}",
            flush=True,
        )


# ---- which runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """The rates of a group of runs, and which seeds it wants.

    Args:
        grid: rates that may be tried.
        first: rate to begin with; None for what each row says.
        seeds: those of a row, the first of which chooses its rate.
    """

    grid: tuple[float, ...] = GRID
    first: float | None = None
    seeds: tuple[int, ...] = SEEDS

    def begins(self, row: str) -> float:
        """The rate that a row is tried at first."""
        return ROWS[row][1] if self.first is None else self.first

    def around(self, rate: float) -> list[float]:
        """The neighbors of a rate, the larger one first."""
        place = self.grid.index(rate)
        return [self.grid[i] for i in (place + 1, place - 1) if 0 <= i < len(self.grid)]


def losses(runs: dict[str, Any], row: str, search: Search, seed: int = 0) -> dict[float, float]:
    """Held-out loss of a row by rate, without runs that failed; infinite where it is not finite."""
    found = {}
    for rate in search.grid:
        run = runs.get(f"{row}/{rate:g}/{seed}", {})
        if "loss" in run:
            found[rate] = run["loss"] if isfinite(run["loss"]) and run["skipped"] <= 20 else float("inf")
    return found


def best_rate(runs: dict[str, Any], row: str, search: Search) -> tuple[float | None, bool]:
    """The best rate of seed 0 so far, and whether both of its neighbors have been tried (or the grid ends)."""
    found = losses(runs, row, search)
    if not found:
        return None, False
    best = min(found, key=lambda rate: found[rate])
    return best, all(f"{row}/{rate:g}/0" in runs for rate in search.around(best))


def missing(runs: dict[str, Any], rows: Sequence[str], search: Search) -> Iterator[tuple[str, float, int]]:
    """Row, rate and seed of what is to be run, in order, as far as it is known now.

    First every row at its first rate, then at the next larger one, then whatever neighbors the best one lacks.
    """
    for row in rows:
        if f"{row}/{search.begins(row):g}/0" not in runs:
            yield row, search.begins(row), 0
    for both in (False, True):
        for row in rows:
            best, settled = best_rate(runs, row, search)
            if best is None or settled:
                continue
            for rate in search.around(best):
                if (both or rate > best) and f"{row}/{rate:g}/0" not in runs:
                    yield row, rate, 0
    for seed in search.seeds[1:]:
        for row in rows:
            best, settled = best_rate(runs, row, search)
            if best is not None and settled and f"{row}/{best:g}/{seed}" not in runs:
                yield row, best, seed


# ---- what is shown ---------------------------------------------------------------------------------------------------

HEAD = ("row", "lr", "perplexity", "spread", "seeds", "gap", "state MiB", "peak MiB", "tokens/s")


def table(runs: dict[str, Any], rows: Sequence[str], search: Search) -> list[tuple[str, ...]]:
    """A line a row, the best first; the gap is that to AdamW's mean perplexity."""
    lines, reference = [], None
    for row in rows:
        best, settled = best_rate(runs, row, search)
        if best is None:
            continue
        seeds = [runs[key] for s in SEEDS if "loss" in runs.get(key := f"{row}/{best:g}/{s}", {})]
        mean = statistics.mean(run["perplexity"] for run in seeds)
        reference = mean if row == "adamw" else reference
        lines.append((mean, row, best, settled, seeds))
    shown = []
    for mean, row, best, settled, seeds in sorted(lines, key=lambda line: line[0]):
        values = [run["perplexity"] for run in seeds]
        gap = "-" if reference is None else f"{mean - reference:+.1f}"
        shown.append(
            (
                row,
                f"{best:g}{'' if settled else '*'}",
                f"{mean:.1f}",
                f"{min(values):.1f} to {max(values):.1f}" if len(values) > 1 else "-",
                str(len(values)),
                gap,
                f"{seeds[-1]['state_bytes'] / 2**20:.2f}",
                f"{seeds[-1]['peak_bytes'] / 2**20:.1f}",
                f"{statistics.median(run['tokens_per_s'] for run in seeds):,.0f}",
            )
        )
    return shown


def printed(lines: Sequence[Sequence[str]]) -> str:
    """The table as text."""
    widths = [max(len(line[i]) for line in (HEAD, *lines)) for i in range(len(HEAD))]
    text = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in (HEAD, *lines)
    ]
    return "\n".join([*text, "* a neighboring rate has not been tried yet"])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The table for a page."""
    ruled = [HEAD, ["---"] * len(HEAD), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled) + "\n"


def draw(runs: dict[str, Any], rows: Sequence[str], search: Search, path: Path, title: str) -> None:
    """Perplexity against tokens, one part a family, and state against perplexity."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from zolr.cli.lettering import counts, plain_ticks
    from zolr.cli.picture import COLORS, MARKERS

    figure = Figure(figsize=(13.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    curves, states = figure.subplots(1, 2)
    for i, row in enumerate(rows):
        best, _ = best_rate(runs, row, search)
        if best is None:
            continue
        seeds = [runs[key] for s in SEEDS if "loss" in runs.get(key := f"{row}/{best:g}/{s}", {})]
        style: dict[str, Any] = {"color": COLORS[i % 8], "marker": MARKERS[(i + i // 8) % 8]}
        points = [
            (tokens, statistics.mean(exp(min(run["curve"][k][1], 50.0)) for run in seeds))
            for k, (tokens, _) in enumerate(seeds[0]["curve"])
            if k
        ]
        line = "-" if i < 8 else "--"
        curves.plot(
            *zip(*points, strict=True), linestyle=line, markersize=4, linewidth=1.3, label=row, **style
        )
        size = seeds[-1]["state_bytes"] / 2**20
        states.plot([size], [points[-1][1]], linestyle="", markersize=7, **style)
        states.annotate(row, (size, points[-1][1]), (6, 3), textcoords="offset points", fontsize=8)
    for axes, x in ((curves, "tokens"), (states, "state beside the weights, with embedding and head (MiB)")):
        axes.set_xlabel(x)
        axes.set_ylabel("held-out perplexity")
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
        axes.grid(color="0.9", linewidth=0.8, which="both")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    counts(curves)
    figure.legend(*curves.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(title, fontweight="bold")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run what is missing, and print all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(PROTOCOLS), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA")
    parser.add_argument("--rows", help="some of them, joined by commas")
    parser.add_argument("--rank", type=int, help="another rank: a group of its own")
    parser.add_argument("--steps", type=int, help="another number of steps: a group of its own")
    parser.add_argument("--refresh-every", type=int, help="another life of a subspace: a group of its own")
    parser.add_argument(
        "--optimizer",
        choices=tuple(OPTIMIZERS),
        help="another rule for coordinates than Adam, drawn rows alone: a group of its own",
    )
    parser.add_argument("--seconds", type=float, help="begin no run after so many, and end the last one")
    parser.add_argument("--most", type=int, help="runs at most")
    parser.add_argument("--most-seeds", type=int, default=len(SEEDS), help="seeds of a row at most")
    parser.add_argument(
        "--estimates",
        action="store_true",
        help="what the rows make of one real gradient, and stop (on a CPU)",
    )
    parser.add_argument("--trace", metavar="ROW@RATE", help="the loss of every step of one row, and stop")
    parser.add_argument(
        "--until", type=int, default=150, help="steps of a trace, of the course of the whole run"
    )
    parser.add_argument(
        "--seeds", default="000,111,222", help="of traces: a digit for weights, for rows, for subspaces"
    )
    parser.add_argument("--clip", type=float, help="of traces: largest norm of a gradient")
    parser.add_argument(
        "--transport",
        choices=("reset", "keep", "align", "aware"),
        help="what becomes of moments at a new subspace, drawn rows alone: a group of its own",
    )
    parser.add_argument("--prepare", action="store_true", help="pack the text and stop")
    parser.add_argument("--table", action="store_true", help="print what there is and stop")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    parser.add_argument("--plot", type=Path, help="write a picture there")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        case = json.loads(options.one)
        print(json.dumps((estimates if case.get("estimates") else one)(case)))
        return
    known = DRAWN if options.optimizer or options.transport else ROWS
    rows = list(known) if options.rows is None else options.rows.split(",")
    if unknown := [row for row in rows if row not in known]:
        parser.error(f"--rows {unknown[0]}: no such row; use some of {', '.join(known)}")
    protocol = PROTOCOLS[options.model]
    if options.prepare:
        print(prepared(options.model, protocol))
        return
    steps, rank = options.steps or protocol.steps, options.rank or protocol.rank
    compute = options.compute or ("bfloat16" if options.device.startswith("cuda") else "float32")
    suffix = "" if options.model == "small" else f"-{options.model}"
    output = options.output or RESULTS / f"pretraining{suffix}.json"
    results = json.loads(output.read_text()) if output.exists() else {"groups": {}}
    usual = f"rank {rank}, {steps} steps, {compute}, {options.device.split(':')[0]}"
    every = options.refresh_every or protocol.refresh_every
    other_life = every != protocol.refresh_every
    grid, first = OPTIMIZERS.get(options.optimizer, (GRID, None))
    search = Search(grid, first, SEEDS[: options.most_seeds])
    changes = {name: value for name in ("optimizer", "transport") if (value := getattr(options, name))}
    group = usual + (f", subspaces of {every} steps" if other_life else "")
    if not options.trace:
        group += "".join(f", {name} {value}" for name, value in changes.items())
    if other_life and options.rows is None:
        rows = [row for row in rows if row not in APART]
    found = results["groups"].setdefault(group, {"runs": {}})
    runs = found["runs"]
    begun = time.monotonic()
    if not options.table:
        found["conditions"] = {p: version(p) for p in ("torch", "transformers")} | {"zolr": zolr.__version__}
        found["conditions"] |= {**asdict(protocol), "grid": grid, "device": device_name(options.device)}
        found["conditions"] |= {"tables_rate": TABLES_RATE}
    if options.estimates:
        prepared(options.model, protocol)
        case = dict(model=options.model, seed=0, rank=rank, steps=options.steps or 60, lr=1e-2)
        found["estimates"] = ran({**case, "estimates": True}, None)
        written(results, output)
        print(shown_estimates(found["estimates"]))
        return
    if options.trace:
        row, rate = options.trace.split("@")
        case = dict(
            model=options.model, device=options.device, compute=compute, row=row, lr=float(rate), seed=0,
            steps=steps, rank=rank, refresh_every=every, until=options.until,
        )  # fmt: skip
        case |= changes | ({} if options.clip is None else {"clip": options.clip})
        traced(case, options.seeds.split(","), found.setdefault("traces", {}), every)
        written(results, output)
        return
    if not options.table:
        found["conditions"]["packed_tokens"] = packed_tokens(prepared(options.model, protocol))
        for _ in range(options.most if options.most is not None else sys.maxsize):
            left = None if options.seconds is None else options.seconds - (time.monotonic() - begun)
            following = next(missing(runs, rows, search), None)
            if following is None or (left is not None and left < 10):
                break
            row, rate, seed = following
            case = dict(
                model=options.model, device=options.device, compute=compute, row=row, lr=rate, seed=seed
            )
            case |= dict(steps=steps, rank=1 if row == "apollo-mini" else rank, refresh_every=every)
            case |= changes
            run = ran(case, left)
            if run.get("failed") == "out of time":
                break
            runs[f"{row}/{rate:g}/{seed}"] = run
            written(results, output)
            print(f"{row} {rate:g} seed {seed}: {run.get('perplexity', run.get('failed'))}", flush=True)
    if other_life:  # what has no windows is the same
        there = results["groups"].get(usual, {"runs": {}})["runs"]
        runs = {key: run for key, run in there.items() if key.split("/")[0] in APART} | runs
        rows = [row for row in ROWS if row in rows or (options.rows is None and row in APART)]
    lines = table(runs, rows, search)
    print(printed(lines))
    if options.markdown:
        options.markdown.write_text(markdown(lines))
    if options.plot:
        draw(runs, rows, search, options.plot, f"{options.model}, {group}")


def written(results: dict[str, Any], output: Path) -> None:
    """Save the results, whole or not at all."""
    output.parent.mkdir(exist_ok=True)
    aside = output.with_suffix(".tmp")
    aside.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    os.replace(aside, output)


def device_name(device: str) -> str:
    """The card, or the kind of device."""
    if not device.startswith("cuda"):
        return device
    import torch

    return torch.cuda.get_device_name(device)


if __name__ == "__main__":
    main()
