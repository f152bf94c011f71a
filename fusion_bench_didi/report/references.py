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


def nearest_comparison(
    directory: str | Path, pools: Mapping[str, Any]
) -> tuple[Path, Comparison] | None:
    """A comparison on equal pools in a run's directory, or up to two levels above.

    Args:
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
        if all(config.get(key) == value for key, value in pools.items()):
            return file, comparison
    return None


def known_figures(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Figures per task of its rows ``pretrained`` and ``individuals``."""
    return {
        row["key"]: dict(row["accuracy"])
        for row in comparison.good
        if row["key"] in REFERENCES
    }
