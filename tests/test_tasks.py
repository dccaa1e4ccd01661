"""Laws of tasks: prompts keep their template, splits share no text, bad files are refused with a reason."""

import io
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from random import Random
from typing import Any

import pytest

from zolr.errors import DataError, UsageError
from zolr.tasks import (
    TASKS,
    ClassInput,
    Example,
    Prompt,
    TrainingBatches,
    collate,
    evaluation_batches,
    find_task,
    load_file,
    load_splits,
    own_task,
    pad_id,
    read_texts,
    truncation_share,
)
from zolr.tasks.fewshot import cap, cut, few_shot, hold_out
from zolr.tasks.prompts import parse_template

DATA = Path(os.environ.get("ZOLR_DATA") or Path(__file__).parent.parent.parent / "shared" / "data")
PACKAGE = Path(__file__).parent.parent / "zolr"
ROBERTA_BEGIN, ROBERTA_END, ROBERTA_MASK = 0, 2, 50264


def need(path: Path) -> Path:
    """The path, or a skipped test where it is absent; on CI its absence is a failure."""
    if not path.exists():
        message = f"{path} is not there; set ZOLR_DATA to the folder with tokenizers/ and tasks/"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    return path


_LOADED: dict[str, Any] = {}


def load(name: str):
    """One of the tokenizers, loaded once."""
    if name not in _LOADED:
        import transformers

        folder = need(DATA / "tokenizers" / name)
        # a bare sentencepiece file does not say which class reads it
        kind = {"llama": transformers.LlamaTokenizer, "t5": transformers.T5Tokenizer}
        _LOADED[name] = kind.get(name, transformers.AutoTokenizer).from_pretrained(folder)
    return _LOADED[name]


@pytest.fixture
def roberta():
    return load("roberta")


@pytest.fixture(params=["roberta", "bert-base-uncased"])
def masked(request):
    return load(request.param)


