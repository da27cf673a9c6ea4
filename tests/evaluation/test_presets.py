"""Presets on tiny stand-ins of the published repositories: what is fed to the network, and what is made of its output."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import save, save_file
from tiny_pixart import pixart_pipeline

from diffusers_wadi import WaDiPipeline, WaDiPixArtPipeline
from diffusers_wadi.evaluation import PRESETS, UNSUPPORTED, load_pipeline, load_preset, preset
from diffusers_wadi.evaluation.presets import PIXART, SD15, SD21

# As in the scheduler_config.json of Stable Diffusion 1.5 and 2.1-base.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD_SCHEDULER = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
LORA_LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
GENERATOR_SEED = 5


@pytest.fixture(scope="module")
def sd_folder(_components, tmp_path_factory):
    """A tiny Stable Diffusion with the published scheduler. Its index names a safety checker, as the published ones do;
    there are no files of one, since none is to be loaded."""
    folder = tmp_path_factory.mktemp("sd")
    StableDiffusionPipeline(**copy.deepcopy(_components) | {"scheduler": SD_SCHEDULER}).save_pretrained(folder)
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    rename(folder, safety_checker=checker, requires_safety_checker=True)
    return folder


def rename(folder, **entries):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture
def publish(hub, components, sd_folder):
    """Put a tiny Stable Diffusion under a name on the Hub; returns its UNet."""

    def publish(name, scheduler=None, pipeline="StableDiffusionPipeline"):
        index = json.loads((sd_folder / "model_index.json").read_text()) | {"_class_name": pipeline}
        changed = {"model_index.json": json.dumps(index).encode()}
        if scheduler is not None:
            changed["scheduler/scheduler_config.json"] = scheduler.to_json_string().encode()
        hub.add(name, sd_folder)
        hub.add(name, **changed)
        return components["unet"]

    return publish


def other_unet(unet, seed=7):
    """Weights of the same layout with other numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in unet.state_dict().items()}


def lora(unet, kohya):
    """A LoRA of rank 2 on one layer, in kohya's layout with an alpha of 4, or in diffusers' of today."""
    weight = unet.get_submodule(LORA_LAYER).weight
    generator = torch.Generator().manual_seed(3)
    down, up = (torch.randn(s, generator=generator) for s in ((2, weight.shape[1]), (weight.shape[0], 2)))
    if kohya:
        name = f"lora_unet_{LORA_LAYER.replace('.', '_')}"
        state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(4.0)}
    else:
        state = {f"unet.{LORA_LAYER}.lora_A.weight": down, f"unet.{LORA_LAYER}.lora_B.weight": up}
    return save(state), weight.detach() + (2 if kohya else 1) * up @ down


def run(pipe, preset, **more):
    """The latents of one call, what was fed to the denoiser (timesteps and batch), its first output, and the noise."""
    fed, outputs = [], []
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer

    def record(module, args, kwargs, output):
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        fed.append((t.flatten()[0].item(), len(args[0])))
        outputs.append(output[0])

    handle = denoiser.register_forward_hook(record, with_kwargs=True)
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    steps = {"num_inference_steps": preset.num_inference_steps, "guidance_scale": preset.guidance_scale}
    with torch.no_grad():
        latents = pipe("red blue", generator=generator, output_type="latent", **steps, **preset.call, **more).images
    handle.remove()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(GENERATOR_SEED))
    return latents, [t for t, _ in fed], fed[0][1], outputs[0], noise


def x0(noise, eps, alpha):
    return (noise - (1 - alpha) ** 0.5 * eps) / alpha**0.5


def close(a, b):
    return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("name, steps", [("sd15-25", 25), ("sd21-50", 50)])
