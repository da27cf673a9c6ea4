"""A Stable Diffusion pipeline of a few thousand random weights, built once and copied for each test."""

import copy
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The networks are too small for more, and the processes that tests start beside this one would share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from hub_server import hub  # noqa: F401  (the fixture)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_wadi import LoRaDConfig, one_step_scheduler, save_lorad_adapter

SD_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "time_emb_proj"]


def write_tokenizer(folder):
    """A CLIP tokenizer that knows single letters and two merged words."""
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    merges = ["r e", "re d</w>", "b l", "bl u", "blu e</w>"]
    words = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=24)
    return tokenizer, len(vocabulary)


def tiny_unet(width=8, cross_attention_dim=16):
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def tiny_vae():
    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    ).eval()


def tiny_text_encoder(vocabulary_size, hidden_size=16):
    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=vocabulary_size - 2,
        eos_token_id=vocabulary_size - 1,
        pad_token_id=vocabulary_size - 1,
    )
    return CLIPTextModel(config).eval()


@pytest.fixture
def without_bars(monkeypatch):
    """Pipelines show no progress."""
    monkeypatch.setattr(DiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False)


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """accelerate refuses a second precision in one process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def said(monkeypatch):
    """The warnings that the one-step pipelines log."""
    messages = []
    monkeypatch.setattr(logging.get_logger("diffusers_wadi.pipelines._one_step"), "warning", messages.append)
    return messages


@pytest.fixture(scope="session")
def _components(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer, size = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return {
        "vae": tiny_vae(),
        "text_encoder": tiny_text_encoder(size),
        "tokenizer": tokenizer,
        "unet": tiny_unet(),
        "scheduler": one_step_scheduler(SD_BETAS),
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }


@pytest.fixture
def components(_components):
    """Arguments of a StableDiffusionPipeline, fresh copies: AutoencoderKL f8, UNet 8x8x4, CLIP text encoder."""
    return copy.deepcopy(_components)


@pytest.fixture(scope="session")
def base_folder(_components, tmp_path_factory):
    """An ordinary diffusers folder of the tiny pipeline. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("base")
    StableDiffusionPipeline(**copy.deepcopy(_components)).save_pretrained(folder)
    return folder


def add_random_adapter(unet, name="student", r=4, seed=1, size=0.3, targets=TARGETS):
    """A LoRaD adapter with angles of about `size`, so that it changes the image."""
    unet.add_adapter(LoRaDConfig(r=r, target_modules=targets), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in unet.named_parameters():
        if f"lorad_A.{name}" in key:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return unet


@pytest.fixture(scope="session")
def adapter_folder(_components, base_folder, tmp_path_factory):
    """A LoRaD adapter folder whose config names the base folder by its path. Read only."""
    folder = tmp_path_factory.mktemp("adapter")
    unet = add_random_adapter(copy.deepcopy(_components["unet"]))
    save_lorad_adapter(unet, folder, "student", base_model_name_or_path=str(base_folder))
    return folder


@pytest.fixture
def tiny_run(base_folder, tmp_path):
    """`wadi_script.tiny_run` into the folder of the test, on the tiny pipeline unless told otherwise."""
    import wadi_script

    def parse(*flags, teacher=base_folder, name="out"):
        return wadi_script.tiny_run(teacher, tmp_path, *flags, name=name)

    return parse
