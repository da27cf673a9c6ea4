#!/usr/bin/env python
"""The paper's comparisons on Shapes World: adapters, ranks, layers, initialisation, orthogonal maps, objectives, backbones.

    python benchmarks/ablations.py --list                                    # the grid, a line for each run
    python benchmarks/ablations.py --tables adapter --output_dir ablations   # runs what is not there yet
    python benchmarks/ablations.py --report --output_dir ablations           # tables and figure of what is there

One run is one line of the grid: flags of `training/train_wadi.py`, of which only those of the named factor differ from the
others of its table (and the learning rate that was chosen for it). Teacher, captions and their order, noise, budget and
evaluation are the same in all. A run that was stopped goes on from its last checkpoint. RUN.json gets the command, seed,
commit, machine, the curve of errors and losses over updates and seconds (of CPU time, on a CPU), and at the end, on held-out
captions: attributes and whole captions right, Fréchet distance, and what training did to the weights (`diffusers_wadi.analysis`).

The budget is small: 150 updates of regression onto samples of the teacher, 60 of the fake alone, then --steps by score
distillation, with the regression beside it in all tables but that of the objectives. The student starts as the teacher at
t = 625 (SiD-LSG's start), where it gets further in so few updates than at the paper's t = T-1; the table `recipe` has both.
"""

import argparse
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
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
    "--shapes_captions 20000 --train_batch_size 16 --mixed_precision bf16 --t_init 625 --use_ema --ema_decay 0.98 "
    "--lr_scheduler cosine --lr_warmup_steps 5 --validation_steps 0 --student_rank 32 --fake_rank 8 --warmup_regression_steps 150 "
    "--warmup_regression_pairs 2048 --warmup_num_inference_steps 10 --warmup_guidance_scale 3 --fake_warmup_steps 60"
)
# Of score distillation, for all tables but that of the objectives, which are defined by these.
METHOD = (
    "--guidance_scale 1.5 --fake_guidance_scale 1 --score_weighting dmd2 --fake_loss_weighting none --regression_weight 1 "
    "--proportion_empty_prompts 0 --fake_updates_per_step 2 --fake_learning_rate 3e-3"
)
# Kind of adapter -> rates of score distillation and of the warm start; the first pair is used in the other tables.
RATES = {
    "lorad": (("3e-4", "2e-3"), ("3e-4", "1e-3"), ("3e-4", "4e-3"), ("3e-4", "8e-3"), ("1e-3", "2e-3")),
    "lora": (("3e-4", "1e-3"), ("3e-4", "5e-4"), ("3e-4", "2e-3"), ("1e-4", "1e-3")),
    "full": (("3e-5", "3e-4"), ("3e-5", "1e-4"), ("3e-5", "1e-3"), ("1e-4", "3e-4")),
}
RATES |= {"dora": RATES["lora"][:1], "dora_frozen_norm": RATES["lora"][:1]}
ORTHOGONAL = ("matrix_exp", "cayley", "householder")
_FULL = "--learning_rate 3e-5 --warmup_learning_rate 3e-4"
OBJECTIVES = {
    "wadi": "--learning_rate 3e-4 --warmup_learning_rate 2e-3 --fake_learning_rate 3e-3",
    "swiftbrush": f"{_FULL} --guidance_scale 1.5",
    "pg_sb": f"{_FULL} --guidance_scale_min 1 --guidance_scale_max 2",
    "dmd2": f"{_FULL} --fake_learning_rate 1e-4 --fake_updates_per_step 3",
    "sid_lsg": f"{_FULL} --fake_learning_rate 1e-4",
}
RECIPES = {
    "as in the other tables": "",
    "t = T-1, schedule's alpha": "--t_init 999",
    "t = T-1, alpha_bar 0.1": "--terminal_alpha_cumprod 0.1",
    "no regression beside": "--regression_weight 0",
    "guidance 3": "--guidance_scale 3",
    "release's weights": "--score_weighting sigma2 --fake_loss_weighting alpha2",
    "one fake update": "--fake_updates_per_step 1",
    "no average": "--no-use_ema",
    "fake rate 1e-2": "--fake_learning_rate 1e-2",
}


