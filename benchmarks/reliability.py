"""What survives: kills, damage, replays, bad input, long runs and other numbers of threads, counted.

    python benchmarks/reliability.py                    # all of it, some minutes on two cores
    python benchmarks/reliability.py --only kills,damage --kills 50

Every line of the table is a promise, what was tried, and how often it held. A run is a tiny language model trained by the
package's own loop in a process forked from this one, so that a kill costs a second. `--output` takes the figures as JSON.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from zolr import checkpoints, journal
from zolr.engine import Engine
from zolr.errors import ZolrError
from zolr.methods import compose
from zolr.training import train

PARTS = ("kills", "damage", "replay", "fuzz", "malice", "growth", "threads", "signals", "disk", "ranks")
STEPS = 40

# under test: without backprop, backprop in the subspace, and one dense gradient at a time
RUNS = {
    "zo (stiefel)": ("stiefel", "zo"),
    "zo (mezo)": ("mezo", "zo"),
    "fo in the subspace (stiefel)": ("stiefel", "fo"),
    "fo, streamed (galore)": ("galore", "fo"),
}


class Words(nn.Module):
    """A language model: embedding, two layers with a norm, head."""

    def __init__(self, vocabulary: int = 61, width: int = 32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
            self.up, self.down, self.norm = (
                nn.Linear(width, 2 * width),
                nn.Linear(2 * width, width),
                nn.LayerNorm(width),
            )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(self.norm(x + self.down(torch.tanh(self.up(x)))))


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Of each row, the mean over its tokens of the next one's."""
    logits = model(batch["input_ids"])[:, :-1].float().transpose(1, 2)
    return nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:], reduction="none").mean(1)


def batches(step: int, rows: int = 8, length: int = 12, vocabulary: int = 61) -> list[dict[str, Tensor]]:
    """Two micro-batches, which the step's number names."""
    source = torch.Generator().manual_seed(step)
    first = torch.randint(0, vocabulary, (2, rows, 1), generator=source)
    return [{"input_ids": (part + torch.arange(length) ** 2) % vocabulary} for part in first]


def begin(name: str, paradigm: str, dtype: torch.dtype = torch.float32, width: int = 32) -> Engine:
    """An engine before its first step; windows of seven steps, so that runs stop inside of one."""
    method = compose(name, paradigm)
    if method.refresh_every is not None:
        method = replace(method, refresh_every=7, projector=replace(method.projector, rank=4))
    return Engine(
        Words(width=width).to(dtype), method, lr=1e-2 if paradigm == "fo" else 1e-3, loss=loss, seed=5
    )


def course(engine: Engine, folder: Path, steps: int = STEPS, **more: Any) -> None:
    """A run with evaluations, best weights and checkpoints."""

    def evaluate() -> dict[str, float]:
        with torch.no_grad():
            return {"accuracy": -float(loss(engine.model, batches(10_000)[0]).mean())}

    settings = {"eval_every": 10, "save_every": 6, "evaluate": evaluate, **more}
    train(engine, batches, steps=steps, folder=folder, **settings)


