"""The page: the tabs put together, its look, and its limits on what is sent to it."""

from __future__ import annotations

from typing import Any

from diffusers_wadi._optional import require
from diffusers_wadi.demo import tabs, texts
from diffusers_wadi.demo.requests import Requests

gr = require("gradio", "demo")

CACHE_SECONDS = 3600  # how often, and how old, files that were sent to browsers are deleted
LARGEST_UPLOAD = "10mb"
CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.said { min-height: 1.6em; }
.said p { font-size: 1.05em; }
.seed { align-items: end; }
.seed button { white-space: nowrap; }
.grid-wrap { height: auto !important; min-height: 0 !important; max-height: none !important; overflow: hidden !important; }
.grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important; }
.single { max-width: 420px; }
.condition img { height: 200px !important; width: 100% !important; object-fit: contain !important; }
footer .divider { display: none; }
"""
PIXELS = ".grid-wrap img, .preview img, .condition img { image-rendering: pixelated; }"


def build(requests: Requests) -> Any:
    """The page as `gr.Blocks`, not started."""
    bundled = requests.engine.is_bundled
    with gr.Blocks(
        title="WaDi: images in one step", analytics_enabled=False, delete_cache=(CACHE_SECONDS,) * 2
    ) as page:
        gr.Markdown(texts.heading(requests.engine))
        with gr.Tabs():
            with gr.Tab("Generate"):
                call, inputs, outputs = tabs.generate_tab(requests)
                if bundled:
                    gr.Markdown(texts.SHAPES_GRAMMAR)
            for name, tab in (
                ("Strength", tabs.strength_tab),
                ("Control", tabs.control_tab),
                ("High resolution", tabs.high_resolution_tab),
                ("Compare", tabs.compare_tab),
                ("Inspect", tabs.inspect_tab),
            ):
                with gr.Tab(name):
                    tab(requests)
        if requests.engine.is_small:
            page.load(**call, inputs=inputs, outputs=outputs, api_visibility="private")
    page.queue(max_size=requests.settings.queue_size, default_concurrency_limit=1)
    return page


def look(requests: Requests) -> dict[str, Any]:
    """Keywords of `launch` for theme and style. Fonts are the system's, so that no other server is asked for them."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    theme = gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "Menlo", "monospace"]
    )
    return {"theme": theme, "css": CSS + PIXELS * (requests.engine.side <= 128)}
