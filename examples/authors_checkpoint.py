"""The files that the paper's authors published: whole UNets whose rotations are merged.

    python examples/authors_checkpoint.py --source gudaochangsheng/WaDi --weight_name rotated_unet-sdv1-5.safetensors \
        --prompt "a cabin by a lake, oil painting"

Without arguments it writes a file of that layout from the bundled student, and reads that.
"""

import argparse
from pathlib import Path

from diffusers_wadi import WaDiPipeline, bundled_checkpoint, save_authors_file

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--source", help="Hub name or folder with the file. Default: one is made here.")
parser.add_argument("--weight_name", default="rotated_unet-sdv1-5.safetensors")
parser.add_argument("--base_model", help="Where text encoder and VAE come from. Default: what the authors name.")
parser.add_argument("--prompt", default="a purple star on a black background")
parser.add_argument("--output", default="authors.png")
args = parser.parse_args()

if args.source is None:
    student = WaDiPipeline.from_pretrained(bundled_checkpoint())
    student.fuse_lorad()
    student.unload_lorad_weights()
    args.source, args.base_model = Path("authors"), bundled_checkpoint() / "teacher"
    args.source.mkdir(exist_ok=True)
    save_authors_file(student.unet.state_dict(), args.source / args.weight_name)

pipe = WaDiPipeline.from_pretrained(args.source, weight_name=args.weight_name, base_model=args.base_model)
pipe(args.prompt).images[0].save(args.output)
pipe.save_pretrained("one-step")  # an ordinary diffusers folder from now on
print(args.output, "one-step")
