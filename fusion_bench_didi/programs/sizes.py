"""The storage of whatever a method returned, in the one account of :mod:`fusion_bench_didi.storage`."""

from dataclasses import dataclass

from fusion_bench.models.smile_moe.linear_from_module import SmileMoELinear
from fusion_bench.models.we_moe import WeightEnsemblingMoE
from torch import nn

from .. import account_shapes
from ..budget import dtype_bits
from ..models import DynamicModel
from ..pool_reader import open_pool
from ..storage import StorageReport


@dataclass(frozen=True)
class PoolFacts:
    """What the account and the ranks need to know of a model pool.

    Args:
        unit_bits: one fine-tuned model (the tensors that some task changed).
        values: the same in numbers.
        smallest_side: of the linear layers' weights.
        tasks: how many fine-tuned models there are.
    """

    unit_bits: int
    values: int
    smallest_side: int
    tasks: int


@dataclass(frozen=True)
class Size:
    """Stored values in units of one fine-tuned model, beyond the backbone and with it."""

    x_excl: float
    x_incl: float
    note: str = ""


def pool_facts(modelpool, backbone: nn.Module, device="cpu") -> PoolFacts:
    """Reads every checkpoint once, and so also finds NaN and misaligned ones before anything runs.

    Raises:
        CheckpointMismatchError, NonFiniteError, ModelPoolError: as the merge would.
    """
    vectors = open_pool(modelpool, backbone)
    changed = vectors.scan(device).changed
    sides = [min(v.shape) for v in backbone.parameters() if v.ndim == 2]
    linear = [min(m.weight.shape) for m in backbone.modules() if type(m) is nn.Linear]
    return PoolFacts(
        unit_bits=sum(
            vectors.infos[n].numel * dtype_bits(vectors.tuned_dtype(n)) for n in changed
        ),
        values=sum(vectors.infos[n].numel for n in changed),
        smallest_side=min(linear or sides),
        tasks=len(modelpool.model_names),
    )


def pretrained_size() -> Size:
    return Size(0.0, 1.0)


def individuals_size(facts: PoolFacts) -> Size:
    return Size(facts.tasks, facts.tasks, "no backbone beside them")


def model_size(model: nn.Module, backbone: nn.Module, facts: PoolFacts) -> Size:
    """The account of a merged model.

    Args:
        backbone: the base model, as the pool gives it.

    Raises:
        TypeError: for a model that is neither a full model nor one of the known dynamic forms.
    """
    if isinstance(model, DynamicModel):
        folded = model.info.get("folded", False)
        report, note = model.storage, _FOLDED if folded else ""
    elif report := _host_report(model, backbone, facts):
        note = ""
    elif _shapes(model) == _shapes(backbone):
        return Size(1.0, 1.0, "folded: replaces the backbone")
    else:
        raise TypeError(
            f"No storage account for {type(model).__name__}: it is no DynamicModel, and its tensors are not those of "
            f"the base model {type(backbone).__name__}."
        )
    return Size(report.x_excl, report.x_incl, note)


_FOLDED = "shared part folded into the backbone"


def _host_report(
    model: nn.Module, backbone: nn.Module, facts: PoolFacts
) -> StorageReport | None:
    """The account of the host's input-routed models, from their shapes; None for any other model."""
    tasks = [str(task) for task in range(facts.tasks)]
    blocks = [m for m in model.modules() if isinstance(m, WeightEnsemblingMoE)]
    if blocks:
        return account_shapes.wemoe(
            facts.values,
            [(_values(b.base_model), b.hidden_size) for b in blocks],
            tasks,
            router_layers=blocks[0].gate.num_hidden_layers,
        )
    smile = {n: m for n, m in model.named_modules() if isinstance(m, SmileMoELinear)}
    if smile:
        linears = account_shapes.linears_of(backbone)
        layer = next(iter(smile.values()))
        return account_shapes.smile(
            facts.values,
            [linears[name] for name in smile],
            tasks,
            rank=layer.k,
            gate_rank=layer.gate_k,
        )
    return None


def _values(module: nn.Module) -> int:
    return sum(v.numel() for v in module.parameters())


def _shapes(model: nn.Module) -> dict:
    return {name: tuple(v.shape) for name, v in model.state_dict().items()}
