#!/usr/bin/env python
"""Memory and time of `extract_lorad` on a pair of files of Stable Diffusion 1.5's UNet, 1.7 GB each, on the CPU.

    python benchmarks/extraction_memory.py --work_dir pair --output_dir benchmarks/results

What the pair is and what is measured stands in `process_memory.py`.
"""

from pathlib import Path
from typing import Any

from process_memory import run

LABELS = {
    "rank": "rank",
    "layers": "layers adapted",
    "left_out": "further tensors that changed, reported",
    "explained_of_layers": "share of the layers' change explained",
}


def extract(base: Path, tuned: Path, folder: Path, rank: int) -> dict[str, Any]:
    from diffusers_wadi.conversion import extract_lorad

    found = extract_lorad(base, tuned, rank=rank)
    found.save(folder / "adapter")
    return {
        "rank": rank,
        "layers": len(found.report.layers),
        "left_out": len(found.report.left_out),
        "explained_of_layers": found.report.explained_of_layers,
    }


if __name__ == "__main__":
    run(__file__, __doc__, extract, LABELS, rank=(256, "Rank of the adapter; the paper's is 256."))
