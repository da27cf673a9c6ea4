"""Two students merged by linear interpolation of their weights (SwiftBrush v2).

    python -m diffusers_wadi.distillation.interpolation FULL_STUDENT/unet LORA_STUDENT/unet MERGED/unet --weight 0.5

LoRaD adapters need no such tool: :func:`diffusers_wadi.add_weighted_adapter` adds their angles exactly.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import save_file

from .._files import folder_written_beside


def interpolate(one: str | Path, other: str | Path, output: str | Path, weight: float = 0.5) -> Path:
    """Write (1 - weight) of the denoiser in folder ``one`` plus ``weight`` of that in ``other``.

    Computed in float32, written in the precision of ``one``. SwiftBrush v2's own weight is not known to us.

    Args:
        one, other: diffusers folders of the same architecture, with unsharded safetensors.
        output: the folder to write.
        weight: 0 (default 0.5) gives ``one``, 1 ``other``.

    Returns:
        ``output``.

    Raises:
        FileNotFoundError: a folder without weights.
        ValueError: tensors of other names or shapes.
    """
    files = [Path(folder) / SAFETENSORS_WEIGHTS_NAME for folder in (one, other)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, expected a denoiser folder with unsharded safetensors.")
    with safe_open(files[0], "pt") as first, safe_open(files[1], "pt") as second:
        shapes = [{name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} for file in (first, second)]
        wrong = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        if wrong:
            raise ValueError(
                f"{one} and {other} differ in names or shapes, first {wrong[0]}: {shapes[0].get(wrong[0])} and "
                f"{shapes[1].get(wrong[0])}. Interpolate students of the same teacher."
            )
        merged = {name: _between(first.get_tensor(name), second.get_tensor(name), weight) for name in shapes[0]}
    with folder_written_beside(output) as staged:
        save_file(merged, staged / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        shutil.copy(Path(one) / CONFIG_NAME, staged / CONFIG_NAME)
    return Path(output)


def _between(one: torch.Tensor, other: torch.Tensor, weight: float) -> torch.Tensor:
    if not one.is_floating_point():
        return one
    return torch.lerp(one.float(), other.float(), weight).to(one.dtype)


def main(input_args: list[str] | None = None) -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description="Interpolate the weights of two students.")
    parser.add_argument("one", help="denoiser folder")
    parser.add_argument("other", help="denoiser folder of the same architecture")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--weight", type=float, default=0.5, help="share of the second (default: %(default)s)")
    args = parser.parse_args(input_args)
    print(interpolate(args.one, args.other, args.output, args.weight))


if __name__ == "__main__":
    main()
