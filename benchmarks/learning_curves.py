#!/usr/bin/env python
"""Does every adapter and every objective learn? Error on held-out Shapes World captions over a few hundred updates.

    python benchmarks/learning_curves.py --num_threads 1 --output_dir benchmarks/results
    python benchmarks/learning_curves.py --rows wadi dmd2 --output_dir benchmarks/results    # only these, others are kept

The teacher is the bundled one, every update one of `training/train_wadi.py` by its own flags, which the results name.

Adapters are compared by regression: 8 of the teacher's samples an update, the rate falling along a cosine. Their error
is the mean squared distance between the student's x0 and the teacher's sample from the same noise.

Objectives start from the teacher in one step, at their own timestep, with some updates of the fake alone; then come the
counted updates by score distillation, from noise alone, without the teacher's samples. No objective's own
loss is looked at: it moves with the fake. Their errors are

- the energy score of the student's x0 against the teacher's samples, per caption: E|x - y| - E|x - x'| / 2 with
  independent noise for x, x' and y. It is least where the student draws what the teacher draws, as often as it does;
- the share of attributes that the judge finds wrong in the one-step pipeline's images.

Everything is measured on 128 held-out captions with fixed noise, on the average where the objective keeps one. A preset
(`--objective`) stays as it is but for what stands in the row's flags: learning rates above all, which for a few hundred
updates of 8 images have to be larger than for tens of thousands of 100 and more.
"""

import argparse
import importlib.util
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from shapes_quality import judge_all

from diffusers_wadi.distillation import data, losses, regression, setup
from diffusers_wadi.distillation.networks import STUDENT
from diffusers_wadi.distillation.trainer import WaDiTrainer
from diffusers_wadi.shapes import bundled_checkpoint, heldout_captions

ROOT = Path(__file__).parents[1]
HELDOUT = 128
COMMON = (
    "--shapes_captions 4000 --train_batch_size 8 --warmup_regression_pairs 1024 --warmup_num_inference_steps 10 "
    "--warmup_guidance_scale 3 --validation_steps 0 --seed 0 --student_rank 32 --fake_rank 8"
)
# From the teacher in one step; rates that fall to 0, and an average, against small batches' noise.
FROM_TEACHER = "--fake_warmup_steps 50 --use_ema --lr_scheduler cosine --lr_warmup_steps 10"
FULL = f"{FROM_TEACHER} --learning_rate 3e-5"


@dataclass(frozen=True)
class Row:
    """One run. flags: beside COMMON; objective: else an adapter, compared by regression; steps: updates that count."""

    flags: str
    objective: bool = False
    steps: int | None = None

    @property
    def length(self) -> int:
        return self.steps or (200 if self.objective else 300)


ROWS = {
    "lorad": Row("--student_adapter lorad --warmup_learning_rate 2e-3"),
    "lora": Row("--student_adapter lora --warmup_learning_rate 1e-3"),
    "dora": Row("--student_adapter dora --warmup_learning_rate 1e-3"),
    "dora_frozen_norm": Row("--student_adapter dora_frozen_norm --warmup_learning_rate 1e-3"),
    "full": Row("--student_adapter full --warmup_learning_rate 3e-4"),
    "lorad, qkv": Row("--student_adapter lorad --student_layers qkv --warmup_learning_rate 2e-3"),
    "matrix_exp, qkv": Row("--student_adapter matrix_exp --student_layers qkv --warmup_learning_rate 1e-3"),
    "cayley, qkv": Row("--student_adapter cayley --student_layers qkv --warmup_learning_rate 1e-3"),
    "householder, qkv": Row("--student_adapter householder --student_layers qkv --warmup_learning_rate 1e-3"),
    "wadi": Row(
        f"--objective wadi {FROM_TEACHER} --learning_rate 5e-4 --fake_learning_rate 2e-3",
        objective=True,
    ),
    "swiftbrush": Row(f"--objective swiftbrush {FULL} --guidance_scale 1.5", objective=True),
    "pg_sb": Row(f"--objective pg_sb {FULL} --guidance_scale_min 1 --guidance_scale_max 2", objective=True),
    "dmd2": Row(f"--objective dmd2 {FULL} --fake_learning_rate 1e-4 --fake_updates_per_step 3", objective=True),
    "sid_lsg": Row(f"--objective sid_lsg {FULL} --fake_learning_rate 1e-4", objective=True),
}


