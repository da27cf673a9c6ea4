"""Files of weights, given or downloaded, read as data."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def local_file(path: str | os.PathLike, option: str) -> Path:
    """A file that the user named.

    Raises:
        FileNotFoundError: it is not there; names the option.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{option}={str(path)!r} is not a file. Give the path of the weights, or leave it out."
        )
    return Path(path)


def not_downloaded(what: str, where: str, option: str, error: Exception) -> OSError:
    """The error for weights that cannot be downloaded: names the file and the option that takes a local copy."""
    reason = " ".join(str(error).split())[:200]
    return OSError(
        f"{what} could not be downloaded from {where} ({reason}). Download it where there is a network and pass {option}=FILE."
    )


def read_state(path: Path, option: str) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file, or of a .pth that holds nothing else, by name.

    Raises:
        ValueError: it is broken, or holds something else than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{option}={str(path)!r} holds more than tensors and is not read, since that could run code"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{option}={str(path)!r} is no complete file of weights ({error}); get it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{option}={str(path)!r} holds a {type(state).__name__}; expected tensors by name")
    return state
