"""Runs started as users start them: by torchrun and by accelerate launch, stopped by signals, and from a script."""

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, begun, threads
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TASK = ["finetune", "--steps", "4", "--eval-every", "2", "--eval-rows", "24", "--max-length", "32"]
TASK += ["--batch-size", "4", "--accumulate", "4", "--quiet"]
LIMIT = 240  # seconds after which something hangs


def environment(**more: str) -> dict[str, str]:
    """One thread a process, and the package of this tree."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def launched(launcher: str, *arguments: object) -> None:
    """Run a command of a launcher to its end."""
    ended = subprocess.run(
        [sys.executable, "-m", launcher, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert ended.returncode == 0, ended.stderr


class Ranks:
    """Processes of a run without a launcher, which begin with their imports done.

    Args:
        place: where their output goes, a file each.
        program: a script, or a package.
        size: how many.
    """

    def __init__(self, place: Path, program: object, *arguments: object, size: int = 2) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        where = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.files = [
            (place.with_suffix(f".out{rank}"), place.with_suffix(f".err{rank}")) for rank in range(size)
        ]
        self.processes = [
            begun(
                str(program),
                [str(a) for a in arguments],
                environment(RANK=str(rank), LOCAL_RANK=str(rank), **where),
                *self.files[rank],
            )
            for rank in range(size)
        ]

    def done(self) -> str:
        """Wait until all have done what they should; what the first one printed."""
        for rank in range(len(self.processes)):
            code, said = self.ended(rank)
            assert code == 0, said
        return self.files[0][0].read_text()

    def at(self, folder: Path, step: int) -> None:
        """Wait until the run has done a step."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end and all(p.is_alive() for p in self.processes):
            path = folder / "metrics.jsonl"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            if any(json.loads(line)["step"] >= step for line in lines if line.endswith("\n")):
                return
            time.sleep(0.02)
        raise AssertionError(f"step {step} was not reached: {self.ended(0)}")

    def send(self, which: signal.Signals, rank: int = 1) -> None:
        """Send a signal to one of them."""
        os.kill(self.processes[rank].pid or 0, which)

    def ended(self, rank: int) -> tuple[int, str]:
        """Exit code and stderr."""
        process = self.processes[rank]
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode or 0, self.files[rank][1].read_text()


def weights(folder: Path) -> dict[str, Any]:
    """The trained model."""
    return load_file(folder / "model.safetensors")


def test_torchrun_gives_the_bits_of_one_process(zolr: Run, tmp_path: Path) -> None:
    line = [*TASK, "--paradigm", "zo", "--threads", 1]
    with threads(1):
        code, _, err = zolr(*line, "--output", tmp_path / "one")
    assert code == 0, err
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "zolr"]
    launched(*launcher, *line, "--output", tmp_path / "two")
    bits = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert bits[0] == bits[1]
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    for key in ("metrics", "lr", "eps", "forwards", "tokens", "steps"):
        assert one[key] == two[key], key
    assert "ranks" not in one
    assert two["ranks"]["size"] == 2 and two["ranks"]["sent_bytes"]["gradients"] == 0
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "eval" not in line] == [1, 2, 3, 4]


