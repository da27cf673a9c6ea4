"""How good and how fast a model is: images for a prompt set, the judge of Shapes World, latency, a table.

    python examples/evaluation.py

For COCO, FID and the others see docs/evaluation.md; the command line does all of this too (`wadi evaluate`).
"""

import argparse
from pathlib import Path

from diffusers_wadi import WaDiPipeline, bundled_checkpoint
from diffusers_wadi.evaluation import compute_metrics, generate_images, load_prompts, measure_latency, write_results

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--num_prompts", type=int, default=32)
parser.add_argument("--output_dir", default="evaluation")
args = parser.parse_args()

pipe = WaDiPipeline.from_pretrained(bundled_checkpoint())
pipe.set_progress_bar_config(disable=True)
prompts = load_prompts("shapes", args.num_prompts)
one_step = {"num_inference_steps": 1, "guidance_scale": 1.0}

folder = generate_images(pipe, prompts, args.output_dir, **one_step, batch_size=8)  # goes on if it was stopped
metrics = compute_metrics(folder, ["shapes"])
latency = measure_latency(pipe, prompts.texts, **one_step, repeats=5)
row = {"name": "one step", "metrics": metrics, "latency": latency.as_dict()}
write_results([row], folder)
print(Path(folder, "results.md").read_text())
