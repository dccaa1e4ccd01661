"""Every figure that needs a GPU, by one command in less than eight minutes.

    python benchmarks/gpu.py                          # writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --smoke     # the same lines of code on tiny models, for those without a GPU

Memory cases (RoBERTa-large at 64 x 128 by every method in float32 and bfloat16, quantized ones, OPT-1.3B, LLaMA-1B) give
allocated and reserved peaks beside the prediction; several run at once, as many as the card has memory for, since these
counters belong to a process. Time cases run alone: ratios in paired rounds as in `speed.py`, and the kernels that a step
launches. Memory cases follow each other in a few processes, which give back all memory between two; time cases and compiled
ones are processes of their own. A crash is one row that says so, a lack of memory is tried again alone, and cases come in the
order of their importance, so that what does not fit into the time is what matters least. Weights and tokens are random.
"""

import argparse
import inspect
import json
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
WORDS = (5, 6)
ROUNDS = 9

TINY = {
    "roberta": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
    "llama": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
    "opt": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=32
    ),
}


@dataclass(frozen=True)
class Case:
    """One process.

    Args:
        kind: "memory" (one method) or "time" (ratios and kernels of several).
        model: preset.
        method, paradigm: of a memory case; "forward" is no method at all.
        dtype: of the weights; "int8" and "nf4" are coded weights around a bfloat16 rest.
        checkpointing: activations are recomputed.
        objective: "prompt" or "lm".
        rows, tokens: of the batch.
        select: weights to train; empty for the method's own.
        compile: the loss is compiled (recorded CUDA graphs, under zo).
        slow: decompositions of all weights keep the card busy: few of these share it, or none would be through in time.
    """

    kind: str
    model: str
    method: str = ""
    paradigm: str = ""
    dtype: str = "float32"
    checkpointing: bool = False
    objective: str = "prompt"
    rows: int = 64
    tokens: int = 128
    select: str = ""
    compile: bool = False
    slow: bool = False

    @property
    def name(self) -> str:
        """What the row is called."""
        words = [self.kind, self.model, self.dtype, f"{self.rows} x {self.tokens}"]
        words += [f"{self.method} {self.paradigm}".strip()] if self.method else []
        words += ["checkpointing"] if self.checkpointing else []
        words += [self.select] if self.select else []
        words += ["compiled"] if self.compile else []
        return ", ".join(words)


def of_methods(like: Case) -> list[Case]:
    """A case for every method and paradigm."""
    from zolr.methods import METHODS

    return [
        replace(like, method=row.name, paradigm=paradigm, slow=row.build(paradigm).dense)
        for row in METHODS.values()
        for paradigm in row.paradigms
    ]


def cases() -> list[Case]:
    """All of them, the most important first within each kind."""
    large = Case("memory", "roberta-large")
    leading = [
        replace(large, method="forward"),
        replace(large, method="stiefel", paradigm="zo"),
        replace(large, method="stiefel", paradigm="fo", checkpointing=True),
        replace(large, method="adamw", paradigm="fo"),
        replace(large, method="mezo", paradigm="zo"),
        *(
            replace(large, method="stiefel", paradigm="zo", dtype=dtype)
            for dtype in ("bfloat16", "int8", "nf4")
        ),
        replace(large, method="stiefel", paradigm="fo", dtype="bfloat16", checkpointing=True),
        replace(large, method="forward", dtype="bfloat16"),
        replace(large, method="stiefel", paradigm="zo", dtype="bfloat16", compile=True),
    ]
    causal = Case("memory", "opt-1.3b", rows=16, tokens=256)
    models = [
        replace(causal, method="stiefel", paradigm="zo", dtype="bfloat16"),
        replace(causal, method="mezo", paradigm="zo", dtype="bfloat16"),
        replace(causal, method="stiefel", paradigm="fo", dtype="bfloat16", checkpointing=True),
        replace(causal, method="forward", dtype="bfloat16"),
    ]
    pretraining = Case("memory", "llama-1b", rows=16, tokens=256, dtype="bfloat16", objective="lm")
    models += [
        replace(pretraining, method="stiefel", paradigm="fo", checkpointing=True),
        replace(pretraining, method="adamw", paradigm="fo", checkpointing=True),
    ]
    every = [
        case
        for dtype in ("int8", "nf4", "bfloat16", "float32")
        for case in of_methods(replace(large, dtype=dtype))
        if dtype in ("float32", "bfloat16") or (case.method == "stiefel" and case.paradigm != "fwd")
    ]
    timing = [
        Case("time", "roberta-large", dtype="bfloat16", rows=16, tokens=64),
        Case("time", "roberta-large", dtype="bfloat16"),
        Case("time", "roberta-large"),
    ]
    # timing comes in the middle: it runs alone, and rows after it are those that may be left out
    last = Case("time", "opt-1.3b", dtype="bfloat16", rows=16, tokens=256)
    quick, slow = ([case for case in every if case.slow is kind] for kind in (False, True))
    return list(dict.fromkeys([*leading, *timing, *models, *quick, last, *slow]))


