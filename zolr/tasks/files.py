"""Own data from csv, tsv, json, jsonl and parquet files, read strictly.

Nothing is guessed, shifted or dropped: a row that does not fit stops the reading with the file, the place,
the cause and the way out. Common readers pad short rows, shift long ones, turn a label into a float when one
is missing and replace bytes that are not text, each without a word.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from zolr.errors import DataError, cause_of
from zolr.tasks.examples import Example, nearest

MAX_CHARACTERS = (
    1_000_000  # of one text: more is a broken file, and would be cut to a few hundred tokens anyway
)
MAX_ROWS = 50_000_000  # a few bytes of a parquet file can claim any number of rows

_INTEGER = re.compile(r"[+-]?\d+")
_FRACTION = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(\.\d*)?[eE][+-]?\d+)")
_MISSING = (
    "",
    "nan",
    "null",
    "<na>",
    "#n/a",
)  # what a missing label looks like once a spreadsheet has written it


@dataclass(frozen=True)
class Table:
    """Rows of a file as they stand in it.

    Args:
        path: the file, as the user named it.
        unit: what a row is counted in: "line" or "row".
        columns: names in the order of the file.
        rows: each with its number (from 1) and its values by column; a key that a JSON object lacks is
            absent.
        hint: what the file may be instead, for an error about a missing column.
    """

    path: str
    unit: str
    columns: tuple[str, ...]
    rows: list[tuple[int, dict[str, Any]]]
    hint: str = ""

    def place(self, number: int) -> str:
        """Where a row stands, for an error."""
        return f"{self.path}, {self.unit} {number}"


# reading: one function a format, from bytes to a Table


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> Table:
    """All rows of a file; the suffix says how it is read.

    Args:
        path: a .csv (quotes as in RFC 4180), .tsv (no quotes: a tab or line break in a text is an error),
            .json (one list of objects), .jsonl (an object a line) or .parquet file, in UTF-8.
        columns: the columns that will be used; parquet reads no others.

    Raises:
        DataError: the file cannot be read, or a row of it is malformed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise DataError(
            f"{path}: files that end in {suffix or 'nothing'!r} are not read; "
            f"save the data as one of {', '.join(_READERS)}"
        )
    data = _bytes(path)
    table = _READERS[suffix](str(path), data, columns)
    if not table.rows:
        raise DataError(
            f"{path}: there is no row of data in it; add rows below the header, or give another file"
        )
    return table


