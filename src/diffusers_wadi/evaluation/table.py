"""Results of several models as one table: Markdown to read, CSV and JSON to compute with, the paper's numbers beside ours."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers_wadi._files import writable_folder, written_beside
from diffusers_wadi.evaluation.paper_numbers import PROTOCOL, SECONDS, SOURCE, TABLE_1, PaperNumber

__all__ = ["results_table", "write_results"]

MEASURED, QUOTED = "measured", f"quoted: {SOURCE}"
Row = Mapping[str, Any]

# Column of the CSV -> its head in Markdown, and how its numbers are written there.
_HEADS = {
    "steps": ("steps", "{}"),
    "images": ("images", "{:,}"),
    "fid": ("FID ↓", "{:.2f}"),
    "clip_score": ("CLIP ↑", "{:.3f}"),
    "precision": ("precision ↑", "{:.3f}"),
    "recall": ("recall ↑", "{:.3f}"),
    "hpsv2": ("HPSv2 ↑", "{:.2f}"),
    "attributes": ("attributes right ↑", "{:.1%}"),
    "captions": ("captions wholly right ↑", "{:.1%}"),
}
_PRINTED = {name: "{:.2f}" for name in ("clip_score", "precision", "recall")}  # digits of the paper's table


def results_table(rows: Sequence[Row], quoted: bool | None = None) -> str:
    """A Markdown table of what was measured, each row followed by what the paper says of the same weights.

    Args:
        rows: see `write_results`.
        quoted: whether the paper's numbers stand in it. Default None: where one of its metrics was measured on captions
            of COCO.
    """
    lines = _lines(rows, quoted)
    columns = _columns(lines)
    text = ["| model | " + " | ".join(_head(name) for name in columns) + " |", "|---|" + "---:|" * len(columns)]
    for line in lines:
        reproduced = ", reproduced there" * (line.get("origin") == "reproduced")
        name = line["name"] if line["source"] == MEASURED else f"*{line['name']}, quoted{reproduced}*"
        text.append(f"| {name} | " + " | ".join(_cell(line, column) for column in columns) + " |")
    return "\n".join(text + _notes(lines)) + "\n"


def write_results(rows: Sequence[Row], folder: str | os.PathLike, quoted: bool | None = None) -> list[Path]:
    """Write `results.md`, `results.csv` and `results.json`, each whole or not at all.

    Args:
        rows: for each model a dictionary with its `name`, and any of `metrics` (of `compute_metrics`), `latency` (of
            `Latency.as_dict`) and `settings` (of settings.json; its steps, number of prompts and preset are used).
        folder: created if need be.
        quoted: as in `results_table`.

    Returns:
        The three files.

    Raises:
        ValueError: no rows, or one without a name.
        OSError: the folder is not writable.
    """
    lines = _lines(rows, quoted)
    folder = writable_folder(folder)
    whole = {"rows": [dict(row) for row in rows], "quoted": [line for line in lines if line["source"] == QUOTED]}
    texts = {
        "results.json": json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n",
        "results.csv": _csv(lines),
        "results.md": results_table(rows, quoted),
    }
    for name, text in texts.items():
        with written_beside(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
    return [folder / name for name in texts]


def _lines(rows: Sequence[Row], quoted: bool | None) -> list[dict[str, Any]]:
    """Measured and quoted rows as flat dictionaries, in the order of the table."""
    if not rows:
        raise ValueError("there are no results to write")
    nameless = next((i for i, row in enumerate(rows) if not row.get("name")), None)
    if nameless is not None:
        raise ValueError(f"row {nameless} of the results has no `name`; its keys are {', '.join(rows[nameless])}")
    left = list(TABLE_1) if (_comparable(rows) if quoted is None else quoted) else []
    lines = []
    for row in rows:
        lines.append(_measured(row))
        for number in [number for number in left if _is_of(row, number)]:
            lines.append(_quoted(number))
            left.remove(number)
    return lines + [_quoted(number) for number in left]


def _is_of(row: Row, number: PaperNumber) -> bool:
    settings = row.get("settings") or {}
    if number.preset is None or number.preset != settings.get("preset"):
        return False
    return number.guidance in (None, settings.get("arguments", {}).get("guidance_scale"))


def _comparable(rows: Sequence[Row]) -> bool:
    """Whether a row has a metric of the paper's table on captions of COCO."""
    return any(
        {"fid", "precision_recall", "clip_score"} & (row.get("metrics") or {}).keys()
        and any(word in str(_prompts(row).get("source")).lower() for word in ("coco", "captions_"))
        for row in rows
    )


