"""How many layers a configuration asks for, held against the weights beside it: transformers builds them one by one."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointMismatchError
from ..task_vectors.file_sources import read_json
from .weight_files import Weights, open_weights

#: Settings that say how often something with weights is made.
_COUNTS = re.compile(r"(?!max_)\w*(layers?|experts|depth)")
#: So many are made in seconds, whatever the weights hold.
_FEW = 1000


def check_counts(directory: Path, label: str, weights: Weights = Weights()) -> None:
    """No more layers are asked for than there are tensors.

    Args:
        directory: of a model.
        label: of the model, for messages.
        weights: that are asked for.

    Raises:
        CheckpointMismatchError: naming file and setting.
    """
    file = directory / weights.subfolder / "config.json"
    try:
        config = read_json(file, label, "a model's configuration")
    except CheckpointMismatchError:
        return  # whoever needs it says so
    asked = {
        key: value
        for key, value in pairs(config)
        if _COUNTS.fullmatch(key) and type(value) is int and value > _FEW
    }
    source = open_weights(directory, label, weights) if asked else None
    if source is None:
        return
    for key, value in asked.items():
        if value > len(source.infos()):
            raise CheckpointMismatchError(
                f"{label}: {file} says {key}={value}, while the weights beside it are {len(source.infos())} tensors. Mend the "
                "configuration, or download it again."
            )


def pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys of nested objects, with their values."""
    left = [value]  # of any depth
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            yield from value.items()
            left += value.values()
        elif isinstance(value, list):
            left += value
