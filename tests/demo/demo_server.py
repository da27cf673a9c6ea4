"""The demo with the bundled checkpoint on a port of this machine, and a browser for it."""

import atexit
import functools
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from diffusers_wadi.demo import LOOPBACK, DemoSettings, launch


@functools.cache
def running_page():
    """The page, started once for all tests of this process."""
    page = launch(DemoSettings(device="cpu"), host=LOOPBACK, wait=False)
    atexit.register(page.close, verbose=False)
    return page


@contextmanager
def browser():
    """A headless Chromium; skips the test, with the reason, where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium here (playwright install chromium): {str(error).splitlines()[0]}")
        try:
            yield chromium
        finally:
            chromium.close()


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))
