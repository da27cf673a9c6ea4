"""The ControlNet's script: resuming equals not stopping, and what it writes is diffusers' own and moves images."""

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel

SCRIPT = Path(__file__).parents[2] / "training" / "train_shapes_controlnet.py"
SMALL = ["--num_train_images", "8", "--train_batch_size", "2", "--max_train_steps", "4", "--mixed_precision", "no"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_shapes_controlnet", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, folder, *flags):
    flags = ["--output_dir", str(folder), *SMALL, "--checkpointing_steps", "2", "--validation_steps", "0", *flags]
    script.main(script.parse_args(flags))
    return torch.load(folder / "controlnet.pt", weights_only=True)


def test_resumed_equals_uninterrupted_and_others_settings_are_refused(script, tmp_path, monkeypatch):
    whole = run(script, tmp_path / "whole")
    update, calls = script.Training.update, []

    def interrupted(training, loss):
        calls.append(training.step)
        if len(calls) == 4:  # after a checkpoint and a further step
            raise KeyboardInterrupt
        update(training, loss)

    monkeypatch.setattr(script.Training, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(script, tmp_path / "parts")
    assert not (tmp_path / "parts" / "controlnet").exists()
    resumed = run(script, tmp_path / "parts")
    assert calls == [0, 1, 2, 3, 2, 3]
    for name, tensor in whole["controlnet"].items():
        assert torch.equal(tensor, resumed["controlnet"][name]), name

    written = ControlNetModel.from_pretrained(tmp_path / "parts" / "controlnet")
    assert all(torch.equal(tensor, whole["controlnet"][name]) for name, tensor in written.state_dict().items())
    assert written.controlnet_mid_block.weight.abs().max() > 0
    assert [file.suffix for file in sorted((tmp_path / "parts" / "controlnet").iterdir())] == [".json", ".safetensors"]
    with pytest.raises(ValueError, match="made with --condition mask, and now it is edge"):
        run(script, tmp_path / "parts", "--condition", "edge")


def test_a_batch_depends_on_seed_and_step_alone(script):
    args = script.parse_args(["--output_dir", "x", "--train_batch_size", "4096"])
    batch, again = (script.draw_batch(args, 7, 100, 1000) for _ in range(2))
    other = script.draw_batch(args, 8, 100, 1000)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["noise"], other["noise"])
    assert 0 <= batch["t"].min() and batch["t"].max() == 999
    assert abs((batch["t"] >= 900).float().mean() - 0.1 ** (1 / 3)) < 0.03  # cubic: u < 0.1 ** (1/3)
    assert abs(batch["dropped"].float().mean() - 0.1) < 0.02