def _bytes(path: str | Path, wanted: str = "a header and rows") -> bytes:
    """The content of a regular file that is not empty."""
    file = Path(path)
    try:
        mode = file.stat().st_mode
        if stat.S_ISDIR(mode):
            raise DataError(f"{path}: this is a folder; give a file in it")
        if not stat.S_ISREG(mode):
            raise DataError(f"{path}: this is not a regular file; save the data to a file first")
        data = file.read_bytes()
    except FileNotFoundError:
        beside = sorted(p.name for p in file.parent.iterdir() if p.is_file()) if file.parent.is_dir() else []
        there = [name for name in beside if Path(name).suffix.lower() in (*_READERS, ".txt")]
        close = get_close_matches(file.name, there, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "check the path"
        raise DataError(f"{path}: there is no such file; {hint}") from None
    except DataError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        cause = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: it cannot be read ({cause}); check its name and its permissions") from None
    if not data.strip():
        raise DataError(f"{path}: the file is empty; give a file with {wanted}")
    return data


def _text(path: str, data: bytes) -> str:
    """UTF-8 bytes as text, without a byte order mark."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}, line 1: the file is in UTF-16; save it as UTF-8")
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; "
            f"save the file as UTF-8, for example with: iconv -f latin1 -t utf-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"{path}, line {line}: there is a NUL character; the file is damaged or not text, export it again"
        )
    return text


def _columns(path: str, header: Sequence[str]) -> tuple[str, ...]:
    twice = sorted({name for name in header if list(header).count(name) > 1})
    if twice:
        raise DataError(
            f"{path}, line 1: the column {twice[0]!r} is there more than once; rename one of them"
        )
    return tuple(header)


def _fields(path: str, line: int, row: list[str], columns: tuple[str, ...], remedy: str) -> dict[str, Any]:
    if len(row) != len(columns):
        raise DataError(
            f"{path}, line {line}: {len(row)} fields, but the header has {len(columns)}; {remedy}"
        )
    return dict(zip(columns, row, strict=True))


def _read_csv(path: str, data: bytes, _: Sequence[str] | None) -> Table:
    text = _text(path, data)
    header = text.lstrip("\r\n").partition("\n")[0]
    other = next((sign for sign in ("\t", ";", "|") if sign in header and "," not in header), None)
    hint = f"the fields seem to be separated by {other!r}, not by commas; " if other else ""
    again = f"{hint}save the file with commas"
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: tuple[str, ...] = ()
    rows: list[tuple[int, dict[str, Any]]] = []
    limit = csv.field_size_limit(MAX_CHARACTERS)  # the module has one limit for everybody: put it back
    try:
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise DataError(f"{path}, line {line}: {again if hint else _csv_cause(error)}") from None
            if not row:
                continue
            if not columns:
                columns = _columns(path, row)
            else:
                remedy = again if hint else "put double quotes around a text that has a comma in it"
                rows.append((line, _fields(path, line, row, columns, remedy)))
    finally:
        csv.field_size_limit(limit)
    return Table(path, "line", columns, rows, hint)


def _csv_cause(error: csv.Error) -> str:
    message = str(error)
    if "unexpected end of data" in message:
        return "a quote that opens in this row is never closed; close it, or double every quote inside a text"
    if "field larger" in message:
        return (
            f"a text is longer than {MAX_CHARACTERS:,} characters, or a quote in this row is never closed; "
            "close it, or cut the text"
        )
    return f"not valid csv ({message}); double every quote inside a quoted text"


def _read_tsv(path: str, data: bytes, _: Sequence[str] | None) -> Table:
    columns: tuple[str, ...] = ()
    rows: list[tuple[int, dict[str, Any]]] = []
    # not splitlines(): it also cuts at line separators that are part of a text
    for line, content in enumerate(_text(path, data).split("\n"), 1):
        content = content.removesuffix("\r")
        if not content:
            continue
        row = content.split("\t")
        if not columns:
            columns = _columns(path, row)
        else:
            remedy = "a text cannot have a tab or a line break in it; save such data as .csv or .jsonl"
            rows.append((line, _fields(path, line, row, columns, remedy)))
    return Table(path, "line", columns, rows, "" if len(columns) > 1 else "the header has no tab in it; ")


class _DuplicateKey(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _json_value(place: str, text: str, at: int, whole: bool) -> tuple[Any, int]:
    """One JSON value of `text` from index `at`, and the index behind it."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except _DuplicateKey as error:
        raise DataError(f"{place}: the key {str(error)!r} is there twice in one object; remove one") from None
    except json.JSONDecodeError as error:
        rest = text[error.pos : error.pos + 12].strip()
        cause = f"{error.msg}, before {rest!r}" if rest else "it ends too early, the file may be truncated"
        raise DataError(f"{place}: not valid JSON ({cause}); write the file again") from None
    except (RecursionError, ValueError) as error:  # too deep; an integer of thousands of digits
        cause = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
        raise DataError(f"{place}: not usable JSON ({cause}); keep one flat object a row") from None
    if whole and text[end:].strip():
        raise DataError(f"{place}: there is more behind the JSON value; put one object on each line")
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: {_kind(value)} where an object of columns should be; write one object a row"
        )
    return value, end


def _read_jsonl(path: str, data: bytes, _: Sequence[str] | None) -> Table:
    rows: list[tuple[int, dict[str, Any]]] = []
    for line, content in enumerate(_text(path, data).split("\n"), 1):
        if content.strip():
            start = len(content) - len(content.lstrip())
            rows.append((line, _json_value(f"{path}, line {line}", content, start, whole=True)[0]))
    return Table(path, "line", _keys(rows), rows)


