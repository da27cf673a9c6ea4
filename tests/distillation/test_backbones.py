"""The teacher's kinds: what a call of the denoiser means, and that training and stock inference agree."""

import json
import shutil
import sys

import pytest
import torch
from conftest import SD_BETAS
from diffusers import DDIMScheduler, PixArtAlphaPipeline, StableDiffusionPipeline
from tiny_pixart import pixart_pipeline

from diffusers_wadi.distillation import load_backbone, student_x0
from diffusers_wadi.distillation.backbones import PixArtBackbone, StableDiffusionBackbone

PROMPTS = ["red", "blue red", "a rather long prompt of many letters"]


def changed(folder, target, file: str, **values):
    """A copy of `folder` with other values in one of its json files."""
    shutil.copytree(folder, target)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return target


@pytest.fixture(scope="module")
def pixart_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixart")
    pixart_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def velocity_folder(base_folder, tmp_path):
    return changed(base_folder, tmp_path / "v", "scheduler/scheduler_config.json", prediction_type="v_prediction")


def one_step_x0(backbone, z, terminal=None):
    encode, denoiser = backbone.load_encoder(), backbone.load_denoiser()
    schedule = backbone.noise_schedule(terminal)
    with torch.no_grad():
        predict = lambda x_t, t, text: backbone.eps(denoiser, x_t, t, text)  # noqa: E731
        return student_x0(predict, z, encode(PROMPTS), schedule)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("t", [0, 500, 999])
