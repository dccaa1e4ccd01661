"""Training by volunteers who cannot be trusted: how much do 10 % of faulty workers cost?

Processes on one machine, over loopback sockets. The coordinator sends the steps it has applied (key and slope, nothing
else), every worker replays them on its own copy of the model, evaluates the probes it was asked for and sends back slopes
as text. A task goes to several workers. The coordinator waits until a deadline, goes on without stragglers, takes each
worker's first answer to a task only, drops a task without a quorum, and reduces the answers robustly. Workers may be

- honest, slow (past the deadline), lost (they leave), duplicating (every answer twice),
- lying: a slope of the wrong sign and ten times the size, or not a number, or an enormous one.

`python benchmarks/volunteers.py` trains a small classifier for each share of faulty workers and each way to reduce, on some
seeds (of directions, rows, who is asked, and lies), and prints the loss at the end, mean and spread; minutes on two cores.
`--output` takes every run as JSON.
"""

import argparse
import json
import math
import multiprocessing
import select
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zolr.keys import Key
from zolr.probes import Layout, Probe, Space

WORKERS = 20
STEPS, TASKS = 80, 4  # probes of a step
COPIES = 5  # workers that a probe is sent to
QUORUM = 3  # answers without which none of them counts: two liars could be all there are
EPS, LR = 1e-2, 0.05
DEADLINE = 0.25  # seconds that a step waits after the first answer, where it has a quorum
LIMIT = 20.0  # seconds that it waits at all
FAULTS = ("lying", "lying", "slow", "duplicating", "lost")  # what faulty workers are, in turn
ROWS = 512


class Model:
    """A two-layer classifier whose weights are one vector, and what a step does to it."""

    def __init__(self, seed: int) -> None:
        self.key = Key(7 + seed)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5))
        self.layout = Layout([Space(name, tuple(p.shape)) for name, p in self.net.named_parameters()])
        self.x = torch.randn(ROWS, 16)
        torch.manual_seed(1)
        teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5))
        self.y = (3 * teacher(self.x)).argmax(1)

    def probe(self, step: int, task: int) -> Probe:
        """The direction that a name stands for, the same for everyone."""
        return Probe(self.layout, "rademacher", self.key.fold_in("step", step, task))

    @torch.no_grad()
    def loss(self, rows: Tensor | slice = slice(None), shift: Any = None, scale: float = 0.0) -> float:
        """Mean loss of some rows, at the weights or beside them."""
        weights = dict(self.net.named_parameters())
        if shift is not None:
            weights = {name: w + scale * shift(name) for name, w in weights.items()}
        logits = torch.func.functional_call(self.net, weights, (self.x[rows],))
        return float(F.cross_entropy(logits.double(), self.y[rows]))

    def slope(self, step: int, task: int) -> float:
        """Central difference along a probe on the rows of a step."""
        rows = self.key.fold_in("rows", step).permutation(ROWS)[:128]
        z = self.probe(step, task)
        return (self.loss(rows, z, EPS) - self.loss(rows, z, -EPS)) / (2 * EPS)

    @torch.no_grad()
    def apply(self, step: int, slopes: dict[int, float]) -> None:
        """The update of a step, from names and numbers alone."""
        for task, slope in sorted(slopes.items()):
            z = self.probe(step, task)
            for name, weight in self.net.named_parameters():
                weight.sub_(z(name) * (LR * slope / len(slopes)))


def work(port: int, number: int, kind: str, seed: int) -> None:
    """One volunteer."""
    torch.set_num_threads(1)
    model, generator = Model(seed), torch.Generator().manual_seed(WORKERS * seed + number)
    link = socket.create_connection(("127.0.0.1", port))
    lines = link.makefile("rw")
    print(json.dumps({"worker": number}), file=lines, flush=True)
    while text := _line(lines):
        asked = json.loads(text)
        for step, slopes in asked["applied"]:
            model.apply(step, {int(task): slope for task, slope in slopes.items()})
        if kind == "lost" and asked["step"] == STEPS // 3:
            return
        answers = []
        for task in asked["tasks"]:
            slope = model.slope(asked["step"], task)
            if kind == "lying":
                which = int(torch.randint(3, (), generator=generator))
                slope = (-10 * slope, math.nan, 1e6)[which]
            answers.append({"worker": number, "step": asked["step"], "task": task, "slope": slope})
        if kind == "slow":
            time.sleep(2 * DEADLINE)
        for answer in answers * (2 if kind == "duplicating" else 1):
            print(json.dumps(answer), file=lines)
        try:
            lines.flush()
        except OSError:  # the run is over
            return