def _read_json(path: str, data: bytes, _: Sequence[str] | None) -> Table:
    text = _text(path, data)
    blank = re.compile(r"[ \t\r\n]*")

    def skip(at: int) -> int:
        found = blank.match(text, at)
        return found.end() if found else at

    def fail(number: int, at: int, cause: str) -> DataError:
        return DataError(
            f"{path}, row {number} (line {text.count(chr(10), 0, at) + 1}): {cause}; write the file again"
        )

    at = skip(0)
    if text[at : at + 1] != "[":
        jsonl = " (a file with an object on each line ends in .jsonl)" if text[at : at + 1] == "{" else ""
        raise DataError(
            f"{path}, line 1: a .json file must be one list of objects{jsonl}; "
            f"write it as [ {{...}}, {{...}} ]"
        )
    rows: list[tuple[int, dict[str, Any]]] = []
    at = skip(at + 1)
    if text[at : at + 1] == "]":
        at += 1
    else:
        while True:  # object by object, so that an error can name the row
            number = len(rows) + 1
            if at >= len(text):
                raise fail(number, at, "not valid JSON, the list is never closed: the file may be truncated")
            line = text.count("\n", 0, at) + 1
            value, at = _json_value(f"{path}, row {number} (line {line})", text, at, whole=False)
            rows.append((number, value))
            at = skip(at)
            sign, at = text[at : at + 1], at + 1
            if sign == "]":
                break
            if sign != ",":
                cause = f"not valid JSON, {sign!r} where a comma or ] should be"
                cause = (
                    cause if sign else "not valid JSON, the list is never closed: the file may be truncated"
                )
                raise fail(number, at - 1, cause)
            at = skip(at)
    if text[at:].strip():
        raise fail(len(rows), at, "there is more behind the list")
    return Table(path, "row", _keys(rows), rows)


def _keys(rows: list[tuple[int, dict[str, Any]]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key for _, row in rows for key in row))


def _read_parquet(path: str, data: bytes, wanted: Sequence[str] | None) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        columns = _columns(path, file.schema_arrow.names)
        count = file.metadata.num_rows
        if count > MAX_ROWS:
            raise DataError(f"{path}: it claims {count:,} rows, more than {MAX_ROWS:,}; give a smaller file")
        chosen = [name for name in columns if wanted is None or name in wanted]
        rows: list[tuple[int, dict[str, Any]]] = []
        room = 100 * len(data) + (256 << 20)
        for batch in file.iter_batches(batch_size=1000, columns=chosen) if chosen else ():
            room -= batch.nbytes
            if room < 0:
                raise DataError(
                    f"{path}: it unpacks to more than 100 times its size; give a file that is not a bomb"
                )
            start = len(rows) + 1
            rows.extend(enumerate(batch.to_pylist(), start))
    except DataError:
        raise
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        KeyError,
    ) as error:  # UnicodeDecodeError is a ValueError
        cause = cause_of(error, 120)
        raise DataError(f"{path}: not a usable parquet file ({cause}); write it again") from None
    if not chosen and count:  # none of the wanted columns is there: let the caller say so
        rows = [(1, {})]
    return Table(path, "row", columns, rows)


