"""Classification heads on bases that have none: where rows end, and what a run has to keep."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from zolr.cli.finetune import Finetune
from zolr.cli.job import Job
from zolr.kinds import selection
from zolr.models import load_tokenizer

DEMO = Path(__file__).parent.parent / "zolr" / "demo" / "model"

Arguments = list[object]


@pytest.fixture
def learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Arguments:
    """Arguments of a small run on own data, rows of every length."""
    monkeypatch.setattr(Job, "predicted", None)
    rows = [f"{'it was a day ' * (1 + i % 5)}number {i},{'odd' if i % 2 else 'even'}" for i in range(48)]
    data = tmp_path / "texts.csv"
    data.write_text("\n".join(["text,label", *rows]) + "\n")
    head = ["--head", "classes", "--train", "all", "--paradigm", "fo", "--rank", 4, "--lr", 1e-2]
    return ["finetune", "--data", data, *head, "--steps", 4, "--batch-size", 8, "--seed", 5]


@pytest.mark.parametrize("pad", [None, 3])
def test_the_answer_of_a_row_does_not_depend_on_what_it_is_padded_to(
    zolr: Run, learn: Arguments, tmp_path: Path, pad: int | None
) -> None:
    """Causal classifiers read the last token that is not padding, by an id that the base's config may not have, or have wrong."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(DEMO, base)
    numbers = json.loads((base / "config.json").read_text()) | {"pad_token_id": pad, "eos_token_id": None}
    (base / "config.json").write_text(json.dumps(numbers))
    code, _, err = zolr(*learn, "--model", base, "--output", run)
    assert code == 0, err
    assert json.loads((run / "config.json").read_text())["pad_token_id"] == load_tokenizer(run).pad_token_id
    losses = []
    for rows in (1, 3, 32):
        code, out, err = zolr("evaluate", run, "--json", "--batch-size", rows)
        assert code == 0, err
        losses.append(json.loads(out)["loss"])
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)
    after = json.loads((run / "result.json").read_text())["metrics"]["test"]["after"]
    assert after["loss"] == pytest.approx(losses[0], rel=1e-5)


def test_what_the_base_has_no_weights_for_is_kept_beside_held_ones(
    zolr: Run, learn: Arguments, tmp_path: Path
) -> None:
    """A masked language model has no pooler: its random one is part of what the run has made."""
    peft = pytest.importorskip("peft")
    sizes: dict[str, Any] = dict(vocab_size=4096, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    base, run = tmp_path / "base", tmp_path / "run"
    AutoModelForMaskedLM.from_config(
        AutoConfig.for_model("bert", intermediate_size=64, **sizes)
    ).save_pretrained(base)
    tokenizer = load_tokenizer("demo")
    tokenizer.save_pretrained(base)
    code, _, err = zolr(*learn, "--model", base, "--hold", "--output", run)
    assert code == 0, err
    code, out, err = zolr("evaluate", run, "--json")
    assert code == 0, err
    after = json.loads((run / "result.json").read_text())["metrics"]["test"]["after"]
    assert json.loads(out)["loss"] == pytest.approx(after["loss"], rel=1e-6)
    # plain peft draws another pooler first
    logits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        model = peft.PeftModel.from_pretrained(plain, run).eval()
        with torch.no_grad():
            logits.append(model(**tokenizer("it was a day", return_tensors="pt")).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("train", ["all", "attention"])
def test_the_head_of_an_offloaded_model_is_stored(
    zolr: Run, learn: Arguments, tmp_path: Path, train: str
) -> None:
    """Its weights are elsewhere when the run is written, and are held as all others are."""
    run = tmp_path / "run"
    learn[learn.index("--paradigm") + 1] = "zo"
    learn[learn.index("--train") + 1] = train
    code, _, err = zolr(*learn, "--device-map", "cpu", "--eps", 1e-3, "--output", run)
    assert code == 0, err
    code, out, err = zolr("evaluate", run, "--json")
    assert code == 0, err
    after = json.loads((run / "result.json").read_text())["metrics"]["test"]["after"]
    assert json.loads(out)["loss"] == pytest.approx(after["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "distilbert", "deberta-v2", "electra", "gpt2", "llama", "modernbert"]
)
def test_head_is_what_a_classifier_has_and_its_base_has_not(family: str) -> None:
    """And the pooler, which the classifier alone reads."""
    numbers: dict[str, Any] = dict(vocab_size=70, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    numbers |= dict(intermediate_size=24, dim=16, hidden_dim=24, n_layers=1, n_heads=2, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(family, **numbers, num_labels=3)
    )
    base = {f"{model.base_model_prefix}.{name}" for name, _ in model.base_model.named_parameters()}
    pooler = {name for name in base if ".pooler." in name}
    chosen = selection(model, "head")
    found = {name for name, parameter in model.named_parameters() if chosen(name, parameter)}
    assert found == {name for name, _ in model.named_parameters()} - (base - pooler)


def test_a_head_is_trained_with_what_the_method_trains(
    zolr: Run, learn: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By forward passes, too, where a method takes the attention matrices alone; a choice that leaves it random is told."""
    chosen = {
        (name, train): Finetune(method=name, train=train, head="classes", data="x.csv").selection
        for name, train in (("stiefel", None), ("mezo", None), ("stiefel", "attention"), ("lora", None))
    }
    assert list(chosen.values()) == ["attention+head", "all", "attention", "adapter"]
    assert Finetune(method="stiefel").selection == "attention"
    forward = [*learn[:5], "--paradigm", "zo", "--lr", 1e-2, "--eps", 1e-2, *learn[-6:]]
    weights = {}
    for name, more in {"usual": [], "left": ["--train", "attention"], "alone": ["--train", "head"]}.items():
        code, out, err = zolr(*forward, *more, "--output", tmp_path / name)
        assert code == 0, err
        assert ("has random weights, and --train attention leaves them so" in err) == (name == "left")
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    assert not torch.equal(weights["usual"]["score.weight"], weights["left"]["score.weight"])
    own = {key for key, tensor in weights["alone"].items() if not torch.equal(tensor, weights["left"][key])}
    assert "score.weight" in own and all(key == "score.weight" or "attn" in key for key in own)
