"""Export: one-file checkpoints in the original layout, and LoRaD as a plain LoRA."""

import copy
import json

import pytest
import torch
from backbones import SD15_UNET, SD21_UNET, meta_model
from conftest import SD_BETAS, TARGETS, add_random_adapter
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    PixArtAlphaPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.pytorch_utils import Conv1D

from diffusers_wadi import (
    LoRaDConfig,
    WaDiPipeline,
    bundled_checkpoint,
    export_lora,
    export_single_file,
    one_step_scheduler,
)
from diffusers_wadi.conversion import single_file
from diffusers_wadi.conversion.single_file import original_state_dict

ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}

# The four-level structure of Stable Diffusion 1.5 and of its autoencoder, a few channels wide.
TINY_SD15 = SD15_UNET | {
    "sample_size": 8,
    "block_out_channels": (8, 8, 16, 16),
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
}
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
OPEN_CLIP_H = CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}


def latents(pipe, prompt="red", seed=0, **options):
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **ONE_STEP | options).images


def same_weights(one, two):
    for name in ("unet", "vae", "text_encoder"):
        first, second = (getattr(pipe, name).state_dict() for pipe in (one, two))
        assert first.keys() == second.keys()
        odd = [key for key in first if not torch.equal(first[key], second[key])]
        assert not odd, (name, odd)


# The original code's own structure, a second time: blocks are numbered as its constructors append them.


def both(*names):
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def resnet_names(prefix, shortcut):
    names = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
    return both(*(f"{prefix}.{name}" for name in (*names, *(["skip_connection"] if shortcut else []))))


def transformer_names(prefix):
    block = f"{prefix}.transformer_blocks.0"
    names = both(
        f"{prefix}.norm", f"{prefix}.proj_in", f"{prefix}.proj_out", f"{block}.ff.net.0.proj", f"{block}.ff.net.2"
    )
    names |= both(f"{block}.norm1", f"{block}.norm2", f"{block}.norm3")
    for attention in ("attn1", "attn2"):
        names |= {f"{block}.{attention}.to_{letter}.weight" for letter in "qkv"} | both(
            f"{block}.{attention}.to_out.0"
        )
    return names


def original_unet_names(multipliers=(1, 2, 4, 4), attention_levels=(0, 1, 2), res_blocks=2):
    names, block, channels, skips = (
        both("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"),
        1,
        1,
        [1],
    )
    for level, width in enumerate(multipliers):
        for _ in range(res_blocks):
            names |= resnet_names(f"input_blocks.{block}.0", channels != width)
            names |= transformer_names(f"input_blocks.{block}.1") if level in attention_levels else set()
            channels, block = width, block + 1
            skips.append(channels)
        if level < len(multipliers) - 1:
            names |= both(f"input_blocks.{block}.0.op")
            block += 1
            skips.append(channels)
    names |= resnet_names("middle_block.0", False) | transformer_names("middle_block.1")
    names |= resnet_names("middle_block.2", False)
    block = 0
    for level in reversed(range(len(multipliers))):
        for number in range(res_blocks + 1):
            skips.pop()
            names |= resnet_names(f"output_blocks.{block}.0", True)  # with the skip there are always more channels in
            names |= transformer_names(f"output_blocks.{block}.1") if level in attention_levels else set()
            if level and number == res_blocks:
                names |= both(f"output_blocks.{block}.{2 if level in attention_levels else 1}.conv")
            block += 1
    assert not skips
    return {f"model.diffusion_model.{name}" for name in names}


def original_vae_names(multipliers=(1, 2, 4, 4), res_blocks=2):
    names, levels = both("quant_conv", "post_quant_conv"), len(multipliers)
    for side in ("encoder", "decoder"):
        names |= both(*(f"{side}.{part}" for part in ("conv_in", "norm_out", "conv_out")))
        names |= both(*(f"{side}.mid.attn_1.{part}" for part in ("norm", "q", "k", "v", "proj_out")))
        blocks = [f"{side}.mid.block_1", f"{side}.mid.block_2"]
        channels = multipliers[0] if side == "encoder" else multipliers[-1]
        for level in range(levels) if side == "encoder" else reversed(range(levels)):
            for number in range(res_blocks + (side == "decoder")):
                blocks.append(f"{side}.{'down' if side == 'encoder' else 'up'}.{level}.block.{number}")
                names |= both(f"{blocks[-1]}.nin_shortcut") if channels != multipliers[level] else set()
                channels = multipliers[level]
        names |= both(*(f"{block}.{part}" for block in blocks for part in ("norm1", "conv1", "norm2", "conv2")))
    names |= both(*(f"encoder.down.{level}.downsample.conv" for level in range(levels - 1)))
    names |= both(*(f"decoder.up.{level}.upsample.conv" for level in range(1, levels)))
    return {f"first_stage_model.{name}" for name in names}


