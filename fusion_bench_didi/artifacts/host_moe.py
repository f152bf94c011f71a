"""SMILE and WEMoE, whose models are classes of the host that route by input: taken apart, counted, put together again.

Both put a *mixture* in the place of some modules of the base model: SMILE of linear layers, WEMoE of MLPs. A mixture holds
the module that it replaces (its core), one expert per task, and a gate.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from fusion_bench.models.smile_moe.linear_from_module import (
    SmileCompressedLinear,
    SmileGate,
    SmileMoELinear,
)
from fusion_bench.models.we_moe import WeightEnsemblingMoE
from torch import Tensor, nn

from ..deltas.storage import StorageReport

Tensors = Mapping[str, Tensor]


class Mixture(Protocol):
    """How one kind of mixture is read and made."""

    host: type[nn.Module]
    core: str
    experts: str

    @staticmethod
    def facts(module: nn.Module) -> dict[str, Any]:
        """What its tensors do not tell, JSON-plain."""

    @staticmethod
    def made(core: nn.Module, facts: Mapping[str, Any], tensors: Tensors) -> nn.Module:
        """The mixture around a core, from facts and its own tensors by their names in it."""


class _Smile:
    host, core, experts = SmileMoELinear, "pretrained_model", "experts"

    @staticmethod
    def facts(module: SmileMoELinear) -> dict[str, Any]:
        names = ("num_experts", "top_k", "k", "gate_k")
        return {name: getattr(module, name) for name in names}

    @staticmethod
    def made(core: nn.Linear, facts: Mapping[str, Any], tensors: Tensors) -> nn.Module:
        # the host's constructors start from fine-tuned layers, which they decompose
        sides = {"in_features": core.in_features, "out_features": core.out_features}
        layer = _bare(SmileMoELinear, **facts, **sides)
        count, gate = facts["num_experts"], tensors["gate.weights"]
        layer.gate = _bare(
            SmileGate,
            input_features=core.in_features,
            num_experts=count,
            k=len(gate) // count,
        )
        layer.gate.weights = nn.Parameter(gate)
        layer.experts = nn.ModuleList()
        for i in range(count):
            if facts["k"] > 0:
                expert = _bare(SmileCompressedLinear, **sides, k=facts["k"])
                names = ("u", "svh", "bias")
            else:
                expert = nn.Linear(**sides, device="meta")
                names = ("weight", "bias")
            for name in names:
                value = tensors.get(f"experts.{i}.{name}")
                parameter = None if value is None else nn.Parameter(value)
                expert.register_parameter(name, parameter)
            layer.experts.append(expert)
        layer.pretrained_model = core
        return layer


class _WEMoE:
    host, core, experts = WeightEnsemblingMoE, "base_model", "task_vectors"

    @staticmethod
    def facts(module: WeightEnsemblingMoE) -> dict[str, Any]:
        names = ("num_experts", "hidden_size", "batch_first", "batch_reduce")
        layers = module.gate.num_hidden_layers
        return {n: getattr(module, n) for n in names} | {"router_hidden_layers": layers}

    @staticmethod
    def made(core: nn.Module, facts: Mapping[str, Any], tensors: Tensors) -> nn.Module:
        options = {k: v for k, v in facts.items() if k != "num_experts"}
        core = core.requires_grad_(True)  # else the host makes no task vectors
        experts = [copy.deepcopy(core) for _ in range(facts["num_experts"])]
        block = WeightEnsemblingMoE(base_model=core, expert_models=experts, **options)
        own = {f"base_model.{name}": value for name, value in core.state_dict().items()}
        block.load_state_dict({**own, **tensors})
        return block


MIXTURES: dict[str, type[Mixture]] = {"smile": _Smile, "wemoe": _WEMoE}


@dataclass(frozen=True)
class HostParts:
    """A model with mixtures, taken apart.

    Args:
        kind: ``smile`` or ``wemoe``.
        mixtures: facts of each, by the name of the module in whose place it stands.
        beyond: experts and gates, by their names in the model.
        backbone: everything else by its name in the base model.
    """

    kind: str
    mixtures: Mapping[str, Mapping[str, Any]]
    beyond: Tensors
    backbone: Tensors


def take_apart(model: nn.Module) -> HostParts | None:
    """The parts of a model that the host's SMILE or WEMoE returned; None for any other model."""
    for kind, mixture in MIXTURES.items():
        found = dict(_mixtures(model, mixture.host))
        if not found:
            continue
        beyond, backbone = {}, {}
        for key, value in model.state_dict().items():
            owner = next((n for n in found if key.startswith(f"{n}.")), None)
            inner = key if owner is None else key.removeprefix(f"{owner}.")
            if owner is None:
                backbone[key] = value
            elif inner.startswith(f"{mixture.core}."):
                backbone[f"{owner}.{inner.removeprefix(f'{mixture.core}.')}"] = value
            else:
                beyond[key] = value
        facts = {name: mixture.facts(module) for name, module in found.items()}
        return HostParts(kind, facts, beyond, backbone)
    return None


@torch.no_grad()
def put_together(parts: HostParts, backbone: nn.Module) -> nn.Module:
    """The model again.

    Args:
        backbone: the base model; overwritten with the backbone's values of the parts, and taken over.
    """
    live = backbone.state_dict()
    for name, value in parts.backbone.items():
        live[name].copy_(value)
    made = MIXTURES[parts.kind].made
    for name, facts in parts.mixtures.items():
        own = {
            key.removeprefix(f"{name}."): value
            for key, value in parts.beyond.items()
            if key.startswith(f"{name}.")
        }
        owner, _, leaf = name.rpartition(".")
        core = backbone.get_submodule(name)
        setattr(backbone.get_submodule(owner), leaf, made(core, facts, own))
    return backbone.requires_grad_(False).eval()


def host_storage(
    model: nn.Module, tasks: Sequence[str], *, unit_bits: int
) -> StorageReport | None:
    """The account of a model that the host's SMILE or WEMoE returned; None for any other model.

    The backbone counts once: the base model's values, or what the merge wrote in their place.

    Args:
        tasks: in the order of the experts.
        unit_bits: one fine-tuned model, see :class:`~fusion_bench_didi.deltas.storage.StorageReport`.
    """
    parts = take_apart(model)
    if parts is None:
        return None
    inside = MIXTURES[parts.kind].experts
    owned = [0] * len(tasks)
    for key, value in parts.beyond.items():
        _, expert, rest = key.rpartition(f".{inside}.")
        if expert:
            owned[int(rest.partition(".")[0])] += _bits(value)
    return StorageReport(
        unit_bits=unit_bits,
        backbone_bits=unit_bits,
        shared_bits=0,
        expert_bits=dict(zip(tasks, owned)),
        routing_bits=sum(map(_bits, parts.beyond.values())) - sum(owned),
    )


def _mixtures(model: nn.Module, kind: type) -> Iterator[tuple[str, nn.Module]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, kind))


def _bare(cls: type[nn.Module], **attributes: Any) -> nn.Module:
    """A module of the class with attributes set, its constructor not run."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    vars(module).update(attributes)
    return module


def _bits(value: Tensor) -> int:
    return 8 * value.numel() * value.element_size()