def test_eps_is_what_the_stock_scheduler_computes(base_folder, velocity_folder, kind, t):
    """DDIM turns either prediction into x0; the x0 of our epsilon has to be the same."""
    backbone = load_backbone(base_folder if kind == "epsilon" else velocity_folder)
    assert type(backbone) is StableDiffusionBackbone and backbone.prediction_type == kind
    unet, text = backbone.load_denoiser(), backbone.load_encoder()(PROMPTS)
    x_t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(t))
    scheduler = DDIMScheduler(**{**SD_BETAS, "prediction_type": kind}, clip_sample=False)
    scheduler.set_timesteps(1000)
    with torch.no_grad():
        out = unet(x_t, torch.full((3,), t), text).sample
        eps = backbone.eps(unet, x_t, torch.full((3,), t), text)
    expected = scheduler.step(out, t, x_t).pred_original_sample
    alpha_bar = scheduler.alphas_cumprod[t]
    x0 = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    assert torch.allclose(x0, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(eps, out) == (kind == "epsilon")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_one_step_of_stable_diffusion_is_the_stock_pipelines(base_folder, velocity_folder, kind):
    folder = base_folder if kind == "epsilon" else velocity_folder
    backbone = load_backbone(folder)
    z = torch.randn(3, *backbone.latent_shape(), generator=torch.Generator().manual_seed(0))
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = backbone.student_scheduler()
    assert pipe.scheduler.config.prediction_type == kind
    call = dict(num_inference_steps=1, guidance_scale=0, latents=z, output_type="latent")
    assert torch.allclose(one_step_x0(backbone, z), pipe(PROMPTS, **call).images, rtol=1e-4, atol=1e-4)


def test_timesteps_of_one_batch_may_differ(velocity_folder):
    backbone = load_backbone(velocity_folder)
    unet, text = backbone.load_denoiser(), backbone.load_encoder()(PROMPTS)
    x_t, t = torch.randn(3, 4, 8, 8), torch.tensor([3, 400, 999])
    with torch.no_grad():
        together = backbone.eps(unet, x_t, t, text)
        single = [backbone.eps(unet, x_t[i : i + 1], t[i : i + 1], text[i : i + 1]) for i in range(3)]
    assert torch.allclose(together, torch.cat(single), atol=1e-5)


@pytest.mark.parametrize("max_length", [None, 40])
def test_one_step_of_pixart_is_the_stock_pipelines(pixart_folder, max_length):
    """Also with less padding: what is masked does not count."""
    backbone = load_backbone(pixart_folder, max_sequence_length=max_length)
    assert type(backbone) is PixArtBackbone
    z = torch.randn(3, *backbone.latent_shape(), generator=torch.Generator().manual_seed(0))
    pipe = PixArtAlphaPipeline.from_pretrained(pixart_folder)
    pipe.scheduler = backbone.student_scheduler()
    assert pipe.scheduler.alphas_cumprod[-1] == pytest.approx(0.0047, abs=1e-6)
    call = dict(num_inference_steps=1, guidance_scale=0, latents=z, output_type="latent", use_resolution_binning=False)
    x0, expected = one_step_x0(backbone, z), pipe(PROMPTS, **call).images
    assert torch.allclose(x0, expected, rtol=1e-3, atol=1e-3) and x0.std() > 1


def test_terminal_value_of_pixart_can_be_given(pixart_folder):
    backbone = load_backbone(pixart_folder)
    own = float(backbone.scheduler.alphas_cumprod[-1])
    assert own == pytest.approx(4.0358e-5, rel=1e-3)
    assert backbone.noise_schedule().terminal_alpha ** 2 == pytest.approx(0.0047)
    assert backbone.noise_schedule(own).terminal_alpha ** 2 == pytest.approx(own)


def test_masks_of_pixart_are_those_of_inference_and_matter(pixart_folder):
    backbone = load_backbone(pixart_folder)
    pipe = PixArtAlphaPipeline.from_pretrained(pixart_folder)
    text = backbone.load_encoder()(["RED ", *PROMPTS, ""])
    states, mask, *_ = pipe.encode_prompt(["RED ", *PROMPTS, ""], do_classifier_free_guidance=False)
    assert text.shape == (5, 120, 13)
    assert torch.allclose(text[..., :-1], states, atol=1e-6) and torch.equal(text[..., -1].long(), mask)
    assert torch.equal(text[0], text[1])  # lower case and stripped, as in inference

    transformer, x_t, t = backbone.load_denoiser(), torch.randn(5, 4, 8, 8), torch.full((5,), 500)
    unmasked, padding_changed = text.clone(), text.clone()
    unmasked[..., -1] = 1
    padding_changed[..., :-1] += (1 - text[..., -1:]) * torch.randn(5, 120, 12)
    with torch.no_grad():
        eps = backbone.eps(transformer, x_t, t, text)
        out = pipe.transformer(
            x_t, states, t, {"resolution": None, "aspect_ratio": None}, encoder_attention_mask=mask
        ).sample
        assert out.shape[1] == 8 and torch.allclose(eps, out[:, :4], atol=1e-5)
        assert torch.allclose(backbone.eps(transformer, x_t, t, padding_changed), eps, atol=1e-5)
        assert not torch.allclose(backbone.eps(transformer, x_t, t, unmasked), eps, atol=1e-3)


def test_size_conditions_of_the_1024_pixel_transformer(tmp_path):
    """Resolution and aspect ratio in pixels, as the stock pipeline passes them."""
    sizes = {"num_attention_heads": 3, "cross_attention_dim": 24}  # three conditions share the width
    pixart_pipeline(sample_size=128, num_layers=1, **sizes).save_pretrained(tmp_path)
    backbone, pipe = load_backbone(tmp_path), PixArtAlphaPipeline.from_pretrained(tmp_path)
    assert backbone.latent_shape() == (4, 128, 128)
    z = torch.randn(3, *backbone.latent_shape(64))
    pipe.scheduler = backbone.student_scheduler()
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    call = dict(num_inference_steps=1, guidance_scale=0, output_type="latent", height=64, width=64)
    expected = pipe(PROMPTS, latents=z, use_resolution_binning=False, **call).images
    assert torch.allclose(one_step_x0(backbone, z), expected, rtol=1e-3, atol=1e-3)
    ours = backbone._size_conditions(z)
    assert all(torch.equal(ours[name], seen[0][name]) for name in ("resolution", "aspect_ratio"))


def test_dtypes(pixart_folder, base_folder):
    for folder in (pixart_folder, base_folder):
        backbone = load_backbone(folder)
        text, denoiser = backbone.load_encoder(torch.float32)(PROMPTS), backbone.load_denoiser(torch.bfloat16)
        assert backbone.load_vae().dtype == torch.float32
        assert not any(parameter.requires_grad for parameter in denoiser.parameters())
        with torch.no_grad():
            eps = backbone.eps(denoiser, torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3]), text)
        assert next(denoiser.parameters()).dtype == torch.bfloat16 and eps.dtype == torch.float32


