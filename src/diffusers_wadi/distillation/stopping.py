"""Ctrl-C and SIGTERM as a wish to stop after the present update."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Inside the block the first SIGINT or SIGTERM is only noted; the second acts as usual.

    Outside the main thread, where Python allows no handlers, nothing is noted.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        logger.warning("%s: stopping after this update. A second one stops at once.", self.received.name)
        self.__exit__()

    def wanted(self, look: bool) -> signal.Signals | None:
        """The signal that some process received, the same answer in all of them.

        Args:
            look: whether several processes should ask each other now, which waits for the device. All have to pass
                the same; a process by itself always answers.
        """
        if self.accelerator.num_processes == 1:
            return self.received
        if not look:
            return None
        mine = torch.tensor([self.received or 0], device=self.accelerator.device)
        highest = int(self.accelerator.gather(mine).max())
        return signal.Signals(highest) if highest else None


def report_stop(received: signal.Signals, step: int, total_steps: int, folder: Path) -> None:
    """Log that a run ended early with its state in `folder`, and how to go on."""
    logger.warning(
        "stopped by %s after step %d of %d; %s is saved. Go on with the same command and --resume_from_checkpoint latest.",
        *(received.name, step, total_steps, folder),
    )
