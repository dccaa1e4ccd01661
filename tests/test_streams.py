"""Laws of token streams: no id is lost or invented, and a batch is a function of (seed, step)."""

import json
import lzma
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import begun

from zolr.errors import DataError
from zolr.tasks.shards import pack
from zolr.tasks.streams import IGNORED, MASK, PAD, UNKNOWN, TokenStream, ahead, train_tokenizer
from zolr.tasks.texts import END, documents, sources

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

    folder = train_tokenizer(sources([corpus])[0], 300, tmp_path_factory.mktemp("tokenizer"))
    return AutoTokenizer.from_pretrained(folder)


def stream_of(ids, **changes):
    settings = dict(length=4, batch_size=3, seed=7, mask_id=1, special_ids=(0, 1), vocab_size=50)
    return TokenStream(np.asarray(ids, dtype=np.uint16), **{**settings, **changes})


# files and documents


def test_folders_are_searched_and_held_out_files_kept_apart(corpus):
    train, held_out = sources([corpus])
    assert [file.name for file in train] == ["a-train.txt.xz", "b-train.txt"]
    assert [file.name for file in held_out] == ["valid.txt"]
    assert [file.name for file in sources([corpus / "test.txt"])[0]] == ["test.txt"]


def test_documents_end_at_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"\n\none\nstill one\n \n\ntwo\n{END}\nthree", encoding="utf-8")
    assert list(documents([path])) == ["one\nstill one", "two", "three"]


def test_a_file_ends_its_last_document(tmp_path):
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "b.txt").write_text("two\n", encoding="utf-8")
    assert list(documents(sources([tmp_path])[0])) == ["one", "two"]


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

    again = AutoTokenizer.from_pretrained(train_tokenizer(sources([corpus])[0], 300, tmp_path))
    assert again.get_vocab() == tokenizer.get_vocab()


def test_tokenizer_needs_room_for_bytes(corpus, tmp_path):
    with pytest.raises(DataError, match="259 tokens"):
        train_tokenizer(sources([corpus])[0], 259, tmp_path / "out")


# ids


def ids_of(texts, tokenizer):
    """One document after the other, each with its end."""
    found = []
    for text in texts:
        found += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return found


def test_ids_are_the_documents_with_an_end_after_each(corpus, tokenizer):
    files, _ = sources([corpus])
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


@pytest.mark.parametrize("objective", ["clm", "mlm"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_parts_of_ranks_are_the_batch(objective, world_size):
    stream = stream_of(np.arange(2, 402) % 50, objective=objective, batch_size=6)
    for step in (0, 7, 40):
        whole = stream.batch(step)
        parts = [stream.batch(step, rank=rank, world_size=world_size) for rank in range(world_size)]
        for name, value in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), value)


def test_batches_made_ahead_are_the_batches():
    stream = stream_of(np.arange(2, 402) % 50)
    asked = []

    def batch_of_step(step):
        asked.append(step)
        return stream.batch(step)

    order = [
        5,
        6,
        6,
        7,
        3,
        8,
        9,
        20,
        21,
    ]  # as a run goes that repeats a step, and one that is resumed elsewhere
    for workers in (0, 1, 3):
        asked.clear()
        with ahead(batch_of_step, workers, 22) as batches:
            for step in order:
                assert torch.equal(batches(step)["input_ids"], stream.batch(step)["input_ids"])
        assert max(asked) == 21 and {*order} <= {*asked}
        if workers:  # only what was asked for out of order, and what was ready then
            assert asked.count(6) == asked.count(7) == asked.count(9) == asked.count(21) == 1


def test_an_error_of_a_batch_made_ahead_comes_out_at_its_step():
    def batch_of_step(step):
        if step == 3:
            raise DataError("step 3 cannot be made")
        return step

    with ahead(batch_of_step, 2) as batches:
        assert [batches(step) for step in range(3)] == [0, 1, 2]
        with pytest.raises(DataError, match="step 3"):
            batches(3)


