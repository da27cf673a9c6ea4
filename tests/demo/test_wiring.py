"""Errors as messages, and the GPU of a ZeroGPU Space."""

import logging
import sys
from types import ModuleType

import pytest

gr = pytest.importorskip("gradio", reason="the demo needs gradio")

from diffusers_wadi.demo.wiring import draws, draws_together, with_messages  # noqa: E402
from diffusers_wadi.demo.zero_gpu import on_gpu  # noqa: E402


def failing(error):
    def request(*values):
        """What it does."""
        raise error

    return with_messages(request)


@pytest.mark.parametrize(
    "error, message",
    [
        (ValueError("the seed is <b>7</b>;\n expected less"), "The seed is &lt;b&gt;7&lt;/b&gt;; expected less"),
        (ImportError("matplotlib is needed"), "Matplotlib is needed"),
        (OSError("x" * 900), "X" + "x" * 499 + " ..."),
        (
            RuntimeError("CUDA out of memory. Tried to"),
            "The server ran out of memory: ask for fewer or smaller images.",
        ),
        (gr.Error("as it is"), "as it is"),
    ],
)
def test_what_the_user_can_put_right_is_told(error, message):
    with pytest.raises(gr.Error) as raised:
        failing(error)("x")
    assert raised.value.message == message


@pytest.mark.parametrize("error", [KeyError("secret"), RuntimeError("shapes of secret tensors differ")])
def test_what_nobody_foresaw_goes_to_the_log(error, caplog, monkeypatch):
    from diffusers_wadi.demo import wiring

    monkeypatch.setattr(wiring, "_logger", logging.getLogger("demo-test"))
    with pytest.raises(gr.Error) as raised:
        failing(error)()
    assert "secret" not in raised.value.message and "log says what" in raised.value.message
    assert "secret" in caplog.text and "Traceback" in caplog.text


def test_a_gpu_is_asked_for_where_spaces_is_installed(monkeypatch):
    lent = []
    spaces = ModuleType("spaces")

    def gpu(duration):
        def decorate(function):
            return lambda *values: (lent.append(duration), function(*values))[1]

        return decorate

    def request(prompt):
        """What it does."""
        return prompt.upper()

    monkeypatch.setitem(sys.modules, "spaces", None)
    assert on_gpu(request, 30) is request
    monkeypatch.setitem(sys.modules, "spaces", spaces)
    assert on_gpu(request, 30) is request  # a folder of that name
    spaces.GPU = gpu
    on_one = on_gpu(request, 30)
    assert on_one("a") == "A" and lent == [30] and on_one.__name__ == "request" and on_one.__doc__ == "What it does."


def test_plain_requests_come_many_at_a_time_but_where_each_has_a_process_of_its_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "spaces", None)
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    others = draws(str)
    call = draws_together(str, 16)
    assert call["concurrency_limit"] == 16 and call["concurrency_id"] != others["concurrency_id"]
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    call = draws_together(str, 16)
    assert call["concurrency_limit"] == 1 and call["concurrency_id"] == others["concurrency_id"]
