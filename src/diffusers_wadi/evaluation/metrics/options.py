"""What the metrics need to know, checked when it is made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch

HpsVersion = Literal["v2.0", "v2.1"]


@dataclass(frozen=True)
class MetricOptions:
    """Settings of `compute_metrics`.

    Args:
        reference: folder of real images (with its subfolders), another generated set, or, for "fid" alone, a statistics
            file (.npz with `mu` and `sigma` of the same Inception features). Default None; "fid" and "precision_recall"
            need one.
        image_size: bring the images of both sets to this many pixels before Inception: shorter side to it (bilinear, with
            antialiasing), then the centre, as torch-fidelity's `samples_resize_and_crop`. Default None: as they are.
        inception_weights: local file of torch-fidelity's InceptionV3 (.pth, .safetensors). Default None: downloaded.
        clip_model: name in open_clip. Default "ViT-bigG-14", the paper's ViT-G/14; "ViT-g-14" or smaller for less memory.
        clip_pretrained: which of open_clip's weights of that model: what is downloaded, and how images are prepared, for a
            local file too. Default None: those trained on LAION-2B.
        clip_weights: local file of weights of `clip_model`. Default None: downloaded.
        hps_version: "v2.0" (default) or "v2.1", where the weights are downloaded.
        hps_weights: local file of HPSv2's weights. Default None: downloaded.
        batch_size: images at a time. Default 32.
        device: where the networks run. Default None: "cuda" if there is one, else "cpu".
        num_workers: processes that read images. Default 0: this one.

    Raises:
        ValueError: a number that is too small, or no such version of HPS.
    """

    reference: str | os.PathLike | None = None
    image_size: int | None = None
    inception_weights: str | os.PathLike | None = None
    clip_model: str = "ViT-bigG-14"
    clip_pretrained: str | None = None
    clip_weights: str | os.PathLike | None = None
    hps_version: HpsVersion = "v2.0"
    hps_weights: str | os.PathLike | None = None
    batch_size: int = 32
    device: str | torch.device | None = None
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("num_workers", 0), ("image_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: expected {least} or more")
        if self.hps_version not in get_args(HpsVersion):
            raise ValueError(f"hps_version={self.hps_version!r}: expected one of {', '.join(get_args(HpsVersion))}")

    @property
    def torch_device(self) -> torch.device:
        """`device`, or the default one of this machine."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