def test_positions_begin_again_at_every_boundary():
    stream = stream_of([9, 8, 0, 7, 6, 5, 0, 0, 4, 3, 2, 9, 9], length=6, batch_size=2, reset=0)
    (batch,) = stream.evaluation()
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[8, 0, 7, 6, 5, 0], [0, 4, 3, 2, 9, 9]]  # all of them count
    assert "position_ids" not in stream_of(range(2, 50)).batch(0)


def test_documents_apart_are_read_as_if_they_were_alone():
    from zolr.models import build, lm_loss

    numbers = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = build("llama-20m", vocab_size=50, **numbers).eval()
    rng = np.random.default_rng(0)
    texts = [[0, *rng.integers(2, 50, size)] for size in (5, 9, 3, 7)]
    ids = np.concatenate(texts)
    whole = stream_of([*ids, 0], length=len(ids), batch_size=1, reset=0)
    with torch.no_grad():
        total, count = lm_loss(model, next(whole.evaluation()))
        alone = 0.0
        for text in texts:
            row = torch.tensor([[*text, 0]])
            alone += float(lm_loss(model, {"input_ids": row[:, :-1], "labels": row[:, 1:]})[0])
    assert int(count) == len(ids) and float(total) == pytest.approx(alone, rel=1e-5)


def test_evaluation_does_not_go_by_seed_or_batch_size():
    ids = np.arange(2, 402) % 50
    for objective in ("clm", "mlm"):
        found = [
            torch.cat(
                [
                    b["input_ids"]
                    for b in stream_of(ids, objective=objective, seed=s, batch_size=n).evaluation(9)
                ]
            )
            for s, n in ((0, 1), (5, 4), (7, 9))
        ]
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


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
        "binary": (written("binary.txt", b"text\nis\0more"), "a null byte at byte 7, in line 2"),
        "latin": (
            written("latin.txt", "a caf\xe9 is".encode("latin-1")),
            "not UTF-8 .*byte at byte 5, in line 1",
        ),
        "short": (written("short.txt", "a caf\xe9".encode()[:-1]), "not UTF-8 .*at byte 5, in line 1"),
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
        sources([tmp_path / "nowhere"])
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="no .txt"):
        sources([tmp_path / "void"])


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_the_first_wrong_byte_of_a_file_is_found(suffix, tmp_path):
    import gzip

    pack_ = {
        "": bytes,
        ".gz": lambda data: gzip.compress(data, 1),
        ".xz": lambda data: lzma.compress(data, preset=0),
    }
    # a character of two bytes lies across what is read at once
    text = "x" * ((1 << 20) - 1) + "\xe9\n" * 3
    path = tmp_path / f"late.txt{suffix}"
    unpacked = " of what it unpacks to" if suffix else ""
    for wrong, why in ((b"\xff\0", "invalid start byte"), (b"\0\xff", "a null byte")):
        path.write_bytes(pack_[suffix](text.encode() + wrong + b"more"))
        with pytest.raises(DataError, match=f"{why} at byte 1,048,584{unpacked}, in line 4"):
            list(documents([path]))


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
    with pytest.raises(DataError, match="rank 1 of 2 has no equal part of 3 rows"):
        stream_of(range(2, 50)).batch(0, rank=1, world_size=2)
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
    ids = pack([corpus / "valid.txt"], tokenizer)
    held_out = TokenStream.of_ids(ids, tokenizer, length=16, batch_size=4, objective=objective)
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
    for name in ("model.safetensors", "result.json"):
        (tmp_path / "resumed" / name).unlink()
    assert pretrained(tmp_path / "resumed", corpus, "--steps", "8", *more, "--resume") == 0
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


ROWS = "stiefel:fo dependent:fo galore:fo gum:fo mofasgd:fo adalomo:fo badam:fo muon:fo stiefel:fwd mezo:zo"


@pytest.mark.slow
def test_rows_of_every_kind_pretrain_with_clipping_decay_and_accumulation(corpus, tmp_path, capsys):
    for row in ROWS.split():
        name, paradigm = row.split(":")
        given = ["--method", name, "--paradigm", paradigm, "--steps", "2", "--hidden-size", "40"]
        given += ["--clip", "1", "--accumulate", "2", "--weight-decay", "0.01", "--eval-rows", "2"]
        code = pretrained(tmp_path / row.replace(":", "-"), corpus, *given)
        out, err = capsys.readouterr()
        assert code == 0, (name, paradigm, err)
        assert json.loads(out)["steps"] == 2 and json.loads(out)["paradigm"] == paradigm


