"""SMILE and WEMoE, whose models are classes of the host that route by input: taken apart, counted, put together again.

Both put a *mixture* in the place of some modules of the base model: SMILE of linear layers, WEMoE of MLPs. A mixture holds
the module that it replaces (its core), one expert per task, and a gate.
"""

import copy
from collections.abc import Mapping, Sequence
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

from ..checkpoint.fields import Field
from ..checkpoint.parts import side
from ..deltas.storage import StorageReport
from ..errors import CheckpointMismatchError

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]] | None


class Mixture(Protocol):
    """How one kind of mixture is read and made."""

    host: type[nn.Module]
    core: str
    experts: str

    @staticmethod
    def facts(module: nn.Module) -> dict[str, Any]:
        """Settings of a mixture that its tensors do not tell, JSON-plain."""

    @staticmethod
    def check(facts: Field) -> None:
        """Facts as they come from a file must be those of a mixture."""

    @staticmethod
    def shapes(core: nn.Module, facts: Mapping[str, Any], tensors: Tensors) -> Shapes:
        """Shapes of a mixture's own tensors by name, ranks taken from ``tensors``; None if the core does not fit."""

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
    def check(facts: Field) -> None:
        count = facts["num_experts"].integer(1)
        facts["top_k"].integer(1, count)
        for name in ("k", "gate_k"):
            facts[name].integer(-1)

    @staticmethod
    def shapes(core: nn.Module, facts: Mapping[str, Any], tensors: Tensors) -> Shapes:
        if not isinstance(core, nn.Linear):
            return None
        m, n, count = core.out_features, core.in_features, facts["num_experts"]
        rows = side(tensors, "gate.weights", 0)
        if rows % count:
            return None
        found: dict[str, tuple[int, ...]] = {"gate.weights": (rows, n)}
        for expert in (f"experts.{i}" for i in range(min(count, len(tensors)))):
            rank = side(tensors, f"{expert}.u", 1)
            if facts["k"] > 0:
                found |= {f"{expert}.u": (m, rank), f"{expert}.svh": (rank, n)}
            else:
                found[f"{expert}.weight"] = (m, n)
            if core.bias is not None:
                found[f"{expert}.bias"] = (m,)
        return found if count <= len(tensors) else None

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
    def check(facts: Field) -> None:
        facts["num_experts"].integer(1)
        facts["hidden_size"].integer(1)
        facts["router_hidden_layers"].integer(0, 2)
        for name in ("batch_first", "batch_reduce"):
            if type(facts[name].value) is not bool:
                facts[name].fail("true or false")

    @staticmethod
    def shapes(core: nn.Module, facts: Mapping[str, Any], tensors: Tensors) -> Shapes:
        count, size = facts["num_experts"], facts["hidden_size"]
        if count > len(tensors):
            return None
        last = {"weight": (count, size), "bias": (count,)}
        gates: tuple[dict[str, tuple[int, ...]], ...] = (
            {"weight": (count,)},
            {f"fc.{k}": v for k, v in last.items()},
            {
                **{"fc1.weight": (size, size), "fc1.bias": (size,)},
                **{f"fc2.{k}": v for k, v in last.items()},
            },
        )
        gate = gates[facts["router_hidden_layers"]]
        found = {f"gate.{name}": shape for name, shape in gate.items()}
        for name, value in core.state_dict().items():
            for i in range(count):
                found[f"task_vectors.{i}.{name}"] = tuple(value.shape)
        return found

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

    def own(self, name: str) -> dict[str, Tensor]:
        """Experts and gates of one mixture, by their names in it."""
        return {
            key.removeprefix(f"{name}."): value
            for key, value in self.beyond.items()
            if key.startswith(f"{name}.")
        }


def take_apart(model: nn.Module) -> HostParts | None:
    """The parts of a model that the host's SMILE or WEMoE returned; None for any other model."""
    for kind, mixture in MIXTURES.items():
        named = model.named_modules()
        found = {name: m for name, m in named if isinstance(m, mixture.host)}
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


def check_mixtures(parts: HostParts, backbone: nn.Module) -> None:
    """The parts must be those of mixtures in the place of modules of the backbone.

    Raises:
        CheckpointMismatchError: naming the module where they are not.
    """
    modules, kind = dict(backbone.named_modules()), MIXTURES[parts.kind]
    left = set(parts.beyond)
    for name, facts in parts.mixtures.items():
        own = parts.own(name)
        shapes = None
        nested = any(name.startswith(f"{other}.") for other in parts.mixtures)
        if name and name in modules and not nested:
            shapes = kind.shapes(modules[name], facts, own)
        floating = all(value.is_floating_point() for value in own.values())
        found = {key: tuple(value.shape) for key, value in own.items()}
        if shapes != found or not floating:
            raise CheckpointMismatchError(
                f"The {parts.kind} mixture {name!r} does not go with this backbone ({type(backbone).__name__}), or not with its "
                "own tensors. Pass the base model of the merge, or write the model again."
            )
        left -= {f"{name}.{key}" for key in own}
    if left:
        raise CheckpointMismatchError(
            f"Tensor {min(left)} is of no mixture. Write the model again."
        )


@torch.no_grad()
def put_together(parts: HostParts, backbone: nn.Module) -> nn.Module:
    """Rebuild the model from its mixtures and a backbone.

    Args:
        backbone: the base model; overwritten with the backbone's values of the parts, and taken over.
    """
    live = backbone.state_dict()
    for name, value in parts.backbone.items():
        live[name].copy_(value)
    made = MIXTURES[parts.kind].made
    for name, facts in parts.mixtures.items():
        own = parts.own(name)
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
            owned[int(rest.partition(".")[0])] += 8 * value.nbytes
    return StorageReport(
        unit_bits=unit_bits,
        backbone_bits=unit_bits,
        shared_bits=0,
        expert_bits=dict(zip(tasks, owned)),
        routing_bits=sum(8 * v.nbytes for v in parts.beyond.values()) - sum(owned),
    )


def _bare(cls: type[nn.Module], **attributes: Any) -> nn.Module:
    """A module of the class with attributes set, its constructor not run."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    vars(module).update(attributes)
    return module
