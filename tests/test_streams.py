"""Laws of token streams: no id is lost or invented, and a batch is a function of (seed, step)."""

import json
import lzma

import numpy as np
import pytest
import torch

from zolr.errors import DataError
from zolr.tasks.shards import pack
from zolr.tasks.streams import IGNORED, MASK, PAD, UNKNOWN, TokenStream, train_tokenizer
from zolr.tasks.texts import END, documents, text_files

WORDS = "the cat sat on a mat and who knows why it was there at noon with seven other cats".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with two training files, one of them compressed, a held-out and a test file."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)

    def text(documents_count):
        parts = []
        for _ in range(documents_count):
            lines = [" ".join(rng.choice(WORDS, size=rng.integers(3, 12))) for _ in range(rng.integers(1, 4))]
            parts.append("\n".join(lines))
        return "\n\n".join(parts) + "\n"

    (folder / "b-train.txt").write_text(text(40), encoding="utf-8")
    (folder / "a-train.txt.xz").write_bytes(lzma.compress(text(40).encode()))
    (folder / "valid.txt").write_text(text(10), encoding="utf-8")
    (folder / "test.txt").write_text(text(10), encoding="utf-8")
    (folder / "notes.md").write_text("not a text file of the corpus", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = train_tokenizer(text_files([corpus])[0], 300, tmp_path_factory.mktemp("tokenizer"))
    return AutoTokenizer.from_pretrained(folder)


def stream_of(ids, **changes):
    settings = dict(length=4, batch_size=3, seed=7, mask_id=1, special_ids=(0, 1), vocab_size=50)
    return TokenStream(np.asarray(ids, dtype=np.uint16), **{**settings, **changes})


# files and documents


def test_folders_are_searched_and_held_out_files_kept_apart(corpus):
    train, held_out = text_files([corpus])
    assert [file.name for file in train] == ["a-train.txt.xz", "b-train.txt"]
    assert [file.name for file in held_out] == ["valid.txt"]
    assert [file.name for file in text_files([corpus / "test.txt"])[0]] == ["test.txt"]


def test_documents_end_at_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"\n\none\nstill one\n \n\ntwo\n{END}\nthree", encoding="utf-8")
    assert list(documents([path])) == ["one\nstill one", "two", "three"]


def test_a_file_ends_its_last_document(tmp_path):
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "b.txt").write_text("two\n", encoding="utf-8")
    assert list(documents(text_files([tmp_path])[0])) == ["one", "two"]


def test_long_documents_pass_whole(tmp_path):
    path = tmp_path / "a.txt"
    lines = ["x" * 30_000, "y" * 200_000, "z" * 70_000]
    path.write_text("\n".join(lines) + "\n\nend\n", encoding="utf-8")
    assert list(documents([path])) == ["\n".join(lines), "end"]


# tokenizer


def test_tokenizer_loses_no_text(tokenizer):
    for text in ("the cat sat", "Żółw, 亀 and 🐢!\n\ttabs  and   spaces", 'quotes "so" and <|x|>'):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).lstrip(" ") == text


def test_tokenizer_names_its_special_tokens(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (END, END, PAD)
    assert (tokenizer.unk_token, tokenizer.mask_token) == (UNKNOWN, MASK)
    assert tokenizer("cat")["input_ids"][0] == tokenizer.bos_token_id
    assert len(tokenizer) == 300


def test_a_word_has_one_id_wherever_it_stands(tokenizer):
    first, inside = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("cat", "the cat"))
    assert inside[-len(first) :] == first