@pytest.mark.slow
def test_laws_of_subspaces_are_compared_by_one_flag(corpus, tmp_path, capsys):
    losses = {}
    for law in ("stiefel", "dependent", "gaussian", "coordinate", "plumage"):
        given = [
            "--method",
            "galore",
            "--projector",
            law,
            "--rank",
            "4",
            "--refresh-every",
            "2",
            "--steps",
            "5",
        ]
        code = pretrained(tmp_path / law, corpus, *given, "--diagnose-every", "5", "--diagnose-draws", "4")
        out, err = capsys.readouterr()
        assert code == 0, (law, err)
        losses[law] = json.loads(out)["after"]
        lines = map(json.loads, (tmp_path / law / "metrics.jsonl").read_text().splitlines())
        (found,) = (line["diagnosis"]["projected"] for line in lines if "diagnosis" in line)
        assert 0 < found["energy"] < 1 and found["variance"] > 0
        assert abs(found["gain"] - 1) < 6 * found["gain_error"] + 1e-6, law  # all of them are unbiased
    assert len(set(losses.values())) == 5


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(corpus, tmp_path):
    from zolr.cli import main

    command = ["pretrain", "--data", str(corpus), "--train-tokenizer"]
    command += "--vocab-size 300 --hidden-size 32 --heads 2 --layers 2 --length 16 --batch-size 4".split()
    command += "--schedule cosine --warmup 3 --threads 1 --device cpu --save-every 7 --eval-rows 8".split()
    command += ["--steps", "40", "--rank", "4", "--refresh-every", "5", "--quiet", "--lr", "0.01", "--method"]
    command += "galore --documents apart --clip 0.5 --accumulate 2".split()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*command, "--output", str(whole)]) == 0
    nowhere = Path(os.devnull)
    process = begun("zolr", [*command, "--output", str(killed)], {}, nowhere, nowhere)
    wait = time.monotonic() + 120
    while not (killed / "checkpoints" / "step-14").exists() and time.monotonic() < wait:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (killed / "result.json").exists(), "the run was over before it was killed"
    assert main([*command, "--output", str(killed), "--resume"]) == 0
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    losses = [
        [
            line["loss"]
            for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            if "loss" in line
        ]
        for run in (whole, killed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 40


def test_held_out_rows_stay_held_out_however_many_are_evaluated(corpus, tmp_path, capsys):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    (data / "valid.txt").unlink()  # the last rows of the text are held out
    rows, weights = [], []
    for first, more in (("8", "8"), ("8", "64"), ("64", "4")):
        run = tmp_path / f"{first}-{more}"
        assert pretrained(run, data, "--steps", "4", "--eval-rows", first) == 0
        began = json.loads(capsys.readouterr().out)["rows"]
        assert pretrained(run, data, "--steps", "6", "--eval-rows", more, "--resume") == 0
        result = json.loads(capsys.readouterr().out)
        assert result["rows"] == began
        assert result["evaluated_tokens"] == min(int(more), began["held_out"]) * 16
        rows.append(began["held_out"])
        weights.append((run / "model.safetensors").read_bytes())
    assert rows[0] == rows[1] == 8 < rows[2] and weights[0] == weights[1]


def test_text_that_is_held_out_is_not_trained_on(corpus, tmp_path, capsys):
    import shutil

    one, other = corpus / "a-train.txt.xz", corpus / "b-train.txt"
    assert pretrained(tmp_path / "whole", corpus, "--steps", "2") == 0
    assert pretrained(tmp_path / "part", corpus, "--steps", "2", "--held-out", str(other)) == 0
    sources = json.loads((tmp_path / "part" / "data.json").read_text())
    assert [Path(s["name"]).name for s in sources["train"]["sources"]] == [one.name]
    assert [Path(s["name"]).name for s in sources["held_out"]["sources"]] == [other.name]
    capsys.readouterr()
    assert pretrained(tmp_path / "none", one, "--held-out", str(corpus)) == 3
    assert "nothing is left to train on" in capsys.readouterr().err

    def said(name, data, *more):
        from zolr.cli import main

        given = "--train-tokenizer --vocab-size 300 --hidden-size 16 --heads 2 --layers 1 --length 16 --steps 1 --eval-rows 8"
        files = [word for path in data for word in ("--data", str(path))]
        assert main(["pretrain", *files, "--output", str(tmp_path / name), *given.split(), *more]) == 0
        return " ".join(capsys.readouterr().err.split())

    copied = tmp_path / "copied.txt"
    shutil.copy(other, copied)
    assert "b-train.txt is text to train on and held-out text" in said(
        "same", [one, other], "--held-out", str(copied)
    )
    assert "a-train.txt.xz is there 2 times" in said("twice", [one, one])

    # whatever the files of a folder are called, they are what is evaluated on
    for name in ("valid.txt", "test.txt"):
        folder = tmp_path / name.removesuffix(".txt")
        folder.mkdir()
        shutil.copy(corpus / "valid.txt", folder / name)
        assert pretrained(tmp_path / f"run-{name}", one, "--steps", "2", "--held-out", str(folder)) == 0
        found = json.loads((tmp_path / f"run-{name}" / "data.json").read_text())["held_out"]["sources"]
        assert [Path(source["name"]).name for source in found] == [name]


def test_a_run_that_ends_before_its_first_step_can_be_begun_again(corpus, tmp_path, capsys, monkeypatch):
    from zolr.tasks import streams

    class Killed(SystemExit):
        """As a signal that cannot be caught: what is there stays."""

    def ended(*_, **__):
        raise stop

    run, stop = tmp_path / "run", KeyboardInterrupt()
    with monkeypatch.context() as patch:
        patch.setattr(streams, "train_tokenizer", ended)
        assert pretrained(run, corpus, "--steps", "2", "--resume", "auto") == 130
        assert not run.exists()  # nothing is left that a second start would stumble on
        from zolr.cli import runs

        patch.setattr(runs.RunFolder, "discard", lambda self: None)
        assert pretrained(run, corpus, "--steps", "2", "--resume", "auto") == 130
        assert (run / "config.toml").is_file()
    capsys.readouterr()
    assert pretrained(run, corpus, "--steps", "2", "--resume", "auto") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


def test_a_run_is_not_resumed_on_other_data(corpus, tmp_path, capsys):
    import shutil

    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(corpus, data)
    assert pretrained(run, data, "--steps", "2") == 0
    record = json.loads((run / "data.json").read_text())
    assert record["train"]["tokens"] > 0 and len(record["train"]["sources"]) == 2

    def complaint(*more):
        capsys.readouterr()
        return pretrained(run, data, "--steps", "4", "--resume", *more), capsys.readouterr().err

    code, message = complaint("--length", "8")
    assert code == 2 and "--length 8 differs from the run to resume (16" in message
    text = (data / "b-train.txt").read_text()
    (data / "b-train.txt").write_text(text + "more")
    code, message = complaint()
    assert code == 3 and "b-train.txt has changed" in message and "another --output" in message
    (data / "b-train.txt").write_text(text)
    (data / "valid.txt").write_text("something else to evaluate on " * 50)
    code, message = complaint()
    assert code == 3 and "held-out text is not what the run began with" in message and "valid.txt" in message
    shutil.copy(corpus / "valid.txt", data / "valid.txt")
    code, message = complaint()
    assert code == 0, message


@pytest.mark.parametrize("state", ["finished", "unfinished", "without a tokenizer"])
def test_a_refused_resume_leaves_no_tokenizer_of_other_text(state, corpus, tmp_path, capsys):
    """A finished run has its own beside the model; where one must be learned, that of refused text is not the run's."""
    run, other = tmp_path / "run", tmp_path / "other.txt"
    other.write_text((corpus / "valid.txt").read_text() * 2)
    assert pretrained(run, corpus, "--steps", "2") == 0
    if state != "finished":
        (run / "result.json").unlink()
        (run / "tokenizer").mkdir()
        for file in run.glob("tokenizer*.json"):
            file.rename(run / "tokenizer" / file.name)
    if state == "without a tokenizer":
        (run / "tokenizer").rename(tmp_path / "gone")
    before = sorted(run.rglob("*"))
    capsys.readouterr()
    assert pretrained(run, other, "--steps", "4", "--resume") == 3
    message = capsys.readouterr().err
    assert "not what the run began with" in message and "tokenizer" not in message
    assert sorted(run.rglob("*")) == before
    assert pretrained(run, corpus, "--steps", "4", "--resume") == 0
    assert (run / "tokenizer.json").is_file() and not (run / "tokenizer").exists()


def test_text_that_is_refused_before_the_first_step_is_not_the_run_s(corpus, tmp_path, capsys):
    run, short = tmp_path / "run", tmp_path / "short.txt"
    short.write_text("one two three four five six seven eight nine ten " * 2)
    assert pretrained(run, corpus, "--steps", "2") == 0
    for path in sorted(run.rglob("*"), reverse=True):  # as if it had been killed at once
        if path.name != "config.toml":
            path.rmdir() if path.is_dir() else path.unlink()
    capsys.readouterr()
    assert pretrained(run, short, "--steps", "2", "--resume") == 3
    assert "cannot hold out" in capsys.readouterr().err
    assert [path.name for path in run.rglob("*")] == ["config.toml"]
    assert pretrained(run, corpus, "--steps", "2", "--resume") == 0


def test_a_run_is_not_resumed_on_a_damaged_shard_or_with_another_tokenizer(corpus, tmp_path, capsys):
    run, cache = tmp_path / "run", tmp_path / "cache"
    assert pretrained(run, corpus, "--steps", "2", "--cache", str(cache)) == 0
    digests = {r["sha256"] for r in json.loads((run / "data.json").read_text()).values()}
    assert len(digests) == 2
    for shard in cache.glob("*/00000.bin"):
        shard.write_bytes(shard.read_bytes()[:-2])
    capsys.readouterr()
    again = (run, corpus, "--steps", "4", "--resume", "--cache", str(cache))
    assert pretrained(*again) == 4
    message = capsys.readouterr().err
    assert "cut short" in message and "remove" in message
    for folder in cache.iterdir():  # as the message says
        if folder.is_dir():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    assert pretrained(*again) == 0
    train_tokenizer(sources([corpus])[0], 290, run)
    capsys.readouterr()
    assert pretrained(run, corpus, "--steps", "6", "--resume", "--cache", str(cache)) == 3
    assert "tokenizer has changed (300 tokens then, 290 now)" in capsys.readouterr().err


def test_a_result_says_how_fast_and_even_a_run_was(corpus, tmp_path, capsys):
    more = (
        "--steps",
        "12",
        "--method",
        "stiefel",
        "--rank",
        "4",
        "--refresh-every",
        "3",
        "--peak-flops",
        "1e12",
    )
    assert pretrained(tmp_path / "run", corpus, *more) == 0
    result = json.loads(capsys.readouterr().out)
    speed, steps = result["speed"], result["step_seconds"]
    assert speed["mfu"] == pytest.approx(speed["flops_per_second"] / 1e12)
    # a model of one layer of width 16 with feed-forward states of 64, and a tied head: backprop costs three forwards
    entries = 4 * 16 * 16 + 3 * 16 * 64 + 300 * 16
    forward = 2 * entries + 4 * 1 * 16 * 16
    assert speed["flops_per_second"] == pytest.approx(3 * forward * speed["tokens_per_second"])
    # the first step, the second of the largest batch and the first refresh are left out, or counted
    assert 7 <= steps["timed"] <= 10 and steps["median"] <= steps["worst"]
    assert steps["worst_over_median"] == pytest.approx(steps["worst"] / steps["median"], rel=0.01)
    assert steps["at_refresh"] > 0 and result["evaluated_tokens"] == 8 * 16
    assert result["data"]["train"]["tokenizer"]["tokens"] == 300


def test_schedules_end_at_their_floor():
    from zolr.cli.pretrain import Pretrain
    from zolr.cli.pretraining import schedule

    for kind in ("cosine", "linear", "wsd"):
        factor = schedule(Pretrain(steps=100, warmup=10, schedule=kind, floor=0.1))
        assert factor(100) == pytest.approx(0.1) and factor(10) == pytest.approx(1.0)
        assert factor(0) == pytest.approx(1 / 11)


def test_wsd_may_be_given_another_end_until_it_falls():
    from zolr.cli.pretrain import Pretrain
    from zolr.cli.pretraining import schedule

    long, short = (
        schedule(Pretrain(steps=steps, warmup=5, schedule="wsd", decay=0.25)) for steps in (200, 100)
    )
    assert [long(step) for step in range(76)] == [short(step) for step in range(76)]
    assert short(100) == 0 and short(76) < 1


def test_pretraining_says_what_is_wrong(corpus, tokenizer, tmp_path, capsys, monkeypatch):
    import datasets

    from zolr.models import build

    def absent(*_):
        raise FileNotFoundError("no such set")

    monkeypatch.setattr(datasets, "load_dataset_builder", absent)
    monkeypatch.setattr("zolr.models._hub_answers", lambda: False)

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(128)) * 40)
    model, large = tmp_path / "model", tmp_path / "large"
    build(
        "llama-20m", vocab_size=16, hidden_size=16, num_attention_heads=2, num_hidden_layers=1
    ).save_pretrained(model)
    tokenizer.save_pretrained(large)
    config = str(model / "config.json")
    capsys.readouterr()

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
        (["--data", str(tmp_path / "nowhere")], 3, "nowhere"),
        (["--data", "nowhere"], 3, "'nowhere' is no file or folder"),  # and not that there is no tokenizer
        ([*data, "--model", config, "--length", "1025", "--train-tokenizer"], 2, "the 1024 positions"),
        (
            [*data, "--model", "none/config.json", "--train-tokenizer"],
            2,
            "no model config 'none/config.json'",
        ),
        (
            [*data, "--model", "llama-20mm", "--train-tokenizer"],
            3,
            "model 'llama-20mm' is not a folder or preset (did you mean 'llama-20m'?)",
        ),
        ([*data, "--model", str(model), "--train-tokenizer"], 2, "has never seen"),
        ([*data, "--tokenizer", str(corpus)], 3, "has no tokenizer; put the tokenizer.json"),
        ([*data, "--tokenizer", "./nowhere"], 3, "tokenizer folder './nowhere' does not exist"),
        ([*data, "--objective", "mlm", "--documents", "apart", "--train-tokenizer"], 2, "causal models"),
        (["--data", str(tmp_path / "empty.txt"), "--train-tokenizer"], 3, "no text in"),
        (
            ["--data", str(tmp_path / "binary.txt"), "--train-tokenizer"],
            3,
            "a null byte at byte 0, in line 1",
        ),
        ([*data, "--model", str(model), "--tokenizer", str(large)], 2, "16 tokens, the tokenizer 300"),
        (
            [*data, "--model", str(model), "--layers", "7"],
            2,
            "--layers is for a model that is made from numbers",
        ),
        (
            [*data, "--tokenizer", str(large), "--vocab-size", "500"],
            2,
            "--vocab-size is of a tokenizer to learn",
        ),
        ([*data, "--hidden-size", "12", "--heads", "4", "--train-tokenizer"], 2, "is 3 a head"),
        ([*data, "--seed", str(1 << 70), "--train-tokenizer"], 2, "--seed 1180591620717411303424"),
    ):
        found, message = complaint(*arguments)
        assert (found, message.count("\n")) == (code, 1), message
        assert words in message
    assert not (tmp_path / "run").exists()


def test_a_preset_has_as_many_positions_as_a_row(tokenizer):
    from zolr.cli.architectures import check_length, model_of
    from zolr.cli.pretrain import Pretrain

    for length, positions in ((64, 1024), (2048, 2048)):
        settings = Pretrain(data=("x",), model="llama-20m", length=length)
        model = model_of(settings, tokenizer)
        check_length(settings, model)
        assert model.config.max_position_embeddings == positions
    assert sum(p.numel() for p in model.parameters()) == 3_164_416 + 2 * 256 * len(tokenizer)
