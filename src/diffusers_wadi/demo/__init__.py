"""The demo: a page in the browser on which a one-step model draws. `wadi demo` and the Gradio Space start it."""

from __future__ import annotations

import socket
from typing import Any

from diffusers_wadi._optional import require
from diffusers_wadi.demo.settings import DemoSettings
from diffusers_wadi.demo.zero_gpu import spaces_package

__all__ = ["DemoSettings", "launch"]

LOOPBACK = "127.0.0.1"
LARGEST_PICTURE = 25_000_000  # pixels of an upload; PIL refuses twice as many


def launch(
    settings: DemoSettings | None = None,
    host: str | None = None,
    port: int | None = None,
    open_browser: bool = False,
    wait: bool = True,
) -> Any:
    """Load the model and serve the page.

    Args:
        settings: model and limits. Default None: `DemoSettings.from_environment()`.
        host: address to listen at. Default None: GRADIO_SERVER_NAME, which a Space sets, else 127.0.0.1, this machine
            alone.
        port: default None: GRADIO_SERVER_PORT, else the first free one from 7860.
        open_browser: also show the page. Default False.
        wait: return when the server is stopped; False: at once, and `close()` on the result stops it.

    Returns:
        The page, a `gr.Blocks`.

    Raises:
        ImportError: gradio is not installed; the message holds the pip command.
        OSError: the port is taken, or the model cannot be found.
        ValueError: settings that cannot be, or a model of another kind.
    """
    require("gradio", "demo")
    if port is not None:
        _refuse_taken(host or LOOPBACK, port)
    spaces_package()  # before anything asks for a GPU, which ZeroGPU lends only later
    from PIL import Image

    from diffusers_wadi.demo import page
    from diffusers_wadi.demo.engine import Engine
    from diffusers_wadi.demo.requests import Requests

    settings = settings or DemoSettings.from_environment()
    requests = Requests(Engine.load(settings), settings)
    Image.MAX_IMAGE_PIXELS = LARGEST_PICTURE
    app = page.build(requests)
    app.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=page.LARGEST_UPLOAD,
        share=False,
        ssr_mode=False,
        footer_links=["api"],
        max_threads=max(40, settings.at_once + 8),  # 40 is gradio's default
        **page.look(requests),
    )
    if wait:
        print(f"{requests.engine.name} draws at {app.local_url} until Ctrl+C", flush=True)
        app.block_thread()
    return app


def _refuse_taken(host: str, port: int) -> None:
    """Before the model is loaded, which may take minutes."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise OSError(
            f"cannot listen at port {port} of {host} ({error}); choose another, or none for a free one"
        ) from error
