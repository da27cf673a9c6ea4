"""The demo with the bundled checkpoint on a port of this machine, and a browser for it."""

import atexit
import functools
import shutil
from contextlib import contextmanager
from pathlib import Path

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
    """A headless Chromium; skips the test only where none is installed: one that does not start is a failure."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
    with api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        names = ("chromium", "chromium-browser", "google-chrome")
        found = own if Path(own).is_file() else next(filter(None, map(shutil.which, names)), None)
        if found is None:
            pytest.skip("the page is driven by Chromium, and none is installed: playwright install chromium")
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            chromium.close()


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))
