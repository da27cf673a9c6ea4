#!/usr/bin/env python
"""The paper's comparisons on Shapes World: adapters, ranks, layers, initialisation, orthogonal maps, objectives, backbones.

    python benchmarks/ablations.py --list                                    # the grid, a line for each run
    python benchmarks/ablations.py --tables adapter --output_dir ablations   # runs what is not there yet
    python benchmarks/ablations.py --report --output_dir ablations           # tables and figure of what is there

One run is one line of the grid: flags of `training/train_wadi.py`, of which only those of the named factor differ from the
others of its table (and the learning rate that was chosen for it). Teacher, captions and their order, noise, budget and
evaluation are the same in all. A run that was stopped goes on from its last checkpoint. RUN.json gets the command, seed,
commit, machine, the curve of errors over updates and seconds, and at the end, on held-out captions: attributes and whole
captions right, Fréchet distance, and what training did to the weights (`diffusers_wadi.analysis`).
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from learning_curves import load_script
from shapes_quality import distance, judge_all

from diffusers_wadi.analysis import analyze_weights
from diffusers_wadi.distillation import data, exporting, setup
from diffusers_wadi.distillation.networks import STUDENT
from diffusers_wadi.distillation.trainer import WaDiTrainer
from diffusers_wadi.shapes import bundled_checkpoint, heldout_captions, parse_caption, render_scenes

COMMON = (
    "--shapes_captions 20000 --train_batch_size 16 --guidance_scale 2 --fake_warmup_steps 200 --use_ema --lr_scheduler cosine "
    "--lr_warmup_steps 50 --validation_steps 0 --fake_learning_rate 2e-3 --student_rank 32 --fake_rank 8 --learning_rate 5e-4"
)
RATES = {"lora": "3e-4", "dora": "3e-4", "dora_frozen_norm": "3e-4", "full": "3e-5"}  # others: that of COMMON
ORTHOGONAL = ("matrix_exp", "cayley", "householder")
OBJECTIVES = {
    "wadi": "",
    "swiftbrush": "--learning_rate 3e-5",
    "pg_sb": "--learning_rate 3e-5 --guidance_scale_min 1 --guidance_scale_max 3",
    "dmd2": "--learning_rate 3e-5 --fake_learning_rate 1e-4 --fake_updates_per_step 3",
    "sid_lsg": "--learning_rate 3e-5 --fake_learning_rate 1e-4",
}


@dataclass(frozen=True)
class Run:
    """A line of the grid.

    Args:
        table: which comparison.
        name: of the factor's value.
        flags: beside COMMON, later ones win.
        seed: of the training.
        backbone: which bundled teacher.
    """

    table: str
    name: str
    flags: str
    seed: int = 0
    backbone: str = "stable-diffusion"

    @property
    def key(self) -> str:
        """Its name in files."""
        return f"{self.table}-{self.name}-{self.seed}".replace(" ", "-")

    def command(self, steps: int) -> list[str]:
        """Flags of `training/train_wadi.py`, without folders."""
        return f"{COMMON} --seed {self.seed} {self.flags} --max_train_steps {steps}".split()


def grid() -> Iterator[Run]:
    """All runs. The adapter table has three seeds, the others one."""
    for kind in ("lorad", "lora", "dora", "dora_frozen_norm", "full"):
        rate = f"--learning_rate {RATES[kind]}" if kind in RATES else ""
        for seed in range(3):
            yield Run("adapter", kind, f"--student_adapter {kind} {rate}".strip(), seed)
    for rank in (4, 8, 16, 32, 64):
        yield Run("student rank", str(rank), f"--student_rank {rank}")
    for rank in (2, 4, 8, 16, 32):
        yield Run("fake rank", str(rank), f"--fake_rank {rank}")
    for layers in ("linear", "linear_conv"):
        yield Run("layers", layers, f"--student_layers {layers}")
    for init in ("paper", "xavier"):
        yield Run("initialisation", init, f"--student_init {init}")
    for kind in ("lorad", *ORTHOGONAL):
        yield Run("orthogonal", kind, f"--student_adapter {kind} --student_layers qkv")
    for objective, flags in OBJECTIVES.items():
        yield Run("objective", objective, f"--objective {objective} {flags}".strip())
    yield Run("backbone", "UNet", "")
    yield Run("backbone", "PixArt", "", backbone="pixart")


class Evaluation:
    """What a student is judged by: the same captions and noise for all runs.

    Args:
        num_captions: judged at the end; a quarter of them at the points of the curve.
        num_frechet: images for the Fréchet distance; 0 leaves it out.
    """

    def __init__(self, num_captions: int, num_frechet: int):
        self.captions = heldout_captions(max(num_captions, num_frechet), seed=1)
        self.num_captions, self.num_frechet = num_captions, num_frechet
        self.real = None
        if num_frechet:
            scenes = [parse_caption(caption) for caption in heldout_captions(num_frechet, seed=3)]
            self.real = render_scenes(scenes, seed=3)

    def draw(self, trainer: WaDiTrainer, captions: Sequence[str]) -> np.ndarray:
        """One-step images of the student as it is now, of its average if it has one, from the same noise every time."""
        embeddings = data.PromptEmbeddings(list(captions), setup.load_encoder(trainer.args, trainer.backbone))
        painter, seeded = trainer.painter, torch.Generator().manual_seed(1_000_000)
        painter.text = embeddings.at(torch.arange(len(captions))).cpu()
        painter.noise = torch.randn(len(captions), *trainer.latent_shape, generator=seeded)
        with trainer.averaged_student(), trainer.networks.selected(STUDENT):
            return np.stack([np.asarray(image.convert("RGB")) for image in painter.images()])

    def quick(self, trainer: WaDiTrainer) -> float:
        """Share of attributes wrong, on a quarter of the captions."""
        captions = self.captions[: max(1, self.num_captions // 4)]
        return 1 - judge_all(self.draw(trainer, captions), captions)["attributes"]

    def whole(self, trainer: WaDiTrainer) -> dict[str, Any]:
        """All that is said of a finished student."""
        images = self.draw(trainer, self.captions)
        verdict = judge_all(images[: self.num_captions], self.captions[: self.num_captions])
        found = {name: verdict[name] for name in ("attributes", "captions", "by_attribute")}
        if self.real is not None:
            found["frechet"] = distance(self.real, images[: self.num_frechet])
        return found | weights(trainer)


def weights(trainer: WaDiTrainer) -> dict[str, Any]:
    """Trained parameters, and the mean change of norms and directions of the teacher's weights (Eq. 13 and 15)."""
    trained = sum(parameter.numel() for parameter in trainer.networks.student_parameters())
    with tempfile.TemporaryDirectory() as folder, trainer.averaged_student():
        where = (trainer.backbone.subfolder, str(bundled_checkpoint() / "teacher"))
        (file, *_) = exporting.export_role(trainer.networks, STUDENT, Path(folder), *where, torch.float32)
        tuned = Path(folder, file) if Path(folder, file).is_dir() else folder
        analysis = analyze_weights(trainer.args.pretrained_teacher_model, tuned, energies=False)
    overall = analysis.overall()
    return {"trained": trained, "norm": overall.norm_mean, "direction": overall.direction_mean}


