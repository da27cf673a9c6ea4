"""PixArt-alpha in one step, on a transformer of random weights with the published schedule and channels."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from backbones import fill_adapter
from diffusers import (
    AutoPipelineForText2Image,
    DDIMScheduler,
    DiffusionPipeline,
    PixArtAlphaPipeline,
    UniPCMultistepScheduler,
)
from safetensors.torch import save_file
from tiny_pixart import LINEAR_BETAS, pixart_pipeline

from diffusers_wadi import (
    LoRaDConfig,
    WaDiPipeline,
    WaDiPixArtPipeline,
    load_lorad_adapter,
    lorad_target_modules,
    one_step_pipeline_class,
    one_step_scheduler,
    save_lorad_adapter,
)
from diffusers_wadi.cli import main
from diffusers_wadi.loaders import lorad_layers

AUTHORS = "rotated_transformer.safetensors"


pytestmark = pytest.mark.usefixtures("without_bars")


@pytest.fixture(scope="module")
def _base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixart")
    pixart_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def base(_base):
    """An ordinary PixArt folder. Read only."""
    return _base


@pytest.fixture(scope="module")
def adapter(_base, tmp_path_factory):
    """A LoRaD adapter of the paper's layers on the base. Read only."""
    from peft import inject_adapter_in_model

    folder, transformer = tmp_path_factory.mktemp("adapter"), pixart_pipeline().transformer
    config = LoRaDConfig(r=4, target_modules=lorad_target_modules(transformer))
    inject_adapter_in_model(config, transformer, "student")
    fill_adapter(transformer, "student")
    save_lorad_adapter(transformer, folder, "student", "transformer", str(_base))
    return folder


@pytest.fixture
def pipe(adapter):
    return WaDiPixArtPipeline.from_pretrained(adapter)


def draw(pipe, prompt="red blue", **options):
    options = {"output_type": "latent", "generator": torch.Generator().manual_seed(0)} | options
    return pipe(prompt, **options).images


def many(pipe, steps=3):
    return draw(pipe, num_inference_steps=steps, guidance_scale=3.0, use_resolution_binning=False)


def stock_draw(source, **options):
    stock = source if isinstance(source, DiffusionPipeline) else PixArtAlphaPipeline.from_pretrained(source)
    options = {"num_inference_steps": 1, "guidance_scale": 0.0, "use_resolution_binning": False} | options
    return draw(stock, **options)


def close(one, other, tolerance=1e-3):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------- calling


def test_one_step_is_the_formula_on_the_first_half_of_the_channels(pipe):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = pipe.tokenizer(["red blue"], padding="max_length", max_length=120, return_tensors="pt")
    with torch.no_grad():
        states = pipe.text_encoder(ids.input_ids, attention_mask=ids.attention_mask)[0]
        sizes = {"resolution": None, "aspect_ratio": None}
        options = {"encoder_attention_mask": ids.attention_mask, "added_cond_kwargs": sizes}
        output = pipe.transformer(z, states, torch.tensor([999]), **options).sample
    assert output.shape[1] == 8 and (output[:, :4] - output[:, 4:]).abs().max() > 1e-3
    alpha_bar = pipe.scheduler.alphas_cumprod[999]
    assert abs(alpha_bar.item() - 0.0047) < 1e-6
    close(draw(pipe, latents=z), (z - (1 - alpha_bar).sqrt() * output[:, :4]) / alpha_bar.sqrt(), 1e-5)


def test_text_and_mask_are_those_of_the_encoder_and_of_training(pipe, monkeypatch):
    from diffusers_wadi.distillation.backbones import load_backbone
    from diffusers_wadi.distillation.text_encoders import unpack_mask

    seen = {}
    forward = pipe.transformer.forward

    def look(*args, **kwargs):
        seen.update(kwargs)
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", look)
    draw(pipe, ["Red BLUE", "red"])
    mask = seen["encoder_attention_mask"]
    lengths = [len(ids) for ids in pipe.tokenizer(["red blue", "red"]).input_ids]
    assert mask.shape == (2, 120) and mask.sum(1).tolist() == lengths and lengths[0] > lengths[1]
    assert all(row[:length].all() for row, length in zip(mask, lengths))
    text = load_backbone(str(pipe.config._name_or_path)).load_encoder()(["Red BLUE", "red"])
    states, trained_mask = unpack_mask(text)
    assert torch.equal(mask.float(), trained_mask.float()) and seen["timestep"].tolist() == [999, 999]
    kept = mask.bool()[..., None]
    close(seen["encoder_hidden_states"] * kept, states * kept, 1e-6)


