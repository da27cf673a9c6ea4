"""A complete checkpoint as one file in the key layout of the original Stable Diffusion code.

ComfyUI, A1111 and `StableDiffusionPipeline.from_single_file` read this layout. Nothing in the file says how many steps
the model takes: one, from t = T-1 (trailing or "sgm_uniform" timesteps), without guidance (CFG 1).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from diffusers_wadi._files import writable_folder, written_beside
from diffusers_wadi.conversion._original_keys import (
    StateDict,
    clip_to_original,
    open_clip_to_original,
    unet_to_original,
    vae_to_original,
)
from diffusers_wadi.pipelines._optimization import as_it_was
from diffusers_wadi.pipelines._saving import without_adapters

__all__ = ["export_single_file", "original_state_dict"]

Layout = Literal["auto", "sd1", "sd2"]
_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
STABLE_DIFFUSION_TERMINAL = 0.00466  # alphas_cumprod[T-1] of Stable Diffusion 1.x and 2.x
_logger = logging.get_logger(__name__)
_HINT = "one step from t = T-1 (trailing / sgm_uniform timesteps), CFG 1"


def export_single_file(
    pipe: DiffusionPipeline,
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    layout: Layout = "auto",
) -> Path:
    """Write the UNet, VAE and text encoder of a Stable Diffusion 1.x or 2.x pipeline as one safetensors file.

    Read it back with `StableDiffusionPipeline.from_single_file(path)`; a model of other sizes than Stable Diffusion's,
    and any model offline, needs `config=` a diffusers folder of that model. The scheduler is not in the file: set
    `one_step_scheduler(pipe.scheduler.config)` after loading, unless that folder has it. Programs that read such files
    have Stable Diffusion's own schedule built in, so a student that was trained with another `alphas_cumprod[T-1]` (more
    than 2 % away) will not draw in them; that is logged as a warning.

    Args:
        pipe: active adapters of its UNet are fused in the file; the pipeline itself is not changed.
        path: file to write, ending in .safetensors. It appears whole or not at all.
        dtype: of the tensors in the file; default None keeps theirs.
        layout: how the text encoder is stored, as in versions 1.x ("sd1") or 2.x ("sd2"). "auto" (default): "sd2" for
            a UNet with 1024 text channels and linear projections, by which readers tell the two apart.

    Returns:
        Path of the file.

    Raises:
        ValueError: another file format or kind of pipeline, or a model that the layout cannot hold.
        OSError: the folder is not writable; found out before any work.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"cannot write {str(path)!r}: a one-file checkpoint is a .safetensors file; name it so")
    writable_folder(path.parent)
    _warn_of_other_terminal(pipe)
    state = original_state_dict(pipe, layout)
    tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in _own_storage(state).items()}
    with written_beside(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "modelspec.usage_hint": _HINT})
    return path


def _warn_of_other_terminal(pipe: DiffusionPipeline) -> None:
    tables = getattr(getattr(pipe, "scheduler", None), "alphas_cumprod", None)
    terminal = STABLE_DIFFUSION_TERMINAL if tables is None else float(tables[-1])
    if abs(terminal / STABLE_DIFFUSION_TERMINAL - 1) > 0.02:
        _logger.warning(
            f"This model's step takes alphas_cumprod[T-1] = {terminal:.4g}, which the file cannot hold; programs with Stable "
            f"Diffusion's {STABLE_DIFFUSION_TERMINAL} built in will not draw with it. In diffusers, set pipe.scheduler = "
            f"one_step_scheduler(pipe.scheduler, terminal_alpha_cumprod={terminal:.4g}) after loading."
        )


def original_state_dict(pipe: DiffusionPipeline, layout: Layout = "auto") -> StateDict:
    """The tensors of `export_single_file` by their names in the original layout.

    Raises:
        ValueError: see there.
    """
    if layout not in ("auto", "sd1", "sd2"):
        raise ValueError(f"`layout` has to be 'auto', 'sd1' or 'sd2', got {layout!r}")
    pipe = as_it_was(pipe)  # of an optimized pipeline the models themselves
    _refuse_other_models(pipe)
    unet = without_adapters(pipe.unet)
    linear = unet.config.cross_attention_dim == 1024 and unet.config.use_linear_projection
    open_clip = layout == "sd2" or (layout == "auto" and linear)
    text = pipe.text_encoder.state_dict()
    state = {
        **unet_to_original(unet.state_dict(), unet.config),
        **vae_to_original(pipe.vae.state_dict(), pipe.vae.config),
        **(open_clip_to_original(text) if open_clip else clip_to_original(text)),
    }
    _refuse_unreadable(state, unet, pipe.vae, pipe.text_encoder, open_clip)
    return state


def _refuse_other_models(pipe: DiffusionPipeline) -> None:
    for name, wanted in _CLASSES.items():
        model = pipe.components.get(name)
        if type(model).__name__ != wanted:
            raise ValueError(
                f"the original layout is written for Stable Diffusion 1.x and 2.x, with a {wanted} as {name}, but this "
                f"{type(pipe).__name__} has {type(model).__name__ if model is not None else 'none'}; save it as a "
                "diffusers folder instead (save_pretrained)"
            )
    for name in ("vae", "text_encoder"):
        if any(isinstance(module, BaseTunerLayer) for module in getattr(pipe, name).modules()):
            raise ValueError(
                f"the {name} carries adapters; fuse and unload them first (fuse_lora, unload_lora_weights)"
            )


def _refuse_unreadable(state: StateDict, unet: Any, vae: Any, text_encoder: Any, open_clip: bool) -> None:
    """Read the tensors back by diffusers' own conversion, and compare.

    Raises:
        ValueError: it would find other names or numbers than the models have.
    """
    from diffusers.loaders import single_file_utils as reader

    text = text_encoder.state_dict()
    if open_clip:
        again = reader.convert_open_clip_checkpoint(text_encoder, dict(state))
    else:
        again = reader.convert_ldm_clip_checkpoint(dict(state))
    _compare(
        "text encoder",
        {key.removeprefix("text_model."): value for key, value in text.items()},
        {key.removeprefix("text_model."): value for key, value in again.items()},
    )
    _compare("UNet", unet.state_dict(), reader.convert_ldm_unet_checkpoint(dict(state), dict(unet.config)))
    _compare("VAE", vae.state_dict(), reader.convert_ldm_vae_checkpoint(dict(state), dict(vae.config)))


def _compare(part: str, own: StateDict, again: StateDict) -> None:
    odd = sorted(own.keys() ^ again.keys())
    odd += [key for key in own.keys() & again.keys() if not _equal(own[key], again[key])]
    if odd:
        raise ValueError(
            f"this {part} does not fit the original layout: {len(odd)} of its {len(own)} tensors would not be read back, "
            f"first {odd[0]}. Stable Diffusion 1.x and 2.x do; save others as a diffusers folder (save_pretrained)."
        )


def _equal(own: torch.Tensor, again: torch.Tensor) -> bool:
    return own.shape == again.shape and (own.is_meta or torch.equal(own, again))


def _own_storage(state: StateDict) -> StateDict:
    """safetensors refuses tensors that share memory: give every name its own."""
    seen: set[int] = set()
    separate = {}
    for key, value in state.items():
        shared = not value.is_meta and value.data_ptr() in seen
        seen.add(value.data_ptr() if not value.is_meta else -1)
        separate[key] = value.clone() if shared else value
    return separate
