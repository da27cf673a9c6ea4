"""ReVersion: learn a relation between things as one token `<R>`, from a few images that show it (Huang et al. 2023).

Only the row of `<R>` in the token table trains, on the multi-step model. What was learned is a file that diffusers'
`load_textual_inversion` reads, into a one-step pipeline of the same text encoder too, which is how the WaDi paper uses it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor, nn

from .._files import written_beside

logger = logging.getLogger(__name__)
EMBEDDING_FILE = "learned_embeds.safetensors"  # as diffusers' TEXT_INVERSION_NAME_SAFE
CAPTION_FILE = "text.json"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tif", ".tiff")

POSITIVE_WORDS = tuple(
    """aboard about above across after against along alongside amid amidst among amongst anti around astride at atop
    before behind below beneath beside between beyond by down following from in including inside into near of off on onto
    opposite out outside over past regarding round through throughout to toward towards under underneath up upon versus
    with within""".split()
)
"""The 56 prepositions towards which the paper steers a relation."""

STOP_WORDS = tuple(
    """i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its
    itself they them their theirs themselves what which who whom this that these those am is are was were be been being
    have has had having do does did doing a an the and but if or because as until while of at by for with about against
    between into through during before after above below to from up down in out on off over under again further then once
    here there when where why how all any both each few more most other some such no nor not only own same so than too
    very s t can will just don now should""".split()
)
"""NLTK's English list of 127. With the prepositions they are what is no negative: what is left are the things."""


def importance_probabilities(num_train_timesteps: int = 1000, alpha: float = 0.5) -> Tensor:
    """How often each timestep is trained on: p(t) proportional to 1 - alpha cos(pi t / T), more at noisy ones.

    Relations are laid out where t is large (ReVersion, relation-focal importance sampling).

    Args:
        num_train_timesteps: T. Default 1000.
        alpha: from 0 (uniform) to 1. Default 0.5.

    Returns:
        (T,) float64, sums to 1.

    Raises:
        ValueError: `alpha` is outside of [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected from 0 (uniform) to 1.")
    t = torch.arange(num_train_timesteps, dtype=torch.float64)
    weights = 1 - alpha * torch.cos(torch.pi * t / num_train_timesteps)
    return weights / weights.sum()


def timesteps_at(uniform: Tensor, probabilities: Tensor) -> Tensor:
    """Timesteps by the inverse of their distribution function.

    Args:
        uniform: (n,) independent numbers from [0, 1).
        probabilities: (T,).

    Returns:
        (n,) int64, drawn with replacement.
    """
    ends = probabilities.double().cumsum(0)
    # The last end is 1 up to rounding, and a number above it would give T.
    return torch.searchsorted(ends, uniform.double(), right=True).clamp(max=len(probabilities) - 1)


def steering_loss(row: Tensor, positives: Tensor, negatives: Tensor, temperature: float = 0.07) -> Tensor:
    """Contrastive loss that steers `<R>` to prepositions and away from the things of the captions (multi-instance InfoNCE).

    -log( sum_P exp(r.m / tau) / sum_{P and N} exp(r.m / tau) ) of normalised rows of the token table.

    Args:
        row: (dim,) or (1, dim), the row of `<R>`; only it gets a gradient.
        positives: (P, dim) rows of prepositions.
        negatives: (N, dim) rows of things, N = 0 allowed.
        temperature: tau. Default 0.07.

    Returns:
        Scalar float32, at least 0; 0 without negatives.

    Raises:
        ValueError: there are no positives, of which the loss would be infinite.
    """
    if len(positives) == 0:
        raise ValueError("steering_loss got no positive rows, expected at least 1 preposition.")
    r = F.normalize(row.float().reshape(-1), dim=0)
    near, far = (F.normalize(m.detach().float(), dim=-1) @ r / temperature for m in (positives, negatives))
    return torch.cat([near, far]).logsumexp(0) - near.logsumexp(0)


def word_id(tokenizer: Any, word: str) -> int | None:
    """Id of a word that is one token; None for any other."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def positive_ids(tokenizer: Any, words: Sequence[str] = POSITIVE_WORDS, at_least: int = 1) -> Tensor:
    """Ids of those prepositions that are one token each; the others are named in the log and left out.

    Args:
        tokenizer: of the model.
        words: the prepositions, repeats count once. Default: the paper's 56. CLIP's tokenizer splits one, "astride",
            of which the authors' code takes both tokens.
        at_least: how many are wanted.

    Returns:
        (n,) int64.

    Raises:
        ValueError: fewer than `at_least` are left.
    """
    found = {word: word_id(tokenizer, word) for word in dict.fromkeys(words)}
    left_out = [word for word, number in found.items() if number is None]
    ids = [number for number in found.values() if number is not None]
    if len(ids) < at_least:
        raise ValueError(
            f"{len(ids)} of {len(found)} positive words are one token of this tokenizer, expected at least {at_least}; "
            f"it splits {', '.join(left_out)}. Name words that it knows, or want fewer."
        )
    if left_out:
        logger.info("positive words left out, being more than one token: %s", ", ".join(left_out))
    return torch.tensor(ids)


