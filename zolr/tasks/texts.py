"""Documents of text files (plain, JSON lines, parquet, compressed or not) and of data sets of the hub, read in bounded memory."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from zolr.errors import DataError, cause_of
from zolr.hub import offline_if_silent
from zolr.tasks.examples import nearest

END = "<|endoftext|>"  # also accepted as a line of its own in a text file, where story collections put it

TEXT = "text"  # the column, or key, that data sets of plain text have
_KINDS = (".txt", ".jsonl", ".parquet")
_PACKED = ("", ".gz", ".xz")
SUFFIXES = tuple(kind + packed for kind in _KINDS for packed in (_PACKED if kind != ".parquet" else ("",)))
_HELD_OUT = ("valid", "dev", "eval")  # how the names of evaluation files begin
_TEST = ("test",)  # never read unless named
_ENCODING = "utf-8-sig"  # a mark of the byte order, which some programs begin files with, is no text
_PIECE = (
    1 << 16
)  # characters: longer documents are read in pieces, so that one endless document fits in memory
_LINE = 1 << 26  # characters of a JSON line at most: it has to be in memory as a whole
_ROWS = 256  # rows of a parquet file decoded at once
_SAVED, _SPLITS = "state.json", "dataset_dict.json"  # what `save_to_disk` of datasets leaves in a folder
# name, name:configuration, name:configuration:split; the name may have an owner
_HUB = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]*(:[\w.-]+)?)?")


@dataclass(frozen=True)
class HubText:
    """A data set of the hub.

    Args:
        name: repository, with or without its owner, or a folder: laid out as one, or written by `save_to_disk`.
        config: name of the configuration, where there are several.
        split: which part of it.
        documents: read no more than so many, and fetch no more; None fetches the whole split.
    """

    name: str
    config: str | None = None
    split: str = "train"
    documents: int | None = None

    @classmethod
    def of(cls, spec: str, documents: int | None = None) -> HubText:
        """Reads `NAME`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT`; the middle may be empty."""
        name, config, split = (*spec.split(":"), "", "")[:3]
        return cls(name, config or None, split or "train", documents)

    def __str__(self) -> str:
        return f"{self.name}:{self.config or ''}:{self.split}"

    @property
    def saved(self) -> Path | None:
        """The folder that `save_to_disk` has written, if the name is one."""
        home = Path(self.name)
        if (home / _SPLITS).is_file():
            return home / self.split
        return home if (home / _SAVED).is_file() else None

    def check(self) -> None:
        """See that there is such a data set, without its rows.

        Raises:
            DataError: there is none, or it cannot be asked for.
        """
        import datasets

        with self._named():
            if self.saved is None:
                datasets.load_dataset_builder(self.name, self.config)
            else:
                datasets.load_from_disk(str(self.saved))

    def load(self) -> Any:
        """The rows: mapped from the disk or the cache of `datasets`, or streamed where `documents` says how many.

        Raises:
            DataError: the data set cannot be fetched.
        """
        import datasets

        with self._named():
            if self.saved is not None:
                rows: Any = datasets.load_from_disk(str(self.saved))
                return rows if self.documents is None else rows.take(min(self.documents, len(rows)))
            rows = datasets.load_dataset(
                self.name, self.config, split=self.split, streaming=self.documents is not None
            )
        return rows if self.documents is None else rows.take(self.documents)

    def mark(self) -> str:
        """What tells these rows from others of the same name."""
        rows = self.load()
        if self.saved is not None:  # a stored fingerprint does not know of what was written over
            digest = hashlib.sha256(str(self.documents).encode())
            for part in rows.cache_files:
                with open(part["filename"], "rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
            return digest.hexdigest()
        # of the stored table; a stream is known by its name and the features and version it declares
        return getattr(rows, "_fingerprint", None) or f"{self.documents} {rows.info.version} {rows.features}"

    @contextmanager
    def _named(self) -> Iterator[None]:
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
        try:
            with nullcontext() if Path(self.name).exists() else offline_if_silent():
                yield
        except Exception as error:  # whatever the client, the network or the parser raises
            cause = cause_of(error, 200) or type(error).__name__
            if Path(self.name).exists():
                raise DataError(
                    f"data set {self} cannot be loaded from that folder ({cause}); NAME:CONFIG:SPLIT names another part"
                ) from error
            raise DataError(
                f"'{self.name}' is no file or folder, and as a data set of the hub it cannot be loaded ({cause}); "
                "give the path of a text file, or of a folder of them"
            ) from error


Source = str | Path | HubText


def sources(
    given: Sequence[str | Path], documents: int | None = None
) -> tuple[list[Path | HubText], list[Path | HubText]]:
    """Lists what a mix of files, folders and names of data sets stands for, as training and held-out sources.

    A file that is named is a training file, whatever it is called. In a folder, searched to the bottom and read in
    order of name, `.txt`, `.jsonl` (both may be compressed: `.gz`, `.xz`) and `.parquet` files count; those whose name
    begins with valid, dev or eval are held out, and those that begin with test are left alone; of a folder that
    `save_to_disk` of datasets has written, the splits go by the same names. What is no path and reads like a name, or
    names a configuration or split of a folder, is a data set of the hub.

    Args:
        given: Files, folders and names (see `HubText.of`).
        documents: Documents at most of each data set of the hub.

    Returns:
        Training sources and held-out sources.

    Raises:
        DataError: A path does not exist, or nothing to train on was found.
    """
    train: list[Path | HubText] = []
    held_out: list[Path | HubText] = []
    for part, source in _listed(given, documents):
        if part.startswith(_HELD_OUT):
            held_out.append(source)
        elif not part.startswith(_TEST):
            train.append(source)
    if not train:
        raise _nothing(given, "to train on")
    return train, held_out


def every_source(given: Sequence[str | Path], documents: int | None = None) -> list[Path | HubText]:
    """Lists all that a mix of files, folders and names of data sets stands for, whatever it is called.

    Args:
        given, documents: As for `sources`.

    Raises:
        DataError: A path does not exist, or nothing was found.
    """
    found = [source for _, source in _listed(given, documents)]
    if not found:
        raise _nothing(given, "to evaluate on")
    return found


def _listed(given: Sequence[str | Path], documents: int | None) -> Iterator[tuple[str, Path | HubText]]:
    """Sources, each with the name that says what it is for; an empty one for what the user has named."""
    for name in map(str, given):
        path = Path(name)
        if path.is_file():
            yield "", path
        elif path.is_dir() and ((path / _SAVED).is_file() or (path / _SPLITS).is_file()):
            for split in _splits_of(path):
                yield split, HubText(name, None, split, documents)
        elif path.is_dir():
            for file in files_in(path):
                yield file.name, file
        elif (_HUB.fullmatch(name) and not name.endswith(SUFFIXES)) or _part_of_a_folder(name):
            yield "", HubText.of(name, documents)
        else:
            raise DataError(
                f"no file or folder {name!r}; give the path of a text file, or of a folder of them"
            )


def files_in(folder: Path) -> list[Path]:
    """All that counts as text in a folder, searched to the bottom, in order of path."""
    return sorted(file for file in folder.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())


def _nothing(given: Sequence[str | Path], purpose: str) -> DataError:
    shown = ", ".join(repr(str(path)) for path in given) or "nothing"
    return DataError(
        f"no {', '.join(_KINDS)} file {purpose} in {shown}; name the files one by one if they end otherwise"
    )


def _splits_of(saved: Path) -> list[str]:
    """The splits of a folder that `save_to_disk` has written; a single data set is all for training."""
    if not (saved / _SPLITS).is_file():
        return ["train"]
    try:
        return list(json.loads((saved / _SPLITS).read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{saved / _SPLITS} cannot be read ({error}); save the data set again") from error


def _part_of_a_folder(name: str) -> bool:
    folder, colon, rest = name.partition(":")
    return bool(colon) and rest.count(":") <= 1 and Path(folder).is_dir()


def documents(given: Iterable[Source], column: str = TEXT) -> Iterator[str]:
    """Yields the documents of sources, one after the other, never an empty one.

    Of a text file these are the stretches between blank lines, without the line break at their end; elsewhere what a
    row has in `column`.

    Args:
        given: Files and data sets. What a file is, its name says: `.jsonl`, `.parquet`, and text for everything else; `.gz`
            and `.xz` are decompressed on the way.
        column: Key of JSON lines, column of parquet files and data sets.

    Raises:
        DataError: A file cannot be read, is not UTF-8 text, is damaged, or a row has no text.
    """
    parts: list[str] = []
    for text, ends in pieces(given, column):
        parts.append(text)
        if ends:
            yield "".join(parts)
            parts.clear()


def pieces(given: Iterable[Source], column: str = TEXT) -> Iterator[tuple[str, bool]]:
    """Yields `(text, ends)`: documents, the long ones in several pieces of which the last one ends."""
    for source in given:
        if isinstance(source, HubText):
            yield from _of_rows(_hub_rows(source, column))
            continue
        file = Path(source)
        try:
            if file.name.endswith(".parquet"):
                yield from _of_rows(_parquet_rows(file, column))
            elif ".jsonl" in file.suffixes[-2:]:
                yield from _of_rows(_json_rows(file, column))
            else:
                yield from _of_lines(file)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file} is not UTF-8 text ({_wrong(file) or error.reason}); give text, or convert it first"
            ) from error
        except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
            raise DataError(
                f"{file} is a damaged or truncated {file.suffix} file ({error}); copy it again"
            ) from error
        except OSError as error:
            raise DataError(
                f"{file} cannot be read ({error.strerror or error}); check the path and its permissions"
            ) from error


def named(given: Sequence[Source]) -> str:
    """Sources for an error message."""
    shown = ", ".join(str(source) for source in given[:3])
    return shown if len(given) <= 3 else f"{shown} and {len(given) - 3} more"


def no_text(given: Sequence[Source]) -> DataError:
    """What to say where there is nothing to read."""
    return DataError(f"no text in {named(given)}; give files with at least one line that is not blank")


def _open(file: Path) -> IO[str]:
    if file.name.endswith(".xz"):
        return lzma.open(file, "rt", encoding=_ENCODING)
    if file.name.endswith(".gz"):
        return gzip.open(file, "rt", encoding=_ENCODING)
    return file.open(encoding=_ENCODING)


def _wrong(file: Path) -> str:
    """The first byte of a file that is null or no UTF-8 and where it is, for a message; the file is read once more."""
    packed: Any = {".xz": lzma.open, ".gz": gzip.open}.get(file.suffix)
    held, before, line = b"", 0, 1  # the beginning of a character that a block has cut, and where that is
    with packed(file, "rb") if packed else file.open("rb") as handle:
        while True:
            block = handle.read(1 << 20)
            whole = held + block
            at, used, why = whole.find(0), 0, "a null byte"
            try:
                _, used = codecs.utf_8_decode(whole if at < 0 else whole[:at], "strict", at >= 0 or not block)
            except UnicodeDecodeError as error:
                at, why = error.start, error.reason
            if at >= 0:
                place = f"{before + at:,}{' of what it unpacks to' if packed else ''}"
                line += whole.count(b"\n", 0, at)
                return f"{why} at byte {place}, in line {line:,}"
            if not block:
                return ""
            before, line, held = before + used, line + whole.count(b"\n", 0, used), whole[used:]


def _of_lines(file: Path) -> Iterator[tuple[str, bool]]:
    held: list[str] = []  # lines not yet handed on; blank ones never enter
    size = 0
    started = False  # a piece of the present document has been handed on
    with _open(file) as handle:
        for line, begins in _lines(handle):
            if "\0" in line:
                raise DataError(f"{file} is not UTF-8 text ({_wrong(file)}); give text, or convert it first")
            if begins and (not line.strip() or line.strip() == END) and _ended(line):
                if held or started:
                    yield "".join(held).removesuffix("\n"), True
                held, size, started = [], 0, False
                continue
            # One line is kept back: only at the next one is it known whether the document goes on.
            if size + len(line) > _PIECE and held:
                yield "".join(held), False
                held, size, started = [], 0, True
            held.append(line)
            size += len(line)
    if held or started:
        yield "".join(held).removesuffix("\n"), True


def _ended(line: str) -> bool:
    return line.endswith("\n") or len(line) < _PIECE // 2  # or the last line of a file


def _lines(handle: IO[str]) -> Iterator[tuple[str, bool]]:
    """Yields lines, those that are longer than a piece in parts, and whether a part begins its line.

    A part ends at a space where it has one, so that words stay whole.
    """
    rest, begins = "", True
    while line := handle.readline(_PIECE):
        line, rest = rest + line, ""
        if not line.endswith("\n") and len(line) >= _PIECE and (cut := line.rfind(" ")) > 0:
            line, rest = line[:cut], line[cut:]
        yield line, begins
        begins = line.endswith("\n")
    if rest:
        yield rest, False


def _of_rows(texts: Iterator[str]) -> Iterator[tuple[str, bool]]:
    for text in texts:
        while len(text) > _PIECE:
            cut = text.rfind(" ", 1, _PIECE)
            cut = cut if cut > 0 else _PIECE
            yield text[:cut], False
            text = text[cut:]
        if text:
            yield text, True


def _json_rows(file: Path, column: str) -> Iterator[str]:
    with _open(file) as handle:
        number = 0
        while line := handle.readline(_LINE):
            number += 1
            if len(line) >= _LINE and not line.endswith("\n"):
                raise DataError(
                    f"{file}, line {number} is longer than {_LINE:,} characters; JSON lines have one document a line, "
                    "and plain text files end in .txt"
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{file}, line {number} is no JSON ({error}); mend or remove it") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{file}, line {number} is no JSON object; each line has to be one, with a key {column!r}"
                )
            yield _text_of(row, column, f"{file}, line {number}")


def _text_of(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise DataError(f"{where} has no column {column!r}; {nearest(column, list(row))} (--text-column)")
    text = row[column]
    if not isinstance(text, str):
        what = "null" if text is None else f"a {type(text).__name__}"
        raise DataError(f"{where}: column {column!r} is {what} and no text; mend or remove the row")
    return text


def _parquet_rows(file: Path, column: str) -> Iterator[str]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
        names = table.schema_arrow.names
        if column not in names:
            raise DataError(f"{file} has no column {column!r}; {nearest(column, names)} (--text-column)")
        number = 0
        for part in table.iter_batches(batch_size=_ROWS, columns=[column]):
            for text in part.column(0).to_pylist():
                number += 1
                yield _text_of({column: text}, column, f"{file}, row {number}")
    except ArrowException as error:
        raise DataError(f"{file} is a damaged or truncated .parquet file ({error}); copy it again") from error


def _hub_rows(source: HubText, column: str) -> Iterator[str]:
    number = 0
    for row in source.load():
        number += 1
        yield _text_of(row, column, f"data set {source}, row {number}")