def with_spaces():
    """A byte-level tokenizer that puts a space before the first word, and a special token before that."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "<m>"], initial_alphabet=alphabet, show_progress=False
    )
    text = "A fine film. It was great. It was terrible! Is it so? Answer: Yes. Answer: No; word."
    tokenizer.train_from_iterator([text] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", mask_token="<m>"
    )


@pytest.fixture(params=["gpt2", "llama", "t5", "with_spaces"])
def causal(request):
    if request.param != "with_spaces":
        return load(request.param)
    return _LOADED.setdefault("with_spaces", with_spaces())


def vocabulary(name: str) -> dict[str, int]:
    return json.loads(need(DATA / "tokenizers" / name / "vocab.json").read_text())


# prompts: the published protocol, token for token


def test_sst2_on_roberta_is_the_published_prompt(roberta):
    prompt = TASKS["sst2"].prompt(roberta, masked=True)
    (one,) = prompt.encode([Example(("one long film .",), 0)])
    vocab = vocabulary("roberta")
    text = [vocab[p] for p in ("one", "Ġlong", "Ġfilm", "Ġ.")]
    assert text == [1264, 251, 822, 479]
    # [cls] S1 " It" " was" [mask] "." [sep], the last period without a space
    assert one["input_ids"] == [0, *text, 85, 21, ROBERTA_MASK, 4, 2]
    assert one.get("position", -1) == 7 and one["label"] == 0 and not one["truncated"]
    assert prompt.label_ids == [6587, 372]  # " terrible", " great"


def test_mnli_on_roberta_is_the_published_prompt(roberta):
    prompt = TASKS["mnli"].prompt(roberta, masked=True)
    (one,) = prompt.encode([Example(("It was a long day.", "The sun was out."), 2)])
    vocab = vocabulary("roberta")
    first = [vocab[p] for p in ("It", "Ġwas", "Ġa", "Ġlong", "Ġday")]  # the period is dropped
    second = [vocab[p] for p in ("Ġthe", "Ġsun", "Ġwas", "Ġout", ".")]  # lower-cased, with the space in front
    assert one["input_ids"] == [0, *first, vocab["?"], ROBERTA_MASK, vocab[","], *second, 2]
    assert one["input_ids"][one.get("position", -1)] == ROBERTA_MASK
    # index order entailment, neutral, contradiction: " Yes", " Maybe", " No"
    assert prompt.label_ids == [vocab["ĠYes"], vocab["ĠMaybe"], vocab["ĠNo"]] == [3216, 5359, 440]


def test_trec_on_roberta_is_the_published_prompt(roberta):
    prompt = TASKS["trec"].prompt(roberta, masked=True)
    (one,) = prompt.encode([Example(("Who is he ?",), 3)])
    vocab = vocabulary("roberta")
    text = [vocab[p] for p in ("ĠWho", "Ġis", "Ġhe", "Ġ?")]
    assert one["input_ids"] == [0, ROBERTA_MASK, vocab[":"], *text, 2] and one.get("position", -1) == 1
    words = dict(zip(TASKS["trec"].classes, prompt.words, strict=True))
    assert words == {
        "DESC": "Description",
        "ENTY": "Entity",
        "ABBR": "Expression",
        "HUM": "Human",
        "NUM": "Number",
        "LOC": "Location",
    }


def test_limits_are_the_published_ones():
    limits = {
        name: (TASKS[name].max_length, TASKS[name].cuts)
        for name in ("sst2", "sst5", "trec", "mnli", "snli", "rte")
    }
    assert limits == {
        "sst2": (128, ()),
        "sst5": (128, (110,)),
        "trec": (128, (110,)),
        "mnli": (256, (240, None)),
        "snli": (256, ()),
        "rte": (256, (240, None)),
    }


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_a_prompt_of_both_kinds(name, roberta):
    task = TASKS[name]
    example = Example(tuple("A short text ." for _ in task.columns), 0)
    for tokenizer, is_masked in ((roberta, True), (load("bert-base-uncased"), True), (load("gpt2"), False)):
        prompt = task.prompt(tokenizer, is_masked)
        assert len(set(prompt.label_ids)) == len(task.classes) == len(task.words)
        (one,) = prompt.encode([example])
        if is_masked:
            assert one["input_ids"].count(tokenizer.mask_token_id) == 1
            assert one["input_ids"][one.get("position", -1)] == tokenizer.mask_token_id
        else:
            assert one.get("position", -1) == len(one["input_ids"]) - 1
        assert task.class_input(tokenizer).encode([example])[0]["input_ids"]


def test_prompt_and_label_word_read_as_one_text(causal):
    """The ids of a causal prompt and a label word are those of the whole sentence, spaces included."""
    prompt = Prompt("{sentence} It was {mask}", ["terrible", "great"], causal, False, 64)
    (one,) = prompt.encode([Example(("A fine film.",), 1)])
    before = causal("", add_special_tokens=True)["input_ids"] if causal.bos_token_id == 0 else []
    whole = causal("A fine film. It was great", add_special_tokens=False)["input_ids"]
    assert one["input_ids"] + [prompt.label_ids[1]] == before + whole


def test_parts_without_a_space_continue_the_text(causal):
    prompt = Prompt("{sentence}? Answer: {mask}", ["Yes", "No"], causal, False, 64)
    (one,) = prompt.encode([Example(("Is it so",), 1)])
    before = causal("", add_special_tokens=True)["input_ids"] if causal.bos_token_id == 0 else []
    assert one["input_ids"] == before + causal("Is it so? Answer:", add_special_tokens=False)["input_ids"]


def test_word_piece_prompt_reads_as_one_text():
    tokenizer = load("bert-base-uncased")
    prompt = Prompt("{sentence} It was {mask}.", ["terrible", "great"], tokenizer, True, 64)
    (one,) = prompt.encode([Example(("A fine film.",), 1)])
    assert one["input_ids"] == tokenizer("A fine film. It was [MASK].")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(prompt.label_ids) == ["terrible", "great"]


def test_space_before_the_mask_belongs_to_the_label_word(roberta):
    example = [Example(("fine .",), 0)]
    ids = [
        Prompt(t, ["bad", "good"], roberta, True, 32).encode(example)[0]
        for t in ("{sentence} It was {mask}.", "{sentence} It was{mask}.")
    ]
    assert ids[0] == ids[1]


def test_special_tokens_in_a_text_stay_text(roberta):
    prompt = TASKS["sst2"].prompt(roberta, masked=True)
    (one,) = prompt.encode([Example(("bad </s> <mask> film",), 0)])
    assert one["input_ids"].count(ROBERTA_MASK) == 1 and one["input_ids"].count(ROBERTA_END) == 1
    assert one["input_ids"][one.get("position", -1)] == ROBERTA_MASK


def test_filters_and_braces():
    parts = parse_template("{{{a:drop-last:lower-first}}} {b:strip-end} {mask}", ["a", "b"])
    texts = {"a": "Hello.", "b": "Really?! "}
    assert [p.render(texts) for p in parts] == ["{", "hello", "}", " Really", "{mask}"]
    assert parse_template("{b} {mask}", ["b"])[0].render({"b": ""}) == ""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{sentense} {mask}", "did you mean 'sentence'"),
        ("{sentence:lowerfirst} {mask}", "did you mean 'lower-first'"),
        ("{sentence} It was", "{mask} 0 times"),
        ("{mask} {sentence} {mask}", "{mask} 2 times"),
        ("It was {mask}", "no text in it"),
        ("{sentence {mask}", "single '{'"),
        ("sentence} {mask}", "single '}'"),
        ("{sentence} {mask:lower-first}", "filter on {mask}"),
    ],
)
def test_bad_templates_are_refused(template, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_template(template, ["sentence"])


def test_bad_label_words_are_refused(roberta):
    def words(*words, tokenizer=roberta):
        return Prompt("{sentence} It was {mask}", words, tokenizer, tokenizer is roberta, 64)

    with pytest.raises(
        UsageError, match=r"'abysmally' is 4 tokens \['Ġab', 'ys', 'm', 'ally'\].*choose another word"
    ):
        words("abysmally", "great")
    with pytest.raises(UsageError, match="'great' and 'great' are the same token"):
        words("great", "great")
    with pytest.raises(UsageError, match="is empty"):
        words("", "great")
    bert = load("bert-base-uncased")
    with pytest.raises(UsageError, match="same token"):  # not cased
        Prompt("{sentence} It was {mask}", ["Great", "great"], bert, True, 64)
    with pytest.raises(UsageError, match="unknown to tokenizer"):
        Prompt("{sentence} It was {mask}", ["\U0001f9ff", "great"], bert, True, 64)


def test_templates_that_a_model_cannot_use_are_refused(roberta):
    gpt2 = load("gpt2")
    with pytest.raises(UsageError, match=r"has '\.' behind \{mask\}.*end the template with \{mask\}"):
        Prompt("{sentence} It was {mask}.", ["bad", "good"], gpt2, False, 64)
    with pytest.raises(UsageError, match="no mask token"):
        Prompt("{sentence} It was {mask}.", ["bad", "good"], gpt2, True, 64)
    with pytest.raises(UsageError, match="the template alone takes 6 tokens; use at least 7"):
        Prompt("{sentence} It was {mask}.", ["bad", "good"], roberta, True, 6)
    with pytest.raises(UsageError, match="cuts"):
        Prompt("{sentence} It was {mask}.", ["bad", "good"], roberta, True, 64, cuts=(3, 4))
    with pytest.raises(UsageError, match="give one for each"):
        TASKS["sst2"].changed(words=["bad", "okay", "good"])
    with pytest.raises(DataError, match="no token to predict from"):
        Prompt("{sentence:drop-last} {mask}", ["bad", "good"], gpt2, False, 64).encode([Example(("x",), 0)])


def test_truncation_cuts_texts_only(masked):
    prompt = TASKS["mnli"].prompt(masked, masked=True, max_length=20)
    long, short = "word " * 300 + ".", "A cat ."
    encoded = prompt.encode(
        [
            Example((long, short), 0),
            Example((short, long), 1),
            Example((long, long), 2),
            Example((short, short), 0),
        ]
    )
    (kept,) = prompt.encode([Example((short, short), 0)])
    for one in encoded[:3]:
        assert len(one["input_ids"]) == 20 and one["truncated"]
        assert one["input_ids"][one.get("position", -1)] == masked.mask_token_id
        assert one["input_ids"][0] == kept["input_ids"][0] and one["input_ids"][-1] == kept["input_ids"][-1]
    assert not encoded[3]["truncated"] and truncation_share(encoded) == 0.75
    # the short text is whole: it is the longest that is cut
    assert encoded[0]["input_ids"][-4:] == kept["input_ids"][-4:]


def test_a_text_is_cut_to_its_own_limit_first(roberta):
    prompt = TASKS["sst5"].prompt(roberta, masked=True)
    (one,) = prompt.encode([Example(("good " * 500,), 0)])
    assert len(one["input_ids"]) == 110 + 6 and one["truncated"]  # [cls] It was [mask] . [sep]
    assert one.get("position", -1) == 1 + 110 + 2


def test_truncation_of_a_causal_prompt_keeps_the_template(causal):
    prompt = TASKS["sst2"].prompt(causal, masked=False, max_length=16)
    long, short = prompt.encode([Example(("word " * 100,), 0), Example(("word",), 0)])
    assert long.get("position", -1) == 15 and long["input_ids"][-2:] == short["input_ids"][-2:]


def test_show_names_text_tokens_and_answer(roberta):
    shown = TASKS["sst2"].prompt(roberta, masked=True).show(Example(("fine .",), 1))
    assert (
        "fine . It was <mask>." in shown
        and "<mask>:50264" in shown
        and "answer  great at position 5" in shown
    )
    assert "ĠIt:" in TASKS["sst2"].class_input(roberta).show(Example(("fine It",), 1))


def test_pairs_are_joined_as_the_tokenizer_joins_them(masked):
    heads = ClassInput(masked, 64, columns=("sentence1", "sentence2"))
    (one,) = heads.encode([Example(("A cat.", "It sleeps."), 1)])
    both = masked("A cat.", "It sleeps.")
    assert one["input_ids"] == both["input_ids"] and one.get("token_type_ids") == both.get("token_type_ids")
    (cut_pair,) = ClassInput(masked, 12, columns=("sentence1", "sentence2")).encode(
        [Example(("a b " * 30, "It sleeps."), 1)]
    )
    assert len(cut_pair["input_ids"]) == 12 and cut_pair["truncated"]
    (alone,) = ClassInput(masked, 64).encode([Example(("A cat.",), 1)])
    assert alone["input_ids"] == masked("A cat.")["input_ids"]


def test_pairs_without_a_separator_are_joined_by_a_line_break():
    gpt2 = load("gpt2")
    (one,) = ClassInput(gpt2, 64, columns=("sentence1", "sentence2")).encode(
        [Example(("A cat.", "It sleeps."), 1)]
    )
    assert one["input_ids"] == gpt2("A cat.\nIt sleeps.")["input_ids"]


# batches


def encode_sst2(tokenizer, count: int = 10):
    examples = [Example(("word " * (1 + i % 4) + ".",), i % 2) for i in range(count)]
    return TASKS["sst2"].prompt(tokenizer, masked=True).encode(examples)


def test_collate_pads_on_the_right(roberta):
    encoded = encode_sst2(roberta, 4)
    batch = collate(encoded, pad_id(roberta), pad_to_multiple=8)
    lengths = [len(one["input_ids"]) for one in encoded]
    assert batch["input_ids"].shape == (4, 16) and batch["attention_mask"].sum(1).tolist() == lengths
    for row, one in enumerate(encoded):
        assert batch["input_ids"][row, : lengths[row]].tolist() == one["input_ids"]
        assert set(batch["input_ids"][row, lengths[row] :].tolist()) <= {pad_id(roberta)}
        assert batch["input_ids"][row, batch["positions"][row]] == ROBERTA_MASK
    assert batch["labels"].tolist() == [0, 1, 0, 1]
    assert {str(t.dtype) for t in batch.values()} == {"torch.int64"}
    assert "positions" not in collate(TASKS["sst2"].class_input(roberta).encode([Example(("a",), 0)]), 1)
    with pytest.raises(UsageError, match="no examples"):
        collate([], 1)


def test_pad_id_of_a_tokenizer_without_padding():
    assert pad_id(load("gpt2")) == 50256
    assert pad_id(types.SimpleNamespace(pad_token_id=None, eos_token_id=None)) == 0  # type: ignore[arg-type]


def lengths_and_labels(labels):
    return [
        {"input_ids": [5] * (1 + 7 * i % 11), "label": label, "truncated": False}
        for i, label in enumerate(labels)
    ]


def order_of(labels, size, seed, by_length=False):
    encoded = lengths_and_labels(labels)
    return TrainingBatches(encoded, batch_size=size, seed=seed, pad_id=1, by_length=by_length)  # type: ignore[arg-type]


def test_a_batch_is_a_function_of_seed_and_step():
    labels = [0, 1, 0, 1, 2, 0, 1, 0, 1, 2]
    fresh, later = order_of(labels, 4, 3), order_of(labels, 4, 3).rows(57)
    rows = [row for step in range(10) for row in fresh.rows(step)]
    assert later == fresh.rows(57) and later != order_of(labels, 4, 4).rows(57)
    epochs = [rows[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)  # also where a batch spans two
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("labels", [[0] * 50 + [1] * 30 + [2] * 20, [0] * 97 + [1] * 3, [4] * 100])
@pytest.mark.parametrize("size", [1, 7, 10, 32])
def test_every_batch_holds_the_classes_in_proportion(labels, size):
    batches = order_of(labels, size, 0)
    for step in range(100 // size):  # within an epoch
        drawn = [labels[row] for row in batches.rows(step)]
        for label in set(labels):
            assert abs(drawn.count(label) - size * labels.count(label) / 100) < 1.5
    # which of a class come together is random: the first rows of many seeds cover the class
    first = {order_of(labels, 1, seed).rows(0)[0] for seed in range(200)}
    assert len(first) > 60


def test_batches_of_like_length_hold_the_same_classes_and_every_row_once_an_epoch(monkeypatch):
    labels = [0, 1, 0, 1, 2, 0, 1] * 10  # 70 rows; batches of 8 span epochs
    plain, grouped = order_of(labels, 8, 3), order_of(labels, 8, 3, by_length=True)
    drawn = [[row for step in range(35) for row in batches.rows(step)] for batches in (plain, grouped)]
    assert [labels[row] for row in drawn[0]] == [labels[row] for row in drawn[1]]
    assert all(sorted(drawn[1][i : i + 70]) == list(range(70)) for i in range(0, 280, 70))
    assert drawn[1][:70] != drawn[1][70:140]
    assert order_of(labels, 8, 3, by_length=True).rows(20) == grouped.rows(20)
    # nearly all padding is gone, whether an epoch is one pool of batches or many
    for pool in (50, 4):
        monkeypatch.setattr("zolr.tasks.batches.POOL", pool)
        padding = []
        for by_length in (False, True):
            batches = order_of([0, 1] * 200, 16, 0, by_length=by_length)
            masks = [batches(step)[0]["attention_mask"] for step in range(25)]
            padding.append(sum(int((1 - mask).sum()) for mask in masks))
        assert padding[1] < (0.15 if pool == 50 else 0.5) * padding[0]


@pytest.mark.parametrize(
    ("size", "message"), [(0, "at least 1"), (11, "use 10 or less"), (2.0, "whole number"), (True, "whole")]
)
def test_bad_batch_sizes_are_refused(size, message):
    with pytest.raises(UsageError, match=message):
        order_of([0] * 10, size, 0)
    with pytest.raises(UsageError, match="steps count from 0"):
        order_of([0] * 10, 2, 0).rows(-1)


def test_micro_batches_are_the_batch_in_parts_of_like_length():
    encoded = lengths_and_labels([i % 3 for i in range(30)])
    whole, parts = (
        TrainingBatches(encoded, batch_size=12, seed=0, pad_id=1, micro_batch_size=size)(3)
        for size in (None, 5)
    )
    assert [len(part["labels"]) for part in parts] == [5, 5, 2] and len(whole) == 1
    lengths = [part["attention_mask"].sum(1).tolist() for part in parts]
    flat = [length for part in lengths for length in part]
    assert flat == sorted(flat) == sorted(whole[0]["attention_mask"].sum(1).tolist())
    assert [part["input_ids"].shape[1] for part in parts] == [max(part) for part in lengths]
    assert sorted(label for part in parts for label in part["labels"].tolist()) == sorted(
        whole[0]["labels"].tolist()
    )


def test_evaluation_sees_every_example_once_with_little_padding(roberta):
    encoded = encode_sst2(roberta)
    seen, lengths = [], []
    for rows, batch in evaluation_batches(encoded, batch_size=3, pad_id=1):
        seen += rows
        lengths.append(batch["input_ids"].shape[1])
        assert batch["labels"].tolist() == [encoded[row]["label"] for row in rows]
    assert sorted(seen) == list(range(10)) and lengths == sorted(lengths, reverse=True)


# splits


def pool(counts=(40, 30, 20)):
    return [
        Example((f"text {label} {i}",), label) for label, count in enumerate(counts) for i in range(count)
    ]


def test_k_shot_splits_are_disjoint_balanced_and_named_by_the_seed():
    classes = ("a", "b", "c")
    train, validation = few_shot(pool(), 4, 13, classes)
    assert not set(train) & set(validation) and len(set(train + validation)) == 24
    assert [sum(e.label == label for e in train) for label in range(3)] == [4, 4, 4]
    assert (train, validation) == few_shot(pool(), 4, 13, classes)
    assert train != few_shot(pool(), 4, 21, classes)[0]
    assert few_shot(pool(), 4, 2**40, classes)[0] != few_shot(pool(), 4, 2**40 + 2**32, classes)[0]


def test_k_shot_follows_the_published_shuffle():
    """NumPy's global shuffle of the rows; the first k of a class train, the next k validate."""
    import numpy as np

    rows = pool()
    np.random.seed(87)
    state = list(rows)
    np.random.shuffle(state)  # type: ignore[arg-type]
    expected = [[e for e in state if e.label == label] for label in range(3)]
    train, validation = few_shot(rows, 5, 87, ("a", "b", "c"))
    assert train == [e for group in expected for e in group[:5]]
    assert validation == [e for group in expected for e in group[5:10]]


