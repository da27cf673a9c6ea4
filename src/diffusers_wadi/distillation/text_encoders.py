"""Prompts -> one tensor, exactly as the stock pipeline computes it: CLIP for Stable Diffusion, T5 for PixArt-alpha."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from diffusers import PixArtAlphaPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor, nn

PIXART_MAX_LENGTH = 120  # what `PixArtAlphaPipeline` pads to


class TextEncoder(ABC):
    """A tokenizer and a text model as a function prompts -> (B, L, D) on the model's device and in its dtype.

    Args:
        tokenizer, model: of the teacher.
        max_length: tokens; longer prompts are cut, shorter ones padded.
    """

    def __init__(self, tokenizer, model: nn.Module, max_length: int):
        self.tokenizer, self.model, self.max_length = tokenizer, model, max_length

    def prepare(self, prompts: Sequence[str]) -> list[str]:
        """The prompts as they are tokenised."""
        return list(prompts)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            self.prepare(prompts),
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.model.device)
        return self.encode_tokens(tokens.input_ids, tokens.attention_mask)

    @abstractmethod
    def encode_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) ids and attention mask -> (B, L, D)."""

    def token_lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before any cutting, special tokens included."""
        return [len(ids) for ids in self.tokenizer(self.prepare(prompts), verbose=False).input_ids]

    def fingerprint(self) -> str:
        """SHA-256 of all that the output depends on beside the prompts: weights, their dtype, tokenizer, length.

        Weights count by the sum of their bits as integers, which is the same on every device.
        """
        digest = hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            bits = weight.contiguous().view(-1).view(_INTEGERS[weight.element_size()]).sum(dtype=torch.int64).item()
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {bits}\n".encode())
        return digest.hexdigest()

    def _identity(self) -> dict:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        return {"kind": type(self).__name__, "tokenizer": vocabulary, "max_length": self.max_length}


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CLIPEncoder(TextEncoder):
    """CLIP's last hidden states (B, L, D), as Stable Diffusion's inference computes them.

    No attention mask is passed unless the model's config asks for one, as in stock pipelines: with one (as in the
    authors' release) the student would see other padding embeddings in training than in use.
    """

    def __init__(self, tokenizer, model: nn.Module):
        super().__init__(tokenizer, model, tokenizer.model_max_length)
        self._masked = bool(getattr(model.config, "use_attention_mask", False))

    def encode_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, attention_mask=mask if self._masked else None)[0]


class T5Encoder(TextEncoder):
    """T5's last hidden states, and its attention mask as one more last channel: (B, max_length, D + 1).

    One tensor, so that all that stores, batches or drops text need not know of masks; see :func:`unpack_mask`.

    Args:
        tokenizer, model: of the teacher.
        max_length: tokens, 120 in the stock pipeline. Padding is masked in T5 and in the transformer, so a lower number
            changes nothing but the cost, as long as no prompt is longer.
    """

    def __init__(self, tokenizer, model: nn.Module, max_length: int = PIXART_MAX_LENGTH):
        super().__init__(tokenizer, model, max_length)
        self._pipeline = PixArtAlphaPipeline(None, None, None, None, None)  # for its treatment of captions alone

    def prepare(self, prompts: Sequence[str]) -> list[str]:
        """As the stock pipeline by default: in lower case, or cleaned if beautifulsoup4 and ftfy are installed."""
        return self._pipeline._text_preprocessing(list(prompts), clean_caption=cleans_captions())

    def encode_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.model(ids, attention_mask=mask)[0]
        return torch.cat([states, mask[..., None].to(states.dtype)], dim=-1)

    def _identity(self) -> dict:
        return super()._identity() | {"cleans_captions": cleans_captions()}


def cleans_captions() -> bool:
    """Whether the stock PixArt pipeline cleans captions here."""
    return is_bs4_available() and is_ftfy_available()


def unpack_mask(text: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L, D + 1) of :class:`T5Encoder` -> hidden states (B, L, D) and mask (B, L), both in the dtype of ``text``."""
    return text[..., :-1], text[..., -1]
