"""Buttons to requests: queues for the model, a GPU lent for the time of a request, errors as messages."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable
from typing import Any

from diffusers.utils import logging

from diffusers_wadi._optional import require
from diffusers_wadi.demo.zero_gpu import is_zero_gpu, on_gpu

gr = require("gradio", "demo")

EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError)
LONGEST_MESSAGE = 500
_logger = logging.get_logger(__name__)


def with_messages(function: Callable) -> Callable:
    """`function` with its errors as messages on the page: what the user can put right in full, the rest in the log."""

    @functools.wraps(function)
    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except gr.Error:
            raise
        except EXPECTED as error:
            if "out of memory" in str(error).lower():
                _logger.warning("out of memory: %s", error)
                raise _message("The server ran out of memory: ask for fewer or smaller images.") from None
            if isinstance(error, RuntimeError):
                raise _unforeseen(error) from None
            raise _message(" ".join(str(error).split())) from None
        except Exception as error:  # whatever it is, the page gets a sentence and the log the traceback
            raise _unforeseen(error) from None

    return call


def _unforeseen(error: Exception) -> Exception:
    _logger.error("a request failed", exc_info=error)
    return _message("Something went wrong on the server; its log says what.")


def _message(text: str) -> Exception:
    text = text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " ..."
    return gr.Error(html.escape(text[:1].upper() + text[1:], quote=False), duration=10, print_exception=False)


def draws(function: Callable, seconds: int = 15, **more: Any) -> dict[str, Any]:
    """Keywords of an event that draws: one at a time over all tabs, in the order of arrival."""
    return {
        "fn": with_messages(on_gpu(function, seconds)),
        "concurrency_limit": 1,
        "concurrency_id": "model",
    } | more


def draws_together(function: Callable, at_once: int) -> dict[str, Any]:
    """As `draws`, but `at_once` requests at a time, which the engine draws in batches; on ZeroGPU they would not meet."""
    return draws(function) if is_zero_gpu() else draws(function, concurrency_limit=at_once, concurrency_id="plain")


def computes(function: Callable, **more: Any) -> dict[str, Any]:
    """Keywords of an event that works on the CPU beside the drawing."""
    return {"fn": with_messages(function), "concurrency_limit": 1, "concurrency_id": "other"} | more
