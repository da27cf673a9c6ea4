"""From the flags of `training/train_wadi.py` to what a run works with: backbone, schedule, prompts, teacher's samples."""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from . import data, prompts, regression
from .backbones import Backbone, PixArtBackbone, load_backbone
from .flags import DTYPES
from .losses import NoiseSchedule, Predict
from .prompt_store import PromptStore, describe_lengths, length_statistics, write_prompts
from .text_cache import CachePlan, TextCache, cache_folder, check_space, fill_cache, wait_for_shards
from .text_encoders import TextEncoder

logger = logging.getLogger(__name__)


def make_backbone(args: argparse.Namespace, device: torch.device) -> Backbone:
    """Of the teacher that the flags name; no weights are loaded yet."""
    return load_backbone(
        args.pretrained_teacher_model,
        args.revision,
        args.variant,
        device,
        max_sequence_length=args.max_sequence_length,
    )


def base_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Of the frozen denoiser: `--base_dtype`, else as `--mixed_precision`, but float32 on a CPU."""
    if args.base_dtype is not None:
        return DTYPES[args.base_dtype]
    half = args.mixed_precision != "no" and device.type != "cpu"
    return DTYPES[args.mixed_precision] if half else torch.float32


def plain_attention(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether attention is made of matrix products and a softmax instead of torch's fused one (`--attention`).

    On a CPU in half precision the backward of the fused one is slow: 46 ms against 9 at 32 x 4 heads of 64 tokens in
    bfloat16. In float32 it is the faster one there, 48 ms against 200 at 4 x 4 heads of 1,024 tokens.
    """
    half = args.mixed_precision != "no" or base_dtype(args, device) != torch.float32
    return args.attention == "plain" or (args.attention == "auto" and device.type == "cpu" and half)


def load_encoder(args: argparse.Namespace, backbone: Backbone) -> TextEncoder:
    """The text encoder in `--text_encoder_dtype`, by default float32 for CLIP and as the denoiser for T5 (4.8 B)."""
    dtype = DTYPES[args.text_encoder_dtype] if args.text_encoder_dtype else torch.float32
    if args.text_encoder_dtype is None and isinstance(backbone, PixArtBackbone):
        dtype = base_dtype(args, backbone.device)
    return backbone.load_encoder(dtype)


def load_schedule(args: argparse.Namespace, backbone: Backbone) -> NoiseSchedule:
    """The noise schedule; `args.fake_max_timestep` gets its default.

    Raises:
        ValueError: a timestep beyond the end of the schedule.
    """
    schedule = backbone.noise_schedule(args.terminal_alpha_cumprod)
    highest = schedule.num_timesteps - 1
    if args.fake_max_timestep is None:
        args.fake_max_timestep = highest
    for name in ("max_timestep", "fake_min_timestep", "fake_max_timestep"):
        if getattr(args, name) > highest:
            raise ValueError(f"--{name} is {getattr(args, name)}, the teacher's schedule ends at {highest}.")
    return schedule


def prompt_records(args: argparse.Namespace) -> tuple[Iterable[str | prompts.Unreadable], str]:
    """What the flags name as the source of prompts, as a stream, and its name in messages."""
    if args.shapes_captions is not None:
        from diffusers_wadi.shapes.captions import training_captions

        return training_captions(args.shapes_captions, args.seed), f"--shapes_captions {args.shapes_captions}"
    if args.dataset_name is not None:
        chosen = (args.dataset_name, args.dataset_config_name, args.dataset_split, args.caption_column)
        return prompts.read_dataset(*chosen, streaming=args.streaming), f"the data set {args.dataset_name}"
    return prompts.read_file(args.train_prompts, args.caption_column), str(args.train_prompts)


def load_prompts(args: argparse.Namespace, accelerator: Accelerator) -> PromptStore:
    """The training prompts: read by the main process into a file of `--output_dir`, which all processes map.

    Raises:
        ValueError: no prompt, or unreadable records without `--skip_bad_lines`.
    """
    if args.dry_run:  # which writes nothing into the output folder, and is one process's business
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            return write_prompts(Path(folder, "prompts.bin"), *prompt_records(args), *_choices(args))
    file = Path(args.output_dir) / "prompts.bin"
    if accelerator.is_main_process:
        store = write_prompts(file, *prompt_records(args), *_choices(args))
        logger.info("%s", store.report)
        for line in store.report.first_unreadable:
            logger.warning("skipped: %s", line)
    accelerator.wait_for_everyone()
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not to be seen here: --output_dir has to be on a disk that all nodes share."
        )
    return PromptStore(file)


