"""The command `wadi`. It translates flags and reports; the work is done by the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import diffusers_wadi
from diffusers_wadi.cli.analyze import add_analyze, add_swap
from diffusers_wadi.cli.convert import add_export, add_extract, add_fuse
from diffusers_wadi.cli.demo import add_demo
from diffusers_wadi.cli.evaluate import add_evaluate
from diffusers_wadi.cli.generate import add_generate


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 for anything that the user can put right."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("wadi: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # the last is torch's, as when memory runs out
        advice = f" {args.memory_advice}" if "memory" in str(error) else ""
        print(f"wadi: error: {' '.join(str(error).split())}{advice}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wadi", description="One-step text-to-image generation with LoRaD, and its conversions."
    )
    parser.add_argument("--version", action="version", version=f"diffusers-wadi {diffusers_wadi.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for add_command in (
        add_generate,
        add_fuse,
        add_extract,
        add_export,
        add_analyze,
        add_swap,
        add_evaluate,
        add_demo,
    ):
        add_command(commands)
    return parser
