import inspect
import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import SD_BETAS, add_random_adapter, tiny_unet
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig

from diffusers_wadi import WaDiPipeline, one_step_scheduler

LEADING = DDIMScheduler(**SD_BETAS, clip_sample=False)


pytestmark = pytest.mark.usefixtures("without_bars")


@pytest.fixture
def pipe(components):
    """A pipeline with an active adapter."""
    add_random_adapter(components["unet"])
    return WaDiPipeline(**components)


def draw(pipe, seed=0, prompt="red blue", output_type="np", **options):
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type=output_type, **options).images


def stock_draw(folder_or_pipe, **options):
    stock = folder_or_pipe
    if not isinstance(stock, StableDiffusionPipeline):
        stock = StableDiffusionPipeline.from_pretrained(folder_or_pipe)
    return draw(stock, num_inference_steps=1, guidance_scale=0.0, **options)


# ------------------------------------------------------------------------------------------------------------- calling


def test_one_step_is_the_formula(pipe):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text, _ = pipe.encode_prompt("red", "cpu", 1, False)
    with torch.no_grad():
        eps = pipe.unet(z, 999, text).sample
    alpha_bar = pipe.scheduler.alphas_cumprod[999]
    expected = (z - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    assert torch.equal(pipe("red", latents=z, output_type="latent").images, expected)


def test_defaults_equal_stock_with_one_step(pipe, said):
    components = {name: getattr(pipe, name) for name in pipe.components}
    stock = StableDiffusionPipeline(**components, requires_safety_checker=False)
    assert np.array_equal(draw(pipe), stock_draw(stock))
    assert draw(pipe, num_images_per_prompt=2).shape == (2, 64, 64, 3)
    assert said == []


def test_callback_runs_after_x0(pipe):
    def zero(pipe, step, timestep, kwargs):
        assert (step, int(timestep)) == (0, 999)
        return {"latents": torch.zeros_like(kwargs["latents"])}

    assert draw(pipe, output_type="latent", callback_on_step_end=zero).abs().max() == 0


def test_each_warning_comes_once_and_the_call_runs(pipe, said):
    for _ in range(2):
        draw(pipe, num_inference_steps=2, guidance_scale=3.0)
        draw(pipe, negative_prompt="blue")
    assert len(said) == 3
    assert "num_inference_steps=2" in said[0] and "guidance_scale=3.0" in said[1] and "negative" in said[2]
    components = {name: getattr(pipe, name) for name in pipe.components}
    stock = StableDiffusionPipeline(**components, requires_safety_checker=False)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "blue"}
    assert np.array_equal(draw(pipe, **options), draw(stock, **options))


def test_adapter_off_is_the_silent_multi_step_teacher(pipe, components, said):
    teacher = StableDiffusionPipeline(**{**components, "unet": pipe.unet})
    assert pipe.is_one_step
    pipe.disable_lora()
    assert not pipe.is_one_step
    options = {"num_inference_steps": 25, "guidance_scale": 3.0, "output_type": "latent"}
    assert torch.equal(draw(pipe, **options), draw(teacher, **options))
    pipe.unload_lorad_weights()
    draw(pipe, num_inference_steps=3, guidance_scale=3.0)
    assert said == [] and not pipe.is_one_step


def test_fused_and_unloaded_is_still_the_one_step_model(pipe):
    before = draw(pipe)
    pipe.fuse_lorad()
    assert pipe.is_one_step
    pipe.disable_lora()
    assert not pipe.is_one_step
    pipe.enable_lora()
    pipe.unload_lorad_weights()
    assert pipe.is_one_step
    np.testing.assert_allclose(draw(pipe), before, atol=1e-4)


def test_one_step_as_long_as_any_lorad_acts(pipe):
    add_random_adapter(pipe.unet, "other", targets=["proj_in"])
    for name in ("student", "other"):  # on some of the layers each
        pipe.unet.set_adapter(name)
        assert pipe.is_one_step
    pipe.fuse_lorad()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["conv_in"]), "style")
    assert pipe.unet.active_adapters() == ["style"] and pipe.is_one_step  # it is in the weights
    pipe.unfuse_lorad()
    assert not pipe.is_one_step


def test_bad_scheduler_put_in_later_is_refused(pipe):
    pipe.scheduler = LEADING
    with pytest.raises(ValueError, match=r"feed \[1\].*one_step_scheduler"):
        draw(pipe)
    pipe.scheduler = one_step_scheduler(pipe.scheduler)
    draw(pipe)


