"""`training/train_wadi.py` end to end on a tiny random teacher."""

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_wadi.distillation import checkpoint
from diffusers_wadi.distillation.trainer import WaDiTrainer
from diffusers_wadi.shapes.models import build_tokenizer

SCRIPT = Path(__file__).parents[2] / "training" / "train_wadi.py"
PROMPTS = ["a red circle", "a blue square", "a green star", "a large yellow heart", "a small purple ring"]


def load_script():
    spec = importlib.util.spec_from_file_location("train_wadi", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_wadi = load_script()


def tiny_pipeline(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**betas, prediction_type=prediction_type, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def run(teacher, tmp_path):
    """Parse flags for a tiny run; `name` is the output folder."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def arguments(name: str, *flags: str):
        given = f"--pretrained_teacher_model {teacher} --train_prompts {prompts} --output_dir {tmp_path / name}"
        sizes = "--student_rank 4 --fake_rank 2 --train_batch_size 2 --validation_steps 0"
        return train_wadi.parse_args(f"{given} {sizes}".split() + [str(flag) for flag in flags])

    return arguments


def state_of(trainer: WaDiTrainer) -> dict:
    """Everything that has to be the same after a resume."""
    networks, parts = trainer.networks, checkpoint.collect_state(trainer._parts())
    adapters = {f"{role}.{k}": v for role in ("student", "fake") for k, v in networks.adapter_state(role).items()}
    return {"adapters": adapters, "parts": parts, "generator": trainer.steps.generator.get_state()}


def assert_same(one, other, where: str = "state") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert one == other, where


RESUMED_RUNS = {
    "release": ("--max_train_steps", 4),
    "ema, several fakes": "--max_train_steps 4 --use_ema --fake_updates_per_step 3 --score_weighting dmd2".split(),
    "in the warm start": "--warmup_regression_steps 3 --max_train_steps 1 --use_ema".split(),
    "after it": "--warmup_regression_steps 1 --max_train_steps 3 --regression_weight 0.5 --lr_scheduler cosine".split(),
}


@pytest.mark.parametrize("flags", RESUMED_RUNS.values(), ids=RESUMED_RUNS)
def test_resumed_equals_uninterrupted_bit_for_bit(run, flags):
    pairs = ("--warmup_regression_pairs", 6, "--warmup_num_inference_steps", 2)
    flags = (*flags, *pairs, "--checkpointing_steps", 2)
    whole = WaDiTrainer(run("whole", *flags))
    whole.train()
    torch.manual_seed(123)  # whatever happened between the two runs must not matter
    resumed = WaDiTrainer(run("whole", *flags, "--resume_from_checkpoint", "checkpoint-2"))
    assert resumed.step == 2
    while resumed.step < resumed.total_steps:
        resumed.update()
    assert_same(state_of(whole), state_of(resumed))
