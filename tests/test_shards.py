"""Laws of packed text: the same ids from every form of file, found again only while nothing has changed, in bounded memory."""

import gzip
import json
import lzma
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import begun

from zolr.errors import DataError, StorageError
from zolr.tasks.shards import MANIFEST, Ids, check_unchanged, opened, pack
from zolr.tasks.streams import train_tokenizer
from zolr.tasks.texts import SUFFIXES, HubText, documents, pieces, sources

DOCUMENTS = [
    f"Document {i} begins.\nIt has {i * i} lines that nobody counts, \u00e9\u00e8." for i in range(50)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    return AutoTokenizer.from_pretrained(train_tokenizer([folder / "text.txt"], 300, folder / "made"))


def written(folder: Path, suffix: str, column: str = "text", texts: list[str] = DOCUMENTS) -> Path:
    """A file of the documents in the form that its suffix names."""
    path = folder / f"part{suffix}"
    rows = [{"id": i, column: text} for i, text in enumerate(texts)]
    if suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    lines = "\n".join(map(json.dumps, rows)) if ".jsonl" in suffix else "\n\n".join(texts)
    data = (lines + "\n").encode()
    packers = {".gz": gzip.compress, ".xz": lzma.compress}
    path.write_bytes(packers.get(path.suffix, bytes)(data))
    return path


# forms of text


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl"])
def test_a_mark_of_the_byte_order_is_no_text(suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path, suffix)
    data = gzip.decompress(path.read_bytes()) if suffix.endswith(".gz") else path.read_bytes()
    marked = b"\xef\xbb\xbf" + data
    path.write_bytes(gzip.compress(marked) if suffix.endswith(".gz") else marked)
    assert list(documents([path])) == DOCUMENTS


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_form_of_a_file_has_the_same_documents(suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path, suffix)
    assert list(documents([path])) == DOCUMENTS
    assert sources([tmp_path]) == ([path], [])


def test_a_data_set_of_the_hub_has_the_same_documents(tmp_path: Path, monkeypatch: Any) -> None:
    # the library reads a folder laid out as a repository through the same call as one of the hub
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "owner"
    for split in ("train", "validation"):
        (home / "data").mkdir(parents=True, exist_ok=True)
        part = written(home / "data", ".parquet", texts=DOCUMENTS if split == "train" else DOCUMENTS[:3])
        part.rename(home / "data" / f"{split}-00000-of-00001.parquet")
    assert list(documents([HubText(str(home))])) == DOCUMENTS
    assert list(documents([HubText(str(home), split="validation")])) == DOCUMENTS[:3]
    assert list(documents([HubText(str(home), documents=7)])) == DOCUMENTS[:7]  # streamed


def test_a_data_set_that_was_saved_has_the_same_documents(tmp_path: Path, tokenizer: Any) -> None:
    import shutil

    from datasets import Dataset, DatasetDict

    parts = DatasetDict(
        {
            "train": Dataset.from_dict({"text": DOCUMENTS}),
            "validation": Dataset.from_dict({"text": DOCUMENTS[:3]}),
            "test": Dataset.from_dict({"text": DOCUMENTS[:1]}),
        }
    )
    home, one = str(tmp_path / "all"), str(tmp_path / "one")
    parts.save_to_disk(home)
    parts["train"].save_to_disk(one)
    train, held_out = sources([home], 7)
    assert (train, held_out) == ([HubText(home, None, "train", 7)], [HubText(home, None, "validation", 7)])
    assert list(documents(train)) == DOCUMENTS[:7] and list(documents(held_out)) == DOCUMENTS[:3]
    assert sources([one]) == ([HubText(one)], []) and list(documents([HubText(one)])) == DOCUMENTS
    assert sources([f"{home}::test"])[0] == [HubText(home, None, "test")]
    HubText(home).check()
    with pytest.raises(DataError, match="all::dev cannot be loaded from that folder.*NAME:CONFIG:SPLIT"):
        HubText(home, split="dev").check()

    # packed once, wherever it lies; another text is another one
    cache = tmp_path / "cache"
    first = pack([HubText(one)], tokenizer, cache)
    shutil.move(one, tmp_path / "moved")
    again = pack([HubText(str(tmp_path / "moved"))], tokenizer, cache)
    assert again.folder == first.folder and again.origin["sha256"] == first.origin["sha256"]
    shutil.rmtree(tmp_path / "moved")
    Dataset.from_dict({"text": [*DOCUMENTS[:-1], "another end"]}).save_to_disk(one)
    other = pack([HubText(one)], tokenizer, cache)
    with pytest.raises(DataError, match="text is not what the run began with: .*one::train has changed"):
        check_unchanged(other.origin, first.origin, "text")


def test_names_of_data_sets_are_told_from_paths(tmp_path: Path) -> None:
    assert sources(["allenai/c4:en"])[0] == [HubText("allenai/c4", "en")]
    assert sources(["wikitext::validation"], 9)[0] == [HubText("wikitext", None, "validation", 9)]
    for wrong in ("./nowhere", "/no/where", "missing.txt", "a/b/c", "missing.jsonl.gz"):
        with pytest.raises(DataError, match="no file or folder"):
            sources([wrong])


def test_a_data_set_that_cannot_be_fetched_says_so(monkeypatch: Any) -> None:
    import datasets

    def refused(*_: Any, **__: Any) -> None:
        raise ConnectionError("the hub cannot be reached")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(DataError, match="'some-set' is no file or folder.*cannot be reached.*give the path"):
        list(documents([HubText("some-set")]))


def test_a_hub_that_does_not_answer_is_not_asked_again(monkeypatch: Any) -> None:
    import datasets
    from huggingface_hub import constants

    from zolr import hub

    seen: list[bool] = []

    def refused(*_: Any, **__: Any) -> None:
        seen.append(constants.HF_HUB_OFFLINE)
        raise ConnectionError("not in the cache")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for answers in (True, False):
        monkeypatch.setattr(hub, "answers", lambda answers=answers: answers)
        with pytest.raises(DataError, match="not in the cache"):
            HubText("some-set").load()
        assert not constants.HF_HUB_OFFLINE
    assert seen == [False, True]


def test_another_column_may_hold_the_text(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".parquet"):
        path = written(tmp_path, suffix, column="content")
        assert list(documents([path], "content")) == DOCUMENTS
        with pytest.raises(DataError, match="'text'.*known: id, content"):
            list(documents([path]))


def test_rows_without_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for line, words in (
        ('{"text": null}', "line 2: column 'text' is null"),
        ('{"text": 3}', "line 2: column 'text' is a int"),
        ('{"text": "cut', "line 2 is no JSON"),
        ('["text"]', "line 2 is no JSON object"),
    ):
        path.write_text('{"text": "good"}\n' + line + "\n")
        with pytest.raises(DataError, match=words):
            list(documents([path]))
    for suffix in (".txt.gz", ".jsonl.xz", ".parquet"):
        whole = written(tmp_path, suffix)
        whole.write_bytes(whole.read_bytes()[:-20])
        with pytest.raises(DataError, match="damaged or truncated"):
            list(documents([whole]))


def test_long_lines_are_cut_at_spaces_and_not_lost(tmp_path: Path) -> None:
    line = " ".join(f"word{i}" for i in range(40_000)) + " " * 200_000 + "end"
    path = tmp_path / "long.txt"
    path.write_text(line + "\n\nnext\n", encoding="utf-8")
    found = list(pieces([path]))
    assert "".join(text for text, ends in found[:-1]) == line and [ends for _, ends in found[-2:]] == [
        True,
        True,
    ]
    assert max(len(text) for text, _ in found) < 200_000
    words = [text for text, _ in found if text.strip()]
    assert all(a.endswith(" ") or b.startswith(" ") for a, b in zip(words[:-2], words[1:-1], strict=True))


# packing


def test_packed_ids_are_those_of_memory_across_shards(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, ".txt")
    fresh = pack([path], tokenizer)
    packed = pack([path], tokenizer, tmp_path / "cache", shard_tokens=100)
    assert len(packed.manifest["shards"]) == -(-len(fresh.ids) // 100) > 5
    assert np.array_equal(np.asarray(packed.ids), np.asarray(fresh.ids))
    for first, last in ((0, 5), (95, 105), (50, 750), (len(fresh.ids) - 3, len(fresh.ids))):
        assert np.array_equal(np.asarray(packed.ids[first:last]), np.asarray(fresh.ids)[first:last])
    assert all(isinstance(part, np.memmap) for part in packed.ids.parts)


def test_a_manifest_says_what_was_packed(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, ".jsonl")
    packed = pack([path], tokenizer, tmp_path / "cache")
    manifest = packed.manifest
    ids = np.asarray(packed.ids)
    assert manifest["documents"] == len(DOCUMENTS) == int((ids == manifest["boundary"]).sum())
    assert manifest["tokens"] == len(ids) and manifest["largest"] == ids.max()
    assert manifest["characters"] == sum(map(len, DOCUMENTS))
    assert manifest["tokenizer"]["tokens"] == len(tokenizer)
    (source,) = manifest["sources"]
    assert source["name"] == str(path) and source["bytes"] == path.stat().st_size


def test_text_is_tokenized_once(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    path, cache = written(tmp_path, ".txt"), tmp_path / "cache"
    first = pack([path], tokenizer, cache)
    moved = path.rename(tmp_path / "moved.txt")
    tokenizer(
        "a call leaves its settings in the tokenizer", truncation=True, max_length=3, padding="max_length"
    )
    monkeypatch.setattr("zolr.tasks.shards.pieces", None)  # nothing is read again
    second = pack([moved], tokenizer, cache)
    assert second.folder == first.folder and second.manifest["sources"][0]["name"] == str(moved)


def test_what_has_changed_is_packed_anew(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    path, cache = written(tmp_path, ".txt"), tmp_path / "cache"
    first = pack([path], tokenizer, cache)
    path.write_text("\n\n".join(DOCUMENTS[1:]))
    second = pack([path], tokenizer, cache)
    other = AutoTokenizer.from_pretrained(train_tokenizer([path], 290, tmp_path / "other"))
    third = pack([path], other, cache)
    assert len({first.folder, second.folder, third.folder}) == 3
    with pytest.raises(DataError, match=r"text is not.*part.txt has changed \([\d,]+ bytes then"):
        check_unchanged(second.origin, first.origin, "text")
    with pytest.raises(DataError, match="tokenizer has changed .300 tokens then, 290 now"):
        check_unchanged(third.origin, second.origin, "text")
    check_unchanged(second.origin, json.loads(json.dumps(second.origin)), "text")


DAMAGES = {
    "cut": lambda data: data[:-6],
    "flipped": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_refused_or_packed_again(damage: str, tmp_path: Path, tokenizer: Any) -> None:
    path, cache = written(tmp_path, ".txt"), tmp_path / "cache"
    packed = pack([path], tokenizer, cache, shard_tokens=500)
    good = np.asarray(packed.ids)
    assert packed.folder is not None
    shard, change = packed.folder / "00001.bin", DAMAGES[damage]
    data = shard.read_bytes()
    shard.unlink()
    if change is not None:
        shard.write_bytes(change(data))
    words = {"cut": "cut short", "flipped": "sha256 differs", "gone": "cannot be read"}[damage]
    with pytest.raises(StorageError, match=f"00001.bin.*{words}"):
        opened(packed.folder)
    with pytest.raises(StorageError, match=f"{words}.*; remove .*packed again"):
        pack([path], tokenizer, cache, shard_tokens=500, rebuild=False)
    notes: list[str] = []
    again = pack([path], tokenizer, cache, shard_tokens=500, noted=notes.append)
    assert np.array_equal(np.asarray(again.ids), good) and words in notes[0]


def test_an_unfinished_packing_is_not_taken_for_a_finished_one(tmp_path: Path, tokenizer: Any) -> None:
    path, cache = written(tmp_path, ".txt"), tmp_path / "cache"
    folder = pack([path], tokenizer, cache).folder
    assert folder is not None
    folder.rename(folder.with_name(f"{folder.name}.part"))  # as a process leaves it that is killed
    (folder.with_name(f"{folder.name}.part") / "00001.bin").write_bytes(b"half")
    packed = pack([path], tokenizer, cache)
    assert {p.name for p in folder.iterdir()} == {"00000.bin", MANIFEST}
    assert not list(cache.glob("*.part")) and packed.manifest["documents"] == len(DOCUMENTS)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, tokenizer: Any) -> None:
    path, cache = written(tmp_path, ".txt"), tmp_path / "cache"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1000, before[1])
    )  # Python ignores the signal, so the write fails
    try:
        with pytest.raises(
            StorageError, match=r"packed tokens.*File too large, after 1,000 bytes.*make room"
        ):
            pack([path], tokenizer, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.suffix for p in cache.iterdir()] == [".lock"]
    assert pack([path], tokenizer, cache).manifest["documents"] == len(DOCUMENTS)


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write packed tokens into .*file.*--cache"):
        pack([written(tmp_path, ".txt")], tokenizer, tmp_path / "file" / "cache")


@pytest.mark.slow
def test_two_processes_pack_once(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = written(tmp_path, ".txt", texts=DOCUMENTS * 200)
    code = """
        import sys
        from transformers import AutoTokenizer
        from zolr.tasks.shards import pack
        tokenizer, path, cache = sys.argv[1:]
        print(pack([path], AutoTokenizer.from_pretrained(tokenizer), cache).folder.stat().st_ino)
    """
    given = [str(tmp_path / "tokenizer"), str(path), str(tmp_path / "cache")]
    first, second = scripts(tmp_path, code, [given, given])
    assert first == second != ""


@pytest.mark.slow
def test_a_file_without_a_line_break_is_packed_in_bounded_memory(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = """
        import os, resource, sys
        from transformers import AutoTokenizer
        from zolr.tasks.shards import pack
        tokenizer, path, cache = sys.argv[1:]
        p = pack([path], AutoTokenizer.from_pretrained(tokenizer), cache)
        assert p.manifest["documents"] == 1 and p.manifest["characters"] == os.path.getsize(path)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    peaks = {}
    for megabytes in (2, 14):
        path = tmp_path / f"{megabytes}.txt"
        with path.open("w") as handle:
            for _ in range(megabytes):
                handle.write("the sea is wide and no one sails it twice, " * 23_301)
        # an interpreter of its own: the memory of a forked one grows in larger steps
        command = [
            sys.executable,
            "-c",
            textwrap.dedent(code),
            tmp_path / "tokenizer",
            path,
            tmp_path / "cache",
        ]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks[megabytes] = int(done.stdout) / 1024
    # 12 MB of text more, which are 11 million ids
    assert peaks[14] - peaks[2] < 10, peaks


def scripts(folder: Path, code: str, given: list[list[str]]) -> list[str]:
    """What processes print that run one script side by side, each with its own arguments."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(code))
    files = [(folder / f"out{i}", folder / f"err{i}") for i in range(len(given))]
    running = [begun(str(script), own, {}, *places) for own, places in zip(given, files, strict=True)]
    for process, (_, err) in zip(running, files, strict=True):
        process.join(120)
        assert process.exitcode == 0, err.read_text()
    return [out.read_text() for out, _ in files]


# slices


def test_a_slice_of_a_slice_is_that_of_an_array() -> None:
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 100, 60)
    ids = Ids(np.split(whole, [7, 8, 30]))
    for _ in range(200):
        a, b = sorted(rng.integers(0, 61, 2))
        c, d = sorted(rng.integers(0, 61, 2))
        assert np.array_equal(np.asarray(ids[a:b][c:d]), whole[a:b][c:d])
        assert len(ids[a:b]) == b - a
