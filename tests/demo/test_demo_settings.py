"""Settings of the demo, and the files of the Space."""

import re
import runpy
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest

from diffusers_wadi import cli, demo
from diffusers_wadi.demo import DemoSettings

ROOT = Path(__file__).parent.parent.parent
SPACE = ROOT / "examples" / "gradio_space"


def test_arguments_go_before_the_environment():
    environment = {"WADI_MODEL": "org/model", "WADI_DTYPE": " float16 ", "WADI_MAX_IMAGES": "2", "WADI_DEVICE": ""}
    settings = DemoSettings.from_environment(environment, model="mine", base_model=None)
    assert settings == DemoSettings(model="mine", dtype="float16", max_images=2)
    assert DemoSettings.from_environment({}) == DemoSettings()


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"WADI_MAX_IMAGES": "many"}, "WADI_MAX_IMAGES is 'many'; expected a whole number"),
        ({"WADI_QUEUE_SIZE": "0"}, "queue_size is 0; expected a number of at least 1"),
        ({"WADI_DTYPE": "int4"}, "expected one of float32, float16, bfloat16"),
    ],
)
def test_settings_that_cannot_be(environment, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DemoSettings.from_environment(environment)


def test_the_command_and_the_space_start_the_page(monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    monkeypatch.setattr(demo, "launch", lambda *values, **options: calls.append((values, options)))
    monkeypatch.setenv("WADI_MODEL", "from/environment")
    monkeypatch.setenv("WADI_MAX_IMAGES", "2")
    assert cli.main(["demo", "--device", "cpu", "--controlnet", "org/net", "--port", "7999"]) == 0
    settings = DemoSettings(model="from/environment", controlnet="org/net", device="cpu", max_images=2)
    assert calls == [((settings,), {"host": "127.0.0.1", "port": 7999, "open_browser": False})]
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    assert calls[1] == ((), {})


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo"]) == 2
    assert 'pip install "diffusers-wadi[demo]"' in capsys.readouterr().err


def test_a_taken_port_is_told_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert cli.main(["demo", "--model", "/nowhere", "--port", str(other.getsockname()[1])]) == 2
    assert cli.main(["demo", "--model", "/nowhere", "--port", "99999"]) == 2
    said = capsys.readouterr().err
    assert said.count("cannot listen at port") == 2 and "choose another" in said and "nowhere" not in said


def test_the_header_of_the_space():
    text = (SPACE / "README.md").read_text()
    header = dict(re.findall(r"^(\w+): (.+)$", text.split("---\n")[1], flags=re.MULTILINE))
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert header["sdk"] == "gradio" and (SPACE / header["app_file"]).is_file()
    assert header["colorFrom"] in colours and header["colorTo"] in colours
    assert len(header["short_description"]) <= 60
    needed = re.search(r"gradio>=([\d.]+)", (ROOT / "setup.cfg").read_text()).group(1)
    given = header["sdk_version"].strip('"')
    assert [int(part) for part in given.split(".")] >= [int(part) for part in needed.split(".")]
    assert "diffusers-wadi[demo]" in (SPACE / "requirements.txt").read_text()


def test_the_space_names_every_variable():
    text = (SPACE / "README.md").read_text()
    missing = [name for name in DemoSettings.__dataclass_fields__ if f"WADI_{name.upper()}" not in text]
    assert not missing