def _line(lines: Any) -> str:
    """What the coordinator says next; nothing when the run is over."""
    try:
        return lines.readline()
    except OSError:
        return ""


def mean(slopes: Sequence[float]) -> float:
    """What one trusts if one trusts everybody; what is not a number is left out even then."""
    finite = [s for s in slopes if math.isfinite(s)]
    return sum(finite) / len(finite) if finite else 0.0


def median_of_means(slopes: Sequence[float]) -> float:
    """Median of the means of groups of two."""
    finite = [s for s in slopes if math.isfinite(s)]
    groups = [finite[i::3] for i in range(min(3, len(finite)))]
    return statistics.median(sum(group) / len(group) for group in groups) if groups else 0.0


def median(slopes: Sequence[float]) -> float:
    """Honest answers to one task are equal: more than half of them decide."""
    finite = [s for s in slopes if math.isfinite(s)]
    return statistics.median(finite) if finite else 0.0


def without_outliers(slopes: Sequence[float]) -> float:
    """Mean of what lies within three median deviations of the median."""
    finite = [s for s in slopes if math.isfinite(s)]
    if not finite:
        return 0.0
    middle = statistics.median(finite)
    spread = statistics.median(abs(s - middle) for s in finite)
    return mean([s for s in finite if abs(s - middle) <= 3 * spread + 1e-12])


def agreement(slopes: Sequence[float]) -> float:
    """What a quorum says to the last bit: honest workers replay the same steps, so their answers are equal."""
    finite = [s for s in slopes if math.isfinite(s)]
    said = max(finite, key=finite.count, default=math.nan)
    return said if finite.count(said) >= QUORUM else math.nan


REDUCE: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": mean,
    "median of means": median_of_means,
    "median": median,
    "outliers rejected": without_outliers,
    "agreement of three": agreement,
}


