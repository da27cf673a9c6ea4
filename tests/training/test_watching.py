"""What a run shows: samples through the pipeline, trackers, updates left out, and no waiting for the device."""

import logging
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from wadi_script import PROMPTS

from diffusers_wadi import WaDiPipeline
from diffusers_wadi.distillation import guard, monitoring, samples, steps
from diffusers_wadi.distillation.trainer import WaDiTrainer


@pytest.fixture
def run(tiny_run):
    return partial(tiny_run, *"--validation_steps 0 --learning_rate 0.1".split())


class Tracker:
    """Takes images, or fails."""

    def __init__(self, name, fails=False):
        self.name, self.fails, self.images = name, fails, []

    def log_images(self, values, step):
        if self.fails:
            raise ConnectionError("no network")
        self.images.append((step, values))

    def log(self, values, step):
        self.scalars = step, values

    def finish(self):
        pass


def test_samples_are_what_users_get_and_all_trackers_get_them(run, base_folder, monkeypatch, caplog):
    args = run(*"--max_train_steps 2 --checkpointing_steps 2 --use_ema --ema_decay 0.5 --validation_steps 1".split())
    trained = WaDiTrainer(args)
    trackers = [Tracker("first"), Tracker("broken", fails=True), Tracker("last")]
    monkeypatch.setattr(trained.accelerator, "trackers", trackers)
    trained.train()
    grid = Image.open(Path(args.output_dir) / "samples" / "step-000002.png")

    pipe = WaDiPipeline.from_pretrained(args.output_dir)
    noise = torch.randn(len(PROMPTS), *trained.latent_shape, generator=torch.Generator().manual_seed(0))
    images = pipe(PROMPTS, latents=noise).images
    expected = np.concatenate([np.asarray(image) for image in images], axis=1).astype(int)
    assert np.abs(np.asarray(grid).astype(int) - expected).max() <= 1
    assert np.asarray(grid).std() > 1

    for tracker in (trackers[0], trackers[2]):
        assert [step for step, _ in tracker.images] == [0, 1, 2]
        assert np.array_equal(np.asarray(tracker.images[-1][1]["validation"]), np.asarray(grid))
    assert trackers[0].scalars[0] == 2 and trackers[0].scalars == trackers[2].scalars
    assert "broken did not take the samples of step 2: no network" in caplog.text


def test_validation_leaves_the_training_as_it_was(run):
    ends = []
    for every in (0, 1):
        trained = WaDiTrainer(run("--max_train_steps", 2, "--validation_steps", every, "--gradient_checkpointing"))
        trained.train()
        ends.append(torch.cat([p.detach().flatten() for p in trained.networks.student_parameters()]))
        assert trained.networks.model.training
    assert torch.equal(*ends)


def test_what_trackers_are_told(run):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = "--max_train_steps 4 --logging_steps 2 --validation_steps 4 --report_to tensorboard"
    WaDiTrainer(args := run(*flags.split())).train()
    folder = next(Path(args.output_dir).rglob("events.out.tfevents*")).parent
    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    wanted = {"vsd_loss", "fake_loss", "score_grad", "student_grad", "fake_grad", "student_lr", "fake_lr", "memory_gb"}
    wanted |= {"images_per_second", "left_out"}
    wanted |= {f"{role}_{name}" for role in ("student", "fake") for name in ("angle", "beyond_right_angle")}
    assert wanted <= set(tags["scalars"])
    values = {tag: [event.value for event in events.Scalars(tag)] for tag in wanted}
    assert all(len(series) == 2 for series in values.values())
    assert values["student_lr"] == pytest.approx([0.1, 0.1]) and values["fake_lr"] == pytest.approx([0.01, 0.01])
    assert values["student_angle"][1] > values["student_angle"][0] > 0
    assert values["images_per_second"][0] > 0 and 0.1 < values["memory_gb"][0] < 100
    assert [image.step for image in events.Images(tags["images"][0])] == [0, 4]


def break_loss(monkeypatch, broken_steps, trained):
    original = steps.WaDiSteps.student_loss

    def student_loss(self, *inputs):
        loss, logs = original(self, *inputs)
        return (loss * float("nan") if trained.step in broken_steps else loss), logs

    monkeypatch.setattr(steps.WaDiSteps, "student_loss", student_loss)


def test_a_broken_update_is_left_out_and_reported(run, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, logger=monitoring.logger.name)
    trained = WaDiTrainer(run("--max_train_steps", 4, "--logging_steps", 1, "--max_bad_steps", 2))
    break_loss(monkeypatch, {1}, trained)
    before = []
    for _ in range(2):
        trained.update()
        before.append([p.detach().clone() for p in trained.networks.student_parameters()])
    assert all(torch.equal(*pair) for pair in zip(*before))
    trained.train()
    assert all(p.isfinite().all() for p in trained.networks.student_parameters())
    assert any(not torch.equal(p, old) for p, old in zip(trained.networks.student_parameters(), before[1]))
    assert "1 updates left out so far" in caplog.text


def test_too_many_broken_updates_in_a_row_stop_the_run(run, monkeypatch):
    trained = WaDiTrainer(run("--max_train_steps", 9, "--logging_steps", 1, "--max_bad_steps", 3))
    break_loss(monkeypatch, range(2, 9), trained)
    with pytest.raises(FloatingPointError, match="3 updates in a row .*--max_bad_steps 3.*up to step 5"):
        trained.train()


class Waits(TorchDispatchMode):
    """Counts how often a number is fetched from the device."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **keywords or {})


def test_an_update_does_not_wait_for_the_device(run, monkeypatch):
    make = steps.make_optimizer

    def fused(*arguments):
        optimizer = make(*arguments)
        optimizer.param_groups[0]["fused"] = True
        return optimizer

    monkeypatch.setattr(steps, "make_optimizer", fused)  # as on a GPU
    trained = WaDiTrainer(run("--max_train_steps", 3, "--use_ema", "--regression_weight", 1,
                              "--warmup_regression_pairs", 2, "--warmup_num_inference_steps", 1))  # fmt: skip
    log = monitoring.RunLog(trained.args, trained.accelerator, trained.networks, trained.steps.trainees(), 3, 0)
    log.add(trained.update())
    with Waits() as waits:
        log.add(trained.update())
    assert waits.count == 0
    with waits:
        log.report(2)
    assert waits.count < 20
    assert isinstance(trained.steps.student.guard, guard.StepGuard) and samples.GridPainter
