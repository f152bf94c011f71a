"""Which per-sample form every changed layer of a backbone has, and the network that is made of these layers."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from torch import nn

from ..task_vectors.layers import is_conv1d
from .banks import MatrixBank, OwnBank
from .fused_linears import fuse
from .layers import (
    PerSampleEmbedding,
    PerSampleLayerNorm,
    PerSampleLinear,
    PerSamplePatchConv,
    PerSampleRMSNorm,
    apart,
    broadcast_form,
    is_turned,
)
from .making import AnyBank
from .running import Running
from .shadow import Slot, shadowed, slots_of
from .stored import StoredBank

#: bare parameters (n,) that broadcast in their module's forward, which then takes them per sample as (B, 1, n)
BROADCAST = {"CLIPVisionEmbeddings": "class_embedding"}


def form_of(module: nn.Module, leaves: Mapping[str, Any]) -> type | None:
    """The per-sample form of a module, or None for kinds not known here.

    Args:
        leaves: its changed tensors by their name in the module.
    """
    kind = type(module)
    if "forward" in vars(module):  # it would not be the form's
        return None
    leaf = BROADCAST.get(kind.__name__)
    if leaf is not None and set(leaves) == {leaf}:
        return broadcast_form(leaf)
    if not set(leaves) <= {"weight", "bias"}:
        return None
    if kind is nn.Linear or is_conv1d(module):
        return PerSampleLinear
    if kind is nn.Conv2d and apart(module):
        return PerSamplePatchConv
    if kind is nn.LayerNorm and module.weight is not None:
        return PerSampleLayerNorm
    if kind is nn.Embedding and module.max_norm is None:
        return PerSampleEmbedding
    # torch's own takes no weight per sample
    if kind.__name__.endswith("RMSNorm") and kind is not nn.RMSNorm:
        return PerSampleRMSNorm if set(leaves) == {"weight"} else None
    return None


def per_sample_network(
    backbone: nn.Module, banks: Mapping[str, AnyBank], running: Running
) -> nn.Module | None:
    """The network; None if a changed tensor belongs to a module without a per-sample form."""
    if any(isinstance(bank, OwnBank) for bank in banks.values()):
        return None
    by_module: dict[nn.Module, dict[str, AnyBank]] = {}
    for name, slots in slots_of(backbone, banks).items():
        for (module, leaf), bank in zip(slots, _for_each(slots, banks[name])):
            by_module.setdefault(module, {})[leaf] = bank
    forms = {module: form_of(module, leaves) for module, leaves in by_module.items()}
    if None in forms.values():
        return None
    network = shadowed(
        backbone,
        {
            module: partial(_turn, forms[module], leaves, running)
            for module, leaves in by_module.items()
        },
    )
    fuse(network)
    return network


def _for_each(slots: Sequence[Slot], bank: AnyBank) -> Iterator[AnyBank]:
    """The bank of a tensor as each module that it is tied to multiplies by it, over one memory."""
    other = None
    if isinstance(bank, (MatrixBank, StoredBank)) and len(slots) > 1:
        embeds = any(isinstance(module, nn.Embedding) for module, _ in slots)
        if isinstance(bank, MatrixBank) and bank.dense and embeds:
            bank.stacked()
        if any(is_turned(*slot) != bank.turned for slot in slots):
            other = bank.transposed()
    for slot in slots:
        yield bank if other is None or is_turned(*slot) == bank.turned else other


def _turn(
    form: type, banks: Mapping[str, AnyBank], running: Running, twin: nn.Module
) -> None:
    """Turn a copy of a module into its per-sample form."""
    twin.__dict__.update(banks=banks, running=running)
    twin.__class__ = _combined(form, type(twin))
    twin.prepare()


@lru_cache(maxsize=None)
def _combined(form: type, kind: type) -> type:
    return type(f"PerSample{kind.__name__}", (form, kind), {})
