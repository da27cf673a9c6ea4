"""`wadi generate`: images from prompts, in one step."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from diffusers_wadi._files import writable_folder
from diffusers_wadi._images import save_image
from diffusers_wadi.cli._flags import DTYPES, positive, quiet_libraries, torch_device

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="draw images from prompts, in one step",
        description="Draw images from prompts, in one step.",
    )
    add = generate.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help="what to draw; several prompts give several images")
    add(
        "-o",
        "--output",
        default="wadi.png",
        help="image file, default %(default)s; several images get -0, -1, ...; or folder/",
    )
    add("--seed", type=int, default=0, help="seed of the first image, default %(default)s; the others count up")
    add("--num-images", type=positive, default=1, help="images per prompt, default %(default)s")
    add("--model", help="complete checkpoint or LoRaD adapter, folder or Hub name; without it the bundled checkpoint")
    add("--base-model", help="base of an adapter, folder or Hub name; without it the one that the adapter names")
    add("--device", help="such as cpu, cuda or cuda:1; without it the GPU if there is one")
    add("--dtype", choices=DTYPES, help="number format; without it float16 on a GPU, float32 on the CPU")
    add("--height", type=positive, help="height in pixels, a multiple of 8; without it the model's")
    add("--width", type=positive, help="width in pixels, a multiple of 8; without it the model's")
    add("--image", help="condition image, for a checkpoint with a ControlNet and for it alone")
    advice = "Use a smaller size, fewer --num-images or --dtype float16."
    generate.set_defaults(run=_generate, memory_advice=advice)


def _generate(args: argparse.Namespace) -> None:
    # Everything that can be wrong with the request is found out before the slow part, which is importing and loading.
    count = len(args.prompts) * args.num_images
    _check_seeds(args.seed, count)
    _check_size(args.height, args.width)
    paths = _output_paths(args.output, count)
    condition = None if args.image is None else _open_image(args.image)
    pipe, model = _load(args)
    _check_condition(pipe, condition, model)
    control = {} if condition is None else {"image": condition}
    for number, prompt in enumerate(args.prompts):
        first = number * args.num_images
        batch = paths[first : first + args.num_images]
        _draw(pipe, prompt, args.seed + first, batch, args, model, control)


def _output_paths(output: str, count: int) -> list[Path]:
    """The files to write, in a folder that exists and is writable when this returns."""
    path = Path(output)
    if output.endswith(("/", "\\")) or path.is_dir():
        path = path / "wadi.png"
        numbered = True
    else:
        numbered = count > 1
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(
            f"cannot write {output!r}: expected a file ending in {', '.join(IMAGE_SUFFIXES)}, or a folder/"
        )
    writable_folder(path.parent)
    return [path.with_stem(f"{path.stem}-{i}") for i in range(count)] if numbered else [path]


def _check_seeds(first: int, count: int) -> None:
    lowest, highest = -(2**63), 2**64 - 1  # what torch.Generator takes
    if first < lowest or first + count - 1 > highest:
        raise ValueError(f"--seed {first} with {count} images leaves the range {lowest} to {highest}")


def _check_size(height: int | None, width: int | None) -> None:
    if (height is None) != (width is None):
        raise ValueError("--height and --width go together; give both or neither")
    if height is not None and (height % 8 or width % 8):
        raise ValueError(f"--height and --width must be multiples of 8, got {height} and {width}")


def _load(args: argparse.Namespace) -> tuple[Any, str]:
    start = time.perf_counter()
    import torch

    from diffusers_wadi.pipelines import one_step_pipeline_class
    from diffusers_wadi.shapes import bundled_checkpoint

    quiet_libraries()
    device = torch_device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "float16"))
    model = args.model or str(bundled_checkpoint())
    cls = one_step_pipeline_class(model, base_model=args.base_model)
    pipe = cls.from_pretrained(model, base_model=args.base_model, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    name = args.model or "the bundled checkpoint"
    took = time.perf_counter() - start
    print(f"loaded {name} ({str(dtype).removeprefix('torch.')} on {device}) in {took:.1f} s")
    return pipe, name


def _open_image(file: str) -> Any:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:  # PIL's for what is no image, too
        raise ValueError(f"--image {file} cannot be read as an image: {error}") from error


def _check_condition(pipe: Any, condition: Any, model: str) -> None:
    controlled = hasattr(pipe, "controlnet")
    if controlled and condition is None:
        raise ValueError(f"{model} has a ControlNet, which draws after a condition image; give one with --image FILE")
    if condition is not None and not controlled:
        raise ValueError(f"{model} has no ControlNet that would look at --image; leave it out")


def _draw(
    pipe: Any, prompt: str, seed: int, paths: list[Path], args: argparse.Namespace, model: str, control: dict[str, Any]
) -> None:
    import torch

    start = time.perf_counter()
    # On the CPU whatever the device, so that a seed means the same image everywhere.
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(paths))]
    size = {"height": args.height, "width": args.width}
    images = pipe(prompt, num_images_per_prompt=len(paths), generator=generators, **size, **control).images
    took = time.perf_counter() - start
    for i, (image, path) in enumerate(zip(images, paths)):
        save_image(image, path, {"prompt": prompt, "seed": str(seed + i), "model": model})
        print(f"wrote {path} (seed {seed + i})")
    print(f"drew {len(paths)} of {prompt!r} in {took:.2f} s")
