"""Ranks of single weights: by parts of their names, in every paradigm, kept over a resume."""

import pytest
import torch

import zolr
from zolr.errors import UsageError
from zolr.models import build, lm_loss

NUMBERS = dict(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
)


def engine(ranks: object, method: str = "stiefel", paradigm: str = "fo", **more: object) -> zolr.Engine:
    composed = zolr.compose(method, paradigm, rank=4, ranks=ranks, refresh_every=2, **more)  # type: ignore[arg-type]
    return zolr.Engine(build("llama-20m", **NUMBERS), composed, lr=1e-3, loss=lm_loss)


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


@pytest.mark.parametrize(
    ("method", "paradigm"), [("stiefel", "fo"), ("stiefel", "zo"), ("galore", "fo"), ("plumage", "fo")]
)
def test_weights_have_the_rank_of_the_first_part_that_fits(method: str, paradigm: str) -> None:
    more = {"eps": 1e-3} if paradigm == "zo" else {}
    run = engine("layers.0.self_attn.q=2,self_attn=3,mlp=6", method, paradigm, **more)
    for step in range(3):
        run.step([batch(step)])
    seen = set()
    for variable in run.variables:
        if "_proj" not in variable.name:
            continue
        rank = 6 if "mlp" in variable.name else 2 if "layers.0.self_attn.q" in variable.name else 3
        assert rank in run.subspace(variable).coords_shape, variable.name
        seen.add(rank)
    assert seen == {2, 3, 6}


def test_a_resumed_run_has_the_same_ranks_and_weights() -> None:
    whole, first, second = (engine({"mlp": 6, "q_proj": 2}) for _ in range(3))
    for step in range(5):
        whole.step([batch(step)])
    for step in range(3):
        first.step([batch(step)])
    second.load_state_dict(first.state_dict())
    for step in range(3, 5):
        second.step([batch(step)])
    for one, other in zip(whole.detach().parameters(), second.detach().parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_rank_for_no_weight_is_refused() -> None:
    for ranks, words in (
        ("query=4", "no projected weight has 'query' in its name; there are .*q_proj"),
        ("norm=4", "no projected weight has 'norm'"),
        ("q_proj", "'q_proj' is no NAME=RANK"),
        ("q_proj=0", "rank"),
    ):
        with pytest.raises(UsageError, match=words):
            engine(ranks)
    with pytest.raises(UsageError, match="projector 'identity' has no setting 'rank'"):
        zolr.compose("adamw", ranks="q_proj=4")