def test_k_shot_never_picks_a_text_twice_or_from_the_test_set():
    rows = [*pool(), *pool(), Example(("text 0 0",), 1)]
    test = pool()[:10]
    train, validation = few_shot(rows, 10, 0, ("a", "b", "c"), held_out=test)
    texts = [e.texts for e in train + validation]
    assert len(set(texts)) == 60 and not set(texts) & {e.texts for e in test}


def test_k_that_is_too_large_names_class_and_count():
    with pytest.raises(
        DataError, match=r"class 'c' has 20 different rows.*k = 11 needs 22.*use k = 10 or less"
    ):
        few_shot(pool(), 11, 0, ("a", "b", "c"))
    with pytest.raises(UsageError, match="at least 1"):
        few_shot(pool(), 0, 0, ("a", "b", "c"))
    assert len(few_shot(pool(), 20, 0, ("a", "b", "c"), validate=False)[0]) == 60


def test_shares_are_stratified_and_disjoint():
    rows = [*pool(), *pool()[:5]]
    rest, held = hold_out(rows, 0.1, 0, ("a", "b", "c"), "validation")
    assert {label: len({e.texts for e in held if e.label == label}) for label in range(3)} == {
        0: 4,
        1: 3,
        2: 2,
    }
    assert not {e.texts for e in rest} & {e.texts for e in held} and len(rest) + len(held) == len(rows)
    with pytest.raises(DataError, match="class 'b' has 1 different rows"):
        hold_out(pool((5, 1)), 0.1, 0, ("a", "b"), "validation")
    with pytest.raises(UsageError, match="between 0 and 1"):
        hold_out(pool(), 1.5, 0, ("a", "b", "c"), "validation")


