"""The teacher's script: resuming equals not stopping, and what it writes is an ordinary pipeline."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_wadi.shapes import models

SCRIPT = Path(__file__).parents[2] / "training" / "train_shapes_teacher.py"
SMALL = ["--num_train_images", "64", "--vae_batch_size", "2", "--unet_batch_size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_shapes_teacher", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, folder, *flags):
    script.main(script.parse_args(["--output_dir", str(folder), *SMALL, *flags]))
    return torch.load(folder / "unet.pt", weights_only=True)


def test_resumed_equals_uninterrupted_to_the_bit(script, tmp_path, monkeypatch):
    flags = ("--vae_steps", "4", "--unet_steps", "4", "--checkpointing_steps", "2", "--validation_steps", "100")
    whole = run(script, tmp_path / "whole", *flags)

    step_optimizer = script.Stage.step_optimizer
    calls = []

    def interrupted(stage, loss):
        calls.append(stage.name)
        if len(calls) in (4, 8):  # in the middle of the VAE, then of the UNet, after a checkpoint and a further step
            raise KeyboardInterrupt
        step_optimizer(stage, loss)

    monkeypatch.setattr(script.Stage, "step_optimizer", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(script, tmp_path / "parts", *flags)
    resumed = run(script, tmp_path / "parts", *flags)
    assert calls[3] == "vae" and calls[7] == "unet"
    for part in ("unet", "text"):
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, resumed[part][name]), name
    assert torch.equal(whole["generator"], resumed["generator"])

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "parts" / "pipeline")
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert next(pipeline.unet.parameters()).dtype == torch.float32
    image = pipeline("a red ring on a white background", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()


def test_standardised_latents_decode_to_the_same_images(script):
    torch.manual_seed(0)
    vae = models.build_vae().eval()
    pixels = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        image = vae.decode(before.mean).sample
        latents = script.standardise_latents(vae, before.mean)
        after = vae.encode(pixels).latent_dist
        std = before.mean.std(dim=(0, 2, 3))[:, None, None]
        torch.testing.assert_close(after.mean, latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after.std * std, before.std, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vae.decode(latents).sample, image, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4))


def test_the_kl_weight_rises_after_its_warmup(script, tmp_path, monkeypatch):
    vae_loss, weights = script.vae_loss, []

    def recorded(vae, pixels, generator, kl_weight):
        weights.append(kl_weight)
        return vae_loss(vae, pixels, generator, kl_weight)

    monkeypatch.setattr(script, "vae_loss", recorded)
    run(script, tmp_path, "--vae_steps", "4", "--unet_steps", "1", "--kl_weight", "4e-3", "--kl_warmup_steps", "2")
    assert weights == [1e-4, 1e-4, 4e-3, 4e-3]


def test_a_folder_that_cannot_be_written_is_refused_first(script, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(script, tmp_path / "file" / "inside")


@pytest.mark.parametrize("flag", ["--validation_steps", "--checkpointing_steps", "--unet_steps"])
def test_zero_steps_are_refused_first(script, tmp_path, flag):
    with pytest.raises(ValueError, match=f"{flag} is 0"):
        run(script, tmp_path / "out", flag, "0")
    assert not (tmp_path / "out").exists()


def test_relation_loss_is_the_cross_entropy_after_the_relation(script):
    ids = torch.tensor([5, 6, 7, 8])
    tokens = torch.tensor([[1, 2, 7, 3], [1, 2, 3, 3]])  # the third relation at place 2; none
    states = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    logits = 3 * states[0, 2:, :4]
    expected = -logits.log_softmax(-1)[:, 2].mean()
    torch.testing.assert_close(script.relation_loss(states, tokens, ids), expected)
    assert script.relation_loss(states[1:], tokens[1:], ids) == 0
