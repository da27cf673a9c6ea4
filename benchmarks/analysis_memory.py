#!/usr/bin/env python
"""Memory and time of `wadi analyze` on a pair of files of Stable Diffusion 1.5's UNet, 1.7 GB each, on the CPU.

    python benchmarks/analysis_memory.py --work_dir pair --output_dir benchmarks/results

Figures are drawn too. What the pair is and what is measured stands in `process_memory.py`.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from process_memory import run

LABELS = {"layers": "weights compared", "vectors": "vectors in them"}


def analyze(base: Path, tuned: Path, folder: Path) -> dict[str, Any]:
    from diffusers_wadi import cli

    output = folder / "analysis"
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(["analyze", str(base), str(tuned), "--output_dir", str(output)])
    if code:
        raise SystemExit(code)
    (found,) = json.loads((output / "analysis.json").read_text())
    return {name: found["overall"][name] for name in LABELS}


if __name__ == "__main__":
    run(__file__, __doc__, analyze, LABELS)