def stop_ids(tokenizer: Any, words: Sequence[str] = STOP_WORDS + POSITIVE_WORDS) -> Tensor:
    """Every token of the words that are no negatives, with the marks of beginning and end; (n,) int64, sorted."""
    return torch.tensor(sorted(set(tokenizer(" ".join(words), truncation=False).input_ids)))


def negative_ids(input_ids: Tensor, stop: Tensor, placeholder_id: int, bos_token_id: int, eos_token_id: int) -> Tensor:
    """Tokens of the things that captions name.

    Args:
        input_ids: (n, L), padded.
        stop: ids that are none, of `stop_ids`.
        placeholder_id, bos_token_id, eos_token_id: never among them. Nor is anything after a caption's first end mark:
            Stable Diffusion 1.x pads with that mark, 2.x with "!", which is an ordinary token.

    Returns:
        (m,) int64, with repeats.
    """
    before_end = (input_ids == eos_token_id).cumsum(1) == 0
    marks = torch.tensor([placeholder_id, bos_token_id, eos_token_id], device=input_ids.device)
    excluded = torch.isin(input_ids, torch.cat([stop.to(input_ids), marks]))
    return input_ids[before_end & ~excluded]


class PlaceholderEmbedding(nn.Module):
    """A token table whose row of one id is a parameter of its own; all the others are frozen as they are.

    Args:
        table: (V, dim), frozen here.
        token_id: whose row; V where it is a new token.
        initial: (dim,) the row to start from.
    """

    def __init__(self, table: nn.Embedding, token_id: int, initial: Tensor):
        super().__init__()
        self.table, self.token_id = table.requires_grad_(False), token_id
        self.row = nn.Parameter(initial.detach().float().clone().reshape(1, -1))

    def forward(self, input_ids: Tensor) -> Tensor:
        """(..., dim) in the table's dtype."""
        here = input_ids == self.token_id
        others = self.table(input_ids.masked_fill(here, 0))
        return torch.where(here[..., None], self.row.to(others.dtype), others)


def add_placeholder(
    tokenizer: Any, text_encoder: nn.Module, placeholder: str, initializer: str
) -> PlaceholderEmbedding:
    """Make `placeholder` a token, whose row starts as that of `initializer` and is all that trains of the text encoder.

    Args:
        tokenizer, text_encoder: of the model; get the token, and the returned module as token table. All else is frozen.
        placeholder: e.g. "<R>".
        initializer: a word that is one token, e.g. "and".

    Raises:
        ValueError: `placeholder` is empty, has spaces or is a token already, or `initializer` is several tokens. Nothing
            is changed then.
    """
    if not placeholder or any(c.isspace() for c in placeholder):
        raise ValueError(f"The placeholder is {placeholder!r}, expected a new word without spaces, such as '<R>'.")
    if word_id(tokenizer, placeholder) is not None or placeholder in tokenizer.get_vocab():
        raise ValueError(
            f"The placeholder {placeholder!r} is in the tokenizer's vocabulary. Choose another, such as '<R>'."
        )
    start = word_id(tokenizer, initializer)
    if start is None:
        pieces = tokenizer.tokenize(initializer)
        raise ValueError(
            f"The initializer {initializer!r} is {len(pieces)} tokens ({', '.join(pieces)}), expected a word that is 1."
        )
    table = text_encoder.get_input_embeddings()
    tokenizer.add_tokens(placeholder)
    text_encoder.requires_grad_(False)
    embedding = PlaceholderEmbedding(table, tokenizer.convert_tokens_to_ids(placeholder), table.weight[start])
    text_encoder.set_input_embeddings(embedding)
    return embedding


