"""What is kept aside comes back bit for bit, whatever looked how before."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from zolr import aside
from zolr.aside import Aside, Number, Scalar, fresh, gathered
from zolr.undo import Undo


def state(seed: int, rows: int = 5) -> dict[str, Any]:
    numbers = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, 8, generator=numbers)
    return {
        "value": wide.clone(),
        "turned": wide.t().clone().t(),  # fills its memory in another order
        "part": wide[:, ::2],  # does not fill it
        "low": wide.bfloat16(),
        "ids": torch.randint(9, (3,), generator=numbers),
        "none": wide[:0].clone(),
        "step": torch.tensor(float(seed)),
        "inner": {"count": seed, "name": "w", "list": [1, 2]},
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, Tensor):
        return (
            a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
            if a.numel()
            else a.shape == b.shape
        )
    return a == b


def copied(a: Any) -> Any:
    if isinstance(a, dict):
        return {k: copied(v) for k, v in a.items()}
    return a.detach().clone(memory_format=torch.preserve_format) if isinstance(a, Tensor) else a


@pytest.mark.parametrize(
    ("where", "small", "together"), [("host", 0, 0), ("card", 100, 150), ("card", 1 << 20, 1 << 24)]
)
def test_states_come_back_from_step_to_step(
    where: str, small: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aside, "BUFFERS", 2)
    if where == "card":  # the way of a card's tensors, with those of the host
        monkeypatch.setattr(aside, "SMALL", small)
        monkeypatch.setattr(aside, "TOGETHER", together)
        monkeypatch.setattr(aside, "FIRST_CHUNK", 256)
        monkeypatch.setattr(aside, "_is_on_card", lambda tensor: tensor.numel() != 3)
        monkeypatch.setattr(aside, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
        monkeypatch.setattr(aside, "_wait_for", lambda device: None)
    place = Aside()
    alive, other = state(0), state(1, rows=7)
    for round in range(5):
        place.begin()
        for each in (alive, other):
            each["value"].add_(1.0)  # the same memory with other numbers
        if round == 3:
            other = state(9, rows=6)  # other memory
        tensors: list[Tensor] = []
        old = gathered(alive, tensors)
        places = list(place.put(tensors))
        more: list[Tensor] = []
        second = gathered(other, more, len(places))
        places += place.put(more)
        before = copied(alive), copied(other)
        for each in (*tensors, *more):
            each.zero_()
        # made anew; views that did not fill their memory come back dense
        made = fresh(place, places, second)
        assert torch.equal(made["part"], before[1]["part"])
        assert all(same(made[k], before[1][k]) for k in made if k != "part")
        back = fresh(place, places, old, alive)
        assert back["value"] is alive["value"] and back["turned"] is alive["turned"]
        assert torch.equal(back["part"], before[0]["part"])
        assert all(same(back[k], before[0][k]) for k in back if k != "part")
        fresh(place, places, second, other)
        place.end()


def test_a_number_on_the_host_travels_as_one_and_everything_else_as_bytes() -> None:
    tensors: list[Tensor] = []
    low = torch.tensor(0.1, dtype=torch.bfloat16)
    found = gathered({"step": torch.tensor(3.0), "low": low, "many": torch.zeros(1)}, tensors, 4)
    assert found == {"step": Scalar(3.0, torch.float32), "low": 4, "many": 5} and tensors[0] is low
    assert type(found["low"]) is Number


def test_a_write_that_is_cut_short_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwritev

    def some(file: int, views: list[memoryview], start: int) -> int:
        first = next(view for view in views if len(view))
        return whole(file, [first[: max(1, len(first) // 2)]], start)

    monkeypatch.setattr(os, "pwritev", some)
    place = Aside()
    place.begin()
    tensors = [torch.arange(100.0), torch.arange(7), torch.arange(50.0).view(5, 10).t()]
    places = place.put(tensors)
    assert all(torch.equal(place.fresh(p), t) for p, t in zip(places, tensors, strict=True))


def test_one_number_goes_back_into_the_tensor_that_holds_it() -> None:
    undo, value = Undo(True), torch.tensor(0.3)
    undo.begin()
    undo.keep({"w": lambda part: value}, ("value",))
    old = float(value)
    value.fill_(7.0)
    undo.into(undo.old["w"]["value"], value)
    assert float(value) == old
