"""`wadi analyze` and `wadi swap`: what changed in the weights, and what each part of the change does."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from diffusers_wadi._files import writable_folder
from diffusers_wadi.cli._flags import DTYPES, give_back_freed_memory, name_list, quiet_libraries, torch_device

_MEMORY = "Use a machine with more memory, or --device cpu."
_ROWS = 12  # of the layers on the screen; the file has all
_SOURCES = (
    "pipeline, folder of a model, adapter (LoRaD, LoRA, DoRA), file, Hub name, or ORG/NAME/file.safetensors of it"
)


def add_analyze(commands: Any) -> None:
    about = (
        "Measure what distillation or fine-tuning did to the weights, as in the WaDi paper (Eq. 13-17, Fig. 2): change of "
        "norms and of directions, the rank of the change, and how much of it is a rotation in LoRaD's planes."
    )
    analyze = commands.add_parser("analyze", help="say what changed between two models", description=about)
    add = analyze.add_argument
    add("base", metavar="BASE", help=_SOURCES)
    add(
        "tuned",
        metavar="TUNED",
        nargs="+",
        help="likewise; an adapter is put onto BASE. Several are compared with BASE",
    )
    add("-o", "--output", "--output_dir", "--output-dir", metavar="FOLDER", help="for JSON, CSV and figures")
    add("--names", nargs="+", metavar="NAME", help="of TUNED, in tables and figures; without it by the paths")
    add("--layers", choices=("all", "linear", "convolution"), default="all", help="default %(default)s")
    add("--target-modules", metavar="NAMES", help="weights to compare, separated by commas")
    add("--exclude-modules", metavar="NAMES", help="weights to leave out, separated by commas")
    _add_common(add)
    add("--no-energies", action="store_true", help="leave out the singular values of the change")
    add("--no-figures", action="store_true", help="write JSON and CSV alone; figures need matplotlib")
    add("--figure-format", choices=("png", "pdf", "svg"), default="png", help="default %(default)s")
    add("--device", default="cpu", help="where to compute, default %(default)s")
    analyze.set_defaults(run=_analyze, memory_advice=_MEMORY)


def add_swap(commands: Any) -> None:
    about = (
        "Write BASE with the directions (or norms) of TUNED's weights as a checkpoint that runs: what the one part of the "
        "change does without the other (Fig. 2c)."
    )
    swap = commands.add_parser("swap", help="put norms or directions of one model into another", description=about)
    add = swap.add_argument
    add("base", metavar="BASE", help=_SOURCES)
    add("tuned", metavar="TUNED", help="likewise; an adapter is put onto BASE")
    add("-o", "--output", required=True, help="folder to write; FILE.safetensors for the weights alone")
    add("--take", choices=("direction", "norm", "both"), default="direction", help="from TUNED, default %(default)s")
    add("--rest", choices=("base", "tuned"), help="whose biases and norm layers; without it BASE's, TUNED's with both")
    _add_common(add)
    add("--dtype", choices=DTYPES, help="number format to write; without it that of BASE")
    swap.set_defaults(run=_swap, memory_advice=_MEMORY)


def _add_common(add: Any) -> None:
    vectors = "what the norms and directions are of: column, a vector per output unit, as in the paper; row, per input"
    add("--convention", choices=("column", "row"), default="column", help=f"{vectors}. Default %(default)s")
    add("--base-model", help="checkpoint to put adapters on; without it BASE, or what BASE names if it is an adapter")
    add("--subfolder", help="folder of the model inside BASE and TUNED; of a pipeline unet or transformer")
    add("--variant", help="such as fp16: of the files")


def _analyze(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    labels = _labels(args)
    if args.output:
        writable_folder(args.output)
        if not args.no_figures:
            from diffusers_wadi._optional import require

            require("matplotlib", "analysis")  # before the long work
    from diffusers_wadi.analysis import analyze_weights, save_analyses, save_figures

    quiet_libraries()
    give_back_freed_memory()
    analyses = []
    for source, label in zip(args.tuned, labels):
        analysis = analyze_weights(
            args.base,
            source,
            convention=args.convention,
            layers=args.layers,
            target_modules=name_list(args.target_modules),
            exclude_modules=name_list(args.exclude_modules),
            energies=not args.no_energies,
            base_model=args.base_model,
            subfolder=args.subfolder,
            variant=args.variant,
            device=torch_device(args.device),
            label=label,
            progress=_progress(label),
        )
        analyses.append(analysis)
        print(f"{analysis.base} -> {analysis.tuned}\n\n{analysis.table()}\n\n{analysis.layer_table(_ROWS)}")
        print(f"\n{analysis.summary()}\n")
    if args.output:
        paths = save_analyses(analyses, args.output)
        paths += [] if args.no_figures else save_figures(analyses, args.output, [args.figure_format])
        print(f"wrote {', '.join(path.name for path in paths)} to {args.output}")
    print(f"compared in {time.perf_counter() - start:.1f} s")


def _swap(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    import torch

    from diffusers_wadi.analysis import swap_weights

    quiet_libraries()
    give_back_freed_memory()
    path = swap_weights(
        args.base,
        args.tuned,
        args.output,
        take=args.take,
        rest=args.rest,
        convention=args.convention,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        base_model=args.base_model,
        subfolder=args.subfolder,
        variant=args.variant,
        progress=_progress("swap"),
    )
    what = {"direction": "the directions", "norm": "the norms", "both": "all weights"}[args.take]
    print(f"wrote {path}: {args.base} with {what} of {args.tuned}, in {time.perf_counter() - start:.1f} s")


def _labels(args: argparse.Namespace) -> list[str]:
    """A short name for every TUNED: as given, else the last part of its path that tells it from the others."""
    if args.names is not None:
        if len(args.names) != len(args.tuned) or len(set(args.names)) != len(args.names):
            raise ValueError(
                f"--names: expected {len(args.tuned)} different names, one for each TUNED, got {args.names}"
            )
        return args.names
    labels = [Path(source).stem if source.endswith(".safetensors") else Path(source).name for source in args.tuned]
    return labels if len(set(labels)) == len(labels) else list(args.tuned)


def _progress(label: str) -> Any:
    from tqdm import tqdm

    # Nothing where nobody looks, as in a file or a test.
    return lambda names: tqdm(names, desc=label, unit="tensor", leave=False, disable=None)
