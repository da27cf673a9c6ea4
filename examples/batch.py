"""Many prompts in batches, each with a seed of its own, so that an image does not depend on the batch that it was in.

python examples/batch.py
python examples/batch.py --model ORG/ONE-STEP-MODEL --prompts prompts.txt --batch_size 16 --output_dir images
"""

import argparse
import time
from pathlib import Path

import torch

from diffusers_wadi import WaDiPipeline, bundled_checkpoint
from diffusers_wadi.shapes import heldout_captions

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=bundled_checkpoint(), help="Folder or Hub name. Default: the bundled one.")
parser.add_argument("--prompts", help="Text file, one a line. Default: 16 captions of Shapes World.")
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--output_dir", default="images")
args = parser.parse_args()

prompts = Path(args.prompts).read_text().splitlines() if args.prompts else heldout_captions(16)
device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = WaDiPipeline.from_pretrained(args.model, dtype=torch.float16 if device == "cuda" else torch.float32).to(device)
pipe.fuse_lorad()  # the rotation once, not at each call
pipe.set_progress_bar_config(disable=True)

folder = Path(args.output_dir)
folder.mkdir(parents=True, exist_ok=True)
start = time.perf_counter()
for first in range(0, len(prompts), args.batch_size):
    batch = prompts[first : first + args.batch_size]
    seeds = [torch.Generator().manual_seed(first + i) for i in range(len(batch))]
    for i, image in enumerate(pipe(batch, generator=seeds).images):
        image.save(folder / f"{first + i:05d}.png")
print(f"{len(prompts)} images in {folder}, {len(prompts) / (time.perf_counter() - start):.1f} a second")
