"""The storage of whatever a method returned, in the one account of :mod:`fusion_bench_didi.deltas.storage`."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..artifacts.host_moe import host_storage
from ..models.dynamic import DynamicModel
from ..task_vectors.reader import TaskVectors
from ..task_vectors.scan import model_bits, scan


@dataclass(frozen=True)
class PoolFacts:
    """Facts about a model pool that the account and the ranks need.

    Args:
        unit_bits: one fine-tuned model (the tensors that some task changed).
        whole_bits: the same tensors of all fine-tuned models.
        types: these tensors as far as the base model has them, and the data type in which the checkpoints store them.
        smallest_side: of the linear layers' weights.
        tasks: names of the fine-tuned models.
        sizes: tensors of several sizes, of which the unit has an average, rounded down.
    """

    unit_bits: int
    whole_bits: int
    types: Mapping[str, torch.dtype]
    smallest_side: int
    tasks: tuple[str, ...]
    sizes: int = 0


@dataclass(frozen=True)
class Size:
    """Stored values in units of one fine-tuned model, beyond the backbone and with it."""

    x_excl: float
    x_incl: float
    note: str = ""


def facts_of(vectors: TaskVectors, backbone: nn.Module, device="cpu") -> PoolFacts:
    """Reads every checkpoint once, and so also finds NaN and misaligned ones before anything runs.

    Raises:
        CheckpointMismatchError, NonFiniteError, ModelPoolError: as the merge would.
    """
    found, base = scan(vectors, device), vectors.base.infos()
    types = {name: vectors.tuned_dtype(name) for name in found.changed}
    bits, tasks = model_bits(vectors, found), tuple(vectors.tasks)
    whole, sizes = len(tasks) * sum(bits[name] for name in found.changed), 0
    for name in found.changed_own:
        held = vectors.own_by_task(name)
        if name in base:
            types[name] = held[0].dtype
            held += [base[name]] * (len(tasks) - len(held))
        whole += sum(info.bits for info in held)
        sizes += len({info.bits for info in held}) > 1
    sides = [min(v.shape) for v in backbone.parameters() if v.ndim == 2]
    linear = [min(m.weight.shape) for m in backbone.modules() if type(m) is nn.Linear]
    return PoolFacts(
        unit_bits=sum(bits.values()),
        whole_bits=whole,
        types=types,
        smallest_side=min(linear or sides),
        tasks=tasks,
        sizes=sizes,
    )


def individuals_size(facts: PoolFacts) -> Size:
    stored = facts.whole_bits / facts.unit_bits
    return Size(stored, stored, "no backbone beside them")


def model_size(model: nn.Module, backbone: nn.Module, facts: PoolFacts) -> Size:
    """The account of a merged model.

    Args:
        backbone: the base model, as the pool gives it.

    Raises:
        TypeError: for a model that is neither a full model nor one of the known dynamic forms.
    """
    if isinstance(model, DynamicModel):
        report = model.storage
    elif report := host_storage(model, facts.tasks, unit_bits=facts.unit_bits):
        pass
    elif _shapes(model) == _shapes(backbone):
        return Size(1.0, 1.0, "folded: replaces the backbone")
    else:
        raise TypeError(
            f"No storage account for {type(model).__name__}: it is no DynamicModel, and its tensors are not those of "
            f"the base model {type(backbone).__name__}."
        )
    # tensors that the method was told to leave alone are the backbone's too
    excluded = facts.unit_bits - report.unit_bits
    beyond = report.excl_bits
    whole = beyond + report.backbone_bits + excluded
    return Size(beyond / facts.unit_bits, whole / facts.unit_bits)


def _shapes(model: nn.Module) -> dict:
    return {name: tuple(v.shape) for name, v in model.state_dict().items()}
