"""Why `apollo-mini` is behind `apollo` on the demo: the package beside this row, and what of the rule costs what.

    python benchmarks/apollo_mini.py            # all cases that have no result yet; needs the package apollo-torch
    python benchmarks/apollo_mini.py --markdown # the table of what there is
    python benchmarks/apollo_mini.py --smoke    # three steps of two cases

The task is that of `benchmarks/methods.py` (`finetune`): 80 steps of 16 examples by backprop, windows of 16, embeddings, head and
vectors by AdamW at the same rate. `package` is APOLLO-Mini of apollo-torch on the very batches, rates and weights; `same` is this
row with the package's projections and its order of limiter and bias corrections (`Replace(released=True)`), which must take the
same steps. All others are the row with one thing changed. Losses are of the test rows at the end.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any, ClassVar

import methods as table
import torch
from torch import Tensor

from zolr.cli.choices import schedule_of
from zolr.cli.finetune import Finetune
from zolr.cli.job import Job
from zolr.keys import Key
from zolr.methods import Method, compose
from zolr.optim import OptimizerRule
from zolr.projectors import Fixed, Side, one_sided
from zolr.projectors.gaussian import Gaussian
from zolr.projectors.stiefel import Stiefel
from zolr.residuals.replace import Replace
from zolr.subspaces import Subspace

RESULTS = Path(__file__).parent / "results" / "apollo_mini.json"
WINDOW = 16
RATE = 3e-3  # factor 1 of the row on the demo, whose width is 128


@dataclass(frozen=True)
class Seeded(Fixed):
    """The package's projections, whose seeds number the weights."""

    rank: int = 1
    side: Side = "short"
    names: tuple[str, ...] = ()
    needs: ClassVar[Any] = "nothing"
    unbiased: ClassVar[bool] = False

    def draw(self, shape: tuple[int, ...], key: Key, *, like: Tensor, **_: Any) -> Subspace:
        """Draw the subspace of one weight."""
        from apollo_torch.random_projector import next_seed, stable_randn

        seed = 1 + self.names.index(str(key.path[2]))
        for _window in range(int(key.path[1])):
            seed = next_seed(seed)
        right = shape[0] >= shape[1]
        drawn = stable_randn((self.rank, shape[1]) if right else (shape[0], self.rank), seed=seed)
        drawn = drawn / sqrt(self.rank)
        return one_sided(self.side, shape, (drawn.T if right else drawn).to(like).contiguous())


def job_of(method: Method, factor: float, steps: int, seed: int) -> Job:
    """The demo, with a method in place of a row's."""

    class Given(Finetune):
        """Settings whose method is made elsewhere."""

        def composed(self) -> Method:
            return method

    settings = Given(
        method="apollo-mini", paradigm="fo", steps=steps, batch_size=table.EXAMPLES, threads=1, lr=RATE,
        seed=seed, refresh_every=WINDOW,
    )  # fmt: skip
    return Job(settings.filled(), table.scaled(schedule_of(settings.schedule, 0, steps), factor))


def scores(job: Job) -> dict[str, float]:
    """Losses at the end."""
    held_out, test = (job.work.evaluate(rows, job.batch_size) for rows in (job.validation, job.test))
    return {"held_out": held_out["loss"], "loss": test["loss"], "accuracy": test["accuracy"]}


def weights(model: Any) -> dict[str, Tensor]:
    """A copy of what is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def ours(
    method: Method, factor: float, steps: int, seed: int = 0, at: Sequence[int] = ()
) -> tuple[dict[str, Any], list]:
    """Train by a method; its scores, and the weights after some steps."""
    job = job_of(method, factor, steps, seed)
    seen = []
    for step in range(steps):
        job.engine.step(job.batches(step))
        if step + 1 in at:
            seen.append(weights(job.engine.export()))
    return scores(job), seen


def package(
    factor: float, steps: int, at: Sequence[int] = (), eps: float = 1e-8, seed: int = 0
) -> tuple[dict[str, Any], list]:
    """Train by the package's optimizer on the same batches and at the same rates."""
    from apollo_torch import APOLLOAdamW

    from zolr.estimators import mean_loss

    job = job_of(compose("sgd"), factor, steps, 0)
    projected = projected_names(job)
    model, loss = job.engine.detach().requires_grad_(True), job.work.objective(job.settings.objective)
    inner = [p for n, p in model.named_parameters() if n in projected]
    outer = [p for n, p in model.named_parameters() if n not in projected]
    settings = {"rank": 1, "proj": "random", "scale": 128, "scale_type": "tensor"}
    settings |= {"update_proj_gap": WINDOW, "proj_type": "std"}
    optimizer = APOLLOAdamW([{"params": inner, **settings}, {"params": outer}], lr=RATE, eps=eps)
    for p in inner:
        optimizer.state[p]["seed"] += 1000 * seed
    course, seen = table.scaled(schedule_of(job.settings.schedule, 0, steps), factor), []
    model.train()
    for step in range(steps):
        for part in optimizer.param_groups:
            part["lr"] = RATE * course(step)
        optimizer.zero_grad()
        mean_loss(lambda batch: loss(model, batch), job.batches(step)).backward()
        optimizer.step()
        if step + 1 in at:
            seen.append(weights(model))
    return scores(job), seen


