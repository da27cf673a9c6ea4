"""Runs that are killed, interrupted or out of disk space, and resumed.

The twenty kills of the acceptance test, a few minutes:

    WADI_KILLS=20 python -m pytest tests/training/test_interruptions.py -k kill
"""

import os
import random
import signal
import socket
import time

import pytest
from killable_run import KillableRun, outcome
from wadi_script import PROMPTS, SIZES, assert_same

KILLS = int(os.environ.get("WADI_KILLS", 2))
STEPS = 5


@pytest.fixture(scope="module")
def flags(base_folder, tmp_path_factory):
    """Flags of a tiny run into a folder: checkpoints every other step, in the middle of an epoch, two batches a step."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    given = f"--pretrained_teacher_model {base_folder} --train_prompts {prompts} {' '.join(SIZES)}"
    small = "--train_batch_size 1 --gradient_accumulation_steps 2 --validation_steps 0 --use_ema --learning_rate 0.01"
    often = f"--max_train_steps {STEPS} --checkpointing_steps 2 --checkpoints_total_limit 2 --num_threads 1"
    resume = "--resume_from_checkpoint latest"
    return lambda folder: [*f"{given} {small} {often} {resume}".split(), "--output_dir", str(folder)]


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    """(files of the finished run, seconds from its first update to its end)."""
    folder = tmp_path_factory.mktemp("whole")
    run, start = KillableRun(flags(folder)), time.perf_counter()
    assert run.finish() == 0
    return outcome(folder, STEPS), time.perf_counter() - start


def checkpoints(folder):
    """All that has to do with checkpoints, hidden or not."""
    return sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)


def finished(flags, folder):
    assert KillableRun(flags(folder)).finish() == 0
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []
    return outcome(folder, STEPS)


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_killed_run_ends_with_the_weights_of_the_uninterrupted_one(flags, uninterrupted, tmp_path, seed):
    files, seconds = uninterrupted
    draw = random.Random(seed)
    for _ in range(2):  # the second kill hits the resumed run
        run = KillableRun(flags(tmp_path))
        time.sleep(draw.uniform(0, seconds))
        run.process.kill()
        assert run.finish() in (-signal.SIGKILL, 0)
    assert_same(finished(flags, tmp_path), files)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_saves_and_says_how_to_resume(flags, uninterrupted, tmp_path, number, code):
    files, _ = uninterrupted
    run = KillableRun(flags(tmp_path))
    os.kill(run.process.pid, number)
    assert run.finish() == code
    assert checkpoints(tmp_path) == ["checkpoint-1"]  # of the update during which the signal came
    assert_same(finished(flags, tmp_path), files)


def test_a_full_disk_leaves_the_last_checkpoint_whole(flags, uninterrupted, tmp_path):
    files, _ = uninterrupted
    run = KillableRun(flags(tmp_path))
    while not (tmp_path / "checkpoint-2").exists():
        time.sleep(0.001)
    run.process.kill()
    run.finish()
    before = checkpoints(tmp_path)
    full = KillableRun(flags(tmp_path), file_limit=20_000)
    full.finish()
    message = full.messages.recv()
    assert message.startswith("OSError") and "could not be written" in message and "GB are free" in message
    assert f"{before[-1]} is whole" in message and "--resume_from_checkpoint latest" in message
    assert checkpoints(tmp_path) == before
    assert_same(finished(flags, tmp_path), files)


def two_processes(flags):
    """Both runs, at their first update."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    places = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    runs = [KillableRun(flags, environment=common | place) for place in places]
    for run in runs:
        run.wait_for_start()
    return runs


def test_two_processes_stop_together_and_resume(flags, tmp_path):
    """The signal reaches one of them; both stop after the same update, and go on as if they had not."""
    pytest.importorskip("tensorboard")
    watched = "--logging_steps 3 --report_to tensorboard --validation_steps 4".split()
    whole = two_processes([*flags(tmp_path / "whole"), *watched])
    assert [run.finish() for run in whole] == [0, 0]
    stopped = two_processes([*flags(tmp_path / "cut"), *watched])
    os.kill(stopped[1].process.pid, signal.SIGTERM)
    assert [run.finish() for run in stopped] == [143, 143]
    assert checkpoints(tmp_path / "cut") == ["checkpoint-2", "checkpoint-3"]  # they ask each other every third update
    resumed = two_processes([*flags(tmp_path / "cut"), *watched])
    assert [run.finish() for run in resumed] == [0, 0]
    assert len(outcome(tmp_path / "cut", STEPS)["state"]["randoms"]) == 2
    assert_same(*(outcome(tmp_path / name, STEPS) for name in ("cut", "whole")))
    assert len(list((tmp_path / "whole" / "samples").iterdir())) == 3