def test_tokenizer_survives_saving_again(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "who knows why it was there"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_tokenizer_is_the_same_when_learned_again(corpus, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(train_tokenizer(text_files([corpus])[0], 300, tmp_path))
    assert again.get_vocab() == tokenizer.get_vocab()


def test_tokenizer_needs_room_for_bytes(corpus, tmp_path):
    with pytest.raises(DataError, match="259 tokens"):
        train_tokenizer(text_files([corpus])[0], 259, tmp_path / "out")


# ids


def ids_of(texts, tokenizer):
    """One document after the other, each with its end."""
    found = []
    for text in texts:
        found += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return found


def test_ids_are_the_documents_with_an_end_after_each(corpus, tokenizer):
    files, _ = text_files([corpus])
    packed = pack(files, tokenizer)
    assert np.asarray(packed.ids).dtype == np.uint16
    assert np.asarray(packed.ids).tolist() == ids_of(documents(files), tokenizer)


# batches


def test_causal_labels_are_the_next_ids():
    stream = stream_of(range(2, 50))
    for step in range(10):
        batch = stream.batch(step)
        assert batch["input_ids"].shape == batch["labels"].shape == (3, 4)
        assert torch.equal(
            batch["labels"], batch["input_ids"] + 1
        )  # ids count up, so the next one is one more


def test_an_epoch_shows_every_row_once():
    stream = stream_of(range(2, 2 + 4 * 11 + 1))  # 11 rows, batches of 3: batches cross epochs
    assert stream.rows == 11
    first = torch.cat([stream.batch(step)["input_ids"] for step in range(11)])[:, 0]  # three epochs
    epochs = first.reshape(3, 11)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(2, 2 + 44, 4))
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_a_batch_is_a_function_of_seed_and_step(objective):
    ids = np.arange(2, 402) % 50
    steps = [0, 1, 57, 3, 1, 200]
    one, other = stream_of(ids, objective=objective), stream_of(ids, objective=objective)
    in_order = {step: one.batch(step) for step in range(201)}
    for step in steps:  # as after a resume: asked out of order, of a stream that has given nothing yet
        batch = other.batch(step)
        assert torch.equal(batch["input_ids"], in_order[step]["input_ids"])
        assert torch.equal(batch["labels"], in_order[step]["labels"])
    assert not torch.equal(
        stream_of(ids, objective=objective, seed=8).batch(0)["input_ids"], in_order[0]["input_ids"]
    )


def test_batches_leave_global_randomness_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    stream_of(range(2, 50), objective="mlm").batch(5)
    assert torch.equal(torch.rand(4), expected)


def test_masked_labels_are_the_hidden_ids():
    rng = np.random.default_rng(1)
    ids = rng.integers(2, 1000, size=20_000)
    ids[::10] = 0
    stream = stream_of(ids, objective="mlm", length=100, batch_size=200, vocab_size=1000)
    batch, order = stream.batch(0), stream._order(0)
    rows = torch.from_numpy(ids.reshape(200, 100))[order]
    shown, labels = batch["input_ids"], batch["labels"]
    counted = labels != IGNORED
    assert torch.equal(labels[counted], rows[counted])
    assert torch.equal(shown[~counted], rows[~counted])
    assert not counted[rows == 0].any()  # special tokens are never asked for
    n, k = int((rows != 0).sum()), int(counted.sum())

    def near(count, total, share):
        assert abs(count - total * share) < 5 * (total * share * (1 - share)) ** 0.5

    near(k, n, 0.15)
    near(
        int((shown[counted] == 1).sum()), k, 0.8 + 0.1 * 2 / 1000
    )  # a special random token is shown as the mask
    near(int((shown[counted] == rows[counted]).sum()), k, 0.1 + 0.1 / 1000)
    assert not (shown[counted] == 0).any()


def test_tiny_masked_batches_ask_for_something():
    stream = stream_of(range(2, 40), objective="mlm", length=2, batch_size=1)
    assert all((stream.batch(step)["labels"] != IGNORED).any() for step in range(50))


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_held_out_rows_are_never_trained_on(objective):
    stream = stream_of(range(2, 2 + 4 * 20 + 1), objective=objective)
    train, held_out = stream.hold_out(5)
    assert (train.rows, held_out.rows) == (15, 5)
    seen = {int(i) for step in range(5) for i in train.batch(step)["input_ids"].flatten()}
    kept = {int(i) for i in held_out.ids[: 4 * 5]}
    assert not (seen - {0, 1}) & kept or objective == "mlm"  # masked rows also show random tokens
    if objective == "clm":
        shown = torch.cat([batch["input_ids"] for batch in held_out.evaluation()])
        assert {int(i) for i in shown.flatten()} == kept


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_evaluation_is_the_same_every_time(objective):
    stream = stream_of(np.arange(2, 202) % 50, objective=objective)
    first, second = list(stream.evaluation(7)), list(stream.evaluation(7))
    assert sum(len(batch["labels"]) for batch in first) == 7
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"]) and torch.equal(
            one["labels"], other["labels"]
        )


# errors


def test_errors_name_the_file_and_the_way_out(tmp_path, tokenizer):
    def written(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    whole = lzma.compress(b"some text\n" * 1000)
    cases = {
        "binary": (written("binary.txt", b"text\0more"), "null bytes"),
        "latin": (written("latin.txt", "caf\xe9".encode("latin-1")), "not UTF-8"),
        "empty": (written("empty.txt", b""), "no text"),
        "blank": (written("blank.txt", b"\n \n\n"), "no text"),
        "cut": (written("cut.txt.xz", whole[:-20]), "damaged"),
        "fake": (written("fake.txt.xz", b"plain text"), "damaged"),
        "absent": (tmp_path / "absent.txt", "cannot be read"),
    }
    for path, message in cases.values():
        with pytest.raises(DataError, match=message) as caught:
            pack([path], tokenizer)
        assert path.name in str(caught.value)
        with pytest.raises(DataError, match=message):
            train_tokenizer([path], 300, tmp_path / "out")
    with pytest.raises(DataError, match="no file or folder"):
        text_files([tmp_path / "nowhere"])
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="no .txt"):
        text_files([tmp_path / "void"])