# --- in the process of a case -------------------------------------------------------------------------------------


def changes(case: Case, smoke: bool) -> dict[str, Any]:
    """Numbers of the preset that a smoke run makes small."""
    if not smoke:
        return {}
    from zolr.models import PRESETS

    return {**TINY[PRESETS[case.model].family], "vocab_size": 300}


def model_of(case: Case, device: str, smoke: bool) -> Any:
    """The model with random weights, drawn where they are needed."""
    import torch

    from zolr.models import build, load_model

    if case.dtype not in ("int8", "nf4"):
        with torch.device(device):
            dtype = getattr(torch, case.dtype)
            return build(case.model, dtype=dtype, device=device, dropout=0.0, **changes(case, smoke))
    if "quantize" not in inspect.signature(load_model).parameters:
        raise NotAvailable("not available: this version loads no coded weights")
    with tempfile.TemporaryDirectory() as folder:
        name: str = case.model
        if smoke:
            name = folder
            tiny: Any = build(case.model, dropout=0.0, **changes(case, smoke))
            tiny.save_pretrained(folder)
        more: dict[str, Any] = {"quantize": case.dtype}
        return load_model(name, dtype=torch.bfloat16, device=device, dropout=0.0, **more)


class NotAvailable(Exception):
    """The row cannot be filled by this version or on this machine."""


def batch_of(case: Case, vocabulary: int, device: str) -> dict[str, Any]:
    """Random tokens; the last one is padding, as predictions take it."""
    import torch

    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary, (case.rows, case.tokens), generator=numbers)
    if case.objective == "lm":
        found = {"input_ids": ids, "labels": ids.clone()}
    else:
        mask = torch.ones_like(ids)
        mask[:, -1] = 0
        zeros = torch.zeros(case.rows, dtype=torch.long)
        found = {"input_ids": ids, "attention_mask": mask, "positions": zeros + 1, "labels": zeros}
    return {name: part.to(device) for name, part in found.items()}


def method_of(case: Case) -> Any:
    """The method with nothing left to choose, and windows so short that a few steps see a change."""
    from zolr.estimators import changed, setting
    from zolr.methods import METHODS

    method = METHODS[case.method].build(case.paradigm)
    if setting(method.estimator, "eps", 1.0) is None:
        method = replace(method, estimator=changed(method.estimator, eps=1e-3))
    return replace(method, refresh_every=method.refresh_every and 2)


