"""Checkpoints: whole or absent, found, rotated, and true to the random states."""

import random

import numpy as np
import pytest
import torch

from diffusers_wadi.distillation import checkpoint


def write_state(folder):
    (folder / checkpoint.STATE_FILE).write_text("state")


def test_a_write_that_fails_leaves_no_folder(tmp_path):
    def fail(folder):
        write_state(folder)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        checkpoint.write_folder(tmp_path / "checkpoint-1", fail)
    assert list(tmp_path.iterdir()) == []
    checkpoint.write_folder(tmp_path / "checkpoint-1", write_state)
    with pytest.raises(RuntimeError):
        checkpoint.write_folder(tmp_path / "checkpoint-1", fail)
    assert (tmp_path / "checkpoint-1" / checkpoint.STATE_FILE).read_text() == "state"


def test_what_a_killed_write_left_is_not_a_checkpoint(tmp_path):
    (tmp_path / ".checkpoint-9.partial").mkdir()
    checkpoint.write_folder(tmp_path / "checkpoint-1", write_state)
    assert checkpoint.find_checkpoint(tmp_path, "latest").name == "checkpoint-1"
    checkpoint.write_folder(tmp_path / "checkpoint-9", write_state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-9"]


def test_writing_again_replaces(tmp_path):
    folder = tmp_path / "checkpoint-1"
    checkpoint.write_folder(folder, lambda path: (path / "old").write_text(""))
    checkpoint.write_folder(folder, write_state)
    assert [path.name for path in folder.iterdir()] == [checkpoint.STATE_FILE]


def test_finding(tmp_path):
    assert checkpoint.find_checkpoint(tmp_path, "latest") is None
    for step in (5, 10, 9):
        checkpoint.write_folder(tmp_path / f"checkpoint-{step}", write_state)
    (tmp_path / "checkpoint-final").mkdir()
    assert checkpoint.find_checkpoint(tmp_path, "latest").name == "checkpoint-10"
    assert checkpoint.find_checkpoint(tmp_path, "checkpoint-5") == tmp_path / "checkpoint-5"
    assert checkpoint.find_checkpoint("elsewhere", str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"
    with pytest.raises(FileNotFoundError, match="checkpoint-7.*checkpoint-10.*latest"):
        checkpoint.find_checkpoint(tmp_path, "checkpoint-7")


@pytest.mark.parametrize("limit, kept", [(None, [1, 2, 10]), (2, [2, 10]), (5, [1, 2, 10])])
def test_rotation_keeps_the_newest(tmp_path, limit, kept):
    for step in (10, 1, 2):
        checkpoint.write_folder(tmp_path / f"checkpoint-{step}", write_state)
    checkpoint.remove_old_checkpoints(tmp_path, limit)
    assert [checkpoint.checkpoint_step(path) for path in checkpoint.list_checkpoints(tmp_path)] == kept


def test_random_states_through_a_file_without_pickled_code(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item(), np.random.randn()

    np.random.randn()  # leaves a cached second value, part of the state
    torch.save(checkpoint.random_states(), tmp_path / "r.pt")
    first = draw()
    checkpoint.set_random_states(torch.load(tmp_path / "r.pt", weights_only=True))
    assert draw() == first


def test_a_run_with_other_parts_is_refused_before_anything_is_loaded():
    linear, generator = torch.nn.Linear(1, 1), torch.Generator()
    state = checkpoint.collect_state({"a": linear, "generator": generator, "ema": None, "step": 3})
    assert state.keys() == {"a", "generator", "step"} and state["step"] == 3
    before = linear.weight.detach().clone()
    with pytest.raises(ValueError, match="use_ema"):
        checkpoint.restore_state({"a": linear, "ema": linear}, state)
    assert torch.equal(linear.weight, before)
