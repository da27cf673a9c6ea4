"""The flags of `training/train_wadi.py`: defaults, refusals, help. Nothing is loaded or trained."""

import os
from pathlib import Path

import pytest
from wadi_script import SCRIPT, train_wadi

from diffusers_wadi import distillation


@pytest.fixture
def parse(tmp_path):
    """Parse the required flags and those given."""
    required = f"--pretrained_teacher_model t --train_prompts p --output_dir {tmp_path / 'out'}".split()
    return lambda *flags: train_wadi.parse_args(required + [str(flag) for flag in flags])


BAD_FLAGS = {
    "--student_rank 0": "student_rank is 0, expected at least 1",
    "--learning_rate 0": "learning_rate is 0.0, expected more than 0",
    "--proportion_empty_prompts 2": "from 0 to 1",
    "--ema_decay 1.5": "ema_decay is 1.5, expected from 0 to 1",
    "--adam_beta2 1": "adam_beta2 is 1.0, expected from 0 to below 1",
    "--terminal_alpha_cumprod 1": "between 0 and 1",
    "--min_timestep 500 --max_timestep 400": "--min_timestep 500 is above --max_timestep 400",
    "--fake_min_timestep 9 --fake_max_timestep 8": "--fake_min_timestep 9 is above --fake_max_timestep 8",
    "--logging_steps 0": "logging_steps is 0, expected at least 1",
    "--checkpointing_steps 0": "checkpointing_steps is 0, expected at least 1",
    "--num_train_epochs 0": "num_train_epochs is 0, expected at least 1",
    "--gradient_accumulation_steps 0": "gradient_accumulation_steps is 0, expected at least 1",
    "--warmup_regression_pairs 0": "warmup_regression_pairs is 0, expected at least 1",
    "--warmup_regression_steps -1": "warmup_regression_steps is -1, expected at least 0",
    "--regression_weight -1": "regression_weight is -1.0, expected at least 0",
    "--shapes_captions 5": "exactly one of",
    "--report_to tensorboard,nosuchtracker": "names 'nosuchtracker', expected none, all or some of",
    "--report_to dvclive": "that package is not installed",
    "--init_student nowhere": "does not exist",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_refused_at_once(parse, flags):
    with pytest.raises(ValueError, match=BAD_FLAGS[flags]):
        parse(*flags.split())


def test_output_folder_that_cannot_be_written(parse, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--output_dir .* cannot be written"):
        parse("--output_dir", tmp_path / "file" / "out")


RELEASE = {
    "guidance_scale": 1.5,
    "student_rank": 256,
    "fake_rank": 32,
    "score_weighting": "sigma2",
    "fake_loss_weighting": "alpha2",
    "fake_updates_per_step": 1,
    "min_timestep": 20,
    "max_timestep": 980,
    "fake_min_timestep": 0,
    "proportion_empty_prompts": 0.1,
    "empty_prompts_per": "batch",
    "train_batch_size": 16,
    "num_train_epochs": 2,
    "learning_rate": 1e-4,
    "fake_learning_rate": 1e-2,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 0.0,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "ema_decay": 0.999,
    "use_ema": False,
    "regression_weight": 0.0,
    "warmup_regression_steps": 0,
}


def test_defaults_are_the_releases(parse):
    defaults = vars(parse())
    assert {name: defaults[name] for name in RELEASE} == RELEASE
    assert defaults["fake_guidance_scale"] is None  # the teacher's


def test_the_number_of_threads_is_set_where_accelerate_looks(parse, monkeypatch):
    """Of several processes on CPUs, each would otherwise get a thread for every core."""
    given = []
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr("torch.set_num_threads", given.append)
    monkeypatch.setattr(train_wadi, "make_plan", lambda args: "the plan")
    train_wadi.main(parse("--dry_run", "--num_threads", 3))
    assert os.environ["OMP_NUM_THREADS"] == "3" and given == [3]


def test_every_flag_is_explained_and_used(parse, capsys):
    with pytest.raises(SystemExit):
        train_wadi.parse_args(["--help"])
    shown = capsys.readouterr().out
    package = Path(distillation.__file__).parent
    sources = "".join(path.read_text() for path in [*package.glob("*.py"), SCRIPT])
    for name in vars(parse()):
        assert f"--{name}" in shown and f"args.{name}" in sources, name


def test_a_schedule_that_needs_rules_of_its_own_is_not_offered(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--lr_scheduler", "piecewise_constant")
    assert "invalid choice" in capsys.readouterr().err
    assert parse("--lr_scheduler", "cosine").lr_scheduler == "cosine"
