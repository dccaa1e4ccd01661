"""Text as token ids: tokenized once, packed into memory-mapped shards, and found again by what they were made of.

A packed folder holds `00000.bin`, `00001.bin`, ... (raw ids, little-endian, uint16 below 65,536 tokens and int32 else) and
`manifest.json`. After each document stands one boundary token. The folder's name is a hash of the text, the tokenizer and the
format, so that other text is another folder, and a stale one is never read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zolr.errors import DataError, StorageError
from zolr.tasks.texts import TEXT, HubText, Source, no_text, pieces

FORMAT = 1  # of shards and manifest
MANIFEST = "manifest.json"
SHARD_TOKENS = 1 << 26  # 128 MiB of small ids
_BLOCK = 1 << 20  # characters handed to the tokenizer at once


class Ids:
    """One long sequence of token ids in several arrays; a slice is a view, and `np.asarray` copies it.

    >>> ids = Ids([np.arange(3), np.arange(3, 9)])
    >>> len(ids), np.asarray(ids[2:5]).tolist(), np.asarray(ids[4:][:2]).tolist()
    (9, [2, 3, 4], [4, 5])
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = [part for part in parts if len(part)]
        self._ends = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, where: slice) -> Ids:
        first, last, step = where.indices(len(self))
        if step != 1:
            raise ValueError("token ids are sliced without gaps")
        found = []
        begin = int(np.searchsorted(self._ends, first, side="right")) - 1
        for part, start in zip(self.parts[begin:], self._ends[begin:-1], strict=True):
            if start >= last:
                break
            found.append(part[max(0, first - start) : last - start])
        return Ids(found)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.concatenate(self.parts) if self.parts else np.zeros(0, np.int32)
        return whole if dtype is None else whole.astype(dtype)


@dataclass(frozen=True)
class Packed:
    """Ids with the manifest that says what they are.

    Args:
        ids: all of them.
        manifest: `tokens`, `documents`, `characters`, `largest` (id), `boundary` (id), `tokenizer` (sha256 and number of
            tokens), `sources` (name, bytes and sha256 each), `shards` (name, tokens and sha256 each), `format`.
        folder: where they lie; None in memory.
    """

    ids: Ids
    manifest: Mapping[str, Any]
    folder: Path | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """What these ids were made of, and their own hashes: enough to tell later whether anything has changed."""
        kept = ("format", "sources", "column", "tokenizer", "boundary", "documents", "tokens")
        kept += ("largest",)
        digest = hashlib.sha256("".join(shard["sha256"] for shard in self.manifest["shards"]).encode())
        return {**{key: self.manifest[key] for key in kept}, "sha256": digest.hexdigest()}


def tokenizer_hash(tokenizer: Any) -> str:
    """Sha256 of all that decides which ids a text becomes."""
    digest = hashlib.sha256(repr((tokenizer.eos_token_id, tokenizer.sep_token_id, len(tokenizer))).encode())
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    else:
        parts = json.loads(fast.to_str())
        for passing in ("truncation", "padding"):  # of the last call, whatever it was
            parts.pop(passing, None)
        digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()