def memory(case: Case, device: str, smoke: bool, room: Callable[[int], None]) -> dict[str, Any]:
    """Allocated and reserved peak of steps after the first, against the prediction.

    Args:
        room: is told the bytes that the case is predicted to take, and comes back when the card has them.
    """
    import torch

    from zolr import lora
    from zolr.engine import Engine
    from zolr.estimators import changed, setting
    from zolr.memory import grow, hardest, measure, predict
    from zolr.methods import METHODS
    from zolr.models import PRESETS, checkpoint_activations, lm_loss, prompt_loss

    loss: Any = lm_loss if case.objective == "lm" else prompt_loss(WORDS)
    shape = PRESETS[case.model].config(**changes(case, smoke))
    settings: dict[str, Any] = dict(
        batch_size=case.rows, max_length=case.tokens, objective=case.objective, device=device
    )
    coded = case.dtype in ("int8", "nf4")
    dtype = torch.bfloat16 if coded else getattr(torch, case.dtype)
    select: Any = ""
    method, adapter, row = None, None, dict[str, Any]()
    if case.method == "forward":
        predicted = None if coded else predict(shape, dtype=dtype, **settings)
    else:
        adapter = METHODS[case.method].adapter
        select = case.select or (lora.trained if adapter else METHODS[case.method].trained(case.paradigm))
        method = method_of(case)
        settings |= dict(checkpointing=case.checkpointing, select=select, dtype=dtype, adapter=adapter)
        settings |= dict(quantize=case.dtype if coded else None)
        predicted = predict(shape, method, **settings)
    room(predicted.peak_bytes if predicted is not None else int(2e9))
    model = model_of(case, device, smoke)
    data = batch_of(case, model.config.vocab_size, device)
    base = torch.cuda.memory_allocated(device) if device.startswith("cuda") else None
    if method is None:
        with torch.no_grad():
            loss(model, data)
            with measure(model, data, device=device) as found:
                loss(model, data)
    else:
        if adapter is not None:
            lora.wrap(model, adapter)
        if case.checkpointing:
            checkpoint_activations(model)
        engine = Engine(model, method, lr=1e-6, loss=loss, select=select, compile=case.compile)
        grow(engine)  # as after many windows, which is what is predicted
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(1 + 2 * case.compile):
                engine.step([data])  # makes the optimizer's state and the libraries' workspaces
        with measure(engine, data, device=device) as found:
            for steps in hardest(engine):
                for _ in range(steps):
                    engine.step([data])
        if case.compile and (why := engine._fast.failed):  # type: ignore[union-attr]
            raise NotAvailable(f"not compiled: {why}")
        if (
            setting(engine.method.estimator, "signs")
            == "sequence"
            != setting(method.estimator, "signs", "sequence")
        ):
            row["changed"] = [str(w.message) for w in said if "signs are" in str(w.message)]
            method = replace(method, estimator=changed(method.estimator, signs="sequence"))
            predicted = predict(shape, method, **settings)
    row |= {
        "counter": found.counter,
        "peak_bytes": found.peak_bytes,
        "reserved_bytes": found.reserved_bytes,
        "weights_and_batch_bytes": base,
        "predicted_bytes": None if predicted is None else predicted.peak_bytes,
        "predicted_phase": None if predicted is None else predicted.phase,
    }
    if predicted is not None:
        row["predicted_over_measured"] = predicted.peak_bytes / found.peak_bytes
    return row


def kernels(step: Any, cuda: bool) -> tuple[int, float | None]:
    """Kernels that a call launches (operations, on the host), and the milliseconds that they take on the card."""
    from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds) as found:
        step()
    launches = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")
    events = found.key_averages()
    if not cuda:
        return sum(event.count for event in events if event.key.startswith("aten::")), None
    spent = sum(e.self_device_time_total for e in events if e.device_type == DeviceType.CUDA) / 1e3
    return sum(event.count for event in events if event.key in launches), round(spent, 3)


def waits(step: Any, cuda: bool) -> int | None:
    """How often a call waits for the device."""
    import torch

    if not cuda:
        return None
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in found)