def _prompts(row: Row) -> Mapping[str, Any]:
    return (row.get("settings") or {}).get("prompts") or {}


def _measured(row: Row) -> dict[str, Any]:
    metrics, settings = row.get("metrics") or {}, row.get("settings") or {}
    line = {
        "name": row["name"],
        "source": MEASURED,
        "steps": settings.get("arguments", {}).get("num_inference_steps"),
        "images": _prompts(row).get("number"),
        "fid": metrics.get("fid"),
        "clip_score": metrics.get("clip_score"),
        **metrics.get("precision_recall", {}),
    }
    if line["images"] is not None:
        line["images"] *= settings.get("images_per_prompt", 1)
    hps, shapes = metrics.get("hpsv2", {}), metrics.get("shapes", {})
    line |= {"hpsv2": hps.get("mean")} | {f"hpsv2_{style}": score for style, score in hps.get("styles", {}).items()}
    line |= {name: shapes.get(name) for name in ("attributes", "captions")}
    line |= {f"attributes_{name}": share for name, share in shapes.get("by_attribute", {}).items()}
    return {name: value for name, value in (line | _latency(row.get("latency") or {})).items() if value is not None}


def _latency(latency: Mapping[str, Any]) -> dict[str, Any]:
    line = {}
    for size, batch in latency.get("batches", {}).items():
        line |= {f"batch_{size}_{name}": batch[name] for name in ("median_s", "q1_s", "q3_s")}
    return line | {name: latency[name] for name in ("device", "dtype") if name in latency}


def _quoted(number: PaperNumber) -> dict[str, Any]:
    line = {"name": number.name, "source": QUOTED, "origin": number.origin, "steps": number.steps}
    line |= {name: getattr(number, name) for name in ("fid", "clip_score", "precision", "recall")}
    if number.seconds is not None:
        line |= {"batch_1_median_s": number.seconds, "device": "A40"}
    return {name: value for name, value in line.items() if value is not None}


def _columns(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of Markdown: what some measured row has, without the details; the paper's metrics where none has any."""
    measured = [line for line in lines if line["source"] == MEASURED]
    names = list(dict.fromkeys(name for line in measured for name in line))
    if not set(names) & {"fid", "clip_score", "precision"} and len(measured) < len(lines):
        names += ["fid", "clip_score", "precision", "recall"]
    styles = [name for name in names if name.startswith("hpsv2_")]
    times = [name for name in names if name.endswith("_median_s")]
    order = [*_HEADS]
    order[order.index("hpsv2") + 1 : order.index("hpsv2") + 1] = styles
    return [name for name in [*order, *times, "device"] if name in names]


def _head(column: str) -> str:
    if column.startswith("hpsv2_"):
        return f"HPSv2, {column.removeprefix('hpsv2_')} ↑"
    if column.endswith("_median_s"):
        return f"seconds, batch {column.split('_')[1]} ↓"
    return _HEADS[column][0] if column in _HEADS else column


def _cell(line: Mapping[str, Any], column: str) -> str:
    if column not in line:
        return ""
    value = line[column]
    if column.endswith("_median_s"):
        start = column.removesuffix("median_s")
        if start + "q1_s" not in line:
            return f"{value:.3g}"
        return f"{value:.3g} ({line[start + 'q1_s']:.3g} to {line[start + 'q3_s']:.3g})"
    if column.startswith("hpsv2_"):
        return f"{value:.2f}"
    style = _HEADS[column][1] if column in _HEADS else "{}"
    return (_PRINTED.get(column, style) if line["source"] == QUOTED else style).format(value)


def _notes(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    if any(line["source"] == QUOTED for line in lines):
        notes.append(
            f"Rows in italics are quoted, not measured here: {SOURCE}, as printed ({PROTOCOL}). Compare them with what was "
            f"measured by the same protocol only. Their seconds are {SECONDS}."
        )
    if any(name.endswith("_median_s") for line in lines for name in line):
        notes.append("Seconds are medians of whole calls, from text to image, with the quartiles in brackets.")
    return [text for note in notes for text in ("", note)]


def _csv(lines: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