def traces(folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """What a finished run left that must not depend on how often it was killed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    path = folder / journal.NAME
    return {
        "weights, optimizer, subspaces": checkpoints.digest_of(folder / "checkpoints" / f"step-{steps}"),
        "best": sorted((p.name, checkpoints.digest_of(p)) for p in (folder / "checkpoints").glob("best-*")),
        "metrics": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        "journal": path.read_bytes() if path.exists() else None,
        "left over": [p.name for p in folder.rglob(".*")],
    }


# ---- kills ------------------------------------------------------------------------------------------------------------


def kills(count: int, where: Path, runs: Sequence[str] = tuple(RUNS)) -> dict[str, Any]:
    """Kill runs with SIGKILL until `count` kills have landed: at a random time, system call or micro-batch.

    A run is killed up to four times and then left to end.
    """
    source = random.Random(0)
    result: dict[str, Any] = {
        "kills": 0,
        "inside a write": 0,
        "inside a step": 0,
        "runs": 0,
        "equal": 0,
        "by run": {},
    }
    references, seconds = {}, {}
    for name in runs:
        folder = where / f"whole-{len(references)}"
        started = time.perf_counter()
        course(begin(*RUNS[name]), folder)
        references[name], seconds[name] = traces(folder), time.perf_counter() - started
    while result["kills"] < count or result["runs"] < len(runs):
        name = runs[result["runs"] % len(runs)]
        folder = where / f"killed-{result['runs']}"
        own = result["by run"].setdefault(name, {"runs": 0, "kills": 0, "equal": 0})
        for attempt in range(5):
            how = source.choice(("time", "write", "step")) if attempt < 4 else ""
            after = source.uniform(0, 1.2 * seconds[name]) if how == "time" else None
            landed = _killed(name, folder, after, how, source.randrange(1, 60 if how == "write" else 140))
            if landed is None:
                break
            own["kills"] += 1
            result["kills"] += 1
            result["inside a write"] += landed == "write"
            result["inside a step"] += landed == "step"
        same = traces(folder) == references[name]
        own["runs"], own["equal"] = own["runs"] + 1, own["equal"] + same
        result["runs"], result["equal"] = result["runs"] + 1, result["equal"] + same
        shutil.rmtree(folder)
    return result


def _killed(name: str, folder: Path, after: float | None, how: str, call: int) -> str | None:
    """Go on with a run in a child that is killed; how that was, None where it came to its end before.

    Args:
        after: seconds.
        how: "write": at the so-many-eth flush, rename or write of the journal; "step": at the so-many-eth forward pass of a
            micro-batch, the first, the second, or one in between.
        call: how many.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            engine = begin(*RUNS[name])
            if how == "write":
                _die_at(call)
            elif how == "step":
                engine._loss = _dying(engine._loss, [call])
            with contextlib.redirect_stdout(io.StringIO()):
                course(engine, folder, resume=True)
            os._exit(0)
        finally:
            os._exit(1)
    if after is not None:
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a resumed run of {name} ended with {code}")
    return None if code == 0 else how


def _die_at(call: int) -> None:
    """Have this process kill itself at its so-many-eth flush, rename or write of the journal."""
    left = [call]
    os.fsync, os.rename = _dying(os.fsync, left), _dying(os.rename, left)
    journal.Journal._write = _dying(journal.Journal._write, left)


def _dying(real: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    """A function whose so-many-eth call, counted together with those of others, is the last thing that this process does."""

    def counted(*arguments: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **more)

    return counted


# ---- damage -----------------------------------------------------------------------------------------------------------


def damage(count: int, where: Path) -> dict[str, Any]:
    """Flip a bit, or cut, at a random byte of the newer of two checkpoints: it must be noticed, and the older one used."""
    source = random.Random(1)
    course(begin("stiefel", "zo"), where / "run", steps=12, evaluate=None)
    root = where / "run" / "checkpoints"
    older, newer = checkpoints.load(root / "step-6"), checkpoints.load(root / "step-12")
    result = {"damaged": 0, "noticed, older one used": 0, "content unchanged": 0, "silent": 0}
    files = sorted((root / "step-12").iterdir())
    for number in range(count):
        path = files[number % len(files)]
        whole = path.read_bytes()
        at = source.randrange(len(whole))
        flipped = whole[:at] + bytes([whole[at] ^ 1 << source.randrange(8)]) + whole[at + 1 :]
        path.write_bytes(whole[:at] if number % 4 >= 2 else flipped)
        found = checkpoints.newest(root)
        assert found is not None
        result["damaged"] += 1
        if (
            found.step == 6
            and len(found.damaged) == 1
            and "step-12" in found.damaged[0]
            and same(found.state, older)
        ):
            result["noticed, older one used"] += 1
        elif same(found.state, newer):  # JSON may be spelled in several ways
            result["content unchanged"] += 1
        else:
            result["silent"] += 1
        path.write_bytes(whole)
    return result


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# ---- replay -----------------------------------------------------------------------------------------------------------


def replays(where: Path, steps: int = 30) -> dict[str, Any]:
    """Runs of all rows without backprop against their journals, and the size of 10,000 steps."""
    from zolr.methods import METHODS

    result: dict[str, Any] = {"equal": 0, "tried": 0, "refused, with the reason": []}
    for name, row in METHODS.items():
        for paradigm in row.paradigms:
            if paradigm == "fo" or row.adapter is not None:
                continue
            for dtype in (torch.float32, torch.bfloat16):
                folder = where / f"{name}-{paradigm}-{dtype}"
                live, again = begin(name, paradigm, dtype), begin(name, paradigm, dtype)
                course(live, folder, steps=steps, evaluate=None)
                found = journal.read(folder / journal.NAME)
                if "unrepeatable" in found.header:
                    result["refused, with the reason"].append(f"{name} {str(dtype)[6:]}")
                    continue
                journal.replay(again, found)
                result["tried"] += 1
                result["equal"] += checkpoints.digest(live.state_dict()) == checkpoints.digest(
                    again.state_dict()
                )
    course(begin("stiefel", "zo"), where / "long", steps=10_000, evaluate=None, save_every=1000)
    path = where / "long" / journal.NAME
    given = journal.shared(journal.read(path), {})
    return {**result, "bytes of 10,000 steps": path.stat().st_size, "bytes to give away": len(given)}


# ---- bad input --------------------------------------------------------------------------------------------------------

WORDS = ("", "0", "-1", "1", "7", "1e-3", "nan", "inf", "1e999", "99999999999999999999", "on", "off", "auto", "x" * 3000,
         "zo", "fo", "mezo", "stiefel", "galore", "adamw", "../../etc/passwd", "/dev/full", ".", "good.csv", "run", "a\tb", "ä\u202e",
         "[1, 2]", "{}", "great,terrible", "a=b", "{mask}", "--", "-", "'", "\\", "%s%n", "$HOME", "step-1")  # fmt: skip


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """A case that takes longer is a hang."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError("hang")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Tally:
    """What became of cases: how many ended in a known way, and those that did not."""

    KNOWN = (0, 2, 3, 4, 5, 7)

    def __init__(self) -> None:
        self.cases, self.failures, self.codes = 0, [], {}

    def command(self, *arguments: str) -> None:
        """Run a command line in this process."""
        from zolr.cli import main

        out, err = io.StringIO(), io.StringIO()
        self.cases += 1
        try:
            with limited(30), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(list(arguments))
        except BaseException as error:  # a traceback that a person would see
            self.failures.append(f"{arguments}: {type(error).__name__}: {error}")
            return
        self.codes[code] = self.codes.get(code, 0) + 1
        if code not in self.KNOWN or "Traceback" in err.getvalue() + out.getvalue():
            self.failures.append(f"{arguments}: code {code}: {err.getvalue()[:300]}")

    def call(self, action: Callable[[], Any], what: str) -> None:
        """Do something that may end well, or in an error of the package's own."""
        self.cases += 1
        try:
            with limited(30):
                action()
            code = 0
        except ZolrError as error:
            code = error.exit_code
        except BaseException as error:
            self.failures.append(f"{what}: {type(error).__name__}: {error}")
            return
        self.codes[code] = self.codes.get(code, 0) + 1


class _Enough(ZolrError):
    """Everything before training has gone well."""

    exit_code = 0


def fuzz(count: int, where: Path) -> dict[str, Any]:
    """Flags, config files, data files, journals and checkpoints that are almost right, or not at all."""
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st

    import zolr.cli.job as job
    from zolr.cli.config import spelled
    from zolr.cli.finetune import Finetune
    from zolr.cli.pretrain import Pretrain

    tally = Tally()
    box = where / "box"
    box.mkdir(parents=True)
    kinds = {"finetune": Finetune, "pretrain": Pretrain}
    flags = {verb: [f"--{spelled(n)}" for n in kind.__dataclass_fields__] for verb, kind in kinds.items()}
    words = st.one_of(st.sampled_from(WORDS), st.text(max_size=12).filter(lambda s: "\0" not in s))
    good = b"text,label\n" + b"".join(b"a line %d,%d\n" % (i, i % 2) for i in range(40))
    (box / "good.csv").write_bytes(good)
    course(begin("stiefel", "zo"), box / "run", steps=12)
    toys = (box / "run", where / "toy")
    header = journal.read(box / "run" / journal.NAME).header
    before, here = _tree(box), os.getcwd()

    def many(share: float, *strategies: Any) -> Callable[[Callable[..., None]], None]:
        def run(case: Callable[..., None]) -> None:
            total = max(1, int(count * share))
            checks = settings(
                max_examples=total, database=None, deadline=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            seed(0)(checks(given(*strategies)(case)))()

        return run

    def stopped(*arguments: Any, **more: Any) -> Any:
        raise _Enough("ready")

    loaded = job.Workload
    os.chdir(box)
    try:
        job.Workload = stopped  # type: ignore[assignment, misc]  # what comes after the data is heavy

        @many(0.4, st.data())
        def flags_case(data: Any) -> None:
            verb = data.draw(st.sampled_from(sorted(flags)))
            pairs = data.draw(st.lists(st.tuples(st.sampled_from(flags[verb]), words), max_size=5))
            loose = data.draw(st.lists(words, max_size=1))
            tally.command(verb, *(part for pair in pairs for part in pair), *loose, "--print-config")

        values = st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words),
            lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
            max_leaves=4,
        )

        @many(0.2, st.data())
        def config_case(data: Any) -> None:
            verb = data.draw(st.sampled_from(sorted(flags)))
            table = data.draw(
                st.dictionaries(st.sampled_from([f[2:] for f in flags[verb]]), values, max_size=4)
            )
            text = "\n".join(
                f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None
            )
            raw = (
                _bent(data, text.encode(), st)
                if data.draw(st.booleans())
                else text.encode("utf-8", "surrogatepass")
            )
            path = where / "config.toml"
            path.write_bytes(raw)
            tally.command(verb, "--config", str(path), "--print-config")

        @many(0.2, st.data())
        def data_case(data: Any) -> None:
            ending = data.draw(st.sampled_from([".csv", ".tsv", ".json", ".jsonl", ".parquet"]))
            rows = data.draw(
                st.lists(
                    st.dictionaries(st.sampled_from(["text", "label", "x"]), values, max_size=3), max_size=6
                )
            )
            raw = {".json": json.dumps(rows), ".jsonl": "\n".join(map(json.dumps, rows))}.get(
                ending, ""
            ).encode()
            raw = raw or good.replace(b",", b"\t" if ending == ".tsv" else b",")
            path = where / f"data{ending}"
            path.write_bytes(_bent(data, raw, st) if data.draw(st.booleans()) else raw)
            tally.command("finetune", "--data", str(path), "--dry-run", "--quiet")

        @many(0.1, st.data())
        def journal_case(data: Any) -> None:
            path = where / "given.journal"
            path.unlink(missing_ok=True)
            if data.draw(st.booleans()):
                path.write_bytes(_bent(data, (box / "run" / journal.NAME).read_bytes(), st))
            else:  # every checksum is right, and yet
                journal.Journal(
                    path, _changed(data, {**header, "settings": {"method": "mezo"}}, values, st)
                ).close()
            tally.command("replay", str(path), "--base", "absent", "--quiet")

        @many(0.1, st.data())
        def checkpoint_case(data: Any) -> None:
            shutil.rmtree(toys[1], ignore_errors=True)
            shutil.copytree(*toys)
            folder = toys[1] / "checkpoints" / "step-12"
            shutil.rmtree(toys[1] / "checkpoints" / "step-6", ignore_errors=True)
            if data.draw(st.booleans()):
                path = folder / data.draw(st.sampled_from(["manifest.json", "tensors.safetensors"]))
                path.write_bytes(_bent(data, path.read_bytes(), st))
            else:
                manifest = json.loads((folder / "manifest.json").read_text())
                manifest["tree"] = _changed(data, manifest["tree"], values, st)
                _sealed(folder, manifest)
            (toys[1] / journal.NAME).unlink()
            tally.call(lambda: course(begin("stiefel", "zo"), toys[1], steps=12, resume=True), "checkpoint")

    finally:
        job.Workload = loaded  # type: ignore[misc]
        os.chdir(here)
    changed = [name for name, mark in _tree(box).items() if before.get(name) != mark]
    changed += [name for name in before if not (box / name).exists()]
    hangs = sum("TimeoutError" in failure for failure in tally.failures)
    return {
        "cases": tally.cases,
        "tracebacks": len(tally.failures) - hangs,
        "hangs": hangs,
        "changed files": len(changed),
        "exit codes": dict(sorted(tally.codes.items())),
        "failures": tally.failures[:20] + changed[:5],
    }


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in folder.rglob("*")
        if p.is_file()
    }