def times(case: Case, device: str, smoke: bool) -> Iterator[dict[str, Any]]:
    """Ratios in paired rounds, launches and waits, growing: whatever is done when the time is up is kept."""
    import copy

    import torch
    from speed import FO, FWD, ZO, engine, paired

    from zolr.compiled import Compiled
    from zolr.models import prompt_loss

    rounds, cuda = 3 if smoke else ROUNDS, device.startswith("cuda")
    plain = model_of(case, device, smoke)
    data, loss = batch_of(case, plain.config.vocab_size, device), prompt_loss(WORDS)
    row: dict[str, Any] = {"ratios": {}, "launches": {}, "kernels_ms": {}, "waits": {}}

    def two_forwards() -> None:
        with torch.no_grad():
            for _ in range(2):
                loss(plain, data).mean().item()

    full = optimizer = None

    def adamw() -> None:
        assert full is not None and optimizer is not None
        loss(full, data).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def seen(label: str, step: Any, reference: Any, against: str) -> None:
        row["ratios"][label] = {"against": against, **paired(step, reference, rounds)}
        row["launches"][label], row["kernels_ms"][label] = kernels(step, cuda)
        row["waits"][label] = waits(step, cuda)

    two_forwards()
    row["launches"]["two forwards"], row["kernels_ms"]["two forwards"] = kernels(two_forwards, cuda)
    row["waits"]["two forwards"] = waits(two_forwards, cuda)
    default = next(iter(ZO))
    wanted: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [("zo", default, ZO[default], {})]
    together = next(name for name in ZO if "together" in name)
    wanted.append(("zo", together, ZO[together], {}))  # half the launches of a pass for each sign
    if cuda:
        wanted.append(("zo", default, ZO[default], {"compile": True}))
    first, others = list(FO.items())[:2], list(FO.items())[2:]
    wanted += [("fo", name, parts, {}) for name, parts in first]
    if cuda:
        wanted += [("fo", name, parts, {"compile": True}) for name, parts in first]
    wanted += [("fo", name, parts, {}) for name, parts in others]
    wanted.append(("fo", next(iter(FO)), FO[next(iter(FO))], {"guard": False}))
    wanted += [("zo", name, parts, {}) for name, parts in ZO.items() if name not in (default, together)]
    wanted += [("fwd", name, parts, {}) for name, parts in FWD.items()]
    for kind, name, parts, more in wanted:
        if kind == "fo" and full is None:
            full = copy.deepcopy(plain).train()
            optimizer = torch.optim.AdamW(full.parameters(), lr=1e-6, fused=cuda)
            adamw()  # makes its state
            row["launches"]["AdamW"], row["kernels_ms"]["AdamW"] = kernels(adamw, cuda)
        reference, against = (adamw, "AdamW, fused") if kind == "fo" else (two_forwards, "two forwards")
        label = f"{kind} {name}" + "".join(f", {key} {value}" for key, value in more.items())
        try:
            run = engine(plain, *parts, **more)
            seen(label, lambda run=run: run.step([data]), reference, against)
            if isinstance(run._fast, Compiled) and run._fast.failed:
                row["ratios"][label]["failed"] = run._fast.failed
            del run
        except Exception as error:  # one way of stepping that fails here is one entry
            row["ratios"][label] = {"failed": reason(error)}
        yield row