@pytest.mark.parametrize("rows", [3, 4, 10, 47, 89])
def test_a_cap_keeps_every_class_in_proportion(rows):
    examples = pool((60, 28, 2))
    chosen = cap(examples, rows, 0, ("a", "b", "c"))
    counts = [sum(e.label == label for e in chosen) for label in range(3)]
    assert sum(counts) == rows == len(set(chosen)) and min(counts) >= 1
    assert all(abs(count - rows * n / 90) < 2 for count, n in zip(counts, (60, 28, 2), strict=True))


def test_a_cap_below_the_number_of_classes_is_refused():
    with pytest.raises(UsageError, match="cannot show all 3 classes"):
        cap(pool(), 2, 0, ("a", "b", "c"))
    assert cut(pool(), None) == cut(pool(), 90) == pool() and len(set(cut(pool(), 7))) == 7


@pytest.mark.parametrize("name", [name for name in TASKS if name != "questions"])
def test_splits_of_a_task_share_no_text(name, monkeypatch):
    need(DATA / "tasks" / TASKS[name].folder)
    monkeypatch.setenv("ZOLR_DATA", str(DATA))
    cases: list[dict[str, Any]] = [{}, {"k": 16, "seed": 42}, {"train_rows": 100}]
    for settings in cases:
        splits = load_splits(name, **settings)
        texts = [{e.texts for e in part} for part in (splits.train, splits.validation, splits.test)]
        assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
        assert splits.classes == TASKS[name].classes and 0 < len(splits.test) <= 1000
        if "k" in settings:
            assert len(splits.train) == len(splits.validation) == 16 * len(splits.classes)
            assert splits.train == load_splits(name, **settings).train
        if "train_rows" in settings:
            assert len(splits.train) == 100


