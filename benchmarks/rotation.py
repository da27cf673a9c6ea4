#!/usr/bin/env python
"""Rotated weights and their gradients against the plain formula and the copy bandwidth, and one layer's training step.

    python benchmarks/rotation.py --output_dir benchmarks/results

1. All layers of the SD 1.5 student (182 Linears, rank 256), each with weights and factors of its own: time and extra
   memory of W -> R and of (W, G) -> (dA, dB), for every way that this device has. "paper" is the formula as it is
   written, even and odd columns stacked, and autograd through it; "plain" is `rotate`, the same in fewer passes. "copy" is
   the floor: W is read and R is written, at the bandwidth measured here; "product" is the one matrix product A @ B
   that no way of computing angles can leave out.
2. One layer forward and backward, input gradient included, against PEFT's LoRA, DoRA and OFT, at the widths and token
   counts of SD 1.5 at 512 px. LoRA and DoRA have the same rank; OFT has PEFT's default block of 32 (for as many
   parameters as rank 256 it would be about as wide as the layer). "Kept" is what autograd holds between forward and
   backward, each storage once, parameters not counted.

All contenders are measured in turn, `--repeats` times; times are medians. Extra memory is the most bytes alive in tensors
that were made on the way, the result not counted.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import peft
import torch
from diffusers import UNet2DConditionModel
from live_bytes import PeakBytes, bytes_saved
from peft import LoraConfig, OFTConfig, inject_adapter_in_model
from torch import Tensor, nn
from training_step import SIZES

from diffusers_wadi.lorad import LoRaDConfig, lorad_target_modules
from diffusers_wadi.lorad.rotation import factor_gradients, rotation_backend, turn_weight

MB = 1e6
QUICK_UNET = {**SIZES["small"]["unet"], "block_out_channels": (32, 64, 64, 64)}
PLACES = ((320, 4096), (640, 1024), (1280, 256))  # width and tokens of SD 1.5's attention layers at 512 px
QUICK_PLACES = ((64, 32),)


def layer_shapes(unet: dict) -> Counter:
    """(out, in) -> how many layers of the student have this shape."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**unet)
    modules = dict(model.named_modules())
    return Counter(tuple(modules[name].weight.shape) for name in lorad_target_modules(model))