class Coordinator:
    """Sends tasks, waits, reduces."""

    def __init__(
        self, listener: socket.socket, reduce: Callable[[Sequence[float]], float], seed: int
    ) -> None:
        self.model, self.reduce = Model(seed), reduce
        self.links: dict[int, Any] = {}
        self.buffers: dict[int, bytes] = {}
        self.behind: dict[int, list[tuple[int, dict[int, float]]]] = {}
        self.counts = {"late or lost": 0, "duplicates": 0, "answers": 0}
        self.bytes = 0
        for _ in range(WORKERS):
            link, _ = listener.accept()
            hello = b""
            while not hello.endswith(b"\n"):
                hello += link.recv(1)
            number = json.loads(hello)["worker"]
            self.links[number], self.buffers[number], self.behind[number] = link, b"", []

    def step(self, step: int) -> None:
        """One step with whoever answers in time."""
        order = self.model.key.fold_in("who", step).permutation(WORKERS).tolist()
        seats = [order[i % WORKERS] for i in range(TASKS * COPIES)]
        asked: dict[int, list[int]] = {}
        for i, worker in enumerate(seats):
            asked.setdefault(worker, []).append(i % TASKS)
        for worker, tasks in asked.items():
            if worker in self.links:
                self._send(worker, {"step": step, "tasks": tasks, "applied": self.behind[worker]})
        answers: dict[int, dict[int, float]] = {task: {} for task in range(TASKS)}
        missing = {(w, t) for w, tasks in asked.items() if w in self.links for t in tasks}
        end = time.monotonic() + LIMIT
        deadline = end
        while missing and time.monotonic() < end:
            enough = all(len(seen) >= QUORUM for seen in answers.values())
            if enough and time.monotonic() > deadline:
                break
            for worker, answer in self._received(0.02):
                deadline = min(deadline, time.monotonic() + DEADLINE)
                # whoever answers must be who was asked, about this step, and once
                place = (worker, answer.get("task"))
                if answer.get("step") != step or answer.get("worker") != worker:
                    continue
                if place not in missing:
                    self.counts["duplicates"] += 1
                    continue
                missing.discard(place)
                self.counts["answers"] += 1
                answers[answer["task"]][worker] = float(answer["slope"])
            missing = {(w, t) for w, t in missing if w in self.links}
        self.counts["late or lost"] += len(missing)
        reduced = {
            task: self.reduce(list(seen.values())) for task, seen in answers.items() if len(seen) >= QUORUM
        }
        slopes = {task: slope for task, slope in reduced.items() if math.isfinite(slope)}
        if not slopes:
            return
        self.model.apply(step, slopes)
        for worker in self.links:
            self.behind[worker].append((step, slopes))

    def _send(self, worker: int, message: dict[str, Any]) -> None:
        try:
            data = (json.dumps(message) + "\n").encode()
            self.links[worker].sendall(data)
            self.bytes += len(data)
            self.behind[worker] = []
        except OSError:
            self._drop(worker)

    def _received(self, wait: float) -> list[tuple[int, dict[str, Any]]]:
        ready, _, _ = select.select(list(self.links.values()), [], [], wait)
        found = []
        for worker, link in list(self.links.items()):
            if link not in ready:
                continue
            try:
                data = link.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                self._drop(worker)
                continue
            *whole, self.buffers[worker] = (self.buffers[worker] + data).split(b"\n")
            for line in whole:
                try:
                    answer = json.loads(line)
                except ValueError:  # nonsense is no answer
                    continue
                if isinstance(answer, dict):
                    found.append((worker, answer))
        return found

    def _drop(self, worker: int) -> None:
        self.links.pop(worker).close()


def trained(share: float, way: str, seed: int = 0) -> dict[str, Any]:
    """One run: the loss at the end, and what the coordinator met."""
    faulty = round(share * WORKERS)
    kinds = [FAULTS[i % len(FAULTS)] if i < faulty else "honest" for i in range(WORKERS)]
    listener = socket.create_server(("127.0.0.1", 0), backlog=WORKERS)
    context = multiprocessing.get_context("fork")
    port = listener.getsockname()[1]
    processes = [context.Process(target=work, args=(port, i, kind, seed)) for i, kind in enumerate(kinds)]
    for process in processes:
        process.start()
    coordinator = Coordinator(listener, REDUCE[way], seed)
    before = coordinator.model.loss()
    for step in range(STEPS):
        coordinator.step(step)
    after, left = coordinator.model.loss(), len(coordinator.links)
    for link in coordinator.links.values():
        link.close()
    for process in processes:
        process.join(5)
        process.kill()
    listener.close()
    return {
        "faulty": share,
        "way": way,
        "seed": seed,
        "before": before,
        "after": after,
        "workers left": left,
        "bytes a step": coordinator.bytes // STEPS,
        "asked": STEPS * TASKS * COPIES,
        **coordinator.counts,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "volunteers.json")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = [(share, way) for share in asked.shares for way in REDUCE if share or way == "mean"]
    print(
        "| faulty workers | reduced by | loss before | after, mean | spread | answers late or lost | duplicates |"
    )
    print("|---|---|---|---|---|---|---|")
    runs: list[dict[str, Any]] = []
    for case in cases:
        own = [trained(*case, seed) for seed in asked.seeds]
        runs += own
        asked.output.write_text(json.dumps(runs, indent=2) + "\n")
        after, late = [one["after"] for one in own], [one["late or lost"] / one["asked"] for one in own]
        print(
            f"| {case[0]:.0%} | {case[1]} | {own[0]['before']:.3f} | {statistics.fmean(after):.3g} | {min(after):.3g} to {max(after):.3g} "
            f"| {statistics.fmean(late):.0%} | {sum(one['duplicates'] for one in own)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
