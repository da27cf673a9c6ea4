"""`benchmarks/ablations.py`: in a table only the named factor differs, and a run is taken up again and reported."""

import json
import sys
from pathlib import Path

import pytest
from wadi_script import train_wadi

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import ablations

sys.path.pop(0)

FACTORS = {  # what may differ within a table; learning rates go with adapters and objectives
    "adapter": {"student_adapter", "learning_rate", "warmup_learning_rate", "seed"},
    "student rank": {"student_rank"},
    "fake rank": {"fake_rank"},
    "layers": {"student_layers"},
    "initialisation": {"student_init"},
    "orthogonal": {"student_adapter", "warmup_learning_rate"},
    "learning rate": {"student_adapter", "learning_rate", "warmup_learning_rate"},
    "backbone": set(),
}
OF_A_RECIPE = {  # what a recipe may change: one of these
    frozenset({"t_init"}),
    frozenset({"t_init", "terminal_alpha_cumprod"}),
    frozenset({"regression_weight"}),
    frozenset({"guidance_scale"}),
    frozenset({"score_weighting", "fake_loss_weighting"}),
    frozenset({"fake_updates_per_step"}),
    frozenset({"use_ema", "ema_decay"}),
    frozenset({"fake_learning_rate"}),
}


def parsed(run, folder):
    flags = [*run.command(100), "--pretrained_teacher_model", "t", "--output_dir", str(folder)]
    return vars(train_wadi.parse_args(flags))


@pytest.mark.parametrize("table", FACTORS)
def test_only_the_named_factor_differs(table, tmp_path):
    runs = [parsed(run, tmp_path) for run in ablations.grid() if run.table == table]
    assert len(runs) > 1
    differing = {name for name in runs[0] if len({str(run[name]) for run in runs}) > 1}
    assert differing == FACTORS[table]


def test_objectives_share_budget_data_and_student(tmp_path):
    runs = [parsed(run, tmp_path) for run in ablations.grid() if run.table == "objective"]
    assert {run["objective"] for run in runs} == set(ablations.OBJECTIVES)
    for name in ("max_train_steps", "train_batch_size", "shapes_captions", "seed", "student_rank"):
        assert len({run[name] for run in runs}) == 1


def test_a_recipe_changes_one_thing(tmp_path):
    plain, *others = [parsed(run, tmp_path) for run in ablations.grid() if run.table == "recipe"]
    changed = [frozenset(name for name in plain if run[name] != plain[name]) for run in others]
    assert set(changed) == OF_A_RECIPE


def test_every_run_has_a_file_of_its_own():
    keys = [run.key for run in ablations.grid()]
    assert len(set(keys)) == len(keys) and sum(key.startswith("adapter-lorad-") for key in keys) == 3


def test_the_same_run_in_two_tables_is_made_once():
    runs = ablations.grid()
    first = ablations.first_of_each(runs)
    by_key = {run.key: run for run in runs}
    common = by_key["adapter-lorad-0"]
    for key in (
        "recipe-as-in-the-other-tables-0",
        "student-rank-32-0",
        "initialisation-paper-0",
        "learning-rate-lorad-3e-4-warm-start-2e-3-0",
    ):
        assert first[by_key[key]] == common
    assert first[by_key["adapter-lorad-1"]] == by_key["adapter-lorad-1"]
    assert first[by_key["backbone-PixArt-0"]] == by_key["backbone-PixArt-0"] != first[by_key["backbone-UNet-0"]]


def test_a_run_is_judged_and_taken_up_again(tmp_path, monkeypatch):
    changed = {
        "--shapes_captions 20000 --train_batch_size 16 --mixed_precision bf16": "--shapes_captions 8 --train_batch_size 1",
        "--warmup_regression_steps 150": "--warmup_regression_steps 1",
        "--warmup_regression_pairs 2048 --warmup_num_inference_steps 10": "--warmup_regression_pairs 2 --warmup_num_inference_steps 1",
        "--fake_warmup_steps 60": "--fake_warmup_steps 0",
    }
    for before, after in changed.items():
        assert before in ablations.COMMON
        monkeypatch.setattr(ablations, "COMMON", ablations.COMMON.replace(before, after))
    evaluation = ablations.Evaluation(num_captions=4, num_frechet=0)
    run = ablations.Run(
        "adapter", "lorad", "--student_rank 2 --fake_rank 2 --learning_rate 0.1 --lr_warmup_steps 0 --no-use_ema"
    )
    whole = ablations.run_one(run, 1, 2, evaluation, tmp_path)
    assert [point["step"] for point in whole["curve"]] == [0, 1, 2]
    result = whole["result"]
    assert 0 <= result["attributes"] <= 1 and result["norm"] < 1e-6 < result["direction"]
    assert ablations.run_one(run, 1, 2, None, tmp_path) == whole  # nothing is done twice
    with pytest.raises(ValueError, match="is of another run"):
        ablations.run_one(run, 3, 2, None, tmp_path)
    assert "regression_loss" in whole["curve"][1] and "vsd_loss" in whole["curve"][2]
    assert whole["command"].startswith("train_wadi.py ") and "--learning_rate 0.1 " in whole["command"]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"adapter-lorad-0.json", "pairs-stable-diffusion-0.safetensors"}  # no checkpoints lie about

    stopped, quick, wrong = tmp_path / "stopped", evaluation.quick, []

    def stop_at_the_third(trainer):
        wrong.append(quick(trainer))
        if len(wrong) == 3:
            raise KeyboardInterrupt
        return wrong[-1]

    stopped.mkdir()
    monkeypatch.setattr(evaluation, "quick", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        ablations.run_one(run, 1, 2, evaluation, stopped)
    assert "result" not in json.loads((stopped / "adapter-lorad-0.json").read_text())
    updates = []
    monkeypatch.setattr(ablations.WaDiTrainer, "update", lambda trainer: updates.append(trainer.step))
    again = ablations.run_one(run, 1, 2, evaluation, stopped)
    assert again["result"] == result and [point["step"] for point in again["curve"]] == [0, 1, 2]
    assert not updates  # the checkpoint is of the last one
    assert "| lorad | 1 |" in ablations.report(tmp_path)
    assert (tmp_path / "ablations.png").is_file() and (tmp_path / "ablations.md").is_file()


def test_spread_over_seeds():
    assert ablations._cell([0.5, 0.7], "{:.1f}") == "0.6 ± 0.1" and ablations._cell([None], "{:.1f}") == ""