def reason(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def worker(case: Case, device: str, smoke: bool, room: Callable[[int], None] = lambda _: None) -> None:
    """Run one case; the last line of stdout that begins with a brace is its row."""
    warnings.simplefilter("ignore")
    if device == "cpu":
        import torch

        torch.set_num_threads(1)
    try:
        rows = times(case, device, smoke) if case.kind == "time" else [memory(case, device, smoke, room)]
        for row in rows:
            print(json.dumps(row), flush=True)
    except NotAvailable as error:
        print(json.dumps({"failed": str(error)}), flush=True)
    except Exception as error:
        print(json.dumps({"failed": reason(error)}), flush=True)


def serve(device: str, smoke: bool) -> None:
    """Run cases as they come, a line each, and say when one is over; nothing of it stays on the card."""
    import gc

    import torch

    def room(wanted: int) -> None:
        print(f"{WANTED} {wanted}", flush=True)
        sys.stdin.readline()

    while line := sys.stdin.readline():
        worker(Case(**json.loads(line)), device, smoke, room)
        gc.collect()
        if device.startswith("cuda"):
            # a workspace that a backward pass was given would count in the peak of a forward-only case
            getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
            torch.cuda.empty_cache()
        print(OVER, flush=True)


# --- in the process that starts them ------------------------------------------------------------------------------

OVER, WANTED = "over", "wanted"
SLOW_LANES = 5
SPARE = 2e9  # bytes a process takes beside what is predicted: context, kernels, fragments


class Room:
    """Memory of the card that cases share: each waits until the card has what it is predicted to take.

    Args:
        total: bytes; a case that wants more has the card alone.
    """

    def __init__(self, total: float) -> None:
        self.total, self.free = total, total
        self.changed = threading.Condition()

    def take(self, wanted: float) -> float:
        """Wait for so many bytes; what was taken."""
        wanted = min(wanted, self.total)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= wanted)
            self.free -= wanted
        return wanted

    def give(self, taken: float) -> None:
        """Give bytes back."""
        with self.changed:
            self.free += taken
            self.changed.notify_all()


