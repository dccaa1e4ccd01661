"""The command line stopped by signals, starved of disk, and spread over processes of which some die, counted.

    python benchmarks/reliability.py --only signals,disk,ranks

Parts of `reliability.py`. Every run is `zolr finetune` as a person starts it, on the model and questions of the package, in a
process forked from this one; full and read-only disks are file systems of a namespace of its own, and the parts that need one
say so where it is refused.
"""

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zolr import checkpoints, journal
from zolr.errors import StorageError

STEPS = 24
COURSE = [
    "--steps",
    STEPS,
    "--batch-size",
    4,
    "--accumulate",
    4,
    "--lr",
    1e-3,
    "--train-rows",
    64,
    "--eval-rows",
    24,
]
COURSE += [
    "--max-length",
    24,
    "--eval-every",
    6,
    "--save-every",
    5,
    "--patience",
    9,
    "--threads",
    1,
    "--quiet",
]
RUNS = {
    "zo (stiefel)": ["--paradigm", "zo", "--eps", 1e-3, "--refresh-every", 7, "--rank", 4],
    "fo in the subspace (stiefel)": ["--paradigm", "fo", "--refresh-every", 7, "--rank", 4],
    "fo, streamed (galore)": ["--paradigm", "fo", "--method", "galore", "--refresh-every", 7, "--rank", 4],
}
# weights in pieces on several ranks, beside their changes on one
SHARDED = {f"{run[1]}, sharded": [*run, "--shard"] for name, run in RUNS.items() if "galore" not in name}
LIMIT = 240.0  # seconds after which a command hangs
TIMEOUT = 10.0  # of ranks that do not answer

NEW_NAMESPACE, NEW_USER = 0x00020000, 0x10000000  # of mounts; of users, for those who are not root
READ_ONLY, REMOUNT, BIND, REC, PRIVATE = 1, 32, 4096, 16384, 1 << 18


class Command:
    """`zolr` in a process of its own.

    Args:
        arguments: of the command line.
        log: file for what it prints.
        environment: more of it.
        output: file descriptor that takes what it prints, in place of the log.
    """

    def __init__(
        self, arguments: Sequence[Any], log: Path, output: int | None = None, **environment: str
    ) -> None:
        self.log = log
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file if output is None else output, 1)
            os.dup2(file if output is None else output, 2)
            os.environ.update(environment)
            signal.signal(
                signal.SIGINT, signal.default_int_handler
            )  # background shells have it ignored, nohup the other
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            from zolr.cli import main

            code = main([str(argument) for argument in arguments])
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def ended(self) -> int:
        """Its exit code, negative for the signal that killed it."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"a command hangs: {self.said()}")

    def alive(self) -> bool:
        """Whether it goes on."""
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return found is None

    def said(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def finetune(name: str, folder: Path, *more: Any) -> list[Any]:
    """A command line that begins a run, or goes on with it."""
    return ["finetune", *{**RUNS, **SHARDED}[name], *COURSE, "--output", folder, "--resume", "auto", *more]


def result(folder: Path) -> dict[str, Any]:
    """What a finished run left that must not depend on how often it was stopped."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = json.loads((folder / "result.json").read_text())
    book = journal.read(folder / journal.NAME) if (folder / journal.NAME).exists() else None
    return {
        "model": (folder / "model.safetensors").read_bytes(),
        "metrics": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        "journal": book and (book.header, repr(book.made)),
        "hashes": book.hashes if book else {},
        "numbers": {key: found[key] for key in ("after", "steps", "kept_step", "stopped_early", "forwards")},
        "left over": [p.name for p in folder.parent.rglob("*") if ".tmp-" in p.name or p.name == ".probe"],
    }


def prepare() -> None:
    """Import what every command imports, once, before they are forked, and leave out the memory prediction, most of a short run."""
    import torchmetrics.functional.classification  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    import zolr.cli.record
    import zolr.cli.replay
    import zolr.cli.screen
    import zolr.memory
    import zolr.sharded  # noqa: F401
    from zolr.cli.job import Job

    setattr(Job, "predicted", None)  # noqa: B010
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("this process has threads, and cannot be forked; set OMP_NUM_THREADS=1")


def others(folder: Path, expected: dict[str, Any]) -> list[str]:
    """What is not as an undisturbed run left it; the journal may have more hashes, of steps after which one was stopped."""
    found = result(folder)
    missing = expected["hashes"].items() - found["hashes"].items()
    other = [part for part, value in found.items() if part != "hashes" and value != expected[part]]
    return other + (["hashes"] if missing else [])


