#!/usr/bin/env python
"""DreamBooth on Shapes World: a subject learned by LoRaD, LoRA and full fine-tuning, in 50 steps and in one.

    python benchmarks/downstream_dreambooth.py --images 240 --work_dir dreambooth-shapes

The subject, its prompts and the judge are those of `diffusers_wadi.shapes.subject`: six pictures of it alone for "a sks
star", asked for on three backgrounds and, in half of the prompts, in a relation to another shape. "subject match" is the share of
images that show it (outline, both colours on their sides), "prompt accuracy" the share of the prompt's other attributes
that hold (background, number of shapes, the other shape's outline and colour, relation), "world kept" the share of
attributes right for ordinary held-out captions. The teacher samples with DDIM, 50 steps, guidance 3.

Every method gets the same steps, batches and class images, and the learning rate that was best for it of those in
`GRID` by the teacher's images (`--grid` runs that choice anew; full fine-tuning had one try only). The paper's rates are
for Stable Diffusion; at 1e-4 a model as small as this one moves too little in as few steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from drawing import draw, seconds_per_image
from PIL import Image

from diffusers_wadi import LoRaDConfig, WaDiPipeline, bundled_checkpoint, save_lorad_adapter
from diffusers_wadi.customization.trainer import DreamBoothTrainer
from diffusers_wadi.downstream.dreambooth import load_subject, sampling_scheduler
from diffusers_wadi.shapes import heldout_captions, judge_image
from diffusers_wadi.shapes import subject as world

SCRIPT = Path(__file__).parents[1] / "training" / "train_dreambooth_lorad.py"
STUDENT = "student, 1 step"
GUIDANCE = 3.0
BATCH = 40
SETTINGS = ("none", "lorad", "lora", "full")
GRID = {"lorad": (3e-3, 6e-3), "lora": (5e-4, 1e-3), "full": (1e-4,)}
BEST = {"lorad": 3e-3, "lora": 5e-4, "full": 1e-4}
TRAIN_STEPS = 400


def training_script():
    """`training/train_dreambooth_lorad.py` as a module."""
    spec = importlib.util.spec_from_file_location("train_dreambooth_lorad", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(method: str, rate: float, steps: int, work_dir: Path, min_timestep: int = 0) -> Path:
    """The folder of a subject learned with these settings; trained if it is not there."""
    folder = work_dir / (f"{method}-{rate:g}-{steps}" + f"-from-{min_timestep}" * bool(min_timestep))
    if any((folder / name).exists() for name in ("adapter_config.json", "pytorch_lora_weights.safetensors", "unet")):
        return folder
    if not (work_dir / "instances").is_dir():
        world.save_instance_images(work_dir / "instances")
    data = ["--instance_data_dir", work_dir / "instances", "--instance_prompt", world.INSTANCE_PROMPT]
    prior = ["--with_prior_preservation", "--class_prompt", world.CLASS_PROMPT, "--class_data_dir", work_dir / "class"]
    drawn = f"--num_class_images 200 --class_batch_size {BATCH} --class_num_inference_steps 25".split()
    model = ["--pretrained_model_name_or_path", bundled_checkpoint() / "teacher", "--method", method, "--rank", 64]
    length = ["--max_train_steps", steps, "--learning_rate", rate, "--train_batch_size", 4, "--cache_latents"]
    flags = [*data, *prior, *drawn, "--class_guidance_scale", GUIDANCE, *model, *length, "--output_dir", folder]
    flags += ["--checkpointing_steps", steps, "--checkpoints_total_limit", 1, "--min_timestep", min_timestep]
    DreamBoothTrainer(training_script().parse_args([str(flag) for flag in flags])).train()
    return folder


def load(generator: str, setting: str, folder: Path | None, weight: float = 1.0) -> StableDiffusionPipeline:
    """A pipeline in which the angles are fused: as fast as without adapters."""
    base = folder if setting == "full" else bundled_checkpoint() / "teacher"
    if generator == STUDENT:  # its angles also turn the weights of a model that was trained as a whole
        pipe = WaDiPipeline.from_pretrained(bundled_checkpoint(), base_model=base)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(base)
        pipe.scheduler = sampling_scheduler(pipe.scheduler)
    if setting in ("lorad", "lora"):
        load_subject(pipe, folder, weight)
    fuse = getattr(pipe, "fuse_lorad", None)
    if fuse is not None and setting != "lora":
        fuse()
    elif setting == "lorad":
        pipe.unet.fuse_lora()
    pipe.unet.set_attn_processor(AttnProcessor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: StableDiffusionPipeline, generator: str, prompts: list[str], steps: int = 50) -> np.ndarray:
    """uint8 (n, 64, 64, 3). Image i starts from seed i, whatever draws it; `steps` are the teacher's."""
    call = {} if generator == STUDENT else {"num_inference_steps": steps, "guidance_scale": GUIDANCE}
    return draw(pipe, prompts, adapter=True, batch_size=BATCH, **call)


