"""Images of a task from the model pool, for the methods that look at some: never the test images, never class labels."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from fusion_bench.dataset.image_dataset import ImageClassificationDataset
from fusion_bench.modelpool import BaseModelPool
from torch import Tensor

from ..errors import ModelPoolError
from .task_names import names_of

Aliases = Mapping[str, str] | None


def require_images(
    modelpool: BaseModelPool,
    aliases: Aliases = None,
    *,
    purpose: str,
    otherwise: str = "",
) -> None:
    """Every model needs a train or validation dataset.

    Args:
        purpose: the beginning of the message, what the images are for.
        otherwise: its end, how to do without.

    Raises:
        ModelPoolError: naming the tasks without one.
    """
    names = modelpool.model_names
    missing = [name for name in names if _source(modelpool, name, aliases) is None]
    if missing:
        raise ModelPoolError(
            f"{purpose}; the pool has none for {missing}: train_datasets {modelpool.train_dataset_names}, val_datasets "
            f"{modelpool.val_dataset_names}. Add modelpool.train_datasets (test datasets are never used){otherwise}."
        )


def load_images(
    modelpool: BaseModelPool,
    task: str,
    count: int,
    *,
    seed: int,
    aliases: Aliases = None,
) -> Tensor:
    """Preprocessed images of one task, chosen at random.

    Args:
        count: how many; all where the dataset has fewer.

    Returns:
        (count, channels, height, width).
    """
    load, name = _source(modelpool, task, aliases)
    dataset = ImageClassificationDataset(load(name), _processor(modelpool))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(dataset), generator=generator)[:count]
    return torch.stack([dataset[i][0] for i in chosen.tolist()])


def _source(
    modelpool: BaseModelPool, task: str, aliases: Aliases
) -> tuple[Callable[[str], Any], str] | None:
    """(loader, dataset name) of a task's train or else validation images, or None."""
    for given, load in (
        (modelpool.train_dataset_names, modelpool.load_train_dataset),
        (modelpool.val_dataset_names, modelpool.load_val_dataset),
    ):
        names = names_of(modelpool.model_names, given, aliases)
        if task in names:
            return load, names[task]
    return None


def _processor(modelpool: BaseModelPool) -> Any:
    if callable(getattr(modelpool, "load_processor", None)):
        return modelpool.load_processor()
    return getattr(modelpool, "test_processor", None)
