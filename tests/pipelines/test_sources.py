"""What a pipeline is loaded from and saved to: caches, weights that are not there, schedulers, adapters over adapters."""

import json
import shutil

import pytest
import torch
from conftest import SD_BETAS, TARGETS, add_random_adapter
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from diffusers_wadi import WaDiPipeline, one_step_scheduler


@pytest.fixture
def base(base_folder, tmp_path):
    """A copy of the base folder that a test may spoil."""
    return shutil.copytree(base_folder, tmp_path / "base")


@pytest.fixture
def adapter(adapter_folder, tmp_path):
    return shutil.copytree(adapter_folder, tmp_path / "adapter")


def latents(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent"} | options
    return pipe("red blue", generator=generator, **options).images


# --------------------------------------------------------------------------------------------------------------- cache


def test_a_cached_adapter_loads_offline(adapter_folder, tmp_path):
    """The layout of the Hub's cache after an adapter was used once: only its own files are there."""
    repository, commit = tmp_path / "models--org--adapter", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(adapter_folder, repository / "snapshots" / commit)
    offline = {"cache_dir": tmp_path, "local_files_only": True}
    pipe = WaDiPipeline.from_pretrained("org/adapter", **offline)
    assert torch.equal(latents(pipe), latents(WaDiPipeline.from_pretrained(adapter_folder)))
    with pytest.raises(
        OSError, match="model_index.json is not in the local cache.* Nor is there an adapter_config.json"
    ):
        WaDiPipeline.from_pretrained("org/other", **offline)


# ------------------------------------------------------------------------------------------------------------- weights


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def add_training_weights(tensors):
    tensors["mid_block.attentions.0.proj_in.theta_a"] = torch.zeros(4, 4)
    tensors["mid_block.attentions.0.proj_in.theta_b"] = torch.zeros(4, 4)


def add_unknown(tensors):
    tensors["something.weight"] = torch.zeros(2)


def drop_weight(tensors):
    del tensors[sorted(key for key in tensors if key.endswith("weight"))[3]]


UNET, VAE = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"


@pytest.mark.parametrize(
    "stem, change, message",
    [
        (UNET, add_training_weights, r"2 of its tensors have no place there, first .*theta_a.*authors' release"),
        (UNET, add_unknown, "1 of its tensors have no place there, first something.weight"),
        (UNET, drop_weight, "lacks 1 tensors, first .*weight. Copy"),
        (VAE, drop_weight, "vae.* lacks 1 tensors, first .*weight. Copy"),
        ("text_encoder/model", drop_weight, "text_encoder.* lacks 1 tensors, first .*weight. Copy"),
    ],
)
def test_foreign_or_incomplete_weights_are_refused(base, stem, change, message):
    rewrite(base / f"{stem}.safetensors", change)
    with pytest.raises(OSError, match=message):
        WaDiPipeline.from_pretrained(base)


def test_a_file_without_weights_in_another_format_is_refused(base):
    path = base / f"{VAE}.safetensors"
    tensors = load_file(path)
    drop_weight(tensors)
    torch.save(tensors, path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(OSError, match="vae.* lacks 1 tensors"):
        WaDiPipeline.from_pretrained(base)


def to_old_names(tensors):
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        for key in [key for key in tensors if f".{new}." in key]:
            tensors[key.replace(f".{new}.", f".{old}.")] = tensors.pop(key)


def test_old_names_variants_and_shards_are_fine(base, base_folder, components, tmp_path):
    expected = latents(WaDiPipeline.from_pretrained(base_folder))
    rewrite(base / f"{VAE}.safetensors", to_old_names)
    assert any("proj_attn" in key for key in load_file(base / f"{VAE}.safetensors"))
    image = WaDiPipeline.from_pretrained(base).vae.decode(expected).sample
    assert torch.equal(image, WaDiPipeline.from_pretrained(base_folder).vae.decode(expected).sample)
    parts = tmp_path / "parts"
    StableDiffusionPipeline(**components).save_pretrained(parts, variant="fp16", max_shard_size="50KB")
    assert (parts / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    sharded = WaDiPipeline.from_pretrained(parts, variant="fp16")
    torch.testing.assert_close(latents(sharded), expected)  # alignment in the file changes the last bit


# ----------------------------------------------------------------------------------------------------------- scheduler


def test_the_scheduler_beside_an_adapter_is_used(adapter):
    one_step_scheduler(SD_BETAS, terminal_alpha_cumprod=0.0047).save_pretrained(adapter / "scheduler")
    pipe = WaDiPipeline.from_pretrained(adapter)
    assert abs(pipe.scheduler.alphas_cumprod[-1].item() - 0.0047) < 1e-6
    given = one_step_scheduler(SD_BETAS)
    assert WaDiPipeline.from_pretrained(adapter, scheduler=given).scheduler is given
    path = adapter / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ValueError, match="'UNet2DConditionModel', which is no scheduler"):
        WaDiPipeline.from_pretrained(adapter)
    path.write_text("{")
    with pytest.raises(ValueError, match="no scheduler config"):
        WaDiPipeline.from_pretrained(adapter)
    assert WaDiPipeline.from_pretrained(adapter, scheduler=given).scheduler is given  # the remedy that the error names


def terminal(pipe) -> float:
    return pipe.scheduler.alphas_cumprod[-1].item()


def test_the_scheduler_goes_with_the_adapter(base, adapter, tmp_path):
    """What alphas_cumprod[T-1] its step takes is a part of an adapter: saved with it, and used where it is put on a pipeline."""
    one_step_scheduler(SD_BETAS, terminal_alpha_cumprod=0.1).save_pretrained(adapter / "scheduler")
    pipe = WaDiPipeline.from_pretrained(adapter)
    expected, teacher = latents(pipe), WaDiPipeline.from_pretrained(base)
    pipe.save_lorad_weights(tmp_path / "saved")
    again = WaDiPipeline.from_pretrained(tmp_path / "saved", base_model=base)
    assert terminal(again) == pytest.approx(0.1, abs=1e-6) and torch.equal(latents(again), expected)

    own, plain = terminal(teacher), latents(teacher)
    several = {"num_inference_steps": 3}
    many = latents(teacher, **several)
    teacher.load_lorad_weights(tmp_path / "saved")
    assert torch.equal(latents(teacher), expected)
    teacher.disable_lora()  # nor is the adapter's scheduler used then
    assert torch.equal(latents(teacher, **several), many) and torch.equal(latents(teacher), plain)
    teacher.enable_lora()
    assert torch.equal(latents(teacher), expected)
    teacher.load_lorad_weights(other_adapter(teacher, tmp_path / "other"), adapter_name="other")
    assert terminal(teacher) == pytest.approx(0.1, abs=1e-6)  # a second one leaves it
    teacher.unload_lorad_weights()
    teacher.load_lorad_weights(tmp_path / "other")  # without a scheduler of its own: the base's again
    assert terminal(teacher) == own
    teacher.disable_lora()
    assert torch.equal(latents(teacher), plain)


def other_adapter(pipe, folder):
    """A folder with an adapter and no scheduler."""
    pipe.save_lorad_weights(folder, pipe.get_active_adapters()[0])
    shutil.rmtree(folder / "scheduler")
    return folder


def test_a_broken_scheduler_beside_an_adapter_changes_nothing(base, adapter):
    pipe = WaDiPipeline.from_pretrained(base)
    ours = pipe.scheduler
    (adapter / "scheduler").mkdir()
    (adapter / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match="no scheduler config"):
        pipe.load_lorad_weights(adapter)
    assert pipe.scheduler is ours and pipe.get_active_adapters() == []


@pytest.mark.parametrize("kind", ["complete", "adapter"])
def test_calls_of_several_steps_keep_the_checkpoint_s_own_scheduler(base, adapter, kind, tmp_path):
    """One step takes ours; with more the pipeline is the stock one, and the saved model the one-step one."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    index = json.loads((base / "model_index.json").read_text()) | {"scheduler": ["diffusers", "PNDMScheduler"]}
    (base / "model_index.json").write_text(json.dumps(index))
    PNDMScheduler(**SD_BETAS, skip_prk_steps=True).save_pretrained(base / "scheduler")
    if kind == "adapter":
        one_step_scheduler(SD_BETAS, 0.0047).save_pretrained(adapter / "scheduler")
    pipe = WaDiPipeline.from_pretrained(base if kind == "complete" else adapter)
    ours, teacher = pipe.scheduler, StableDiffusionPipeline.from_pretrained(base)
    pipe.disable_lora()
    several = {"num_inference_steps": 4, "guidance_scale": 3.0}
    expected = latents(teacher, **several)
    assert torch.equal(latents(pipe, **several), expected)
    assert torch.equal(latents(WaDiPipeline.from_pipe(pipe), **several), expected) and pipe.scheduler is ours
    pipe.enable_lora()
    latents(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    assert type(StableDiffusionPipeline.from_pretrained(tmp_path / "saved").scheduler) is DDIMScheduler
    pipe.scheduler = one_step_scheduler(SD_BETAS)  # chosen by hand: now that is the pipeline's
    assert not torch.equal(latents(pipe, **several), expected)


# -------------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("lora_first", [False, True])
def test_saved_pixels_with_a_lora_beside(components, tmp_path, lora_first):
    torch.manual_seed(0)
    unet = components["unet"]
    lora = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    if lora_first:
        unet.add_adapter(lora, "lora")
    add_random_adapter(unet)
    if not lora_first:
        unet.add_adapter(lora, "lora")
    unet.set_adapters(["student", "lora"])
    pipe = WaDiPipeline(**components)
    live = latents(pipe)
    pipe.save_pretrained(tmp_path)
    saved = latents(StableDiffusionPipeline.from_pretrained(tmp_path))
    torch.testing.assert_close(saved, live, rtol=1e-4, atol=1e-3)
    unet.set_adapters(["student"])
    assert (latents(pipe) - live).abs().max() > 0.1


def test_a_lora_on_the_text_encoder_stays_one_in_the_saved_folder(components, base, tmp_path):
    """As in stock pipelines; transformers loads the encoder's weights from where they came."""
    pipe = WaDiPipeline.from_pretrained(base)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    plain = latents(pipe)
    pipe.text_encoder.add_adapter(lora)
    expected = latents(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    again = WaDiPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(latents(again), expected) and (expected - plain).abs().max() > 1e-3
    rewrite(base / "text_encoder" / "model.safetensors", drop_weight)
    with pytest.raises(OSError, match="text_encoder.* lacks 1 tensors, first .*weight. Copy"):
        WaDiPipeline.from_pretrained(tmp_path / "saved")


def test_a_pipeline_of_the_text_encoder_alone(components):
    """Stock pipelines manage its adapters without a UNet; what needs one says so."""
    parts = {name: part if "text" in name or "token" in name else None for name, part in components.items()}
    pipe = WaDiPipeline(**parts | {"requires_safety_checker": False})
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "x")
    assert pipe.get_list_adapters() == {"text_encoder": ["x"]} and pipe.is_one_step
    pipe.set_adapters("x", 0.5)
    pipe.disable_lora()
    pipe.enable_lora()
    pipe.to(torch.float16)
    with pytest.raises(ValueError, match="has no unet to adapt"):
        pipe.fuse_lorad()
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {} and pipe.get_active_adapters() == []


def test_stock_bookkeeping_knows_of_fused_lorads(components):
    add_random_adapter(components["unet"])
    pipe = WaDiPipeline(**components)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS), "lora")
    pipe.unet.set_adapters(["student", "lora"])
    pipe.fuse_lorad()
    assert pipe.fused_loras == {"student"} and pipe.num_fused_loras == 1
    pipe.fuse_lora(components=["unet"], adapter_names=["lora"])
    assert pipe.fused_loras == {"student", "lora"}
    pipe.unfuse_lorad()
    assert pipe.fused_loras == {"lora"}
    pipe.unfuse_lora(components=["unet"])
    assert pipe.num_fused_loras == 0
