"""Prompt sets: COCO captions, the HPSv2 benchmark, Shapes World, and files of prompts.

A set numbers its prompts by their place in the whole source, whatever sample of it is taken. What depends on that number,
such as the noise of an image, is then the same in every sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["HPSV2_STYLES", "Prompt", "PromptSet", "load_prompts"]

HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
"""The styles of the HPSv2 benchmark: a JSON list of 800 prompts each, in a file of that name."""

COCO_SAMPLE = 30_000
"""Images of COCO that are drawn where no number is asked for and there are that many: the usual size of FID-30k."""

SHAPES_PROMPTS = 512
"""Captions of Shapes World where no number is asked for."""

_KEYS = ("prompt", "caption", "text")  # of the text in a JSON object, the first that is there
_EXPECTED = (
    "Expected a COCO caption file (captions_val2014.json), a folder with the HPSv2 styles "
    f"({', '.join(f'{style}.json' for style in HPSV2_STYLES)}), a .txt with a prompt a line, a .json list or .jsonl of texts "
    f"or of objects with one of the keys {', '.join(_KEYS)}, or 'shapes'."
)


@dataclass(frozen=True)
class Prompt:
    """A prompt, its number in the whole source, and the group it is counted in (a style of HPSv2), None for none."""

    index: int
    text: str
    group: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their source.

    Args:
        name: of the source, as in tables.
        prompts: with different numbers, in ascending order.
    """

    name: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    @property
    def indices(self) -> list[int]:
        return [prompt.index for prompt in self.prompts]

    @property
    def groups(self) -> list[str | None]:
        return [prompt.group for prompt in self.prompts]

    @property
    def digest(self) -> str:
        """SHA-256 of numbers, texts and groups: two sets with one digest are the same set."""
        content = [[prompt.index, prompt.text, prompt.group] for prompt in self.prompts]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def load_prompts(source: str | Path, num_prompts: int | None = None, seed: int = 0) -> PromptSet:
    """Read a prompt set, or a sample of it.

    Args:
        source: "shapes" (held-out captions of Shapes World), a COCO caption file, a folder with the four HPSv2 styles, or
            a .txt, .json or .jsonl of prompts.
        num_prompts: how many to draw. Default None: all; of COCO 30,000 images where there are as many, of Shapes
            World 512.
        seed: of the draw. Default 0.

    A draw takes the entries with the smallest SHA-256 of "seed/key", where the key is the image's id (COCO) or the number
    of the prompt (files), and lists them in the order of the source. So it needs no random number generator, and a
    smaller draw is part of a larger one. Of the captions of a COCO image, sorted by their id and without empty ones, the
    one at place SHA-256("seed/id/caption") modulo their number is taken. Groups give equal parts, the first of them one
    more where it does not divide.

    Raises:
        OSError: no such file or folder.
        ValueError: a file of another form (with what it holds and what is expected), an empty prompt or set, or fewer
            prompts than asked for.
    """
    if num_prompts is not None and num_prompts < 1:
        raise ValueError(f"num_prompts={num_prompts}: expected at least 1")
    if str(source) == "shapes":
        return _shapes(num_prompts, seed)
    path = Path(source)
    if path.is_dir():
        found, keys = _hpsv2(path), None
    elif not path.is_file():
        raise FileNotFoundError(f"prompts {str(source)!r}: no such file or folder. {_EXPECTED}")
    elif path.suffix == ".json" and isinstance(content := _json(path), dict):
        found, keys = _coco(path, content, seed)
        num_prompts = min(COCO_SAMPLE, len(found)) if num_prompts is None else num_prompts
    else:
        found, keys = [Prompt(i, text) for i, text in enumerate(_texts(path))], None
    if not found:
        raise ValueError(f"{path} holds no prompt. {_EXPECTED}")
    return PromptSet(path.stem, tuple(_drawn(found, keys, num_prompts, seed, str(path))))


def _shapes(num_prompts: int | None, seed: int) -> PromptSet:
    from diffusers_wadi.shapes import heldout_captions

    captions = heldout_captions(SHAPES_PROMPTS if num_prompts is None else num_prompts, seed)
    return PromptSet("shapes", tuple(Prompt(i, caption) for i, caption in enumerate(captions)))


