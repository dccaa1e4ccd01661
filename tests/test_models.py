"""Laws of models: the split one equals the stock one, chunked losses whole ones; presets have their size."""

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from zolr import models
from zolr.errors import DataError, UsageError
from zolr.models import PRESETS, build, encode, head, is_masked, lm_loss, load_model, load_tokenizer

DATA = Path(os.environ.get("ZOLR_DATA", Path(__file__).parents[2] / "shared" / "data"))

VOCAB = 67
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=40,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
)
# Numbers that a family spells differently, or that make its head's scale or cap show
CHANGES = {
    "albert": dict(embedding_size=8),
    "cohere": dict(logit_scale=0.3),
    "distilbert": dict(dim=16, n_layers=2, n_heads=2, hidden_dim=24),
    "electra": dict(embedding_size=8),
    "esm": dict(mask_token_id=3, emb_layer_norm_before=False, position_embedding_type="absolute"),
    "gemma": dict(head_dim=8, num_key_value_heads=2),
    "gemma2": dict(head_dim=8, num_key_value_heads=2, final_logit_softcapping=0.02),
    "gemma3_text": dict(head_dim=8, num_key_value_heads=2, final_logit_softcapping=0.02),
    "gpt2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=40),
    "gpt_neo": dict(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]),
    "granite": dict(logits_scaling=5.0),
    "modernbert": dict(cls_token_id=0, sep_token_id=2),
    "opt": dict(ffn_dim=24, word_embed_proj_dim=8),
    **dict.fromkeys(("mistral", "qwen2", "smollm3", "stablelm", "starcoder2"), dict(num_key_value_heads=2)),
    "qwen3": dict(head_dim=8, num_key_value_heads=2),
    "deberta": dict(legacy=True),
    "deberta-v2": dict(legacy=False, relative_attention=True, pos_att_type=["c2p", "p2c"]),
}


def data(*parts: str) -> Path:
    path = DATA.joinpath(*parts)
    if not path.exists():
        message = f"no test data at {path}; set ZOLR_DATA"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


