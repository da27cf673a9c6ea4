#!/usr/bin/env python
"""ReVersion on Shapes World: does one step draw a relation that was learned as `<R>` on the multi-step teacher?

    python benchmarks/downstream_reversion.py --work_dir shapes-reversion --picture docs/images/reversion.png

Two relations for which the teacher has no word: "east of", another word for one that it has, and "beside", left of or right
of, for which it has none. `training/train_reversion.py` learns each from ten images, unless WORK_DIR has it, and the
one-step student takes the row unchanged. Prompts have pairs of things that no exemplar shows together. Before learning,
`<R>` has the row that it starts from, or a random one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from drawing import draw, seconds_per_image
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffusers_wadi import LoRaDConfig, WaDiPipeline, bundled_checkpoint, lorad_target_modules
from diffusers_wadi.shapes import Scene
from diffusers_wadi.shapes.relations import MEANINGS, judge_relation, prompt_of, relation_scenes, write_exemplars

SCRIPT = Path(__file__).parent.parent / "training" / "train_reversion.py"
WHO = ("teacher", "student")
EXEMPLARS, START, TRAIN_STEPS = 10, "on", 600
RELATIONS = tuple(MEANINGS)
BEFORE = ("before: row of 'on'", "before: random row")
SETTINGS = (*BEFORE, "learned")
# What differs from the script's recipe. The eight images of an update make one batch, since that is faster here; Shapes
# World's tokenizer has few prepositions of one token, and no "and"; rows of its words have norms of 0.34 to 0.56.
FLAGS = f"""--initializer_token {START} --positive_words left right above below on of --train_batch_size 8
--gradient_accumulation_steps 1 --lr_scheduler linear --max_embedding_norm 0.45""".split()


def generators(steps: int) -> dict[str, dict[str, Any]]:
    """Name -> how it draws: the teacher in so many steps, the student in one."""
    return {
        f"teacher, {steps} steps": {"adapter": False, "num_inference_steps": steps, "guidance_scale": 3.0},
        "student, 1 step": {"adapter": True, "num_inference_steps": 1, "guidance_scale": 1.0},
    }


def learned_row(work_dir: Path, steps: int, relation: str) -> Tensor:
    """The row in WORK_DIR, learned there first if need be."""
    name = relation.replace(" ", "-")
    exemplars, output = work_dir / f"{name}-exemplars", work_dir / name
    write_exemplars(exemplars, EXEMPLARS, relation=relation)
    if not (output / "learned_embeds.safetensors").is_file():
        teacher = str(bundled_checkpoint() / "teacher")
        paths = {"pretrained_model_name_or_path": teacher, "train_data_dir": exemplars, "output_dir": output}
        command = [sys.executable, str(SCRIPT), *FLAGS, "--max_train_steps", str(steps)]
        command += ["--num_threads", str(torch.get_num_threads()), "--resume_from_checkpoint", "latest"]
        subprocess.run([*command, *(part for n, path in paths.items() for part in (f"--{n}", str(path)))], check=True)
    return load_file(output / "learned_embeds.safetensors")["<R>"]


def unseen_scenes(n: int) -> list[Scene]:
    """Scenes whose two things stand together in no exemplar of any relation."""
    with tempfile.TemporaryDirectory() as folder:
        exemplars = [scene for name in RELATIONS for scene in write_exemplars(folder, EXEMPLARS, relation=name)]
    return relation_scenes(n, seed=1, without=exemplars)


def rows_before(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """Setting -> row of `<R>`. The random one is as long as the one that learning starts from."""
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    start = table[pipe.tokenizer(START, add_special_tokens=False).input_ids[0]]
    random = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0))
    return dict(zip(BEFORE, (start, random * start.norm() / random.norm())))


def pipeline_with(row: Tensor) -> WaDiPipeline:
    pipe = WaDiPipeline.from_pretrained(bundled_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    pipe.load_textual_inversion({"<R>": row.clone()})
    return pipe


def judged(images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of images that show the relation, and of those in which all else is right too."""
    verdicts = [judge_relation(image, scene) for image, scene in zip(images, scenes)]
    return {f"{name} right": float(np.mean([verdict[name] for verdict in verdicts])) for name in verdicts[0]}


