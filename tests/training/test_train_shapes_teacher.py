"""The teacher's script: resuming equals not stopping, and what it writes is an ordinary pipeline."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from wadi_script import load_script

from diffusers_wadi.shapes import models, pixart, teachers

SMALL = ["--num_train_images", "16", "--vae_batch_size", "2", "--unet_batch_size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def script():
    return load_script("train_shapes_teacher")


def run(script, folder, *flags, name="unet"):
    script.main(script.parse_args(["--output_dir", str(folder), *SMALL, *flags]))
    return torch.load(folder / f"{name}.pt", weights_only=True)


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


@pytest.fixture
def vae_folder(tmp_path):
    torch.manual_seed(0)
    models.build_vae().save_pretrained(tmp_path / "base" / "vae")
    return tmp_path / "base"


def test_a_pixart_teacher_resumes_to_the_bit_and_is_an_ordinary_pipeline(script, tmp_path, vae_folder, monkeypatch):
    flags = (
        "--denoiser",
        "pixart",
        "--pretrained_vae",
        str(vae_folder),
        "--unet_steps",
        "3",
        "--checkpointing_steps",
        "2",
    )
    whole = run(script, tmp_path / "whole", *flags, "--validation_steps", "100", name="pixart")
    step_optimizer, calls = script.Stage.step_optimizer, []

    def interrupted(stage, loss):
        calls.append(stage.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        step_optimizer(stage, loss)

    monkeypatch.setattr(script.Stage, "step_optimizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(script, tmp_path / "parts", *flags, name="pixart")
    resumed = run(script, tmp_path / "parts", *flags, name="pixart")
    assert set(calls) == {"pixart"}
    for part in ("pixart", "text"):
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, resumed[part][name]), name

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "parts" / "pipeline")
    assert type(pipeline).__name__ == "PixArtAlphaPipeline"
    assert next(pipeline.text_encoder.parameters()).dtype == torch.float32
    given = AutoencoderKL.from_pretrained(vae_folder / "vae").state_dict()
    assert all(torch.equal(given[name].half(), tensor.half()) for name, tensor in pipeline.vae.state_dict().items())
    image = pipeline("a red ring", num_inference_steps=2, output_type="np", use_resolution_binning=False).images
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()


def test_pixart_training_sees_the_text_as_the_pipeline_does():
    """Though it pads to 16 tokens and the pipeline to 120."""
    torch.manual_seed(0)
    captions = [
        "a red ring on a white background",
        "",
        "a small cyan star below a large red heart on a gray background",
    ]
    teacher = teachers.PixArtTeacher(models.build_vae(), "cpu")
    for layer in teacher.denoiser.modules():  # zero at the start, which would hide the text
        if isinstance(layer, torch.nn.Linear) and not layer.weight.any():
            torch.nn.init.normal_(layer.weight, std=0.1)
    tokens, x_t, t = teacher.tokenize(captions), torch.randn(3, 4, 8, 8), torch.tensor([3, 500, 999])
    longest = teacher.tokenizer(captions[2]).input_ids
    assert len(longest) <= pixart.MAX_TOKENS and teacher.tokenizer.unk_token_id not in longest
    with torch.no_grad():
        eps = teacher.eps(x_t, t, teacher.states(tokens), tokens)
        states, mask, *_ = teacher.pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
        conditions = {"resolution": None, "aspect_ratio": None}
        out = teacher.denoiser(x_t, states, t, conditions, encoder_attention_mask=mask).sample
    assert states.shape[1] == 120
    torch.testing.assert_close(eps, out[:, :4], rtol=1e-4, atol=1e-4)
    assert (eps[0] - eps[1]).abs().max() > 1e-2


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
    flags = ["--vae_steps", "4", "--kl_weight", "4e-3", "--kl_warmup_steps", "2"]
    args = script.parse_args(["--output_dir", str(tmp_path), *SMALL, *flags])
    script.train_vae(args, np.zeros((2, 64, 64, 3), dtype=np.uint8))
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


def test_relation_loss_is_the_cross_entropy_after_the_relation():
    ids = torch.tensor([5, 6, 7, 8])
    tokens = torch.tensor([[1, 2, 7, 3], [1, 2, 3, 3]])  # the third relation at place 2; none
    states = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    logits = 3 * states[0, 2:, :4]
    expected = -logits.log_softmax(-1)[:, 2].mean()
    torch.testing.assert_close(teachers.relation_loss(states, tokens, ids), expected)
    assert teachers.relation_loss(states[1:], tokens[1:], ids) == 0


def test_side_loss_tells_both_shapes_their_side():
    """'A left of B': left of (0) up to the relation, right of (1) from it on; padding and single shapes do not count."""
    ids = torch.tensor([5, 6, 7, 8])
    tokens = torch.tensor([[1, 5, 3, 2, 0], [1, 2, 3, 0, 0], [1, 8, 2, 0, 0]])
    states = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    log_probabilities = (3 * states[..., :4]).log_softmax(-1)
    expected = [log_probabilities[0, i, label] for i, label in enumerate([0, 1, 1, 1])]
    expected += [log_probabilities[2, i, label] for i, label in enumerate([3, 2, 2])]
    torch.testing.assert_close(teachers.side_loss(states, tokens, ids, pad=0), -torch.stack(expected).mean())
    assert teachers.side_loss(states[1:2], tokens[1:2], ids, pad=0) == 0


def test_a_pretrained_vae_has_to_be_there(script, tmp_path):
    with pytest.raises(ValueError, match="--pretrained_vae nowhere"):
        run(script, tmp_path / "out", "--pretrained_vae", "nowhere")