def projected_names(job: Job) -> list[str]:
    """Weights with a subspace, in the model's order."""
    row = job_of(compose("apollo-mini"), 1.0, 1, 0)
    names = set(row.engine.windows.cores)
    return [name for name, _ in job.work.model.named_parameters() if name in names]


def mini(**changed: Any) -> Method:
    """The row with parts replaced."""
    return replace(compose("apollo-mini", refresh_every=WINDOW), **changed)


# (method, number of seeds by factor)
VARIANTS: dict[str, tuple[Method, dict[float, int]]] = {
    "apollo-mini": (mini(), {0.3: 1, 1.0: 3, 3.0: 5}),
    "no limit on growth": (mini(residual=Replace(level="tensor", growth=None)), {1.0: 3, 3.0: 3}),
    "apollo (rank 32, a factor a channel)": (
        compose("apollo", refresh_every=WINDOW),
        {0.3: 1, 1.0: 1, 3.0: 3},
    ),
    "rank 4": (mini(projector=Gaussian(rank=4, side="short"), scale=32**0.5), {3.0: 3}),
    "limits as the released code": (
        mini(residual=Replace(level="tensor", released=True)),
        {1.0: 1, 3.0: 5},
    ),
    "a basis of length sqrt(n)": (mini(projector=Stiefel(rank=1, side="short")), {3.0: 3}),
    "one window": (mini(refresh_every=1000), {3.0: 1}),
    "moments start afresh": (compose("apollo-mini", refresh_every=WINDOW, transport="reset"), {3.0: 1}),
    "a factor a channel": (mini(residual=Replace(level="channel")), {1.0: 1, 3.0: 1}),
}


def identical(steps: int) -> dict[str, float]:
    """Largest difference of any weight after ten steps and at the end, relative to how far weights have moved."""
    at = (min(10, steps - 1), steps)
    named = tuple(projected_names(job_of(compose("sgd"), 1.0, 1, 0)))
    method = mini(projector=Seeded(names=named), residual=Replace(level="tensor", released=True))
    # where epsilon stands differs from torch's Adam to theirs
    method = replace(method, optimizer=OptimizerRule("adamw", {"eps": 1e-30}))
    mine, seen = ours(method, 1.0, steps, at=at)
    theirs, expected = package(1.0, steps, at=at, eps=1e-30)
    start = weights(job_of(compose("sgd"), 1.0, 1, 0).engine.export())
    found: dict[str, float] = {}
    for step, a, b in zip(at, seen, expected, strict=True):
        moved = sum(float((b[n] - start[n]).square().sum()) for n in b) ** 0.5
        apart = sum(float((a[n] - b[n]).square().sum()) for n in b) ** 0.5
        found[f"apart after {step}"] = apart / moved
    return found | {"same": mine["loss"], "package": theirs["loss"]}


def main() -> None:
    """Run the cases that have no result, and print all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = 3 if options.smoke else table.TURNS
    results: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}

    def save(name: str, found: Any) -> None:
        results[name] = found
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")

    if not options.markdown:
        if "identical" not in results:
            save("identical", identical(steps))
        for factor, seeds in {1.0: 1}.items() if options.smoke else {0.3: 1, 1.0: 1, 3.0: 9}.items():
            done = results.get(f"package|{factor:g}", [])
            for seed in range(len(done), seeds):
                done = [*done, package(factor, steps, seed=seed)[0]]
                save(f"package|{factor:g}", done)
        for name, (method, rates) in VARIANTS.items():
            for factor, seeds in () if options.smoke else rates.items():
                key = f"{name}|{factor:g}"
                done = results.get(key, [])
                for seed in range(len(done), seeds):
                    done = [*done, ours(method, factor, steps, seed)[0]]
                    save(key, done)
    print("identical steps:", {k: f"{v:.3g}" for k, v in results.get("identical", {}).items()})
    print("\n| case | factor | test loss, mean | of every seed | held out, mean |\n|---|---|---|---|---|")
    for key, runs in results.items():
        if key != "identical":
            name, factor = key.split("|")
            mean, held_out = (statistics.fmean(r[which] for r in runs) for which in ("loss", "held_out"))
            all_of_them = ", ".join(f"{r['loss']:.3f}" for r in runs)
            print(f"| {name} | {factor} | {mean:.3f} | {all_of_them} | {held_out:.3f} |")


if __name__ == "__main__":
    main()
