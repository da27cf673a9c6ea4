"""A LoRaD out of any two checkpoints, and what of the change it holds.

python examples/extraction.py
python examples/extraction.py --base stable-diffusion-v1-5/stable-diffusion-v1-5 --tuned ORG/ONE-STEP-MODEL --rank 256
"""

import argparse

from diffusers_wadi import WaDiPipeline, bundled_checkpoint, extract_lorad

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", default=bundled_checkpoint() / "teacher", help="Default: the bundled teacher.")
parser.add_argument("--tuned", help="Default: the bundled student, with its rotations merged.")
parser.add_argument("--rank", type=int, default=64)
parser.add_argument("--output_dir", default="extracted")
args = parser.parse_args()

if args.tuned is None:
    WaDiPipeline.from_pretrained(bundled_checkpoint()).save_pretrained("one-step")
    args.tuned = "one-step"

found = extract_lorad(args.base, args.tuned, rank=args.rank)
print(f"{len(found.report.layers)} layers, {found.report.explained_of_layers:.1%} of their change explained")
found.save(args.output_dir)

pipe = WaDiPipeline.from_pretrained(args.output_dir, base_model=args.base)
pipe("a green triangle on a white background").images[0].save("extracted.png")
print(args.output_dir, "extracted.png")
