"""Putting files into a Hub repository, with a model card that a person may take over."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_wadi._files import written_beside
from diffusers_wadi.model_card import GENERATED, CardDetails

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD_NAME = "README.md"


@dataclass(frozen=True)
class UploadOptions:
    """The keywords of diffusers' `push_to_hub`; `repo_id` defaults to the name of the folder."""

    repo_id: str | None = None
    commit_message: str | None = None
    private: bool | None = None
    token: str | bool | None = None
    create_pr: bool = False
    subfolder: str | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> UploadOptions:
        """From keywords.

        Raises:
            TypeError: names one that is unknown.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(options.keys() - set(known))
        if unknown:
            raise TypeError(f"unexpected keyword {unknown[0]!r}; for the upload there are {', '.join(known)}")
        return cls(**options)

    def name(self, folder: Path) -> str:
        """Of the repository that `folder` goes to."""
        return self.repo_id or folder.resolve().name


def refuse_local_base(base: str | os.PathLike | None) -> None:
    """Refuse to publish an adapter whose base is a path of this machine.

    Raises:
        ValueError: `base` is no Hub name and no folder name inside the repository.
    """
    if base is not None and str(base).startswith(("/", ".", "~")) or os.path.isabs(base or ""):
        raise ValueError(
            f"the base model of this adapter is {str(base)!r}, a folder of this machine. Pass base_model_name_or_path=: "
            "its Hub name, or the name of a folder in the same repository."
        )


def ensure_repository(options: UploadOptions, folder: Path) -> str:
    """Create the repository if need be, and return its full name; meant to be called before long work.

    Raises:
        OSError: the Hub cannot be reached, or does not let this token do it.
    """
    import huggingface_hub

    name, token = options.name(folder), options.token
    with _explained(name):
        return huggingface_hub.create_repo(name, private=options.private, token=token, exist_ok=True).repo_id


def publish(
    folder: Path, files: Sequence[str], options: UploadOptions, card: ModelCard, details: CardDetails | None = None
) -> str:
    """Put these files of a folder, and a model card, into a Hub repository, which is created if need be.

    A card that was not generated, or was taken over by a person, stays: one in the folder is uploaded, one in the
    repository left alone. With `options.subfolder` there is no card.

    Args:
        folder: holds the files; the generated card and the sample grid are written into it.
        files: paths inside it.
        options: see `UploadOptions`.
        card: the generated card.
        details: its sample grid is uploaded too.

    Returns:
        URL of the commit.

    Raises:
        OSError: the Hub cannot be reached, or does not let this token do it.
    """
    import huggingface_hub

    repository, files = ensure_repository(options, folder), list(files)
    if options.subfolder is None:  # a card stands at the top of a repository
        if _write_card(folder, card, repository, options.token):
            files.append(CARD_NAME)
        if details is not None and (picture := details.write_samples(folder)):
            files.append(picture)
    with _explained(repository):
        commit = huggingface_hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            path_in_repo=options.subfolder,
            allow_patterns=files,
            commit_message=options.commit_message or f"Upload with diffusers_wadi: {len(files)} files",
            create_pr=options.create_pr,
            token=options.token,
        )
    return commit.pr_url or commit.commit_url


def _write_card(folder: Path, card: ModelCard, repository: str, token: str | bool | None) -> bool:
    """Whether the folder's card is to be uploaded: a person's, or the generated one unless the repository has another."""
    path = folder / CARD_NAME
    if path.is_file() and GENERATED not in path.read_text(encoding="utf-8", errors="replace"):
        return True
    remote = _remote_card(repository, token)
    if remote is not None and GENERATED not in remote:
        return False
    with written_beside(path) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    return True


def _remote_card(repository: str, token: str | bool | None) -> str | None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    try:
        with _explained(repository):
            path = huggingface_hub.hf_hub_download(repository, CARD_NAME, token=token)
    except (EntryNotFoundError, RevisionNotFoundError):
        return None
    return Path(path).read_text(encoding="utf-8", errors="replace")


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Errors of the Hub's client as OSErrors that say what to do; a missing file or branch stays what it is."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
    from huggingface_hub.utils import httpx

    try:
        yield
    except (EntryNotFoundError, RevisionNotFoundError):
        raise
    except (HfHubHTTPError, httpx.HTTPError, ConnectionError, RuntimeError) as error:  # of a single file: RuntimeError
        reasons = [str(error)] + (
            [str(error.__cause__)] if isinstance(error, RuntimeError) and error.__cause__ else []
        )
        summary = " ".join(" ".join(reasons).split())
        raise OSError(
            f"cannot upload to {repository!r}: {summary} Log in with `hf auth login` or pass token=, with the right to "
            "write there, and check that the Hub can be reached (HF_HUB_OFFLINE must not be set)."
        ) from error