def test_teachers_run_ddim_with_guidance(publish, name, steps):
    publish(SD15 if "15" in name else SD21)
    pipe = load_preset(PRESETS[name])
    _, fed, batch, *_ = run(pipe, PRESETS[name])
    assert type(pipe.scheduler) is DDIMScheduler and not pipe.scheduler.config.clip_sample
    assert fed == [1 + 1000 // steps * i for i in reversed(range(steps))] and batch == 2
    assert PRESETS[name].guidance_scale == 7.5 and pipe.safety_checker is None


@pytest.mark.parametrize("name, like, steps", [("sd15-50", "sd15-25", 50), ("sd21-25", "sd21-50", 25)])
def test_other_steps_change_nothing_else(name, like, steps):
    assert PRESETS[name] == replace(PRESETS[like], label=PRESETS[name].label, num_inference_steps=steps)


@pytest.mark.parametrize("name", ["lcm-lora", "hyper-sd", "yoso"])
def test_loras_for_one_step(publish, hub, name):
    chosen = PRESETS[name]
    content, merged = lora(publish(SD15), kohya=name != "yoso")
    hub.add(chosen.lora.repository, **{chosen.lora.name: content})
    pipe = load_preset(chosen)
    assert close(pipe.unet.get_submodule(LORA_LAYER).weight, merged) and not pipe.get_list_adapters()
    latents, fed, batch, eps, noise = run(pipe, chosen)
    assert (fed, batch) == ([999], 1)
    expected = x0(noise, eps, ALPHAS[999])
    if name == "hyper-sd":  # ends at t = 0, where a little noise is left
        assert type(pipe.scheduler) is TCDScheduler and chosen.call == {"eta": 1.0} and chosen.guidance_scale == 0
        expected = ALPHAS[0] ** 0.5 * expected + (1 - ALPHAS[0]) ** 0.5 * eps
    else:
        assert type(pipe.scheduler) is LCMScheduler
    assert close(latents, expected)  # c_skip and c_out of LCM are 0 and 1 to 1e-8 there


def test_pcm_in_two_steps(publish, hub):
    chosen = PRESETS["pcm-2step"]
    content, merged = lora(publish(SD15), kohya=True)
    hub.add(chosen.lora.repository, **{chosen.lora.name: content})
    pipe = load_preset(chosen)
    _, fed, batch, *_ = run(pipe, chosen)
    assert type(pipe.scheduler) is TCDScheduler and (fed, batch) == ([999, 499], 1)
    assert close(pipe.unet.get_submodule(LORA_LAYER).weight, merged)


def test_sd_turbo(publish):
    publish("stabilityai/sd-turbo", EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing", steps_offset=1))
    pipe = load_preset(PRESETS["sd-turbo"])
    latents, fed, batch, eps, noise = run(pipe, PRESETS["sd-turbo"])
    assert type(pipe.scheduler) is EulerDiscreteScheduler and (fed, batch) == ([999], 1)
    sigma = ((1 - ALPHAS[999]) / ALPHAS[999]) ** 0.5  # noise of standard deviation sigma, not of the whole sample
    assert close(latents, sigma * noise - sigma * eps)


def test_instaflow_goes_one_whole_step_along_the_velocity(publish):
    unet = publish("XCLiu/instaflow_0_9B_from_sd_1_5", pipeline="RectifiedFlowPipeline")
    pipe = load_preset(PRESETS["instaflow"])
    latents, fed, batch, _, noise = run(pipe, PRESETS["instaflow"])
    assert type(pipe.scheduler) is UniPCMultistepScheduler and (fed, batch) == ([1000], 1)
    text = pipe.encode_prompt("red blue", "cpu", 1, False)[0]
    with torch.no_grad():
        velocity = unet(noise, 1000, text).sample  # of the weights as published
    assert close(latents, noise + velocity)


@pytest.mark.parametrize("name", ["dmd2", "swiftbrush"])
def test_one_step_at_the_last_timestep(publish, hub, tmp_path, name):
    chosen = PRESETS[name]
    unet = publish(chosen.base)
    expected = unet.state_dict()
    if chosen.denoiser:
        expected = other_unet(unet)
        torch.save(expected, tmp_path / "pytorch_model.bin")
        hub.add(chosen.denoiser.repository, **{chosen.denoiser.name: (tmp_path / "pytorch_model.bin").read_bytes()})
    pipe = load_preset(chosen)
    assert all(torch.equal(value, expected[key]) for key, value in pipe.unet.state_dict().items())
    latents, fed, batch, eps, noise = run(pipe, chosen)
    assert (fed, batch) == ([999], 1) and close(latents, x0(noise, eps, 0.0047))
    if chosen.denoiser:
        assert not hub.seen("unet/diffusion_pytorch_model"), "the base's UNet is not needed"


@pytest.mark.parametrize("name", ["wadi-sd15", "wadi-sd21"])
def test_wadi_of_the_authors(publish, hub, name):
    chosen = PRESETS[name]
    expected = other_unet(publish(chosen.base))
    hub.add(chosen.denoiser.repository, **{chosen.denoiser.name: save(expected)})
    pipe = load_preset(chosen)
    assert isinstance(pipe, WaDiPipeline) and pipe.safety_checker is None
    assert all(torch.equal(value, expected[key]) for key, value in pipe.unet.state_dict().items())
    latents, fed, batch, eps, noise = run(pipe, chosen)
    assert (fed, batch) == ([999], 1) and close(latents, x0(noise, eps, 0.0047))


def test_wadi_on_pixart(hub, tmp_path):
    chosen = PRESETS["wadi-pixart"]
    base = pixart_pipeline()
    base.save_pretrained(tmp_path / "base")
    hub.add(PIXART, tmp_path / "base")
    expected = other_unet(base.transformer)
    hub.add(chosen.denoiser.repository, **{chosen.denoiser.name: save(expected)})
    pipe = load_preset(chosen)
    assert isinstance(pipe, WaDiPixArtPipeline)
    assert all(torch.equal(value, expected[key]) for key, value in pipe.transformer.state_dict().items())
    latents, fed, batch, output, noise = run(pipe, chosen)
    assert (fed, batch) == ([999], 1) and close(latents, x0(noise, output.chunk(2, 1)[0], 0.0047))


def test_pixart_as_it_is(hub, tmp_path):
    pixart_pipeline().save_pretrained(tmp_path / "base")
    hub.add(PIXART, tmp_path / "base")
    pipe = load_preset(PRESETS["pixart-20"])
    # Sizes to bin to are known for the published models alone, not for one as small as this.
    _, fed, batch, *_ = run(pipe, PRESETS["pixart-20"], use_resolution_binning=False)
    assert type(pipe.scheduler) is DPMSolverMultistepScheduler and len(fed) == 20 and batch == 2


@pytest.mark.parametrize("name, steps, batch", [("shapes", 1, 1), ("shapes-teacher", 25, 2), ("shapes-pixart", 1, 1)])
def test_bundled(name, steps, batch):
    pipe = load_preset(PRESETS[name])
    _, fed, fed_batch, *_ = run(pipe, PRESETS[name])
    assert len(fed) == steps and fed_batch == batch and (steps > 1 or fed == [999])


def test_every_preset_has_a_test_here_and_no_name_is_twice():
    tested = {"sd15-25", "sd15-50", "sd21-25", "sd21-50", "lcm-lora", "hyper-sd", "yoso", "pcm-2step", "sd-turbo"}
    tested |= {"instaflow", "dmd2", "swiftbrush", "wadi-sd15", "wadi-sd21", "wadi-pixart", "pixart-20"}
    assert set(PRESETS) == tested | {"shapes", "shapes-teacher", "shapes-pixart"}
    assert not PRESETS.keys() & UNSUPPORTED.keys() and len({p.label for p in PRESETS.values()}) == len(PRESETS)


def test_what_is_not_supported_says_why():
    with pytest.raises(ValueError, match="'sid-lsg' is not supported: .*pickles"):
        preset("sid-lsg")
    with pytest.raises(ValueError, match="'sdturbo': expected one of shapes, .*sd-turbo"):
        preset("sdturbo")


def test_files_from_elsewhere(components, hub, tmp_path):
    """Nothing is asked of the Hub where a folder and a file are given."""
    StableDiffusionPipeline(**components).save_pretrained(tmp_path / "base")
    content, merged = lora(components["unet"], kohya=True)
    (tmp_path / "hyper.safetensors").write_bytes(content)
    pipe = load_preset(PRESETS["hyper-sd"], model=tmp_path / "base", weights=tmp_path / "hyper.safetensors")
    assert close(pipe.unet.get_submodule(LORA_LAYER).weight, merged) and not hub.requests


def test_what_cannot_be_had_is_named_with_its_option(publish, hub, components, tmp_path):
    chosen = PRESETS["hyper-sd"]
    with pytest.raises(
        OSError, match="cannot get Hyper-SD15-1step-lora.safetensors of ByteDance/Hyper-SD.*--preset_weights"
    ):
        load_preset(chosen)
    content, _ = lora(components["unet"], kohya=True)
    hub.add(chosen.lora.repository, **{"another.safetensors": content})
    with pytest.raises(FileNotFoundError, match="holds no Hyper-SD15-1step-lora.safetensors.*--preset_weights"):
        load_preset(chosen)
    hub.add(chosen.lora.repository, **{chosen.lora.name: content})
    with pytest.raises(OSError, match="cannot load the pipeline 'stable-diffusion-v1-5.*goes in as MODEL"):
        load_preset(chosen)
    with pytest.raises(FileNotFoundError, match="no such file \\(--preset_weights\\)"):
        load_preset(chosen, weights=tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="SD-Turbo has no weights besides its pipeline"):
        load_preset(PRESETS["sd-turbo"], weights=tmp_path / "x")


class RunsCode:
    def __reduce__(self):
        return (print, ("run",))


def test_weights_that_do_not_fit(publish, tmp_path):
    unet = publish(SD15)
    torch.save({"conv_in.weight": RunsCode()}, tmp_path / "code.bin")
    with pytest.raises(ValueError, match="more than tensors and is not read"):
        load_preset(PRESETS["dmd2"], weights=tmp_path / "code.bin")
    state = other_unet(unet)
    save_file({k: v for k, v in state.items() if k != "conv_out.bias"}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="first conv_out.bias: it is missing"):
        load_preset(PRESETS["dmd2"], weights=tmp_path / "part.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "part.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="no complete file of weights"):
        load_preset(PRESETS["dmd2"], weights=tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="LoRA"):
        load_preset(PRESETS["hyper-sd"], weights=tmp_path / "part.safetensors")


def test_any_pipeline_and_any_adapter(base_folder, adapter_folder):
    stock, ours = load_pipeline(base_folder), load_pipeline(adapter_folder)
    assert type(stock) is StableDiffusionPipeline and type(ours) is WaDiPipeline
    with pytest.raises(OSError, match="nowhere"):
        load_pipeline("nowhere/at-all")
    text = {"generator": None, "output_type": "np", "guidance_scale": 1.0, "num_inference_steps": 1}
    images = [p("red", **text | {"generator": torch.Generator().manual_seed(0)}).images for p in (stock, ours)]
    assert isinstance(ours.unet, UNet2DConditionModel) and not np.allclose(*images)
