"""Weights in pieces on the command line: what is refused, and what a run of one process with `--shard` leaves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file
from torch import Tensor, nn

from zolr import Engine, compose, sharded
from zolr.distributed import Team

BEGIN = ("finetune", "--shard", "--rank", 2, "--lr", 1e-2, "--quiet", "--steps", 5)
BEGIN = (*BEGIN, "--batch-size", 4, "--max-length", 24, "--k", 4, "--eval-rows", 8)
TASK = (*BEGIN, "--paradigm", "zo", "--eps", 1e-3, "--refresh-every", 2)

MISTAKES: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantize": (("--quantize", "nf4"), "--quantize does not go with --shard"),
    "device map": (("--device-map", "cpu"), "--device-map does not go with --shard"),
    "hold": (("--hold",), "--hold does not go with --shard"),
    "compile": (("--compile",), "--compile does not go with --shard"),
    "budget": (("--memory-budget", "1GiB"), "--memory-budget does not go with --shard"),
    "diagnoses": (("--diagnose-every", 2), "--diagnose-every does not go with --shard"),
    "forward mode": (("--paradigm", "fwd"), "--shard is for zo and fo"),
    "decay": (("--weight-decay", 0.1), "would have to write the weights"),
    "dense gradients": (("--method", "galore"), "moves weights by their dense gradients"),
    "lora": (("--method", "lora"), "trains an adapter of its own"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_be_done_with_pieces_is_refused(zolr: Run, tmp_path: Path, case: str) -> None:
    flags, message = MISTAKES[case]
    code, _, err = zolr(*BEGIN, *flags, "--output", tmp_path / "run")
    assert code == 2 and message in err, err
    assert not (tmp_path / "run").exists()


def test_batches_that_ranks_cannot_share_evenly_are_refused_before_training(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Team, "size", 3, raising=False)
    monkeypatch.setattr(Team, "__init__", _of_three)
    code, _, err = zolr(*TASK, "--accumulate", 4, "--output", tmp_path / "run")
    assert (
        code == 2
        and "the 4 batches of a step do not go evenly into 3 ranks" in err
        and "--accumulate 6" in err
    ), err


def _of_three(self: Team, spread: Any = "batches") -> None:
    self.rank, self.size, self.spread, self.steps = 0, 3, spread, 0
    self.sent = {}


def test_a_sharded_run_leaves_a_plain_model_and_is_made_again(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from zolr.models import load_model

    run, again = tmp_path / "run", tmp_path / "again"
    code, _, err = zolr(*TASK, "--output", run)
    assert code == 0, err
    assert not (run / "shards").exists() and not (run / "adapter_config.json").exists()
    model, base = AutoModelForCausalLM.from_pretrained(run), load_model("demo")
    assert type(model) is type(base) and model.config.architectures == [type(base).__name__]
    moved = [n for n, p in base.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert moved and all("attn" in name or "attention" in name for name in moved), moved
    code, out, err = zolr("replay", run, "--output", again)
    assert code == 0 and "hashes of weights and state compared" in out, err
    one, other = (load_file(folder / "model.safetensors") for folder in (run, again))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    code, out, err = zolr("evaluate", again, "--task", "questions", "--eval-rows", 8, "--json")
    assert code == 0, err


def test_pieces_of_a_trained_weight_have_the_bits_of_the_whole_wherever_it_is_cut(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 23), nn.Tanh(), nn.Linear(23, 2))
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    method = compose("stiefel", "fo", rank=3, refresh_every=2)
    run = Engine(model, method, lr=1e-2, loss=loss, hold=True, realization="side")
    for _ in range(5):
        run.step([torch.randn(8, 37)])
    (variable,) = (v for v in run.variables if v.name == "0.weight")
    whole = sharded._trained(variable, variable.weight.data, 0)
    assert not torch.equal(whole, variable.weight.data)
    for cuts in ((12, 11), (1, 22), (6, 6, 6, 5), (23, 0)):
        pieces = variable.weight.data.split(list(cuts))
        starts = [sum(cuts[:i]) for i in range(len(cuts))]
        made = [sharded._trained(variable, piece, first) for piece, first in zip(pieces, starts, strict=True)]
        assert torch.equal(torch.cat(made), whole)


def test_a_loss_inside_leaves_the_model_as_it_was() -> None:
    model = nn.Linear(3, 2)
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append("together"))
    model.register_forward_hook(lambda *_: seen.append("apart"))

    def loss(part: nn.Module, batch: Tensor) -> Tensor:
        seen.append("loss")
        if batch.isnan().any():
            raise ValueError("no number")
        return nn.functional.linear(batch, part.weight).sum()  # type: ignore[arg-type]

    called = sharded.inside(loss)
    value = called(model, torch.ones(1, 3))
    assert seen == ["together", "loss", "apart"]
    torch.testing.assert_close(value, model.weight.sum())  # close: the sums may be taken in another order
    with pytest.raises(ValueError, match="no number"):
        called(model, torch.full((1, 3), float("nan")))
    assert "forward" not in vars(model) and model(torch.ones(1, 3)).shape == (1, 2)
