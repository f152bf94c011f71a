"""Saved models on the Hugging Face hub: found by their repository's name, and put there."""

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..errors import DiDiError
from ..files import from_home
from ..task_vectors.places import check_place

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
            "the name, or log in: huggingface-cli login."
        ) from error
    return Path(found)


def upload(
    directory: Path,
    repository: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    message: str,
) -> str:
    """Put a directory's files into a repository, which is made if there is none; where the commit is to be seen."""
    client = huggingface_hub.HfApi(token=token)
    found = client.create_repo(repository, private=private, exist_ok=True)
    if revision is not None:
        client.create_branch(found.repo_id, branch=revision, exist_ok=True)
    commit: Any = client.upload_folder(
        repo_id=found.repo_id,
        folder_path=directory,
        revision=revision,
        commit_message=message,
    )
    return str(getattr(commit, "commit_url", commit))
