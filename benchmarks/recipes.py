"""Predicted peak memory of a step of every recipe of pretraining, and what it is made of.

    python benchmarks/recipes.py                                  # all that are missing, into results/recipes.json
    python benchmarks/recipes.py --only llama-7b/galore,llama-1b  # recipes, or whole sizes, anew
    python benchmarks/recipes.py --table                          # what there is, and nothing is run

The recipe's own settings are given to its own verb's prediction: the engine's real step, with micro-batches and refreshes, runs on
tensors without data, so that neither weights nor text nor a GPU are needed. The figure is that of a GPU (`--device cpu`: of a CPU,
where logits are cut into smaller parts). What is no tensor comes on top: the CUDA context, library workspaces, the allocator's
cache.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import zolr

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
OUTPUT = HERE / "results" / "recipes.json"
SIZES = ("20m", "60m", "100m", "130m", "350m", "1b", "7b")
VOCABULARIES = {"google-t5/t5-base": 32_100}  # tokens of the tokenizers that recipes name
PARTS = ("weights", "coords", "optimizer", "gradients", "activations", "logits", "rest")
GB = 1e9


def named(only: Sequence[str] | None = None) -> list[str]:
    """Recipes as `llama-7b/galore`, by size and name; all of them, or those of some names and sizes."""
    known = {
        f"llama-{size}/{path.stem}": f"llama-{size}"
        for size in SIZES
        for path in sorted((RECIPES / f"llama-{size}").glob("*.toml"))
    }
    if only is None:
        return list(known)
    for word in only:
        if word not in known and word not in known.values():
            raise SystemExit(
                f"no recipe or size '{word}'; use llama-7b/galore, or llama-7b for all of a size"
            )
    return [name for name, size in known.items() if name in only or size in only]


def predicted(name: str, device: str = "cuda", **changes: Any) -> dict[str, Any]:
    """Peak of a step of one recipe, its parts, and how long the prediction took.

    Args:
        name: as `named` gives it.
        device: kind of device that the run would be on.
        changes: of its settings.
    """
    import torch

    from zolr.cli.pretraining import prediction
    from zolr.cli.reproduce import recipe_of
    from zolr.models import PRESETS

    settings = recipe_of(RECIPES / f"{name}.toml").settings(**changes)
    begun = time.perf_counter()
    config = PRESETS[settings.model].config(vocab_size=VOCABULARIES[settings.tokenizer])
    found = prediction(settings, config, torch.device(device), profile=True)
    return {
        "peak_bytes": found.peak_bytes,
        "forward_peak_bytes": found.forward_peak_bytes,
        "optimizer_bytes": found.optimizer_bytes,
        "parts": dict(found.parts),
        "phase": found.phase,
        "module": found.module,
        "batch": [settings.micro, settings.parts, settings.length],
        "dtype": settings.dtype,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def table(found: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    """A line a recipe; gigabytes of 1e9 bytes."""
    lines = [f"| recipe | rows | peak | {' | '.join(PARTS)} | where |", "|---" * (len(PARTS) + 4) + "|"]
    for name in names:
        if "peak_bytes" not in found.get(name, {}):
            continue
        row = found[name]
        micro, parts, length = row["batch"]
        cells = [name.removeprefix("llama-"), f"{parts} x {micro} x {length}"]
        cells += [f"{size / GB:.2f}" for size in (row["peak_bytes"], *(row["parts"][part] for part in PARTS))]
        lines.append(f"| {' | '.join([*cells, row['phase']])} |")
    lines += [f"\n{name}: {found[name]['failed']}" for name in names if "failed" in found.get(name, {})]
    return "\n".join(lines)


def main() -> None:
    """Predict what is missing, and print all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="recipes or sizes, joined by commas, which are predicted anew")
    parser.add_argument("--device", default="cuda", help="kind of device that the runs would be on")
    parser.add_argument("--table", action="store_true", help="print what there is and stop")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    names = named(options.only.split(",") if options.only else None)
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    found = results.setdefault(options.device, {})
    row: dict[str, Any]
    for name in names if not options.table else ():
        if not options.only and "peak_bytes" in found.get(name, {}):
            continue
        try:
            row = predicted(name, options.device)
        except Exception as error:  # one that cannot be predicted is a line of the table
            row = {"failed": f"{type(error).__name__}: {error}"[:300]}
        found[name] = row
        results["conditions"] = {p: version(p) for p in ("torch", "transformers")} | {
            "zolr": zolr.__version__
        }
        options.output.parent.mkdir(exist_ok=True)
        aside = options.output.with_suffix(".tmp")
        aside.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        os.replace(aside, options.output)
        told = row["failed"] if "failed" in row else f"{row['peak_bytes'] / GB:.2f} GB, {row['seconds']} s"
        print(f"{name}: {told}", flush=True)
    print(table(found, names))


if __name__ == "__main__":
    main()
