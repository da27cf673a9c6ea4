"""Prompts: reading, encoding once, and an order that can be resumed. Score distillation needs no images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Encode = Callable[[Sequence[str]], Tensor]


def clean_prompts(prompts: Sequence[str]) -> list[str]:
    """Stripped, without empty and repeated ones, first occurrence first."""
    return list(dict.fromkeys(stripped for prompt in prompts if (stripped := prompt.strip())))


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a ``.txt`` (one per line) or ``.json`` (a list of strings) file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, not a list of strings, or no prompt in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Prompt file {str(path)!r} does not exist.")
    if path.suffix not in (".txt", ".json"):
        raise ValueError(f"Prompt file {str(path)!r} ends in {path.suffix!r}, expected .txt (one per line) or .json.")
    text = path.read_text(encoding="utf-8")
    prompts = _json_prompts(path, text) if path.suffix == ".json" else text.splitlines()
    cleaned = clean_prompts(prompts)
    if not cleaned:
        raise ValueError(f"Prompt file {str(path)!r} holds no prompt: write one per line.")
    return cleaned


def _json_prompts(path: Path, text: str) -> list[str]:
    try:
        prompts = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"Prompt file {str(path)!r} is not valid JSON: {error}. Expected a list of strings."
        ) from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"Prompt file {str(path)!r} holds {type(prompts).__name__}, expected a list of strings.")
    return prompts


def clip_encoder(tokenizer, text_encoder) -> Encode:
    """Prompts -> (B, L, D) last hidden states, as Stable Diffusion's inference computes them.

    No attention mask is passed: stock pipelines pass none, so with one (as in the authors' release) the student
    would see other padding embeddings in training than in use.
    """

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return text_encoder(tokens.input_ids.to(text_encoder.device))[0]

    return encode


class PromptEmbeddings:
    """Text embeddings of the training prompts: encoded once into one CPU tensor, or at each use if there are many.

    Args:
        prompts: the training prompts.
        encode: see :func:`clip_encoder`.
        max_cached: with more prompts than this nothing is cached. One SD 1.5 prompt takes 236 kB in float32, one of
            Shapes World (24 x 128) 12 kB.
        batch_size: of the encoding.
        dtype: of the cache; float16 halves it.
        device: where :meth:`at` puts what it returns.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        encode: Encode,
        max_cached: int = 20_000,
        batch_size: int = 64,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        self.prompts = list(prompts)
        self.device = torch.device(device)
        self.empty = encode([""]).float().to(self.device)  # (1, L, D)
        self._encode = encode
        self._cache: Tensor | None = None
        if len(self.prompts) <= max_cached:
            self._cache = self._fill(batch_size, dtype)
            self._encode = None  # lets the text encoder go

    def _fill(self, batch_size: int, dtype: torch.dtype) -> Tensor:
        cache = torch.empty(len(self.prompts), *self.empty.shape[1:], dtype=dtype)
        for start in range(0, len(self.prompts), batch_size):
            cache[start : start + batch_size] = self._encode(self.prompts[start : start + batch_size])
        return cache

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def cached(self) -> bool:
        """Whether the embeddings are in memory."""
        return self._cache is not None

    def at(self, indices: Tensor) -> Tensor:
        """(B, L, D) float32 embeddings of the prompts ``indices`` (B,)."""
        if self._cache is not None:
            return self._cache[indices].to(self.device, torch.float32)
        return self._encode([self.prompts[i] for i in indices.tolist()]).to(self.device, torch.float32)


class PromptOrder:
    """An endless shuffled order over ``size`` items, a new permutation each epoch, resumable at any batch.

    The order is a function of ``seed`` alone, so the state is two numbers. Batches run over the end of an epoch:
    no item is ever left out. Of every global batch, process ``rank`` of ``world_size`` takes its part.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        if size < 1:
            raise ValueError(f"There are {size} items to draw from, expected at least 1.")
        self.size, self.seed = size, seed
        self._global_batch = batch_size * world_size
        self._part = slice(rank * batch_size, (rank + 1) * batch_size)
        self.epoch = self.position = 0
        self._permutation = self._shuffle(0)

    def _shuffle(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.size, generator=generator)

    def next_batch(self) -> Tensor:
        """(batch_size,) indices of this process."""
        taken = []
        missing = self._global_batch
        while missing:
            piece = self._permutation[self.position : self.position + missing]
            taken.append(piece)
            missing -= piece.numel()
            self.position += piece.numel()
            if self.position == self.size:
                self.epoch, self.position = self.epoch + 1, 0
                self._permutation = self._shuffle(self.epoch)
        return torch.cat(taken)[self._part]

    def state_dict(self) -> dict[str, int]:
        """Where the order stands."""
        return {"size": self.size, "seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state`` stands.

        Raises:
            ValueError: it belongs to another number of items or another seed.
        """
        for name in ("size", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"The checkpoint's data order has {name}={state[name]}, this run {name}={getattr(self, name)}. "
                    "Resume with the same prompts and --seed."
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._permutation = self._shuffle(self.epoch)


def drop_prompts(text: Tensor, empty: Tensor, probability: float, per: str, generator: torch.Generator) -> Tensor:
    """Replace captions by the empty prompt with ``probability``, so that the fake learns its unconditional score.

    Args:
        text, empty: (B, L, D) and (1, L, D).
        per: ``"batch"``: all of the batch or nothing (authors' release); ``"sample"``: each by itself.
        generator: on the CPU; one draw is taken whatever happens, so that streams stay aligned.
    """
    draws = torch.rand(text.shape[0] if per == "sample" else 1, generator=generator)
    dropped = (draws < probability).to(text.device).view(-1, 1, 1)
    return torch.where(dropped, empty, text)
