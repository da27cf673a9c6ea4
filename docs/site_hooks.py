"""What the documentation site takes from outside of `docs/`: the training guide, pictures, and links to files."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
GUIDE, TRAINING = ROOT / "training" / "README.md", "training.md"  # the page that is made of it
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
PICTURES = {".png", ".svg", ".jpg"}


def on_files(files, config):
    text = GUIDE.read_text(encoding="utf-8")
    files.append(File.generated(config, TRAINING, content=text))
    for page in [*(ROOT / "docs").glob("*.md"), GUIDE]:
        for _, _, target, _ in LINK.findall(page.read_text(encoding="utf-8")):
            place = _outside(target, page.parent)
            if place is not None and place.suffix in PICTURES:
                files.append(File.generated(config, _asset(place), content=place.read_bytes()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to files of the repository: into `docs/` as they are, pictures to their copies, others to the repository."""
    folder = ROOT / ("training" if page.file.src_uri == TRAINING else posixpath.join("docs", page.file.src_uri, ".."))

    def rewritten(match):
        picture, text, target, anchor = match.groups(default="")
        place = _outside(target, folder)
        if place is None:
            inside = (folder / target).resolve()
            known = "://" not in target and inside.is_relative_to(ROOT / "docs")
            target = (
                inside.relative_to(ROOT / "docs").as_posix() if known and page.file.src_uri == TRAINING else target
            )
            return f"{picture}[{text}]({target}{anchor})"
        if place == GUIDE:
            return f"[{text}]({posixpath.relpath(TRAINING, posixpath.dirname(page.file.src_uri))}{anchor})"
        if picture:
            return f"![{text}]({_asset(place)})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{place.relative_to(ROOT).as_posix()}{anchor})"
        return text

    return LINK.sub(rewritten, markdown)


def _outside(target, folder):
    """The file of the repository that a link from `folder` means, or None if it is in `docs/` or elsewhere."""
    place = (Path(folder) / target).resolve()
    outside = "://" not in target and place.exists() and not place.is_relative_to(ROOT / "docs")
    return place if outside and place.is_relative_to(ROOT) else None


def _asset(place):
    return f"assets/{place.name}"
