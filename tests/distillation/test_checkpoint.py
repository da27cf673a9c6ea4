"""Checkpoints: whole or absent, found, rotated, and true to the random states."""

import os
import random
import signal
import sys

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

    with pytest.raises(OSError, match="checkpoint-1 could not be written .disk full.* None is there yet"):
        checkpoint.write_folder(tmp_path / "checkpoint-1", fail)
    assert list(tmp_path.iterdir()) == []
    checkpoint.write_folder(tmp_path / "checkpoint-1", write_state)
    with pytest.raises(OSError, match="checkpoint-1 is whole.*--resume_from_checkpoint latest"):
        checkpoint.write_folder(tmp_path / "checkpoint-1", fail)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_folder(tmp_path / "checkpoint-2", lambda folder: signal.raise_signal(signal.SIGINT))
    assert (tmp_path / "checkpoint-1" / checkpoint.STATE_FILE).read_text() == "state"


def test_what_a_killed_write_left_is_not_a_checkpoint(tmp_path):
    (tmp_path / ".checkpoint-9.partial").mkdir()
    checkpoint.write_folder(tmp_path / "checkpoint-1", write_state)
    assert checkpoint.find_checkpoint(tmp_path, "latest").name == "checkpoint-1"
    checkpoint.write_folder(tmp_path / "checkpoint-9", write_state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-9"]


def write_pair(content):
    """A checkpoint of two files, whole if they agree."""
    return lambda folder: [(folder / name).write_text(content) for name in ("adapter", checkpoint.STATE_FILE)]


def content_of(folder):
    contents = {path.name: path.read_text() for path in folder.iterdir()}
    assert contents.keys() == {"adapter", checkpoint.STATE_FILE} and len(set(contents.values())) == 1, folder
    return contents["adapter"]


def a_few_steps(folder):
    """What a run does to its checkpoints, the repetition of a step after a resume from an earlier one included."""
    checkpoint.clean_up(folder)
    checkpoint.write_folder(folder / "checkpoint-3", write_pair("second"))
    checkpoint.set_aside_later(folder, 3)
    checkpoint.remove_old_checkpoints(folder, 2)
    checkpoint.write_folder(folder / "checkpoint-4", write_pair("second"))
    checkpoint.remove_old_checkpoints(folder, 1)


def the_same_step_again(folder):
    """The only checkpoint there is, written once more."""
    checkpoint.write_folder(folder / "checkpoint-4", write_pair("second"))


def dies_at(count, action, folder):
    """Run `action(folder)` in a fork that kills itself at the given file operation; whether it got that far."""
    child = os.fork()
    if child == 0:
        seen = 0

        def kill(event, arguments):
            nonlocal seen
            seen += event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
            if seen == count and event != "os.kill":  # which os.kill itself announces
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        action(folder)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("action, steps", [(a_few_steps, (1, 2, 4)), (the_same_step_again, (4,))])
def test_killed_at_any_file_operation(tmp_path, action, steps):
    """Whatever is named as a checkpoint is whole, and there always is one to go on from."""
    count, killed = 0, True
    while killed:
        count += 1
        folder = tmp_path / str(count)
        for step in steps:
            checkpoint.write_folder(folder / f"checkpoint-{step}", write_pair("first"))
        killed = dies_at(count, action, folder)
        for half in range(1, 6):  # a second death, while cleaning up after the first, until that is done
            if not dies_at(half, checkpoint.clean_up, folder):
                break
        checkpoint.clean_up(folder)
        found = checkpoint.find_checkpoint(folder, "latest")
        assert found is not None and not list(folder.glob(".*"))
        assert all(content_of(path) in ("first", "second") for path in folder.iterdir())
        if not killed:
            assert [(path.name, content_of(path)) for path in checkpoint.list_checkpoints(folder)] == [
                ("checkpoint-4", "second")
            ]
    assert count > 10


def test_other_hidden_files_stay(tmp_path):
    (tmp_path / ".checkpoint-mine.partial").mkdir()
    (tmp_path / ".gitignore").write_text("")
    (tmp_path / ".pytorch_lorad_weights-x8_dk2lm.safetensors").write_text("half")
    checkpoint.clean_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".checkpoint-mine.partial", ".gitignore"]


def test_checkpoints_of_an_abandoned_branch_are_not_the_latest(tmp_path):
    for step in (2, 4, 6):
        checkpoint.write_folder(tmp_path / f"checkpoint-{step}", write_pair("first"))
    checkpoint.write_folder(tmp_path / "checkpoint-3", write_pair("second"))
    moved = checkpoint.set_aside_later(tmp_path, 3)
    assert [path.name for path in moved] == ["abandoned-checkpoint-4", "abandoned-checkpoint-6"]
    assert checkpoint.find_checkpoint(tmp_path, "latest").name == "checkpoint-3"
    assert content_of(moved[0]) == "first"
    assert checkpoint.find_checkpoint(tmp_path, "abandoned-checkpoint-6") == moved[1]


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
