"""The tasks of a batch's rows, some of which the router finds."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..models import DynamicModel
from .batching import Row
from .limits import Refused

Key = TypeVar("Key", bound=Hashable)


def tasks_of(
    model: DynamicModel, rows: Sequence[Row], inputs: Mapping[str, Tensor]
) -> dict[str, Any]:
    """``task_ids``, or ``task_weights`` where some row has none.

    Args:
        inputs: of the rows, tensors whose first side they are; the router is given its rows of them.
    """
    tasks = model.tasks
    routed = torch.tensor([row.task is None for row in rows])
    if not routed.any():
        return {"task_ids": [row.task for row in rows]}
    some = {name: value[routed.to(value.device)] for name, value in inputs.items()}
    found = model.router.route(model, **some).float().cpu()
    weights = torch.zeros(len(rows), len(tasks))
    weights[routed] = found
    for place, row in enumerate(rows):
        if row.task is not None:
            weights[place, tasks.index(row.task)] = 1
    return {"task_weights": weights}


def check_tokens(tokenizer: Any, ids: Sequence[int], known: float) -> None:
    """Whether a model has rows for tokens; its tokenizer may know more of them.

    Args:
        known: tokens that the model has rows for.

    Raises:
        Refused: 400, with the first one that it has none for.
    """
    beyond = next((token for token in ids if token >= known), None)
    if beyond is not None:
        word = tokenizer.convert_ids_to_tokens(beyond)
        raise Refused(400, f"The model knows no token {word!r}; leave it out.")


def answered(
    model: DynamicModel, rows: Sequence[Row], run: Callable[[Sequence[Row]], list[Any]]
) -> list[Any]:
    """Answers to rows, in one batch unless the router scales the shared part, which is whole under tasks that are named."""
    routed = [row.task is None for row in rows]
    if not any(routed) or model.router.shared_scale == 1:
        return run(rows)
    return by_key(rows, routed, lambda some, _: run(some))


def by_key(
    items: Sequence[Any], keys: Sequence[Key], run: Callable[[list, Key], Iterable[Any]]
) -> list[Any]:
    """Results of items, of which those of each key are run by themselves.

    Args:
        keys: one per item.
    """
    found: dict[int, Any] = {}
    for key in dict.fromkeys(keys):
        places = [place for place, other in enumerate(keys) if other == key]
        found.update(zip(places, run([items[place] for place in places], key)))
    return [found[place] for place in range(len(items))]
