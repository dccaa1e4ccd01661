"""How much memory does one training step take, by method, against a plain forward of the same batch?

Predicted from numbers alone: the engine's own step runs on tensors without data, so this needs neither
weights nor a GPU. Run `python benchmarks/memory.py`, with `--json` for machines, or `--profile "zo stiefel"`
to see what lives at the peak of one row, and with `--activations` to see what autograd keeps for the way back
in whole models. `--seconds` says what predictions cost, `--measured` what real steps of every method hold on the host beside
what is predicted (RoBERTa-base with 8 x 64 takes half an hour or more).
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gpu
import torch
import transformers
from torch._subclasses import FakeTensorMode

from zolr import memory
from zolr.engine import Engine
from zolr.fakes import Fakes
from zolr.memory import LiveBytes, Prediction, predict
from zolr.memory import kept as held
from zolr.methods import METHODS, Method, compose
from zolr.models import build, lm_loss, prompt_loss

GB = 1e9


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        method: row of METHODS; None for the forward alone.
        paradigm: "fo", "zo" or "fwd".
        settings: further arguments of `predict`.
        ranked: whether the rank given on the command line applies.
        target: largest acceptable peak as `(value, unit)`, unit "x" (times the forward) or "GB".
    """

    method: str | None
    paradigm: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    ranked: bool = False
    target: tuple[float, str] | None = None

    def build(self, rank: int | None) -> Method | None:
        """The method of this row."""
        if self.method is None:
            return None
        return compose(self.method, self.paradigm, rank=rank if self.ranked else None)


CHECKPOINTING = (("checkpointing", True),)
SELECTIVE = (("checkpointing", "selective"),)
CASES = {
    "forward": Case(None),
    "zo stiefel": Case("stiefel", "zo", ranked=True, target=(1.03, "x")),
    "zo stiefel, signs together": Case("stiefel", "zo", (("signs", "together"),), ranked=True),
    "mezo": Case("mezo", "zo"),
    "fo stiefel": Case("stiefel", "fo", ranked=True),
    "fo stiefel, selective checkpointing": Case("stiefel", "fo", SELECTIVE, ranked=True),
    "fo stiefel, checkpointing": Case("stiefel", "fo", CHECKPOINTING, ranked=True, target=(3.4, "GB")),
    "dependent zo": Case("dependent", "zo"),
    "dependent fo": Case("dependent", "fo"),
    "fwd stiefel": Case("stiefel", "fwd"),
    "adamw": Case("adamw", "fo"),
    "adamw, checkpointing": Case("adamw", "fo", CHECKPOINTING),
}


def trained(case: Case) -> str:
    """Which weights the method of a row trains unless it is told."""
    return "all" if case.method is None else METHODS[case.method].trained(case.paradigm or "fo")


def run(name: str, options: argparse.Namespace, profile: bool = False) -> Prediction:
    """The prediction of one row."""
    case = CASES[name]
    return predict(
        options.model,
        case.build(options.rank),
        batch_size=options.batch_size,
        max_length=options.max_length,
        dtype=getattr(torch, options.dtype),
        objective=options.objective,
        select=options.train or trained(case),
        profile=profile,
        **dict(case.settings),
    )


def verdict(case: Case, prediction: Prediction) -> str:
    """Whether the row reaches its target."""
    if case.target is None:
        return ""
    bound, unit = case.target
    value = prediction.ratio if unit == "x" else prediction.peak_bytes / GB
    return f"{'met' if value <= bound else 'MISSED'} (<= {bound:g} {unit})"