class Lane:
    """A process that runs one memory case after the other."""

    def __init__(self, device: str, smoke: bool, room: Room) -> None:
        self.room = room
        self.command = [sys.executable, __file__, "--serve", "--device", device]
        self.command += ["--smoke"] if smoke else []
        self.process: subprocess.Popen[str] | None = None

    def ran(self, case: Case, seconds: float) -> dict[str, Any]:
        """The row of a case, or why there is none; the process is begun where there is none, and ended with what goes wrong."""
        start, row, taken = time.monotonic(), dict[str, Any](), 0.0
        if self.process is None:
            self.errors = tempfile.TemporaryFile("w+")
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, bufsize=1
            )
            self.lines: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=self._read, args=(self.process, self.lines), daemon=True).start()
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(asdict(case)) + "\n")
            while (line := self.lines.get(timeout=max(0.1, start + seconds - time.monotonic()))) != OVER:
                if line is None:
                    raise BrokenPipeError
                if line.startswith("{"):
                    row = json.loads(line)
                if line.startswith(WANTED):
                    asked = time.monotonic()
                    taken += self.room.take(float(line.split()[1]) * 1.1 + SPARE)
                    start += time.monotonic() - asked  # others' time
                    self.process.stdin.write("\n")
        except queue.Empty:
            row = {"failed": "out of time", "cut_after_s": round(seconds)}
            self.end()
        except BrokenPipeError:
            code = self.process.wait()
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["it said nothing"])[-1]
            row = {"failed": f"exit code {code}: {last[:300]}"}
            self.end()
        finally:
            self.room.give(taken)
        return {**asdict(case), **row, "seconds": round(time.monotonic() - start, 1)}

    @staticmethod
    def _read(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    def end(self) -> None:
        """Stop the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def ran(case: Case, device: str, smoke: bool, seconds: float) -> dict[str, Any]:
    """The row of a case, or why there is none."""
    command = [sys.executable, __file__, "--worker", json.dumps(asdict(case)), "--device", device]
    command += ["--smoke"] if smoke else []
    start, code, errors = time.monotonic(), 0, ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, seconds))
        out, errors, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        out = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        code = -1
    lines = [line for line in out.splitlines() if line.startswith("{")]
    row: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if code == -1:
        row["cut_after_s"] = round(seconds)
    if not lines:
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        row["failed"] = "out of time" if code == -1 else f"exit code {code}: {last[:300]}"
    return {**asdict(case), **row, "seconds": round(time.monotonic() - start, 1)}


def machine(device: str) -> dict[str, Any]:
    """What the figures hold for."""
    import torch

    found: dict[str, Any] = {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("transformers", "torchao", "bitsandbytes", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if device.startswith("cuda"):
        numbers = torch.cuda.get_device_properties(device)
        found |= {"name": numbers.name, "memory_bytes": numbers.total_memory, "cuda": torch.version.cuda}
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout
            found["driver"] = answer.strip().splitlines()[0] if answer.strip() else None
        except (OSError, subprocess.TimeoutExpired):
            found["driver"] = None
    return found


def shown(name: str, row: dict[str, Any]) -> str:
    """A row for people."""
    if "failed" in row:
        return f"{name}: {row['failed']}"
    if row["kind"] == "time":
        done = [f"{k} {v['ratio']:.3f}" for k, v in row["ratios"].items() if "ratio" in v]
        return f"{name}: {'; '.join(done)}"
    ratio = row.get("predicted_over_measured")
    more = f", predicted / measured {ratio:.3f}" if ratio else ""
    return f"{name}: {row['peak_bytes'] / 1e9:.3f} GB{more}"


def main() -> None:
    """Run the cases that fit into the time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny models: whether everything runs")
    parser.add_argument("--seconds", type=float, default=440, help="for all cases together")
    parser.add_argument(
        "--case-seconds",
        type=float,
        default=60,
        help="for one case at most (a slow one: three times as long)",
    )
    parser.add_argument(
        "--lanes",
        type=int,
        default=max(2, min(14, (os.cpu_count() or 2) - 2)),
        help="memory cases that run at once",
    )
    parser.add_argument("--only", default="", help="a part of the names of the cases to run")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument(
        "--output", type=Path, help="by default benchmarks/results/gpu.json, or gpu-smoke.json"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.device, options.smoke)
        return
    if options.worker:
        worker(Case(**json.loads(options.worker)), options.device, options.smoke)
        return
    chosen = [case for case in cases() if options.only in case.name]
    if options.smoke:
        chosen = [replace(case, rows=4, tokens=12) for case in chosen]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return
    output = options.output or RESULTS / ("gpu-smoke.json" if options.smoke else "gpu.json")
    end = time.monotonic() + options.seconds
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found: dict[str, Any] = {"conditions": machine(options.device), "smoke": options.smoke, "rows": {}}

    room = Room(0.95 * found["conditions"].get("memory_bytes", 80e9))
    lanes: queue.Queue[Lane] = queue.Queue()
    for _ in range(max(1, options.lanes)):
        lanes.put(Lane(options.device, options.smoke, room))

    def one(case: Case) -> None:
        left = end - time.monotonic()
        row = asdict(case) | {"failed": "left out: no time left"}
        if left > 5 and shares(case):
            lane = lanes.get()
            try:
                row = lane.ran(case, min(left, options.case_seconds * (3 if case.slow else 1)))
            finally:
                lanes.put(lane)
        elif left > 5:
            row = ran(case, options.device, options.smoke, min(left, options.case_seconds))
        found["rows"][case.name] = row
        print(shown(case.name, row), flush=True)
        output.parent.mkdir(exist_ok=True)
        output.write_text(json.dumps(found, indent=1) + "\n")  # what is known so far survives everything

    def all_of(block: list[Case]) -> None:
        at_once = min(options.lanes, SLOW_LANES) if block and block[0].slow else options.lanes
        with ThreadPoolExecutor(max(1, at_once)) as pool:
            list(pool.map(one, block))
        for case in block:  # the memory of one card was that of several cases
            if "OutOfMemoryError" in found["rows"][case.name].get("failed", ""):
                one(case)

    for (kind, _), some in groupby(chosen, key=lambda case: (case.kind, case.slow)):
        if kind == "memory":
            all_of(list(some))
        else:
            for case in some:  # alone: what else runs would be in its times
                one(case)
    while not lanes.empty():
        lanes.get().end()


def shares(case: Case) -> bool:
    """Whether a case runs in a process with others: graphs and what was compiled would stay on the card."""
    return case.kind == "memory" and not case.compile


if __name__ == "__main__":
    main()