def test_bad_scheduler_of_a_fused_model_is_refused_but_of_any_other_only_warned_of(pipe, base_folder, said):
    pipe.fuse_lorad()
    pipe.unload_lorad_weights()
    loaded = WaDiPipeline.from_pretrained(base_folder)
    for one_step in (pipe, loaded, WaDiPipeline.from_pipe(loaded)):
        one_step.scheduler = LEADING
        with pytest.raises(ValueError, match="one_step_scheduler"):
            draw(one_step)
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    by_hand = WaDiPipeline(**pipe.components, requires_safety_checker=False)
    for _ in range(2):
        assert np.array_equal(draw(by_hand), stock_draw(stock))
    assert len(said) == 1 and "would feed [1]" in said[0]


@pytest.mark.parametrize("size", [{"height": 60, "width": 64}, {"height": 64, "width": 60}])
def test_size_is_checked_before_work(pipe, monkeypatch, size):
    monkeypatch.setattr(pipe, "encode_prompt", lambda *args, **kwargs: pytest.fail("worked before checking"))
    with pytest.raises(ValueError, match="divisible by 8"):
        draw(pipe, **size)


# ----------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype, error", [(torch.float16, 0.0042), (torch.bfloat16, 0.036)])
def test_step_arithmetic_is_float32(components, dtype, error):
    """RMS error of unit-size x0 when only eps is rounded, against all arithmetic in `dtype`."""
    pipe = WaDiPipeline(**components).to(dtype)
    generator = torch.Generator().manual_seed(0)
    x0, z = torch.randn(2, 8, 4, 32, 32, generator=generator)
    alpha_bar = pipe.scheduler.alphas_cumprod[999]
    z = (alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * z).to(dtype)
    eps = ((z.float() - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()).to(dtype)

    def error_of_step():
        pipe.scheduler.set_timesteps(1)
        result = pipe.scheduler.step(eps, 999, z, return_dict=False)[0]
        assert result.dtype == dtype
        return (result.float() - x0).square().mean().sqrt().item()

    original = pipe.scheduler
    outside = error_of_step()
    with pipe._ready(1, None, 1.0, False):
        inside = error_of_step()
        # Stock looks there for what it may pass: eta and generator.
        assert inspect.signature(pipe.scheduler.step) == inspect.signature(original.step)
    print(f"{dtype}: stock {outside:.4f}, float32 step {inside:.4f}")
    assert inside < error and inside < 0.85 * outside
    assert pipe.scheduler is original and "step" not in vars(original)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pipeline_steps_in_float32(components, dtype):
    """With one and the same UNet output, so that only the step differs."""
    pipe = WaDiPipeline(**components).to(dtype)
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    z = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(5)).to(dtype)
    text = pipe.encode_prompt(["red"] * 16, "cpu", 1, False)[0]
    with torch.no_grad():
        eps = pipe.unet(z, 999, text).sample
    alpha_bar = pipe.scheduler.alphas_cumprod[999]
    exact = (z.float() - (1 - alpha_bar).sqrt() * eps.float()) / alpha_bar.sqrt()
    options = {"latents": z, "output_type": "latent", "num_inference_steps": 1, "guidance_scale": 1.0}
    ours, theirs = (p(["red"] * 16, **options).images for p in (pipe, stock))
    assert ours.dtype == theirs.dtype == dtype
    assert torch.equal(ours, exact.to(dtype)) and not torch.equal(theirs, exact.to(dtype))


def test_scheduler_comes_back_after_an_exception(components):
    pipe = WaDiPipeline(**components).to(torch.bfloat16)
    original, config = pipe.scheduler, dict(pipe.config)

    def fail(*args):
        assert pipe.scheduler is not original
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        draw(pipe, callback_on_step_end=fail)
    assert pipe.scheduler is original and "step" not in vars(original) and dict(pipe.config) == config


def test_angles_stay_float32(pipe):
    pipe.to(torch.float16)
    dtypes = {name.split(".")[-2]: p.dtype for name, p in pipe.unet.named_parameters() if "lorad_" in name}
    assert dtypes == {"lorad_A": torch.float32, "lorad_B": torch.float32}
    assert pipe.unet.conv_in.weight.dtype == torch.float16
    assert np.isfinite(draw(pipe)).all()


# ------------------------------------------------------------------------------------------------------------- loading


def test_complete_folder_and_adapter_folder(base_folder, adapter_folder, said):
    base = WaDiPipeline.from_pretrained(base_folder)
    assert np.array_equal(draw(base), stock_draw(base_folder))
    pipe = WaDiPipeline.from_pretrained(adapter_folder, dtype=torch.float32, adapter_name="mine")
    assert pipe.get_active_adapters() == ["mine"] and not np.array_equal(draw(pipe), draw(base))
    base.load_lorad_weights(adapter_folder)
    assert np.array_equal(draw(pipe), draw(base))
    assert said == []


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_dtype_reaches_the_base_and_not_the_angles(adapter_folder, argument):
    pipe = WaDiPipeline.from_pretrained(adapter_folder, **{argument: torch.bfloat16})
    dtypes = {p.dtype for name, p in pipe.unet.named_parameters() if "lorad_" in name}
    assert pipe.unet.dtype == pipe.vae.dtype == torch.bfloat16 and dtypes == {torch.float32}


