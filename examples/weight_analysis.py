"""What distillation changed: norms, directions, rank, and how much of it is a rotation (Fig. 2 of the paper).

python examples/weight_analysis.py
python examples/weight_analysis.py --base stable-diffusion-v1-5/stable-diffusion-v1-5 --tuned ORG/ONE-STEP-MODEL
"""

import argparse

from diffusers_wadi import bundled_checkpoint
from diffusers_wadi.analysis import analyze_weights, save_figures

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", default=bundled_checkpoint() / "teacher", help="Default: the bundled teacher.")
parser.add_argument("--tuned", default=bundled_checkpoint(), help="Model or adapter. Default: the bundled student.")
parser.add_argument("--output_dir", default="analysis")
args = parser.parse_args()

analysis = analyze_weights(args.base, args.tuned, layers="linear", label="one step")
overall = analysis.overall()
print(f"norms change by {overall.norm_mean:.2g}, directions by {overall.direction_mean:.2g}")
changed = sorted(analysis.layers, key=lambda layer: -layer.direction.mean())
for layer in changed[:5]:
    print(f"{layer.name}: norm {layer.norm.mean():.2g}, direction {layer.direction.mean():.2g}")
for file in save_figures([analysis], args.output_dir):
    print(file)
