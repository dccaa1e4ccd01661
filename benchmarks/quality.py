"""What a method reaches on real tasks, and at what cost.

    ZOLR_DATA=../shared/data python benchmarks/quality.py --group fo          # backprop: the subspace against full AdamW
    ZOLR_DATA=../shared/data python benchmarks/quality.py --group zo          # forward passes only, three seeds
    ZOLR_DATA=../shared/data python benchmarks/quality.py --group demo        # the model and data in the package

Every case is one `zolr finetune` in a process of its own. Results, with the command that made them, are merged into
`benchmarks/results/quality.json`; a case that is there already is skipped unless `--again` is given.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "quality.json"
DATA = Path(os.environ.get("ZOLR_DATA", Path(__file__).parents[2] / "shared" / "data"))
MINILM = str(DATA / "models" / "minilm-mlm")

REAL = ["--model", MINILM, "--max-length", "64", "--threads", "1"]
THREE_EPOCHS = ["--train-rows", "512", "--epochs", "3", "--batch-size", "16", "--eval-every", "32"]
SEEDS = range(3)


def cases() -> dict[str, dict[str, list[str]]]:
    """Arguments of every case by group and name."""
    fo, zo, demo = {}, {}, {}
    for seed in SEEDS:
        seeds = ["--seed", str(seed), "--data-seed", str(seed)]
        for task in ("sst2", "trec"):
            for method in ("adamw", "stiefel"):
                paradigm = ["--method", method, "--paradigm", "fo"]
                fo[f"fo/{task}/{method}/{seed}"] = [*REAL, *THREE_EPOCHS, *paradigm, "--task", task, *seeds]
            stiefel = ["--paradigm", "zo", "--projector", "stiefel", "--steps", "200", "--eval-every", "50"]
            zo[f"zo/{task}/stiefel/{seed}"] = [*REAL, *stiefel, "--task", task, *seeds]
        one = ["--threads", "1", *seeds]
        demo[f"demo/stiefel-zo/{seed}"] = ["--paradigm", "zo", "--projector", "stiefel", *one]
        demo[f"demo/stiefel-fo/{seed}"] = ["--paradigm", "fo", "--projector", "stiefel", *one]
        demo[f"demo/adamw/{seed}"] = ["--method", "adamw", *one]
        demo[f"demo/adamw, lr 1e-3/{seed}"] = ["--method", "adamw", "--lr", "1e-3", *one]
    return {"fo": fo, "zo": zo, "demo": demo}


def ran(arguments: list[str]) -> dict[str, object]:
    """The result of one run, or its error."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "zolr", "finetune", *arguments, "--quiet", "--json"]
        done = subprocess.run([*command, "--output", f"{folder}/run"], capture_output=True, text=True)
    shown = " ".join(["zolr finetune", *arguments]).replace(str(DATA), "$ZOLR_DATA")
    if done.returncode:
        return {"command": shown, "error": done.stderr.strip().splitlines()[-1:], "code": done.returncode}
    result = json.loads(done.stdout)
    keep = ("metric", "before", "after", "steps", "forwards", "tokens", "seconds", "peak_bytes_measured")
    chosen = {key: result.get(key) for key in (*keep, "peak_bytes_predicted", "lr", "eps", "versions")}
    return {"command": shown, **{key: value for key, value in chosen.items() if value is not None}}


def main() -> None:
    """Run the cases of a group and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--group", choices=("fo", "zo", "demo"), required=True)
    parser.add_argument("--again", action="store_true", help="run cases that have a result too")
    parser.add_argument("--only", default="", help="a part of the names of the cases to run")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, arguments in cases()[options.group].items():
        if options.only not in name or (name in results and not options.again):
            continue
        results[name] = ran(arguments)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    print(f"{'case':28} {'before':>7} {'after':>7} {'steps':>6} {'forwards':>9} {'seconds':>8}")
    for name, r in sorted(results.items()):
        if name.startswith(f"{options.group}/"):
            if "error" in r:
                print(f"{name:28} {r['error']}")
            else:
                print(
                    f"{name:28} {r['before']:7.3f} {r['after']:7.3f} {r['steps']:6} {r['forwards']:9} {r['seconds']:8.0f}"
                )


if __name__ == "__main__":
    main()