def test_base_inside_the_adapter_folder_subfolder_and_override(base_folder, adapter_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(adapter_folder, tmp_path / "repo" / "adapter")
    shutil.copytree(base_folder, folder / "teacher")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "teacher"}))
    expected = draw(WaDiPipeline.from_pretrained(adapter_folder))
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(draw(WaDiPipeline.from_pretrained("repo", subfolder="adapter")), expected)
    shutil.rmtree(folder / "teacher")
    assert np.array_equal(draw(WaDiPipeline.from_pretrained(folder, base_model=base_folder)), expected)
    with pytest.raises(OSError, match="'teacher'"):
        WaDiPipeline.from_pretrained(folder)


@pytest.mark.parametrize("scheduler", [LEADING, PNDMScheduler(**SD_BETAS, skip_prk_steps=True)])
def test_unfit_scheduler_is_repaired_at_load(base_folder, tmp_path, scheduler, said):
    folder = shutil.copytree(base_folder, tmp_path / "base")
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    pipe = WaDiPipeline.from_pretrained(folder)
    assert np.array_equal(draw(pipe), stock_draw(base_folder))
    assert len(said) == 1 and type(scheduler).__name__ in said[0]


def test_base_that_predicts_neither_epsilon_nor_v_is_refused(base_folder):
    scheduler = DDIMScheduler(**SD_BETAS | {"prediction_type": "sample"}, clip_sample=False)
    with pytest.raises(ValueError, match="prediction_type='sample'.* one of epsilon, v_prediction"):
        WaDiPipeline.from_pretrained(base_folder, scheduler=scheduler)


def test_a_base_that_predicts_v(base_folder, tmp_path):
    """x0 = alpha z - sigma v, and nothing of the prediction type is lost by the repair or in the saved folder."""
    unfit = DDIMScheduler(**SD_BETAS | {"prediction_type": "v_prediction"}, clip_sample=False)
    pipe = WaDiPipeline.from_pretrained(base_folder, scheduler=unfit)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = pipe.unet(z, 999, pipe.encode_prompt("red", "cpu", 1, False)[0]).sample
    alpha_bar = pipe.scheduler.alphas_cumprod[999]
    drawn = pipe("red", latents=z, output_type="latent").images
    torch.testing.assert_close(drawn, alpha_bar.sqrt() * z - (1 - alpha_bar).sqrt() * v, rtol=1e-5, atol=1e-5)
    pipe.save_pretrained(tmp_path)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path)
    options = {"num_inference_steps": 1, "guidance_scale": 0.0, "latents": z, "output_type": "latent"}
    assert torch.equal(stock("red", **options).images, drawn)


