"""What a step costs against what it is made of: two forward passes (zo), or a full AdamW step (fo).

    python benchmarks/speed.py                           # 6 layers of width 768, batch 16 x 64, float32, one thread
    python benchmarks/speed.py --dtype bfloat16 --threads 2 --json
    python benchmarks/speed.py --profile                 # where the overhead of the default forward-only step goes
    python benchmarks/speed.py --undo                    # what keeping weights aside costs: a step with it over one without
    python benchmarks/speed.py --layers 24 --width 32 --batch-size 2 --length 8 --dtype bfloat16 # what the host does beside the kernels
    python benchmarks/speed.py --calls                   # operations that a forward-only step calls, each a launch on a GPU; printed, not kept
    python benchmarks/speed.py --bases                   # ways to draw an orthonormal basis; printed, not kept
    python benchmarks/speed.py --singular                # ways to the leading singular vectors of a gradient; printed, not kept

Every row is the median over paired rounds of one process: the step and its reference are timed one after the other in
each round, in alternating order, and the ratio is taken within the round. The quartiles of the ratio are printed beside it.
Random weights and random tokens; the loss of a prompt (one position a row through the head). Results are merged into
`benchmarks/results/speed.json`.
"""

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import zolr
from zolr import lora
from zolr.estimators import changed, combine, mean_loss, setting
from zolr.factorizations import leading, orthonormal
from zolr.keys import Key
from zolr.memory import LiveBytes
from zolr.methods import METHODS
from zolr.models import Checkpointing, build, checkpoint_activations, prompt_loss
from zolr.probes import Probe
from zolr.variables import layout, shifted

RESULTS = Path(__file__).parent / "results" / "speed.json"
WORDS = (5, 6)
LEAST_ROUNDS = 9

ZO = {
    "stiefel, attention, rank 16 (default)": (dict(method="stiefel", paradigm="zo"), "attention"),
    "stiefel, all weights, rank 4": (dict(method="stiefel", paradigm="zo", rank=4), "all"),
    "stiefel, attention, signs together": (
        dict(method="stiefel", paradigm="zo", signs="together"),
        "attention",
    ),
    "lozo, all weights, rank 2": (dict(method="lozo"), "all"),
    "mezo, all weights": (dict(method="mezo"), "all"),
}
FO = {
    "stiefel, all weights, rank 32": (dict(method="stiefel", paradigm="fo"), "all", False),
    "stiefel, linear maps, rank 32": (dict(method="stiefel", paradigm="fo"), "linear", False),
    "stiefel, all weights, selective checkpointing": (
        dict(method="stiefel", paradigm="fo"),
        "all",
        "selective",
    ),
    "stiefel, all weights, checkpointing": (dict(method="stiefel", paradigm="fo"), "all", True),
}
FWD = {"stiefel, attention, rank 16": (dict(method="stiefel", paradigm="fwd"), "attention")}
UNDO = {  # with how many trained weights a step overwrites before it is sure
    "lomo, all weights": (dict(method="lomo"), "all"),
    "galore, all weights": (dict(method="galore"), "all"),
    "adamw, all weights and moments": (dict(method="adamw", paradigm="fo"), "all"),
    "mezo, all weights": (dict(method="mezo"), "all"),
    "stiefel fo, coordinates and moments": (dict(method="stiefel", paradigm="fo"), "all"),
    "stiefel zo, coordinates": (dict(method="stiefel", paradigm="zo"), "attention"),
}


