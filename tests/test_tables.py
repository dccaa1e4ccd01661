"""What becomes of embeddings and heads: full, subspace or frozen, under any method, and counted."""

import json

import pytest
import torch
from transformers import AutoConfig

from zolr.cli.compare import Compare, _plans, _terms
from zolr.cli.pretrain import Pretrain
from zolr.engine import Engine
from zolr.errors import UsageError
from zolr.memory import kept, predict, size_of
from zolr.methods import METHODS, compose
from zolr.models import build, lm_loss

VOCAB, WIDTH, RANK = 97, 16, 4
NUMBERS = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
NUMBERS |= {"vocab_size": VOCAB, "num_key_value_heads": 2}
POLICIES = ("full", "subspace", "frozen")


def model(tied: bool = False):
    return build(
        AutoConfig.for_model("llama", **NUMBERS, tie_word_embeddings=tied), dtype=torch.float32, seed=0
    )


def stepped(method, tied: bool = False, steps: int = 2) -> Engine:
    ids = torch.randint(VOCAB, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    engine = Engine(model(tied), method, lr=1e-3, loss=lm_loss)
    for x in ids[:steps]:
        engine.step([{"input_ids": x, "labels": x}])
    return engine


def moments(engine: Engine) -> int:
    """Numbers of optimizer state, counters left out."""
    return sum(t.numel() for t in kept(engine)["optimizer"] if t.dim())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["stiefel", "galore", "rso"])
def test_state_is_larger_and_smaller_by_what_the_tables_have(name, tied):
    count = {t: moments(stepped(compose(name, "fo", rank=RANK, tables=t), tied)) for t in POLICIES}
    places = 1 if tied else 2
    assert count["full"] - count["frozen"] == places * 2 * VOCAB * WIDTH
    assert count["subspace"] - count["frozen"] == places * 2 * VOCAB * RANK
    usual = "subspace" if METHODS[name].build("fo").projects == "all" else None
    if usual is not None:
        assert moments(stepped(compose(name, "fo", rank=RANK), tied)) == count[usual]


@pytest.mark.parametrize("tables", POLICIES)
@pytest.mark.parametrize(
    ("name", "paradigm"), [("stiefel", "zo"), ("stiefel", "fo"), ("galore", "fo"), ("adamw", "fo")]
)
def test_tables_move_as_the_policy_says(name, paradigm, tables):
    rank = {} if name == "adamw" else {"rank": RANK}
    more = {"eps": 1e-3} if paradigm == "zo" else {}
    if name == "adamw" and tables == "subspace":
        with pytest.raises(
            UsageError, match="tables 'subspace' needs a projector, and 'identity' has the whole space"
        ):
            compose(name, paradigm, tables=tables)
        return
    method = compose(name, paradigm, tables=tables, **rank, **more)
    engine, start = stepped(method), dict(model().named_parameters())
    share = engine.trained_share
    after = dict(engine.detach().named_parameters())
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = (after[table] - start[table]).detach()
        assert bool(moved.any()) == (tables != "frozen")
        if tables == "subspace":
            assert int(torch.linalg.matrix_rank(moved, tol=1e-6)) <= RANK
    assert (share < 1) == (tables == "frozen")
    assert bool((after["model.norm.weight"] != start["model.norm.weight"]).any())


@pytest.mark.parametrize("tables", POLICIES)
def test_predictions_count_the_tables(tables):
    method = compose("galore", rank=RANK, tables=tables)
    found = predict(model().config, method, batch_size=3, max_length=8, objective="lm")
    parts = kept(stepped(method))
    assert found.optimizer_bytes == size_of(*parts["optimizer"])


def test_the_flag_is_heard_by_every_verb(zolr):
    states = {}
    for tables in ("full", "frozen"):
        code, out, err = zolr(
            "estimate",
            "--method",
            "stiefel:fo",
            "--tables",
            tables,
            "--batch-size",
            2,
            "--max-length",
            16,
            "--json",
            "--quiet",
        )
        assert code == 0, err
        (row,) = json.loads(out)["methods"]
        states[tables] = row["optimizer_bytes"]
        assert row["tables"] == tables
    assert states["frozen"] < 0.5 * states["full"]
    code, out, err = zolr(
        "finetune", "--method", "adamw", "--tables", "frozen", "--dry-run", "--quiet", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["trained_share"] < 1 and found["settings"]["tables"] == "frozen"
    code, _, err = zolr("finetune", "--method", "adamw", "--tables", "subspace", "--dry-run")
    assert code == 2 and "use tables 'full' or 'frozen'" in err
    assert Pretrain(data=("x",), method="galore", tables="subspace").filled().composed().tables == "subspace"
    plans = _plans(
        Compare(tables="frozen"), {"a": {"method": "stiefel", "paradigm": "fo"}}, _terms(Compare(), {})
    )
    assert plans["a"].composed().tables == "frozen"  # type: ignore[union-attr]


def test_words_are_checked():
    with pytest.raises(UsageError, match="tables 'half' is not known; use 'full', 'subspace' or 'frozen'"):
        compose("stiefel", tables="half")
    with pytest.raises(UsageError, match="trains its adapter and no embedding or head"):
        compose("lora", tables="full")
    assert compose("lora", tables="frozen").tables == "frozen"
