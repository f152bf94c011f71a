"""What is known of the base model and the fine-tuned models from a comparison that was run on the same pools."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DiDiError
from .comparison import Comparison

#: how far above a run's directory a comparison is looked for
_LEVELS = 2

#: keys of the rows that others are held against
REFERENCES = ("pretrained", "individuals")

Known = dict[str, dict[str, float]]


def known_figures(directory: str | Path, pools: Mapping[str, Any]) -> Known:
    """Figures per task of the ``pretrained`` and ``individuals`` rows of the nearest comparison on equal pools.

    Args:
        directory: of a run; a comparison may lie in it, or up to two levels above.
        pools: configurations of ``modelpool`` and ``taskpool``, which must be equal.
    """
    place = Path(directory).resolve()
    for folder in (place, *place.parents[:_LEVELS]):
        file = folder / "comparison.json"
        if not file.is_file():
            continue
        try:
            comparison = Comparison.read(file)
        except DiDiError:
            continue
        config = comparison.data.get("config", {})
        if any(config.get(key) != value for key, value in pools.items()):
            continue
        return {
            row["key"]: dict(row["accuracy"])
            for row in comparison.good
            if row["key"] in REFERENCES
        }
    return {}
