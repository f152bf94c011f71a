"""Which per-sample form every changed layer of a backbone has, and the network that is made of these layers.

Changed linear layers that most architectures give one input are fused afterwards.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from .banks import AnyBank, ValueBank, side_by_side
from .fused_linears import FusedLinears
from .layers import (
    PerSample,
    PerSampleEmbedding,
    PerSampleLayerNorm,
    PerSampleLinear,
    PerSamplePatchConv,
    apart,
    broadcast_form,
)
from .running import Running
from .shadow import Change, shadowed

#: bare parameters (n,) that broadcast in their module's forward, which then takes them per sample as (B, 1, n)
BROADCAST = {"CLIPVisionEmbeddings": "class_embedding", "LlamaRMSNorm": "weight"}


def form_of(module: nn.Module, leaves: Mapping[str, Any]) -> type | None:
    """The per-sample form of a module, or None for kinds not known here.

    Args:
        leaves: its changed tensors by their name in the module.
    """
    kind = type(module)
    leaf = BROADCAST.get(kind.__name__)
    if leaf is not None and set(leaves) == {leaf}:
        return broadcast_form(leaf)
    if not set(leaves) <= {"weight", "bias"}:
        return None
    if kind is nn.Linear or kind.__name__ == "Conv1D":
        return PerSampleLinear
    if kind is nn.Conv2d and apart(module):
        return PerSamplePatchConv
    if kind is nn.LayerNorm and module.weight is not None:
        return PerSampleLayerNorm
    if kind is nn.Embedding and module.max_norm is None:
        return PerSampleEmbedding
    return None


def per_sample_network(
    backbone: nn.Module, banks: Mapping[str, AnyBank], running: Running
) -> nn.Module | None:
    """The network; None if a changed tensor belongs to a module without a per-sample form, or to several modules."""
    by_module: dict[str, dict[str, AnyBank]] = {}
    for name, bank in banks.items():
        owner, _, leaf = name.rpartition(".")
        by_module.setdefault(owner, {})[leaf] = bank
    uses: dict[int, int] = {}
    for _, parameter in backbone.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    changes: dict[nn.Module, Change] = {}
    for owner, leaves in by_module.items():
        module = backbone.get_submodule(owner)
        tied = any(uses.get(id(getattr(module, leaf)), 1) > 1 for leaf in leaves)
        form = None if tied else form_of(module, leaves)
        if form is None:
            return None
        changes[module] = _turned_into(form, leaves, running)
    network = shadowed(backbone, changes)
    fuse(network)
    return network


def _turned_into(form: type, banks: Mapping[str, AnyBank], running: Running) -> Change:
    def change(twin: nn.Module) -> None:
        twin.__dict__.update(banks=banks, running=running)
        twin.__class__ = _combined(form, type(twin))
        twin.prepare()

    return change


@lru_cache(maxsize=None)
def _combined(form: type, kind: type) -> type:
    return type(f"PerSample{kind.__name__}", (form, kind), {})


#: names of neighbors that most architectures give one input; where one does not, results are the same, only slower
FUSABLE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
)


def fuse(network: nn.Module) -> None:
    """Let neighbors of a per-sample network that every task has matrices for multiply together."""
    numbers = itertools.count()
    for module in network.modules():
        for names in FUSABLE:
            layers = [getattr(module, name, None) for name in names]
            if all(map(_fusable, layers)) and len({_kind(l) for l in layers}) == 1:
                _fuse(layers, next(numbers))


def _fusable(layer: nn.Module | None) -> bool:
    if not isinstance(layer, nn.Linear):
        return False
    bank = getattr(layer, "banks", {}).get("weight")
    return bank is not None and bank.held


def _kind(layer: PerSampleLinear) -> tuple:
    return layer.in_features, layer.biases is None


def _fuse(layers: Sequence[PerSampleLinear], number: int) -> None:
    bank = side_by_side([layer.banks["weight"] for layer in layers])
    biases = None
    if layers[0].biases is not None:
        biases = ValueBank(torch.cat([layer.biases.values for layer in layers], 1))
    widths = [layer.out_features for layer in layers]
    fused = FusedLinears(bank, biases, widths, number)
    for place, layer in enumerate(layers):
        layer.fused, layer.place = fused, place
