"""`wadi fuse`, `wadi extract` and `wadi export`: from one kind of checkpoint to another."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from diffusers_wadi._files import writable_folder
from diffusers_wadi.cli._flags import (
    DTYPES,
    name_list,
    positive,
    quiet_libraries,
    torch_device,
)

_MEMORY = "Use a machine with more memory, or --device cpu."
_ROWS = 8  # of each table on the screen; the report file has all


def add_fuse(commands: Any) -> None:
    about = "Write an adapter and its base as one complete checkpoint of stock classes, which plain diffusers loads."
    fuse = commands.add_parser("fuse", help="make an adapter a complete checkpoint", description=about)
    _add_model(fuse)
    fuse.add_argument("-o", "--output", required=True, help="folder to write")
    fuse.set_defaults(run=_fuse, memory_advice=_MEMORY)


def add_extract(commands: Any) -> None:
    about = "Find the LoRaD adapter between a base and what fine-tuning or distillation made of it, and say what it explains."
    extract = commands.add_parser("extract", help="get an adapter out of a checkpoint", description=about)
    add = extract.add_argument
    add("base", metavar="BASE", help="the base: pipeline, folder of a model, .safetensors file, or Hub name")
    add("tuned", metavar="TUNED", help="the checkpoint made from it, likewise")
    add("-o", "--output", required=True, help="adapter folder to write, with a report beside the weights")
    _add_rank(add, "the angles")
    add("--subfolder", help="folder of the model inside BASE and TUNED; of a pipeline unet or transformer")
    add("--variant", help="such as fp16: of the files of both")
    add(
        "--target-modules", metavar="NAMES", help="layers to adapt, separated by commas; without it every Linear layer"
    )
    add("--exclude-modules", metavar="NAMES", help="layers to leave alone, separated by commas")
    add("--convolutions", action="store_true", help="adapt convolutions too")
    add("--base-model", help="base to name in the adapter, folder or Hub name; without it BASE if it is a pipeline")
    add("--dtype", choices=DTYPES, help="number format of the file; without it float32")
    add("--device", default="cpu", help="where to compute, default %(default)s")
    extract.set_defaults(run=_extract, memory_advice=_MEMORY)


def add_export(commands: Any) -> None:
    about = (
        "Write a one-step checkpoint as one .safetensors file in the original Stable Diffusion layout, as ComfyUI, A1111 "
        "and from_single_file read it; or, with --lora, an adapter as an ordinary LoRA."
    )
    export = commands.add_parser("export", help="write for other programs", description=about)
    _add_model(export)
    add = export.add_argument
    add("-o", "--output", required=True, help="file.safetensors to write; with --lora also a folder/")
    add("--text-encoder", choices=("auto", "sd1", "sd2"), help="layout of the text encoder; without it by the UNet")
    add("--lora", action="store_true", help="write a LoRA in place of a checkpoint")
    _add_rank(add, "the change of the weights, with --lora")
    add("--layout", choices=("diffusers", "kohya"), help="names in the LoRA; without it diffusers")
    export.set_defaults(run=_export, memory_advice=_MEMORY)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="LoRaD adapter or complete checkpoint, folder or Hub name")
    add("--base-model", help="base of an adapter, folder or Hub name; without it the one that the adapter names")
    add("--weight-name", help="file of the adapter's weights, where it has another than the usual name")
    add("--subfolder", help="folder inside MODEL")
    add("--scale", type=float, default=1.0, help="factor on the angles, default %(default)s; 0 gives the base")
    add("--dtype", choices=DTYPES, help="number format to write; without it float32. All arithmetic is float32")


def _add_rank(add: Any, of: str) -> None:
    add("--rank", type=positive, help="rank of every layer, or the highest one with --energy")
    add("--energy", type=float, help=f"share, such as 0.9, of {of} for each layer's rank to hold")


def _fuse(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    _check_output(args.output, folder=True)
    pipe = _load(args)
    _fuse_in_place(pipe, args)
    _cast(pipe, _dtype(args.dtype))
    pipe.save_pretrained(args.output)
    print(f"wrote the complete checkpoint {args.output} in {time.perf_counter() - start:.1f} s")


def _extract(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    _need_rank(args)
    _check_output(args.output, folder=True)
    from diffusers_wadi.conversion import extract_lorad

    found = extract_lorad(
        args.base,
        args.tuned,
        rank=args.rank,
        energy=args.energy,
        target_modules=name_list(args.target_modules),
        exclude_modules=name_list(args.exclude_modules),
        convolutions=args.convolutions,
        subfolder=args.subfolder,
        variant=args.variant,
        device=torch_device(args.device),
    )
    print(f"{found.report.table(_ROWS)}\n\n{found.report.summary()}")
    path = found.save(args.output, args.base_model, dtype=_dtype(args.dtype))
    print(f"wrote {path} and its report in {time.perf_counter() - start:.1f} s")
    if not (args.base_model or found.config.base_model_name_or_path):
        print("it names no base model; load it with --base-model, or pass --base-model here")


def _export(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    if args.lora:
        _need_rank(args)
        _refuse_flags("--lora does not take", args, "text_encoder")
        _check_output(args.output, folder=Path(args.output).suffix != ".safetensors")
    else:
        _refuse_flags("only --lora takes", args, "rank", "energy", "layout")
        if Path(args.output).suffix != ".safetensors":
            raise ValueError(f"cannot write {args.output!r}: expected a file ending in .safetensors, or --lora")
        _check_output(args.output)
    from diffusers_wadi.pipelines import WaDiPipeline

    pipe = _load(args, WaDiPipeline)  # the one whose files other programs read
    path = _export_lora(pipe, args) if args.lora else _export_checkpoint(pipe, args)
    print(f"wrote {path} in {time.perf_counter() - start:.1f} s")
    if not args.lora:
        print("settings: 1 step, CFG 1, first timestep 999 (trailing timesteps; sgm_uniform in ComfyUI)")


def _export_checkpoint(pipe: Any, args: argparse.Namespace) -> Path:
    from diffusers_wadi.conversion import export_single_file

    _fuse_in_place(pipe, args)
    return export_single_file(pipe, args.output, _dtype(args.dtype), args.text_encoder or "auto")


def _export_lora(pipe: Any, args: argparse.Namespace) -> Path:
    from diffusers_wadi.conversion import export_lora
    from diffusers_wadi.conversion.lora import LORA_WEIGHT_NAME

    names = _adapters(pipe)
    if not names:
        raise ValueError(
            f"{args.model} has no LoRaD adapter to make a LoRA of; `wadi extract` gets one out of a checkpoint"
        )
    pipe.set_adapters(names, [args.scale] * len(names))
    lora = export_lora(pipe.unet, args.rank, args.energy)
    print(f"{lora.report.table(_ROWS)}\n\n{lora.report.summary()}")
    target = Path(args.output)
    folder, name = (target.parent, target.name) if target.suffix == ".safetensors" else (target, LORA_WEIGHT_NAME)
    return lora.save(folder, name, _dtype(args.dtype), args.layout or "diffusers")


def _load(args: argparse.Namespace, pipeline_class: type | None = None) -> Any:
    """`pipeline_class` None: the one that fits the files."""
    import torch

    from diffusers_wadi.pipelines import one_step_pipeline_class

    quiet_libraries()
    source = {"base_model": args.base_model, "weight_name": args.weight_name, "subfolder": args.subfolder}
    cls = pipeline_class or one_step_pipeline_class(args.model, **source)
    # In float32 whatever is written: the weights are rounded once, after the rotation.
    return cls.from_pretrained(args.model, dtype=torch.float32, **source)


def _fuse_in_place(pipe: Any, args: argparse.Namespace) -> None:
    if _adapters(pipe):
        pipe.fuse_lorad(lorad_scale=args.scale)
        pipe.unload_lorad_weights()
    elif args.scale != 1:
        raise ValueError(
            f"{args.model} is a complete checkpoint without adapters: there is nothing for --scale to scale"
        )


def _cast(pipe: Any, dtype: Any) -> None:
    import torch

    for part in pipe.components.values():
        if dtype is not None and isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype)  # the models' own `to` warns of casts, which here is what was asked for


def _adapters(pipe: Any) -> list[str]:
    from diffusers_wadi.loaders import lorad_adapter_names

    return lorad_adapter_names(getattr(pipe, pipe.lorad_component))


def _need_rank(args: argparse.Namespace) -> None:
    if args.rank is None and args.energy is None:
        raise ValueError(
            "pass --rank (usual: 64 to 256) or --energy (such as 0.9), which chooses the rank of each layer"
        )
    if args.energy is not None and not 0 < args.energy <= 1:
        raise ValueError(f"--energy is a share, above 0 and at most 1, got {args.energy}")


def _refuse_flags(message: str, args: argparse.Namespace, *names: str) -> None:
    given = [name for name in names if getattr(args, name) is not None]
    if given:
        raise ValueError(f"{message} --{given[0].replace('_', '-')}")


def _check_output(output: str, folder: bool = False) -> None:
    """Find out before the long work whether `output` can be written; nothing is created yet."""
    target = Path(output)
    if target.exists() and target.is_dir() != folder:
        raise ValueError(
            f"cannot write {output!r}: it is a {'file' if folder else 'folder'} already; choose another name"
        )
    parent = target if folder else target.parent
    while not parent.exists():
        parent = parent.parent
    writable_folder(parent)


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)
