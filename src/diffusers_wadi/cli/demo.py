"""`wadi demo`: the page in the browser, on this machine alone."""

from __future__ import annotations

import argparse
from typing import Any

from diffusers_wadi.cli._flags import DTYPES, positive, quiet_libraries, torch_device


def add_demo(commands: Any) -> None:
    about = (
        "Draw in the browser: a page on this machine alone (http://127.0.0.1), until Ctrl+C. What is not given is taken "
        "from environment variables such as WADI_MODEL. Needs the extra: pip install 'diffusers-wadi[demo]'."
    )
    demo = commands.add_parser("demo", help="draw in the browser", description=about)
    add = demo.add_argument
    add("--model", help="complete checkpoint or LoRaD adapter, folder or Hub name; without it the bundled checkpoint")
    add("--base-model", help="base of an adapter, folder or Hub name; without it the one that the adapter names")
    add("--weight-name", metavar="FILE", help="file in the model, as of the paper's authors")
    add("--controlnet", help="ControlNet of the model's family, folder or Hub name, for the tab Control")
    add("--device", help="such as cpu, cuda or cuda:1; without it the GPU if there is one")
    add("--dtype", choices=DTYPES, help="number format; without it float16 on a GPU, float32 on the CPU")
    add("--port", type=positive, help="without it the first free one from 7860")
    add("--open", action="store_true", help="show the page in the browser")
    demo.set_defaults(run=_demo, memory_advice="Use a smaller model or --dtype float16.")


def _demo(args: argparse.Namespace) -> None:
    from diffusers_wadi._optional import require

    require("gradio", "demo")  # before torch, which takes its time
    from diffusers_wadi.demo import LOOPBACK, DemoSettings, launch

    names = ("model", "base_model", "weight_name", "controlnet", "device", "dtype")
    settings = DemoSettings.from_environment(**{name: getattr(args, name) for name in names})
    if settings.device:
        torch_device(settings.device)  # refuses one that is not there
    quiet_libraries()
    print("loading the model", flush=True)
    launch(settings, host=LOOPBACK, port=args.port, open_browser=args.open)