def judge(images: np.ndarray, prompts: list[world.SubjectPrompt]) -> dict[str, float]:
    """The metrics of images of the subject."""
    verdicts = [world.judge_subject(image, prompt) for image, prompt in zip(images, prompts)]
    matches = np.array([match for match, _ in verdicts])
    rights = [list(verdict.values()) for _, verdict in verdicts]
    return {
        "subject match": float((matches >= world.MIN_MATCH).mean()),
        "subject overlap": float(matches.mean()),
        "prompt accuracy": float(np.mean([right for each in rights for right in each])),
        "subject and prompt right": float(np.mean([m >= world.MIN_MATCH and all(r) for m, r in zip(matches, rights)])),
    }


def world_kept(pipe: StableDiffusionPipeline, generator: str, count: int) -> float:
    """Share of attributes right for held-out captions without the subject."""
    captions = heldout_captions(count, seed=5)
    images = generate(pipe, generator, captions)
    rights = [right for image, c in zip(images, captions) for right in judge_image(image, c).values()]
    return float(np.mean(rights))


def cell(generator: str, setting: str, folder: Path | None, images: int, steps: int) -> list[dict[str, Any]]:
    """The rows of one generator with one way to have learned the subject; `steps` are the teacher's."""
    pipe, prompts = load(generator, setting, folder), world.subject_prompts(images, seed=0)
    values = judge(generate(pipe, generator, [prompt.text() for prompt in prompts], steps), prompts)
    if generator == STUDENT:
        values["world kept"] = world_kept(pipe, generator, images)
    seconds = seconds_per_image(lambda: generate(pipe, generator, [world.INSTANCE_PROMPT], steps))
    common = {"task": "dreambooth", "generator": generator, "setting": setting}
    numbers = {"images": images, "seconds_per_image": seconds}
    return [{**common, "metric": metric, "value": value, **numbers} for metric, value in values.items()]


def trained(train_steps: int, work_dir: Path) -> dict[str, Path | None]:
    """Setting -> folder, at the best learning rates."""
    return {method: train(method, rate, train_steps, work_dir) for method, rate in BEST.items()} | {"none": None}


def measure(
    *,
    images: int,
    steps: int,
    work_dir: Path,
    train_steps: int = TRAIN_STEPS,
    who: Sequence[str] = ("teacher", "student"),
) -> list[dict[str, Any]]:
    """All rows of the table; what is not in `work_dir` is trained first.

    Args:
        images: per cell.
        steps: of the teacher, for one image.
        work_dir: of instance images, class images and what was trained.
        train_steps: of each training.
        who: which generators.
    """
    folders = trained(train_steps, Path(work_dir))
    names = {"teacher": f"teacher, {steps} steps", "student": STUDENT}
    return [
        row for g in (names[each] for each in who) for s in SETTINGS for row in cell(g, s, folders[s], images, steps)
    ]


def search(method: str, images: int, train_steps: int, work_dir: Path) -> list[dict[str, Any]]:
    """Each learning rate of the grid, by other prompts than the table's and 20 steps of the teacher."""
    rows = []
    for rate in GRID[method]:
        folder, prompts = train(method, rate, train_steps, work_dir), world.subject_prompts(images, seed=1)
        found = {"method": method, "learning_rate": rate, "steps": train_steps}
        for generator in ("teacher, 20 steps", STUDENT):
            pipe = load(generator, method, folder)
            values = judge(generate(pipe, generator, [prompt.text() for prompt in prompts], steps=20), prompts)
            found |= {f"{generator}: {name}": round(value, 3) for name, value in values.items()}
        print(json.dumps(found), flush=True)
        rows.append(found)
    return rows


