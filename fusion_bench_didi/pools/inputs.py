"""Images or texts of a task from the model pool, for the methods that look at some: never the test data, never class labels."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from fusion_bench.dataset.image_dataset import ImageClassificationDataset
from fusion_bench.modelpool import BaseModelPool
from torch import Tensor

from ..errors import ModelPoolError, spelled
from ..options import Aliases
from .task_names import names_of

#: One batch: images (N, channels, height, width), or what a text model takes by name, each (N, tokens).
Inputs = Tensor | dict[str, Tensor]
#: Tokens of a text that are looked at.
TOKENS = 128
_TEXT = "text"


def require_inputs(
    modelpool: BaseModelPool,
    aliases: Aliases = None,
    *,
    purpose: str,
    otherwise: str = "",
) -> None:
    """Every model needs a train or validation dataset.

    Args:
        purpose: the beginning of the message, what the data are for.
        otherwise: its end, how to do without.

    Raises:
        ModelPoolError: naming the tasks without one.
    """
    names = modelpool.model_names
    missing = [name for name in names if _source(modelpool, name, aliases) is None]
    if missing:
        raise ModelPoolError(
            f"{purpose}; the pool has none for {missing}: train_datasets {modelpool.train_dataset_names}, val_datasets "
            f"{modelpool.val_dataset_names}. Add {spelled('modelpool.train_datasets')} (test datasets are never used){otherwise}."
        )


def load_inputs(
    modelpool: BaseModelPool,
    task: str,
    count: int,
    *,
    seed: int,
    aliases: Aliases = None,
) -> Inputs:
    """Preprocessed images of one task, or its tokenized texts (rows with a ``text``), chosen at random.

    Args:
        count: how many; all where the dataset has fewer.
    """
    load, name = _source(modelpool, task, aliases)
    rows = load(name)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=generator)[:count].tolist()
    first = rows[0]
    if isinstance(first, Mapping) and isinstance(first.get(_TEXT), str):
        return _tokenized(modelpool, [rows[i][_TEXT] for i in chosen])
    if callable(getattr(modelpool, "load_processor", None)):
        processor = modelpool.load_processor()
    else:
        processor = getattr(modelpool, "test_processor", None)
    dataset = ImageClassificationDataset(rows, processor)
    return torch.stack([dataset[i][0] for i in chosen])


def parts(inputs: Inputs, size: int) -> Iterator[tuple[tuple, dict[str, Tensor]]]:
    """Positional and named arguments of a forward for every ``size`` samples; texts without what is padding for all of them."""
    if isinstance(inputs, Tensor):
        for part in inputs.split(size):
            yield (part,), {}
        return
    mask = inputs["attention_mask"]
    for start in range(0, len(mask), size):
        part = {key: value[start : start + size] for key, value in inputs.items()}
        used = part["attention_mask"].any(0).nonzero()
        last = int(used.max()) + 1 if len(used) else mask.shape[1]
        yield (), {key: value[:, :last] for key, value in part.items()}


def _tokenized(modelpool: BaseModelPool, texts: list[str]) -> dict[str, Tensor]:
    tokenizer = modelpool.load_tokenizer()
    tokenizer.padding_side = "right"
    how = {"truncation": True, "max_length": TOKENS, "padding": True}
    return dict(tokenizer(texts, return_tensors="pt", **how))


def _source(
    modelpool: BaseModelPool, task: str, aliases: Aliases
) -> tuple[Callable[[str], Any], str] | None:
    """(loader, dataset name) of a task's train or else validation data, or None."""
    for given, load in (
        (modelpool.train_dataset_names, modelpool.load_train_dataset),
        (modelpool.val_dataset_names, modelpool.load_val_dataset),
    ):
        names = names_of(modelpool.model_names, given, aliases)
        if task in names:
            return load, names[task]
    return None