_READERS: dict[str, Callable[[str, bytes, Sequence[str] | None], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


# values: one row's texts and label


def _kind(value: object) -> str:
    kinds = {
        str: "a string",
        bool: "a truth value",
        int: "an integer",
        float: "a float",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def _check_columns(table: Table, names: Sequence[str]) -> None:
    for name in names:
        if name not in table.columns:
            raise DataError(
                f"{table.path}: there is no column {name!r}; {table.hint}{nearest(name, table.columns)}"
            )
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise DataError(f"{table.path}: the column {twice!r} is asked for twice; name each column once")


def _value(table: Table, number: int, row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise DataError(f"{table.place(number)}: there is no {column!r} in this row; add it, or drop the row")
    return row[column]


def check_text(value: object, place: str, column: str) -> str:
    """A text that a tokenizer can read, or a DataError that says where it is not."""
    if not isinstance(value, str):
        raise DataError(f"{place}: {column!r} is {_kind(value)}, not a text; write a string, or drop the row")
    if not value.strip():
        raise DataError(f"{place}: {column!r} is empty; fill it in, or drop the row")
    if len(value) > MAX_CHARACTERS:
        raise DataError(
            f"{place}: {column!r} has {len(value):,} characters, more than {MAX_CHARACTERS:,}; "
            "cut it, or check for a missing quote"
        )
    if "\0" in value:
        raise DataError(f"{place}: {column!r} has a NUL character in it; remove it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: {column!r} has half of a surrogate pair in it; write it as UTF-8"
        ) from None
    return value


def _label(value: object, place: str, column: str) -> str:
    """The name that a label stands for."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        what = "null" if value is None else "NaN"
        raise DataError(f"{place}: the label in {column!r} is {what}; fill it in, or drop the row")
    if not isinstance(value, str | int):
        raise DataError(
            f"{place}: the label {value!r} in {column!r} is {_kind(value)}; write a name or an integer"
        )
    return value.strip() if isinstance(value, str) else str(value)


def _discover(table: Table, column: str, values: list[Any], names: list[str]) -> tuple[str, ...]:
    """Class names in index order: numbers by size, names by alphabet."""
    for (number, _), value, name in zip(table.rows, values, names, strict=True):
        place = table.place(number)
        if type(value) is not type(values[0]):
            raise DataError(
                f"{place}: the label {value!r} in {column!r} is {_kind(value)}, but {table.unit} "
                f"{table.rows[0][0]} "
                f"has {_kind(values[0])}; write all labels alike"
            )
        if name.lower() in _MISSING:
            raise DataError(
                f"{place}: the label in {column!r} is missing ({name!r}); fill it in, or drop the row"
            )
        if _FRACTION.fullmatch(name):
            raise DataError(
                f"{place}: the label {name!r} in {column!r} is a fraction; write a name or an integer"
            )
        if name.startswith("-") and _INTEGER.fullmatch(name):
            raise DataError(
                f"{place}: the label {name!r} in {column!r} is negative, which often marks an unlabeled row; "
                "drop such rows, or give the list of classes"
            )
    found = sorted(set(names))
    numbers = [name for name in found if _INTEGER.fullmatch(name)]
    if numbers and len(numbers) < len(found):
        rare = min(
            (numbers, [name for name in found if name not in numbers]),
            key=lambda kind: sum(names.count(n) for n in kind),
        )
        number = table.rows[next(i for i, name in enumerate(names) if name in rare)][0]
        raise DataError(
            f"{table.place(number)}: the labels in {column!r} are numbers in some rows and names in others "
            f"({rare[0]!r} here); write all labels alike, or give the list of classes"
        )
    if len(found) == 1:
        raise DataError(
            f"{table.path}: all rows have the label {found[0]!r} in {column!r}; "
            "at least two classes are needed"
        )
    if len(found) > max(20, len(names) // 2):
        raise DataError(
            f"{table.path}: {column!r} has {len(found)} different labels in {len(names)} rows, so it is "
            "hardly a label; "
            "name another label column, or give the list of classes"
        )
    return tuple(sorted(found, key=int)) if numbers else tuple(found)


def _indices(
    table: Table,
    column: str,
    values: list[Any],
    names: list[str],
    classes: Sequence[str],
    index_names: Sequence[str] | None,
) -> list[int]:
    """Class indices of labels given as names, or as places in `index_names` (`classes` unless given)."""
    by_name = {name: i for i, name in enumerate(classes)}
    order = list(classes) if index_names is None else list(index_names)
    # integers are places in the list only where no class is called by a number
    places = bool(order) and not any(_INTEGER.fullmatch(name) for name in order)
    result: list[int] = []
    for (number, _), value, name in zip(table.rows, values, names, strict=True):
        place = table.place(number)
        if name in by_name:
            result.append(by_name[name])
        elif places and (isinstance(value, bool) or _INTEGER.fullmatch(name)):
            index = int(value) if isinstance(value, bool) else int(name)
            if not 0 <= index < len(order):
                raise DataError(
                    f"{place}: the label {name} in {column!r} is out of range; "
                    f"there are {len(order)} classes, 0 to {len(order) - 1} ({', '.join(order)})"
                )
            result.append(by_name[order[index]])
        elif name.lower() in _MISSING:
            raise DataError(
                f"{place}: the label in {column!r} is missing ({name!r}); fill it in, or drop the row"
            )
        else:
            raise DataError(
                f"{place}: the label {name!r} in {column!r} is not one of the classes; "
                f"{nearest(name, classes)}"
            )
    return result


def load_file(
    path: str | Path,
    text_columns: Sequence[str],
    label_column: str,
    classes: Sequence[str] | None = None,
    index_names: Sequence[str] | None = None,
) -> tuple[list[Example], tuple[str, ...]]:
    """The labeled examples of a file, and its classes in index order.

    Args:
        path: a file that `read_table` can read.
        text_columns: columns with the texts, one or two, in the order of the template's fields.
        label_column: column with the label: a class name, or the place of a class in `index_names`.
        classes: class names in index order; found in the file when left out (numbers by size, names by
            alphabet).
        index_names: class names in the order that integers in this file count, where it differs from
            `classes`; empty where integers must not stand for places.

    Returns:
        Examples in the order of the file, and the class names.

    Raises:
        DataError: a column is missing, or a row has no usable text or label.
    """
    wanted = [*text_columns, label_column]
    table = read_table(path, wanted)
    _check_columns(table, wanted)
    texts, values, names = [], [], []
    for number, row in table.rows:
        place = table.place(number)
        texts.append(tuple(check_text(_value(table, number, row, c), place, c) for c in text_columns))
        values.append(_value(table, number, row, label_column))
        names.append(_label(values[-1], place, label_column))
    if classes is None:
        classes = _discover(table, label_column, values, names)
        by_name = {name: i for i, name in enumerate(classes)}
        indices = [by_name[name] for name in names]
    else:
        indices = _indices(table, label_column, values, names, classes, index_names)
    return [Example(text, label) for text, label in zip(texts, indices, strict=True)], tuple(classes)


def read_texts(source: str | Path | None, text_columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Texts to predict, without labels, in their order.

    Args:
        source: a file that `read_table` can read, or a .txt file or "-" (standard input) with a text on each
            line; two texts on a line are separated by a tab. None is standard input too.
        text_columns: columns with the texts; their number alone counts for lines of text.

    Raises:
        DataError: a text is missing, or the file cannot be read.
    """
    if source is None or str(source) == "-":
        data = sys.stdin.buffer.read()
        if not data.strip():
            raise DataError("standard input is empty; send a text on each line, or name a file")
        return list(_lines("standard input", _text("standard input", data), text_columns))
    if Path(source).suffix.lower() == ".txt":
        data = _bytes(source, "a text on each line")
        return list(_lines(str(source), _text(str(source), data), text_columns))
    table = read_table(source, text_columns)
    _check_columns(table, text_columns)
    return [
        tuple(check_text(_value(table, number, row, c), table.place(number), c) for c in text_columns)
        for number, row in table.rows
    ]


def _lines(path: str, text: str, text_columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        place, line = f"{path}, line {number}", line.removesuffix("\r")
        parts = [line] if len(text_columns) == 1 else line.split("\t")
        if len(parts) != len(text_columns):
            raise DataError(
                f"{place}: {len(parts)} texts, but {len(text_columns)} are needed "
                f"({', '.join(text_columns)}); "
                "separate them by one tab"
            )
        yield tuple(check_text(part, place, column) for part, column in zip(parts, text_columns, strict=True))


def load_folder(folder: Path, columns: Sequence[str], classes: Sequence[str]) -> dict[str, list[Example]]:
    """The splits of a task from a local folder of train.tsv, dev.tsv and test.tsv.

    The files have a column `label` and the text columns. Labels are class names, or integers that index
    `labels` in a meta.json beside the files; the two lists are matched by name, because their orders may
    differ.

    Returns:
        Examples by split, for the files that are there; labels index `classes`.

    Raises:
        DataError: no train.tsv, a meta.json that speaks of other classes, or a file that cannot be used.
    """
    if not (folder / "train.tsv").is_file():
        raise DataError(
            f"{folder}: there is no train.tsv in it; "
            "give the folder that holds train.tsv, dev.tsv and test.tsv"
        )
    meta = folder / "meta.json"
    order: Sequence[str] | None = None
    if meta.exists():
        content, _ = _json_value(str(meta), _text(str(meta), _bytes(meta)).strip(), 0, whole=True)
        order = content.get("labels")
        if not isinstance(order, list) or sorted(map(str, order)) != sorted(classes):
            raise DataError(
                f"{meta}: its labels are {order!r}, but the task has {list(classes)}; "
                "give the folder of this task"
            )
    splits: dict[str, list[Example]] = {}
    for split in ("train", "dev", "test"):
        file = folder / f"{split}.tsv"
        if not file.exists():
            continue
        if order is None:
            table = read_table(file, ["label"])
            for number, row in table.rows:
                if _INTEGER.fullmatch(row.get("label", "")):
                    raise DataError(
                        f"{table.place(number)}: the label is the number {row['label']}, but there is no "
                        "meta.json to say "
                        f"which class that is; write the class names, or add {meta}"
                    )
        splits[split] = load_file(file, columns, "label", classes, order)[0]
    return splits