def test_hub_names(adapter_folder, monkeypatch):
    """The Hub's client stands in for the Hub: a repository "org/adapter" with the files of the adapter folder."""
    asked = []

    def download(repository, filename, **options):
        asked.append((repository, filename, options))
        if repository != "org/adapter":
            raise LocalEntryNotFoundError("offline")
        if not (adapter_folder / filename).exists():
            raise EntryNotFoundError(filename)
        return str(adapter_folder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    pipe = WaDiPipeline.from_pretrained("org/adapter", revision="v1", token="secret")
    assert np.array_equal(draw(pipe), draw(WaDiPipeline.from_pretrained(adapter_folder)))
    assert {name for _, name, _ in asked} == {
        "model_index.json",
        "adapter_config.json",
        "pytorch_lorad_weights.safetensors",
        "scheduler/scheduler_config.json",
    }
    assert all(options == {"revision": "v1", "token": "secret"} for _, _, options in asked)
    with pytest.raises(OSError, match="not in the local cache"):
        WaDiPipeline.from_pretrained("org/other")


def test_bad_folders(base_folder, adapter_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither model_index.json .* nor adapter_config.json"):
        WaDiPipeline.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="not a folder here"):
        WaDiPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(OSError, match="some-one/thing"):
        WaDiPipeline.from_pretrained("some-one/thing", local_files_only=True)
    folder = shutil.copytree(base_folder, tmp_path / "base")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(OSError, match="(?s)unet.*save it again"):
        WaDiPipeline.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(OSError, match="(?s)unet.*save it again"):
        WaDiPipeline.from_pretrained(folder)
    adapter = shutil.copytree(adapter_folder, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="pass base_model="):
        WaDiPipeline.from_pretrained(adapter)


def test_adapter_that_does_not_fit(components, adapter_folder, tmp_path):
    StableDiffusionPipeline(**components | {"unet": tiny_unet(width=12)}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"modules differ, first .*: the file is for \(out, in\)"):
        WaDiPipeline.from_pretrained(adapter_folder, base_model=tmp_path)


# -------------------------------------------------------------------------------------------------------------- saving

STOCK = """
import sys, numpy, torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusionPipeline
for loader in (DiffusionPipeline, StableDiffusionPipeline, AutoPipelineForText2Image):
    pipe = loader.from_pretrained(sys.argv[1])
    assert type(pipe) is StableDiffusionPipeline
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipe("red blue", generator=generator, num_inference_steps=1, guidance_scale=0, output_type="np").images
    assert numpy.array_equal(image, numpy.load(sys.argv[2]))
assert not any(name.startswith("diffusers_wadi") for name in sys.modules)
"""


def test_a_folder_saved_in_half_precision_loads_without_a_dtype(pipe, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path / "half")
    for loaded in (
        StableDiffusionPipeline.from_pretrained(tmp_path / "half"),
        WaDiPipeline.from_pretrained(tmp_path / "half"),
    ):
        assert {loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder.dtype} == {torch.float32}
        assert np.isfinite(stock_draw(loaded)).all()
    half = StableDiffusionPipeline.from_pretrained(tmp_path / "half", torch_dtype=torch.float16)
    assert {half.unet.dtype, half.text_encoder.dtype} == {torch.float16}


def test_a_base_in_half_precision_loads_as_float32(pipe, tmp_path):
    stock = StableDiffusionPipeline(**{**pipe.components, "unet": tiny_unet()}, requires_safety_checker=False)
    stock.to(torch.float16).save_pretrained(tmp_path / "stock")
    loaded = WaDiPipeline.from_pretrained(tmp_path / "stock")
    assert {loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder.dtype} == {torch.float32}
    assert np.isfinite(draw(loaded)).all()


def test_saved_folder_is_stock_and_gives_the_same_pixels_without_us(pipe, tmp_path):
    pipe.fuse_lorad()
    folder = tmp_path / "new" / "saved"
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert all(part[0] in ("diffusers", "transformers", None) for part in index.values() if isinstance(part, list))
    np.save(tmp_path / "expected.npy", draw(pipe))
    script = [sys.executable, "-c", STOCK, str(folder), str(tmp_path / "expected.npy")]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(draw(WaDiPipeline.from_pretrained(folder)), draw(pipe))
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


def test_saving_with_an_active_adapter_leaves_the_pipeline_alone(pipe, tmp_path):
    before, state = draw(pipe), {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    pipe.save_pretrained(tmp_path / "saved")
    assert all(torch.equal(state[key], value) for key, value in pipe.unet.state_dict().items())
    assert np.array_equal(draw(pipe), before)
    np.testing.assert_allclose(stock_draw(tmp_path / "saved"), before, atol=1e-4)
    pipe.disable_lora()
    pipe.save_pretrained(tmp_path / "teacher")
    assert np.array_equal(stock_draw(tmp_path / "teacher"), draw(pipe))


def test_failed_save_keeps_the_old_folder_whole(pipe, tmp_path, monkeypatch):
    folder = tmp_path / "saved"
    pipe.save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(type(pipe.vae), "save_pretrained", lambda *args, **kwargs: 1 / 0)
    next(p for n, p in pipe.unet.named_parameters() if "lorad_A" in n).data.add_(1)
    with pytest.raises(ZeroDivisionError):
        pipe.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    pipe.save_pretrained(folder)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after.keys() == before.keys() and after != before


def test_unwritable_target_is_found_before_work(pipe, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("copy.deepcopy", lambda *args: pytest.fail("worked before checking"))
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="cannot write to the folder"):
            pipe.save_pretrained(target)


# ----------------------------------------------------------------------------------------------------------- from_pipe


def test_from_pipe_keeps_dtype_and_auto_pipelines_know_us(pipe):
    pipe.to(torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        again = WaDiPipeline.from_pipe(pipe)
    assert again.dtype == pipe.dtype == torch.float16 and again.unet is pipe.unet
    assert all(p.dtype == torch.float32 for name, p in pipe.unet.named_parameters() if "lorad_" in name)
    other = AutoPipelineForImage2Image.from_pipe(pipe, dtype=torch.float16)
    assert type(other).__name__ == "StableDiffusionImg2ImgPipeline"
    assert type(AutoPipelineForText2Image.from_pipe(pipe, dtype=torch.float16)) is WaDiPipeline


def test_from_pipe_in_another_dtype_and_of_a_teacher(pipe):
    for argument in ("dtype", "torch_dtype"):
        assert WaDiPipeline.from_pipe(pipe, **{argument: torch.bfloat16}).dtype == torch.bfloat16
        pipe.to(torch.float32)
    pipe.unload_lorad_weights()
    assert not WaDiPipeline.from_pipe(pipe).is_one_step