def undisturbed(where: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Results of runs that nobody stops, and the seconds that they take."""
    results, seconds = {}, {}
    for number, name in enumerate(RUNS):
        folder, started = where / f"whole-{number}" / "run", time.monotonic()
        folder.parent.mkdir()
        command = Command(finetune(name, folder), where / f"whole-{number}.log")
        if command.ended() != 0:
            raise RuntimeError(command.said())
        results[name], seconds[name] = result(folder), time.monotonic() - started
    return results, seconds


# ---- signals ----------------------------------------------------------------------------------------------------------


def signals(count: int, where: Path) -> dict[str, Any]:
    """Stop runs at random moments by SIGINT, SIGTERM, SIGHUP and SIGKILL, and by two signals at once; go on with --resume auto."""
    source = random.Random(2)
    expected, seconds = undisturbed(where)
    kinds = ["SIGTERM", "SIGINT", "SIGTERM twice", "SIGHUP", "SIGINT", "SIGKILL"]
    found: dict[str, Any] = {"stopped": 0, "right exit code": 0, "runs": 0, "equal": 0, "wrong": []}
    leaving: list[float] = []
    sent: list[str] = []
    while len(sent) < count:
        name = list(RUNS)[found["runs"] % len(RUNS)]
        place = where / f"run-{found['runs']}"
        place.mkdir()
        folder, log = place / "run", where / f"run-{found['runs']}.log"
        for attempt in range(4):
            command, kind, number, asked = Command(finetune(name, folder), log), "", 0, 0.0
            if attempt < 3:
                time.sleep(source.uniform(0.0, 1.1 * seconds[name]))
                if command.alive():
                    kind, asked = kinds[len(sent) % len(kinds)], time.monotonic()
                    number = signal.Signals[kind.split()[0]]
                    os.kill(command.pid, number)
                    sent.append(kind)
                    if "twice" in kind:
                        time.sleep(0.01)
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(command.pid, number)
            code = command.ended()
            if not kind or code == 0:  # it was done anyway
                if code != 0:
                    raise RuntimeError(f"{name}: {code}: {command.said()}")
                break
            leaving.append(time.monotonic() - asked)
            # before training SIGHUP is left to the system, as in any program
            right = {"SIGKILL": (-9,), "SIGHUP": (129, -1)}.get(kind, (128 + number,))
            found["stopped"] += 1
            found["right exit code"] += code in right
            if code not in right:
                found["wrong"].append(f"{name}, {kind}: {code}: {command.said()[-300:]}")
        other = others(folder, expected[name])
        found["runs"] += 1
        found["equal"] += not other
        if other:
            found["wrong"].append(f"{name}, run {found['runs']}, {sent[-4:]}: another {', '.join(other)}")
        shutil.rmtree(place)
    found["came to its end first"] = len(sent) - found["stopped"]
    found["seconds to leave"] = {
        "median": round(statistics.median(leaving), 2),
        "most": round(max(leaving), 2),
    }
    return found


# ---- the disk ---------------------------------------------------------------------------------------------------------


def disk(where: Path, shares: Sequence[float] = (0.0, 0.35, 0.7)) -> dict[str, Any]:
    """Fill the disk at every stage of a run, make it read-only, take the folder away, take the terminal away.

    Args:
        shares: of what a run writes, that there is room for.
    """
    expected, seconds = undisturbed(where)
    told, telling = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(told)
            answer = _without_room(where, expected, shares)
            with os.fdopen(telling, "w") as pipe:
                json.dump(answer, pipe)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(telling)
    with os.fdopen(told) as pipe:
        text = pipe.read()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise RuntimeError("the cases of the disk broke off")
    found = json.loads(text)
    return {**found, **_without_a_folder(where, expected, seconds)}


def _without_room(where: Path, expected: dict[str, Any], shares: Sequence[float]) -> dict[str, Any]:
    """In a namespace of its own: a file system that is full, and one that becomes read-only."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = NEW_NAMESPACE | (0 if os.geteuid() == 0 else NEW_USER)
    if libc.unshare(flags) or libc.mount(b"none", b"/", None, REC | PRIVATE, None):
        return {"full": f"not run: {os.strerror(ctypes.get_errno())}"}
    found: dict[str, Any] = {
        "full": {"tried": 0, "ended with 4 and a cause": 0, "checkpoint whole": 0, "equal after": 0}
    }
    found |= {"read-only": {"tried": 0, "ended with 4 and a cause": 0, "equal after": 0}, "wrong": []}
    for number, name in enumerate(RUNS):
        used = sum(p.stat().st_size for p in (where / f"whole-{number}").rglob("*") if p.is_file())
        for share in shares:
            place = where / f"full-{number}-{share}"
            place.mkdir()
            room = max(1 << 14, int(share * used))
            if libc.mount(b"tmpfs", str(place).encode(), b"tmpfs", 0, f"size={room}".encode()):
                return {"full": f"not run: {os.strerror(ctypes.get_errno())}"}
            log = where / f"full-{number}-{share}.log"
            command = Command(finetune(name, place / "run"), log)
            code = command.ended()
            if code == 0:  # what is removed on the way leaves room
                libc.umount2(str(place).encode(), 0)
                continue
            own = found["full"]
            own["tried"] += 1
            good = code == 4 and "No space left" in command.said() and "Traceback" not in command.said()
            own["ended with 4 and a cause"] += good
            with contextlib.suppress(StorageError):
                newest = checkpoints.newest(place / "run" / "checkpoints")
                own["checkpoint whole"] += newest is None or not newest.damaged
            libc.mount(b"tmpfs", str(place).encode(), b"tmpfs", REMOUNT, f"size={8 * used}".encode())
            after = Command(finetune(name, place / "run"), log)
            same = after.ended() == 0 and not others(place / "run", expected[name])
            own["equal after"] += same
            if not good or not same:
                found["wrong"].append(f"{name}, room for {share}: {code}: {command.said()[-600:]}")
            libc.umount2(str(place).encode(), 0)
        place = where / f"read-only-{number}"
        place.mkdir()
        log = where / f"read-only-{number}.log"
        command = Command(finetune(name, place / "run"), log)
        _at_step(command, place / "run", 7)
        at = str(place / "run").encode()
        libc.mount(at, at, None, BIND, None)
        libc.mount(b"none", at, None, REMOUNT | BIND | READ_ONLY, None)
        own, code = found["read-only"], command.ended()
        own["tried"] += 1
        own["ended with 4 and a cause"] += (good := code == 4 and "Read-only" in command.said())
        libc.umount2(at, 0)
        after = Command(finetune(name, place / "run"), log)
        own["equal after"] += (same := after.ended() == 0 and not others(place / "run", expected[name]))
        if not good or not same:
            found["wrong"].append(f"{name}, read-only: {code}: {command.said()[-600:]}")
    return found


def _without_a_folder(where: Path, expected: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """The folder of a run moved away, its log full, its terminal closed."""
    vanished = {"tried": 0, "ended with 4 and a cause": 0, "equal after": 0}
    unheard = {"tried": 0, "equal": 0}
    wrong = []
    for number, name in enumerate(RUNS):
        place = where / f"vanished-{number}"
        place.mkdir()
        folder, log = place / "run", where / f"vanished-{number}.log"
        command = Command(finetune(name, folder), log)
        _at_step(command, folder, 7)
        folder.rename(place / "moved")
        code = command.ended()
        vanished["tried"] += 1
        good = code == 4 and "vanished" in command.said() and not folder.exists()
        vanished["ended with 4 and a cause"] += good
        (place / "moved").rename(folder)
        same = Command(finetune(name, folder), log).ended() == 0 and not others(folder, expected[name])
        vanished["equal after"] += same
        if not good or not same:
            wrong.append(f"{name}, vanished: {code}: {command.said()[-600:]}")
        for kind in ("a full log", "a closed pipe"):
            place = where / f"{kind}-{number}"
            place.mkdir()
            read, write = os.pipe()
            output = os.open("/dev/full", os.O_WRONLY) if kind == "a full log" else write
            os.close(read)
            loud = [part for part in finetune(name, place / "run") if part != "--quiet"]
            command = Command(loud, where / f"{kind}-{number}.log", output)
            code = command.ended()
            unheard["tried"] += 1
            done = (place / "run" / "result.json").exists()  # whoever hears of it
            good = code == (4 if kind == "a full log" else 0)  # of the table at the end, nothing was written
            unheard["equal"] += (same := good and done and not others(place / "run", expected[name]))
            if not same:
                wrong.append(f"{name}, {kind}: {code}, done: {done}")
            with contextlib.suppress(OSError):
                os.close(write)
    del seconds
    return {"vanished": vanished, "nobody takes its lines": unheard, "wrong here": wrong}


def _at_step(command: Command, folder: Path, step: int) -> None:
    """Wait until a run has done a step."""
    path, end = folder / "metrics.jsonl", time.monotonic() + LIMIT
    while time.monotonic() < end and command.alive():
        text = path.read_text() if path.exists() else ""
        if f'"step": {step},' in text[: text.rfind("\n") + 1]:
            return
        time.sleep(0.005)
    raise RuntimeError(f"step {step} was not reached: {command.said()}")


# ---- ranks ------------------------------------------------------------------------------------------------------------


def ranks(count: int, where: Path) -> dict[str, Any]:
    """Runs on 1, 2 and 4 processes, and runs of which a rank is killed, frozen or stopped, which go on on another number.

    Args:
        count: ranks that are lost.
    """
    source = random.Random(3)
    found: dict[str, Any] = {"sizes": {}, "wrong": []}
    models: dict[tuple[str, int], bytes] = {}
    for name in (*RUNS, *SHARDED):
        for size in (1, 2, 4):
            place = where / f"{size}-{len(models)}"
            place.mkdir()
            team = _team(name, place / "run", size, where / f"size-{len(models)}")
            codes = [command.ended() for command in team]
            if any(codes):
                raise RuntimeError(f"{name} on {size}: {codes}: {[c.said() for c in team]}")
            models[name, size] = (place / "run" / "model.safetensors").read_bytes()
            if size > 1:
                sent = json.loads((place / "run" / "result.json").read_text())["ranks"]
                said = found["sizes"].setdefault(name, {})
                said[f"{size} ranks have the bits of 1"] = models[name, size] == models[name, 1]
                said[f"bytes a step, {size} ranks"] = (
                    sent["sent_bytes"]["losses"] + sent["sent_bytes"]["gradients"]
                ) // STEPS
                said[f"dense all-reduce, {size} ranks"] = sent["dense_all_reduce_bytes"] // STEPS
    lost = found["lost"] = {"tried": 0, "all others ended with 6": 0, "went on": 0, "equal": 0, "hangs": 0}
    leaving: list[float] = []
    while lost["tried"] < count:
        name = (*RUNS, *SHARDED)[lost["tried"] % 5]
        size = 2 if lost["tried"] % 3 else 4
        place = where / f"lost-{lost['tried']}"
        place.mkdir()
        team = _team(name, place / "run", size, where / f"lost-{lost['tried']}")
        _at_step(team[0], place / "run", source.randrange(1, STEPS - 2))
        time.sleep(source.uniform(0.0, 0.05))
        victim = source.randrange(size)
        kind = (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP)[lost["tried"] // 2 % 3]
        os.kill(team[victim].pid, kind)
        asked = time.monotonic()
        try:
            codes = [command.ended() for i, command in enumerate(team) if i != victim]
        except TimeoutError:
            codes, lost["hangs"] = [], lost["hangs"] + 1
        leaving.append(time.monotonic() - asked)
        with contextlib.suppress(ProcessLookupError):
            os.kill(team[victim].pid, signal.SIGKILL)
        team[victim].ended()
        lost["tried"] += 1
        done = (place / "run" / "result.json").exists()  # it may have come to its end before
        right = bool(codes) and all(code == 6 for code in codes) or done
        lost["all others ended with 6"] += right
        other = source.choice([n for n in (1, 2, 4) if n != size])
        again = _team(name, place / "run", other, where / f"again-{lost['tried']}")
        went = not any([command.ended() for command in again])
        lost["went on"] += went
        model = (place / "run" / "model.safetensors").read_bytes() if went else b""
        lost["equal"] += model == models[name, 1]
        bits = name.startswith("zo")
        if not right or not went or (bits and model != models[name, 1]):
            said = [command.said()[-400:] for command in (*team, *again)]
            found["wrong"].append(
                f"{name}, rank {victim} of {size}, {kind.name}: {codes}, then {other}: {said}"
            )
        lost["zo"] = lost.get("zo", 0) + bits
        lost["zo, equal"] = lost.get("zo, equal", 0) + (bits and model == models[name, 1])
        shutil.rmtree(place)
    lost["seconds until all have ended"] = {
        "median": round(statistics.median(leaving), 1),
        "most": round(max(leaving), 1),
    }
    lost["timeout of a silent rank, s"] = TIMEOUT
    return found


def _team(name: str, folder: Path, size: int, log: Path) -> list[Command]:
    """The same command on so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    line = finetune(name, folder, "--peer-timeout", TIMEOUT)
    return [
        Command(
            line,
            log.with_name(f"{log.name}-{rank}.log"),
            **(
                dict(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(size),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=port,
                )
                if size > 1
                else {}
            ),
        )
        for rank in range(size)
    ]


PARTS: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    "signals": signals,
    "disk": lambda count, where: disk(where),
    "ranks": ranks,
}
