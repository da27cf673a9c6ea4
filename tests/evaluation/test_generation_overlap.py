"""`generate_images` draws one batch while other threads write the one before: whatever happens in either."""

import os
import threading
import time

import pytest
from test_generation import PROMPTS, Stopped, generate, pixels, quiet, recording

from diffusers_wadi import WaDiPipeline
from diffusers_wadi.evaluation import generation
from diffusers_wadi.evaluation.folders import whole_image

PATIENCE = 30  # seconds after which a test that hangs fails


@pytest.fixture(scope="module")
def pipe(adapter_folder):
    return quiet(WaDiPipeline.from_pretrained(adapter_folder))


@pytest.fixture
def calls(monkeypatch):
    """The prompts of each call of the pipeline; `calls.begun` is set at each."""

    class Calls(list):
        begun = threading.Semaphore(0)

        def append(self, prompt):
            super().append(prompt)
            self.begun.release()

    calls = Calls()
    monkeypatch.setattr(WaDiPipeline, "__call__", recording(calls))
    return calls


def names(folder):
    return sorted(os.listdir(folder / "images"))


def test_a_batch_is_written_while_the_next_one_is_drawn(pipe, calls, tmp_path, monkeypatch):
    ahead = []
    write = generation._write

    def wait_for_the_next(folder, batch, number, drawn):
        last = batch[-1].prompt == PROMPTS.texts[-1]
        ahead.append(last or calls.begun.acquire(timeout=PATIENCE))
        write(folder, batch, number, drawn)

    calls.begun.release()  # two images wait for each call, and none for the first
    monkeypatch.setattr(generation, "_write", wait_for_the_next)
    calls.append = lambda prompt: [list.append(calls, prompt), *(calls.begun.release() for _ in prompt)]
    generate(pipe, tmp_path / "out", batch_size=2)
    assert ahead == [True] * 5 and [len(call) for call in calls] == [2, 2, 1] and len(pixels(tmp_path / "out")) == 5


def test_drawing_is_never_more_than_a_batch_ahead(pipe, calls, tmp_path, monkeypatch):
    go, done = threading.Event(), []
    write = generation._write
    monkeypatch.setattr(generation, "_write", lambda *image: go.wait(PATIENCE) and write(*image))
    thread = threading.Thread(target=lambda: done.append(generate(pipe, tmp_path / "out")))
    thread.start()
    assert calls.begun.acquire(timeout=PATIENCE) and calls.begun.acquire(timeout=PATIENCE)
    assert not calls.begun.acquire(timeout=0.2) and len(calls) == 2 and names(tmp_path / "out") == []
    go.set()
    thread.join(PATIENCE)
    assert done and len(calls) == 5 and len(pixels(tmp_path / "out")) == 5


def test_an_error_in_writing_ends_the_run(pipe, calls, tmp_path, monkeypatch):
    write = generation._write

    def fail(folder, batch, number, drawn):
        if batch[number].index == 1:
            raise OSError("no space left on the disk")
        write(folder, batch, number, drawn)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(generation, "_write", fail)
        generate(pipe, tmp_path / "out")
    assert len(calls) <= 3
    there = names(tmp_path / "out")
    assert "00000.png" in there and "00001.png" not in there and "00004.png" not in there
    generate(pipe, tmp_path / "out")
    assert len(pixels(tmp_path / "out")) == 5 and len(sum(calls[-(5 - len(there)) :], [])) == 5 - len(there)


def test_an_error_in_writing_the_last_image_is_not_lost(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "_write", lambda folder, batch, number, drawn: 1 / (batch[number].index - 4))
    with pytest.raises(ZeroDivisionError):
        generate(pipe, tmp_path / "out", batch_size=3)


@pytest.mark.parametrize("stop", [Stopped, KeyboardInterrupt])
def test_what_was_drawn_is_written_when_the_run_is_stopped(pipe, tmp_path, monkeypatch, stop):
    before = threading.active_count()
    drawn = []
    draw = recording(drawn)

    def call(self, prompt, **options):
        if len(drawn) == 2:
            raise stop
        return draw(self, prompt, **options)

    monkeypatch.setattr(generation, "_refuse_unknown_arguments", lambda *given: None)
    monkeypatch.setattr(WaDiPipeline, "__call__", call)
    with pytest.raises(stop):
        generate(pipe, tmp_path / "out", batch_size=2)
    there = names(tmp_path / "out")
    assert there == ["00000.png", "00001.png", "00002.png", "00003.png"]
    assert all(whole_image(tmp_path / "out" / "images" / name) for name in there)
    assert threading.active_count() == before


def test_the_bar_counts_what_is_on_the_disk(pipe, tmp_path, monkeypatch):
    import tqdm

    seen, folder = [], tmp_path / "out"

    class Bar:
        def __init__(self, total, initial, **options):
            self.count = initial
            seen.append((initial, total))

        def update(self, number=1):
            self.count += number
            assert self.count <= len([name for name in names(folder) if not name.startswith(".")])
            seen.append(self.count)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            seen.append("closed")

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    generate(pipe, folder, batch_size=2)
    assert seen == [(0, 5), 1, 2, 3, 4, 5, "closed"]
    (folder / "images" / "00003.png").unlink()
    seen.clear()
    generate(pipe, folder, batch_size=2)
    assert seen == [(4, 5), 5, "closed"]


def test_files_are_readable_by_whom_they_should_be(pipe, tmp_path, monkeypatch):
    """Though asking for the umask sets it for a moment, and several threads ask."""
    umask = os.umask

    def slow(mask):
        old = umask(mask)
        time.sleep(0.001)  # for another thread to come between
        return old

    before = umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", slow)
            patch.setattr(generation, "_WRITERS", 4)
            folder = generate(pipe, tmp_path / "out", batch_size=5)
        assert umask(0o027) == 0o027
    finally:
        umask(before)
    assert {path.stat().st_mode & 0o777 for path in (folder / "images").iterdir()} == {0o640}
