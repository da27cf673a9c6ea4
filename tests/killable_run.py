"""Runs of `training/train_wadi.py` in processes that may be killed, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import resource
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from wadi_script import train_wadi

from diffusers_wadi.distillation.trainer import WaDiTrainer


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Importing costs some ten seconds, so the server does it once. It computes nothing, so that forking it is safe."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable_run"])
    former = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # by which the server finds this module
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if former is None else os.environ.update(PYTHONPATH=former)
    return context


def run(flags: list[str], started: Connection, file_limit: int | None, environment: dict[str, str]) -> None:
    """Train; sends "started" with the first update, and in the end the error if there was one.

    Args:
        flags: with `--num_threads 1`, which has to hold then, also in several processes.
        file_limit: bytes that a file may have from then on: a full disk.
        environment: variables, such as a launcher sets.
    """
    os.environ |= environment
    os.environ.pop("OMP_NUM_THREADS", None)  # without which accelerate chooses a number
    update = WaDiTrainer.update

    def announced(self):
        WaDiTrainer.update = update
        assert torch.get_num_threads() == 1
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        started.send("started")
        return update(self)

    WaDiTrainer.update = announced
    try:
        train_wadi.main(train_wadi.parse_args(flags))
    except OSError as error:
        started.send(f"{type(error).__name__}: {error}")


class KillableRun:
    """A run in a process of its own, which has come to its first update when this is there, or has none to do.

    With an ``environment``, as one of several processes that wait for one another, it has only been started.
    """

    def __init__(self, flags: list, file_limit: int | None = None, environment: dict[str, str] | None = None):
        context = forkserver()
        self.messages, theirs = context.Pipe(duplex=False)
        arguments = ([str(flag) for flag in flags], theirs, file_limit, environment or {})
        self.process = context.Process(target=run, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        if not environment:
            self.wait_for_start()

    def wait_for_start(self) -> None:
        """Until the first update, or the end."""
        with suppress(EOFError):
            assert self.messages.recv() == "started"

    def finish(self) -> int:
        """Wait for the end; returns the exit code, -9 after SIGKILL."""
        self.process.join(120)
        assert self.process.exitcode is not None, "the run hangs"
        return self.process.exitcode


def outcome(folder: Path, step: int) -> dict[str, Any]:
    """What a finished run leaves of its weights and state: the student's file and all of the last checkpoint."""
    last = folder / f"checkpoint-{step}"
    files = [folder / "pytorch_lorad_weights.safetensors", *sorted(last.rglob("*.safetensors"))]
    contents: dict[str, Any] = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    # Not its bytes: equal strings that are one object or two are written in other ways.
    return contents | {"state": torch.load(last / "training_state.pt", weights_only=True)}
