"""Our steps beside those of published packages, as these are: the same model, batch, dtype and threads, one process.

    pip install -e ".[peers]"
    python benchmarks/peers.py                        # 2 layers of width 768, batch 16 x 64, float32, one thread
    python benchmarks/peers.py --layers 6 --vocabulary 50265 --json

Times are ratios to a reference in paired rounds (two plain forwards for forward-only steps, a step of torch's AdamW for
backprop), every contestant once a round, in alternating order. Peaks are bytes of live tensors over an ordinary step, counted
in the same way for all. A package that is not installed or does not run is a row that says why. Refreshes of bases (once in
200 steps for the packages that have them) fall outside the timed rounds. Results are merged into
`benchmarks/results/peers.json`.
"""

import argparse
import copy
import json
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from speed import LEAST_ROUNDS, WORDS, batch, timed
from torch import Tensor, nn

import zolr
from zolr.memory import LiveBytes, kept, size_of
from zolr.models import build, prompt_loss

RESULTS = Path(__file__).parent / "results" / "peers.json"
PACKAGES = ("mezo", "torchzero", "galore-torch", "apollo-torch", "fira", "peft", "pytorch_optimizer")
RANK, GAP, LR = 32, 200, 1e-6

Step = Callable[[], Any]
Maker = Callable[[nn.Module, dict[str, Tensor]], tuple[Step, Callable[[], list[Tensor]]]]