def test_defaults_equal_stock_with_one_step(pipe, said):
    said.clear()
    stock = PixArtAlphaPipeline(**pipe.components)
    for options in ({}, {"output_type": "np"}, {"num_images_per_prompt": 2}):
        assert np.array_equal(draw(pipe, **options), stock_draw(stock, **options))
    assert draw(pipe, output_type="np").shape == (1, 64, 64, 3) and said == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_steps_in_float32(pipe, dtype):
    """With one and the same output of the transformer, so that only the step differs."""
    pipe.to(dtype)
    assert {p.dtype for n, p in pipe.transformer.named_parameters() if "lorad_" in n} == {torch.float32}
    z = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(5)).to(dtype)
    eps = []
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: eps.append(output[0]))
    ours = draw(pipe, ["red"] * 16, latents=z)
    hook.remove()
    alpha_bar = pipe.scheduler.alphas_cumprod[999]
    exact = (z.float() - (1 - alpha_bar).sqrt() * eps[0][:, :4].float()) / alpha_bar.sqrt()
    assert ours.dtype == dtype and torch.equal(ours, exact.to(dtype))
    theirs = stock_draw(PixArtAlphaPipeline(**pipe.components), prompt=["red"] * 16, latents=z)
    assert not torch.equal(theirs, exact.to(dtype))
    assert np.isfinite(draw(pipe, output_type="np")).all()


def test_a_scheduler_that_returns_the_sample_alone(pipe):
    """Stock looks for x0 in the second place, where UniPC and DPM-Solver have nothing."""
    expected, betas = draw(pipe), {key: pipe.scheduler.config[key] for key in LINEAR_BETAS}
    pipe.scheduler = UniPCMultistepScheduler(**betas, timestep_spacing="trailing")
    close(draw(pipe), expected)


def test_each_warning_comes_once(pipe, said):
    said.clear()
    for _ in range(2):
        draw(pipe, num_inference_steps=2, guidance_scale=3.0)
        draw(pipe, negative_prompt="blue")
    assert len(said) == 3
    assert "num_inference_steps=2" in said[0] and "guidance_scale=3.0" in said[1] and "negative" in said[2]


def test_sizes(pipe, monkeypatch):
    assert draw(pipe, height=32, width=48).shape == (1, 4, 4, 6)
    encode = pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda *args, **kwargs: pytest.fail("worked before checking"))
    for height, width in ((72, 64), (64, 72)):
        with pytest.raises(ValueError, match=f"multiples of 16 .* got {height} and {width}"):
            draw(pipe, height=height, width=width)
    with pytest.raises(ValueError, match="Provide either `prompt`"):
        draw(pipe, None)
    monkeypatch.setattr(pipe, "encode_prompt", encode)
    pipe.transformer.register_to_config(sample_size=32)
    assert draw(pipe, height=64, width=64, output_type="np").shape == (1, 64, 64, 3)  # drawn at 256, resized
    assert draw(pipe, height=64, width=64).shape == (1, 4, 32, 32)


def test_bad_scheduler_put_in_later_is_refused(pipe):
    pipe.scheduler = DDIMScheduler(**LINEAR_BETAS)
    with pytest.raises(ValueError, match="feed .*one_step_scheduler"):
        draw(pipe)


# ------------------------------------------------------------------------------------------------------------- adapter


def test_adapter_off_is_the_multi_step_teacher_with_its_own_schedule(pipe, base, said):
    said.clear()
    active, ours = draw(pipe), pipe.scheduler
    assert pipe.is_one_step and pipe.get_active_adapters() == ["default_0"]
    pipe.disable_lora()
    assert not pipe.is_one_step
    teacher = PixArtAlphaPipeline.from_pretrained(base)
    assert torch.equal(many(pipe), many(teacher))
    assert pipe.scheduler is ours and said == []
    pipe.enable_lora()
    assert torch.equal(draw(pipe), active)
    pipe.set_adapters("default_0", 0.0)
    assert (draw(pipe) - active).abs().max() > 0.1
    pipe.unload_lorad_weights()
    assert not pipe.is_one_step and torch.equal(many(pipe), many(teacher))


def test_a_fused_pipeline_saves_as_stock_classes(pipe, tmp_path):
    active = draw(pipe)
    pipe.save_pretrained(tmp_path / "active")
    assert torch.equal(draw(pipe), active) and list(lorad_layers(pipe.transformer))
    pipe.fuse_lorad()
    pipe.save_pretrained(tmp_path / "fused")
    fused = draw(pipe)
    close(fused, active)
    index = json.loads((tmp_path / "fused" / "model_index.json").read_text())
    assert index["_class_name"] == "PixArtAlphaPipeline" and index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "fused")) is PixArtAlphaPipeline
    assert torch.equal(stock_draw(tmp_path / "fused"), fused)
    close(stock_draw(tmp_path / "active"), active)
    again = WaDiPixArtPipeline.from_pretrained(tmp_path / "fused")
    assert torch.equal(draw(again), fused) and again.is_one_step
    pipe.unload_lorad_weights()
    assert torch.equal(draw(pipe), fused) and pipe.is_one_step


