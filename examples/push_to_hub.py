"""A one-step student on the Hugging Face Hub, with a model card, and back.

    hf auth login
    python examples/push_to_hub.py --repo_id ME/my-student --base_model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --adapter wadi-sd15
"""

import argparse

from diffusers_wadi import CardDetails, WaDiPipeline, bundled_checkpoint

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--repo_id", required=True, help="For the adapter; the merged pipeline goes to REPO_ID-merged.")
parser.add_argument("--adapter", default=bundled_checkpoint(), help="Folder of a LoRaD. Default: the bundled one.")
parser.add_argument("--base_model", help="Hub name under which others find the base. Default: as the adapter says.")
parser.add_argument("--token", help="With the right to write. Default: that of `hf auth login`.")
args = parser.parse_args()

pipe = WaDiPipeline.from_pretrained(args.adapter)
card = CardDetails(license="apache-2.0")
pipe.push_lorad_to_hub(args.repo_id, base_model_name_or_path=args.base_model, card=card, token=args.token)
# For people without this package: rotations merged, stock classes only.
pipe.push_to_hub(f"{args.repo_id}-merged", card=card, token=args.token)
print(f"{args.repo_id} and {args.repo_id}-merged")