def test_resolutions_that_do_not_fit_are_refused(base_folder, pixart_folder):
    assert load_backbone(base_folder).latent_shape(72) == (4, 9, 9)
    with pytest.raises(ValueError, match="--resolution is 100, expected a multiple of 8 .* example 96 or 104"):
        load_backbone(base_folder).latent_shape(100)
    with pytest.raises(ValueError, match="--resolution is 72, expected a multiple of 16"):
        load_backbone(pixart_folder).latent_shape(72)  # patches of 2 latents


def test_a_teacher_without_a_size_of_its_own(base_folder, tmp_path):
    folder = changed(base_folder, tmp_path / "other", "unet/config.json", sample_size=None)
    with pytest.raises(ValueError, match="sample_size=None: give --resolution"):
        load_backbone(folder).latent_shape()
    assert load_backbone(folder).latent_shape(64) == (4, 8, 8)


def test_older_configs_lack_what_was_the_default(base_folder, tmp_path):
    folder = changed(base_folder, tmp_path / "other", "unet/config.json")
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in ("in_channels", "class_embed_type")}))
    assert load_backbone(folder).latent_shape() == (4, 8, 8)


REFUSED = {
    "another pipeline": ("model_index.json", {"text_encoder": ["transformers", "BertModel"]}, "BertModel"),
    "two encoders": ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "text_encoder_2"),
    "sdxl unet": ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
    "inpainting": ("unet/config.json", {"in_channels": 9}, "9 input channels"),
    "prediction": ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "predicts 'sample'"),
}


@pytest.mark.parametrize("file, values, message", REFUSED.values(), ids=REFUSED)
def test_teachers_of_another_kind_are_refused_before_weights_are_read(base_folder, tmp_path, file, values, message):
    folder = changed(base_folder, tmp_path / "other", file, **values)
    shutil.rmtree(folder / "vae")
    (folder / "vae").mkdir()
    shutil.copy(base_folder / "vae" / "config.json", folder / "vae")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        load_backbone(folder)


def test_clip_text_has_one_length(base_folder):
    with pytest.raises(ValueError, match="max_sequence_length is 77"):
        load_backbone(base_folder, max_sequence_length=77)


def test_velocity_teachers_take_the_schedules_own_terminal_value(velocity_folder):
    with pytest.raises(ValueError, match="v-prediction teacher"):
        load_backbone(velocity_folder).noise_schedule(0.0047)


def test_a_sentencepiece_tokenizer_without_its_package_names_the_extra(pixart_folder, tmp_path, monkeypatch):
    shutil.copytree(pixart_folder, tmp_path / "t5")
    (tmp_path / "t5" / "tokenizer" / "tokenizer.json").unlink()
    (tmp_path / "t5" / "tokenizer" / "spiece.model").write_bytes(b"not read")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r"diffusers-wadi\[pixart\]"):
        load_backbone(tmp_path / "t5").load_encoder()


def test_token_lengths(base_folder, pixart_folder):
    assert load_backbone(base_folder).load_encoder().token_lengths(["red", "blue red"]) == [3, 4]
    assert load_backbone(pixart_folder).load_encoder().token_lengths(["RED", "blue red"]) == [2, 3]