def test_the_teacher_is_saved_with_its_own_scheduler(pipe, base, tmp_path):
    pipe.disable_lora()
    pipe.save_pretrained(tmp_path)
    teacher, saved = (PixArtAlphaPipeline.from_pretrained(folder) for folder in (base, tmp_path))
    assert type(saved.scheduler) is type(teacher.scheduler) and torch.equal(many(saved), many(teacher))


def test_lorad_weights_come_back(pipe, base, tmp_path):
    active = draw(pipe)
    pipe.save_lorad_weights(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert torch.equal(draw(WaDiPixArtPipeline.from_pretrained(tmp_path)), active)
    other = WaDiPixArtPipeline.from_pretrained(base)
    other.load_lorad_weights(tmp_path)
    assert torch.equal(draw(other), active)


# ------------------------------------------------------------------------------------------------------------- loading


def test_a_base_gets_the_one_step_schedule_and_keeps_its_own_for_many(base, said):
    pipe = WaDiPixArtPipeline.from_pretrained(base)
    assert abs(pipe.scheduler.alphas_cumprod[-1].item() - 0.0047) < 1e-6
    assert len(said) == 1 and "DPMSolverMultistepScheduler" in said[0] and "0.0047" in said[0]
    assert torch.equal(many(pipe), many(PixArtAlphaPipeline.from_pretrained(base)))


def test_a_scheduler_made_for_one_step_is_kept(base, adapter, tmp_path, said):
    own = one_step_scheduler(LINEAR_BETAS)  # trained on the schedule's own end
    assert own.alphas_cumprod[-1] < 5e-5
    assert WaDiPixArtPipeline.from_pretrained(base, scheduler=own).scheduler is own
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    own.save_pretrained(folder / "scheduler")
    pipe = WaDiPixArtPipeline.from_pretrained(folder)
    assert pipe.scheduler.alphas_cumprod[-1] == own.alphas_cumprod[-1]
    pipe.save_pretrained(tmp_path / "complete")
    again = WaDiPixArtPipeline.from_pretrained(tmp_path / "complete")
    assert again.scheduler.alphas_cumprod[-1] == own.alphas_cumprod[-1] and said == []


def test_a_scheduler_that_would_do_but_was_not_made_for_one_step(base, adapter, tmp_path, said):
    """Replaced in a checkpoint, since it ends at the schedule's own value; kept where the caller gives it."""
    would_do = UniPCMultistepScheduler(**LINEAR_BETAS, timestep_spacing="trailing")
    assert WaDiPixArtPipeline.from_pretrained(base, scheduler=would_do).scheduler is would_do and said == []
    would_do = DDIMScheduler(**LINEAR_BETAS, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False)
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    would_do.save_pretrained(folder / "scheduler")
    pipe = WaDiPixArtPipeline.from_pretrained(folder)
    assert abs(pipe.scheduler.alphas_cumprod[-1].item() - 0.0047) < 1e-6
    assert len(said) == 1 and "DDIMScheduler" in said[0] and "not made for one step" in said[0]
    pipe.disable_lora()  # after two replacements the teacher has the base's own
    assert torch.equal(many(pipe), many(PixArtAlphaPipeline.from_pretrained(base)))


@pytest.fixture
def authors(base, adapter, tmp_path):
    """The authors' transformer, as their file holds it, and what it draws."""
    pipe = WaDiPixArtPipeline.from_pretrained(adapter)
    pipe.fuse_lorad()
    pipe.unload_lorad_weights()
    state = pipe.transformer.state_dict() | {"caption_projection.y_embedding": torch.zeros(120, 12)}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / AUTHORS)
    return tmp_path / AUTHORS, draw(pipe)


