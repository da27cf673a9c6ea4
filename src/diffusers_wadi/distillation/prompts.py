"""Where prompts come from: files of several formats, a data set of the Hub. Everything is read as a stream.

A reader yields one record after the other: the text, or what is wrong with it (:class:`Unreadable`). What cannot work
at all, such as a column that is not there, is raised at the first record.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._optional import require

JOURNEYDB_CAPTIONS = ("Caption", "Caption:", "caption")  # the first key of "Task2", as the annotations spell it


@dataclass(frozen=True)
class Unreadable:
    """A record that is no prompt: where it stands ("line 3"), and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


Records = Iterator[str | Unreadable]


def read_file(path: str | Path, column: str | None = None) -> Records:
    """Prompts of a file, by its suffix.

    Args:
        path: ``.txt`` (one a line), ``.json`` (a list of texts or of objects), ``.jsonl`` (a text or an object a line;
            without ``column`` the captions of JourneyDB's annotations), ``.csv`` or ``.parquet``.
        column: of the text in objects and tables; ``None`` will do for a table of one column.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, a column that is not there (the message names those that are), or no valid JSON.
    """
    path = Path(path)
    readers = {".txt": _text, ".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ValueError(f"--train_prompts {path} ends in {path.suffix!r}, expected one of {', '.join(readers)}.")
    if not path.is_file():
        raise FileNotFoundError(f"--train_prompts {path} does not exist.")
    return readers[path.suffix](path, column)


def read_dataset(
    name: str, config: str | None = None, split: str = "train", column: str | None = None, streaming: bool = False
) -> Records:
    """Prompts of a data set of the Hub, or of a folder that ``datasets`` can read.

    Raises:
        ImportError: ``datasets`` is not installed.
        ValueError: a column that is not there.
    """
    dataset = require("datasets", extra="train").load_dataset(name, config, split=split, streaming=streaming)
    names = dataset.column_names
    if names is None:  # a stream whose features nobody wrote down
        names = list(next(iter(dataset)))
    chosen = _chosen(column, names, f"The data set {name}")
    rows = dataset.select_columns([chosen])  # before the rows are decoded: other columns may be images
    return (_text_of(row[chosen], f"row {number}") for number, row in enumerate(rows, 1))


def _chosen(column: str | None, names: Sequence[str], what: str) -> str:
    there = ", ".join(map(str, names))
    if column is None and len(names) == 1:
        return names[0]
    if column is None:
        raise ValueError(f"{what} has the columns {there}: choose one with --caption_column.")
    if column not in names:
        raise ValueError(f"{what} has no column {column!r}, only {there}. Choose one with --caption_column.")
    return column


def _text_of(value: Any, where: str) -> str | Unreadable:
    if value is None:
        return ""
    return value if isinstance(value, str) else Unreadable(where, f"is {type(value).__name__}, expected text")


def _lines(path: Path) -> Iterator[tuple[str, str | Unreadable]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"line {number}"
            try:
                yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield where, Unreadable(where, f"is not UTF-8 ({error.reason} at byte {error.start})")


def _text(path: Path, column: str | None) -> Records:
    if column is not None:
        raise ValueError(f"--caption_column is {column!r}, but {path} is plain text without columns. Leave it out.")
    return (text for _, text in _lines(path))


def _json(path: Path, column: str | None) -> Records:
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:  # of decoding or of JSON
        raise ValueError(f"{path} is not valid JSON: {error}. Expected a list of texts or of objects.") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds one {type(entries).__name__}, expected a list of texts or of objects.")
    return (_picked(entry, column, f"entry {number}") for number, entry in enumerate(entries, 1))


def _json_lines(path: Path, column: str | None) -> Records:
    for where, line in _lines(path):
        if isinstance(line, Unreadable):
            yield line
        elif not line.strip():
            yield ""
        else:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                yield Unreadable(where, f"is not valid JSON ({error})")
            else:
                yield _picked(entry, column, where)


def _picked(entry: Any, column: str | None, where: str) -> str | Unreadable:
    """The text of one JSON value."""
    if not isinstance(entry, dict):
        if column is not None:
            return Unreadable(where, f"is {type(entry).__name__}, expected an object with {column!r}")
        return _text_of(entry, where)
    there = ", ".join(entry) or "nothing"
    if column is not None:
        missing = Unreadable(where, f"has no {column!r} (--caption_column), only {there}")
        return _text_of(entry[column], where) if column in entry else missing
    if "Task2" not in entry:
        return Unreadable(where, f"has {there}, not JourneyDB's Task2: choose one with --caption_column")
    task = entry["Task2"]
    first = next(iter(task), None) if isinstance(task, dict) else None
    if first not in JOURNEYDB_CAPTIONS:
        return Unreadable(where, f"begins Task2 with {first!r}, expected one of {', '.join(JOURNEYDB_CAPTIONS)}")
    return _text_of(task[first], where)


def _csv(path: Path, column: str | None) -> Records:
    # Bytes that are not UTF-8 become surrogates, which the cell alone has to answer for.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        names = next(rows, [])
        place = names.index(_chosen(column, names, str(path)))
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Unreadable(f"line {rows.line_num}", str(error))
                continue
            where = f"line {rows.line_num}"
            if row and len(row) != len(names):
                yield Unreadable(where, f"has {len(row)} cells, the header has {len(names)}")
            else:
                yield _encodable(row[place], where) if row else ""


def _encodable(text: str, where: str) -> str | Unreadable:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return Unreadable(where, f"is not UTF-8 (at character {error.start})")
    return text


def _parquet(path: Path, column: str | None) -> Records:
    table = require("pyarrow.parquet", extra="train").ParquetFile(path)
    chosen = _chosen(column, table.schema_arrow.names, str(path))
    batches = table.iter_batches(columns=[chosen])
    values: Iterable[Any] = (value for batch in batches for value in batch.column(0).to_pylist())
    return (_text_of(value, f"row {number}") for number, value in enumerate(values, 1))
