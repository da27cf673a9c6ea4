"""`wadi evaluate`: images for a prompt set, their metrics, and the time that one takes."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from diffusers_wadi._files import writable_folder
from diffusers_wadi.cli._evaluate_flags import METRIC_OPTIONS, METRICS, OneSpelling, add_flags
from diffusers_wadi.cli._flags import quiet_libraries, torch_device

_MEMORY = "Use a smaller --batch_size, a smaller --resolution or --dtype float16."
_OF_GENERATION = (
    "model",
    "preset",
    "prompts",
    "num_prompts",
    "resolution",
    "num_inference_steps",
    "guidance_scale",
    "latency",
)


def add_evaluate(commands: Any) -> None:
    about = (
        "Draw the images of a prompt set with any text-to-image pipeline of diffusers, measure them, and write a table. "
        "A run that was stopped goes on where it was. On several GPUs: accelerate launch -m diffusers_wadi.cli evaluate ..."
    )
    evaluate = commands.add_parser(
        "evaluate", help="measure a model on a prompt set", description=about, formatter_class=OneSpelling
    )
    add_flags(evaluate)
    evaluate.set_defaults(run=_evaluate, memory_advice=_MEMORY)


def _evaluate(args: argparse.Namespace) -> None:
    if args.list_presets:
        _list_presets()
    elif args.collect:
        _collect(args)
    elif args.images:
        _measure_images(args)
    else:
        _refuse_without_results(args)
        _draw_and_measure(args)


def _refuse_without_results(args: argparse.Namespace) -> None:
    if not args.output_dir:
        raise ValueError(
            "give --output_dir, the folder for images and results (or --images, to measure what is there)"
        )
    writable_folder(args.output_dir)
    if args.latency and args.latency_repeats < 2:
        raise ValueError(f"--latency_repeats {args.latency_repeats}: expected at least 2, for the spread")


def _draw_and_measure(args: argparse.Namespace) -> None:
    from diffusers_wadi.evaluation import load_prompts
    from diffusers_wadi.evaluation.generation import process_state
    from diffusers_wadi.evaluation.metrics import check_metrics, compute_metrics

    quiet_libraries()
    model = _Model(args)
    prompts = load_prompts(args.prompts or "shapes", args.num_prompts, args.prompt_seed)
    metrics, options = _metrics(args)
    state = process_state()
    with state.main_process_first():  # which downloads what the others then find
        _check_prompts(metrics, prompts)
        check_metrics(metrics, options)
    pipe, folder = _drawn(args, model, prompts, state)
    state.destroy_process_group()
    if not state.is_main_process:
        return
    latency = _latency(pipe, prompts, args, model) if args.latency else None
    del pipe  # so that the networks of the metrics find room
    measured = compute_metrics(folder, metrics, options) if metrics else {}
    _report(args, model.name, folder, measured, latency, folder)


def _drawn(args: argparse.Namespace, model: _Model, prompts: Any, state: Any) -> tuple[Any, Path]:
    from diffusers_wadi.evaluation import generate_images

    say = print if state.is_main_process else _silent
    start = time.perf_counter()
    pipe = model.load(state)
    kind = f"{str(pipe.dtype).removeprefix('torch.')} on {pipe.device}"
    say(f"loaded {model.name} ({kind}) in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    folder = generate_images(
        pipe,
        prompts,
        args.output_dir,
        resolution=args.resolution,
        batch_size=args.batch_size,
        images_per_prompt=args.images_per_prompt,
        seed=args.seed,
        settings=model.settings,
        **model.call,
    )
    say(f"{len(prompts) * args.images_per_prompt} images are in {folder}, after {time.perf_counter() - start:.1f} s")
    return pipe, folder


class _Model:
    """What is asked for, before anything is loaded."""

    def __init__(self, args: argparse.Namespace) -> None:
        from diffusers_wadi.evaluation import preset

        self.args = args
        name = args.preset or (None if args.model else "shapes")
        self._refuse_without_effect(name)
        self.preset = None if name is None else preset(name)
        self.name = args.name or (self.preset.label if self.preset else Path(args.model).name)
        self.call = self._steps() | {"call": dict(self.preset.call) if self.preset else {}}
        self.settings: dict[str, Any] = {"model": self._place(), "preset": name}
        for option in ("preset_weights", "base_model"):
            if given := getattr(args, option):
                self.settings[option] = _resolved(given)

    def _refuse_without_effect(self, name: str | None) -> None:
        from diffusers_wadi.evaluation import PRESETS

        args = self.args
        if name is None and args.preset_weights:
            raise ValueError(
                "--preset_weights goes with --preset; a LoRaD adapter on another base is MODEL with --base_model"
            )
        if name is not None and args.base_model:
            raise ValueError(
                f"--base_model is for an adapter; with --preset {name} give the pipeline's folder as MODEL"
            )
        if args.model in PRESETS and not Path(args.model).exists():
            raise ValueError(f"{args.model} is no model but a preset: --preset {args.model}")

    def _place(self) -> str:
        if self.args.model:
            return _resolved(self.args.model)
        return f"bundled {self.preset.bundled}" if self.preset.bundled else self.preset.base

    def _steps(self) -> dict[str, Any]:
        from diffusers_wadi.evaluation.loading import is_adapter

        args = self.args
        if self.preset:
            defaults = (self.preset.num_inference_steps, self.preset.guidance_scale)
        elif is_adapter(args.model, args.base_model):
            defaults = (1, 1.0)
        elif args.num_inference_steps is None or args.guidance_scale is None:
            raise ValueError(
                f"{args.model} is a complete pipeline, which does not say how it is to be run: give --num_inference_steps and "
                "--guidance_scale (1 and 1 for a one-step model, such as 25 and 7.5 for a teacher)"
            )
        else:
            defaults = (args.num_inference_steps, args.guidance_scale)
        asked = (args.num_inference_steps, args.guidance_scale)
        names = ("num_inference_steps", "guidance_scale")
        return {name: own if given is None else given for name, given, own in zip(names, asked, defaults)}

    def load(self, state: Any) -> Any:
        import torch

        from diffusers_wadi.evaluation import load_pipeline, load_preset

        args = self.args
        device = state.device if args.device is None else torch_device(args.device)
        if state.num_processes > 1 and device.type == state.device.type:
            device = state.device  # one for each process
        dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "float16"))
        if self.preset:
            pipe = load_preset(self.preset, args.model, args.preset_weights, dtype)
        else:
            pipe = load_pipeline(args.model, args.base_model, dtype)
        return pipe.to(device)


def _resolved(place: str) -> str:
    """A folder's or file's whole path, so that it means the same in another folder; a Hub name as it is."""
    return str(Path(place).resolve()) if Path(place).exists() else place


def _silent(*_: Any) -> None:
    pass


def _metrics(args: argparse.Namespace) -> tuple[list[str], Any]:
    from diffusers_wadi.evaluation.metrics import MetricOptions

    metrics = args.metrics
    if metrics is None:
        metrics = ["shapes"] if (args.prompts or "shapes") == "shapes" and not args.images else []
    given = {name: value for name in (*METRIC_OPTIONS, "device") if (value := getattr(args, name)) is not None}
    return metrics, MetricOptions(**given)


def _check_prompts(metrics: list[str], prompts: Any) -> None:
    if "shapes" in metrics:
        from diffusers_wadi.shapes import parse_caption

        for text in prompts.texts:
            parse_caption(text)


def _latency(pipe: Any, prompts: Any, args: argparse.Namespace, model: _Model) -> Any:
    from diffusers_wadi.evaluation import measure_latency

    sizes = {"batch_sizes": args.latency_batch_sizes, "repeats": args.latency_repeats}
    latency = measure_latency(pipe, prompts.texts, resolution=args.resolution, **sizes, **model.call)
    print(f"latency on {latency.device}, {latency.dtype}")
    print("\n".join(f"  {line}" for line in latency.lines()))
    return latency


def _measure_images(args: argparse.Namespace) -> None:
    from diffusers_wadi.evaluation.metrics import compute_metrics

    given = [f"--{name}" if name != "model" else "MODEL" for name in _OF_GENERATION if getattr(args, name)]
    if given:
        raise ValueError(f"--images measures what is there, so {', '.join(given)} would have no effect; leave it out")
    metrics, options = _metrics(args)
    if not metrics:
        raise ValueError(f"--images needs --metrics, some of {METRICS}")
    name = args.name or Path(args.images).resolve().name
    # Nothing is written among images that somebody else made, unless asked to.
    folder = args.output_dir or (args.images if Path(args.images, "settings.json").is_file() else None)
    _report(args, name, args.images, compute_metrics(args.images, metrics, options), None, folder)


def _report(
    args: argparse.Namespace, name: str, images: str | Path, metrics: dict[str, Any], latency: Any, folder: Any
) -> None:
    """Show and write a row; what was measured before on the same images stays in it."""
    row: dict[str, Any] = (
        _read_json(Path(folder, "results.json")).get("rows", [{}])[0]
        if folder and Path(folder) == Path(images)
        else {}
    )
    used = {option: getattr(args, option) for option in METRIC_OPTIONS if getattr(args, option) is not None}
    row = {
        "name": args.name or row.get("name", name),
        "metrics": row.get("metrics", {}) | metrics,
        "options": row.get("options", {}) | {metric: used for metric in metrics},
        "latency": latency.as_dict() if latency else row.get("latency"),
        "settings": _read_json(Path(images, "settings.json")),
    }
    if metrics or latency:
        _show([row], folder)


def _show(rows: list[dict[str, Any]], folder: Any) -> None:
    from diffusers_wadi.evaluation.table import results_table, write_results

    print(f"\n{results_table(rows)}")
    if folder:
        print(f"wrote {', '.join(path.name for path in write_results(rows, folder))} to {folder}")


def _collect(args: argparse.Namespace) -> None:
    rows = []
    for folder in args.collect:
        found = _read_json(Path(folder, "results.json")).get("rows")
        if not found:
            raise ValueError(f"--collect {folder}: no results.json of wadi evaluate there")
        rows += found
    _show(rows, args.output_dir)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _list_presets() -> None:
    from diffusers_wadi.evaluation import PRESETS, UNSUPPORTED

    for name, preset in PRESETS.items():
        steps = f"{preset.num_inference_steps} step{'' if preset.num_inference_steps == 1 else 's'}"
        print(
            f"{name:<16}{preset.label}: {steps}, guidance {preset.guidance_scale:g}{'; ' * bool(preset.note)}{preset.note}"
        )
    print("\nnot supported:")
    for name, reason in UNSUPPORTED.items():
        print(f"{name:<16}{reason}")
