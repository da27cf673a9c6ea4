"""Flags in checkpoints: which may be others in a resumed run."""

import argparse

import pytest

from diffusers_wadi.distillation.settings import MAY_DIFFER, check_settings, plain_settings, save_settings


def settings(**changes):
    given = {"student_rank": 4, "learning_rate": 0.1, "validation_prompts": ["a", "b"], "hub_token": "hf_secret"}
    return plain_settings(argparse.Namespace(**given | changes))


def test_the_differing_settings_are_named(tmp_path):
    save_settings(settings(), tmp_path)
    assert check_settings(tmp_path, settings()) == {}
    assert check_settings(tmp_path, settings(learning_rate=0.2)) == {"learning_rate": (0.1, 0.2)}
    with pytest.raises(ValueError, match=r"--seed 1 \(now 2\), --student_rank 4 \(now 3\)\. Resume with"):
        save_settings(settings(seed=1), tmp_path)
        check_settings(tmp_path, settings(student_rank=3, learning_rate=0.2, seed=2))


def test_flags_that_only_one_run_knows_and_old_checkpoints_pass(tmp_path):
    assert check_settings(tmp_path, settings()) == {}
    save_settings(settings(former_flag=1), tmp_path)
    assert check_settings(tmp_path, settings(new_flag=1)) == {}


def test_tokens_are_not_written(tmp_path):
    save_settings(settings(), tmp_path)
    assert "hf_secret" not in (tmp_path / "settings.json").read_text()


def test_what_is_trained_may_not_differ():
    method = "student_rank fake_rank guidance_scale seed use_ema score_weighting resolution mixed_precision fake_updates_per_step"
    assert not MAY_DIFFER & set(method.split())
