"""The training prompts as one memory-mapped file, which all processes of a machine share.

1.4 million captions as Python strings take hundreds of megabytes in every process; here a process holds the pages that
it happens to read. Layout: the texts in UTF-8, one after the other; zeros up to a multiple of 8; (n + 1) int64
offsets; a JSON footer; its length as int64; 8 bytes of signature. All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import overload

import numpy as np

from .._files import written_beside
from .prompts import Unreadable

SIGNATURE = b"prompts1"
SHOWN = 5  # unreadable records that are told of


@dataclass
class PromptReport:
    """What was found while prompts were read. Lengths are of the kept ones, in characters."""

    read: int = 0
    kept: int = 0
    empty: int = 0
    duplicates: int = 0
    unreadable: int = 0
    first_unreadable: list[str] = field(default_factory=list)
    lengths: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{self.kept} prompts of {self.read} records"]
        parts += [
            f"{count} {name}"
            for name, count in (("empty", self.empty), ("repeated", self.duplicates), ("unreadable", self.unreadable))
            if count
        ]
        return f"{', '.join(parts)}; characters: {describe_lengths(self.lengths)}"


def length_statistics(lengths: Sequence[int]) -> dict[str, float]:
    """mean, median, 95 % and max."""
    values = np.asarray(lengths)
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "95 %": float(np.percentile(values, 95)),
        "max": float(values.max()),
    }


def describe_lengths(statistics: dict[str, float]) -> str:
    """As one line."""
    return ", ".join(f"{name} {value:.0f}" for name, value in statistics.items())


class PromptStore(Sequence):
    """The prompts of a file that :func:`write_prompts` made: a read-only sequence of str.

    Attributes:
        digest: SHA-256 of the prompts in their order.
        report: of the reading.

    Raises:
        ValueError: it is no such file.
    """

    def __init__(self, file: str | Path):
        data = np.memmap(file, np.uint8, "r") if Path(file).stat().st_size else np.empty(0, np.uint8)
        if data[-8:].tobytes() != SIGNATURE:
            raise ValueError(f"{file} is not a file of prompts that this package wrote, or only a part of one.")
        footer_size = int(data[-16:-8].view("<i8")[0])
        footer = json.loads(data[-16 - footer_size : -16].tobytes())
        count, start = footer["report"]["kept"], footer["offsets_at"]
        self.report = PromptReport(**footer["report"])
        self.digest: str = footer["digest"]
        self._texts = data
        self._offsets = data[start : start + 8 * (count + 1)].view("<i8")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        start, end = self._offsets[index % len(self)], self._offsets[index % len(self) + 1]
        return self._texts[start:end].tobytes().decode("utf-8")


def write_prompts(
    file: str | Path,
    records: Iterable[str | Unreadable],
    source: str,
    skip_bad_lines: bool = False,
    max_samples: int | None = None,
    keep_repeated: bool = False,
) -> PromptStore:
    """Write the stripped, non-empty, distinct prompts of ``records``, first occurrence first, and open the file.

    Args:
        file: where to; whole or not at all.
        records: see :mod:`~diffusers_wadi.distillation.prompts`.
        source: named in errors.
        skip_bad_lines: leave unreadable records out instead of refusing them.
        max_samples: stop reading after so many; ``None``: all.
        keep_repeated: keep every occurrence of a repeated prompt, each a sample of its own.

    Raises:
        ValueError: unreadable records without ``skip_bad_lines`` (the first five are named), or no prompt.
    """
    report, lengths, digest = PromptReport(), array("l"), hashlib.sha256()
    offsets = array("q", [0])
    with written_beside(file) as beside:
        with open(beside, "wb") as out:
            for data, length in _kept(records, report, keep_repeated):
                out.write(data)
                # The zero byte, which no other prompt list of the same letters can imitate.
                digest.update(data + b"\0")
                offsets.append(offsets[-1] + len(data))
                lengths.append(length)
                if len(lengths) == max_samples:
                    break
            report.kept = len(lengths)
            _check(report, source, skip_bad_lines)
            report.lengths = length_statistics(lengths)
            _write_footer(out, offsets, {"report": asdict(report), "digest": digest.hexdigest()})
    return PromptStore(file)


def _kept(
    records: Iterable[str | Unreadable], report: PromptReport, keep_repeated: bool
) -> Iterator[tuple[bytes, int]]:
    """(UTF-8, number of characters) of what is to be kept; counts the rest in ``report``."""
    seen: set[bytes] = set()  # digests: the texts themselves would be what this file is there to avoid
    for record in records:
        report.read += 1
        text = record if isinstance(record, Unreadable) else record.strip()
        try:
            data = b"" if isinstance(text, Unreadable) else text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half a character
            text = Unreadable(f"record {report.read}", f"is not Unicode text (at character {error.start})")
        if isinstance(text, Unreadable):
            report.unreadable += 1
            if len(report.first_unreadable) < SHOWN:
                report.first_unreadable.append(str(text))
            continue
        if not data:
            report.empty += 1
            continue
        if not keep_repeated:
            key = hashlib.blake2b(data, digest_size=16).digest()
            if key in seen:
                report.duplicates += 1
                continue
            seen.add(key)
        yield data, len(text)


def _check(report: PromptReport, source: str, skip_bad_lines: bool) -> None:
    first = "; ".join(report.first_unreadable)
    if report.unreadable and not skip_bad_lines:
        raise ValueError(
            f"{report.unreadable} of {report.read} records of {source} cannot be read. The first: {first}. Correct "
            "them, or leave them out with --skip_bad_lines."
        )
    if not report.kept:
        found = f"{report.read} records, {report.empty} of them empty and {report.unreadable} unreadable"
        raise ValueError(f"{source} holds no prompt: {found}{f' (the first: {first})' if first else ''}.")


def _write_footer(out, offsets: array, values: dict) -> None:
    out.write(b"\0" * (-out.tell() % 8))
    values = values | {"offsets_at": out.tell()}
    out.write(np.asarray(offsets, "<i8").tobytes())
    footer = json.dumps(values).encode()
    footer += b" " * (-len(footer) % 8)  # keeps what follows aligned
    out.write(footer + np.int64(len(footer)).astype("<i8").tobytes() + SIGNATURE)