def _bent(data: Any, raw: bytes, st: Any) -> bytes:
    """Bytes with some of them replaced, cut out or added."""
    for _ in range(data.draw(st.integers(1, 3))):
        at, end = sorted(data.draw(st.integers(0, len(raw))) for _ in range(2))
        raw = raw[:at] + data.draw(st.binary(max_size=8)) + raw[data.draw(st.sampled_from([at, end])) :]
    return raw


def _changed(data: Any, tree: Any, values: Any, st: Any) -> Any:
    """JSON with one place in it replaced."""
    if isinstance(tree, dict) and tree and data.draw(st.integers(0, 8)):
        key = data.draw(st.sampled_from(sorted(tree)))
        return {**tree, key: _changed(data, tree[key], values, st)}
    if isinstance(tree, list) and tree and data.draw(st.integers(0, 8)):
        place = data.draw(st.integers(0, len(tree) - 1))
        return [*tree[:place], _changed(data, tree[place], values, st), *tree[place + 1 :]]
    return json.loads(json.dumps(data.draw(values), default=str))


def _sealed(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest whose hashes are right, as someone would who means harm."""
    manifest.pop("sha256", None)
    path = folder / "tensors.safetensors"
    if path.exists():
        manifest["files"]["tensors.safetensors"]["sha256"] = checkpoints._file_digest(path)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": checkpoints._digest(manifest)}))


# ---- malice -----------------------------------------------------------------------------------------------------------


def malice(where: Path) -> dict[str, Any]:
    """Checkpoints made to do harm, with hashes that are right: none may run code, write outside, or take memory."""
    import pickle

    course(begin("stiefel", "zo"), where / "run", steps=12, evaluate=None)
    source = where / "run" / "checkpoints" / "step-12"
    canary = where / "canary"

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (canary,)

    def header_of(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
        raw = path.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    def tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
        return lambda folder: header_of(folder / "tensors.safetensors", change)

    def tree(old: str, new: str) -> Callable[[Path], None]:
        def act(folder: Path) -> None:
            path = folder / "manifest.json"
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new, 1))

        return act

    def pickled(folder: Path) -> None:
        (folder / "tensors.safetensors").write_bytes(pickle.dumps(Payload()))

    def torch_file(folder: Path) -> None:
        torch.save({"a": Payload()}, folder / "tensors.safetensors")

    def huge_length(folder: Path) -> None:
        path = folder / "tensors.safetensors"
        path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])

    def deep(folder: Path) -> None:
        (folder / "manifest.json").write_text('{"tree": ' + "[" * 100_000 + "]" * 100_000 + "}")

    def elsewhere(folder: Path) -> None:
        (folder / "tensors.safetensors").unlink()
        (folder / "tensors.safetensors").symlink_to("/dev/zero")

    first = {"0": lambda h: h}
    del first
    cases: dict[str, Callable[[Path], None]] = {
        "a pickle in place of the tensors": pickled,
        "a torch file in place of the tensors": torch_file,
        "a header of 2^62 bytes": huge_length,
        "a shape of 2^40": tensors(lambda h: h["0"].update(shape=[2**40])),
        "offsets beyond the file": tensors(lambda h: h["0"].update(data_offsets=[0, 2**50])),
        "overlapping tensors": tensors(lambda h: h["0"].update(data_offsets=h["1"]["data_offsets"])),
        "a tensor called ../../x": tensors(lambda h: h.update({"../../x": h.pop("0")})),
        "strides of 2^40": tree('{"tensor": ["0", null]}', '{"tensor": ["0", [1099511627776, 1]]}'),
        "strides that overlap": tree('{"tensor": ["0", null]}', '{"tensor": ["0", [0, 0]]}'),
        "a subspace of a kind that does not exist": tree('"Right"', '"__import__"'),
        "a manifest nested 100,000 deep": deep,
        "another layout": tree('"format": 1', '"format": 2'),
    }
    result: dict[str, Any] = {"cases": 0, "refused": 0, "harm": 0, "not refused": []}
    for name, act in cases.items():
        folder = where / "bad" / "checkpoints" / "step-12"
        shutil.rmtree(where / "bad", ignore_errors=True)
        folder.parent.mkdir(parents=True)
        shutil.copytree(source, folder)
        act(folder)
        with contextlib.suppress(Exception):
            _sealed(folder, json.loads((folder / "manifest.json").read_text()))
        peak = _peak()
        refused = False
        try:
            with limited(60):
                course(begin("stiefel", "zo"), where / "bad", steps=12, evaluate=None, resume=True)
        except ZolrError:
            refused = True
        result["cases"] += 1
        result["refused"] += refused
        result["harm"] += canary.exists() or _peak() - peak > 200 << 20
        if not refused:
            result["not refused"].append(name)
    return result


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    return 0


# ---- growth -----------------------------------------------------------------------------------------------------------


def growth(steps: int, where: Path) -> dict[str, Any]:
    """Live bytes of tensors, open files and threads at a fifth of a long run and at its end."""
    result: dict[str, Any] = {"steps": steps}
    for name, row in RUNS.items():
        engine, seen = begin(*row), []

        class Watch:
            def stepped(self, progress: Any, info: Any, seen: list[Any] = seen) -> None:
                if progress.step in (steps // 5, steps - 1):
                    gc.collect()
                    # a parameter without a shape, of who imports this, has no storage
                    live = {id(o): o for o in gc.get_objects() if isinstance(o, Tensor) and not is_lazy(o)}
                    storages = {
                        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in live.values()
                    }
                    files = len(os.listdir("/proc/self/fd"))
                    seen.append(
                        (sum(storages.values()), files, len(os.listdir("/proc/self/task")), _resident())
                    )

            def evaluated(self, progress: Any, metrics: Any) -> None:
                pass

            def noted(self, text: str) -> None:
                pass

        course(
            engine,
            where / f"long-{len(result)}",
            steps=steps,
            eval_every=100,
            save_every=100,
            reporter=Watch(),
        )
        early, late = seen
        result[name] = {
            "live bytes": late[0] - early[0],
            "open files": late[1] - early[1],
            "threads": late[2] - early[2],
            "resident bytes": late[3] - early[3],
            "checkpoints left": len(list((where / f"long-{len(result)}" / "checkpoints").glob("step-*"))),
        }
    return result


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- threads ----------------------------------------------------------------------------------------------------------


def threads(where: Path, steps: int = 9, width: int = 256) -> dict[str, Any]:
    """Runs on one and on two threads: what is equal, and by how much weights differ that are not."""
    before = torch.get_num_threads()
    result: dict[str, Any] = {}
    try:
        for name, (method, paradigm) in RUNS.items():
            engines = []
            for count in (1, 2):
                torch.set_num_threads(count)
                engine = begin(method, paradigm, width=width)
                course(engine, where / f"{method}-{paradigm}-{count}", steps=steps, evaluate=None)
                engines.append(engine)
            one, two = (e.export().state_dict() for e in engines)
            gap = max(float((one[key] - two[key]).abs().max()) for key in one)
            result[name] = {"live runs equal": gap == 0, "largest difference of a weight": gap}
            if paradigm != "fo":
                again = begin(method, paradigm, width=width)  # on two threads, from the journal of one
                torch.set_num_threads(2)
                journal.replay(again, journal.read(where / f"{method}-{paradigm}-1" / journal.NAME))
                equal = checkpoints.digest(again.state_dict()) == checkpoints.digest(engines[0].state_dict())
                result[name]["replay equal"] = equal
            bases = [{v.name: v.subspace.tensors() for v in e.variables if not v.is_full} for e in engines]
            if paradigm != "fo" or method == "stiefel":
                result[name]["subspaces equal"] = same(*bases)
    finally:
        torch.set_num_threads(before)
    return result


def _commanded(part: str, asked: argparse.Namespace, where: Path) -> dict[str, Any]:
    """A part that starts commands."""
    import commands

    commands.prepare()
    return commands.PARTS[part](asked.signals if part == "signals" else asked.lost, where)


def main() -> None:
    """Try everything and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--damage", type=int, default=400)
    parser.add_argument("--cases", type=int, default=2200)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--signals", type=int, default=30)
    parser.add_argument("--lost", type=int, default=18, help="ranks that are lost")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "reliability.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # a process with more threads cannot fork
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "kills": lambda where: kills(asked.kills, where),
        "damage": lambda where: damage(asked.damage, where),
        "replay": replays,
        "malice": malice,
        "growth": lambda where: growth(asked.steps, where),
        "fuzz": lambda where: fuzz(asked.cases, where),
        "threads": threads,
        **{part: partial(_commanded, part, asked) for part in ("signals", "disk", "ranks")},
    }
    found = json.loads(asked.output.read_text()) if asked.output.exists() else {}
    for name in (n for n in parts if n in asked.only.split(",")):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as where:
            found[name] = {**parts[name](Path(where)), "seconds": round(time.perf_counter() - started, 1)}
        print(f"{name}: {json.dumps(found[name], indent=2)}", file=sys.stderr, flush=True)
        found["conditions"] = {"torch": torch.__version__, "python": sys.version.split()[0]}
        asked.output.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    print(table(found))