def test_the_test_set_does_not_depend_on_the_seed(monkeypatch):
    need(DATA / "tasks" / "sst2")
    monkeypatch.setenv("ZOLR_DATA", str(DATA))
    assert load_splits("sst2", k=16, seed=13).test == load_splits("sst2", k=16, seed=21).test


def folder(tmp_path: Path, meta: object = None, **splits: str) -> Path:
    for split, text in splits.items():
        (tmp_path / f"{split}.tsv").write_text(text)
    if meta is not None:
        (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path


ROWS = "".join(f"{i % 2}\tsentence {i}\n" for i in range(40))


def test_labels_of_a_folder_are_matched_by_name(tmp_path):
    path = folder(
        tmp_path,
        {"labels": ["positive", "negative"]},
        train="label\tsentence\n" + ROWS,
        test="label\tsentence\n1\tawful\n",
    )
    splits = load_splits("sst2", data_dir=path)
    assert splits.test == [Example(("awful",), 0)]  # 1 is negative in this folder, and 0 in the task
    assert load_splits("sst2", data_dir=path.rename(path.parent / "sst2").parent).test == splits.test


@pytest.mark.parametrize(
    ("meta", "train", "message"),
    [
        ({"labels": ["bad", "good"]}, ROWS, "its labels are"),
        ({"labels": ["negative"]}, ROWS, "its labels are"),
        ({"name": "sst2"}, ROWS, "its labels are None"),
        (None, ROWS, r"line 2: the label is the number 0, but there is no meta\.json"),
        (
            {"labels": ["negative", "positive"]},
            ROWS + "2\tmore\n",
            r"train\.tsv, line 42: the label 2 .* out of range",
        ),
        ({"labels": ["negative", "positive"]}, ROWS + "0\tmore\tfields\n", "line 42: 3 fields"),
        ([], ROWS, "a list where an object"),
    ],
)
def test_a_folder_that_does_not_fit_the_task_is_refused(tmp_path, meta, train, message):
    path = folder(tmp_path, meta, train="label\tsentence\n" + train, test="label\tsentence\n" + train)
    with pytest.raises(DataError, match=message):
        load_splits("sst2", data_dir=path)


def test_a_folder_without_what_is_needed_is_refused(tmp_path):
    with pytest.raises(DataError, match="no train.tsv of task 'sst2'"):
        load_splits("sst2", data_dir=tmp_path)
    path = folder(tmp_path, {"labels": ["negative", "positive"]}, train="label\tsentence\n" + ROWS)
    with pytest.raises(DataError, match="neither a dev nor a test split"):
        load_splits("sst2", data_dir=path)
    with pytest.raises(DataError, match="no column 'sentence1'"):
        folder(tmp_path, {"labels": ["entailment", "not_entailment"]})
        load_splits("rte", data_dir=path)


class HubRows(list):
    """What the hub's client returns, as far as it is used."""

    def __init__(self, rows, names=None):
        super().__init__(rows)
        self.column_names = list(rows[0])
        self.features = {
            column: types.SimpleNamespace(names=names) if names else object() for column in rows[0]
        }


def test_hub_labels_are_matched_by_name(monkeypatch):
    names = ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]
    rows = [{"text": f"question {i}", "coarse_label": i % 6} for i in range(120)] + [
        {"text": "none", "coarse_label": -1}
    ]
    calls = []

    def load_dataset(id, config, split, revision):
        calls.append((id, config, split, revision))
        return HubRows([dict(row, text=f"{split} {row['text']}") for row in rows], names)

    monkeypatch.delenv("ZOLR_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    splits = load_splits("trec")
    assert calls[0] == ("CogComp/trec", None, "train", "refs/convert/parquet") and len(splits.test) == 120
    assert [splits.classes[e.label] for e in splits.test[:6]] == names
    strings = [{"text": str(i), "label_text": ("Objective", "subjective")[i % 2]} for i in range(60)]
    monkeypatch.setattr(
        sys.modules["datasets"],
        "load_dataset",
        lambda *a, **k: HubRows(strings if k["split"] == "train" else strings[:9]),
    )
    splits = load_splits("subj")
    assert splits.test[0] == Example(("0",), 1) and splits.removed == 9
    with pytest.raises(DataError, match=r"has no column 'sentence' any more"):
        load_splits("cola")
    monkeypatch.setattr(
        sys.modules["datasets"], "load_dataset", lambda *a, **k: HubRows([{"text": "x", "label_text": "odd"}])
    )
    with pytest.raises(DataError, match="the label 'odd' is not expected"):
        load_splits("subj")


def test_a_hub_that_is_out_of_reach_names_the_way_out(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.delenv("ZOLR_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"'nyu-mll/glue' \(sst2\).*no route.*--data-dir.*ZOLR_DATA"):
        load_splits("sst2")


def test_hub_labels_cover_the_classes():
    for task in TASKS.values():
        if task.hub:
            assert set(task.hub.labels.values()) == set(task.classes) and len(task.hub.columns) == len(
                task.columns
            )
            assert "train" in task.hub.splits and len(task.hub.splits) > 1


def test_unknown_tasks_and_contradictions_are_refused(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'sst2'"):
        find_task("sts2")
    with pytest.raises(UsageError, match="give one of them"):
        load_splits("sst2", k=16, train_rows=3)
    with pytest.raises(UsageError, match="nothing to train on"):
        load_splits()
    with pytest.raises(
        UsageError, match="label_column is about own files; give the file to train on as data"
    ):
        load_splits("sst2", label_column="x")
    with pytest.raises(UsageError, match="has 2 texts"):
        load_splits("rte", data=tmp_path / "x.csv", text_columns=["a"])
    with pytest.raises(UsageError, match="has its classes"):
        load_splits("rte", data=tmp_path / "x.csv", classes=["a"])
    with pytest.raises(UsageError, match="is read instead of .* in data_dir = 'D'; give one of them"):
        load_splits("rte", data=tmp_path / "x.csv", data_dir="D")
    with pytest.raises(UsageError, match="cannot be a field"):
        own_task("mine", ["a:b"], ["x", "y"])


# own files


def rows_of(count: int = 60) -> list[dict[str, object]]:
    return [
        {"review": f"review, number {i}", "verdict": ("bad", "good")[i % 2], "extra": None}
        for i in range(count)
    ]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """The rows in the format of the suffix."""
    import csv

    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".tsv":
        lines = [list(rows[0]), *(["" if v is None else str(v) for v in row.values()] for row in rows)]
        path.write_text("".join("\t".join(line) + "\r\n" for line in lines))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_format_reads_alike(tmp_path, suffix):
    path = write(tmp_path / f"reviews{suffix}", rows_of())
    examples, classes = load_file(path, ["review"], "verdict")
    assert classes == ("bad", "good")
    assert examples == [Example((f"review, number {i}",), i % 2) for i in range(60)]
    assert read_texts(path, ["review"]) == [e.texts for e in examples]
    splits = load_splits(data=path, text_columns=["review"], label_column="verdict", k=3)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, 6, 6)
    assert splits.columns == ("review",) and splits.name == path.name


def test_own_files_make_disjoint_splits(tmp_path):
    train = write(tmp_path / "train.csv", rows_of())
    test = write(tmp_path / "test.jsonl", rows_of(12))
    columns: dict[str, Any] = {"text_columns": ["review"], "label_column": "verdict"}
    splits = load_splits(data=train, **columns)
    assert (len(splits.train), len(splits.validation), len(splits.test), splits.removed) == (48, 6, 6, 0)
    both = write(tmp_path / "both.json", rows_of(18))
    splits = load_splits(data=train, test_data=test, validation_data=both, **columns)
    assert (len(splits.train), len(splits.validation), len(splits.test), splits.removed) == (42, 6, 12, 18)
    with pytest.raises(DataError, match="every validation row is a test row too"):
        load_splits(data=train, test_data=test, validation_data=test, **columns)
    splits = load_splits(
        "sst2",
        data=write(tmp_path / "own.csv", [{"t": f"t {i}", "label": i % 2} for i in range(40)]),
        text_columns=["t"],
    )
    assert splits.classes == ("negative", "positive") and splits.columns == ("sentence",)


def test_k_shot_validation_has_k_rows_a_class_whatever_the_limit(tmp_path):
    path = write(tmp_path / "train.csv", rows_of())
    columns: dict[str, Any] = {"text_columns": ["review"], "label_column": "verdict"}
    whole = load_splits(data=path, k=5, **columns)
    few = load_splits(data=path, k=5, validation_rows=4, **columns)
    assert len(whole.validation) == 10 and few.validation == whole.validation and few.train == whole.train


def test_a_file_that_leaves_no_row_to_train_on_is_named_as_the_cause(tmp_path):
    path, other = write(tmp_path / "train.csv", rows_of()), write(tmp_path / "test.csv", rows_of(4))
    columns: dict[str, Any] = {"data": path, "text_columns": ["review"], "label_column": "verdict"}
    with pytest.raises(DataError, match=r"train\.csv: every row of it is a validation row too; give diff"):
        load_splits(validation_data=path, **columns)
    with pytest.raises(DataError, match="every row of it is a test or a validation row too"):
        load_splits(validation_data=path, test_data=other, **columns)
    for settings in ({}, {"k": 2}):
        with pytest.raises(DataError, match="every row of it is a test row too"):
            load_splits(test_data=path, **settings, **columns)


def test_own_tasks_take_class_names_as_words(roberta):
    task = own_task("reviews.csv", ["review"], ["bad", "good"])
    prompt = task.prompt(roberta, masked=True)
    assert prompt.encode([Example(("fine",), 1)])[0]["label"] == 1
    assert (
        task.changed(template="{mask}: {review}", words=["Bad", "Good"])
        .prompt(roberta, masked=True)
        .label_ids
        != prompt.label_ids
    )


def test_classes_are_ordered_by_size_or_alphabet_or_as_given(tmp_path):
    rows = [{"text": f"text {i}", "label": (10, 2, 1)[i % 3]} for i in range(9)]
    assert load_file(write(tmp_path / "a.json", rows), ["text"], "label")[1] == ("1", "2", "10")
    examples, classes = load_file(tmp_path / "a.json", ["text"], "label", ["10", "2", "1"])
    assert classes == ("10", "2", "1") and [e.label for e in examples[:3]] == [0, 1, 2]
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(9)]
    examples, _ = load_file(write(tmp_path / "b.csv", rows), ["text"], "label", ["no", "yes"])
    assert [e.label for e in examples[:2]] == [0, 1]  # integers are places in a list of names


def test_quotes_line_breaks_and_byte_order_marks_are_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext,label\r\n"a ""b"", c\nd",x\r\n\r\ne\xe2\x80\xa8f,y\r\n')
    examples, _ = load_file(path, ["text"], "label")
    assert [e.texts[0] for e in examples] == ['a "b", c\nd', "e\u2028f"]


def test_texts_to_predict(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\ntwo\tand\n")
    assert read_texts(tmp_path / "a.txt", ["sentence"]) == [("one",), ("two\tand",)]
    (tmp_path / "b.txt").write_text("one\ta\ntwo\tb")
    assert read_texts(tmp_path / "b.txt", ["x", "y"]) == [("one", "a"), ("two", "b")]
    for content, message in (
        (b"one\ta\ntwo\n", "line 2: 1 texts, but 2 are needed"),
        (b" \n", "standard input is empty"),
    ):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))
        with pytest.raises(DataError, match=message):
            read_texts("-", ["x", "y"])
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO("ä\nb\n".encode())))
    assert read_texts(None, ["x"]) == [("ä",), ("b",)]