def mean(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    """The loss of the batch."""
    return prompt_loss(WORDS)(model, data).mean()


def ours(train: str = "all", **parts: Any) -> Maker:
    """An engine."""

    def make(model: nn.Module, data: dict[str, Tensor]) -> tuple[Step, Callable[[], list[Tensor]]]:
        engine = zolr.Engine(model, zolr.compose(**parts), lr=LR, loss=prompt_loss(WORDS), select=train)
        return lambda: engine.step([data]), lambda: [t for part in kept(engine).values() for t in part]

    return make


def backprop(build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> Maker:
    """An ordinary step of an optimizer."""

    def make(model: nn.Module, data: dict[str, Tensor]) -> tuple[Step, Callable[[], list[Tensor]]]:
        model.train()
        optimizer = build_optimizer(model)

        def step() -> None:
            mean(model, data).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step, lambda: held(optimizer.state.values())

    return make


def held(states: Any) -> list[Tensor]:
    """Every tensor that can be reached from an optimizer's state."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def visit(thing: Any) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, dict):
            for value in thing.values():
                visit(value)
        elif (
            isinstance(thing, (list, tuple, set))
            or hasattr(thing, "mapping")
            or type(thing).__name__ == "dict_values"
        ):
            for value in thing:
                visit(value)
        elif hasattr(thing, "__dict__") and not isinstance(thing, (nn.Module, type)):
            visit(vars(thing))

    visit(list(states))
    return found


def groups(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """Linear maps of the layers, which packages project, and all other weights."""
    projected = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layer" in n]
    chosen = {id(p) for p in projected}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": others}, {"params": projected, "rank": RANK, "update_proj_gap": GAP, **settings}]


def mezo() -> Maker:
    """The package `mezo`: it walks the weights in place."""
    from mezo import update

    def make(model: nn.Module, data: dict[str, Tensor]) -> tuple[Step, Callable[[], list[Tensor]]]:
        return lambda: update(model, data, mean, epsilon=1e-3, learning_rate=LR, random_seed=0), list

    return make


def torchzero_mezo() -> Maker:
    """MeZO of the package `torchzero`."""
    import torchzero as tz

    def make(model: nn.Module, data: dict[str, Tensor]) -> tuple[Step, Callable[[], list[Tensor]]]:
        optimizer = tz.Optimizer(model.parameters(), tz.m.MeZO(h=1e-3), tz.m.LR(LR))

        def closure(backward: bool = True) -> Tensor:
            return mean(model, data)

        def step() -> None:
            with torch.no_grad():
                optimizer.step(closure)

        return step, lambda: held(optimizer.state.values())

    return make


def galore() -> Maker:
    """AdamW of the package `galore-torch`."""
    from galore_torch import GaLoreAdamW

    more = dict(scale=0.25, proj_type="std")
    return backprop(lambda model: GaLoreAdamW(groups(model, **more), lr=LR))


def apollo() -> Maker:
    """APOLLO of the package `apollo-torch`."""
    from apollo_torch import APOLLOAdamW

    more = dict(proj="random", scale_type="channel", scale=1.0, proj_type="std")
    return backprop(lambda model: APOLLOAdamW(groups(model, **more), lr=LR))


def fira() -> Maker:
    """The package `fira`."""
    from fira import FiraAdamW

    return backprop(lambda model: FiraAdamW(groups(model, alpha=0.25, proj_type="std"), lr=LR))


def lora() -> Maker:
    """LoRA of the package `peft` on all linear maps of the layers, with torch's AdamW."""
    from peft import LoraConfig, inject_adapter_in_model

    def make(model: nn.Module, data: dict[str, Tensor]) -> tuple[Step, Callable[[], list[Tensor]]]:
        names = sorted(
            {
                n.split(".")[-1]
                for n, m in model.named_modules()
                if isinstance(m, nn.Linear) and ".layer." in n
            }
        )
        settings = LoraConfig(r=RANK, target_modules=names, lora_dropout=0.0)
        model = inject_adapter_in_model(settings, model)
        trained = [p for p in model.parameters() if p.requires_grad]
        return backprop(lambda _: torch.optim.AdamW(trained, lr=LR))(model, data)

    return make


def ported_galore() -> Maker:
    """GaLore of the package `pytorch_optimizer`."""
    from pytorch_optimizer import GaLore

    more = dict(scale=0.25, projection_type="std")
    return backprop(lambda model: GaLore(groups(model, **more), lr=LR))


# name -> package (None for ours), how to make it, and whether it is measured against two forwards ("zo") or AdamW ("fo")
ROWS: dict[str, tuple[str | None, Callable[[], Maker], str]] = {
    "zolr stiefel zo": (None, lambda: ours("attention", method="stiefel", paradigm="zo", eps=1e-3), "zo"),
    "zolr stiefel zo, all weights": (
        None,
        lambda: ours(method="stiefel", paradigm="zo", rank=4, eps=1e-3),
        "zo",
    ),
    "zolr mezo": (None, lambda: ours(method="mezo"), "zo"),
    "mezo": ("mezo", mezo, "zo"),
    "torchzero MeZO": ("torchzero", torchzero_mezo, "zo"),
    "zolr stiefel fo": (None, lambda: ours("linear", method="stiefel", paradigm="fo", rank=RANK), "fo"),
    "zolr adamw": (None, lambda: ours(method="adamw", paradigm="fo"), "fo"),
    "galore-torch GaLoreAdamW": ("galore-torch", galore, "fo"),
    "apollo-torch APOLLO": ("apollo-torch", apollo, "fo"),
    "fira FiraAdamW": ("fira", fira, "fo"),
    "peft LoRA": ("peft", lora, "fo"),
    "pytorch_optimizer GaLore": ("pytorch_optimizer", ported_galore, "fo"),
}


def installed(package: str) -> str | None:
    """Version of a package, None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def reference(kind: str, plain: nn.Module, data: dict[str, Tensor]) -> Step:
    """What a row is measured against."""
    if kind == "fo":
        return backprop(lambda model: torch.optim.AdamW(model.parameters(), lr=LR))(
            copy.deepcopy(plain), data
        )[0]

    def two_forwards() -> None:
        with torch.no_grad():
            mean(plain, data).item(), mean(plain, data).item()

    return two_forwards


def begun(plain: nn.Module, make: Maker, data: dict[str, Tensor]) -> tuple[Step, dict[str, int]]:
    """A step that has its state and first basis, and live bytes at most in its third call, all that it needs included."""
    model = copy.deepcopy(plain)
    step, keeps = make(model, data)
    step(), step()
    live = LiveBytes()
    live.track(model, data)
    state = live.track(*keeps())
    with live:
        step()
    return step, {"peak_bytes": live.peak, "state_bytes": state}


def paired_rows(
    steps: dict[str, Step], references: dict[str, Step], rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Ratios of every step to its reference, each timed once in every round; and the rows that failed on the way."""
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, str] = {}
    for run in references.values():
        run(), run()
    for i in range(rounds):
        own: dict[str, float] = {}
        base: dict[str, float] = {}
        order = [*references, *steps]
        for name in order if i % 2 else reversed(order):
            if name in references:
                base[name] = timed(references[name])
            elif name not in failed:
                try:
                    own[name] = timed(steps[name])
                except Exception as error:  # a package may fail on a later step too
                    failed[name] = reason(error)
        for name, seconds in own.items():
            ratios[name].append(seconds / base[ROWS[name][2]])
    return ratios, failed


def reason(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def main() -> None:
    """Run all rows, print and keep them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--model", default="roberta-base", help="preset")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens; walks over the table take long")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--only", default="", help="a part of the names of the rows to run")
    parser.add_argument("--json", action="store_true", help="print the results as JSON too")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file the results are merged into")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    shape = dict(num_hidden_layers=options.layers, vocab_size=options.vocabulary)
    plain = build(options.model, dtype=dtype, dropout=0.0, **shape)
    data = batch(options.batch_size, options.length, options.vocabulary)
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for name, (package, maker, _) in ROWS.items():
        if options.only not in name:
            continue
        if package is not None and installed(package) is None:
            found[name] = {"failed": f"package '{package}' is not installed"}
            continue
        try:
            steps[name], found[name] = begun(plain, maker(), data)
        except Exception as error:  # its own fault or that of its dependencies: the row says which
            found[name] = {"failed": reason(error)}
    kinds = {ROWS[name][2] for name in steps}
    ratios, failed = paired_rows(steps, {k: reference(k, plain, data) for k in sorted(kinds)}, options.rounds)
    for name, values in ratios.items():
        if name in failed:
            found[name]["failed"] = failed[name]
            continue
        low, middle, high = statistics.quantiles(values, n=4)
        found[name] |= {"ratio": middle, "lower": low, "upper": high, "rounds": len(values)}
        found[name]["against"] = {"zo": "two plain forwards", "fo": "AdamW"}[ROWS[name][2]]
    names = (*PACKAGES, "torch", "transformers", "zolr")
    conditions = {
        "model": f"{options.model} with {options.layers} layers, vocabulary {options.vocabulary}, random weights",
        "batch": f"{options.batch_size} x {options.length}",
        "dtype": options.dtype,
        "threads": options.threads,
        "machine": f"CPU, {platform.machine()}",
        "weights_bytes": size_of(plain),
        "versions": {name: zolr.__version__ if name == "zolr" else installed(name) for name in names},
    }
    print(json.dumps(conditions))
    for name, row in found.items():
        if "failed" in row:
            print(f"{name:30} {row['failed']}")
            continue
        times = f"{row['ratio']:.3f} ({row['lower']:.3f} to {row['upper']:.3f})"
        print(f"{name:30} {times:26} x {row['against']:20} peak {row['peak_bytes'] / 1e6:8.1f} MB")
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    case = f"{options.model}, {options.layers} layers, {conditions['batch']}, {options.dtype}, {options.threads} threads"
    rows = {**results.get(case, {}).get("rows", {}), **found}
    results[case] = {"conditions": conditions, "rows": rows}
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    if options.json:
        print(json.dumps(results[case], indent=1))


if __name__ == "__main__":
    main()
