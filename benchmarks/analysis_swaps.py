#!/usr/bin/env python
"""What norms and directions each do for one-step students of Shapes World (the paper's Fig. 2c on the small scale).

    python benchmarks/analysis_swaps.py --students full=full/unet lora=lora --output_dir benchmarks/results

For every student: the teacher's weights with the student's directions, the teacher's with the student's norms, both (the
student but for its biases and norm layers), and the student itself, each drawing in one step. Judged are the attributes and
the whole captions, on the first held-out captions, with the same noise for all.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from drawing import draw
from shapes_quality import judge_all

from diffusers_wadi import one_step_scheduler
from diffusers_wadi.analysis import swap_weights
from diffusers_wadi.shapes import bundled_checkpoint, heldout_captions

ROWS = {
    "teacher's norms, student's directions": {"take": "direction"},
    "student's norms, teacher's directions": {"take": "norm"},
    "student's norms and directions": {"take": "both", "rest": "base"},
    "student": {"take": "both"},
}


def load(folder: str | Path) -> StableDiffusionPipeline:
    """The stock pipeline, set up for one step."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.scheduler = one_step_scheduler(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def judged(folder: str | Path, captions: list[str], batch_size: int) -> dict[str, float]:
    call = {"num_inference_steps": 1, "guidance_scale": 1.0}
    images = draw(load(folder), captions, adapter=False, batch_size=batch_size, **call)
    verdict = judge_all(images, captions)
    return {name: verdict[name] for name in ("attributes", "captions")}


def markdown(results: dict) -> str:
    names = list(results["students"])
    lines = [
        "| attributes right (captions wholly right) | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    teacher = _cell(results["teacher, one step"])
    lines.append("| teacher, in one step | " + " | ".join([teacher] * len(names)) + " |")
    for row in ROWS:
        lines.append(f"| {row} | " + " | ".join(_cell(results["students"][name][row]) for name in names) + " |")
    return "\n".join(lines)


def _cell(verdict: dict[str, float]) -> str:
    return f"{verdict['attributes']:.1%} ({verdict['captions']:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", required=True, metavar="NAME=PATH", help="Adapters or checkpoints.")
    parser.add_argument("--num_captions", type=int, default=256, help="Held-out captions judged. Default: 256.")
    parser.add_argument("--batch_size", type=int, default=64, help="Default: 64.")
    parser.add_argument("--output_dir", default=None, help="Folder for analysis_swaps.json and .md.")
    args = parser.parse_args()
    captions, teacher = heldout_captions(args.num_captions, seed=1), bundled_checkpoint() / "teacher"
    results = {"num_captions": args.num_captions, "students": {}}
    results["teacher, one step"] = judged(teacher, captions, args.batch_size)
    for student in args.students:
        name, path = student.split("=", 1)
        rows = results["students"][name] = {}
        for row, parts in ROWS.items():
            with tempfile.TemporaryDirectory() as folder:
                swapped = swap_weights(teacher, path, Path(folder, "swapped"), dtype=torch.float32, **parts)
                rows[row] = judged(swapped, captions, args.batch_size)
            print(name, row, rows[row], flush=True)
    print(markdown(results))
    if args.output_dir:
        output = Path(args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        for suffix, text in (("json", json.dumps(results, indent=2)), ("md", markdown(results))):
            (output / f"analysis_swaps.{suffix}.tmp").write_text(text + "\n")
            os.replace(output / f"analysis_swaps.{suffix}.tmp", output / f"analysis_swaps.{suffix}")


if __name__ == "__main__":
    main()
