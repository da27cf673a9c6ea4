#!/usr/bin/env python
"""The four downstream tasks on Shapes World in one table: multi-step teacher beside one-step student.

    python benchmarks/downstream.py --work_dir downstream-work --output_dir benchmarks/results

What a task needs (a ControlNet, an embedding, subject adapters) is trained into `--work_dir` where it is not there yet.
The last table holds, for each task, the time of a 50-step image against a one-step image of the same run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

WHO = ("teacher", "student")
TASKS = ("controlnet", "reversion", "scalecrafter", "dreambooth")
COLUMNS = ("task", "generator", "setting", "metric", "value", "images", "seconds_per_image")


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line a measurement; shares as they are, seconds with three digits."""
    lines = ["| " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [f"{row[c]:.3f}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speedups(rows: list[dict[str, Any]]) -> str:
    """Seconds of one image by teacher and by student, and their ratio, for each task and setting that both have."""
    lines = ["| task | setting | teacher | student | ratio |", "|---|---|---|---|---|"]
    seconds: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row.get("seconds_per_image"):
            who = row["generator"].split(",")[0]
            seconds.setdefault((row["task"], row["setting"]), {}).setdefault(who, row["seconds_per_image"])
    for (task, setting), found in seconds.items():
        if {"teacher", "student"} <= set(found):
            many, one = found["teacher"], found["student"]
            lines.append(f"| {task} | {setting} | {many:.3f} s | {one:.3f} s | {many / one:.1f} |")
    return "\n".join(lines)


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """downstream.json and downstream.md; tasks and generators that were not measured this time keep their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "downstream.json"
    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    rows = [row | {"machine": machine} for row in rows]
    new = {(row["task"], row["generator"]) for row in rows}
    old = json.loads(path.read_text()) if path.is_file() else []
    if len({row["generator"] for row in rows}) < len(WHO):
        keep_times(rows, old)
    rows = sorted((*[r for r in old if (r["task"], r["generator"]) not in new], *rows), key=_place)
    text = f"{markdown(rows)}\n\n{speedups(rows)}\n\n{'; '.join(sorted({row['machine'] for row in rows}))}\n"
    for name, content in (("downstream.json", json.dumps(rows, indent=1) + "\n"), ("downstream.md", text)):
        (folder / f"{name}.tmp").write_text(content)
        os.replace(folder / f"{name}.tmp", folder / name)


def keep_times(rows: list[dict[str, Any]], old: list[dict[str, Any]]) -> None:
    """Put the `old` seconds into `rows` of the same cell: only those were measured in one run with the other generator's."""
    former = {_cell(row): row["seconds_per_image"] for row in old}
    for row in rows:
        row["seconds_per_image"] = former.get(_cell(row), row["seconds_per_image"])


def _cell(row: dict[str, Any]) -> tuple[str, ...]:
    return row["task"], row["generator"], row["setting"]


def _place(row: dict[str, Any]) -> tuple[int, int]:
    return TASKS.index(row["task"]), WHO.index(row["generator"].split(",")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--who",
        nargs="+",
        choices=WHO,
        default=list(WHO),
        help="Default: both. Times stay those of the run with both.",
    )
    parser.add_argument("--images", type=int, default=256, help="Images per cell. Default: 256.")
    parser.add_argument("--steps", type=int, default=50, help="Steps of the teacher. Default: 50.")
    parser.add_argument("--work_dir", type=Path, required=True, help="Folder for what is trained.")
    parser.add_argument("--output_dir", type=Path, default=None, help="Folder for downstream.json and downstream.md.")
    parser.add_argument("--num_threads", type=int, default=None, help="CPU threads. Default: torch's choice.")
    args = parser.parse_args()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    for task in args.tasks:
        module = importlib.import_module(f"downstream_{task}")
        rows = module.measure(images=args.images, steps=args.steps, work_dir=args.work_dir / task, who=args.who)
        print(markdown(rows), speedups(rows), sep="\n\n", flush=True)
        if args.output_dir:
            write(rows, args.output_dir)


if __name__ == "__main__":
    main()
