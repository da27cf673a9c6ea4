"""A pipeline without networks, whose calls a test can hold back and look at."""

import threading
from types import SimpleNamespace

import torch

PATIENCE = 30  # seconds after which a test that hangs fails


class FakePipeline:
    """Gives noise of each generator, with the prompt's number in the first pixel; notes the prompts of each call."""

    def __init__(self, held=False):
        self.calls, self.threads = [], set()
        self.entered, self.go = threading.Event(), threading.Event()
        if not held:
            self.go.set()

    def __call__(
        self, prompt, height=8, width=8, negative_prompt=None, image=None, generator=None, output_type="pil", **kwargs
    ):
        assert len(prompt) == len(generator) and output_type == "pt"
        self.calls.append(prompt)
        self.threads.add(threading.current_thread())
        self.entered.set()
        assert self.go.wait(PATIENCE)
        self.fail(prompt)
        images = torch.stack([torch.rand(3, height, width, generator=one) for one in generator])
        for picture, text in zip(images, negative_prompt or prompt):
            picture[:, 0, 0] = number(text) / 255
        return SimpleNamespace(images=images)

    def fail(self, prompts):
        """For tests to replace."""


def number(text):
    return int("".join(filter(str.isdigit, text)) or 0)


def shows(image, text, seed):
    """Whether an image is that of this prompt and seed."""
    noise = torch.rand(3, image.height, image.width, generator=torch.Generator().manual_seed(seed))
    return image.getpixel((0, 0)) == (number(text),) * 3 and image.getpixel((1, 2)) == tuple(
        round(value.item() * 255) for value in noise[:, 2, 1]
    )
