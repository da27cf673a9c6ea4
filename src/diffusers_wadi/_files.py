"""Finding files, here or on the Hugging Face Hub, and writing them so that nothing is ever half there."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class NotCachedError(FileNotFoundError):
    """The Hub cannot be reached, and the file is not in the local cache: whether it exists is not known."""


HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """The part of diffusers' loading keywords that `huggingface_hub` knows, without those left at None."""
    return {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}


def refuse_unknown_options(options: dict[str, Any]) -> None:
    """Refuse keywords that would be ignored, such as a misspelt `revision`.

    Raises:
        TypeError: names the first of them.
    """
    unknown = sorted(options.keys() - set(HUB_OPTIONS))
    if unknown:
        raise TypeError(f"unexpected keyword {unknown[0]!r}; expected {', '.join(HUB_OPTIONS)}")


def find_file(source: str | os.PathLike, filename: str, subfolder: str | None = None, **hub: Any) -> Path | None:
    """Look for one file in a local folder or a Hub repository.

    Args:
        source: local folder, or Hub name "org/name". A local folder wins.
        filename: file inside it; must stay inside.
        subfolder: folder inside `source` to look in.
        **hub: revision, token, cache_dir, local_files_only, force_download, proxies.

    Returns:
        Its local path, or None if `source` exists but holds no such file.

    Raises:
        ValueError: `filename` or `subfolder` points outside of `source`.
        NotCachedError: the Hub cannot be reached (or is not to be), and the file is not in the local cache.
        OSError: `source` is neither a local folder nor a repository that can be reached.
    """
    inside = Path(subfolder or "", filename)
    if inside.is_absolute() or ".." in inside.parts:
        raise ValueError(f"{str(inside)!r} leaves {str(source)!r}; give a name inside it")
    folder = Path(source)
    if folder.is_dir():
        return folder / inside if (folder / inside).is_file() else None
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file; expected a folder that holds {filename}")
    return _download(str(source), inside.as_posix(), hub)


def probe_file(source: str | os.PathLike, filename: str, subfolder: str | None = None, **hub: Any) -> Path | None:
    """As `find_file`, for files that need not be there: None too if the Hub's cache lacks it and cannot be asked."""
    try:
        return find_file(source, filename, subfolder, **hub)
    except NotCachedError:
        return None


def folder_inside(source: str | os.PathLike, name: str, marker: str, subfolder: str | None, **hub: Any) -> Path | None:
    """Look for a folder in a local folder or a Hub repository.

    Args:
        source: local folder, or Hub name.
        name: of the folder, inside `subfolder` of `source`.
        marker: a file by which such a folder is known in a repository, where folders do not exist by themselves.
        **hub: see `find_file`.

    Returns:
        Its local path, in the Hub's cache after a download of all that lies in it, or None if there is none.

    Raises:
        OSError: it is there, but cannot be downloaded.
    """
    inside = Path(subfolder or "", name)
    if inside.is_absolute() or ".." in inside.parts or Path(source).is_file():
        return None
    if Path(source).is_dir():
        return Path(source, inside) if Path(source, inside).is_dir() else None
    if probe_file(source, marker, inside.as_posix(), **hub) is None:
        return None
    from huggingface_hub import snapshot_download

    with _explained(str(source)):
        return Path(snapshot_download(str(source), allow_patterns=f"{inside.as_posix()}/*", **hub), inside)


def _download(repository: str, filename: str, hub: dict[str, Any]) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        with _explained(repository):
            return Path(hf_hub_download(repository, filename, **hub))
    except LocalEntryNotFoundError as error:
        reason = f"its {filename} is not in the local cache and could not be downloaded"
        raise NotCachedError(f"{repository!r} is not a folder here, and as a Hub name {reason}. {ADVICE}") from error
    except EntryNotFoundError:
        return None


ADVICE = "Check the spelling; for a private repository pass token=, and offline it must already be in the cache."


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Errors of the Hub's client as OSErrors that say what to do; a missing file stays what it is."""
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError
    from huggingface_hub.utils import httpx

    try:
        yield
    except EntryNotFoundError:
        raise
    except (HFValidationError, OSError, httpx.HTTPError) as error:  # the Hub's answers are OSErrors, a cut line is not
        summary = " ".join(
            [line for line in str(error).splitlines() if line.strip()][:2]
        )  # what, and about which address
        raise OSError(f"{repository!r} is not a folder here, nor a usable Hub name: {summary} {ADVICE}") from error


def writable_folder(folder: str | os.PathLike) -> Path:
    """Create `folder` if need be and prove by a trial file that it can be written to.

    Raises:
        OSError: it cannot be created or written to. Meant to be called before long work.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Not os.access: it says yes to root on a read-only disk and knows nothing of quotas.
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(f"cannot write to the folder {path}: {reason}. Choose one that you may write to.") from error
    return path


@contextmanager
def written_beside(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and move it onto `path` when the block ends without an error."""
    path = Path(path)
    # The suffix stays last, since writers such as PIL choose the format by it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        _usual_permissions(Path(name))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def folder_written_beside(target: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty temporary folder on the disk of `target`, and publish it there when the block ends well.

    A new target appears in one move. In an existing one every file is replaced in one move, those of the top level
    last, since there stands the index that readers look at first; other files in it stay.
    """
    target = Path(target)
    fresh = not target.exists()
    parent = writable_folder(target.parent if fresh else target)
    staged = Path(tempfile.mkdtemp(dir=parent, prefix=f".{target.name}-"))
    try:
        yield staged
        staged.chmod(0o777 & ~_umask())
        if fresh:
            os.replace(staged, target)
        else:
            _move_files(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _move_files(source: Path, target: Path) -> None:
    files = [file for file in source.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: -len(file.parts)):
        destination = target / file.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, destination)


def _usual_permissions(path: Path) -> None:
    # mkstemp makes files that only their owner can read; a checkpoint is for whoever the umask says.
    path.chmod(0o666 & ~_umask())


_reading_umask = threading.Lock()


def _umask() -> int:
    with _reading_umask:  # which is done by setting it: two threads at once would leave 0
        mask = os.umask(0)
        os.umask(mask)
    return mask
