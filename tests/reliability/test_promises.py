"""Small forms of `benchmarks/reliability.py`, whose proofs are the same with larger numbers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reliability.py"


@pytest.fixture(scope="module")
def proofs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reliability", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not() -> None:
    """In a process of its own: a process with several threads must not fork."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    code = (
        "import importlib.util, json, sys, tempfile, pathlib, torch; torch.set_num_threads(1); "
        f"spec = importlib.util.spec_from_file_location('r', {str(SCRIPT)!r}); r = importlib.util.module_from_spec(spec); "
        "spec.loader.exec_module(r); print(json.dumps(r.kills(8, pathlib.Path(tempfile.mkdtemp()))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] >= 8 and found["runs"] >= 4 and found["equal"] == found["runs"]


def test_damage_is_noticed_and_the_one_before_used(proofs: ModuleType, tmp_path: Path) -> None:
    found = proofs.damage(60, tmp_path)
    assert found["silent"] == 0 and found["noticed, older one used"] + found["content unchanged"] == 60


def test_a_checkpoint_made_to_do_harm_is_refused(proofs: ModuleType, tmp_path: Path) -> None:
    found = proofs.malice(tmp_path)
    assert found["not refused"] == [] and found["refused"] == found["cases"] >= 12 and found["harm"] == 0


@pytest.mark.slow
def test_bad_input_ends_in_one_line(proofs: ModuleType, tmp_path: Path) -> None:
    found = proofs.fuzz(120, tmp_path)
    assert found["failures"] == [] and found["cases"] >= 110
    assert (found["tracebacks"], found["hangs"], found["changed files"]) == (0, 0, 0)
    assert {0, 2, 3, 4} <= set(found["exit codes"])


@pytest.mark.slow
def test_nothing_grows(proofs: ModuleType, tmp_path: Path) -> None:
    found = proofs.growth(300, tmp_path)
    for row in (value for value in found.values() if isinstance(value, dict)):
        assert (row["live bytes"], row["open files"], row["threads"], row["checkpoints left"]) == (0, 0, 0, 2)


def test_replays_and_subspaces_do_not_depend_on_the_number_of_threads(
    proofs: ModuleType, tmp_path: Path
) -> None:
    """Live runs may differ: sums of a forward pass are divided among the threads."""
    found: dict[str, Any] = proofs.threads(tmp_path, steps=9)
    assert torch.get_num_threads() >= 1
    for name, row in found.items():
        assert row.get("replay equal", True) and row.get("subspaces equal", True), (name, row)
    assert sum("replay equal" in row for row in found.values()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "capability"), [("sgd", "avx2"), ("momentum", "default")])
def test_a_replay_is_the_same_on_another_processor(
    proofs: ModuleType, tmp_path: Path, capability: str, optimizer: str
) -> None:
    """Instruction sets of this machine stand for machines; bases are exact (srht)."""
    code = (
        "import sys, importlib.util, pathlib; from zolr import compose, journal, checkpoints; from zolr.engine import Engine; "
        f"spec = importlib.util.spec_from_file_location('r', {str(SCRIPT)!r}); r = importlib.util.module_from_spec(spec); "
        "spec.loader.exec_module(r); "
        f"method = compose('stiefel', 'zo', projector='srht', rank=4, optimizer={optimizer!r}, refresh_every=5); "
        "from safetensors.torch import load_file, save_file; "
        "folder = pathlib.Path(sys.argv[1]); base = folder.with_suffix('.safetensors'); model = r.Words(); "
        # first weights are drawn by torch, whose normal numbers differ by instruction set
        "save_file(model.state_dict(), base) if sys.argv[2] == 'train' else model.load_state_dict(load_file(base)); "
        "engine = Engine(model, method, lr=1e-2, loss=r.loss, seed=5); assert engine.portable; "
        "(r.course(engine, folder, steps=24, evaluate=None) if sys.argv[2] == 'train' else "
        "journal.replay(engine, journal.read(folder / 'journal'))); print(checkpoints.digest(engine.state_dict()))"
    )
    said = []
    for what, level in (("train", None), ("replay", capability)):
        environment = {
            **os.environ,
            "PYTHONPATH": str(SCRIPT.parents[1]),
            **({"ATEN_CPU_CAPABILITY": level} if level else {}),
        }
        command = [sys.executable, "-c", code, str(tmp_path / "run"), what]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split()[-1])
    assert said[0] == said[1]
