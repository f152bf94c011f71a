"""Encoding every tensor as it was decided: truncate, refine, quantize, and measure what is not reproduced."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..deltas.plain import DenseDelta, OwnDelta
from ..deltas.sink import EncodedTensor, Sink
from ..distributed.ownership import SOLO, Crew
from ..errors import DiDiError, spelled
from ..task_vectors.loop import spread
from ..task_vectors.reader import TaskVectors
from .context import MergeContext
from .forms import Decision
from .forms.coded import CODED


def encode_all(
    context: MergeContext, decisions: Mapping[str, Decision], sink: Sink
) -> tuple[list[str], dict[str, Tensor]]:
    """Tasks' own tensors, vectors, then matrices, large ones first; the bases that decisions stand on are used up.

    Returns:
        the names in this order, and their (T,) squared errors.

    Raises:
        DiDiError: if a tensor leaves the range of the type that it is to be stored in.
    """
    dropped = context.settings.vectors == "pretrained"
    vectors = () if dropped else context.inventory.vectors

    def matrix(name: str) -> EncodedTensor:
        decision = decisions[name]
        return decision.form.encode(context, decision)

    def stored(encode: Callable[[str], EncodedTensor], name: str) -> Tensor | None:
        held = sink.recall(name)
        if held is None:
            held = encode(name).cpu()
            _check_range(held)
            # codes are as long as the signal, and not what loses least
            if name in decisions and decisions[name].form is not CODED:
                held = _worth_storing(held, context.energy[name].cpu())
            sink.put(held)
            context.store.encoded(name)
        return held.errors

    own = context.inventory.own
    order = keep_own(context.task_vectors, own, sink, context.crew)
    vector = partial(stored, partial(encode_vector, context))
    errors = dict(context.each("vectors", vector, vectors, kept=False))
    matrices = partial(stored, matrix)
    errors |= context.each("refine", matrices, decisions, kept=False)
    return [*order, *errors], errors


def _worth_storing(tensor: EncodedTensor, energy: Tensor) -> EncodedTensor:
    """A tensor without what loses all there is or more, as values do that few bits do not suit: nothing loses less.

    That is told expert by expert, and of all together where they have a shared part.
    """
    lost, shared = tensor.errors >= energy, tensor.shared
    if shared is not None:
        lost = (tensor.errors.sum() >= energy.sum()).expand_as(lost)
    if not bool(lost.any()):
        return tensor
    experts = [
        None if gone else one for gone, one in zip(lost.tolist(), tensor.experts)
    ]
    errors = tensor.errors.where(~lost, energy)
    return EncodedTensor(
        tensor.name, None if bool(lost.all()) else shared, experts, errors
    )


def _check_range(tensor: EncodedTensor) -> None:
    """Values beyond the range of a floating type would be stored as infinity, and show in the errors.

    Raises:
        DiDiError: naming the tensor, the type, and types of more range.
    """
    if tensor.errors is None or bool(tensor.errors.isfinite().all()):
        return
    for delta in filter(None, (tensor.shared, *tensor.experts)):
        for part in delta.tensors().values():
            if not bool(part.float().isfinite().all()):
                raise DiDiError(
                    f"{tensor.name}: what tasks change leaves the range of {str(part.dtype).removeprefix('torch.')}, up to "
                    f"{torch.finfo(part.dtype).max:g}. Set {spelled('factor_dtype', 'bfloat16')}, or float32."
                )


def keep_own(
    task_vectors: TaskVectors, names: Iterable[str], sink: Sink, crew: Crew = SOLO
) -> list[str]:
    """Put the tensors that every task keeps as it has them into a sink, but those that it holds already; their names in order."""

    def keep(name: str) -> None:
        if sink.recall(name) is None:
            values = [task_vectors.own_value(name, task) for task in task_vectors.tasks]
            own = [None if v is None else OwnDelta(tuple(v.shape), v) for v in values]
            sink.put(EncodedTensor(name, None, own).cpu())

    return [name for name, _ in spread(crew, "own", keep, names, kept=False)]


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
    for tau, expert in zip(vectors, experts):
        delta = expert if shared is None else shared
        rest = tau if delta is None else tau - delta.own()
        errors.append(rest.double().square().sum())
    return EncodedTensor(name, shared, experts, torch.stack(errors))
