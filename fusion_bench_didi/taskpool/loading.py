"""What torch's loaders are given, checked when a pool is made: the host makes its loaders when the merge is done."""

from typing import Annotated, Any

from pydantic import Field

from ..options import Count, PositiveCount, check_values

_TYPES = {
    "batch_size": Annotated[PositiveCount, Field(strict=True)],
    "num_workers": Annotated[Count, Field(strict=True)],
}


def check_loading(taskpool: Any) -> None:
    """The ``dataloader_kwargs`` of a pool of the host's.

    Raises:
        SettingsError: naming those of another type or range.
    """
    given = getattr(taskpool, "_dataloader_kwargs", None) or {}
    prefix = "dataloader_kwargs."
    check_values(
        {prefix + key: given[key] for key in _TYPES if key in given},
        {prefix + key: kind for key, kind in _TYPES.items()},
    )