def problems(shapes: Counter, rank: int, dtype: torch.dtype, device: torch.device) -> dict:
    """For every shape one (W, A, B, G) per layer; the angles are those of a trained student, about 0.1 rad."""
    torch.manual_seed(0)
    made = {}
    for (out, size), count in shapes.items():
        one = lambda *shape, scale=1.0: torch.randn(*shape, device=device) * scale  # noqa: E731
        made[out, size] = [
            (one(out, size).to(dtype), one(out, rank), one(rank, size // 2, scale=0.1 / rank**0.5), one(out, size))
            for _ in range(count)
        ]
    return made


def paper_formula(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    theta = A @ B
    cos, sin, even, odd = theta.cos(), theta.sin(), W[:, 0::2], W[:, 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(1).to(W.dtype)


def paper_gradient(W: Tensor, A: Tensor, B: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    A, B = A.detach().requires_grad_(), B.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(paper_formula(W, A, B), (A, B), G.to(W.dtype))


def by(backend: str, function: Callable) -> Callable:
    def computed(*tensors: Tensor):
        with rotation_backend(backend):
            return function(*tensors)

    return computed


def ways(device: torch.device) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """Of the rotation (W, A, B) -> R, and of the gradient (W, A, B, G) -> (dA, dB)."""
    backends = ["plain", "chunked"] + (["triton"] if device.type == "cuda" else [])
    forward = {"copy": lambda W, A, B: torch.empty_like(W).copy_(W), "product": lambda W, A, B: A @ B}
    forward |= {"paper": paper_formula} | {name: by(name, turn_weight) for name in backends}
    gradient = lambda W, A, B, G: factor_gradients(W, G, A, B)  # noqa: E731
    return forward, {"paper": paper_gradient} | {name: by(name, gradient) for name in backends}


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_ways(ways: dict[str, Callable], made: dict, tensors: int, repeats: int, device: torch.device) -> dict:
    """For every way: median seconds of all layers, of those of every shape, and the extra bytes of the worst layer."""
    found = {name: {shape: [] for shape in made} for name in ways}
    for repeat in range(repeats + 1):
        for shape, layers in made.items():
            for name, way in ways.items():
                took = seconds_of(lambda way=way, layers=layers: one_by_one(way, layers, tensors), device)
                if repeat:  # the first round warms up
                    found[name][shape].append(took)
    rows = {}
    for name, shapes in found.items():
        medians = {f"{out}x{size}": statistics.median(times) for (out, size), times in shapes.items()}
        extra = {f"{out}x{size}": extra_bytes(ways[name], made[out, size][0][:tensors]) for out, size in made}
        rows[name] = {"seconds": sum(medians.values()), "shapes": medians, "extra": extra}
    return rows


def one_by_one(way: Callable, layers: list[tuple[Tensor, ...]], tensors: int) -> None:
    for problem in layers:
        way(*problem[:tensors])  # a result is gone before the next, as in the layers of a network


def extra_bytes(way: Callable, problem: tuple[Tensor, ...]) -> int:
    """Of all tensors alive at the worst moment, but for the arguments and the results."""
    with PeakBytes(*problem) as counted:
        result = way(*problem)
    results = result if isinstance(result, tuple) else (result,)
    return counted.peak - sum(tensor.untyped_storage().nbytes() for tensor in results)


def adapted_layers(width: int, rank: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, nn.Module]]:
    options = {"target_modules": ["layer"]}
    configs = {
        "LoRA": LoraConfig(r=rank, lora_alpha=rank, **options),
        "DoRA": LoraConfig(r=rank, lora_alpha=rank, use_dora=True, **options),
        "OFT": OFTConfig(oft_block_size=32, **options),
        "LoRaD": LoRaDConfig(r=rank, **options),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        model = nn.ModuleDict({"layer": nn.Linear(width, width)}).to(device).requires_grad_(False)
        inject_adapter_in_model(config, model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.01)  # as while training: no factor is zero any more
        base = model["layer"].get_base_layer()
        base.to(dtype)
        yield name, model["layer"].train()


def measure_layers(rank: int, places: tuple, repeats: int, dtype: torch.dtype, device: torch.device) -> list[dict]:
    rows = []
    for width, tokens in places:
        layers = dict(adapted_layers(width, rank, dtype, device))
        x = torch.randn(1, tokens, width, device=device, dtype=dtype).requires_grad_()
        upstream = torch.randn(1, tokens, width, device=device, dtype=dtype)

        def step(layer: nn.Module, x: Tensor = x, upstream: Tensor = upstream) -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                y = layer(x)
            y.backward(upstream.to(y.dtype))

        times: dict[str, list[float]] = {name: [] for name in layers}
        for repeat in range(repeats + 3):
            for name, layer in layers.items():
                took = seconds_of(lambda layer=layer: step(layer), device)
                if repeat >= 3:
                    times[name].append(took)
        for name, layer in layers.items():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                kept = bytes_saved(lambda layer=layer, x=x: layer(x), list(layer.parameters()))
            row = {"width": width, "tokens": tokens, "rank": rank, "adapter": name}
            row |= {"seconds": statistics.median(times[name]), "kept": kept}
            rows.append(row | {"parameters": sum(p.numel() for p in layer.parameters() if p.requires_grad)})
    return rows


def rotation_table(title: str, rows: dict, floor: float) -> list[str]:
    lines = [f"### {title}", "", "| way | ms | : plain | : copy | extra memory, worst layer, MB | : plain |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    plain, worst = rows["plain"]["seconds"], max(rows["plain"]["extra"].values())
    for name, row in rows.items():
        extra = max(row["extra"].values())
        cells = [name, f"{row['seconds'] * 1e3:.1f}", f"{row['seconds'] / plain:.2f}", f"{row['seconds'] / floor:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{extra / MB:.1f}", f"{extra / worst:.3f}"]) + " |")
    return [*lines, ""]


def shape_table(rows: dict, shapes: Counter) -> list[str]:
    names = list(rows)
    lines = ["| layer | layers | " + " | ".join(f"{name}, ms" for name in names) + " | chunked : plain |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for (out, size), count in sorted(shapes.items()):
        each = [rows[name]["shapes"][f"{out}x{size}"] / count * 1e3 for name in names]
        ratio = each[names.index("chunked")] / each[names.index("plain")]
        lines.append(f"| {out}x{size} | {count} | " + " | ".join(f"{v:.2f}" for v in each) + f" | {ratio:.2f} |")
    return [*lines, ""]


def layer_table(rows: list[dict]) -> list[str]:
    lines = ["| width | tokens | rank | adapter | parameters | ms | : LoRA | MB kept | : LoRA |", "|---" * 9 + "|"]
    for row in rows:
        lora = next(r for r in rows if r["adapter"] == "LoRA" and all(r[k] == row[k] for k in ("width", "rank")))
        cells = [row["width"], row["tokens"], row["rank"], row["adapter"], f"{row['parameters']:,}"]
        cells += [f"{row['seconds'] * 1e3:.2f}", f"{row['seconds'] / lora['seconds']:.2f}"]
        cells += [f"{row['kept'] / MB:.2f}", f"{row['kept'] / lora['kept']:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def run(args: argparse.Namespace, device: torch.device) -> tuple[dict, str]:
    """All numbers, and the tables."""
    shapes = layer_shapes(QUICK_UNET if args.quick else SIZES["sd15"]["unet"])
    rank, ranks, places = (8, (8,), QUICK_PLACES) if args.quick else (256, (256, 64), PLACES)
    versions = f"torch {torch.__version__}, peft {peft.__version__}"
    found: dict = {"machine": machine(device), "versions": versions, "date": str(date.today()), "rotation": {}}
    lines = [f"{found['machine']}, {versions}, {found['date']}", ""]
    lines += [f"## Rotation of {sum(shapes.values())} layers, rank {rank}", ""]
    for dtype in (torch.float32, torch.float16 if device.type == "cuda" else torch.bfloat16):
        made = problems(shapes, rank, dtype, device)
        forward, gradient = ways(device)
        with torch.no_grad():
            turned = measure_ways(forward, made, 3, args.repeats, device)
            gradients = measure_ways(gradient, made, 4, args.repeats, device)
        name = str(dtype).removeprefix("torch.")
        found["rotation"][name] = {"turn": turned, "gradient": gradients}
        lines += rotation_table(f"{name}, W -> R", turned, turned["copy"]["seconds"]) + shape_table(turned, shapes)
        lines += rotation_table(f"{name}, (W, G) -> (dA, dB)", gradients, turned["copy"]["seconds"])
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    found["layers"] = [row for r in ranks for row in measure_layers(r, places, 3 * args.repeats, dtype, device)]
    lines += [f"## One layer, forward and backward, {str(dtype).removeprefix('torch.')}", ""]
    return found, "\n".join(lines + layer_table(found["layers"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default=None, help="Folder for rotation.json and rotation.md.")
    parser.add_argument("--repeats", type=int, default=5, help="Rounds, of which the median counts. Default: 5.")
    parser.add_argument("--quick", action="store_true", help="Tiny layers, to see that it runs.")
    args = parser.parse_args()
    found, table = run(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(table)
    if args.output_dir:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in (("json", json.dumps(found, indent=2)), ("md", table)):
            (folder / f"rotation.{suffix}.tmp").write_text(text.rstrip() + "\n")
            os.replace(folder / f"rotation.{suffix}.tmp", folder / f"rotation.{suffix}")


if __name__ == "__main__":
    main()