def rates(kind: str, which: int = 0) -> str:
    """Flags of the learning rates of an adapter."""
    rate, warmup = RATES.get(kind, RATES["lora"])[which]
    return f"--student_adapter {kind} --learning_rate {rate} --warmup_learning_rate {warmup}"


@dataclass(frozen=True)
class Run:
    """A line of the grid.

    Args:
        table: which comparison.
        name: of the factor's value.
        flags: beside COMMON and METHOD, later ones win.
        seed: of the training.
        backbone: which bundled teacher.
        method: flags of score distillation.
    """

    table: str
    name: str
    flags: str
    seed: int = 0
    backbone: str = "stable-diffusion"
    method: str = METHOD

    @property
    def key(self) -> str:
        """Its name in files."""
        return re.sub(r"[^\w.]+", "-", f"{self.table}-{self.name}-{self.seed}")

    def command(self, steps: int) -> list[str]:
        """Flags of `training/train_wadi.py`, without folders; each once."""
        words = f"{COMMON} {self.method} --seed {self.seed} {self.flags} --max_train_steps {steps}".split()
        flags: dict[str, list[str]] = {}
        for word in words:
            if word.startswith("--"):
                flag = word
                flags[flag] = []
            else:
                flags[flag].append(word)
        for flag, needless in (
            ("--no-use_ema", ("--use_ema", "--ema_decay")),
            ("--terminal_alpha_cumprod", ("--t_init",)),
        ):
            for name in needless if flag in flags else ():
                flags.pop(name, None)
        return [word for flag, values in flags.items() for word in (flag, *values)]


def grid() -> list[Run]:
    """All runs, the most telling first. The adapter table has three seeds, the others one.

    The same command stands in several tables: it is run once, see `first_of_each`.
    """
    kinds = ("lorad", "lora", "full", "dora", "dora_frozen_norm")
    runs = [Run("adapter", kind, rates(kind)) for kind in kinds]
    runs += [Run("recipe", name, f"{rates('lorad')} {flags}") for name, flags in RECIPES.items()][:3]
    runs += [Run("objective", name, f"--objective {name} {flags}", method="") for name, flags in OBJECTIVES.items()]
    runs += [Run("adapter", kind, rates(kind), seed) for seed in (1, 2) for kind in kinds]
    for kind in ("lorad", "lora", "full"):
        for i, (rate, warmup) in enumerate(RATES[kind]):
            runs.append(Run("learning rate", f"{kind} {rate}, warm start {warmup}", rates(kind, i)))
    lorad = rates("lorad")
    for name, layers in (
        ("linear", "paper"),
        ("linear_conv", "linear_conv"),
    ):  # the paper's for LoRaD are the linear ones
        runs.append(Run("layers", name, f"{lorad} --student_layers {layers}"))
    runs += [Run("initialisation", init, f"{lorad} --student_init {init}") for init in ("paper", "zero_b", "xavier")]
    runs += [Run("recipe", name, f"{lorad} {flags}") for name, flags in RECIPES.items()][3:]
    for kind in ("lorad", *ORTHOGONAL):
        runs.append(Run("orthogonal", kind, f"{rates(kind)} --student_layers qkv"))
    runs += [Run("student rank", str(rank), f"{lorad} --student_rank {rank}") for rank in (4, 8, 16, 32, 64)]
    runs += [Run("fake rank", str(rank), f"{lorad} --fake_rank {rank}") for rank in (2, 4, 8, 16, 32)]
    for name, teacher in (("UNet", "stable-diffusion"), ("PixArt", "pixart")):  # PixArt's pipeline knows t = T-1 only
        runs.append(Run("backbone", name, f"{lorad} --terminal_alpha_cumprod 0.0047", backbone=teacher))
    return runs


