"""`benchmarks/downstream.py`: one table of several runs, with times that were measured together."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import downstream

sys.path.pop(0)


def rows(who, value, seconds, task="reversion"):
    row = {"task": task, "generator": who, "setting": "learned", "metric": "relation right", "value": value}
    return [row | {"images": 2, "seconds_per_image": seconds}]


def read(folder):
    found = json.loads((folder / "downstream.json").read_text())
    return {(row["task"], row["generator"]): (row["value"], row["seconds_per_image"]) for row in found}


def test_a_generator_that_is_measured_again_keeps_the_times_of_the_run_with_both(tmp_path):
    teacher, student = "teacher, 50 steps", "student, 1 step"
    downstream.write([*rows(teacher, 0.9, 2.0), *rows(student, 0.5, 0.1)], tmp_path)
    downstream.write(rows(teacher, 0.8, 3.0, task="controlnet"), tmp_path)  # of which nothing is known yet
    downstream.write(rows(student, 0.7, 0.4), tmp_path)
    expected = {("reversion", teacher): (0.9, 2.0), ("reversion", student): (0.7, 0.1)}
    assert read(tmp_path) == expected | {("controlnet", teacher): (0.8, 3.0)}
    text = (tmp_path / "downstream.md").read_text()
    assert "| reversion | learned | 2.000 s | 0.100 s | 20.0 |" in text and text.index("controlnet") < text.index(
        "reversion"
    )
    downstream.write([*rows(teacher, 0.6, 4.0), *rows(student, 0.4, 0.2)], tmp_path)
    assert read(tmp_path)["reversion", student] == (0.4, 0.2) and read(tmp_path)["reversion", teacher] == (0.6, 4.0)