def test_the_authors_transformer(authors, base, monkeypatch):
    file, expected = authors
    pipe = WaDiPixArtPipeline.from_pretrained(file.parent, weight_name=AUTHORS, base_model=base)
    assert abs(pipe.scheduler.alphas_cumprod[-1].item() - 0.0047) < 1e-6 and pipe.is_one_step
    assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(WaDiPixArtPipeline.from_pretrained(file, base_model=base)), expected)
    half = WaDiPixArtPipeline.from_pretrained(file, base_model=base, dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16
    with pytest.raises(OSError, match="PixArt-alpha/PixArt-XL-2-256x256"):  # their base, which is not here
        WaDiPixArtPipeline.from_pretrained(file)


def test_files_of_the_other_kind_are_refused(authors, base, base_folder, tmp_path):
    file, _ = authors
    with pytest.raises(
        ValueError, match="PixArt transformer, and WaDiPipeline has a unet.*WaDiPixArtPipeline.from_pre"
    ):
        WaDiPipeline.from_pretrained(file, base_model=base_folder)
    unet = tmp_path / "rotated_unet-sdv1-5.safetensors"
    shutil.copyfile(base_folder / "unet" / "diffusion_pytorch_model.safetensors", unet)
    with pytest.raises(ValueError, match="UNet, and WaDiPixArtPipeline has a transformer.*WaDiPipeline.from_pre"):
        WaDiPixArtPipeline.from_pretrained(unet, base_model=base)
    for cls, folder in ((WaDiPixArtPipeline, base_folder), (WaDiPipeline, base)):
        right = one_step_pipeline_class(folder).__name__
        with pytest.raises(ValueError, match=f"not for {cls.__name__}. Load it with diffusers_wadi.{right}"):
            cls.from_pretrained(folder)


def test_damaged_transformers_are_refused(base, tmp_path):
    from safetensors.torch import load_file

    folder = shutil.copytree(base, tmp_path / "base")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"something.theta_a": torch.zeros(2, 2)}, path, metadata={"format": "pt"})
    with pytest.raises(OSError, match="1 of its tensors have no place there.*WaDiPixArtPipeline.from_pretrained"):
        WaDiPixArtPipeline.from_pretrained(folder)
    tensors.pop("proj_out.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(OSError, match="lacks 1 tensors, first proj_out.weight"):
        WaDiPixArtPipeline.from_pretrained(folder)
    folder = shutil.copytree(base, tmp_path / "other")
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    lost = next(key for key in tensors if key.endswith("SelfAttention.q.weight"))
    tensors.pop(lost)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(OSError, match=f"T5EncoderModel: it lacks 1 tensors, first {lost}"):
        WaDiPixArtPipeline.from_pretrained(folder)


def test_an_adapter_of_another_transformer_is_refused(adapter, tmp_path):
    pixart_pipeline(num_attention_heads=4, cross_attention_dim=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="modules differ, first"):
        WaDiPixArtPipeline.from_pretrained(adapter, base_model=tmp_path)


# ------------------------------------------------------------------------------------------------------ choosing a class


def test_the_class_follows_from_the_files(base, adapter, authors, base_folder, adapter_folder, tmp_path):
    assert one_step_pipeline_class(base) is one_step_pipeline_class(adapter) is WaDiPixArtPipeline
    assert one_step_pipeline_class(authors[0], base_model=base) is WaDiPixArtPipeline
    assert one_step_pipeline_class(base_folder) is one_step_pipeline_class(adapter_folder) is WaDiPipeline
    assert one_step_pipeline_class(adapter, base_model=base_folder) is WaDiPipeline
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    index["text_encoder_2"] = ["transformers", "T5EncoderModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is a FluxPipeline; in one step run StableDiffusionPipeline and PixArtAlpha"):
        one_step_pipeline_class(tmp_path)


def test_the_command_line_draws_with_it(adapter, pipe, tmp_path, capsys):
    main(["generate", "red blue", "--model", str(adapter), "-o", str(tmp_path / "x.png"), "--device", "cpu"])
    from PIL import Image

    expected = draw(pipe, output_type="pil")[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), np.asarray(expected))


def test_auto_pipelines_and_lookup_by_name(pipe):
    import diffusers

    auto = AutoPipelineForText2Image.from_pipe(pipe, dtype=torch.float32)
    assert type(auto) is WaDiPixArtPipeline and torch.equal(many(auto), many(pipe))
    assert diffusers.WaDiPixArtPipeline is WaDiPixArtPipeline and diffusers.pipelines.WaDiPipeline is WaDiPipeline
    again = WaDiPixArtPipeline.from_pipe(pipe)
    assert torch.equal(draw(again), draw(pipe))
    again.disable_lora()
    assert torch.equal(many(again), many(pipe)) and again.transformer is pipe.transformer


def test_copies_are_independent(pipe, adapter):
    transformer = copy.deepcopy(pipe.transformer)
    pipe.unload_lorad_weights()
    load_lorad_adapter(pipe.transformer, adapter, "x", "transformer")
    assert torch.equal(transformer.proj_out.weight, pipe.transformer.proj_out.weight)