def boundary_of(tokenizer: Any) -> int:
    """The id that ends a document.

    Raises:
        DataError: The tokenizer has none.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise DataError("the tokenizer has neither an end-of-text nor a separator token; set its eos_token")
    return end


def pack(
    given: Sequence[Source],
    tokenizer: Any,
    cache: str | Path | None = None,
    *,
    column: str = TEXT,
    shard_tokens: int = SHARD_TOKENS,
    rebuild: bool = True,
    noted: Callable[[str], None] | None = None,
) -> Packed:
    """Tokenizes sources in the order given, or finds them done.

    Text passes through in blocks of about a megabyte and ids go to the disk as they come, so that memory does not grow with
    the text. A second process that wants the same waits for the first.

    Args:
        given: Files and data sets of the hub.
        tokenizer: A tokenizer of transformers; its special tokens are not added, but for the end of each document.
        cache: The folder that packed folders are kept in; None keeps the ids in memory.
        column: Key of JSON lines, column of parquet files and data sets.
        shard_tokens: Ids of a shard at most.
        rebuild: Whether to pack again where a shard is damaged; if not, that is an error.
        noted: Told what a person should know.

    Raises:
        DataError: A source is unreadable or not text, all of them together are empty, or the tokenizer has no token to
            end a document with.
        StorageError: The cache cannot be written, or a shard is damaged and must not be replaced.
    """
    wanted = {
        "format": FORMAT,
        "sources": [_described(source) for source in given],
        "column": column,
        "tokenizer": {"sha256": tokenizer_hash(tokenizer), "tokens": len(tokenizer)},
        "boundary": boundary_of(tokenizer),
        "dtype": "uint16" if len(tokenizer) <= 1 << 16 else "int32",
    }
    if cache is None:
        kept: list[np.ndarray] = []
        counts = _tokenized(given, column, tokenizer, wanted, kept.append)
        digest = hashlib.sha256(b"".join(part.tobytes() for part in kept)).hexdigest()
        shards = [{"name": "memory", "tokens": counts["tokens"], "sha256": digest}]
        return Packed(Ids(kept), {**wanted, **counts, "shards": shards})

    # names and places of files do not count, their contents do
    contents = [(source["sha256"], source.get("kind", "")) for source in wanted["sources"]]
    named_by = json.dumps({**wanted, "sources": contents, "shard_tokens": shard_tokens}, sort_keys=True)
    folder = Path(cache) / hashlib.sha256(named_by.encode()).hexdigest()[:16]
    with _alone(folder):
        if folder.is_dir():
            try:
                found = opened(folder)
                return Packed(found.ids, {**found.manifest, "sources": wanted["sources"]}, folder)
            except StorageError as error:
                if not rebuild:
                    raise StorageError(
                        f"{error}; remove {folder}, and it is packed again from the text"
                    ) from error
                if noted is not None:
                    noted(f"{error}; packing again")
                shutil.rmtree(folder)
        _write(folder, given, column, tokenizer, wanted, shard_tokens)
    return opened(folder)


def opened(folder: Path) -> Packed:
    """The ids of a packed folder, mapped, after every shard was compared with its hash.

    Raises:
        StorageError: A file is missing, cut short, or not what was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        shards, dtype = manifest["shards"], np.dtype(manifest["dtype"]).newbyteorder("<")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{folder / MANIFEST} cannot be read ({error})") from error
    parts = []
    for shard in shards:
        path = folder / shard["name"]
        try:
            size, full = path.stat().st_size, shard["tokens"] * dtype.itemsize
            if size != full:
                raise StorageError(
                    f"shard {path} has {size:,} bytes of {full:,}: it was cut short or changed"
                )
            with path.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"shard {path} cannot be read ({error.strerror or error})") from error
        if digest != shard["sha256"]:
            raise StorageError(
                f"shard {path} is not what was written: its sha256 differs from the manifest's"
            )
        parts.append(np.memmap(path, dtype=dtype, mode="r"))
    return Packed(Ids(parts), manifest, folder)


def check_unchanged(now: Mapping[str, Any], before: Mapping[str, Any], what: str) -> None:
    """Refuses to go on with other data than a run began with.

    Args:
        now, before: `Packed.origin` of today, and as it was saved.
        what: what the data are for, in words.

    Raises:
        DataError: something differs; the message says what.
    """
    bare = [
        {**o, "sources": [(s["sha256"], s.get("kind")) for s in o["sources"]]}
        for o in (dict(now), dict(before))
    ]
    if bare[0] == bare[1]:  # files may have moved
        return
    old = {source["name"]: source for source in before["sources"]}
    new = {source["name"]: source for source in now["sources"]}
    changed = [name for name in new if name in old and new[name]["sha256"] != old[name]["sha256"]]
    if changed:
        why = f"{changed[0]} has changed ({old[changed[0]]['bytes']:,} bytes then, {new[changed[0]]['bytes']:,} now)"
        if old[changed[0]]["bytes"] == new[changed[0]]["bytes"]:
            why = f"{changed[0]} has changed (the same size, but another sha256)"
    elif gone := [name for name in old if name not in new]:
        why = f"{gone[0]} is no longer there"
    elif added := [name for name in new if name not in old]:
        why = f"{added[0]} was not there"
    elif now["tokenizer"] != before["tokenizer"] or now["boundary"] != before["boundary"]:
        why = f"the tokenizer has changed ({before['tokenizer']['tokens']:,} tokens then, {now['tokenizer']['tokens']:,} now)"
    else:
        differing = [key for key in now if now[key] != before.get(key)]
        why = f"its {', '.join(differing)} differ"
    raise DataError(
        f"the {what} is not what the run began with: {why}; restore it, or begin another run with another --output"
    )


