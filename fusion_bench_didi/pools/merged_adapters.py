"""Whole fine-tuned models from a pool whose entries are adapters, for methods that run the models or merge modules."""

from typing import Any

import torch
from fusion_bench.modelpool import BaseModelPool
from torch import nn

from ..errors import CheckpointMismatchError
from ..task_vectors.alignment import check_alignment
from ..task_vectors.live_models import all_tensors
from .entries import adapter_directory
from .host_forms import same_class
from .names_in_memory import Names
from .opening import adapter_source, base_of, load_backbone, untie_for


def adapted(modelpool: BaseModelPool) -> BaseModelPool:
    """The pool itself; if it has adapters, ``load_model`` gives the base model with the adapter put in for them.

    The host's pools give a model with adapter layers in it, whose tensors have other names than the base model's, or none.
    """
    names = [n for n in modelpool.model_names if adapter_directory(modelpool, n)]
    cls = type(modelpool)
    if names and not issubclass(cls, _Adapted):
        modelpool.__class__ = same_class(cls, _Adapted, cls)
    return modelpool


class _Adapted:
    """What :func:`adapted` puts in front of the pool's class; a copy of the pool then loads from the copy."""

    def load_model(self, name: Any, *args: Any, **kwargs: Any) -> nn.Module:
        known = isinstance(name, str) and name in self.model_names
        if known and adapter_directory(self, name):
            return tuned_model(self, name)
        return super().load_model(name, *args, **kwargs)


@torch.no_grad()
def tuned_model(modelpool: BaseModelPool, name: str) -> nn.Module:
    """The base model with an adapter put in.

    Raises:
        CheckpointMismatchError: if the adapter is none of this base model, neither LoRA nor DoRA, or of tensors of other sizes.
    """
    model = load_backbone(modelpool)
    untie_for(modelpool, model, [name])
    base, known, ignored = base_of(modelpool, model)
    source = adapter_source(modelpool, name, base, known, Names.of(model))
    check_alignment(base, {name: source}, ignored=ignored)
    live = all_tensors(model)
    for tensor in sorted(source.infos().keys() & live.keys()):
        value, place = source.applied(tensor, live[tensor]), live[tensor]
        if value.shape != place.shape:
            raise CheckpointMismatchError(
                f"{name}: {tensor} is {tuple(value.shape)}, the base model has {tuple(place.shape)}, and whole models of several sizes "
                "are not merged by this method. Take one that keeps such tensors per task, as didi does, or leave this adapter out."
            )
        place.copy_(value)
    return model