def batch(rows: int, length: int, vocabulary: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Random tokens without padding."""
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary, (rows, length), generator=numbers)
    labels = torch.randint(len(WORDS), (rows,), generator=numbers)
    found = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "positions": torch.full((rows,), length - 1),
        "labels": labels,
    }
    return {name: part.to(device) for name, part in found.items()}


def timed(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds, with all work of a GPU done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def paired(
    step: Callable[[], Any],
    reference: Callable[[], Any],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Median and quartiles of the ratio of two times, and the median time of the reference in seconds."""
    for run in (step, reference):  # allocators, thread pools and optimizer state
        run(), run()
    ratios, seconds = [], []
    for i in range(rounds):
        if i % 2:
            own, other = timed(step, clock), timed(reference, clock)
        else:
            other, own = timed(reference, clock), timed(step, clock)
        ratios.append(own / other)
        seconds.append(other)
    low, middle, high = statistics.quantiles(ratios, n=4)
    spread = {"ratio": middle, "lower": low, "upper": high, "rounds": rounds}
    return {**spread, "reference_seconds": statistics.median(seconds)}


def engine(
    plain: torch.nn.Module,
    parts: dict[str, Any],
    train: str,
    checkpointing: Checkpointing = False,
    **more: Any,
) -> zolr.Engine:
    """An engine on a copy of the model; the rate is so small that nothing happens to the weights.

    Args:
        more: settings of the engine.
    """
    net = copy.deepcopy(plain)
    checkpoint_activations(net, checkpointing)
    eps = {"eps": 1e-3} if parts.get("paradigm") == "zo" or parts["method"] in ("mezo", "lozo") else {}
    method = zolr.compose(**parts, **eps)
    return zolr.Engine(net, method, lr=1e-6, loss=prompt_loss(WORDS), select=train, **more)


def rows(options: argparse.Namespace, plain: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """All ratios."""
    data = batch(options.batch_size, options.length, 50000)
    loss, found = prompt_loss(WORDS), {}

    def forwards(count: int) -> None:
        with torch.no_grad():
            for _ in range(count):
                loss(plain, data).mean().item()

    full = copy.deepcopy(plain).train()
    optimizer = torch.optim.AdamW(full.parameters(), lr=1e-6)

    def adamw() -> None:
        loss(full, data).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def add(name: str, step: Callable[[], Any], reference: Callable[[], Any]) -> None:
        if options.only in name:
            found[name] = paired(step, reference, options.rounds)
            shown = found[name]
            print(
                f"{name:62} {shown['ratio']:.3f}  ({shown['lower']:.3f} to {shown['upper']:.3f})", flush=True
            )

    def step_of(name: str, *arguments: Any) -> Callable[[], Any]:
        made: list[zolr.Engine] = []

        def step() -> None:
            if not made:
                made.append(engine(plain, *arguments))
            made[0].step([data])

        return step

    for kind, group in (("zo", ZO), ("fwd", FWD)):
        for name, (parts, train) in group.items():
            add(f"{kind} {name} / two forwards", step_of(name, parts, train), lambda: forwards(2))
    for name, (parts, train, checkpointing) in FO.items():
        add(f"fo {name} / AdamW", step_of(name, parts, train, checkpointing), adamw)
    halves = [{key: value[i::2] for key, value in data.items()} for i in range(2)]

    def two_halves() -> None:
        with torch.no_grad():
            for half in halves:
                loss(plain, half).mean().item()

    add("a forward in two halves / in one", two_halves, lambda: forwards(1))
    return found


def kept_aside(options: argparse.Namespace, plain: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """A step that keeps aside what it overwrites, over one that does not."""
    data, found = batch(options.batch_size, options.length, 50000), {}
    for name, (parts, train) in UNDO.items():
        if options.only not in name:
            continue
        own, other = (engine(plain, parts, train, undo=undo) for undo in (None, False))
        found[name] = paired(
            lambda own=own: own.step([data]),
            lambda other=other: other.step([data]),
            options.rounds,
            # the system's part of writing is in it, and other programs are not
            time.perf_counter if torch.cuda.is_available() else time.process_time,
        )
        shown = found[name]
        print(f"{name:40} {shown['ratio']:.3f}  ({shown['lower']:.3f} to {shown['upper']:.3f})", flush=True)
    return found


def profile(options: argparse.Namespace, plain: torch.nn.Module) -> dict[str, float]:
    """Where the time of the default forward-only step goes, each part as a share of two plain forwards.

    Parts are timed on their own, in one interleaved process order; what they leave of the whole step is "other".
    """
    data, loss = batch(options.batch_size, options.length, 50000), prompt_loss(WORDS)
    own = engine(plain, *ZO["stiefel, attention, rank 16 (default)"])
    own.step([data])
    variables, key, eps = own.variables, own.key.fold_in("profile"), 1e-3
    direction = Probe(layout(variables), "rademacher", key)
    weights = torch.ones(1)
    learned = mean_loss(own._loss_of, [data])

    def attached() -> None:
        with torch.no_grad():
            for scale in (eps, -eps):
                with shifted(variables, direction, scale):
                    own._loss_of(data)

    def shifting() -> None:
        with torch.no_grad():
            for scale in (eps, -eps):
                with shifted(variables, direction, scale):
                    pass

    def update() -> None:
        with torch.no_grad():
            gradients = [(v, torch.zeros_like(v.value)) for v in variables]
            own._apply(gradients, 1e-6)

    def combining() -> None:
        for variable in variables:
            combine(variable, [direction], weights)

    def plainly() -> None:
        with torch.no_grad():
            loss(plain, data).mean(), loss(plain, data).mean()

    embeddings: Any = plain.base_model.embeddings  # type: ignore[union-attr]
    parts: dict[str, Callable[[], Any]] = {
        "two plain forwards": plainly,
        "whole step": lambda: own.step([data]),
        "both attached forwards": attached,
        "of these, entering and leaving the points": shifting,
        "drawing the probe": lambda: Probe(layout(variables), "rademacher", key),
        "gradients from slopes": combining,
        "optimizer": update,
        "before the first trained weight (the same for both signs)": lambda: embeddings(data["input_ids"]),
        "one wait for the device": lambda: bool(torch.isfinite(learned).all()),
        "drawing all bases (once in a window)": lambda: [own.windows.drawn(v) for v in variables],
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for run in parts.values():
        run(), run()
    for i in range(options.rounds):
        for name in list(parts) if i % 2 else reversed(list(parts)):
            times[name].append(timed(parts[name]))
    reference = times["two plain forwards"]
    shares = {
        name: statistics.median(own / other for own, other in zip(found, reference, strict=True))
        for name, found in times.items()
    }
    named = (
        "both attached forwards",
        "drawing the probe",
        "gradients from slopes",
        "optimizer",
        "one wait for the device",
    )
    shares["other (Python of the engine, random state)"] = shares["whole step"] - sum(
        shares[name] for name in named
    )
    for name, share in shares.items():
        print(f"{name:46} {share:8.4f}")
    return shares


# (m, n) of weights and ranks, for `--bases`
BASES = {(m, n): (16, 128) for m, n in ((768, 768), (1024, 4096), (4096, 11008))}


class Calls(TorchDispatchMode):
    """Counts operations that compute something: views and bare memory do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        free = (
            func.is_view
            or func.namespace != "aten"
            or any(n in func.name() for n in ("empty", "unsafe_view"))
        )
        self.count += not free
        return func(*args, **(kwargs or {}))


def calls(options: argparse.Namespace, plain: Any) -> None:
    """Operations of a step of every forward-only row within a window, beside those of two forward passes."""
    data, loss = batch(options.batch_size, options.length, plain.config.vocab_size), prompt_loss(WORDS)
    for name, row in METHODS.items():
        if "zo" not in row.paradigms or options.only not in name:
            continue
        net, select = copy.deepcopy(plain), row.trained("zo")
        if row.adapter is not None:
            lora.wrap(net, row.adapter)
            select = lora.trained
        with torch.no_grad(), Calls() as two:
            loss(net, data), loss(net, data)
        settings = {"lr": 1e-6, "loss": loss, "select": select, "seed": 0}
        method = row.build("zo")
        own = setting(method.estimator, "signs")
        for signs in dict.fromkeys([own, own and "together"]):
            if signs:
                method = replace(method, estimator=changed(method.estimator, signs=signs))
            engine = zolr.Engine(copy.deepcopy(net), method, **settings)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of signs that go in sequence
                for _ in range(2):  # the first one draws bases, and compares signs
                    engine.step([data])
                with Calls() as step:
                    engine.step([data])
            settled = setting(engine.method.estimator, "signs") or ""
            print(
                f"{name:14} {settled:9} {step.count:7,} of {two.count:5,}  {step.count / two.count:6.2f}",
                flush=True,
            )


def cholesky_qr(matrix: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns by two rounds of Gram and Cholesky: the Q of a QR whose R has a positive diagonal."""
    for _ in range(2):
        lower = torch.linalg.cholesky(matrix.mT @ matrix)
        eye = torch.eye(lower.shape[0], dtype=lower.dtype)
        matrix = matrix @ torch.linalg.solve_triangular(lower, eye, upper=False).mT
    return matrix


def bases(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Ways to an orthonormal basis `(n, r)`: time over that of QR, bytes besides the input, distance from orthonormal.

    The first two turn normal numbers into a uniform basis; a range finder looks for that of a dense gradient `(m, n)`.
    """
    found: dict[str, dict[str, float]] = {}
    for (m, n), ranks in BASES.items():
        gradient = Key(1).normal((m, n))
        for rank in ranks:
            draw = Key(0).normal((n, rank))
            ways: dict[str, Callable[[], torch.Tensor]] = {
                "QR": lambda draw=draw: orthonormal(draw),
                "Cholesky, twice": lambda draw=draw: cholesky_qr(draw),
                "range finder": lambda draw=draw, g=gradient: orthonormal(g.mT @ (g @ draw)),
            }
            expected = ways["QR"]()
            for name, way in ways.items():
                with LiveBytes() as live:
                    before = live.track(draw, gradient)
                    basis = way()
                basis = basis.double()
                off = float((basis.mT @ basis - torch.eye(rank)).abs().max())
                row = paired(way, ways["QR"], options.rounds)
                row |= {"transient_bytes": live.peak - before, "off_orthonormal": off}
                same = float((basis - expected).abs().max())
                found[f"{m} x {n}, rank {rank}, {name}"] = row
                print(
                    f"{m:5} x {n:5}  rank {rank:3}  {name:16} {row['ratio']:8.2f} of {row['reference_seconds'] * 1e3:7.2f} ms"
                    f"  {row['transient_bytes'] / 1e6:6.2f} MB  off by {off:.1e}"
                    + (f"  from QR {same:.1e}" if name != "range finder" else ""),
                    flush=True,
                )
    return found


# (m, n) of gradients, for `--singular`
GRADIENTS = ((768, 768), (768, 3072), (3072, 768), (1024, 1024), (1024, 4096), (4096, 1024))


def singular(options: argparse.Namespace) -> None:
    """The 32 leading singular vectors on the shorter side of a gradient, by the Gram matrix in float64 and by an SVD.

    The gradient has a few large directions and many small ones. Off is the distance of the projections onto the span from that
    of a decomposition in float64.
    """
    for m, n in GRADIENTS:
        large = Key(1).normal((m, 64)) @ (Key(2).normal((64, n)) * torch.logspace(0, -2, n))
        gradient = large + 0.1 * Key(3).normal((m, n))
        turned = gradient if n <= m else gradient.mT

        def svd(turned: torch.Tensor = turned) -> torch.Tensor:
            return torch.linalg.svd(turned, full_matrices=False)[2][:32].mT.clone()

        def gram(turned: torch.Tensor = turned) -> torch.Tensor:
            return leading(turned, 32)[1]

        best = torch.linalg.svd(turned.double(), full_matrices=False)[2][:32].mT
        told = f"{m:5} x {n:5} "
        for name, way in (("SVD", svd), ("Gram", gram)):
            with LiveBytes() as live:
                before = live.track(gradient)
                vectors = way().double()
            off = float((vectors @ vectors.mT - best @ best.mT).norm())
            told += f"  {name}: {(live.peak - before) / 1e6:5.1f} MB, off {off:.1e}"
        row = paired(gram, svd, options.rounds)
        told += f"  time {row['ratio']:.2f} ({row['lower']:.2f} to {row['upper']:.2f})"
        print(told + f" of {row['reference_seconds'] * 1e3:.0f} ms", flush=True)


def main() -> None:
    """Time all rows, print and keep them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--model", default="roberta-base", help="preset")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument(
        "--width", type=int, help="another width, of two heads and twice that inside: host time, where small"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", "--max-length", type=int, default=64)
    parser.add_argument("--only", default="", help="a part of the names of the rows to run")
    parser.add_argument(
        "--profile", action="store_true", help="where the overhead of a forward-only step goes"
    )
    parser.add_argument("--undo", action="store_true", help="what keeping weights aside costs")
    parser.add_argument("--calls", action="store_true", help="operations that a forward-only step calls")
    parser.add_argument("--bases", action="store_true", help="ways to draw an orthonormal basis")
    parser.add_argument("--singular", action="store_true", help="ways to the leading singular vectors")
    parser.add_argument("--json", action="store_true", help="print the results as JSON too")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file the results are merged into")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2; figures that are kept need 9")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.singular:
        singular(options)
        return
    if options.bases:
        bases(options)
        return
    thin = {}
    if options.width is not None:
        thin = dict(hidden_size=options.width, num_attention_heads=2, intermediate_size=2 * options.width)
    plain = build(
        options.model,
        num_hidden_layers=options.layers,
        dtype=getattr(torch, options.dtype),
        dropout=0.0,
        **thin,
    )
    if options.calls:
        calls(options, plain)
        return
    width = f" of width {options.width}" if thin else ""
    conditions = {
        "model": f"{options.model} with {options.layers} layers{width}, random weights",
        "batch": f"{options.batch_size} x {options.length}",
        "dtype": options.dtype,
        "threads": options.threads,
        "machine": f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    case = f"{options.dtype}, {options.threads} threads, {options.layers} layers"
    if options.batch_size != 16 or options.length != 64 or options.model != "roberta-base":
        case += f", {options.model}, {conditions['batch']}"
    case += width
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    entry = results.setdefault(case, {"rows": {}})
    entry["conditions"] = conditions
    if options.profile:
        entry["profile"] = {"rounds": options.rounds, "shares": profile(options, plain)}
    elif options.undo:
        entry["undo"] = entry.get("undo", {}) | kept_aside(options, plain)
    else:
        entry["rows"] |= rows(options, plain)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    if options.json:
        print(json.dumps(entry, indent=1))


if __name__ == "__main__":
    main()
