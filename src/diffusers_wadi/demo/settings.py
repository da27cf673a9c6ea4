"""What the demo runs on and how much it takes on: by arguments, else by environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class DemoSettings:
    """Of `launch`. Each can be set by the environment variable in capitals behind WADI_, such as WADI_MODEL.

    Args:
        model: complete checkpoint, LoRaD adapter or file of the paper's authors; folder or Hub name. Default None: the
            bundled checkpoint.
        base_model: base of an adapter. Default None: the one that the adapter names.
        weight_name: file in `model`, see `WaDiPipeline.from_pretrained`.
        controlnet: ControlNet of the same family, folder or Hub name, for the tab Control. Default None: none, or what
            `model` has.
        device: such as "cpu" or "cuda". Default None: the GPU if there is one.
        dtype: "float32", "float16" or "bfloat16". Default None: float16 on a GPU, float32 on the CPU.
        max_prompt: characters that a prompt may have. Default 300.
        max_images: images of one request. Default 4.
        max_batch: images that are drawn at once, of whichever requests. Default 8.
        max_steps: steps of the teacher in the tab Compare. Default 50.
        max_size: pixels of a side in the tab High resolution. Default None: four times what the model was trained at.
        queue_size: requests that may wait; further ones are turned away. Default 256.

    Raises:
        ValueError: a number below 1, or an unknown `dtype`.
    """

    model: str | None = None
    base_model: str | None = None
    weight_name: str | None = None
    controlnet: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_prompt: int = 300
    max_images: int = 4
    max_batch: int = 8
    max_steps: int = 50
    max_size: int | None = None
    queue_size: int = 256

    def __post_init__(self) -> None:
        for name in ("max_prompt", "max_images", "max_batch", "max_steps", "max_size", "queue_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected a number of at least 1")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")

    @property
    def at_once(self) -> int:
        """Plain requests that are worked on at a time: enough for a batch while another one is drawn."""
        return 2 * self.max_batch

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, **given: Any) -> DemoSettings:
        """Settings as given; those left at None from the environment, where an empty variable counts as none.

        Raises:
            ValueError: a variable that is no whole number where one is expected; names it.
        """
        environment = os.environ if environment is None else environment
        values = {name: value for name, value in given.items() if value is not None}
        for field in fields(cls):
            variable = f"WADI_{field.name.upper()}"
            text = environment.get(variable, "").strip()
            if text and field.name not in values:
                values[field.name] = _number(variable, text) if "int" in field.type else text
        return cls(**values)


def _number(variable: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{variable} is {text!r}; expected a whole number") from error