def test_streams_refuse_what_they_cannot_do():
    with pytest.raises(DataError, match="4 tokens do not fill one row of 4"):
        stream_of(range(2, 6))
    assert stream_of(range(2, 6), objective="mlm").rows == 1  # no target after the last position is needed
    with pytest.raises(DataError, match="mask token"):
        stream_of(range(2, 50), objective="mlm", mask_id=None)
    with pytest.raises(DataError, match="'lm' is none of clm, mlm"):
        stream_of(range(2, 50), objective="lm")
    with pytest.raises(DataError, match="negative"):
        stream_of(range(2, 50)).batch(-1)
    with pytest.raises(DataError, match="cannot hold out 11"):
        stream_of(range(2, 2 + 4 * 11 + 1)).hold_out(11)


# the verb that trains on them


def pretrained(folder, corpus, *more):
    from zolr.cli import main

    numbers = (
        "--train-tokenizer --vocab-size 300 --hidden-size 16 --heads 2 --layers 1 --length 16 --batch-size 4"
    )
    course = "--lr 0.01 --schedule wsd --warmup 1 --threads 1 --device cpu --save-every 2 --eval-rows 8 --quiet --json"
    return main(
        ["pretrain", "--data", str(corpus), "--output", str(folder), *numbers.split(), *course.split(), *more]
    )


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_pretraining_gives_a_folder_that_transformers_loads(objective, corpus, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    assert pretrained(tmp_path / "run", corpus, "--steps", "20", "--objective", objective) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["after"] < result["before"]
    assert result["tokens_seen"] == 20 * 4 * 16
    auto = AutoModelForCausalLM if objective == "clm" else AutoModelForMaskedLM
    model = auto.from_pretrained(tmp_path / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    held_out = TokenStream.of_text(
        [corpus / "valid.txt"], tokenizer, length=16, batch_size=4, objective=objective
    )
    losses = []
    with torch.no_grad():
        for batch in held_out.evaluation(8):
            logits, labels = (
                model(input_ids=batch["input_ids"]).logits.flatten(0, 1),
                batch["labels"].flatten(),
            )
            losses.append(
                (
                    torch.nn.functional.cross_entropy(logits, labels, reduction="sum"),
                    (labels != IGNORED).sum(),
                )
            )
    mean = sum(float(part) for part, _ in losses) / sum(int(count) for _, count in losses)
    assert mean == pytest.approx(result["after"], rel=1e-5)


@pytest.mark.parametrize("method", ["adamw", "muon", "stiefel"])
def test_pretraining_resumed_is_pretraining_uninterrupted(method, corpus, tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file

    more = ["--method", method, *(["--rank", "4", "--refresh-every", "3"] if method == "stiefel" else [])]
    assert pretrained(tmp_path / "whole", corpus, "--steps", "8", *more) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-6")  # as if it had been stopped in step 5
    (tmp_path / "resumed" / "model.safetensors").unlink()
    assert pretrained(tmp_path / "resumed", corpus, "--steps", "8", *more, "--resume") == 0
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_wsd_may_be_given_another_end_until_it_falls():
    from zolr.cli.pretrain import Pretrain, schedule

    long, short = (
        schedule(Pretrain(steps=steps, warmup=5, schedule="wsd", decay=0.25)) for steps in (200, 100)
    )
    assert [long(step) for step in range(76)] == [short(step) for step in range(76)]
    assert short(100) == 0 and short(76) < 1


def test_pretraining_says_what_is_wrong(corpus, tmp_path, capsys):
    from zolr.cli import main

    def complaint(*arguments):
        code = main(["pretrain", "--output", str(tmp_path / "run"), *arguments])
        return code, capsys.readouterr().err

    data = ["--data", str(corpus)]
    assert complaint() == (2, "error: nothing to train on; give --data FILE or --data FOLDER\n")
    for arguments, code, words in (
        (["--data", str(tmp_path / "nowhere"), "--train-tokenizer"], 3, "nowhere"),
        (data, 2, "--train-tokenizer"),
        ([*data, "--heads", "7", "--train-tokenizer"], 2, "--heads"),
        ([*data, "--method", "adam", "--train-tokenizer"], 2, "adamw"),
        ([*data, "--length", "100000", "--train-tokenizer"], 3, "do not fill one row"),
    ):
        found, message = complaint(*arguments)
        assert (found, message.count("\n")) == (code, 1), message
        assert words in message
    assert not (tmp_path / "run").exists()
