"""The README's Python runs as it stands, and its commands are the ones that .ci/run finds."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_exactly_two_commands_do_all_set_up():
    assert re.findall(r"<!-- ci: (\w+) -->\n```bash\n[^\n]+\n```", README) == ["image", "test"]
    assert README.count("```bash") == 2


def test_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) >= 5
    names: dict = {}
    for code in snippets:
        if "unet" not in names and "pipe" in names:
            names["unet"] = names["pipe"].unet
        exec(compile(code, "README.md", "exec"), names)
    assert names["image"].size == (64, 64) and (tmp_path / "one-step-shapes" / "model_index.json").is_file()


TESTED = [page for page in PAGES if "<!-- test: snippet -->" in page.read_text()]


@pytest.mark.parametrize("page", TESTED, ids=[page.name for page in TESTED])
def test_snippets_of_the_documentation_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snippets = re.findall(r"<!-- test: snippet -->\n```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    names: dict = {}
    for code in snippets:
        exec(compile(code, page.name, "exec"), names)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_pictures_and_links_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "name", ["LICENSE", "setup.cfg", ".ci/run", "training/README.md", "CITATION.cff", "mkdocs.yml"]
)
def test_the_files_that_a_stranger_looks_for_are_there(name):
    assert (ROOT / name).is_file()