def load_script():
    """`training/train_wadi.py` as a module."""
    spec = importlib.util.spec_from_file_location("train_wadi", ROOT / "training" / "train_wadi.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def start_trainer(row: Row, work_dir: Path, captions: list[str]) -> WaDiTrainer:
    """The run of `row`, before its first update. Pairs and prompts in `work_dir` are shared by all rows."""
    AcceleratorState._reset_state(reset_partial_state=True)
    length = "--max_train_steps {}" if row.objective else "--max_train_steps 0 --warmup_regression_steps {}"
    flags = f"{COMMON} {row.flags} {length.format(row.length)} --pretrained_teacher_model"
    args = load_script().parse_args(
        [*flags.split(), str(bundled_checkpoint() / "teacher"), "--output_dir", str(work_dir)]
    )
    args.validation_prompts = captions
    return WaDiTrainer(args)


def heldout_pairs(
    trainer: WaDiTrainer, captions: list[str], embeddings: data.PromptEmbeddings, file: Path
) -> regression.RegressionPairs:
    """The teacher's samples for `captions`, made once."""
    settings = {"count": len(captions), "num_steps": 10, "guidance_scale": 3.0, "seed": 1}
    fingerprint = regression.pairs_fingerprint("\n".join(captions), **settings)
    pairs = regression.load_pairs(file, fingerprint)
    if pairs is None:
        made_with = (embeddings, trainer.backbone.teacher_scheduler(), trainer.latent_shape)
        pairs = regression.make_pairs(trainer.networks.teacher, *made_with, **settings)
        regression.save_pairs(pairs, file, fingerprint)
    return pairs


def regression_error(trainer: WaDiTrainer, pairs: regression.RegressionPairs, text: torch.Tensor) -> dict:
    """Mean squared distance of the student's x0 to the teacher's sample from the same noise."""
    x0 = losses.student_x0(trainer.networks.student, pairs.noise, text, trainer.schedule)
    return {"error": (x0 - pairs.target).square().mean().item()}


def energy_score(trainer: WaDiTrainer, pairs: regression.RegressionPairs, text: torch.Tensor) -> dict:
    """E|x - y| - E|x - x'| / 2, x and x' from other noise than the teacher's y; root mean square distances."""
    noise = torch.randn(2, *pairs.noise.shape, generator=torch.Generator().manual_seed(2))
    one, other = (losses.student_x0(trainer.networks.student, z, text, trainer.schedule) for z in noise)

    def apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).square().mean(dim=(1, 2, 3)).sqrt().mean()

    to_teacher = (apart(one, pairs.target) + apart(other, pairs.target)) / 2
    return {"energy": (to_teacher - apart(one, other) / 2).item()}


def wrong_attributes(trainer: WaDiTrainer, captions: list[str]) -> dict:
    """Share of attributes that the one-step pipeline's images have wrong."""
    images = np.stack([np.asarray(image.convert("RGB")) for image in trainer.painter.images()])
    return {"wrong": 1 - judge_all(images, captions)["attributes"]}


def measurement(trainer: WaDiTrainer, row: Row, captions: list[str], work_dir: Path) -> Callable[[], dict]:
    """What to call for the errors of the student as it is now (of its average, if it has one)."""
    embeddings = data.PromptEmbeddings(captions, setup.load_encoder(trainer.args, trainer.backbone))
    pairs = heldout_pairs(trainer, captions, embeddings, work_dir / "heldout_pairs.safetensors")
    text = embeddings.at(pairs.prompt)

    @torch.no_grad()
    def measure() -> dict:
        with trainer.averaged_student(), trainer.networks.selected(STUDENT):
            if not row.objective:
                return regression_error(trainer, pairs, text)
            return energy_score(trainer, pairs, text) | wrong_attributes(trainer, captions)

    return measure