GOOD = b"text,label\nfine film,1\ndull film,0\n"
HEAD = b'[{"text": "a", "label": 0},\n'
BAD_FILES = {
    # name: (file name, content, what the message must have)
    "empty": ("a.csv", b"", "the file is empty"),
    "blank": ("a.jsonl", b"\n \n", "the file is empty"),
    "header only": ("a.csv", b"text,label\n", "no row of data"),
    "header only tsv": ("a.tsv", b"text\tlabel\n", "no row of data"),
    "empty list": ("a.json", b"[]", "no row of data"),
    "missing column": (
        "a.csv",
        b"text,lable\nx,1\ny,0\n",
        "no column 'label'; did you mean 'lable'? known: text, lable",
    ),
    "semicolons": ("a.csv", b"text;label\nx;1\n", "separated by ';'"),
    "semicolons and quotes": (
        "a.csv",
        b'text;label\n"x";1\n',
        "line 2: the fields seem to be separated by ';', not by commas; save the file with commas",
    ),
    "semicolons and a quoted header": ("a.csv", b'"text";"label"\n"x";1\n', "line 1: the fields seem to be"),
    "semicolons and a comma": (
        "a.csv",
        b"text;label\na, b;1\n",
        "but the header has 1; the fields seem to be separated by ';'",
    ),
    "tsv without tabs": ("a.tsv", b"text,label\nx,1\n", "no tab in it"),
    "no header": ("a.csv", b"fine film,1\ndull film,0\n", "no column 'text'"),
    "column twice": (
        "a.csv",
        b"text,label,text\nx,1,y\n",
        "line 1: the column 'text' is there more than once",
    ),
    "extra fields": ("a.csv", GOOD + b"a,1,2,3\n", "line 4: 4 fields, but the header has 2"),
    "short row": ("a.csv", GOOD + b"alone\n", "line 4: 1 fields, but the header has 2"),
    "tab in a text": ("a.tsv", b"label\ttext\n0\ta\tb\n", "line 2: 3 fields"),
    "open quote": (
        "a.csv",
        GOOD + b'"never closed,1\nmore,0\n',
        "line 4: a quote that opens in this row is never closed",
    ),
    "text behind a quote": ("a.csv", GOOD + b'"a "b" c",1\n', "line 4: not valid csv"),
    "one class": ("a.csv", b"text,label\nx,1\ny,1\n", "all rows have the label '1'"),
    "null label": ("a.csv", GOOD + b"x,\n", "line 4: the label in 'label' is missing ('')"),
    "NaN label": ("a.csv", GOOD + b"x,NaN\n", "line 4: the label in 'label' is missing ('NaN')"),
    "fraction": ("a.csv", GOOD + b"x,1.5\n", "line 4: the label '1.5' in 'label' is a fraction"),
    "negative": ("a.csv", GOOD + b"x,-1\n", "line 4: the label '-1' in 'label' is negative"),
    "name among numbers": (
        "a.csv",
        GOOD * 1 + b"x,good\n",
        "line 4: the labels in 'label' are numbers in some rows",
    ),
    "labels are texts": (
        "a.csv",
        b"text,label\n" + b"".join(b"t %d,some words %d\n" % (i, i) for i in range(30)),
        "30 different labels in 30 rows",
    ),
    "null text": ("a.csv", GOOD + b" ,1\n", "line 4: 'text' is empty"),
    "not UTF-8": ("a.csv", GOOD + b"caf\xe9,1\n", "line 4: byte 38 (0xe9) is not UTF-8"),
    "not UTF-8 after a mark": ("a.csv", b"\xef\xbb\xbftext,label\n\xff,1\n", "line 2: byte 14 (0xff)"),
    "UTF-16": ("a.csv", GOOD.decode().encode("utf-16"), "UTF-16"),
    "NUL": ("a.tsv", b"label\ttext\n0\ta\x00b\n", "line 2: there is a NUL"),
    "endless field": ("a.csv", GOOD + b"x" * 1_100_000 + b",1\n", "line 4: a text is longer than 1,000,000"),
    "endless line": (
        "a.jsonl",
        b'{"text": "' + b"x" * 10_000_000 + b'", "label": 1}\n',
        "line 1: 'text' has 10,000,000 characters",
    ),
    "truncated json": ("a.json", HEAD + b'{"text": "b", "la', "row 2 (line 2): not valid JSON"),
    "truncated list": ("a.json", HEAD + b'{"text": "b", "label": 1}\n', "the list is never closed"),
    "truncated behind a comma": ("a.json", HEAD, "row 2 (line 2): not valid JSON, the list is never closed"),
    "no comma": ("a.json", b'[{"text": "b", "label": 1} {"text": "c"}]', "where a comma or ] should be"),
    "behind the list": ("a.json", b'[{"text": "b", "label": 1}] x', "more behind the list"),
    "one object": (
        "a.json",
        b'{"text": ["a"], "label": [0]}',
        "must be one list of objects (a file with an object on each line",
    ),
    "list of texts": (
        "a.json",
        b'["a", "b"]',
        "row 1 (line 1): a string where an object of columns should be",
    ),
    "keys twice": (
        "a.json",
        HEAD + b'{"text": "a", "label": 0, "text": "b"}]',
        "row 2 (line 2): the key 'text' is there twice",
    ),
    "keys twice in a line": (
        "a.jsonl",
        b'{"text": "a", "label": 0, "text": "b"}\n',
        "line 1: the key 'text' is there twice",
    ),
    "truncated line": (
        "a.jsonl",
        b'{"text": "a", "label": 0}\n{"text": "b", "la\n',
        "line 2: not valid JSON",
    ),
    "two objects in a line": (
        "a.jsonl",
        b'{"text": "a", "label": 0} {"text": "b"}\n',
        "line 1: there is more behind",
    ),
    "nested": ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: not usable JSON (it is nested too deeply)"),
    "huge number": ("a.jsonl", b'{"text": "a", "label": ' + b"1" * 5000 + b"}", "line 1: not usable JSON"),
    "json null text": (
        "a.jsonl",
        b'{"text": "a", "label": 0}\n{"text": null, "label": 1}\n',
        "line 2: 'text' is null, not a text",
    ),
    "json number as text": (
        "a.jsonl",
        b'{"text": 3, "label": 0}\n',
        "line 1: 'text' is an integer, not a text",
    ),
    "json NaN": ("a.jsonl", b'{"text": "a", "label": NaN}\n', "line 1: the label in 'label' is NaN"),
    "json float": (
        "a.jsonl",
        b'{"text": "a", "label": 1.0}\n',
        "line 1: the label 1.0 in 'label' is a float",
    ),
    "json null label": ("a.jsonl", b'{"text": "a", "label": null}\n', "line 1: the label in 'label' is null"),
    "json mixed": (
        "a.jsonl",
        b'{"text": "a", "label": 0}\n{"text": "b", "label": "0"}\n',
        "line 2: the label '0' in 'label' is a string",
    ),
    "json key lacking": (
        "a.jsonl",
        b'{"text": "a", "label": 0}\n{"text": "b"}\n',
        "line 2: there is no 'label' in this row",
    ),
    "json NUL": ("a.jsonl", b'{"text": "a\\u0000", "label": 0}\n', "line 1: 'text' has a NUL"),
    "half surrogate": (
        "a.jsonl",
        b'{"text": "a\\ud800", "label": 0}\n',
        "line 1: 'text' has half of a surrogate pair",
    ),
    "not parquet": ("a.parquet", b"text,label\n", "not a usable parquet file"),
    "cut parquet": ("a.parquet", b"PAR1" + b"\x00" * 40 + b"PAR1", "not a usable parquet file"),
    "suffix": ("a.xlsx", b"PK\x03\x04", "files that end in '.xlsx' are not read"),
    "archive": ("a.csv.gz", b"\x1f\x8b", "files that end in '.gz' are not read"),
    "no suffix": ("data", b"text\n", "files that end in 'nothing' are not read"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_with_place_cause_and_remedy(tmp_path, case):
    name, content, expected = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_file(path, ["text"], "label")
    message = str(caught.value)
    assert expected in message
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 600
    assert ";" in message.removeprefix(str(path))  # the way out stands behind a semicolon
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_damaged_files_are_read_or_refused_never_worse(tmp_path, suffix):
    """Whatever bytes are in a file, reading it returns examples or raises DataError."""
    random = Random(suffix)
    whole = write(tmp_path / f"whole{suffix}", rows_of(8)).read_bytes()
    path = tmp_path / f"damaged{suffix}"
    for _ in range(120):
        data = bytearray(whole)
        for _ in range(random.randint(1, 3)):
            at = random.randrange(len(data))
            match random.randrange(4):
                case 0:
                    data[at] = random.randrange(256)
                case 1:
                    del data[at : at + random.randint(1, 9)]
                case 2:
                    data[at:at] = random.choice([b'"', b"\n", b",", b"\t", b"{", b"]", b"\\", b"\r", b"null"])
                case _:
                    del data[at:]
            data = data or bytearray(b"x")
        path.write_bytes(data)
        try:
            examples, classes = load_file(path, ["review"], "verdict")
        except DataError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            assert all(0 <= e.label < len(classes) and e.texts[0].strip() for e in examples)


def test_paths_that_are_no_files_are_refused(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "train.csv").write_bytes(GOOD)
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    for name, message in (
        ("folder.csv", "this is a folder"),
        ("trian.csv", "no such file; did you mean 'train.csv'"),
        ("pipe.csv", "not a regular file"),
        ("loop.csv", "cannot be read"),
        ("a\0b.csv", "cannot be read"),
        ("no/such.csv", "no such file; check the path$"),
    ):
        with pytest.raises(DataError, match=message):
            load_file(tmp_path / name, ["text"], "label")
    if os.geteuid() != 0:
        (tmp_path / "train.csv").chmod(0)
        with pytest.raises(DataError, match="Permission denied"):
            load_file(tmp_path / "train.csv", ["text"], "label")


def test_parquet_with_other_columns_or_text_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", [{"x": 1, "label": 0}, {"x": 2, "label": None}])
    with pytest.raises(DataError, match="no column 'text'"):
        load_file(path, ["text"], "label")
    with pytest.raises(DataError, match="row 1: 'x' is an integer"):
        load_file(path, ["x"], "label")
    path = write(tmp_path / "b.parquet", [{"text": "a", "label": 0}, {"text": "b", "label": None}])
    with pytest.raises(DataError, match="row 2: the label in 'label' is null"):
        load_file(path, ["text"], "label")


def test_labels_that_training_does_not_know_are_refused(tmp_path):
    train = write(tmp_path / "train.csv", rows_of())
    odd = write(tmp_path / "test.csv", [*rows_of(3), {"review": "x", "verdict": "goood", "extra": ""}])
    columns: dict[str, Any] = {"text_columns": ["review"], "label_column": "verdict"}
    with pytest.raises(DataError, match=r"test\.csv, line 5: the label 'goood' .* did you mean 'good'"):
        load_splits(data=train, test_data=odd, **columns)
    numbers = write(tmp_path / "numbers.csv", [{"review": "x", "verdict": 1, "extra": ""}])
    with pytest.raises(DataError, match="the label '1' in 'verdict' is not one of the classes"):
        load_splits(data=train, test_data=numbers, **columns)
    with pytest.raises(
        DataError, match="line 2: the label 'bad' in 'verdict' is not one of the classes; known: no, yes"
    ):
        load_splits(data=train, classes=["no", "yes"], **columns)
    with pytest.raises(DataError, match="class 'fair' has 0 different rows"):
        load_splits(data=train, classes=["bad", "fair", "good"], **columns)
    few = write(tmp_path / "few.csv", rows_of(2))
    more = write(tmp_path / "more.csv", rows_of(4))
    with pytest.raises(DataError, match="no training row is of class 'fair'"):
        three = ["bad", "fair", "good"]
        load_splits(data=train, test_data=few, validation_data=more, classes=three, **columns)
    with pytest.raises(DataError, match="asked for twice"):
        load_file(train, ["review", "review"], "verdict")


def test_the_csv_module_keeps_its_field_limit(tmp_path):
    import csv

    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_bytes(GOOD + b'"open')
    with pytest.raises(DataError):
        load_file(tmp_path / "a.csv", ["text"], "label")
    assert csv.field_size_limit() == before


def test_importing_tasks_is_light():
    """The command line lists tasks without loading torch, transformers or datasets."""
    code = (
        "import sys, types; package = types.ModuleType('zolr'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['zolr'] = package; import zolr.tasks; "
        "print([m for m in ('torch', 'numpy', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(PACKAGE)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_demo_questions_come_with_the_package():
    splits = load_splits("questions")
    assert splits.classes == ("person", "place", "number", "time", "thing", "reason")
    parts = [{e.texts for e in part} for part in (splits.train, splits.validation, splits.test)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert {e.label for e in splits.train} == set(range(6))
    assert len(load_splits("questions", k=16).train) == 96