def measure(
    *,
    images: int,
    steps: int,
    work_dir: Path,
    train_steps: int = TRAIN_STEPS,
    who: Sequence[str] = WHO,
    settings: Sequence[str] = SETTINGS,
    picture: Path | None = None,
) -> list[dict[str, Any]]:
    """One row for each relation, generator, setting and metric.

    Args:
        images: in each cell, each of another scene.
        steps: of the teacher, for one image.
        work_dir: where the learned rows are, or go.
        train_steps: of the learning, if they are not there.
        who, settings: of `WHO` and `SETTINGS`.
        picture: PNG to write, ten scenes wide.
    """
    work_dir = Path(work_dir)
    chosen = rows_before(WaDiPipeline.from_pretrained(bundled_checkpoint()))
    chosen = {setting: row for setting, row in chosen.items() if setting in settings}
    if "learned" in settings:
        chosen |= {relation: learned_row(work_dir, train_steps, relation) for relation in RELATIONS}
    unseen = unseen_scenes(images)
    prompts = [prompt_of(scene, "<R>") for scene in unseen]
    rows, shown = [], {}
    for name, row in chosen.items():
        pipe = pipeline_with(row)
        for generator, call in generators(steps).items():
            if generator.split(",")[0] not in who:
                continue
            shown[name, generator] = drawn = draw(pipe, prompts, **call)
            seconds = seconds_per_image(lambda: draw(pipe, prompts[:1], **call))  # noqa: B023
            cell = {"task": "reversion", "generator": generator, "images": images, "seconds_per_image": seconds}
            for relation in [name] if name in RELATIONS else RELATIONS:
                setting = f"{relation}, {'learned' if name in RELATIONS else name}"
                found = judged(drawn, [replace(scene, relation=relation) for scene in unseen])
                rows += [cell | {"setting": setting, "metric": metric, "value": v} for metric, v in found.items()]
                print(json.dumps(rows[-len(found) :]), file=sys.stderr, flush=True)
    if picture is not None:
        save_picture(work_dir, shown, picture)
    return rows


def save_picture(work_dir: Path, shown: dict[tuple[str, str], np.ndarray], path: Path) -> None:
    """A row for each cell, in order, under the exemplars where they are a relation's."""
    stacks, former = [], None
    for (name, _), drawn in shown.items():
        if name in RELATIONS and name != former:
            files = [work_dir / f"{name.replace(' ', '-')}-exemplars" / f"{k}.png" for k in range(EXEMPLARS)]
            stacks.append(np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]))
        stacks.append(drawn)
        former = name
    grid = np.concatenate([np.concatenate(list(stack[:EXEMPLARS]), axis=1) for stack in stacks], axis=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(grid).resize((EXEMPLARS * 80, len(stacks) * 80), Image.LANCZOS)
    picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def run_at_real_size(random_sd15: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Two updates at 512x512 pixels on a model of Stable Diffusion 1.5's size, random weights, then one step with `<R>`."""
    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        StableDiffusionPipeline(**random_sd15()).save_pretrained(work_dir / "model")
        write_exemplars(work_dir / "exemplars", n=2)
        paths = {"pretrained_model_name_or_path": "model", "train_data_dir": "exemplars", "output_dir": "learned"}
        small = "--train_batch_size 1 --gradient_accumulation_steps 1 --max_train_steps 2 --gradient_checkpointing"
        flags = [part for name, path in paths.items() for part in (f"--{name}", str(work_dir / path))]
        sys.path.insert(0, str(SCRIPT.parent))
        from train_reversion import ReversionTrainer, parse_args

        trainer = ReversionTrainer(parse_args([*flags, *FLAGS, *small.split()]))
        start, former = time.perf_counter(), trainer.row.detach().clone()
        trainer.train()
        seconds, moved = (time.perf_counter() - start) / 2, (trainer.row.detach() - former).norm().item()
        del trainer
        pipe = WaDiPipeline.from_pretrained(work_dir / "model")
        targets = lorad_target_modules(pipe.unet, role="student")
        pipe.unet.add_adapter(LoRaDConfig(r=64, target_modules=targets), adapter_name="student")
        pipe.load_textual_inversion(work_dir / "learned")
        image = pipe("a red ring <R> a blue heart", output_type="np").images
        return {
            "image": list(image.shape),
            "finite": bool(np.isfinite(image).all()),
            "dtype": str(pipe.unet.dtype).removeprefix("torch."),
            "row": list(load_file(work_dir / "learned" / "learned_embeds.safetensors")["<R>"].shape),
            "row_moved_by": round(moved, 4),
            "seconds_per_update": round(seconds, 1),
        }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as one table, a line for each generator and setting."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    lines = ["| | `<R>` | " + " | ".join([*metrics, "seconds an image"]) + " |", "|---" * (len(metrics) + 3) + "|"]
    cells: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        cells.setdefault((row["generator"], row["setting"]), {})[row["metric"]] = row
    for (generator, setting), found in cells.items():
        values = [f"{found[metric]['value']:.1%}" for metric in metrics]
        seconds = f"{found[metrics[0]]['seconds_per_image']:.3f}"
        lines.append("| " + " | ".join([generator, setting, *values, seconds]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", required=True, help="Where the learned row is, or goes.")
    parser.add_argument("--images", type=int, default=200, help="In each cell. Default: 200.")
    parser.add_argument("--steps", type=int, default=50, help="Of the teacher. Default: 50.")
    parser.add_argument("--train_steps", type=int, default=TRAIN_STEPS, help="Of learning. Default: 600.")
    parser.add_argument("--who", nargs="+", choices=WHO, default=list(WHO))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--picture", help="PNG to write.")
    parser.add_argument("--num_threads", type=int, help="CPU threads. Default: torch's choice.")
    args = parser.parse_args()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    rows = measure(
        images=args.images,
        steps=args.steps,
        work_dir=Path(args.work_dir),
        train_steps=args.train_steps,
        who=args.who,
        settings=args.settings,
        picture=Path(args.picture) if args.picture else None,
    )
    print(json.dumps(rows, indent=1))
    print(markdown(rows))


if __name__ == "__main__":
    main()