def test_accelerate_launch_pretrains_as_one_process_does(zolr: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {i} mice of house {i % 7} met {i * i % 11} cats.\n\n" for i in range(900)))
    common = ["pretrain", "--data", text, "--train-tokenizer", "--vocab-size", 300, "--length", 16]
    common += (
        "--hidden-size 32 --layers 1 --heads 2 --steps 3 --quiet --method galore --rank 4 --threads 1".split()
    )
    common += "--batch-size 4 --accumulate 2 --eval-rows 16".split()
    with threads(1):
        code, _, err = zolr(*common, "--output", tmp_path / "one")
    assert code == 0, err
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    launched(*launcher, "-m", "zolr", *common, "--output", tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert (weight - two[name]).abs().max() < 1e-4, name  # float32, and Adam divides by small numbers
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["before"] == results[1]["before"]
    assert results[1]["ranks"]["sent_bytes"]["gradients"] > 0


def test_a_signal_to_one_rank_ends_all_saved_at_one_step_and_a_silent_rank_ends_the_others(
    zolr: Run,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "stopped"
    long = [
        *TASK,
        "--paradigm",
        "zo",
        "--schedule",
        "constant",
        "--lr",
        "1e-4",
        "--eps",
        "1e-3",
        "--save-every",
        "1000",
    ]
    long[long.index("--steps") + 1] = "1000"
    long[long.index("--eval-every") + 1] = "1000"
    ranks = Ranks(tmp_path / "said", "zolr", *long, "--output", folder)
    ranks.at(folder, 3)
    ranks.send(signal.SIGTERM)
    for rank in range(2):
        code, said = ranks.ended(rank)
        assert code == 143, said
    step = int(re.search(r"after step (\d+); saved", said).group(1))  # pyright: ignore[reportOptionalMemberAccess]
    with threads(1):  # on with one process
        code, _, err = zolr(*long, "--resume", "--steps", step + 2, "--output", folder)
    assert code == 0, err
    assert (folder / "model.safetensors").exists()

    for rank in (1, 0):  # the first one keeps the store by which all others find each other
        place = tmp_path / f"silent-{rank}"
        silent = Ranks(tmp_path / f"said-{rank}", "zolr", *long, "--output", place, "--peer-timeout", "4")
        silent.at(place, 2)
        silent.send(signal.SIGSTOP, rank)
        code, said = silent.ended(1 - rank)
        silent.processes[rank].kill()
        silent.ended(rank)
        assert code == 6, said
        who = "rank 1" if rank else "another rank"  # nobody can ask who it is without the store
        assert f"{who} of the run is gone, or was silent for 4 s" in said and "is saved in" in said


def test_the_script_of_the_docs_runs_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "distributed.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    script = tmp_path / "own.py"
    script.write_text(code)
    one, two = (Ranks(tmp_path / f"of-{size}", script, size=size).done() for size in (1, 2))
    assert one.split(",")[0] == two.split(",")[0] != ""


SHARDED = """
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

import zolr
from zolr import sharded
from zolr.distributed import Processes

config = AutoConfig.for_model(
    "llama", vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, tie_word_embeddings=False,
)


def begin(paradigm, team=None):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if team is not None:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    method = zolr.compose("stiefel", paradigm, rank=4, refresh_every=2, **({"eps": 1e-3} if paradigm == "zo" else {}))
    return zolr.Engine(model, method, lr=1e-2, loss=loss, hold=True, realization="side", team=team)


def loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


ids = torch.randint(61, (4, 2, 9), generator=torch.Generator().manual_seed(1))
if __name__ == "__main__":
    team = Processes()
    for paradigm in ("zo", "fo"):
        folder = Path(sys.argv[1]) / paradigm
        engine = begin(paradigm, team)
        for step in range(5):
            engine.step(list(ids))
        sharded.save(folder / "shards", engine)
        if team.first:
            (folder / "plain").mkdir()
            sharded.consolidate(folder / "shards", folder / "plain" / "model.safetensors")
            config.save_pretrained(folder / "plain")
    team.close()
"""


def test_a_sharded_model_is_a_plain_one_that_transformers_load(tmp_path: Path) -> None:
    """Against one process that holds the whole model."""
    import torch
    from transformers import AutoModelForCausalLM

    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    Ranks(tmp_path / "said", script, tmp_path).done()
    own = runpy.run_path(str(script), run_name="own")
    for paradigm in ("zo", "fo"):
        engine, untrained = own["begin"](paradigm), own["begin"](paradigm).model.eval()
        for _ in range(5):
            engine.step(list(own["ids"]))
        plain = tmp_path / paradigm / "plain"
        assert load_file(plain / "model.safetensors").keys() == untrained.state_dict().keys()
        model = AutoModelForCausalLM.from_pretrained(plain)
        with torch.no_grad():
            found, expected = (m.eval()(input_ids=own["ids"][0]).logits for m in (model, engine.model))
            first = untrained(input_ids=own["ids"][0]).logits
        assert (found - expected).abs().max() < 1e-5 < 1e-3 < (found - first).abs().max(), paradigm


def test_a_sharded_run_on_two_ranks_is_that_of_one_process(zolr: Run, tmp_path: Path) -> None:
    """Ranks that die, and sharded backprop: `benchmarks/reliability.py --only ranks`."""
    line = ["finetune", "--shard", "--paradigm", "zo", "--lr", "1e-2", "--eps", "1e-3", "--steps", "5"]
    line += [*TASK[TASK.index("--eval-every") :], "--refresh-every", "3", "--rank", "4", "--threads", "1"]
    with threads(1):
        code, _, err = zolr(*line, "--output", tmp_path / "one")
    assert code == 0, err
    Ranks(tmp_path / "said", "zolr", *line, "--output", tmp_path / "two").done()
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    sent = json.loads((tmp_path / "two" / "result.json").read_text())["ranks"]["sent_bytes"]
    assert sent["gradients"] == 0 < sent["losses"]
