"""Settings of a merge, found again in what was saved with its model."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..allocation.learned import LearningSettings
from ..errors import SettingsError
from ..lowrank.refinement import RefinementSettings
from ..merging.settings import Budget, MergeSettings


def merged_with(info: Mapping[str, Any], budget: Budget) -> MergeSettings:
    """The settings of the merge that a model's ``info`` tells of, with another budget; the defaults for other methods' models."""
    told = info.get("settings")
    if not isinstance(told, Mapping) or not isinstance(told.get("learning"), Mapping):
        return MergeSettings(budget)
    names = {field.name for field in fields(MergeSettings)}
    given = {key: value for key, value in told.items() if key in names}
    try:
        groups = {
            "learning": LearningSettings(**told["learning"]),
            "refining": RefinementSettings(**told["refining"]),
        }
        memory = float(told["factor_memory_gb"])
    except (KeyError, TypeError, ValueError) as error:
        raise SettingsError(
            f"The settings that the model was merged with cannot be read ({error}). Give settings=MergeSettings(...)."
        ) from error
    return MergeSettings(
        **given | groups | {"budget": budget, "factor_memory_gb": memory}
    )


def of_one_task(
    given: MergeSettings | Mapping[str, Any], budget: Budget
) -> MergeSettings:
    """Settings for one task by itself, which shares nothing anew.

    Args:
        given: of a merge, or a model's ``info``.
    """
    if not isinstance(given, MergeSettings):
        given = merged_with(given, budget)
    bounded = given.max_rank is not None
    plain = given.vectors == "pretrained" or bounded
    return MergeSettings(
        budget,
        shared="none",
        normalization=given.normalization,
        max_rank=given.max_rank,
        vectors="pretrained" if plain else "expert",
        factor_dtype=given.factor_dtype,
        quantizer=given.quantizer,
        gain=given.gain,
        factor_memory_gb=given.factor_memory_gb,
    )
