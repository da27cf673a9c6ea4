"""The teacher's components and how its denoiser is called: Stable Diffusion 1.x and 2.x, PixArt-alpha.

Which one it is stands in the checkpoint, so no flag says it. Everything else in this package sees a denoiser only
through :meth:`Backbone.eps`, which is an epsilon prediction whatever the network predicts.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from ..schedulers import one_step_scheduler
from .losses import NoiseSchedule
from .text_encoders import PIXART_MAX_LENGTH, CLIPEncoder, T5Encoder, TextEncoder, unpack_mask

PREDICTIONS = ("epsilon", "v_prediction")


class Backbone(ABC):
    """A teacher checkpoint: loads its parts, and calls its denoiser. Made by :func:`load_backbone`.

    Args:
        teacher: folder or Hub id of a diffusers pipeline.
        index: its `model_index.json`.
        revision, variant: of the Hub repository and of the weights.
        device: where what is loaded goes.
        max_sequence_length: tokens of the text; ``None``: as the stock pipeline.

    Attributes:
        scheduler: the teacher's schedule as a DDIM scheduler.
        config: of the denoiser.
        dtype: in which the denoiser is called, that of :meth:`load_denoiser`.
        default_terminal_alpha_cumprod: of the student's step if no flag says otherwise; ``None``: the schedule's own.

    Raises:
        ValueError: a checkpoint of a kind that cannot be distilled here.
    """

    denoiser_class: type = nn.Module
    subfolder = ""
    default_terminal_alpha_cumprod: float | None = None

    def __init__(
        self,
        teacher: str,
        index: Mapping[str, Any],
        revision: str | None = None,
        variant: str | None = None,
        device: str | torch.device = "cpu",
        max_sequence_length: int | None = None,
    ):
        self.teacher, self.index, self.revision, self.variant = teacher, index, revision, variant
        self.device = torch.device(device)
        self.max_sequence_length = max_sequence_length
        self.dtype = torch.float32
        self.config = self._config_of(self.denoiser_class, self.subfolder)
        self.vae_factor = 2 ** (len(self._config_of(AutoencoderKL, "vae")["block_out_channels"]) - 1)
        self.scheduler = self._load(DDIMScheduler, "scheduler")
        self.prediction_type = self.scheduler.config.prediction_type
        if self.prediction_type not in PREDICTIONS:
            raise ValueError(
                f"The teacher {teacher} predicts {self.prediction_type!r}, expected one of {', '.join(PREDICTIONS)}."
            )
        alphas_cumprod = self.scheduler.alphas_cumprod.double()
        self._alphas = alphas_cumprod.sqrt().float().to(self.device)
        self._sigmas = (1 - alphas_cumprod).sqrt().float().to(self.device)
        self._check_config()

    def _check_config(self) -> None:
        if self.config["in_channels"] != 4:
            raise ValueError(
                f"The denoiser of {self.teacher} has {self.config['in_channels']} input channels, expected the 4 of a "
                "text-to-image model (an inpainting model has 9)."
            )

    # --- loading ---

    def _config_of(self, component_class: type, subfolder: str) -> dict[str, Any]:
        """With the defaults of what an older file does not name."""
        parameters = inspect.signature(component_class.__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        return defaults | component_class.load_config(self.teacher, subfolder=subfolder, revision=self.revision)

    def _load(self, component_class: type, subfolder: str, **kwargs: Any):
        return component_class.from_pretrained(self.teacher, subfolder=subfolder, revision=self.revision, **kwargs)

    def _load_frozen(self, component_class: type, subfolder: str, **dtype: torch.dtype) -> nn.Module:
        model = self._load(component_class, subfolder, variant=self.variant, **dtype)
        return model.requires_grad_(False).eval().to(self.device)

    def load_encoder(self, dtype: torch.dtype = torch.float32) -> TextEncoder:
        """Tokenizer and text encoder, of the classes that the checkpoint names: prompts -> (B, L, D) on the device."""
        tokenizer = self._load_tokenizer()
        model = self._load_frozen(getattr(transformers, self.index["text_encoder"][1]), "text_encoder", dtype=dtype)
        return self._encoder(tokenizer, model)

    def _load_tokenizer(self):
        return self._load(getattr(transformers, self.index["tokenizer"][1]), "tokenizer")

    @abstractmethod
    def _encoder(self, tokenizer, model: nn.Module) -> TextEncoder:
        """Both as one function."""

    def load_denoiser(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The frozen UNet or transformer; :meth:`eps` calls it in ``dtype`` from then on."""
        self.dtype = dtype
        return self._load_frozen(self.denoiser_class, self.subfolder, torch_dtype=dtype)

    def load_vae(self) -> AutoencoderKL:
        """The VAE in float32: it decodes samples only, and half precision overflows in some."""
        return self._load_frozen(AutoencoderKL, "vae", torch_dtype=torch.float32)

    # --- schedules ---

    def _terminal(self, terminal_alpha_cumprod: float | None) -> float | None:
        if terminal_alpha_cumprod is not None and self.prediction_type == "v_prediction":
            raise ValueError(
                f"terminal_alpha_cumprod is {terminal_alpha_cumprod}, but {self.teacher} is a v-prediction teacher, whose "
                "x0 and eps both depend on the schedule's own value. Leave it out."
            )
        return self.default_terminal_alpha_cumprod if terminal_alpha_cumprod is None else terminal_alpha_cumprod

    def noise_schedule(self, terminal_alpha_cumprod: float | None = None) -> NoiseSchedule:
        """The tables of the losses; ``None`` stands for ``default_terminal_alpha_cumprod``.

        Raises:
            ValueError: no signal is left at the last timestep, or a terminal value with a v-prediction teacher.
        """
        return NoiseSchedule.from_scheduler(self.scheduler, self._terminal(terminal_alpha_cumprod), self.device)

    def teacher_scheduler(self) -> DDIMScheduler:
        """For sampling with :meth:`eps`: of the epsilon kind, whatever the network predicts."""
        return one_step_scheduler({**self.scheduler.config, "prediction_type": "epsilon"})

    def student_scheduler(self, terminal_alpha_cumprod: float | None = None) -> DDIMScheduler:
        """With which a stock pipeline runs the student in one step; of the kind that the network predicts."""
        return one_step_scheduler(self.scheduler, terminal_alpha_cumprod=self._terminal(terminal_alpha_cumprod))

    # --- shapes and the call ---

    @property
    def size_unit(self) -> int:
        """What the resolution has to be a multiple of, in pixels."""
        return self.vae_factor

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """(C, H, W) of the latents at ``resolution`` pixels; ``None``: the teacher's own.

        Raises:
            ValueError: the resolution does not fit the VAE or the patches (names those next to it that do), or the teacher
                has none of its own.
        """
        own, unit = self.config["sample_size"], self.size_unit
        if resolution is None and not isinstance(own, int):
            raise ValueError(f"The denoiser of {self.teacher} has sample_size={own}: give --resolution.")
        size = own * self.vae_factor if resolution is None else resolution
        if size % unit:
            below, above = size // unit * unit, -(-size // unit) * unit
            raise ValueError(
                f"--resolution is {size}, expected a multiple of {unit} (the VAE's factor is {self.vae_factor}), for "
                f"example {below or above} or {above}."
            )
        return self.config["in_channels"], size // self.vae_factor, size // self.vae_factor

    def eps(self, model: nn.Module, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """One call of the denoiser as an epsilon prediction.

        Args:
            model: the denoiser, whatever adapters it carries or wrappers it is in.
            x_t: (B, C, H, W), float32: the conversion from v uses it as it is.
            t: (B,) integer timesteps.
            text: (B, L, D), what :meth:`load_encoder`'s result returns.

        Returns:
            (B, C, H, W) float32 (float64 if the network computes in that).
        """
        out = self._call(model, x_t.to(self.dtype), t, text.to(self.dtype))
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        if self.prediction_type == "epsilon":
            return out
        # v = alpha eps - sigma x0 and x_t = alpha x0 + sigma eps, so eps = alpha v + sigma x_t.
        return self._alphas[t].view(-1, 1, 1, 1) * out + self._sigmas[t].view(-1, 1, 1, 1) * x_t

    @abstractmethod
    def _call(self, model: nn.Module, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """What the denoiser predicts, (B, C, H, W), everything in ``dtype``."""


class StableDiffusionBackbone(Backbone):
    """Stable Diffusion 1.x and 2.x: UNet, CLIP; epsilon or v."""

    denoiser_class = UNet2DConditionModel
    subfolder = "unet"

    def _check_config(self) -> None:
        super()._check_config()
        for name in ("addition_embed_type", "class_embed_type", "time_cond_proj_dim"):
            if self.config.get(name) is not None:
                raise ValueError(
                    f"The UNet of {self.teacher} has {name}={self.config[name]!r}, a condition that Stable Diffusion "
                    "1.x and 2.x do not have (SDXL, unCLIP and LCM do). Use a plain text-to-image teacher."
                )
        if self.max_sequence_length is not None:
            raise ValueError(
                f"max_sequence_length is {self.max_sequence_length}, but CLIP's text always has the length of its "
                "tokenizer. Leave it out."
            )

    def _encoder(self, tokenizer, model: nn.Module) -> TextEncoder:
        return CLIPEncoder(tokenizer, model)

    def _call(self, model: nn.Module, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return model(x_t, t, text, return_dict=False)[0]


class PixArtBackbone(Backbone):
    """PixArt-alpha: transformer, T5. The text tensor carries the attention mask as its last channel.

    The student's step takes alphas_cumprod 0.0047 by default, as in the authors' release: the schedule's own is
    4.04e-5, which would multiply the network's errors by 157 instead of 14.6.
    """

    denoiser_class = PixArtTransformer2DModel
    subfolder = "transformer"
    default_terminal_alpha_cumprod = 0.0047

    @property
    def size_unit(self) -> int:
        return self.vae_factor * self.config["patch_size"]

    def _check_config(self) -> None:
        super()._check_config()
        if self.prediction_type != "epsilon":
            raise ValueError(
                f"The PixArt teacher {self.teacher} predicts {self.prediction_type!r}, expected 'epsilon'."
            )

    def _load_tokenizer(self):
        try:
            return super()._load_tokenizer()
        except (ImportError, ValueError) as error:
            raise ImportError(
                f"The tokenizer of {self.teacher} cannot be loaded ({error}). If it is a SentencePiece model, as those of "
                'PixArt-alpha: pip install "diffusers-wadi[pixart]"'
            ) from error

    def _encoder(self, tokenizer, model: nn.Module) -> TextEncoder:
        return T5Encoder(tokenizer, model, self.max_sequence_length or PIXART_MAX_LENGTH)

    def _call(self, model: nn.Module, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        states, mask = unpack_mask(text)
        out = model(
            x_t,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=t,
            added_cond_kwargs=self._size_conditions(x_t),
            return_dict=False,
        )[0]
        return out[:, : x_t.shape[1]]  # the other half is the learned sigma, which one step has no use for

    def _size_conditions(self, x_t: Tensor) -> dict[str, Tensor | None]:
        """Resolution (B, 2) and aspect ratio (B, 1), which the 1024-pixel transformer alone is trained with."""
        if self.config["sample_size"] != 128:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (size * self.vae_factor for size in x_t.shape[2:])
        return {
            "resolution": x_t.new_tensor([height, width]).expand(len(x_t), 2),
            "aspect_ratio": x_t.new_tensor([height / width]).expand(len(x_t), 1),
        }


# (denoiser, text encoder) as `model_index.json` names them. PixArt-alpha's first checkpoints name the class they were
# published with.
_KINDS = {
    ("UNet2DConditionModel", "CLIPTextModel"): StableDiffusionBackbone,
    ("PixArtTransformer2DModel", "T5EncoderModel"): PixArtBackbone,
    ("Transformer2DModel", "T5EncoderModel"): PixArtBackbone,
}
_OTHER_ENCODERS = ("text_encoder_2", "text_encoder_3")


def load_backbone(
    teacher: str,
    revision: str | None = None,
    variant: str | None = None,
    device: str | torch.device = "cpu",
    max_sequence_length: int | None = None,
) -> Backbone:
    """The backbone of a checkpoint, by the classes in its `model_index.json`; no weights are loaded yet.

    Args:
        teacher: folder or Hub id of a diffusers pipeline.
        revision: of a Hub repository.
        variant: of the weights, e.g. "fp16".
        device: where what is loaded goes.
        max_sequence_length: tokens of the text, for PixArt; ``None``: 120.

    Raises:
        ValueError: another kind of pipeline.
        OSError: there is no `model_index.json`.
    """
    index = DiffusionPipeline.load_config(str(teacher), revision=revision)
    denoiser = index.get("unet") or index.get("transformer") or (None, None)
    encoder = index.get("text_encoder") or (None, None)
    kind = _KINDS.get((denoiser[1], encoder[1]))
    more = [name for name in _OTHER_ENCODERS if (index.get(name) or (None,))[0]]
    if kind is None or more or index["_class_name"] == "PixArtSigmaPipeline":
        raise ValueError(
            f"{teacher} is a {index['_class_name']} of {denoiser[1]} and {', '.join([str(encoder[1]), *more])}. Expected "
            "Stable Diffusion 1.x or 2.x (UNet2DConditionModel, CLIPTextModel) or PixArt-alpha "
            "(PixArtTransformer2DModel, T5EncoderModel)."
        )
    return kind(str(teacher), index, revision, variant, device, max_sequence_length)