def refuse_other_models(model_index: Mapping[str, Any], name: str) -> None:
    """Only Stable Diffusion 1.x and 2.x have what is needed: a UNet, and CLIP as the one text encoder.

    Args:
        model_index: content of the `model_index.json` of the pipeline `name`.

    Raises:
        ValueError: it is another kind, with what is in the way.
    """
    kind = str(model_index.get("_class_name"))
    if "PixArt" in kind or "transformer" in model_index:
        reason = "which has no textual inversion in diffusers (its text encoder is T5)"
        raise ValueError(f"{name} is a {kind}, {reason}. Expected Stable Diffusion 1.x or 2.x.")
    parts = {part: (model_index.get(part) or [None, None])[-1] for part in ("unet", "text_encoder")}
    if parts != {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"} or model_index.get("text_encoder_2"):
        raise ValueError(f"{name} is a {kind} of {parts}, expected a Stable Diffusion 1.x or 2.x pipeline.")


def training_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet has to predict.

    Raises:
        ValueError: the scheduler's prediction type is neither "epsilon" nor "v_prediction".
    """
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"The scheduler's prediction_type is {kind!r}, expected 'epsilon' or 'v_prediction'.")
    return noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)


def save_learned_embedding(file: str | os.PathLike, placeholder: str, row: Tensor) -> Path:
    """Write {placeholder: (dim,)} as safetensors, float32, whole or not at all; `load_textual_inversion` reads it.

    Raises:
        ValueError: `row` holds numbers that are not finite.
    """
    vector = row.detach().float().cpu().reshape(-1).contiguous()
    if not vector.isfinite().all():
        raise ValueError(f"The row of {placeholder} is not finite. Train with a lower learning rate or in float32.")
    with written_beside(file) as temporary:
        save_file({placeholder: vector}, temporary, metadata={"format": "pt"})
    return Path(file)


class RelationImages:
    """Exemplars of a relation: a folder of images with a `text.json`, {image's name: [caption templates]}.

    Every template holds one `{}` where the placeholder goes, such as "a cat {} a stone". Everything is read and checked
    at once. Images become (3, size, size) in [-1, 1], squeezed to the square, or cropped with `center_crop`; they are
    never flipped, which would alter relations.

    Args:
        folder: with 4 to 10 images.
        size: pixels.
        center_crop: cut the middle out instead of squeezing. Default False.

    Raises:
        FileNotFoundError: the folder, its `text.json`, all images or one that `text.json` names are missing.
        ValueError: `text.json` is not as above, an image has no caption or cannot be read, or a template has no `{}`,
            several or other braces; with file and template.
    """

    def __init__(self, folder: str | os.PathLike, size: int, center_crop: bool = False):
        self.folder = Path(folder)
        captions = _read_captions(self.folder)
        self.names = sorted(captions)
        self.templates = [captions[name] for name in self.names]
        self.pixels = torch.stack([_read_image(self.folder / name, size, center_crop) for name in self.names])

    def __len__(self) -> int:
        return len(self.names)

    def check_tokens(self, tokenizer: Any, placeholder: str) -> None:
        """Refuse captions that are cut off before the placeholder.

        Raises:
            ValueError: with file and template.
        """
        wanted = tokenizer.convert_tokens_to_ids(placeholder)
        for name, template in [(n, t) for n, templates in zip(self.names, self.templates) for t in templates]:
            if wanted not in tokenizer(template.replace("{}", placeholder), truncation=True).input_ids:
                where, limit = f"{self.folder / CAPTION_FILE}: {name}: {template!r}", tokenizer.model_max_length
                raise ValueError(f"{where} is cut off before its {{}}, at {limit} tokens. Shorten it.")


def _read_captions(folder: Path) -> dict[str, list[str]]:
    file = folder / CAPTION_FILE
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder, expected one with images and {CAPTION_FILE}.")
    images = {path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
    if not images:
        raise FileNotFoundError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}), expected 4 to 10.")
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, expected {{image name: [caption templates with one {{}}]}}.")
    try:
        captions = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}).") from error
    if not isinstance(captions, dict):
        raise ValueError(f"{file} holds a {type(captions).__name__}, expected an object {{image name: [templates]}}.")
    if missing := sorted(captions.keys() - images):
        raise FileNotFoundError(f"{file} names {missing[0]!r}, which is not among the images of {folder}.")
    if silent := sorted(images - captions.keys()):
        raise ValueError(f"{file} has no captions for {silent[0]!r}. Add some, or take the image out of the folder.")
    for name, templates in captions.items():
        _check_templates(f"{file}: {name}", templates)
    return captions


def _check_templates(where: str, templates: Any) -> None:
    if not isinstance(templates, list) or not templates or not all(isinstance(text, str) for text in templates):
        raise ValueError(f"{where} has {templates!r}, expected a list of at least one caption template.")
    for text in templates:
        if text.count("{}") != 1 or any(brace in text.replace("{}", "") for brace in "{}"):
            raise ValueError(f"{where}: {text!r} must hold {{}} exactly once, for the relation, and no other brace.")


def _read_image(file: Path, size: int, center_crop: bool) -> Tensor:
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise ValueError(f"{file} cannot be read as an image ({error}).") from error
    shape, kind = (size, size), Image.Resampling.BICUBIC
    image = ImageOps.fit(image, shape, kind) if center_crop else image.resize(shape, kind)
    pixels = np.asarray(image, dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)
