"""The Stable Diffusion pipeline that learns a subject: what of it is trained, and what it is written as."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from torch import Tensor, nn

from .._adapter_files import ADAPTER_CONFIG_NAME, LORAD_WEIGHT_NAME
from .._adapter_ops import add_adapter
from .._files import folder_written_beside, written_beside
from ..distillation.adapters import AdapterSpec
from ..distillation.backbones import StableDiffusionBackbone, load_backbone
from ..distillation.checkpoint import lasting_name
from ..distillation.flags import MIXED_PRECISION
from ..downstream.dreambooth import LORA_FILE, TEXT_ENCODER, sampling_scheduler
from ..loaders import save_lorad_adapter
from ..lorad import LoRaDConfig

METHODS = {"lorad": (1e-4, 1500), "lora": (1e-4, 1500), "full": (5e-6, 800)}  # learning rate, steps (paper)
SUBJECT = "subject"  # name of the adapter
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Denoiser(nn.Module):
    """UNet and, where it is trained, text encoder as one module, for DistributedDataParallel.

    Args:
        unet: with its adapter.
        text_encoder: None if it is frozen.
        dtype: of the frozen weights.
    """

    def __init__(self, unet: nn.Module, text_encoder: nn.Module | None, dtype: torch.dtype):
        super().__init__()
        self.unet, self.text_encoder, self.dtype = unet, text_encoder, dtype

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """(B, C, H, W) float32 prediction; `text`: token ids (B, L), or states (B, L, D) if the encoder is frozen."""
        if self.text_encoder is not None:
            text = self.text_encoder(text)[0]
        return self.unet(x_t.to(self.dtype), t, text.to(self.dtype), return_dict=False)[0].float()


def check_model(args: argparse.Namespace) -> tuple[int, int, int]:
    """The shape (C, H, W) of latents at `--resolution`; no weights are loaded.

    Raises:
        ValueError: another kind of pipeline than Stable Diffusion 1.x or 2.x, or a resolution that does not fit.
        OSError: there is no pipeline.
    """
    name = args.pretrained_model_name_or_path
    backbone = load_backbone(name, args.revision, args.variant)
    if not isinstance(backbone, StableDiffusionBackbone):
        raise ValueError(
            f"--pretrained_model_name_or_path {name} is a {backbone.index['_class_name']}, expected Stable Diffusion 1.x or "
            "2.x: subjects of PixArt are not made for here."
        )
    return backbone.latent_shape(args.resolution)


class SubjectModel:
    """The pipeline with what is trained in it.

    Args:
        args: the flags of `training/train_dreambooth_lorad.py`.
        accelerator: for device and precision.

    Attributes:
        pipe: with a DDIM scheduler, and without safety checker.
        parameters: "unet.<name>" or "text_encoder.<name>" -> trained parameter; after :meth:`make_trainable`.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator):
        self.args, self.device = args, accelerator.device
        # What is trained is float32: with all weights trained that is the base itself.
        half = self.device.type != "cpu" and args.method != "full"
        self.dtype = MIXED_PRECISION[args.mixed_precision] if half else torch.float32
        self.pipe = self._load()
        self._own_scheduler = self.pipe.scheduler
        self.pipe.scheduler = sampling_scheduler(self.pipe.scheduler)
        self.vae_factor = self.pipe.vae_scale_factor
        self.trained: dict[str, nn.Module] = {}
        self.parameters: dict[str, nn.Parameter] = {}

    def _load(self) -> StableDiffusionPipeline:
        args = self.args
        pipe = StableDiffusionPipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            revision=args.revision,
            variant=args.variant,
            dtype={"default": self.dtype, "vae": torch.float32},
            safety_checker=None,
            requires_safety_checker=False,
        )
        for model in (pipe.unet, pipe.vae, pipe.text_encoder):
            model.requires_grad_(False).eval().to(self.device)
        if self.device.type == "cpu":  # where the backward of fused attention takes longest
            pipe.unet.set_attn_processor(AttnProcessor())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def make_trainable(self) -> Denoiser:
        """Add adapters or free the weights; from then on `parameters` are trained."""
        self.trained = {"unet": self.pipe.unet}
        if self.args.train_text_encoder:
            self.trained[TEXT_ENCODER] = self.pipe.text_encoder
        for name, model in self.trained.items():
            if self.args.gradient_checkpointing:
                enable = "enable_gradient_checkpointing" if name == "unet" else "gradient_checkpointing_enable"
                getattr(model, enable)()
                model.train()  # which it asks for
            if self.args.method == "full":
                model.requires_grad_(True)
            else:
                self._adapt(name, model)
            found = model.named_parameters()
            self.parameters |= {f"{name}.{key}": p for key, p in found if p.requires_grad}
        return Denoiser(self.pipe.unet, self.trained.get(TEXT_ENCODER), self.dtype)

    def _adapt(self, name: str, model: nn.Module) -> None:
        args = self.args
        spec = AdapterSpec(args.method, args.rank, layers=args.layers)
        config = spec.config(model, "student") if name == "unet" else self._text_config()
        add_adapter(model, config, SUBJECT)
        spec.finish({key: p for key, p in model.named_parameters() if f".{SUBJECT}" in key})

    def _text_config(self) -> PeftConfig:
        rank, layers = self.args.rank, list(TEXT_LAYERS)
        if self.args.method == "lorad":
            return LoRaDConfig(r=rank, target_modules=layers)
        return LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)

    # --- what users load ---

    @property
    def base(self) -> str:
        """What the adapter's config calls the pipeline it belongs to."""
        return self.args.base_model_name_or_path or lasting_name(self.args.pretrained_model_name_or_path)

    def write(self, folder: Path) -> list[str]:
        """Write the result for users; returns the names of an adapter's files."""
        return {"lorad": self._write_lorad, "lora": self._write_lora, "full": self._write_pipeline}[self.args.method](
            folder
        )

    def _write_lorad(self, folder: Path) -> list[str]:
        files = []
        for name, model in self.trained.items():
            place = Path("" if name == "unet" else name)
            save_lorad_adapter(model, folder / place, SUBJECT, name, self.base)
            files += [str(place / LORAD_WEIGHT_NAME), str(place / ADAPTER_CONFIG_NAME)]
        return files

    def _write_lora(self, folder: Path) -> list[str]:
        layers = {}
        for name, model in self.trained.items():
            state = get_peft_model_state_dict(model, adapter_name=SUBJECT, save_embedding_layers=False)
            layers[f"{name}_lora_layers"] = {key: value.detach().cpu().contiguous() for key, value in state.items()}
            config = model.peft_config[SUBJECT]
            known = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
            layers[f"{name}_lora_adapter_metadata"] = known
        with written_beside(folder / LORA_FILE) as file:
            StableDiffusionLoraLoaderMixin.save_lora_weights(file.parent, weight_name=file.name, **layers)
        return [LORA_FILE]

    def _write_pipeline(self, folder: Path) -> list[str]:
        sampler, self.pipe.scheduler = self.pipe.scheduler, self._own_scheduler
        try:
            with folder_written_beside(folder) as staged:
                self.pipe.save_pretrained(staged)
        finally:
            self.pipe.scheduler = sampler
        return []
