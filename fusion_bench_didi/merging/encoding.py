"""Encoding every tensor as it was decided: truncate, refine, quantize, and measure what is not reproduced."""

from collections.abc import Iterator, Mapping

import torch

from ..deltas.plain import DenseDelta, OwnDelta
from ..deltas.sink import EncodedTensor
from ..task_vectors.reader import TaskVectors
from .context import MergeContext
from .forms import Decision


def encode_all(
    context: MergeContext, decisions: Mapping[str, Decision]
) -> Iterator[EncodedTensor]:
    """Tasks' own tensors, vectors, then matrices, large ones first; the bases that decisions stand on are used up."""
    for name in context.inventory.own:
        yield encode_own(context.task_vectors, name)
    dropped = context.settings.vectors == "pretrained"
    vectors = () if dropped else context.inventory.vectors

    def encode(name: str) -> EncodedTensor:
        decision = decisions[name]
        return decision.form.encode(context, decision)

    for stage, function, names in (
        ("vectors", lambda name: encode_vector(context, name), vectors),
        ("refine", encode, decisions),
    ):
        for item in context.each(stage, function, names):
            yield item[1]
            del item  # not kept while the next is waited for


def encode_own(task_vectors: TaskVectors, name: str) -> EncodedTensor:
    """A tensor that every task keeps as it has it."""
    values = [task_vectors.own_value(name, task) for task in task_vectors.tasks]
    experts = [None if v is None else OwnDelta(tuple(v.shape), v) for v in values]
    return EncodedTensor(name, None, experts)


def encode_vector(context: MergeContext, name: str) -> EncodedTensor:
    """A bias, norm or the like under the vector policy: one copy per task, or their mean."""
    tensor, dtype = context.tensor(name), context.inventory.vector_dtypes[name]
    vectors, energy = tensor.stacked(), context.energy[name]
    shared, experts = None, [None] * len(vectors)
    if context.settings.vectors == "shared":
        shared = DenseDelta(tensor.shape, vectors.mean(0).to(dtype))
    else:
        experts = [
            DenseDelta(tensor.shape, tau.to(dtype)) if e > 0 else None
            for tau, e in zip(vectors, energy)
        ]
    errors = []
    for tau, expert in zip(vectors.cpu(), experts):
        delta = expert if shared is None else shared
        rest = tau if delta is None else tau - delta.own()
        errors.append(rest.double().square().sum())
    return EncodedTensor(name, shared, experts, torch.stack(errors))
