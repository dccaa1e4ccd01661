"""Checkpoints: what is saved comes back bit for bit, damage is noticed, and the previous good one is used."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from zolr import checkpoints
from zolr.errors import StorageError


def state(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(7, 5, generator=generator)
    return {
        "float32": draw,
        "transposed": draw.t(),
        "view": draw[2:4],  # shares memory with the others
        "double": draw.double() / 3,
        "bfloat16": draw.bfloat16(),
        "half": draw.half(),
        "bits": draw > 0,
        "bytes": torch.arange(3, dtype=torch.uint8),
        "integers": torch.tensor([-(2**62), 7]),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "optimizer": {
            "state": {0: {"step": 3.0}, 1: {"step": torch.tensor(4.0)}},
            "groups": [{"betas": (0.9, 0.999)}],
        },
        "numbers": [0, -1, True, None, 0.1, float("inf"), float("-inf"), 2**70, 5e-324],
        "text": 'a "quoted" line\nand another',
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))  # type: ignore[arg-type]
    return type(a) is type(b) and a == b


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "step-1", state())
    assert same(state(), checkpoints.load(tmp_path / "step-1"))


def test_memory_comes_back_as_torch_lays_it_out(tmp_path: Path) -> None:
    """Rounding depends on strides and alignment, and resuming has to be exact."""
    checkpoints.save(tmp_path / "step-1", state() | {"odd": torch.ones(3, dtype=torch.uint8)})
    found = checkpoints.load(tmp_path / "step-1")
    assert found["transposed"].stride() == state()["transposed"].stride() == (1, 5)
    assert all(value.data_ptr() % 64 == 0 for value in found.values() if isinstance(value, torch.Tensor))


def test_nan_comes_back(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "step-1", {"loss": float("nan"), "w": torch.tensor([float("nan"), 1.0])})
    found = checkpoints.load(tmp_path / "step-1")
    assert found["loss"] != found["loss"] and torch.isnan(found["w"]).tolist() == [True, False]


def test_the_tensors_are_a_plain_safetensors_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    checkpoints.save(tmp_path / "step-1", state())
    with safe_open(tmp_path / "step-1" / "tensors.safetensors", framework="pt") as file:
        assert len(list(file.keys())) == 12
    assert sorted(p.name for p in (tmp_path / "step-1").iterdir()) == ["manifest.json", "tensors.safetensors"]


def test_other_things_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"state\.generator is a Generator"):
        checkpoints.save(tmp_path / "step-1", {"generator": torch.Generator()})
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces(tmp_path: Path) -> None:
    for seed in (0, 1):
        checkpoints.save(tmp_path / "best-3", state(seed))
    assert same(state(1), checkpoints.load(tmp_path / "best-3"))
    assert [p.name for p in tmp_path.iterdir()] == ["best-3"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove", "zero tail"])
def test_damage_is_noticed_and_the_previous_one_used(tmp_path: Path, name: str, damage: str) -> None:
    for step in (5, 10):
        checkpoints.save(tmp_path / f"step-{step}", state(step))
    path = tmp_path / "step-10" / name
    whole = path.read_bytes()
    source = random.Random(name + damage)
    for _ in range(1 if damage in ("empty", "remove") else 25):
        at = source.randrange(len(whole))
        if damage == "remove":
            path.unlink()
        else:
            flipped = whole[:at] + bytes([whole[at] ^ (1 << source.randrange(8))]) + whole[at + 1 :]
            tail = whole[:at] + bytes(len(whole) - at)
            path.write_bytes(
                {"flip": flipped, "truncate": whole[:at], "empty": b"", "zero tail": tail}[damage]
            )
        if path.exists() and path.read_bytes() == whole:  # a tail that was zero already
            continue
        found = checkpoints.newest(tmp_path)
        if found is not None and found.step == 10:
            # JSON may be spelled in several ways; what counts is that the content is what was saved
            assert name == "manifest.json" and same(state(10), found.state)
            continue
        assert found is not None and found.step == 5 and same(state(5), found.state)
        assert len(found.damaged) == 1 and "step-10" in found.damaged[0]


def test_parts_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoints.save(tmp_path / f"step-{step}", state(step))
    shutil.copy(tmp_path / "step-1" / "tensors.safetensors", tmp_path / "step-2" / "tensors.safetensors")
    found = checkpoints.newest(tmp_path)
    assert found is not None and found.step == 1


def test_all_damaged_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) is None and checkpoints.newest(tmp_path / "absent") is None
    checkpoints.save(tmp_path / "step-1", state())
    (tmp_path / "step-1" / "manifest.json").write_text("[]")
    with pytest.raises(StorageError, match="no usable checkpoint"):
        checkpoints.newest(tmp_path)
    assert (tmp_path / "step-1").is_dir()


def test_the_newest_two_stay_and_leftovers_go(tmp_path: Path) -> None:
    for step in (5, 20, 100):  # by number, not by name
        checkpoints.save(tmp_path / f"step-{step}", {"n": step})
    (tmp_path / ".step-7.tmp-123").mkdir()
    (tmp_path / "notes").mkdir()
    checkpoints.prune(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-100", "step-20"]


def test_a_kill_at_any_write_leaves_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system calls of a save fail one after the other; each time the older checkpoint or the new one is whole."""

    class Killed(BaseException):
        pass

    checkpoints.save(tmp_path / "step-1", state(1))
    points = 0
    while True:
        calls = 0

        def counted(real: Callable[..., object], last: int = points) -> Callable[..., object]:
            def call(*arguments: object) -> object:
                nonlocal calls
                if calls == last:
                    raise Killed
                calls += 1
                return real(*arguments)

            return call

        with monkeypatch.context() as patch:
            for name in ("fsync", "rename"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                checkpoints.save(tmp_path / "step-2", state(2))
                break
            except Killed:
                points += 1
        found = checkpoints.newest(tmp_path)
        assert found is not None and not found.damaged and same(state(found.step), found.state)
        shutil.rmtree(tmp_path / "step-2", ignore_errors=True)
    assert points >= 5


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(tmp_path / "step-1", state(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        StorageError, match=r"cannot save checkpoint .*step-2: No space left .*needed.*--resume"
    ):
        checkpoints.save(tmp_path / "step-2", state(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert same(state(1), checkpoints.load(tmp_path / "step-1"))


def test_nothing_is_pickled(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "step-1", state())
    manifest = json.loads((tmp_path / "step-1" / "manifest.json").read_text())
    assert set(manifest) == {"format", "zolr", "files", "tree", "sha256"}