def _choices(args: argparse.Namespace) -> tuple[bool, int | None, bool]:
    return args.skip_bad_lines, args.max_train_samples, args.keep_repeated_prompts


def report_tokens(store: PromptStore, encoder: TextEncoder, sample: int = 10_000) -> str:
    """How long the prompts are in tokens, and how many are cut; of an evenly spread sample if there are many."""
    shown = [store[i] for i in range(0, len(store), -(-len(store) // sample))]
    lengths = encoder.token_lengths(shown)
    cut = sum(length > encoder.max_length for length in lengths) / len(lengths)
    of = f" (of {len(shown)} looked at)" if len(shown) < len(store) else ""
    statistics = describe_lengths(length_statistics(lengths))
    return f"tokens: {statistics}{of}; {cut:.2%} are longer than {encoder.max_length} and cut"


def make_embeddings(
    args: argparse.Namespace, accelerator: Accelerator, backbone: Backbone
) -> tuple[data.PromptEmbeddings, TextEncoder]:
    """The embeddings of the training prompts, and the encoder for others; with a cache this is the last use of it."""
    store, encoder = load_prompts(args, accelerator), load_encoder(args, backbone)
    if accelerator.is_main_process:
        logger.info("%s", report_tokens(store, encoder))
    cache = None
    if args.precompute_text_embeddings and not args.dry_run:
        cache = build_cache(args, accelerator, store, encoder)
    return data.PromptEmbeddings(store, encoder, cache, accelerator.device), encoder


def build_cache(
    args: argparse.Namespace, accelerator: Accelerator, store: PromptStore, encoder: TextEncoder
) -> TextCache:
    """Of all prompts, each process computing a part of what is not there yet.

    Raises:
        ValueError: the disk has too little room.
    """
    dtype = {"fp32": "float32", "fp16": "float16"}[args.embedding_dtype]
    plan = CachePlan(len(store), tuple(encoder([""]).shape[1:]), dtype)
    parent = args.text_cache_dir or Path(args.output_dir) / "text_cache"
    folder = cache_folder(parent, plan, encoder.fingerprint(), store.digest)
    main = accelerator.is_main_process
    if main:
        check_space(folder, plan)
        logger.info("text embeddings: %d x %.0f kB in %s", plan.count, plan.row_bytes / 1e3, folder)
    rank, world = accelerator.process_index, accelerator.num_processes
    progress = partial(tqdm, desc="text embeddings", unit="shard", disable=not main)
    fill_cache(folder, plan, store, encoder, args.text_batch_size, rank, world, progress)
    wait_for_shards(folder, plan)
    return TextCache(folder, plan)


def regression_pairs(
    args: argparse.Namespace,
    accelerator: Accelerator,
    backbone: Backbone,
    teacher: Predict,
    embeddings: data.PromptEmbeddings,
    latent_shape: tuple[int, int, int],
) -> regression.RegressionPairs | None:
    """The teacher's samples out of the cache in the output folder, or made now by the main process; or none."""
    if not args.warmup_regression_steps and not args.regression_weight:
        return None
    file = Path(args.output_dir) / "regression_pairs.safetensors"
    settings = {
        "count": args.warmup_regression_pairs,
        "num_steps": args.warmup_num_inference_steps,
        "guidance_scale": args.warmup_guidance_scale,
        "seed": args.seed,
    }
    fixed = {"teacher": args.pretrained_teacher_model, "latent_shape": latent_shape}
    fingerprint = regression.pairs_fingerprint(embeddings.prompts.digest, **settings, **fixed)
    with accelerator.main_process_first():
        pairs = regression.load_pairs(file, fingerprint)
        if pairs is None:
            pairs = regression.make_pairs(
                teacher,
                embeddings,
                backbone.teacher_scheduler(),
                latent_shape,
                batch_size=args.warmup_sample_batch_size,
                progress=lambda batches: tqdm(batches, desc="teacher's samples"),
                **settings,
            )
            regression.save_pairs(pairs, file, fingerprint)
    return pairs
