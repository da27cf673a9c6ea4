"""The README's Python runs as it stands, and its commands are the ones that .ci/run finds."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_exactly_two_commands_do_all_set_up():
    assert re.findall(r"<!-- ci: (\w+) -->\n```bash\n[^\n]+\n```", README) == ["image", "test"]
    assert README.count("```bash") == 2


def test_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) >= 3
    names: dict = {}
    for code in snippets:
        if "unet" not in names and "pipe" in names:
            names["unet"] = names["pipe"].unet
        exec(compile(code, "README.md", "exec"), names)
    assert names["image"].size == (64, 64) and (tmp_path / "one-step-shapes" / "model_index.json").is_file()


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (Path(__file__).parent.parent / target).exists(), target
    for target in re.findall(r'src="([^"]+)"', README):
        assert (Path(__file__).parent.parent / target).exists(), target


@pytest.mark.parametrize("name", ["LICENSE", "setup.cfg", ".ci/run", "training/README.md"])
def test_the_files_that_a_stranger_looks_for_are_there(name):
    assert (Path(__file__).parent.parent / name).is_file()
