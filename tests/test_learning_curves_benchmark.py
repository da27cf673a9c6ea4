"""`benchmarks/learning_curves.py`: its rows are runs of the script, and cover every adapter and objective."""

import json
import sys
from pathlib import Path

import pytest
from wadi_script import train_wadi

from diffusers_wadi.distillation.adapters import KINDS
from diffusers_wadi.distillation.objectives import OBJECTIVES

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import learning_curves

sys.path.pop(0)


def parsed(name, folder):
    flags = f"{learning_curves.COMMON} {learning_curves.ROWS[name].flags} --pretrained_teacher_model t --output_dir {folder}"
    return train_wadi.parse_args(flags.split())


def test_the_rows_are_all_adapters_and_objectives(tmp_path):
    rows = learning_curves.ROWS
    adapters = {parsed(name, tmp_path).student_adapter for name, row in rows.items() if not row.objective}
    objectives = {parsed(name, tmp_path).objective for name, row in rows.items() if row.objective}
    assert adapters == set(KINDS) and objectives == set(OBJECTIVES)
    assert all(parsed(name, tmp_path).objective == name for name, row in rows.items() if row.objective)


def result(errors, objective=False):
    curve = [{"energy": e, "wrong": e / 2} if objective else {"error": e} for e in errors]
    before = [{"energy": 0.9, "wrong": 0.45}] if objective else []
    row = {"flags": "--some 1", "objective": objective, "trained": 1234, "before": before, "steps": [0, 5]}
    return row | {"curve": curve, "seconds": 0.5}


def test_results_are_added_to_those_that_are_there(tmp_path):
    first = {"machine": "m", "rows": {"lorad": result([0.4, 0.3]), "lora": result([0.4, 0.5])}}
    learning_curves.write(first, tmp_path)
    both = learning_curves.write({"machine": "m", "rows": {"wadi": result([0.6, 0.2], objective=True)}}, tmp_path)
    assert list(both["rows"]) == ["lorad", "lora", "wadi"]
    assert json.loads((tmp_path / "learning_curves.json").read_text()) == both
    table = (tmp_path / "learning_curves.md").read_text()
    assert "| lorad | 1,234 | 0.50 | 0.400 | 0.300 | yes |" in table
    assert "| lora | 1,234 | 0.50 | 0.400 | 0.500 | no |" in table
    assert "| wadi | 1,234 | 0.50 | 0.900 | 0.600 | 0.200 | yes |" in table
    assert "| wadi | 1,234 | 0.50 | 45.0% | 30.0% | 10.0% | yes |" in table


@pytest.mark.parametrize("length, points", [(300, 4), (200, 4), (7, 3)])
def test_the_last_update_is_measured(length, points):
    steps = learning_curves.measured_steps(length, points)
    assert steps[-1] == length and len(steps) == points and steps == sorted(set(steps))
