"""Saved models on the Hugging Face hub: found by their repository's name, and put there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..errors import DiDiError
from ..files import from_home
from ..task_vectors.places import check_place, is_name

#: How the client is logged in.
LOGIN = "hf auth login"
#: What no saved model consists of, and what would run when it is opened by others.
_NEVER = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.py", "*.so")


def local_directory(
    place: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """A directory, or where the hub's client keeps the repository of that name.

    Args:
        revision: of the repository: a branch, a tag, or a commit.
        token: for private repositories; the one that the client was logged in with if None.

    Raises:
        FileNotFoundError: for what does not exist and can be no name, or where the hub cannot be asked.
        DiDiError: if the repository cannot be had.
    """
    path = from_home(place)
    check_place(place)
    if path.exists():
        return path
    try:
        found = huggingface_hub.snapshot_download(
            str(place), revision=revision, token=token, ignore_patterns=list(_NEVER)
        )
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{place} is no directory, and the hub cannot be asked for it. Mend the path or the name."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise DiDiError(
            f"{place} is neither a directory nor a repository that can be had from the hub ({type(error).__name__}: {error}). Mend "
            f"the name, or log in: {LOGIN}."
        ) from error
    return Path(found)


def check_upload(repository: str) -> None:
    """What is known to keep a model from the hub before it is asked.

    Raises:
        DiDiError: for what can be no name of a repository, and where the client was told to stay offline.
    """
    if not is_name(repository, owned=False):
        raise DiDiError(
            f"{repository} is no name that a repository can have. Give user/name."
        )
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise DiDiError(
            f"Nothing is uploaded to {repository} while HF_HUB_OFFLINE is set. Unset it."
        )


@contextmanager
def _told_by_hub(repository: str) -> Iterator[None]:
    """What the hub, or the way to it, refuses, in a line with the way out."""
    try:
        yield
    except Exception as error:  # of any type, of networks
        status = getattr(getattr(error, "response", None), "status_code", None)
        first = next(filter(None, map(str.strip, str(error).splitlines())), "")
        why = f"{type(error).__name__}: {first}".rstrip(".: ")
        way = f"Log in with a token that may write there: {LOGIN}"
        if status not in (401, 403):
            way = "Mend the name or the connection, and run it again"
        raise DiDiError(
            f"{repository} cannot be written to on the hub ({why}). {way}."
        ) from error


def repository_for(
    repository: str, *, private: bool | None, token: str | bool | None
) -> str:
    """The whole name of a repository that may be written to, which is made if there is none.

    Raises:
        DiDiError: as by :func:`check_upload`, and if the hub refuses or cannot be asked.
    """
    check_upload(repository)
    with _told_by_hub(repository):
        client = huggingface_hub.HfApi(token=token)
        found = client.create_repo(repository, private=private, exist_ok=True)
    return str(found.repo_id)


def upload(
    directory: Path,
    repository: str,
    *,
    token: str | bool | None,
    revision: str | None,
    message: str,
) -> str:
    """Put a directory's files into a repository that there is; where the commit is to be seen.

    Raises:
        DiDiError: if the hub refuses or cannot be asked.
    """
    with _told_by_hub(repository):
        client = huggingface_hub.HfApi(token=token)
        if revision is not None:
            client.create_branch(repository, branch=revision, exist_ok=True)
        commit: Any = client.upload_folder(
            repo_id=repository,
            folder_path=directory,
            revision=revision,
            commit_message=message,
        )
    return str(getattr(commit, "commit_url", commit))