def settings(run: Run) -> tuple:
    """What a run is, wherever it stands: equal for two lines of the grid that are one and the same run."""
    args = vars(script().parse_args([*run.command(1), "--pretrained_teacher_model", "t", "--dry_run"]))
    return run.backbone, tuple(sorted((name, str(value)) for name, value in args.items()))


@cache
def script():
    """`training/train_wadi.py` as a module."""
    return load_script()


def first_of_each(runs: Sequence[Run]) -> dict[Run, Run]:
    """Line of the grid -> the first line that is the same run."""
    first: dict[tuple, Run] = {}
    return {run: first.setdefault(settings(run), run) for run in runs}


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
    made_by = about(run, steps)
    if log.get("command", made_by["command"]) != made_by["command"]:
        raise ValueError(f"{file} is of another run, {log['command']}. Choose another --output_dir, or remove it.")
    if "result" in log:
        return log
    trainer = start(run, steps, work)
    every = max(1, trainer.total_steps // points)
    log = {"curve": [point for point in log["curve"] if point["step"] <= trainer.step]} | made_by
    seconds = log["curve"][-1]["seconds"] if log["curve"] else 0.0
    if not log["curve"] or log["curve"][-1]["step"] < trainer.step:  # the start, or stopped just after a checkpoint
        log["curve"].append({"step": trainer.step, "seconds": seconds, "wrong": evaluation.quick(trainer)})
    clock, losses = _clock(trainer), []
    while trainer.step < trainer.total_steps:
        before = clock()
        losses.append({name: float(value) for name, value in trainer.update().items()})
        seconds += clock() - before
        if trainer.step % every == 0 or trainer.step == trainer.total_steps:
            trainer.save_checkpoint()
            point = {"step": trainer.step, "seconds": seconds, "wrong": evaluation.quick(trainer)}
            log["curve"].append(point | _means(losses))
            losses = []
            write(file, json.dumps(log, indent=1))
            print(run.key, json.dumps(log["curve"][-1]), flush=True)
    log["result"] = evaluation.whole(trainer)
    write(file, json.dumps(log, indent=1))
    shutil.rmtree(work)
    return log


def start(run: Run, steps: int, work: Path) -> WaDiTrainer:
    """The run before its first update, or as its last checkpoint in `work` left it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    places = [
        "--pretrained_teacher_model",
        str(bundled_checkpoint(run.backbone) / "teacher"),
        "--output_dir",
        str(work),
    ]
    state = ["--checkpoints_total_limit", "1", "--resume_from_checkpoint", "latest"]
    args = script().parse_args([*run.command(steps), *places, *state])
    args.validation_prompts = ["a red heart on a white background"]
    shared, own = work.parent / f"pairs-{run.backbone}-{run.seed}.safetensors", work / "regression_pairs.safetensors"
    work.mkdir(exist_ok=True)
    if shared.is_file():
        shutil.copyfile(
            shared, own
        )  # made by another run; made anew if its fingerprint says that it is not for this one
    trainer = WaDiTrainer(args)
    if own.is_file():
        shutil.copyfile(own, shared)
    return trainer


def _clock(trainer: WaDiTrainer) -> Callable[[], float]:
    # CPU time does not count what other programs took from this one; a GPU has to be waited for.
    if trainer.device.type == "cpu":
        return time.process_time

    def waited() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return waited


def _means(logs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each loss and norm over the updates since the last point; warm-up and score distillation log different ones."""
    found = defaultdict(list)
    for log in logs:
        for name, value in log.items():
            found[name].append(value)
    return {name: fmean(values) for name, values in found.items()}


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


def markdown(lines: Sequence[tuple[Run, dict[str, Any]]]) -> str:
    """A table for each comparison; where there are several seeds, mean and standard deviation."""
    tables: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for run, log in lines:
        tables[run.table][run.name].append(log)
    text = []
    for table, rows in tables.items():
        if all(
            log["table"] != table for found in rows.values() for log in found
        ):  # only a run that other tables share
            continue
        heads = [table, "seeds", *(title for title, _ in COLUMNS.values()), "s/update"]
        text += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for name, found in rows.items():
            pace = fmean(_pace(log["curve"]) for log in found)
            cells = [_cell([log["result"].get(key) for log in found], form) for key, (_, form) in COLUMNS.items()]
            text.append("| " + " | ".join([name, str(len(found)), *cells, f"{pace:.2f}"]) + " |")
        text.append("")
    return "\n".join(text)


def _pace(curve: Sequence[dict[str, float]]) -> float:
    """Seconds of an update, between the last two points: without warm-up."""
    before, last = curve[-2:]
    return (last["seconds"] - before["seconds"]) / (last["step"] - before["step"])


def _cell(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {form.format(stdev(known))}" if len(known) > 1 and stdev(known) else ""
    return form.format(fmean(known)) + spread


def save_figure(lines: Sequence[tuple[Run, dict[str, Any]]], file: Path) -> None:
    """Attributes wrong over updates and over seconds, a line for each adapter and objective (seed 0)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [table for table in ("adapter", "objective") if any(run.table == table for run, _ in lines)]
    if not shown:
        return
    figure, axes = pyplot.subplots(len(shown), 2, figsize=(8.4, 3.2 * len(shown)), squeeze=False, sharey=True)
    for row, table in zip(axes, shown):
        for ax, unit in zip(row, ("step", "seconds")):
            for run, log in lines:
                if run.table == table and run.seed == 0:
                    points = [(point[unit], 100 * point["wrong"]) for point in log["curve"]]
                    ax.plot(*zip(*points), marker=".", label=run.name)
            ax.set(xlabel="updates" if unit == "step" else "seconds", ylabel="attributes wrong, %", title=table)
            ax.grid(color="#dddddd", linewidth=0.6)
        row[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def report(folder: Path) -> str:
    """Tables (ablations.md) and figure (ablations.png) of the finished runs in `folder`."""
    files = {run: folder / f"{first.key}.json" for run, first in first_of_each(grid()).items()}
    logs = {run: json.loads(file.read_text()) for run, file in files.items() if file.is_file()}
    lines = sorted(((run, log) for run, log in logs.items() if "result" in log), key=lambda line: line[0].seed)
    order = list(dict.fromkeys((run.table, run.name) for run in grid()))
    lines.sort(key=lambda line: order.index((line[0].table, line[0].name)))
    text = markdown(lines)
    write(folder / "ablations.md", text)
    save_figure(lines, folder / "ablations.png")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, tables = parser.add_argument, list(dict.fromkeys(run.table for run in grid()))
    add("--tables", nargs="+", choices=tables, default=tables, help="Default: all.")
    add("--names", nargs="+", help="Only these values of the factor.")
    add("--seeds", nargs="+", type=int, help="Only these.")
    add("--steps", type=int, default=50, help="Updates of each run by score distillation. Default: 50.")
    add("--points", type=int, default=7, help="Of the curve. Default: 7.")
    add("--num_captions", type=int, default=512, help="Judged at the end. Default: 512.")
    add("--num_frechet", type=int, default=512, help="Images for the Fréchet distance. Default: 512.")
    add("--num_threads", type=int, help="CPU threads. Default: torch's choice.")
    add("--output_dir", type=Path, default=Path("ablations"), help="Default: %(default)s.")
    add("--list", action="store_true", help="Print the grid.")
    add("--report", action="store_true", help="Only tables and figure.")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    first = first_of_each(grid())
    runs = [run for run in first if run.table in args.tables]
    runs = [run for run in runs if args.names is None or run.name in args.names]
    runs = [run for run in runs if args.seeds is None or run.seed in args.seeds]
    if args.list:
        return print("\n".join(f"{run.key} ({first[run].key}): {' '.join(run.command(args.steps))}" for run in runs))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if not args.report:
        if args.num_threads:
            torch.set_num_threads(args.num_threads)
        evaluation = Evaluation(args.num_captions, args.num_frechet)
        for run in dict.fromkeys(first[run] for run in runs):
            run_one(run, args.steps, args.points, evaluation, args.output_dir)
    print(report(args.output_dir))


if __name__ == "__main__":
    sys.exit(main())
