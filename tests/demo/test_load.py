"""Many at once, and those who mean no good: `wadi demo` as a process of its own, its memory watched from outside."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio")
gradio_client = pytest.importorskip("gradio_client", reason="requests to the demo need gradio_client")

from demo_server import pixels  # noqa: E402

from diffusers_wadi.demo import DemoSettings  # noqa: E402
from diffusers_wadi.demo.engine import Engine  # noqa: E402
from diffusers_wadi.shapes import heldout_captions, judge_image  # noqa: E402

CLIENTS, EACH = 20, 10


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, process) of a running `wadi demo`."""
    port = free_port()
    log = tmp_path_factory.mktemp("log") / "demo.log"
    command = [sys.executable, "-m", "diffusers_wadi.cli", "demo", "--device", "cpu", "--port", str(port)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(address, timeout=5).read()
            break
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
    yield address, process, log
    process.terminate()
    process.wait(20)


def megabytes(process):
    """Memory of a process that belongs to no file."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def requests_of(number):
    prompts = heldout_captions(CLIENTS * EACH, seed=number)
    return [(prompt, 1000 * number + i) for i, prompt in enumerate(prompts)]


def ask_all(clients, wanted):
    """Each client sends its share at once and then waits; [(prompt, seed, path of the image)]."""

    def ask(number):
        share = wanted[number::CLIENTS]
        jobs = [clients[number].submit(prompt, seed, 1, api_name="/generate") for prompt, seed in share]
        return [(*asked, job.result(timeout=300)[0][0]["image"]) for asked, job in zip(share, jobs)]

    with ThreadPoolExecutor(CLIENTS) as pool:
        return [answer for answers in pool.map(ask, range(CLIENTS)) for answer in answers]


def connect(address, folder):
    # Clients and server may share a core here, so that httpx's own 5 seconds would not do.
    options = {"timeout": 120}
    return gradio_client.Client(address, verbose=False, download_files=folder, ssl_verify=False, httpx_kwargs=options)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_twenty_clients_at_once(server, tmp_path):
    address, process, log = server
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = list(pool.map(lambda i: connect(address, tmp_path / str(i)), range(CLIENTS)))
    ask_all(clients, requests_of(1))
    before, start = megabytes(process), time.perf_counter()
    wanted = requests_of(2)
    answers = ask_all(clients, wanted)
    took = time.perf_counter() - start
    grown = megabytes(process) - before
    assert sorted((prompt, seed) for prompt, seed, _ in answers) == sorted(wanted)
    engine = Engine.load(DemoSettings(device="cpu"))
    own, others = [], []
    for i, (prompt, seed, path) in enumerate(answers):
        image = Image.open(path)
        assert (image.text["prompt"], image.text["seed"]) == (prompt, str(seed))
        expected = np.asarray(engine.draw(prompt, seed)[0].image, dtype=int)
        assert np.abs(pixels(path).astype(int) - expected).max() <= 1, (prompt, seed)
        own.append(np.mean(list(judge_image(pixels(path), prompt).values())))
        others.append(np.mean(list(judge_image(pixels(path), answers[i - 7][0]).values())))
    print(f"{len(answers)} answers in {took:.1f} s; attributes right: own prompt {np.mean(own):.1%}, another's "
          f"{np.mean(others):.1%}; memory {before:.0f} MB, grown by {grown:.1f} MB")  # fmt: skip
    assert np.mean(own) > 0.9 > 0.7 > np.mean(others)
    assert grown < 40
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_it_outlives_oversized_malformed_and_cancelled_requests(server, tmp_path):
    address, process, log = server
    client = connect(address, tmp_path)
    (tmp_path / "large.png").write_bytes(os.urandom(12_000_000))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"no image")
    Image.new("1", (16_000, 16_000)).save(tmp_path / "bomb.png")  # 256 million pixels in a few kilobytes
    for values in (
        ("x" * 5_000_000, 0, 1),
        ("a star", 0, 10**9),
        ("a star", 10**30, 1),
        (None, None, None),
        ([], {}, ""),
    ):
        with pytest.raises(Exception):  # noqa: B017  (of whatever kind; that the server goes on is what counts)
            client.predict(*values, api_name="/generate")
    for name in ("large", "broken", "bomb"):
        with pytest.raises(Exception):  # noqa: B017
            picture = gradio_client.handle_file(tmp_path / f"{name}.png")
            board = {"background": picture, "layers": [], "composite": picture}
            client.predict(board, "none: the image is the condition", api_name="/condition")
    for path, body in (
        ("/gradio_api/call/generate", b"{"),
        ("/gradio_api/call/generate", b'{"data": "x"}'),
        ("/gradio_api/call/nonsense", b'{"data": []}'),
        ("/gradio_api/queue/join", b'{"data": [1], "fn_index": 999, "session_hash": "x"}'),
        ("/gradio_api/queue/join", b"[" * 10_000),
        ("/gradio_api/upload", b"\0" * 1000),
    ):
        ask = urllib.request.Request(address + path, data=body, headers={"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(ask, timeout=30).read()
    jobs = [client.submit("a yellow star on a gray background", i, 4, 3, api_name="/compare") for i in range(20)]
    assert any([job.cancel() for job in jobs[1:]])
    for _ in range(5):  # connections cut in the middle of a request
        with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as line:
            line.sendall(b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    images, _ = client.predict("a large red heart on a white background", 2, 1, api_name="/generate")
    assert all(judge_image(pixels(images[0]["image"]), "a large red heart on a white background").values())
    assert process.poll() is None
    print(f"memory after it: {megabytes(process):.0f} MB")
    print(log.read_text()[-3000:])