def _drawn(
    found: Sequence[Prompt], keys: Sequence[int] | None, num_prompts: int | None, seed: int, origin: str
) -> list[Prompt]:
    if num_prompts is None:
        return list(found)
    if num_prompts > len(found):
        raise ValueError(f"{origin} holds {len(found)} prompts, fewer than the {num_prompts} asked for (num_prompts)")
    order = sorted(found, key=lambda prompt: _hash(seed, prompt.index if keys is None else keys[prompt.index]))
    groups = list(dict.fromkeys(prompt.group for prompt in found))
    chosen: list[Prompt] = []
    for number, group in enumerate(groups):
        share = num_prompts // len(groups) + (number < num_prompts % len(groups))
        members = [prompt for prompt in order if prompt.group == group]
        if share > len(members):
            raise ValueError(f"{origin} holds {len(members)} prompts of {group!r}, fewer than the {share} asked for")
        chosen += members[:share]
    return sorted(chosen, key=lambda prompt: prompt.index)


def _hash(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest(), "big")


def _coco(path: Path, content: dict[str, Any], seed: int) -> tuple[list[Prompt], list[int]]:
    """One caption for each image, numbered in the order of the images' ids, and those ids."""
    annotations = content.get("annotations")
    if not isinstance(annotations, list):
        raise ValueError(f"{path} is an object with {_names(content)}, and no list 'annotations'. {_EXPECTED}")
    captions: dict[int, list[tuple[int, str]]] = {}
    for number, entry in enumerate(annotations, 1):
        if not (isinstance(entry, dict) and isinstance(entry.get("caption"), str) and "image_id" in entry):
            held = _names(entry) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(
                f"{path}: annotation {number} holds {held}; expected a caption file of COCO, with image_id and caption "
                "(captions_val2014.json, not instances_val2014.json)"
            )
        if text := entry["caption"].strip():
            captions.setdefault(entry["image_id"], []).append((entry.get("id", number), text))
    ids = sorted(captions)
    chosen = [sorted(captions[i])[_hash(seed, i, "caption") % len(captions[i])][1] for i in ids]
    return [Prompt(number, text) for number, text in enumerate(chosen)], ids


def _hpsv2(folder: Path) -> list[Prompt]:
    files = {style: folder / f"{style}.json" for style in HPSV2_STYLES}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        there = _some(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise ValueError(f"{folder} holds {there}, and not {', '.join(missing)}. {_EXPECTED}")
    pairs = [(text, style) for style, file in files.items() for text in _texts(file)]
    return [Prompt(number, text, style) for number, (text, style) in enumerate(pairs)]


def _texts(path: Path) -> list[str]:
    readers: dict[str, Callable[[Path], Iterable[tuple[str, Any]]]]
    readers = {".txt": _text_lines, ".json": _json_entries, ".jsonl": _json_lines}
    if path.suffix not in readers:
        raise ValueError(f"prompts {str(path)!r} end in {path.suffix!r}. {_EXPECTED}")
    return [_text(value, f"{path}, {where}") for where, value in readers[path.suffix](path)]


def _text(value: Any, where: str) -> str:
    if isinstance(value, dict):
        key = next((key for key in _KEYS if key in value), None)
        if key is None:
            raise ValueError(f"{where} is an object with {_names(value)}; expected one of the keys {', '.join(_KEYS)}")
        value = value[key]
    if not isinstance(value, str):
        raise ValueError(f"{where} is {_json_type(value)}, expected a text")
    if not value.strip():
        raise ValueError(f"{where} is empty, expected a prompt")
    return value.strip()


def _lines(path: Path) -> list[tuple[str, str]]:
    lines = enumerate(_read(path).split("\n"), 1)
    return [(f"line {number}", line) for number, line in lines if line.strip()]


def _text_lines(path: Path) -> list[tuple[str, str]]:
    lines = _lines(path)
    if lines and lines[0][1].lstrip()[0] in "{[" and _is_json(path):
        raise ValueError(f"{path} holds JSON, not a prompt a line; name it .json or .jsonl")
    return lines


def _is_json(path: Path) -> bool:
    try:
        json.loads(_read(path))
    except ValueError:
        return False
    return True


def _json_lines(path: Path) -> list[tuple[str, Any]]:
    return [(where, _parsed(line, f"{path}, {where}")) for where, line in _lines(path)]


def _json_entries(path: Path) -> list[tuple[str, Any]]:
    content = _json(path)
    if not isinstance(content, list):
        raise ValueError(f"{path} holds {_json_type(content)}. {_EXPECTED}")
    return [(f"entry {number}", value) for number, value in enumerate(content, 1)]


def _json(path: Path) -> Any:
    return _parsed(_read(path), str(path))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON ({error}). {_EXPECTED}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). {_EXPECTED}") from error


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _names(value: dict[str, Any]) -> str:
    return _some(list(value)) or "no keys"


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