def tiny(family: str, **options) -> torch.nn.Module:
    """A model of the family with two layers, weights large enough that nothing is flat."""
    config = AutoConfig.for_model(family, **{**SMALL, **CHANGES.get(family, {})})
    model = build(config, seed=1, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


def batch_of(vocab: int, rows: int = 3, tokens: int = 9) -> dict[str, torch.Tensor]:
    """Right-padded rows of different lengths; positions are the last real tokens."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocab, (rows, tokens), generator=draw)
    lengths = torch.tensor([tokens - 2 * i for i in range(rows)])
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    labels = torch.randint(0, vocab, (rows, tokens), generator=draw)
    labels[(mask == 0) | (torch.rand(rows, tokens, generator=draw) < 0.3)] = -100
    return dict(input_ids=ids * mask + 1 - mask, attention_mask=mask, positions=lengths - 1, labels=labels)


def test_gradients_of_a_plain_head_are_made_by_hand_and_of_no_other():
    import zolr

    model, batch = tiny("llama", dtype=torch.float64), batch_of(VOCAB)
    hidden = models.encode(model, batch).flatten(0, 1)
    assert models._plain_head(model, hidden) is model.lm_head.weight
    for tables, plain in (("full", True), ("subspace", False), ("frozen", True)):
        found = []
        for by_hand in (True, False):
            own = tiny("llama", dtype=torch.float64)
            method = zolr.compose("stiefel", "fo", rank=4, tables=tables)
            engine = zolr.Engine(own, method, lr=1e-2, loss=lm_loss, seed=3, weight_decay=0.1)
            with pytest.MonkeyPatch.context() as patch:
                if by_hand:
                    assert (models._plain_head(own, hidden) is not None) is plain
                else:
                    patch.setattr(models, "_plain_head", lambda *_: None)
                for _ in range(3):
                    engine.step([batch])
            found.append([p.detach() for p in engine.detach().parameters()])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    with torch.autocast("cpu", torch.bfloat16):
        assert models._plain_head(model, hidden) is None
    assert models._plain_head(tiny("roberta"), hidden) is None  # more than a product
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert models._plain_head(model, hidden) is None
    handle.remove()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB, dtype=torch.float64))
    assert models._plain_head(model, hidden) is None


@pytest.mark.parametrize("family", sorted(models.HEADS))
def test_split_model_equals_the_stock_one(family):
    model, batch = tiny(family), batch_of(VOCAB)
    assert models.splits(model)
    with torch.no_grad():
        stock = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        rows = torch.arange(3)
        ours = head(model, encode(model, batch)[rows, batch["positions"]])
        words = models.prompt_logits(model, batch, torch.tensor([7, 5, 9]))
    expected = stock[rows, batch["positions"]]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(words, expected[:, [7, 5, 9]], atol=1e-5, rtol=1e-5)
    assert expected.std() > 1e-3  # the comparison is not of zeros


@pytest.mark.parametrize("name", ["minilm-mlm", "stories260K"])
def test_split_pretrained_model_equals_the_stock_one(name):
    folder = data("models", name)
    model = load_model(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert is_masked(model) == (name == "minilm-mlm")
    batch = batch_of(500, rows=4, tokens=24)
    auto = AutoModelForMaskedLM if is_masked(model) else AutoModelForCausalLM
    stock = auto.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        ours = models.prompt_logits(model, batch, [11, 3])
    torch.testing.assert_close(
        ours, logits[torch.arange(4), batch["positions"]][:, [11, 3]], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "opt", "roberta"])
@pytest.mark.parametrize("chunk", [None, 1, 7, 27])
def test_chunked_language_model_loss_equals_the_whole_one(family, chunk):
    model, batch = tiny(family, dtype=torch.float64), batch_of(VOCAB)
    stock = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    whole = F.cross_entropy(stock.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(whole, parameters, allow_unused=True)

    total, count = lm_loss(model, batch, chunk=chunk)
    assert count == (batch["labels"] != -100).sum() > 0
    torch.testing.assert_close(total, whole)
    for ours, theirs in zip(torch.autograd.grad(total, parameters, allow_unused=True), expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert torch.equal(lm_loss(model, batch, chunk=chunk)[0], total)


def test_counted_positions_leave_the_loss_unchanged():
    model, batch = tiny("bert", dtype=torch.float64), batch_of(VOCAB)
    (counted,) = (batch["labels"].flatten() != -100).nonzero(as_tuple=True)
    total, count = lm_loss(model, batch)
    fewer, same = lm_loss(model, {**batch, "counted": counted}, chunk=4)
    torch.testing.assert_close(fewer, total)
    assert same == count


def test_chunked_loss_holds_one_chunk_of_logits():
    from zolr.memory import LiveBytes

    vocab, chunk = 4096, 16
    config = AutoConfig.for_model("llama", **{**SMALL, "vocab_size": vocab, "max_position_embeddings": 256})
    model, batch = build(config), batch_of(vocab, rows=4, tokens=128)
    with LiveBytes() as live:
        live.track(model)
        total, _ = lm_loss(model, batch, chunk=chunk)
        total.backward()
    weights = sum(p.numel() for p in model.parameters()) * 4
    grads_and_chunks = weights + vocab * 16 * 4 * 2 + 5 * chunk * vocab * 4
    assert live.peak < weights + grads_and_chunks + (1 << 20) < weights * 2 + 4 * 128 * vocab * 4


@pytest.mark.parametrize("family", sorted(models.HEADS))
def test_states_in_rows_equal_whole_ones(family, monkeypatch):
    """Feed-forward halves in parts of seven tokens and a rest; whatever family has none to divide stays as it is."""
    model, batch = tiny(family, dtype=torch.float64), batch_of(VOCAB)
    seen = []
    for module in model.modules():
        if not [*module.children()]:
            module.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    with torch.no_grad():
        whole, before = encode(model, batch), [dict(m.__dict__) for m in model.modules()]
        seen.clear()
        monkeypatch.setattr(models, "CHUNK_ENTRIES", 7 * 64)
        width = getattr(model.config, "intermediate_size", None) or 64
        divided = encode(model, batch)
    torch.testing.assert_close(divided, whole)
    assert [dict(m.__dict__) for m in model.modules()] == before
    inside = [type(m).__name__ for m in model.modules() if models._feed_forward(type(m))]
    if inside:
        assert any(shape[:-1] == (7 * 64 // width,) for shape in seen)
    assert inside or family not in {
        "bert",
        "roberta",
        "electra",
        "llama",
        "gpt2",
        "gpt_neox",
        "qwen3",
        "gemma2",
    }
    seen.clear()
    torch.testing.assert_close(
        encode(model, batch), whole
    )  # with autograd, which keeps what is made: not divided
    assert not any(shape[:-1] == (7 * 64 // width,) for shape in seen)


def test_states_in_rows_take_less(monkeypatch):
    from zolr.memory import LiveBytes

    model = build(AutoConfig.for_model("roberta", **{**SMALL, "intermediate_size": 128}))
    batch = batch_of(VOCAB, rows=8, tokens=32)
    batch |= dict(labels=torch.zeros(8, dtype=torch.long))
    peaks = []
    for entries in (1 << 24, 32 * 128):
        monkeypatch.setattr(models, "CHUNK_ENTRIES", entries)
        with torch.no_grad(), LiveBytes() as live:
            models.prompt_loss((3, 4))(model, batch)
        peaks.append(live.peak)
    assert peaks[0] - peaks[1] > 256 * 128 * 4


def test_parts_are_few_however_many_tokens_there_are(monkeypatch):
    """Else a prediction for a large batch would take as long as its rows are many."""
    model, batch = tiny("llama", dtype=torch.float64), batch_of(VOCAB)
    batch |= dict(labels=batch["input_ids"])
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setattr(models, "CHUNK_ENTRIES", 1)
    found = []
    for most in (256, 3):
        monkeypatch.setattr(models, "MOST_CHUNKS", most)
        seen.clear()
        with torch.no_grad():
            total, count = models.lm_loss(model, batch)
        found.append(float(total / count))
        assert len(seen) == min(most, batch["input_ids"].numel())
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
def test_prompt_losses_are_per_row(family):
    model, batch = tiny(family), batch_of(VOCAB)
    batch["labels"] = torch.tensor([0, 1, 1])
    words = torch.tensor([8, 12])
    with torch.no_grad():
        logits = models.prompt_logits(model, batch, words)
        losses = models.prompt_loss(words)(model, batch)
    torch.testing.assert_close(losses, -logits.log_softmax(-1)[torch.arange(3), batch["labels"]])


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "opt", "distilbert"])
def test_class_loss_is_per_row(family):
    model, batch = tiny(family, kind="classes", num_labels=5), batch_of(VOCAB)
    batch["labels"] = torch.tensor([4, 0, 2])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = models.class_loss(model, batch)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(losses, F.cross_entropy(logits, batch["labels"], reduction="none"))


def test_low_precision_models_give_float32_logits():
    model, batch = tiny("roberta", dtype=torch.bfloat16), batch_of(VOCAB)
    assert next(model.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        assert models.prompt_logits(model, batch, [3, 4]).dtype == torch.float32
        assert lm_loss(model, batch)[0].dtype == torch.float64


def test_unknown_family_uses_the_stock_forward(monkeypatch):
    model, batch = tiny("llama"), batch_of(VOCAB)
    with torch.no_grad():
        expected = models.prompt_logits(model, batch, [5, 6]), lm_loss(model, batch)[0]
        monkeypatch.delitem(models.HEADS, "llama")
        with pytest.warns(UserWarning, match="'llama' is computed by its stock forward"):
            ours = models.prompt_logits(model, batch, [5, 6]), lm_loss(model, batch)[0]
    torch.testing.assert_close(ours, expected)
    with pytest.raises(UsageError, match="HEADS"):
        head(model, torch.zeros(1, 16))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at peft's use of an older name
@pytest.mark.parametrize("family", ["bert", "granite", "llama"])
def test_losses_of_a_model_that_peft_wraps_are_those_of_its_stock_forward(family):
    peft = pytest.importorskip("peft", reason="needs peft (pip install peft)")
    wrapped = peft.get_peft_model(tiny(family), peft.LoraConfig(r=2, target_modules="all-linear"))
    batch, inputs = batch_of(VOCAB), ("input_ids", "attention_mask")
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
        logits = wrapped(**{name: batch[name] for name in inputs}).logits
        expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
        with pytest.warns(
            UserWarning, match=f"PeftModel around model family '{family}' is computed by its stock"
        ):
            total, count = lm_loss(wrapped, batch)
            losses = models.lm_losses(wrapped, batch)
            words = models.prompt_logits(wrapped, batch, [5, 6])
    torch.testing.assert_close((total / count).float(), expected)
    counts = (batch["labels"] != -100).sum(1)
    torch.testing.assert_close((losses * counts).sum(), total)
    torch.testing.assert_close(words, logits[torch.arange(3), batch["positions"]][:, [5, 6]])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_tokens_of_prompt_tuning_are_no_tokens_of_the_batch():
    peft = pytest.importorskip("peft", reason="needs peft (pip install peft)")
    tuning = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=4)
    wrapped, batch = peft.get_peft_model(tiny("llama"), tuning), batch_of(VOCAB)
    with torch.no_grad(), pytest.warns(UserWarning, match="is computed by its stock forward"):
        logits = wrapped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 4:]
        words = models.prompt_logits(wrapped, batch, [5, 6])
    torch.testing.assert_close(words, logits[torch.arange(3), batch["positions"]][:, [5, 6]])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("bert-base", 109_514_298),
        ("roberta-base", 124_697_433),
        ("roberta-large", 355_412_057),
        ("gpt2", 124_439_808),
        ("opt-125m", 125_239_296),
        ("opt-1.3b", 1_315_758_080),
        ("llama-20m", 19_548_416),
        ("llama-60m", 58_073_600),
        ("llama-100m", 100_117_120),
        ("llama-130m", 134_105_856),
        ("llama-350m", 367_969_280),
        ("llama-1b", 1_339_082_752),
        ("llama-7b", 6_738_415_616),
    ],
)
def test_presets_have_the_size_of_their_namesake(name, parameters):
    model = build(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters  # tied weights count once
    assert all(p.is_meta for p in model.parameters())
    assert set(PRESETS) >= {name}


def test_presets_build_in_fake_mode_and_under_the_meta_device():
    with FakeTensorMode():
        fake = build("llama-20m")
        assert fake.lm_head.weight.device.type == "cpu" and type(fake.lm_head.weight.data) is not torch.Tensor
    with torch.device("meta"):
        assert build("llama-20m").lm_head.weight.is_meta


def test_nothing_is_initialized_where_weights_have_no_numbers(monkeypatch):
    """Initializations that read values need some: that of ModernBERT does, by `trunc_normal_` of torch 2.13."""
    ran = []
    monkeypatch.setattr(PreTrainedModel, "_init_weights", lambda self, module: ran.append(module))
    config = PRESETS["bert-base"].config(**SMALL, tie_word_embeddings=True)
    with FakeTensorMode():
        fake = build(config)
    assert not ran and fake.get_output_embeddings().weight is fake.get_input_embeddings().weight
    build(config)
    assert ran


def test_random_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (tiny("bert"), tiny("bert"), build(PRESETS["bert-base"].config(**SMALL), seed=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(
        other.bert.embeddings.word_embeddings.weight, first.bert.embeddings.word_embeddings.weight / 5
    )


def test_fresh_classifier_heads_depend_on_the_seed_alone():
    folder = data("models", "stories260K")
    first = load_model(folder, kind="classes", num_labels=3, seed=4)
    torch.rand(1)
    again = load_model(folder, kind="classes", num_labels=3, seed=4)
    assert first.score.weight.shape[0] == 3 and torch.equal(first.score.weight, again.score.weight)


def test_dropout_of_a_config_can_be_set():
    model = build(PRESETS["gpt2"].config(n_embd=16, n_layer=2, n_head=2, vocab_size=VOCAB), dropout=0.0)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert {getattr(model.config, k) for k in ("attn_pdrop", "embd_pdrop", "resid_pdrop")} == {0.0}


def test_a_switch_is_no_dropout_probability():
    config = AutoConfig.for_model("esm", **{**SMALL, **CHANGES["esm"]}, token_dropout=True)
    model = build(config, dropout=0.0)
    assert model.config.token_dropout is True and model.config.hidden_dropout_prob == 0.0
    assert not any(isinstance(value, bool) for value in models.dropouts(model.config).values())


def test_preset_with_published_weights_says_that_its_own_are_random(monkeypatch):
    monkeypatch.setitem(
        PRESETS, "gpt2", models.Preset("gpt2", dict(n_embd=8, n_layer=1, n_head=1), "hub/name")
    )
    with pytest.warns(UserWarning, match="random weights.*'hub/name'"):
        assert not load_model("gpt2").training


def test_preset_without_published_weights_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model("llama-20m", device="meta")


def test_unknown_names_are_refused_with_the_nearest(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(models, "_hub_answers", lambda: False)
    with pytest.raises(UsageError, match="'lama-60m' is not known .did you mean 'llama-60m'"):
        build("lama-60m")
    with pytest.raises((UsageError, DataError), match="did you mean 'roberta-large'") as caught:
        load_model("roberta-lrge")
    assert "\n" not in str(caught.value)
    with pytest.raises((UsageError, DataError), match="hub cannot be reached"):
        load_tokenizer("someone/something")
    with pytest.raises(UsageError, match="kind 'lmm'"):
        build("llama-20m", kind="lmm", device="meta")


def test_bad_folders_are_refused_in_one_line(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(DataError, match="cannot be read") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}'
    )
    with pytest.raises(DataError, match=r"cannot be read: .*\(65\) is not a multiple of .*heads \(4\)$"):
        load_model(tmp_path)
    tiny("bert").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", ["cohere", "granite", "mamba", "olmoe"])
def test_families_without_a_classification_head_are_refused(family, tmp_path):
    config = AutoConfig.for_model(family, vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    message = f"family '{family}' has no classification head in transformers; use --head prompt .kind 'lm'"
    with pytest.raises(UsageError, match=message):
        build(config, kind="classes", device="meta")
    with pytest.raises(UsageError, match=message):
        load_model(tmp_path, kind="classes", num_labels=2)


@pytest.mark.parametrize(
    ("family", "kind", "message"),
    [
        ("vit", "lm", "'vit' has no language-model head; use a model of another family"),
        ("vit", "classes", "'vit' has no classification head in transformers; use a model of another family"),
        ("layoutlmv3", "lm", "'layoutlmv3' has no language-model head; use --head classes .kind 'classes'"),
    ],
)
def test_families_without_a_head_name_the_one_that_there_is(family, kind, message):
    with pytest.raises(UsageError, match=message):
        build(AutoConfig.for_model(family), kind=kind, device="meta")


def test_missing_language_model_head_is_said(tmp_path):
    tiny("bert").bert.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="holds no weights for cls"):
        load_model(tmp_path)


def test_saved_models_load_back(tmp_path):
    model, batch = tiny("opt"), batch_of(VOCAB)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(lm_loss(load_model(tmp_path), batch)[0], lm_loss(model, batch)[0])


def test_tokenizers_pad_on_the_right():
    tokenizer = load_tokenizer(data("tokenizers", "gpt2"))
    assert tokenizer.pad_token == tokenizer.eos_token and tokenizer.padding_side == "right"
    assert load_tokenizer(data("models", "minilm-mlm")).pad_token == "[PAD]"
    with pytest.raises(UsageError, match="preset 'llama-60m' has no tokenizer"):
        load_tokenizer("llama-60m")


@pytest.mark.parametrize("how", [True, "selective"])
@pytest.mark.parametrize("family", ["llama", "roberta", "gpt2", "opt"])
def test_checkpointed_activations_leave_gradients_unchanged(family, how):
    """With dropout where the family has one: what is dropped is the same when a layer is computed again."""
    model, batch = tiny(family), batch_of(VOCAB)
    model.train()
    layers: list = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    calls = [0, 0]
    for i, layer in enumerate(layers):
        first = next(m for m in layer.modules() if not [*m.children()])
        first.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    used = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        calls[:] = [0, 0]
        torch.manual_seed(3)
        return torch.autograd.grad(lm_loss(model, batch)[0], used, allow_unused=True)

    plain = gradients()
    if family != "llama":
        torch.manual_seed(4)
        other = torch.autograd.grad(lm_loss(model, batch)[0], used[:1])[0]
        assert not torch.equal(other, plain[0])  # dropout is there
    models.checkpoint_activations(model, how)
    again = gradients()
    assert calls == ([2, 2] if how is True else [2, 1])
    for a, b in zip(plain, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    with pytest.raises(UsageError, match="checkpointing 'half' is not known"):
        models.checkpoint_activations(model, "half")
    with pytest.raises(UsageError, match="does not support activation checkpointing"):
        models.checkpoint_activations(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("counted", [False, True])
def test_losses_of_rows_add_up_to_the_loss_of_the_batch(name, counted):
    model = tiny(name).double().eval()
    ids = torch.arange(24).view(4, 6) % 11
    labels = torch.where(torch.arange(24).view(4, 6) % 3 > 0, (ids * 3) % 11, -100)
    labels[2] = -100  # a row that predicts nothing
    batch = {"input_ids": ids, "labels": labels}
    total, count = models.lm_loss(model, batch)
    if counted:
        batch["counted"] = (labels.flatten() != -100).nonzero()[:, 0]
    each = models.lm_losses(model, batch)
    numbers = (labels != -100).sum(1)
    assert each.shape == (4,) and float(each[2]) == 0.0
    torch.testing.assert_close((each * numbers).sum() / count, total / count, rtol=1e-6, atol=0)


def test_folders_with_half_of_a_model_say_which_half_is_missing(tmp_path):
    tokenizer = load_tokenizer("demo")
    AutoConfig.for_model("llama", hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"folder '.*' has no tokenizer; put the tokenizer.json"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path)) == len(tokenizer)
    with pytest.raises(DataError, match="has no weights; give one with a model.safetensors"):
        load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match="has no safetensors; .*--trust-remote-code"):
        load_model(tmp_path)