def measured_steps(length: int, points: int) -> list[int]:
    """Evenly spread numbers of updates, the last one `length`."""
    return [length * (point + 1) // points for point in range(points)]


def learn(row: Row, points: int, work_dir: Path) -> dict:
    """Errors before the first counted update and after every 1 / `points` of them; seconds per counted update."""
    captions = heldout_captions(HELDOUT, seed=1)
    trainer = start_trainer(row, work_dir, captions)
    measure = measurement(trainer, row, captions, work_dir)
    before = [measure()] if row.objective else []
    for _ in range(trainer.total_steps - row.length):
        trainer.update()
    steps, curve, seconds = measured_steps(row.length, points), [measure()], 0.0
    for step in range(1, row.length + 1):
        start = time.perf_counter()
        trainer.update()
        seconds += time.perf_counter() - start
        if step in steps:
            curve.append(measure())
            print(step, json.dumps(curve[-1]), flush=True)
    trained = sum(parameter.numel() for parameter in trainer.networks.student_parameters())
    return {
        "flags": row.flags,
        "objective": row.objective,
        "trained": trained,
        "before": before,
        "steps": [0, *steps],
        "curve": curve,
        "seconds": seconds / row.length,
    }


def markdown(results: dict) -> str:
    """A table of the adapters, one of the objectives, and the flags of each row."""
    lines = [f"{results['machine']}. Every run: `{COMMON}`", ""]
    for objective, names in ((False, ["error"]), (True, ["energy", "wrong"])):
        rows = {name: results["rows"][name] for name in ROWS if name in results["rows"]}
        rows = {name: row for name, row in rows.items() if row["objective"] == objective}
        for name in names if rows else ():
            lines += [*table(rows, name), ""]
    lines += ["| | flags beside those |", "|---|---|"]
    lines += [f"| {name} | `{row['flags']}` |" for name, row in results["rows"].items()]
    return "\n".join(lines)


TITLES = {
    "error": "adapter, by regression: squared distance to the teacher's sample",
    "energy": "objective: energy score against the teacher's samples",
    "wrong": "objective: attributes wrong",
}


def table(rows: dict, measure: str) -> list[str]:
    steps = next(iter(rows.values()))["steps"]
    objective = measure != "error"
    form = "{:.1%}" if measure == "wrong" else "{:.3f}"
    heads = [
        TITLES[measure],
        "trained",
        "s/update",
        *(["untrained"] if objective else []),
        *(f"{n} updates" for n in steps),
    ]
    lines = ["| " + " | ".join([*heads, "fell"]) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, row in rows.items():
        values = [point[measure] for point in row["before"] + row["curve"]]
        start = row["curve"][0][measure]
        fell = "yes" if values[-1] < start else "no"
        cells = [name, f"{row['trained']:,}", f"{row['seconds']:.2f}", *map(form.format, values), fell]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def write(results: dict, folder: Path) -> dict:
    """Put `results` into the files of `folder`; rows that are there and not in them stay. Returns all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "learning_curves.json"
    if file.is_file():
        results = results | {"rows": json.loads(file.read_text())["rows"] | results["rows"]}
    for suffix, text in (("json", json.dumps(results, indent=1)), ("md", markdown(results))):
        (folder / f"learning_curves.{suffix}.tmp").write_text(text + "\n")
        os.replace(folder / f"learning_curves.{suffix}.tmp", folder / f"learning_curves.{suffix}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="Default: all.")
    parser.add_argument("--points", type=int, default=4, help="Measurements after the first. Default: 4.")
    parser.add_argument(
        "--steps", type=int, default=None, help="Updates of each row. Default: 300 for adapters, 200 for objectives."
    )
    parser.add_argument("--extra", default="", help="More flags of train_wadi.py for these rows, to try something.")
    parser.add_argument("--num_threads", type=int, default=None, help="CPU threads. Default: torch's choice.")
    parser.add_argument("--work_dir", default="learning-curves", help="For the teacher's samples, made once.")
    parser.add_argument("--output_dir", default=None, help="Folder for learning_curves.json and .md.")
    args = parser.parse_args()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    logging.disable(logging.INFO)
    work_dir = Path(args.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    results = {"machine": machine, "rows": {}}
    for name in args.rows:
        row = ROWS[name]
        row = Row(f"{row.flags} {args.extra}".strip(), row.objective, args.steps)
        print(name, row, flush=True)
        results["rows"][name] = learn(row, args.points, work_dir)
        if args.output_dir:
            results = write(results, Path(args.output_dir))
    print(markdown(results))


if __name__ == "__main__":
    sys.exit(main())
