"""The flags of `wadi evaluate`."""

from __future__ import annotations

import argparse
from typing import Any

from diffusers_wadi.cli._flags import DTYPES, positive

METRIC_OPTIONS = (
    "reference",
    "image_size",
    "inception_weights",
    "clip_model",
    "clip_pretrained",
    "clip_weights",
    "hps_version",
    "hps_weights",
)
METRICS = "fid, precision_recall, clip_score, hpsv2, shapes"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All of them, in groups. Those with an underscore may be spelt with hyphens."""
    _add_model(parser.add_argument_group("model"))
    _add_images(parser.add_argument_group("images"))
    _add_metrics(parser.add_argument_group("metrics"))
    _add_latency(parser.add_argument_group("latency"))


class OneSpelling(argparse.HelpFormatter):
    """Shows --a_b and not also --a-b, which is taken as well."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        all_names, action.option_strings = action.option_strings, shown
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = all_names


def _add(group: Any, name: str, *more: str, **options: Any) -> None:
    spellings = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
    group.add_argument(*more, *spellings, **options)


def _add_model(group: Any) -> None:
    place = "complete checkpoint or LoRaD adapter, folder or Hub name; without it the bundled checkpoint"
    group.add_argument(
        "model", nargs="?", metavar="MODEL", help=f"{place}. With --preset, in the place of its pipeline"
    )
    _add(group, "preset", metavar="NAME", help="a published model with its own settings; --list_presets")
    _add(group, "list_presets", action="store_true", help="list them and stop")
    _add(
        group, "preset_weights", metavar="FILE", help="in the place of the preset's LoRA or UNet, which is downloaded"
    )
    _add(group, "base_model", help="base of an adapter; without it the one that the adapter names")
    _add(group, "num_inference_steps", type=positive, metavar="N", help="without it the preset's; of an adapter 1")
    _add(group, "guidance_scale", type=float, metavar="W", help="without it the preset's; of an adapter 1")
    _add(group, "device", help="such as cpu, cuda or cuda:1; without it the GPU if there is one")
    _add(group, "dtype", choices=DTYPES, help="number format; without it float16 on a GPU, float32 on the CPU")


def _add_images(group: Any) -> None:
    sources = "captions_val2014.json of COCO, the folder of the HPSv2 prompts, a .txt, .json or .jsonl, or shapes"
    _add(group, "prompts", metavar="SOURCE", help=f"{sources} (default)")
    _add(
        group, "num_prompts", type=positive, metavar="N", help="a sample; without it all, of COCO 30000, of shapes 512"
    )
    _add(group, "prompt_seed", type=int, default=0, metavar="N", help="of the sample, default %(default)s")
    _add(group, "output_dir", "-o", metavar="DIR", help="for the images and results; taken up if it was begun")
    _add(group, "batch_size", type=positive, default=8, metavar="N", help="images at once, default %(default)s")
    _add(group, "resolution", type=positive, metavar="PIXELS", help="height and width; without it the model's")
    _add(group, "images_per_prompt", type=positive, default=1, metavar="N", help="default %(default)s")
    _add(group, "seed", type=int, default=0, metavar="N", help="of the noise, default %(default)s")
    _add(group, "images", metavar="DIR", help="measure images that are there; nothing is drawn")


def _add_metrics(group: Any) -> None:
    _add(group, "metrics", nargs="*", metavar="METRIC", help=f"of {METRICS}; default: shapes with the prompts shapes")
    _add(group, "reference", metavar="DIR", help="real images for fid and precision_recall; fid also takes an .npz")
    _add(group, "image_size", type=positive, metavar="PIXELS", help="resize both to this before fid, such as 256")
    _add(group, "inception_weights", metavar="FILE", help="in the place of the download, as are the next ones")
    _add(group, "clip_model", metavar="NAME", help="of open_clip; default ViT-bigG-14")
    _add(group, "clip_pretrained", metavar="TAG", help="its weights in open_clip; without it those of LAION-2B")
    _add(group, "clip_weights", metavar="FILE", help="of that model")
    _add(group, "hps_version", choices=("v2.0", "v2.1"), help="of HPSv2; without it v2.0")
    _add(group, "hps_weights", metavar="FILE", help="of HPSv2")
    _add(group, "collect", nargs="+", metavar="DIR", help="put the results of these folders into one table, and stop")
    _add(group, "name", help="of the row in the table; without it the preset's or model's")


def _add_latency(group: Any) -> None:
    _add(group, "latency", action="store_true", help="time whole calls, from prompt to pixels")
    _add(group, "latency_batch_sizes", nargs="+", type=positive, default=[1], metavar="N", help="default 1")
    _add(
        group,
        "latency_repeats",
        type=positive,
        default=20,
        metavar="N",
        help="default %(default)s, after 3 to warm up",
    )
