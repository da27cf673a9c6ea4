"""Does the image show what the prompt says? `check_image.py IMAGE PROMPT`, by the Shapes World judge."""

import sys

import numpy as np
from PIL import Image

from diffusers_wadi.shapes import judge_image

path, prompt = sys.argv[1:]
verdict = judge_image(np.asarray(Image.open(path).convert("RGB")), prompt)
print(f"{path}: {verdict}")
sys.exit(0 if all(verdict.values()) else f"{path} does not show {prompt!r}")
