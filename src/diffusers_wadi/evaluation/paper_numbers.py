"""The paper's own numbers, to stand beside measured ones: quoted, not measured here.

Source: WaDi (arXiv 2603.08258), Table 1, "zero-shot COCO 2014", as printed, read from the picture of it in the authors'
repository (gudaochangsheng/WaDi, results-tab.png). The tables of COCO 2017 and of HPSv2 are not here: no copy of them was
at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["PROTOCOL", "SECONDS", "SOURCE", "TABLE_1", "PaperNumber"]


@dataclass(frozen=True)
class PaperNumber:
    """A row of Table 1.

    Args:
        method: its name.
        backbone: the block of the table that it stands in.
        steps: "NFEs".
        trainable: trainable parameters, as printed.
        fid, clip_score, precision, recall: as printed; None where the table has a dash.
        origin: "reproduced" by the authors, measured by them on the "official" weights, or None, which the table leaves
            unmarked.
        preset: of `wadi evaluate`, where it runs these very weights. Default None.
        guidance: that the preset is to be run with, where it is not its own. Default None.
        seconds: of one image on an A40 at batch 1, text encoder and decoder included: of another table than the rest.
            Default None.
    """

    method: str
    backbone: str
    steps: int
    trainable: str
    fid: float
    clip_score: float | None
    precision: float | None
    recall: float | None
    origin: Literal["reproduced", "official"] | None = None
    preset: str | None = None
    guidance: float | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        """As in a table without blocks."""
        return self.method if self.method.startswith(self.backbone) else f"{self.method}, {self.backbone}"


PROTOCOL = "zero-shot COCO 2014, FID, precision and recall on 30,000 images, CLIP score of ViT-G/14"
SECONDS = "on an A40, batch 1, text encoder and decoder included"
SOURCE = "WaDi (arXiv 2603.08258), Table 1"

_SD15, _SD21, _PIXART = "SD 1.5", "SD 2.1", "PixArt-alpha"

# fmt: off
TABLE_1 = (
    PaperNumber("SD 1.5 (cfg 3.0)", _SD15, 25, "860M", 8.78, 0.30, 0.59, 0.53, preset="sd15-25", guidance=3.0, seconds=1.11),
    PaperNumber("LCM-LoRA", _SD15, 1, "67.50M", 77.73, 0.24, 0.22, 0.15, "official", preset="lcm-lora"),
    PaperNumber("InstaFlow", _SD15, 1, "860M", 13.10, 0.28, 0.53, 0.45, preset="instaflow"),
    PaperNumber("UFOGen", _SD15, 1, "860M", 12.78, None, None, None),
    PaperNumber("DMD", _SD15, 1, "860M", 11.49, 0.32, None, None),
    PaperNumber("DMD2", _SD15, 1, "860M", 12.96, 0.30, 0.60, 0.47, "reproduced"),
    PaperNumber("SiD-LSG", _SD15, 1, "860M", 14.27, 0.30, 0.56, 0.48, "reproduced"),
    PaperNumber("PCM", _SD15, 1, "860M", 17.91, 0.29, None, None),
    PaperNumber("Hyper-SD", _SD15, 1, "67.25M", 22.90, 0.31, 0.62, 0.25, "official", preset="hyper-sd"),
    PaperNumber("YOSO", _SD15, 1, "67.25M", 23.68, 0.29, 0.56, 0.36, "official", preset="yoso"),
    PaperNumber("WaDi", _SD15, 1, "83.80M", 10.79, 0.31, 0.62, 0.48, preset="wadi-sd15", seconds=0.11),
    # "1" is what is printed in the column of NFEs for this multi-step teacher.
    PaperNumber("SD 2.1 (cfg 3.0)", _SD21, 1, "865M", 9.60, 0.32, 0.59, 0.50),
    PaperNumber("SD-Turbo", _SD21, 1, "865M", 16.14, 0.33, 0.65, 0.35, "official", preset="sd-turbo"),
    PaperNumber("SwiftBrush", _SD21, 1, "865M", 16.67, 0.29, 0.47, 0.46, preset="swiftbrush"),
    PaperNumber("SwiftBrush v2", _SD21, 1, "884.14M", 15.98, 0.33, 0.58, 0.47, "reproduced"),
    PaperNumber("SiD-LSG", _SD21, 1, "865M", 15.17, 0.30, 0.56, 0.46, "reproduced"),
    PaperNumber("TiUE", _SD21, 1, "865M", 13.49, 0.31, 0.59, 0.48, "official"),
    PaperNumber("WaDi", _SD21, 1, "94.43M", 12.34, 0.31, 0.60, 0.48, preset="wadi-sd21"),
    PaperNumber("PixArt-alpha (cfg 4.5)", _PIXART, 20, "610.86M", 8.75, 0.32, 0.75, 0.45, "official", preset="pixart-20"),
    PaperNumber("SwiftBrush", _PIXART, 1, "610.86M", 29.89, 0.28, 0.50, 0.26, "reproduced"),
    PaperNumber("PG-SB", _PIXART, 1, "610.86M", 25.58, 0.28, 0.53, 0.27, "reproduced"),
    PaperNumber("WaDi", _PIXART, 1, "81.22M", 18.99, 0.30, 0.64, 0.29, preset="wadi-pixart"),
)
# fmt: on
