"""One storage account for every merged model.

Counted is what is stored beyond the text heads, in bits, and given in units of one fine-tuned model:

``x = bits / unit_bits``, ``unit_bits`` = the changed tensors of one fine-tuned model in the data type of its checkpoint.

``x_excl`` leaves the backbone out, ``x_incl`` counts it once. A tensor that no task changed costs nothing and is not
in the unit either. A LoRA adapter counts as the fine-tuned model that it makes: the unit holds the *dense* tensors that
adapters change, so that T adapters of rank r on (m, n) are ``T r (m + n) / (m n)``, and budgets far below 1 are usual.

Bits are those of the stored tensors (masks packed, indices included), not of the parameters.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch

from ..report.units import storage_line
from .base import Delta
from .grouped import commons


@dataclass(frozen=True)
class StorageReport:
    """The storage account of a merged model: bits by part.

    Args:
        unit_bits: one fine-tuned model.
        backbone_bits: the base model's values of the changed tensors. A saved model refers to them, so that all of them are
            needed beside what it stores, also where they are only ever used together with a shared part.
        shared_bits: what all tasks use, or all of a group.
        expert_bits: per task.
        routing_bits: the router; 0 when the task is given.
        layer_bits: shared and experts together, per tensor.
    """

    unit_bits: int
    backbone_bits: int
    shared_bits: int
    expert_bits: Mapping[str, int]
    routing_bits: int = 0
    layer_bits: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if self.unit_bits <= 0:
            raise ValueError(f"unit_bits must be positive, got {self.unit_bits}.")

    def __repr__(self) -> str:
        return f"<StorageReport: {storage_line(self.as_dict())}>"

    @property
    def excl_bits(self) -> int:
        """Bits beyond the backbone."""
        return self.shared_bits + sum(self.expert_bits.values()) + self.routing_bits

    @property
    def x_excl(self) -> float:
        return self.excl_bits / self.unit_bits

    @property
    def x_incl(self) -> float:
        return (self.excl_bits + self.backbone_bits) / self.unit_bits

    def as_dict(self) -> dict:
        """JSON-plain, with the two ratios."""
        return {**asdict(self), "x_excl": self.x_excl, "x_incl": self.x_incl}


def account(
    shared: Mapping[str, Delta],
    experts: Mapping[str, Mapping[str, Delta]],
    *,
    unit_bits: int,
    backbone_bits: int | None = None,
    routing_bits: int = 0,
) -> StorageReport:
    """Add up the bits of stored deltas.

    Args:
        shared: by tensor name.
        experts: by task, then tensor name.
        backbone_bits: ``unit_bits`` if None (base and checkpoints are of one type).
    """
    layers: dict[str, int] = {}
    pairs = [pair for deltas in experts.values() for pair in deltas.items()]
    grouped = [(name, delta) for (_, name), delta in commons(pairs).items()]
    for name, delta in (*shared.items(), *pairs, *grouped):
        layers[name] = layers.get(name, 0) + delta.bits
    return StorageReport(
        unit_bits=unit_bits,
        backbone_bits=unit_bits if backbone_bits is None else backbone_bits,
        shared_bits=sum(d.bits for _, d in (*shared.items(), *grouped)),
        expert_bits={
            task: sum(d.bits for d in deltas.values())
            for task, deltas in experts.items()
        },
        routing_bits=routing_bits,
        layer_bits=layers,
    )


def dtype_bits(dtype: torch.dtype) -> int:
    return 8 * dtype.itemsize


def told(deltas: Mapping[str, Delta]) -> set[str]:
    """Names of tensors of which something is stored."""
    return {name for name, delta in deltas.items() if delta.bits}
