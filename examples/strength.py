"""From the teacher to the student and beyond: the scale of a LoRaD is a factor on its angles. And two LoRaDs at once.

python examples/strength.py
"""

import argparse

import torch
from PIL import Image

from diffusers_wadi import WaDiPipeline, add_weighted_adapter, bundled_checkpoint

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=bundled_checkpoint(), help="Folder or Hub name of a LoRaD. Default: bundled.")
parser.add_argument("--prompt", default="a red heart left of a blue ring on a white background")
parser.add_argument("--output", default="strength.png")
args = parser.parse_args()

pipe = WaDiPipeline.from_pretrained(args.model)
pipe.set_progress_bar_config(disable=True)
(student,) = pipe.get_active_adapters()


def draw() -> Image.Image:
    return pipe(args.prompt, generator=torch.Generator().manual_seed(0)).images[0]


images = []
for scale in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25):
    pipe.set_adapters(student, scale)
    images.append(draw())

# Two adapters: angles add, so half of one and half of the other (here the same file twice) is the whole.
pipe.load_lorad_weights(args.model, adapter_name="other")
pipe.set_adapters([student, "other"], [0.5, 0.5])
images.append(draw())
# The same as one adapter of the two ranks together, exactly.
add_weighted_adapter(pipe.unet, [student, "other"], [0.5, 0.5], "both")
pipe.set_adapters("both")
images.append(draw())

row = Image.new("RGB", (sum(image.width for image in images), images[0].height))
for i, image in enumerate(images):
    row.paste(image, (i * image.width, 0))
row.save(args.output)
print(args.output)