def pipeline_on_meta(unet, text):
    with torch.device("meta"):
        text_encoder = CLIPTextModel(CLIPTextConfig(**text))
    parts = {"unet": meta_model(UNet2DConditionModel, unet), "vae": meta_model(AutoencoderKL, SD_VAE)}
    empty = dict.fromkeys(("tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(**parts, text_encoder=text_encoder, **empty, requires_safety_checker=False)


def test_stable_diffusion_15_has_exactly_the_original_tensors():
    state = original_state_dict(pipeline_on_meta(SD15_UNET, CLIP_L))
    unet = {key for key in state if key.startswith("model.diffusion_model.")}
    vae = {key for key in state if key.startswith("first_stage_model.")}
    text = state.keys() - unet - vae
    assert len(unet) == 686 and unet == original_unet_names()
    assert len(vae) == 248 and vae == original_vae_names()
    assert len(text) == 196 and all(key.startswith("cond_stage_model.transformer.text_model.") for key in text)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    start = "model.diffusion_model."
    assert shapes[f"{start}output_blocks.11.0.skip_connection.weight"] == (320, 640, 1, 1)
    assert shapes[f"{start}input_blocks.3.0.op.weight"] == (320, 320, 3, 3)
    assert shapes[f"{start}input_blocks.1.1.proj_in.weight"] == (320, 320, 1, 1)
    assert shapes[f"{start}output_blocks.8.2.conv.weight"] == (640, 640, 3, 3)
    assert shapes["first_stage_model.encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    assert shapes["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"] == (49408, 768)


def test_stable_diffusion_21_has_open_clip_names():
    state = original_state_dict(pipeline_on_meta(SD21_UNET, OPEN_CLIP_H))
    unet = {key for key in state if key.startswith("model.diffusion_model.")}
    assert unet == original_unet_names()
    assert tuple(state["model.diffusion_model.input_blocks.1.1.proj_in.weight"].shape) == (320, 320)
    text = {key.removeprefix("cond_stage_model.model.") for key in state if key.startswith("cond_stage_model.model.")}
    layers = both("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj", "attn.out_proj") | {
        "attn.in_proj_weight",
        "attn.in_proj_bias",
    }
    expected = {f"transformer.resblocks.{layer}.{name}" for layer in range(23) for name in layers}
    assert text == expected | both("ln_final") | {"positional_embedding", "token_embedding.weight"}
    shape = state["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"].shape
    assert tuple(shape) == (3072, 1024)


@pytest.fixture
def sd15_pipe(components, base_folder, tmp_path):
    """A pipeline of the block structure of Stable Diffusion 1.5, and its folder."""
    torch.manual_seed(0)
    pipe = WaDiPipeline(**components | {"unet": UNet2DConditionModel(**TINY_SD15).eval()})
    pipe.save_pretrained(tmp_path / "folder")
    return pipe, tmp_path / "folder"


@pytest.mark.parametrize("layout", ["auto", "sd2"])
def test_stock_diffusers_reads_the_file_back(sd15_pipe, tmp_path, layout):
    pipe, folder = sd15_pipe
    path = export_single_file(pipe, tmp_path / "new" / "model.safetensors", layout=layout)
    with safe_open(path, framework="pt") as file:
        assert {"open_clip": "resblocks.0.attn.in_proj_weight" in " ".join(file.keys())} == {
            "open_clip": layout == "sd2"
        }
        assert "one step" in file.metadata()["modelspec.usage_hint"]
    again = StableDiffusionPipeline.from_single_file(str(path), config=str(folder), local_files_only=True)
    same_weights(again, pipe)
    assert torch.equal(latents(again), latents(pipe))


def test_adapters_are_fused_in_the_file_and_left_in_the_pipeline(sd15_pipe, tmp_path):
    pipe, folder = sd15_pipe
    plain = latents(pipe)
    add_random_adapter(pipe.unet)
    path = export_single_file(pipe, tmp_path / "model.safetensors")
    assert any("lorad" in key for key in pipe.unet.state_dict())
    again = StableDiffusionPipeline.from_single_file(str(path), config=str(folder), local_files_only=True)
    assert (latents(again) - latents(pipe)).abs().max() < 1e-3 < 1e-2 < (latents(pipe) - plain).abs().max()
    pipe.fuse_lorad()
    pipe.unload_lorad_weights()
    same_weights(again, pipe)


def test_the_file_in_half_precision(sd15_pipe, tmp_path):
    pipe, folder = sd15_pipe
    path = export_single_file(pipe, tmp_path / "model.safetensors", dtype=torch.float16)
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    again = StableDiffusionPipeline.from_single_file(
        str(path), config=str(folder), local_files_only=True, torch_dtype=torch.float16
    )
    pipe.to(torch.float16)
    same_weights(again, pipe)


def test_the_bundled_checkpoint_as_one_file(tmp_path):
    pipe = WaDiPipeline.from_pretrained(bundled_checkpoint())
    path = export_single_file(pipe, tmp_path / "shapes.safetensors")
    config = str(bundled_checkpoint() / "teacher")
    again = StableDiffusionPipeline.from_single_file(str(path), config=config, local_files_only=True)
    pipe.fuse_lorad()
    pipe.unload_lorad_weights()
    same_weights(again, pipe)


@pytest.mark.parametrize(("terminal", "warned"), [(None, False), (0.0047, False), (0.1, True)])
def test_a_step_that_the_file_cannot_hold_is_warned_of(sd15_pipe, tmp_path, monkeypatch, terminal, warned):
    """Other programs have Stable Diffusion's alphas_cumprod[T-1] built in."""
    pipe, _ = sd15_pipe
    monkeypatch.setattr(pipe, "scheduler", one_step_scheduler(SD_BETAS, terminal))
    said = []
    monkeypatch.setattr(single_file._logger, "warning", said.append)
    export_single_file(pipe, tmp_path / "model.safetensors")
    assert ["alphas_cumprod[T-1] = 0.1, which the file cannot hold" in text for text in said] == [True] * warned


def test_what_the_layout_cannot_hold_is_refused(components, sd15_pipe, tmp_path):
    pipe, folder = sd15_pipe
    out = tmp_path / "x.safetensors"

    def refused(message, pipe, path=out, **options):
        with pytest.raises(ValueError, match=message):
            export_single_file(pipe, path, **options)
        assert not out.exists()

    refused("name it so", pipe, tmp_path / "x.ckpt")
    refused("'auto', 'sd1' or 'sd2', got 'sdxl'", pipe, layout="sdxl")
    refused("with a UNet2DConditionModel as unet", PixArtAlphaPipeline(*[None] * 5))
    pipe.text_encoder.encoder.layers[0].extra = torch.nn.Parameter(torch.zeros(1))
    refused("no place in the original Stable Diffusion layout", pipe, layout="sd2")
    del pipe.text_encoder.encoder.layers[0].extra
    options = TINY_SD15 | {"layers_per_block": (1, 2, 2, 2)}
    pipe.unet = UNet2DConditionModel(**options)
    refused("layers_per_block .* differs by level", pipe)
    pipe.unet = UNet2DConditionModel(**TINY_SD15 | {"class_embed_type": "timestep"})
    refused("class_embedding.linear_1.weight has no place", pipe)
    # Every name has a place here, but readers of version 2 skip the 24th layer, which its own text encoder does not use.
    pipe.unet = UNet2DConditionModel(**TINY_SD15)
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    pipe.text_encoder = CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=24))
    refused("this text encoder does not fit the original layout: 16 of its 388 tensors", pipe, layout="sd2")


# LoRA.


@pytest.fixture
def adapted(components):
    pipe = WaDiPipeline(**components)
    add_random_adapter(pipe.unet)
    return pipe


def rotated(pipe):
    """Weights of the pipeline's UNet with its adapter fused."""
    unet = copy.deepcopy(pipe.unet)
    for module in unet.modules():
        if hasattr(module, "lorad_A"):
            module.merge()
    unet.unload_lora()
    return unet.state_dict()


def with_lora(components, path):
    """A stock pipeline with the LoRA, its latents, and the weights with the LoRA fused."""
    pipe = StableDiffusionPipeline(**copy.deepcopy(components))
    pipe.load_lora_weights(str(path))
    images = latents(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return images, pipe.unet.state_dict()


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_lora_of_full_rank_is_the_lorad(_components, adapted, tmp_path, layout):
    lora = export_lora(adapted.unet, rank=100)
    folder = tmp_path / "lora"
    path = lora.save(folder, layout=layout)
    assert path == folder / "pytorch_lora_weights.safetensors"
    images, state = with_lora(_components, folder)
    wanted = rotated(adapted)
    assert max((state[key] - wanted[key]).abs().max() for key in wanted) <= 1e-5
    assert (images - latents(adapted)).abs().max() < 1e-3
    assert lora.report.explained == pytest.approx(1, abs=1e-9) and lora.report.left_out == []
    ranks = {layer.name: layer.rank for layer in lora.report.layers}
    assert len(set(ranks.values())) > 1  # the layers differ in size: each has its own scale to get right
    for name, rank in ranks.items():
        assert rank == min(adapted.unet.get_submodule(name).get_base_layer().weight.shape)


def test_the_share_of_a_lora_grows_with_its_rank_and_is_what_it_says(_components, adapted, tmp_path):
    base, wanted = _components["unet"].state_dict(), rotated(adapted)
    shares = []
    for rank in (1, 2, 4, 8):
        lora = export_lora(adapted.unet, rank=rank)
        _, state = with_lora(_components, lora.save(tmp_path / str(rank)))
        for layer in lora.report.layers:
            key = f"{layer.name}.weight"
            left, change = (wanted[key] - state[key]).square().sum(), (wanted[key] - base[key]).square().sum()
            assert layer.explained == pytest.approx(1 - (left / change).item(), abs=1e-4)
            assert layer.change == pytest.approx(change.sqrt().item(), rel=1e-4)
        shares.append(lora.report.explained)
    assert all(later > earlier for earlier, later in zip(shares, shares[1:])) and 0 < shares[0] < shares[-1] < 1
    lora = export_lora(adapted.unet, energy=0.9)
    assert all(layer.explained >= 0.9 for layer in lora.report.layers)
    assert any(
        export_lora(adapted.unet, rank=layer.rank - 1).report.explained < 0.9 for layer in lora.report.layers[:1]
    )


def test_which_adapters_become_a_lora(_components, adapted, tmp_path):
    """The active ones, at their scales; or those named."""
    add_random_adapter(adapted.unet, name="second", seed=5)
    adapted.set_adapters(["student", "second"], [1.0, 0.5])
    wanted = rotated(adapted)
    _, state = with_lora(_components, export_lora(adapted.unet, rank=100).save(tmp_path / "both", dtype=torch.float64))
    assert max((state[key] - wanted[key]).abs().max() for key in wanted) <= 1e-5
    adapted.set_adapters(["second"], [1.0])
    one = rotated(adapted)
    adapted.set_adapters(["student"])
    named = export_lora(adapted.unet, rank=100, adapter_names="second")
    _, state = with_lora(_components, named.save(tmp_path / "one"))
    assert max((state[key] - one[key]).abs().max() for key in one) <= 1e-5


def test_convolutions_become_convolutions(components, tmp_path):
    base = copy.deepcopy(components)
    pipe = WaDiPipeline(**components)
    add_random_adapter(pipe.unet, targets=[*TARGETS, "conv1", "conv_shortcut"])
    wanted = rotated(pipe)
    lora = export_lora(pipe.unet, rank=100)
    shape = lora.state_dict["unet.down_blocks.0.resnets.0.conv1.lora_A.weight"].shape
    assert tuple(shape) == (8, 8, 3, 3)
    _, state = with_lora(base, lora.save(tmp_path))
    assert max((state[key] - wanted[key]).abs().max() for key in wanted) <= 1e-5


def test_lora_files_describe_themselves(adapted, tmp_path):
    path = export_lora(adapted.unet, rank=3).save(tmp_path, dtype=torch.float16)
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
        assert all(key.startswith("unet.") for key in file.keys())
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}
    assert config["unet.r"] == config["unet.lora_alpha"] == 3 and config["unet.rank_pattern"] == {}
    assert all(any(name.endswith(target) for target in TARGETS) for name in config["unet.target_modules"])


def test_bad_requests_for_a_lora(_components, adapted, tmp_path):
    def refused(message, model=adapted.unet, **options):
        with pytest.raises(ValueError, match=message):
            export_lora(model, **{"rank": 2} | options)

    refused("Pass `rank`", rank=None)
    refused("no active LoRaD adapter", _components["unet"])
    refused(r"\['nobody'\] are no LoRaD adapters; \['student'\] are", adapter_names=["nobody"])
    adapted.disable_lora()
    refused("no active LoRaD adapter")
    adapted.enable_lora()
    adapted.fuse_lorad()
    refused("unfuse_lorad")
    adapted.unfuse_lorad()
    lora = export_lora(adapted.unet, rank=2)
    with pytest.raises(ValueError, match="as .safetensors only"):
        lora.save(tmp_path / "out", weight_name="x.pt")
    with pytest.raises(ValueError, match="'diffusers' or 'kohya', got 'comfy'"):
        lora.save(tmp_path / "out", layout="comfy")
    assert not (tmp_path / "out").exists()
    assert isinstance(adapted, DiffusionPipeline)


@pytest.mark.parametrize("layer", [torch.nn.Embedding(6, 4), Conv1D(4, 6), torch.nn.MultiheadAttention(4, 2)])
def test_layers_that_lora_files_do_not_know_are_refused(layer):
    model = inject_adapter_in_model(LoRaDConfig(target_modules=["layer"]), torch.nn.ModuleDict({"layer": layer}))
    with pytest.raises(ValueError, match=f"layer is a {type(layer).__name__}; LoRA files"):
        export_lora(model, rank=2)
