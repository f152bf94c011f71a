"""The loss of a batch out of those of its parts, where it is known how the model works it out of logits and labels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .trees import Path, leaves, mapped


def _entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())


def _next_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return _entropy(logits[:, :-1], labels[:, 1:])


def _squares(logits: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits))


def _binary(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits))


def _fitting(logits: Tensor, labels: Tensor) -> Iterator[Callable]:
    """Losses that could be of logits and labels of these shapes; all are means over samples, or over tokens that count."""
    if not labels.is_floating_point() and labels.shape == logits.shape[:-1]:
        yield _entropy
        if labels.ndim > 1:
            yield _next_entropy
    if logits.squeeze().shape == labels.squeeze().shape:
        yield _squares
    if logits.shape == labels.shape and labels.is_floating_point():
        yield _binary


def with_loss(
    whole: Any,
    parts: Sequence[Any],
    losses: Sequence[Path],
    given: Sequence[Mapping[str, Any]],
    back: Tensor,
) -> Any:
    """The output with the loss of the batch, where that of every part is found to be a known function of its logits and labels; else
    None."""
    (path, *others), found = losses, None
    labels = [arguments.get("labels") for arguments in given]
    if not others and labels and all(isinstance(label, Tensor) for label in labels):
        held = [leaves(part) for part in parts]
        same = partial(torch.allclose, rtol=1e-4, equal_nan=True)
        for beside in _logits_beside(path, held[0]):
            pairs = [(h[beside].detach(), label) for h, label in zip(held, labels)]
            for formula in _fitting(*pairs[0]):
                made = (formula(*pair) for pair in pairs)
                if all(same(loss, h[path].float()) for loss, h in zip(made, held)):
                    truth = torch.cat(labels)[back.to(labels[0].device)]
                    found = formula(leaves(whole)[beside], truth).to(held[0][path])
    if found is None:
        return None
    return mapped(lambda at, value: found if at == path else value, whole)


def asking_for_losses(given: Sequence[Mapping[str, Any]]) -> list[str]:
    """Arguments by which a model was asked for losses."""
    arguments = given[0] if given else {}
    asking = [
        f"{name}=True"
        for name, value in arguments.items()
        if value is True and ("loss" in name or "logits" in name)
    ]
    if arguments.get("labels") is not None:
        asking.insert(0, "labels")
    return asking


def _logits_beside(path: Path, held: Mapping[Path, Any]) -> list[Path]:
    """Where the logits of a loss may be: under their name, or next to it."""
    options = [(*path[:-1], "logits")] if path else []
    if path and isinstance(path[-1], int):
        options.append((*path[:-1], path[-1] + 1))
    return [at for at in options if isinstance(held.get(at), Tensor)]
