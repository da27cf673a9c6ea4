"""A trained subject on the Hub: the repository before the training, the files and a model card after it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .._adapter_files import LORAD_WEIGHT_NAME
from .._hub import UploadOptions, ensure_repository, publish, refuse_local_base
from ..lorad import LoRaDConfig
from ..model_card import CardDetails, adapter_card

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

USAGE = """## Use it

```python
from diffusers import StableDiffusionPipeline
from diffusers_wadi.downstream.dreambooth import load_subject

pipe = StableDiffusionPipeline.from_pretrained("{base}")
load_subject(pipe, "{repository}")
image = pipe({prompt}, num_inference_steps=50).images[0]
```

In one step, over a one-step LoRaD of the same base:

```python
from diffusers_wadi import WaDiPipeline

pipe = WaDiPipeline.from_pretrained("...")
load_subject(pipe, "{repository}")
image = pipe({prompt}).images[0]
```

"""


def prepare(args: argparse.Namespace, base: str) -> None:
    """With `--push_to_hub`, make the repository now: a wrong token is not to be found out after the training.

    Args:
        args: the flags.
        base: what the adapter's config will name.

    Raises:
        ValueError: `base` is a folder of this machine.
        OSError: the Hub cannot be reached, or refuses.
    """
    if not args.push_to_hub:
        return
    try:
        refuse_local_base(base)
    except ValueError as error:
        raise ValueError(f"--push_to_hub: {error} The flag is --base_model_name_or_path.") from None
    ensure_repository(_options(args), Path(args.output_dir))


def publish_subject(
    args: argparse.Namespace, config: LoRaDConfig, base: str, files: Sequence[str], steps: int, rate: float, data: str
) -> str:
    """With `--push_to_hub`, upload the adapter with its newest sample grid and a card.

    Args:
        args: the flags.
        config: of the UNet's adapter.
        base: that it belongs to.
        files: in the output folder.
        steps, rate: of the training.
        data: what it was trained on, in words.

    Returns:
        URL of the commit, "" without `--push_to_hub`.
    """
    if not args.push_to_hub:
        return ""
    folder, options = Path(args.output_dir), _options(args)
    grids = sorted((folder / "samples").glob("step-*.png"))
    details = CardDetails(
        description=f"Stable Diffusion that knows a subject: {json.dumps(args.instance_prompt)}.",
        steps=steps,
        data=data,
        training={"Learning rate": rate, "Batch per process": args.train_batch_size, "Seed": args.seed},
        license=args.hub_license,
        samples=grids[-1] if grids else None,
        prompts=[args.validation_prompt or args.instance_prompt],
    )
    card = _card(options.name(folder), config, base, details)
    return publish(folder, files, options, card, details)


def _card(name: str, config: LoRaDConfig, base: str, details: CardDetails) -> ModelCard:
    from huggingface_hub import ModelCard

    text = str(adapter_card(name, config, base, LORAD_WEIGHT_NAME, details, one_step=False))
    # The general usage is of one pipeline; a subject is for the multi-step model, and for a one-step student of it.
    start, end = text.index("## Use it with"), text.index("## Licence")
    prompt = json.dumps(details.prompts[0], ensure_ascii=False)
    return ModelCard(text[:start] + USAGE.format(repository=name, base=base, prompt=prompt) + text[end:])


def _options(args: argparse.Namespace) -> UploadOptions:
    return UploadOptions(repo_id=args.hub_model_id, token=args.hub_token, private=args.hub_private or None)
