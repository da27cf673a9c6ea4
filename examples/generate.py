"""One image in one network evaluation.

python examples/generate.py
python examples/generate.py --model ORG/ONE-STEP-MODEL --prompt "a cabin by a lake, oil painting" --output cabin.png
"""

import argparse

import torch

from diffusers_wadi import bundled_checkpoint, one_step_pipeline_class

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=bundled_checkpoint(), help="Folder or Hub name. Default: the bundled one.")
parser.add_argument("--prompt", default="a small blue ring above a yellow star on a gray background")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--output", default="image.png")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32
# The class that fits: Stable Diffusion, PixArt-alpha, with or without a ControlNet.
pipe = one_step_pipeline_class(args.model).from_pretrained(args.model, dtype=dtype).to(device)

# A CPU generator gives the same noise on every machine.
image = pipe(args.prompt, generator=torch.Generator().manual_seed(args.seed)).images[0]
image.save(args.output)
print(args.output)
