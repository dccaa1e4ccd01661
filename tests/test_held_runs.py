"""Runs that write no weights, on the command line: quantized, offloaded, or held; what they leave is an adapter."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("ZOLR_DATA", ROOT.parent / "shared" / "data"))
MODEL = DATA / "models" / "stories260K"

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
FO = ("--paradigm", "fo", "--rank", 4, "--steps", 8, "--eval-every", 4, "--lr", 2e-3, "--refresh-every", 3)
ZO = ("--paradigm", "zo", "--rank", 2, "--steps", 8, "--eval-every", 4, "--lr", 1e-3, "--eps", 1e-3)
ZO = (*ZO, "--refresh-every", 3, "--train", "all")

Arguments = list[object]


@pytest.fixture
def learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Arguments:
    """Arguments of a small run on own data."""
    from zolr.cli.job import Job

    if "predicting" not in request.fixturenames:
        monkeypatch.setattr(Job, "predicted", None)
    if not MODEL.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{MODEL} is absent; set ZOLR_DATA")
        pytest.skip(f"{MODEL} is absent; set ZOLR_DATA to the folder that has models/stories260K")
    source, lines = random.Random(0), ["text,label"]
    for i in range(40):
        lines += [
            f"the day was {source.choice(('big', 'nice'))} {i},happy",
            f"she was {source.choice(('sad', 'scared'))} {i},sad",
        ]
    data = tmp_path / "texts.csv"
    data.write_text("\n".join(lines) + "\n")
    words = ("--label-words", "happy=happy,sad=little")
    return [
        "finetune",
        "--model",
        MODEL,
        "--data",
        data,
        *words,
        "--batch-size",
        8,
        "--output",
        tmp_path / "run",
    ]


@pytest.fixture
def predicting() -> None:
    """Asked for by the tests that want a memory prediction."""


def needs(how: str) -> None:
    pytest.importorskip(PACKAGES[how], reason=f"needs {PACKAGES[how]} (pip install 'zolr[quant]')")


def check(zolr: Run, run: Path, tmp_path: Path) -> dict[str, Any]:
    """A finished run holds an adapter and no model, and evaluating it gives what the run has measured."""
    result = json.loads((run / "result.json").read_text())
    names = {p.name for p in run.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "task.json"} <= names
    assert not names & {"config.json", "model.safetensors"}
    code, out, err = zolr("evaluate", run, "--json", "--batch-size", 8)
    assert code == 0, err
    measured = json.loads(out)
    assert measured["loss"] == pytest.approx(result["metrics"]["test"]["after"]["loss"], abs=2e-5)
    texts = tmp_path / "lines.txt"
    texts.write_text("she was sad\nthe day was nice\n")
    code, out, err = zolr("predict", run, texts)
    assert code == 0 and len(out.splitlines()) == 2, err
    return result


@pytest.mark.parametrize("paradigm", [FO, ZO], ids=["fo", "zo"])
@pytest.mark.parametrize("how", ["int8", "nf4"])
@pytest.mark.usefixtures("predicting")
def test_a_quantized_run_from_end_to_end(
    zolr: Run, learn: Arguments, tmp_path: Path, how: str, paradigm: tuple[object, ...]
) -> None:
    needs(how)
    code, out, err = zolr(*learn, *paradigm, "--quantize", how, "--json")
    assert code == 0, err
    result = check(zolr, tmp_path / "run", tmp_path)
    assert result == {key: value for key, value in json.loads(out).items() if key != "folder"}
    assert result["metrics"]["test"]["after"] != result["metrics"]["test"]["before"]
    assert PACKAGES[how] in result["versions"] and result["held"]["rank"] == 64
    assert result["peak_bytes_predicted"] > 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"quantize='{how}'" in card and "library_name: peft" in card


def test_peft_reads_the_folder_of_a_run(zolr: Run, learn: Arguments, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft (pip install peft)")
    from zolr import models

    code, _, err = zolr(*learn, *FO, "--hold")
    assert code == 0, err
    run = tmp_path / "run"
    check(zolr, run, tmp_path)
    ids = {"input_ids": torch.tensor([[1, 5, 9, 12, 40, 7]])}
    with torch.no_grad():
        base = models.load_model(MODEL)(**ids).logits
        ours = models.load_model(run)(**ids).logits
        theirs = peft.PeftModel.from_pretrained(models.load_model(MODEL), run).eval()(**ids).logits
    assert torch.allclose(theirs, ours, atol=1e-4) and not torch.allclose(base, ours, atol=1e-3)


def test_a_tied_weight_with_an_embedding_of_its_own_kind(zolr: Run, learn: Arguments, tmp_path: Path) -> None:
    from zolr import models

    base = tmp_path / "base"
    tokenizer = models.load_tokenizer(MODEL)
    tokenizer.save_pretrained(base)
    sizes: dict[str, Any] = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    config = models.AutoConfig.for_model("gemma3_text", **sizes, max_position_embeddings=128)
    built: Any = models.build(config)
    built.save_pretrained(base)
    code, _, err = zolr(
        "finetune", "--model", base, *learn[3:], *FO, "--lr", 1e-2, "--train", "all", "--hold"
    )
    assert code == 0, err
    result = check(zolr, tmp_path / "run", tmp_path)
    assert result["metrics"]["test"]["after"] != result["metrics"]["test"]["before"]


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_run_learns_what_a_held_run_learns(
    zolr: Run, learn: Arguments, tmp_path: Path, where: str
) -> None:
    away = ("--offload-folder", tmp_path / "away") if where == "disk" else ()
    code, _, err = zolr(*learn, *ZO, "--device", "cpu", "--device-map", where, *away)
    assert code == 0, err
    result = check(zolr, tmp_path / "run", tmp_path)
    assert result["metrics"]["test"]["after"] != result["metrics"]["test"]["before"]
    code, _, err = zolr(*learn[:-1], tmp_path / "plain", *ZO, "--device", "cpu", "--hold")
    assert code == 0, err
    plain = json.loads((tmp_path / "plain" / "result.json").read_text())
    assert result["metrics"]["test"]["after"]["loss"] == pytest.approx(
        plain["metrics"]["test"]["after"]["loss"], rel=1e-3
    )


def test_a_fresh_head_is_stored_whole(zolr: Run, learn: Arguments, tmp_path: Path) -> None:
    code, _, err = zolr(*learn[:5], "--head", "classes", *learn[7:], *FO, "--hold", "--seed", 3)
    assert code == 0, err
    check(zolr, tmp_path / "run", tmp_path)
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["modules_to_save"][-1] == "score" and "score" not in config["target_modules"]


def test_a_held_run_is_resumed(zolr: Run, learn: Arguments, tmp_path: Path) -> None:
    code, _, err = zolr(*learn, *FO, "--hold", "--save-every", 4)
    assert code == 0, err
    whole = json.loads((tmp_path / "run" / "result.json").read_text())
    for name in ("result.json", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "run" / name).unlink()
    code, _, err = zolr("finetune", "--resume", "--output", tmp_path / "run")
    assert code == 0, err
    again = check(zolr, tmp_path / "run", tmp_path)
    assert again["metrics"] == whole["metrics"]


@pytest.mark.parametrize("first", ["model", "adapter"])
def test_an_adapter_and_a_model_replace_each_other(
    zolr: Run, learn: Arguments, tmp_path: Path, first: str
) -> None:
    order = [(), ("--hold",)] if first == "model" else [("--hold",), ()]
    for i, more in enumerate(order):
        code, _, err = zolr(*learn, *FO, *more, *(["--overwrite"] if i else []))
        assert code == 0, err
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert ("config.json" in names) == (first == "adapter") == ("model.safetensors" in names)
    assert ("adapter_config.json" in names) == (first == "model") == ("adapter_model.safetensors" in names)


def test_the_command_line_knows_the_default_rank_of_the_library() -> None:
    from zolr import held
    from zolr.cli import finetune

    assert finetune.RANK == held.RANK
    ranks = {None: 64, 8: 64, 16: 64, 20: 80}  # of `stiefel` forward-only: 16
    for rank, kept in ranks.items():
        assert finetune.Finetune(paradigm="zo", rank=rank).held_rank == kept
    assert finetune.Finetune(paradigm="fo").held_rank == 128
    assert finetune.Finetune(paradigm="fo", hold_rank=9).held_rank == 9


MISTAKES: dict[str, tuple[tuple[object, ...], str]] = {
    "offloaded backprop": (("--device-map", "cpu", "--paradigm", "fo"), "use --paradigm zo"),
    "no place": (("--device-map", "disk", "--paradigm", "zo"), "give --offload-folder"),
    "a place for nothing": (("--offload-folder", "x"), "give --device-map disk or auto too"),
    "both": (("--device-map", "cpu", "--quantize", "nf4", "--paradigm", "zo"), "leave out --quantize nf4"),
    "decay": (("--hold", "--weight-decay", 0.1), "--weight-decay 0.1 would have to write the weights"),
    "whole": (("--hold", "--method", "adamw"), "cannot be trained as a whole"),
    "code": (("--quantize", "int3"), "--quantize 'int3'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_in_one_line(zolr: Run, learn: Arguments, tmp_path: Path, case: str) -> None:
    arguments, message = MISTAKES[case]
    code, _, err = zolr(*learn, *arguments)
    assert code == 2 and message in " ".join(err.split()), err
    assert not (tmp_path / "run").exists()


def test_what_no_adapter_can_hold_is_refused_before_the_first_step(
    zolr: Run, learn: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zolr.engine import Engine

    def step(*_: Any) -> None:
        raise AssertionError("a step was taken")

    monkeypatch.setattr(Engine, "step", step)
    numbers = ("--method", "adamw", "--paradigm", "fo", "--hold", "--steps", 2, "--train", "norm")
    (tmp_path / "run").mkdir()
    for more in ((), ("--resume",)):
        code, out, err = zolr(*learn, *numbers, *more)
        lines = err.strip().splitlines()
        assert code == 2 and out == "" and "adapter needs a plain linear map or an embedding" in lines[-1], (
            err
        )
        assert "LlamaRMSNorm; train such weights too (--train all" in lines[-1]
        assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "config.toml"] * bool(more)
        code, out, err = zolr(*learn[:-2], *numbers, "--print-config")
        (tmp_path / "run" / "config.toml").write_text(out)


def test_an_adapter_finds_its_base_from_every_folder(
    zolr: Run, learn: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(MODEL.parent)
    code, _, err = zolr(*learn, "--model", MODEL.name, *FO, "--hold", "--steps", 1)
    assert code == 0, err
    monkeypatch.chdir(tmp_path)
    base = json.loads((tmp_path / "run" / "adapter_config.json").read_text())["base_model_name_or_path"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert (
        Path(base).is_absolute()
        and Path(base).samefile(MODEL)
        and f"base_model: {base}" in card
        and f"load `{base}`" in card
    )
    code, _, err = zolr("evaluate", "run", "--json")
    assert code == 0, err


def test_an_adapter_is_no_model_to_train(zolr: Run, learn: Arguments, tmp_path: Path) -> None:
    assert zolr(*learn, *FO, "--hold")[0] == 0
    code, _, err = zolr(*learn[:2], tmp_path / "run", *learn[3:-1], tmp_path / "next", *FO)
    assert code == 2 and "is an adapter, whose base is" in " ".join(err.split())


def test_a_damaged_adapter_is_named(zolr: Run, learn: Arguments, tmp_path: Path) -> None:
    assert zolr(*learn, *FO, "--hold")[0] == 0
    (tmp_path / "run" / "adapter_model.safetensors").write_bytes(b"torn")
    code, _, err = zolr("evaluate", tmp_path / "run")
    assert code == 3 and "adapter_model.safetensors" in " ".join(err.split())


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_estimating_a_quantized_run(zolr: Run, how: str) -> None:
    needs(how)
    found = {}
    for more in ((), ("--quantize", how)):
        code, out, err = zolr("estimate", "--model", "llama-60m", "--method", "stiefel:zo", "--json", *more)
        assert code == 0, err
        (found[more],) = json.loads(out)["methods"]
    plain, coded = found.values()
    base = 8 * (4 * 512 * 512 + 3 * 512 * 1376)  # weights in linear maps of layers
    saved = plain["weights_bytes"] - coded["weights_bytes"]
    # bytes per weight: 4 against 1 and a scale per row, or 1/2 and a float32 scale per 64
    expected = 3 * base if how == "int8" else (4 - 0.5 - 4 / 64) * base
    assert saved == pytest.approx(expected, rel=0.01)
    assert coded["peak_bytes"] < plain["peak_bytes"]
    assert any("rank 64 beside every held matrix" in line for line in coded["assumptions"])


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_predicted_weights_are_those_of_the_loaded_model(how: Any, tmp_path: Path) -> None:
    needs(how)
    from zolr import compose, models
    from zolr.memory import predict, size_of

    config = models.PRESETS["llama-20m"].config(vocab_size=64, hidden_size=256, num_hidden_layers=2)
    model = models.build(config)
    models.code(model, how)
    states = [s.absmax for p in model.parameters() if (s := getattr(p, "quant_state", None)) is not None]
    actual = size_of(model, *states)
    predicted = predict(
        config, compose("stiefel", "zo"), batch_size=2, max_length=8, objective="lm", quantize=how, hold=True
    )
    assert predicted.weights_bytes == actual