def save_picture(folders: dict[str, Path | None], file: Path, columns: int = 8) -> None:
    """Rows: what was learned from; then the same prompts and seeds by the teacher and by the student in one step."""
    prompts = [prompt.text() for prompt in world.subject_prompts(columns, seed=2)]
    instances = sorted((folders["lorad"].parent / "instances").iterdir())
    learned = [np.asarray(Image.open(instances[i % len(instances)])) for i in range(columns)]
    for i in range(len(instances), columns):
        learned[i] = np.full_like(learned[0], 255)
    rows = [np.concatenate(learned, axis=1)]
    for generator in ("teacher, 50 steps", STUDENT):
        pipe = load(generator, "lorad", folders["lorad"])
        rows.append(np.concatenate(list(generate(pipe, generator, prompts)), axis=1))
    Image.fromarray(np.concatenate(rows)).resize((96 * columns, 96 * len(rows)), Image.Resampling.LANCZOS).save(file)
    print(prompts)


def run_at_real_size(random_sd15: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Two updates of a LoRaD of rank 64 at 512 pixels, then the subject over a one-step LoRaD; random weights.

    Args:
        random_sd15: makes the components, see `real_size.py`.
    """
    with TemporaryDirectory() as name:
        work = Path(name)
        StableDiffusionPipeline(**random_sd15(torch.bfloat16)).save_pretrained(work / "base")
        (work / "instances").mkdir()
        Image.new("RGB", (640, 512), "orange").save(work / "instances" / "0.png")
        flags = ["--pretrained_model_name_or_path", work / "base", "--instance_data_dir", work / "instances"]
        flags += ["--instance_prompt", "a sks star", "--output_dir", work / "out", "--gradient_checkpointing"]
        flags += ["--max_train_steps", 2, "--logging_steps", 1, "--checkpointing_steps", 1000]
        trainer = DreamBoothTrainer(training_script().parse_args([str(flag) for flag in flags]))
        start = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - start) / 2
        count = sum(p.numel() for p in trainer.model.parameters.values())
        del trainer
        image = _stacked_image(work)
    return {"parameters": count, "seconds_per_update": round(seconds, 1), "image": list(image.size)}


def _stacked_image(work: Path):
    """One step of the base in `work` with a LoRaD in the student's place, still at no angle, and the subject."""
    pipe = WaDiPipeline.from_pretrained(work / "base", dtype=torch.float32)
    pipe.unet.add_adapter(LoRaDConfig(r=64), adapter_name="student")
    save_lorad_adapter(pipe.unet, work / "student", "student", base_model_name_or_path=str(work / "base"))
    del pipe
    pipe = WaDiPipeline.from_pretrained(work / "student", dtype=torch.float32)
    load_subject(pipe, work / "out", 0.8)
    assert len(pipe.get_active_adapters()) == 2
    return pipe("a sks star").images[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=240, help="Per cell. Default: 240.")
    parser.add_argument("--steps", type=int, default=50, help="Of the teacher. Default: 50.")
    parser.add_argument("--train_steps", type=int, default=TRAIN_STEPS, help=f"Default: {TRAIN_STEPS}.")
    parser.add_argument("--work_dir", required=True, help="For what is trained.")
    parser.add_argument("--grid", nargs="+", choices=tuple(GRID), help="Only try these methods' learning rates.")
    parser.add_argument("--picture", help="PNG file for images of the subject.")
    parser.add_argument("--output", help="JSON file for the rows.")
    args = parser.parse_args()
    work_dir = Path(args.work_dir)
    if args.grid:
        rows = [row for method in args.grid for row in search(method, args.images, args.train_steps, work_dir)]
    else:
        rows = measure(images=args.images, steps=args.steps, work_dir=work_dir, train_steps=args.train_steps)
        for row in rows:
            print(json.dumps(row), flush=True)
    if args.picture:
        save_picture(trained(args.train_steps, work_dir), Path(args.picture))
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