def table(found: dict[str, Any]) -> str:
    """The promises with their figures."""
    rows = []
    if k := found.get("kills"):
        rows.append(("a killed run ends as one that was not", f"{k['equal']} of {k['runs']} runs after {k['kills']} kills, {k['inside a write']} of them inside a write"))  # fmt: skip
    if d := found.get("damage"):
        rows.append(("a damaged checkpoint is noticed and the one before used", f"{d['noticed, older one used']} of {d['damaged']}, {d['silent']} silent"))  # fmt: skip
    if r := found.get("replay"):
        rows.append(("a journal replayed is the run, float32 and bfloat16", f"{r['equal']} of {r['tried']}; 10,000 steps are {r['bytes of 10,000 steps']:,} bytes, {r['bytes to give away']:,} to give away"))  # fmt: skip
    if f := found.get("fuzz"):
        rows.append(("bad input ends in one line", f"{f['cases']} cases: {f['tracebacks']} tracebacks, {f['hangs']} hangs, {f['changed files']} changed files"))  # fmt: skip
    if m := found.get("malice"):
        rows.append(("a checkpoint made to do harm is refused", f"{m['refused']} of {m['cases']}, harm in {m['harm']}"))  # fmt: skip
    if g := found.get("growth"):
        most = [
            max(v[key] for v in g.values() if isinstance(v, dict)) for key in ("live bytes", "open files")
        ]
        rows.append((f"nothing grows over {g['steps']:,} steps", f"{most[0]} live bytes, {most[1]} open files more at the end than at a fifth"))  # fmt: skip
    if s := found.get("signals"):
        late = s["seconds to leave"]
        rows.append(("a stopped command leaves with its code and goes on", f"{s['right exit code']} of {s['stopped']}, {s['equal']} of {s['runs']} runs equal; gone after {late['median']} s, {late['most']} s at most"))  # fmt: skip
    for name in ("full", "read-only", "vanished"):
        if isinstance(d := found.get("disk", {}).get(name), dict):
            rows.append((f"disk or folder {name}", f"exit code 4 and a cause {d['ended with 4 and a cause']} of {d['tried']}, equal after {d['equal after']}"))  # fmt: skip
    if r := found.get("ranks"):
        for name, sizes in r["sizes"].items():
            rows.append(
                (f"2 and 4 ranks, {name}", ", ".join(f"{key}: {value}" for key, value in sizes.items()))
            )
        r = r["lost"]
        rows.append(("a lost rank ends all others", f"{r['all others ended with 6']} of {r['tried']} with exit code 6, {r['hangs']} hangs; {r['went on']} went on on another number of ranks, of {r['zo']} without backprop {r['zo, equal']} equal"))  # fmt: skip
    for name, row in found.get("threads", {}).items():
        if isinstance(row, dict):
            said = [f"{key}: {value}" for key, value in row.items()]
            rows.append((f"one and two threads, {name}", ", ".join(said)))
    return "\n".join(["| promise | figure |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


if __name__ == "__main__":
    main()