def run_one(run: Run, steps: int, points: int, evaluation: Evaluation, folder: Path) -> dict[str, Any]:
    """Train and judge; goes on where `folder` has a checkpoint of it."""
    file, work = folder / f"{run.key}.json", folder / run.key
    log = json.loads(file.read_text()) if file.is_file() else {"curve": []}
    if "result" in log:
        return log
    teacher = bundled_checkpoint(run.backbone) / "teacher"
    every = max(1, steps // points)
    places = ["--pretrained_teacher_model", str(teacher), "--output_dir", str(work)]
    state = [
        "--checkpointing_steps",
        str(every),
        "--checkpoints_total_limit",
        "1",
        "--resume_from_checkpoint",
        "latest",
    ]
    AcceleratorState._reset_state(reset_partial_state=True)
    args = load_script().parse_args([*run.command(steps), *places, *state])
    args.validation_prompts = ["a red heart on a white background"]
    trainer = WaDiTrainer(args)
    log = {"curve": [point for point in log["curve"] if point["step"] <= trainer.step]} | about(run, steps)
    seconds = log["curve"][-1]["seconds"] if log["curve"] else 0.0
    if not log["curve"] or log["curve"][-1]["step"] < trainer.step:  # the start, or stopped just after a checkpoint
        log["curve"].append({"step": trainer.step, "seconds": seconds, "wrong": evaluation.quick(trainer)})
    while trainer.step < trainer.total_steps:
        start = time.perf_counter()
        trainer.update()
        seconds += time.perf_counter() - start
        if trainer.step % every == 0 or trainer.step == trainer.total_steps:
            trainer.save_checkpoint()
            log["curve"].append({"step": trainer.step, "seconds": seconds, "wrong": evaluation.quick(trainer)})
            write(file, json.dumps(log, indent=1))
            print(run.key, json.dumps(log["curve"][-1]), flush=True)
    log["result"] = evaluation.whole(trainer)
    write(file, json.dumps(log, indent=1))
    return log


def about(run: Run, steps: int) -> dict[str, Any]:
    """What is needed to do it again."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    where = platform.processor() or platform.machine()
    machine = f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    command = (
        f"train_wadi.py {' '.join(run.command(steps))} --pretrained_teacher_model <bundled {run.backbone} teacher>"
    )
    return {"table": run.table, "name": run.name, "seed": run.seed, "command": command} | {
        "commit": commit or "unknown",
        "machine": machine,
    }


def write(file: Path, text: str) -> None:
    """Beside, then renamed."""
    temporary = file.with_suffix(file.suffix + ".tmp")
    temporary.write_text(text + "\n")
    os.replace(temporary, file)


COLUMNS = {
    "trained": ("trained parameters", "{:,.0f}"),
    "attributes": ("attributes right", "{:.1%}"),
    "captions": ("captions wholly right", "{:.1%}"),
    "frechet": ("Fréchet distance", "{:.3f}"),
    "norm": ("norm change", "{:.2g}"),
    "direction": ("direction change", "{:.2g}"),
}


def markdown(logs: Sequence[dict[str, Any]]) -> str:
    """A table for each comparison; where there are several seeds, mean and standard deviation."""
    tables: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for log in logs:
        tables[log["table"]][log["name"]].append(log)
    lines = []
    for table, rows in tables.items():
        heads = [table, "seeds", *(title for title, _ in COLUMNS.values()), "s/update"]
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for name, found in rows.items():
            pace = fmean(log["curve"][-1]["seconds"] / max(1, log["curve"][-1]["step"]) for log in found)
            cells = [_cell([log["result"].get(key) for log in found], form) for key, (_, form) in COLUMNS.items()]
            lines.append("| " + " | ".join([name, str(len(found)), *cells, f"{pace:.2f}"]) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {form.format(stdev(known))}" if len(known) > 1 and stdev(known) else ""
    return form.format(fmean(known)) + spread


def save_figure(logs: Sequence[dict[str, Any]], file: Path) -> None:
    """Attributes wrong over updates and over seconds, a line for each adapter and objective."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [table for table in ("adapter", "objective") if any(log["table"] == table for log in logs)]
    if not shown:
        return
    figure, axes = pyplot.subplots(len(shown), 2, figsize=(8.4, 3.2 * len(shown)), squeeze=False, sharey=True)
    for row, table in zip(axes, shown):
        for ax, unit in zip(row, ("step", "seconds")):
            for log in logs:
                if log["table"] == table and log["seed"] == 0:
                    ax.plot(
                        [p[unit] for p in log["curve"]], [100 * p["wrong"] for p in log["curve"]], label=log["name"]
                    )
            ax.set(xlabel="updates" if unit == "step" else unit, ylabel="attributes wrong, %", title=table)
            ax.grid(color="#dddddd", linewidth=0.6)
        row[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def report(folder: Path) -> str:
    """Tables (ablations.md) and figure (ablations.png) of the finished runs in `folder`."""
    logs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    order = {run.key: i for i, run in enumerate(grid())}
    logs = [log for log in logs if "result" in log]
    logs.sort(key=lambda log: order[Run(log["table"], log["name"], "", log["seed"]).key])
    text = markdown(logs)
    write(folder / "ablations.md", text)
    save_figure(logs, folder / "ablations.png")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, tables = parser.add_argument, list(dict.fromkeys(run.table for run in grid()))
    add("--tables", nargs="+", choices=tables, default=tables, help="Default: all.")
    add("--names", nargs="+", help="Only these values of the factor.")
    add("--steps", type=int, default=2000, help="Updates of each run. Default: 2000.")
    add("--points", type=int, default=10, help="Of the curve. Default: 10.")
    add("--num_captions", type=int, default=512, help="Judged at the end. Default: 512.")
    add("--num_frechet", type=int, default=2000, help="Images for the Fréchet distance. Default: 2000.")
    add("--num_threads", type=int, help="CPU threads. Default: torch's choice.")
    add("--output_dir", type=Path, default=Path("ablations"), help="Default: %(default)s.")
    add("--list", action="store_true", help="Print the grid.")
    add("--report", action="store_true", help="Only tables and figure.")
    args = parser.parse_args()
    runs = [run for run in grid() if run.table in args.tables and (not args.names or run.name in args.names)]
    if args.list:
        return print("\n".join(f"{run.key}: {' '.join(run.command(args.steps))}" for run in runs))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if not args.report:
        if args.num_threads:
            torch.set_num_threads(args.num_threads)
        logging.disable(logging.INFO)
        evaluation = Evaluation(args.num_captions, args.num_frechet)
        for run in runs:
            run_one(run, args.steps, args.points, evaluation, args.output_dir)
    print(report(args.output_dir))


if __name__ == "__main__":
    sys.exit(main())