def _described(source: Source) -> dict[str, Any]:
    """Name, size and sha256 of a source."""
    if isinstance(source, HubText):
        rows, mark = source.load(), source.mark()
        digest = hashlib.sha256((mark if source.saved else f"{source} {mark}").encode()).hexdigest()
        return {"name": str(source), "bytes": rows.info.dataset_size or 0, "sha256": digest, "kind": "hub"}
    file = Path(source)
    try:
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        size = file.stat().st_size
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error
    return {
        "name": str(file.absolute()),
        "bytes": size,
        "sha256": digest,
        "kind": "".join(file.suffixes[-2:]),
    }


def _blocks(given: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    block: list[tuple[str, bool]] = []
    size = 0
    for piece in given:
        block.append(piece)
        size += len(piece[0])
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Ids of texts without special tokens: by the compiled half alone where there is one, which takes half the time."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if (
        fast is None
        or not hasattr(fast, "encode_batch_fast")
        or getattr(tokenizer, "split_special_tokens", False)
    ):
        options: dict[str, Any] = dict(add_special_tokens=False, return_attention_mask=False, verbose=False)
        return lambda texts: tokenizer(texts, **options)["input_ids"]
    fast.no_truncation()
    fast.no_padding()
    return lambda texts: [row.ids for row in fast.encode_batch_fast(texts, add_special_tokens=False)]


def _tokenized(
    given: Sequence[Source],
    column: str,
    tokenizer: Any,
    wanted: Mapping[str, Any],
    take: Callable[[np.ndarray], None],
) -> dict[str, int]:
    """Hands the ids of each block to `take`, and counts."""
    end, dtype = wanted["boundary"], np.dtype(wanted["dtype"])
    tokens, ended, characters, largest = 0, 0, 0, 0
    encode = _encoder(tokenizer)
    for block in _blocks(pieces(given, column)):
        encoded = encode([text for text, _ in block])
        rows = []
        for row, (_, ends) in zip(encoded, block, strict=True):
            rows.append(np.asarray([*row, end] if ends else row, dtype=np.int64))
        ids = np.concatenate(rows)
        if len(ids):
            largest = max(largest, int(ids.max()))
            if largest > np.iinfo(dtype).max:
                raise DataError(
                    f"the tokenizer gives id {largest:,} and says that it has {len(tokenizer):,} tokens; mend its files"
                )
            take(ids.astype(dtype))
        tokens += len(ids)
        ended += sum(ends for _, ends in block)
        characters += sum(len(text) for text, _ in block)
    if not tokens:
        raise no_text(given)
    return {"tokens": tokens, "documents": ended, "characters": characters, "largest": largest}


class _Shards:
    """Files that are written one after the other, each up to its size."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most
        self.done: list[dict[str, Any]] = []
        self._file: int | None = None
        self.written = 0

    def take(self, ids: np.ndarray) -> None:
        while len(ids):
            if self._file is None:
                name = f"{len(self.done):05}.bin"
                self._file = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                self._digest, self._tokens, self._name = hashlib.sha256(), 0, name
            part, ids = ids[: self._most - self._tokens], ids[self._most - self._tokens :]
            data = memoryview(part.astype(part.dtype.newbyteorder("<"), copy=False).tobytes())
            self._digest.update(data)
            while data:  # a disk that is nearly full takes a part of it
                count = os.write(self._file, data)
                self.written += count
                data = data[count:]
            self._tokens += len(part)
            if self._tokens == self._most:
                self._finish()

    def _finish(self) -> None:
        assert self._file is not None
        os.fsync(self._file)
        self.close()
        shard = {"name": self._name, "tokens": self._tokens, "sha256": self._digest.hexdigest()}
        self.done.append(shard)

    def finish(self) -> list[dict[str, Any]]:
        """All shards, on the disk."""
        if self._file is not None:
            self._finish()
        return self.done

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)


def _write(
    folder: Path,
    given: Sequence[Source],
    column: str,
    tokenizer: Any,
    wanted: Mapping[str, Any],
    shard_tokens: int,
) -> None:
    aside = folder.with_name(f"{folder.name}.part")
    shards = _Shards(aside, shard_tokens)
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed: who is alive holds the lock
        aside.mkdir(parents=True)
        counts = _tokenized(given, column, tokenizer, wanted, shards.take)
        manifest = {**wanted, **counts, "shards": shards.finish()}
        path = aside / MANIFEST
        with path.open("w", encoding="utf-8") as handle:
            handle.write(json.dumps(manifest, indent=1) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, folder)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cannot write packed tokens into {folder.parent} ({error.strerror or error}, after {shards.written:,} bytes); "
            "make room, or give another --cache"
        ) from error
    finally:
        shards.close()
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process packs a folder at a time; the others wait, and find it done."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(
            f"cannot write packed tokens into {folder.parent} ({error.strerror or error}); give another --cache"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