def table(options: argparse.Namespace) -> int:
    """Print all rows; 1 if a target is missed."""
    rows = []
    for name in options.rows or CASES:
        start = time.perf_counter()
        prediction = run(name, options)
        rows.append(
            {
                "row": name,
                **{key: value for key, value in prediction.as_dict().items() if key != "assumptions"},
                "target": verdict(CASES[name], prediction),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
        if options.json:
            continue
        if len(rows) == 1:
            conditions(options, prediction)
            print(f"{'row':36} {'peak GB':>8} {'x forward':>9} {'bases, coords':>13} {'optimizer':>9}  phase")
        print(
            f"{name:36} {prediction.peak_bytes / GB:8.3f} {prediction.ratio:9.3f} "
            f"{prediction.coords_bytes / GB:13.3f} {prediction.optimizer_bytes / GB:9.3f}  "
            f"{prediction.phase:10} {rows[-1]['target']}",
            flush=True,
        )
    write(options, rows)
    return int(any("MISSED" in row["target"] for row in rows))


def write(options: argparse.Namespace, rows: list[dict[str, Any]], *more: str) -> None:
    """Merge rows with their conditions into the file of `--output`, and print them for machines where that is asked for."""
    found = {"conditions": asked(options), "versions": versions(), "rows": rows}
    if options.output:
        known = json.loads(options.output.read_text()) if options.output.exists() else {}
        words = [
            options.model,
            f"{options.batch_size} x {options.max_length}",
            options.dtype,
            options.objective,
        ]
        words += [f"rank {options.rank}"] * bool(options.rank)
        words += [f"trained {options.train}"] * bool(options.train)
        name = ", ".join([*words, *more])
        new = {row["row"]: row for row in rows}  # others that the file has stay, where they stood
        old = {row["row"]: row for row in known.get(name, {}).get("rows", [])}
        known[name] = {**found, "rows": [*(old | new).values()]}
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(json.dumps(known, indent=1) + "\n")
    if options.json:
        print(json.dumps(found, indent=1))


def asked(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the figures hold for."""
    names = ("model", "batch_size", "max_length", "dtype", "objective", "rank", "train")
    return {name: getattr(options, name) for name in names}


def versions() -> dict[str, str]:
    """What the figures depend on besides the settings."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def conditions(options: argparse.Namespace, prediction: Prediction) -> None:
    """Print what the figures hold for."""
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    weights = f"{prediction.weights_bytes / GB:.3f} GB of weights"
    print(f"predicted live bytes (1 GB = 1e9 bytes) of {options.model}, {weights}")
    print(
        f"objective {options.objective}, trained: {options.train or 'as each method does by default'}; rank {options.rank or 'of the method'}"
    )
    print(found)
    for line in prediction.assumptions:
        print(f"- {line}")


# presets and what is trained on them, for `--activations`
WHOLE = {"roberta-base": "prompt", "roberta-large": "prompt", "llama-60m": "lm"}


def saved(model: str, objective: str, method: str, options: argparse.Namespace) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of a step, besides what outlives the step."""
    rows, tokens = options.batch_size, options.max_length
    with FakeTensorMode():
        net = build(model, dtype=getattr(torch, options.dtype), dropout=0.0)
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        batch = {"input_ids": ids, "labels": ids if objective == "lm" else ids[:, 0]}
        if objective == "prompt":
            batch |= {"attention_mask": torch.ones_like(ids), "positions": ids[:, 0]}
        loss = prompt_loss((3, 4)) if objective == "prompt" else lm_loss
        rank = options.rank if method == "stiefel" else None
        engine = Engine(net, compose(method, "fo", rank=rank), lr=1e-3, loss=loss, guard=False)
        engine.step([batch])  # makes the values
        kept = LiveBytes()
        kept.track(net, batch, *(tensor for tensors in held(engine).values() for tensor in tensors))
        before = kept.live

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.track(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            engine.step([batch])
    return kept.peak - before


def activations(options: argparse.Namespace) -> int:
    """Print what a step in subspaces keeps for the way back over what dense AdamW keeps, for whole models."""
    print(
        f"saved activations of a backprop step, {options.batch_size} x {options.max_length}, {options.dtype}"
    )
    print(f"{'model':16} {'loss':8} {'stiefel GB':>10} {'adamw GB':>10} {'ratio':>6}")
    found = {}
    for model, objective in WHOLE.items():
        ours, theirs = (saved(model, objective, method, options) for method in ("stiefel", "adamw"))
        found[model] = {"objective": objective, "stiefel": ours, "adamw": theirs, "ratio": ours / theirs}
        print(
            f"{model:16} {objective:8} {ours / GB:10.3f} {theirs / GB:10.3f} {ours / theirs:6.3f}", flush=True
        )
    if options.json:
        print(json.dumps(found, indent=1))
    return 0


def row_name(case: gpu.Case) -> str:
    """What a row of `--measured` is called."""
    return f"{case.paradigm} {case.method}"


def measured(options: argparse.Namespace) -> int:
    """Run steps of every method on the host, as `gpu.py` does on a card; 1 if a prediction is off by over a percent."""
    like = gpu.Case("memory", options.model, dtype=options.dtype, objective=options.objective)
    like = replace(like, rows=options.batch_size, tokens=options.max_length)
    print(f"live bytes of real steps of {options.model}, {like.rows} x {like.tokens}, {like.dtype}")
    print(f"{'row':24} {'measured GB':>11} {'predicted / measured':>20}")
    rows = []
    for case in gpu.of_methods(like):
        name = row_name(case)
        if options.rows and name not in options.rows:
            continue
        row = gpu.memory(case, "cpu", False, lambda _: None)
        bytes_ = {"peak_bytes_measured": row["peak_bytes"], "peak_bytes_predicted": row["predicted_bytes"]}
        rows.append({"row": name, **bytes_, "ratio": row["predicted_over_measured"]})
        print(f"{name:24} {row['peak_bytes'] / GB:11.3f} {rows[-1]['ratio']:20.4f}", flush=True)
    write(options, rows, "measured")
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1))
    print(f"furthest from 1: {worst['ratio']:.4f}, {worst['row']}")
    return int(abs(worst["ratio"] - 1) > 0.01)


def seconds(options: argparse.Namespace) -> int:
    """Print what a prediction costs, and over what it costs with torch's own fake tensors; the figures must be the same."""
    print(
        f"a prediction in seconds of the process, median of {options.rounds}, and over torch's own fake tensors"
    )
    for name in options.rows or CASES:
        spent: dict[type, list[float]] = {Fakes: [], FakeTensorMode: []}
        peaks = set()
        try:
            for i in range(options.rounds):
                for mode in list(spent) if i % 2 else reversed(list(spent)):
                    memory.Fakes = mode  # pyright: ignore[reportAttributeAccessIssue]
                    began = time.process_time()
                    peaks.add(run(name, options).peak_bytes)
                    spent[mode].append(time.process_time() - began)
        finally:
            memory.Fakes = Fakes
        assert len(peaks) == 1, name
        ratio = statistics.median(a / b for a, b in zip(*spent.values(), strict=True))
        print(f"{name:40} {statistics.median(spent[Fakes]):7.2f} {ratio:6.2f}", flush=True)
    return 0


def profile(name: str, options: argparse.Namespace) -> None:
    """Print the largest storages alive at the peak of a row, equal ones together."""
    prediction = run(name, options, profile=True)
    conditions(options, prediction)
    print(
        f"{name}: {prediction.peak_bytes / GB:.3f} GB, {prediction.ratio:.3f} x forward ({prediction.phase})"
    )
    groups: dict[tuple[Any, ...], list[str]] = {}
    for record in prediction.records:
        key = (record.bytes, record.shape, str(record.dtype).removeprefix("torch."), record.op, record.phase)
        groups.setdefault(key, []).append(record.module)
    largest = sorted(groups.items(), key=lambda item: -item[0][0] * len(item[1]))
    print(f"{'GB':>7} {'count':>5}  {'shape, dtype':32} {'made by':36} {'phase':10} last in")
    for (size, shape, dtype, op, phase), modules in largest[: options.top]:
        what = f"{'x'.join(map(str, shape))} {dtype}"
        print(f"{size * len(modules) / GB:7.3f} {len(modules):5}  {what:32} {op:36} {phase:10} {modules[-1]}")
    rest = sum(key[0] * len(modules) for key, modules in largest[options.top :])
    print(f"{rest / GB:7.3f} {'':5}  everything else")


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"some of: {', '.join(CASES)}; all by default")
    parser.add_argument(
        "--model", default="roberta-large", help="preset, folder or hub name; only its config is read"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--objective", default="prompt", choices=["prompt", "classes", "lm"])
    parser.add_argument("--rank", type=int, help="of the stiefel rows; by default the method's own")
    parser.add_argument(
        "--train",
        help="which weights: all, or kinds joined by +, such as linear+norm; by default the method's own",
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, help="file that the rows are merged into, as JSON")
    parser.add_argument("--profile", metavar="ROW", help="list the live storages at the peak of one row")
    parser.add_argument(
        "--activations", action="store_true", help="what autograd keeps in whole models, against dense AdamW"
    )
    parser.add_argument(
        "--seconds", action="store_true", help="what predictions cost, against torch's own fake tensors"
    )
    parser.add_argument(
        "--measured",
        action="store_true",
        help="real steps of every method beside their predictions; takes weights",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of --seconds")
    parser.add_argument("--top", type=int, default=20, help="lines of the profile")
    options = parser.parse_args()
    known = list(map(row_name, gpu.of_methods(gpu.Case("memory", "")))) if options.measured else list(CASES)
    for name in [*options.rows, *([options.profile] if options.profile else [])]:
        if name not in known:
            parser.error(f"no row '{name}'; rows: {', '.join(known)}")
    torch.set_num_threads(1)
    if options.profile:
        profile(options.profile, options)
        return 0
    if options.measured:
        return measured(options)
    if options.seconds:
        return seconds(options)
    return activations(options) if options.activations else table(options)


if __name__ == "__main__":
    raise SystemExit(main())
