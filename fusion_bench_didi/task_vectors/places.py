"""Where models lie: in directories, or under their names on the Hugging Face hub."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..files import from_home

#: Seconds that the hub has to say whether it has a model.
_PATIENCE = 10.0


def is_name(place: str | Path, *, owned: bool = True) -> bool:
    """Whether a place may be a repository's name.

    Args:
        owned: it must have an owner, as all have but a few old ones.
    """
    if not isinstance(place, str) or owned and place.count("/") != 1:
        return False
    try:
        validate_repo_id(place)
    except HFValidationError:
        return False
    return True


def check_place(place: str | Path, *, owned: bool = True) -> None:
    """A model's place must exist, or may be a name that only the hub knows.

    Raises:
        FileNotFoundError: at once, without asking anyone.
    """
    if not from_home(place).exists() and not is_name(place, owned=owned):
        raise FileNotFoundError(
            f"{place} does not exist, and is no name of the hub (user/name). Mend the path."
        )


def check_to_be_had(name: str) -> None:
    """A repository must be in the client's cache, or the hub must have it: asked once, without the client's retries.

    Raises:
        FileNotFoundError: if it has none, or cannot be asked.
    """
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        huggingface_hub.HfApi().model_info(name, timeout=_PATIENCE)
    except RepositoryNotFoundError:
        found = "the hub has no model of that name"
    except Exception as error:  # of any type, of networks
        found = f"the hub cannot be asked for it ({type(error).__name__})"
    else:
        return
    raise FileNotFoundError(
        f"{name} is no directory, and {found}. Mend the path or the name."
    )
