"""Laws of lora.py and of the `lora` row: PEFT's own layers, trained by the engine, readable by PEFT and without it."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from oracle import lora
from test_cli import failed

from zolr.engine import Engine
from zolr.lora import merged, trained, wrap
from zolr.memory import predict, size_of
from zolr.methods import METHODS, Adapter, compose
from zolr.models import DEMO, load_model, prompt_loss

peft = pytest.importorskip("peft")

SMALL = ("--k", 4, "--eval-rows", 8, "--batch-size", 4, "--steps", 4, "--eval-every", 2)
LORA = ("finetune", "--method", "lora", *SMALL)
IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture
def unpredicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without a memory prediction, which takes longer than they do."""
    from zolr.cli.job import Job

    monkeypatch.setattr(Job, "predicted", None)


def batch() -> dict[str, torch.Tensor]:
    zeros = torch.zeros(2, dtype=torch.long)
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "positions": zeros + 5, "labels": zeros}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.usefixtures("unpredicted")
@pytest.mark.parametrize("head", ["prompt", "classes"])
@pytest.mark.parametrize("paradigm", ["fo", "zo"])
def test_a_run_is_a_plain_model_and_an_adapter_with_equal_outputs(
    zolr: Run, tmp_path: Path, paradigm: str, head: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto: Any = AutoModelForCausalLM if head == "prompt" else AutoModelForSequenceClassification
    more: dict[str, Any] = {"dtype": torch.float32, **({} if head == "prompt" else {"num_labels": 6})}
    rate = ("--lr", 1e-2, *(("--eps", 1e-3) if paradigm == "zo" else ()))
    run = tmp_path / "run"
    given = ("--paradigm", paradigm, "--rank", 3, "--head", head, *rate, "--output", run)
    code, _, err = zolr(*LORA, *given)
    assert code == 0, err
    plain = logits(auto.from_pretrained(run))
    base = auto.from_pretrained(DEMO, **more)
    untrained = logits(base)
    adapted = logits(peft.PeftModel.from_pretrained(base, run / "adapter"))
    assert torch.allclose(plain, adapted, rtol=1e-4, atol=1e-4)
    assert float((adapted - untrained).abs().max()) > 1e-2
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["peft_type"] == "LORA"
    result = json.loads((run / "result.json").read_text())
    assert result["versions"]["peft"] == peft.__version__ and 0 < result["trained_share"] < 0.1
    assert "`adapter/`" in (run / "README.md").read_text()


@pytest.mark.usefixtures("unpredicted")
def test_a_resumed_run_leaves_the_same_adapter_bit_for_bit(zolr: Run, tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert zolr(*LORA, "--save-every", 2, "--output", whole)[0] == 0
    for name in ("config.toml", "metrics.jsonl"):
        again.mkdir(exist_ok=True)
        shutil.copy(whole / name, again)
    shutil.copytree(whole / "checkpoints" / "step-2", again / "checkpoints" / "step-2")
    shutil.copytree(whole / "checkpoints" / "best-2", again / "checkpoints" / "best-2", dirs_exist_ok=True)
    code, _, err = zolr("finetune", "--resume", "--output", again)
    assert code == 0, err
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()


@pytest.mark.usefixtures("unpredicted")
def test_the_adapter_of_an_earlier_run_does_not_stay_beside_another_model(zolr: Run, tmp_path: Path) -> None:
    assert zolr(*LORA, "--output", tmp_path / "run")[0] == 0
    assert zolr(*LORA, "--rank", 2, "--output", tmp_path / "run", "--overwrite")[0] == 0
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2
    code, _, err = zolr("finetune", "--method", "sgd", *SMALL, "--output", tmp_path / "run", "--overwrite")
    assert code == 0 and not (tmp_path / "run" / "adapter").exists(), err


def test_the_adapter_alone_is_trained() -> None:
    model: Any = load_model("demo")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    wrapped = wrap(model, Adapter("lora", 2))
    assert torch.equal(torch.get_rng_state(), state)
    engine = Engine(model, compose("lora", "fo"), lr=1e-2, loss=prompt_loss((3, 4)), select=trained)
    assert all(".lora_" in v.name and v.is_full for v in engine.variables)
    linear = [m for m in load_model("demo").modules() if isinstance(m, torch.nn.Linear)]
    assert len(engine.variables) == 2 * (len(linear) - 1)  # every linear map but the head
    start = logits(model)
    engine.step([batch()])
    engine.detach()
    changed = logits(model)
    plain: Any = merged(wrapped)
    assert torch.allclose(logits(plain), changed, rtol=1e-4, atol=1e-4) and not torch.equal(changed, start)
    after = dict(plain.named_parameters())
    assert set(after) == set(before)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("proj" in name for name in moved)  # embeddings, norms and the head stay


def tiny() -> Any:
    """A llama in float64 with two maps of one shape and others."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=13, hidden_size=8, intermediate_size=12, max_position_embeddings=16)
    heads = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False)).double().eval()


def next_token(model: Any, batch: torch.Tensor) -> torch.Tensor:
    scores = model(input_ids=batch).logits[:, :-1]
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())


TOKENS = torch.randint(13, (12, 3, 6), generator=torch.Generator().manual_seed(1))


def beside(name: str) -> tuple[str, str]:
    """Which weight an adapter's matrix stands beside, and whether it is A or B."""
    layer, _, kind = name.partition(".lora_")
    return f"{layer}.weight", kind[0]


@pytest.mark.parametrize("paradigm", ["fo", "zo"])
def test_m1_lora_equals_the_loop_written_from_its_paper(paradigm: str) -> None:
    model = tiny()
    wrap(model, Adapter("lora", 2))
    names = {beside(n): n for n, p in model.named_parameters() if trained(n, p)}
    first = {w: model.get_parameter(n).detach().clone() for (w, kind), n in names.items() if kind == "A"}
    more: dict[str, Any] = {"eps": 1e-3} if paradigm == "zo" else {}
    engine = Engine(model, compose("lora", paradigm, **more), lr=1e-2, loss=next_token, select=trained)
    history = []
    for tokens in TOKENS:
        engine.step([tokens])
        # weights of float64 have coordinates of float64, which are the adapter's own matrices
        history.append({key: model.get_parameter(n).detach().clone() for key, n in names.items()})
    probing = dict(probe=1e-3, names=lambda *key: names[key], betas=(0.9, 0.99))
    constants: dict[str, Any] = probing if paradigm == "zo" else dict(betas=(0.9, 0.999))
    expected = lora.run(tiny(), next_token, TOKENS, lr=1e-2, first=first, alpha=8, **constants)
    assert len(first) == 7  # all linear maps but the head
    for got, wanted in zip(history, expected, strict=True):
        assert max(float((got[key] - wanted[key]).detach().abs().max()) for key in names) < 1e-10
    assert min(float(x.detach().abs().max()) for x in expected[-1].values()) > 1e-3


def test_m1_lora_with_a_fixed_orthogonal_matrix_is_sgd() -> None:
    """`(alpha/r)² Aᵀ A = 1`: the subspace is the whole space, and its basis is fixed."""
    model, plain = tiny(), tiny()
    wrap(model, Adapter("lora", 12))
    spans = {beside(n)[0]: p for n, p in model.named_parameters() if "lora_A" in n}
    for i, a in enumerate(spans.values()):
        gauss = torch.randn(12, a.shape[1], dtype=a.dtype, generator=torch.Generator().manual_seed(i))
        a.data = torch.linalg.qr(gauss)[0] * 12 / 8
    method = compose("lora", "fo", optimizer="sgd")
    engine = Engine(model, method, lr=1.0, loss=next_token, select=lambda n, p: "lora_B" in n)
    other = Engine(plain, compose("sgd"), lr=1.0, loss=next_token, select=lambda n, p: n in spans)
    for tokens in TOKENS:
        engine.step([tokens])
        other.step([tokens])
    for name in spans:
        layer = engine.model.get_submodule(name.removesuffix(".weight"))
        moved: Any = layer.base_layer.weight + layer.get_delta_weight("default")
        now = other.model.get_parameter(name)
        assert float((moved - now).detach().abs().max()) < 1e-10
        assert float((now - tiny().get_parameter(name)).detach().abs().max()) > 1e-5


def test_the_seed_names_the_first_matrices() -> None:
    def drawn(seed: int) -> torch.Tensor:
        model = load_model("demo")
        wrap(model, Adapter(), seed=seed)
        return next(p for n, p in model.named_parameters() if "lora_A" in n)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize(
    "more", [(), ("--checkpointing",), ("--paradigm", "zo", "--lr", 1e-3, "--eps", 1e-3)]
)
def test_the_peak_is_the_predicted_one(zolr: Run, tmp_path: Path, more: tuple[object, ...]) -> None:
    every = ("--train-rows", 24, "--batch-size", 24, "--accumulate", 1, "--eval-rows", 8, "--steps", 3)
    code, out, err = zolr(
        "finetune", "--method", "lora", *every, *more, "--output", tmp_path / "run", "--json"
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["peak_bytes_predicted"] == pytest.approx(result["peak_bytes_measured"], rel=0.02)


@pytest.mark.parametrize("objective", ["prompt", "classes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_weights_are_those_of_the_wrapped_model(objective: Any, dtype: torch.dtype) -> None:
    kind: Any = "classes" if objective == "classes" else "lm"
    model = load_model("demo", kind=kind, num_labels=2 if kind == "classes" else None, dtype=dtype)
    wrap(model, Adapter(rank=5), classifier=kind == "classes")
    size = dict(batch_size=2, max_length=8, dtype=dtype, objective=objective)
    predicted = predict("demo", compose("lora", "fo"), adapter=Adapter(rank=5), **size)
    assert predicted.weights_bytes == size_of(model)
    plain = predict("demo", compose("adamw"), **size)
    assert predicted.forward_peak_bytes == plain.forward_peak_bytes
    assert predicted.optimizer_bytes < 0.3 * plain.optimizer_bytes


def test_rank_is_that_of_the_adapter() -> None:
    from zolr.cli.finetune import Finetune

    assert Finetune(method="lora", rank=3).filled().adapter == Adapter("lora", 3)
    assert Finetune(method="lora").filled().adapter == METHODS["lora"].adapter == Adapter("lora", 8)
    assert Finetune(method="adamw").filled().adapter is None
    assert compose("lora", "fo", rank=3) == METHODS["lora"].build("fo")


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_a_rank_above_every_matrix_is_refused(family: str) -> None:
    from transformers import AutoConfig

    from zolr.errors import UsageError
    from zolr.models import build

    sizes = dict(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)
    model = build(
        AutoConfig.for_model(family, **sizes, **({} if family == "gpt2" else {"intermediate_size": 64}))
    )
    asked = [p.requires_grad for p in model.parameters()]
    with pytest.raises(
        UsageError, match=r"rank 65 of an adapter is larger .* \(longest side 64\); use a smaller"
    ):
        wrap(model, Adapter(rank=65))
    assert [p.requires_grad for p in model.parameters()] == asked  # and nothing was put into it
    wrap(model, Adapter(rank=64))


def test_a_rank_above_every_matrix_is_refused_in_predictions() -> None:
    from zolr.errors import UsageError

    with pytest.raises(UsageError, match="rank 99999 of an adapter is larger than every linear map"):
        predict("demo", compose("lora", "fo"), adapter=Adapter(rank=99999), batch_size=2, max_length=8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["finetune", "--method", "lora", "--rank", 0], "rank 0 of an adapter.*at least 1"),
        (["finetune", "--method", "lora", "--train", "linear"], "--train linear: method 'lora' trains an adapter.*leave it out"),
        (["finetune", "--method", "lora", "--projector", "stiefel"], "projector 'stiefel'; leave the projector out"),
        (["finetune", "--method", "lora", "--paradigm", "fwd"], "method 'lora' runs under fo, zo"),
        (["pretrain", "--method", "lora", "--data", "x.txt"], "method 'lora' trains an adapter.*use another --method"),
    ],
)  # fmt: skip
def test_what_an_adapter_cannot_is_refused(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    failed(zolr(*arguments), 2, message)
    assert list(tmp_path.iterdir()) == []


def test_experts_that_are_one_weight_have_a_way_out(zolr: Run, tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from zolr.errors import UsageError
    from zolr.models import load_tokenizer

    folder, tokenizer = tmp_path / "model", load_tokenizer("demo")
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_local_experts=2)
    heads = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    model: Any = MixtralForCausalLM(MixtralConfig(**sizes, **heads, max_position_embeddings=256))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(UsageError, match=r"weight 'model.layers.0.mlp.*' of MixtralForCausalLM is read past"):
        wrap(model, Adapter("lora", 2))
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    task = ("--model", folder, "--task", "questions", *SMALL, "--output", tmp_path / "run")
    outcome = zolr("finetune", "--method", "lora", *task)
    way_out = "--method stiefel --train attention --hold"
    failed(outcome, 2, f"method 'lora' cannot train it; use {way_out}, which")
    code, _, err = zolr("finetune", *way_out.split(), "--paradigm", "fo", "--rank", 4, *task)
    assert code == 0 and (tmp_path / "run" / "adapter_config.json").is_file(), err


def test_a_missing_package_is_named_with_the_extra_that_has_it(
    zolr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    failed(zolr("finetune", "--method", "lora"), 2, r"needs the package peft.*pip install 'zolr\[lora\]'")
    failed(zolr("compare", "--methods", "adamw,lora"), 2, r"pip install 'zolr\[lora\]'")
    assert list(tmp_path.iterdir()) == []
    code, out, _ = zolr("estimate", "--method", "lora,mezo", "--batch-size", 1, "--max-length", 4, "--json")
    lora, mezo = json.loads(out)["methods"]
    assert code == 0 and "zolr[lora]" in lora["error"] and mezo["peak_bytes"] > 0
