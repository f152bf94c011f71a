"""Models of one small matrix that share something in every form there is."""

import torch
from helpers import floats
from torch import Tensor, nn

from fusion_bench_didi.deltas.masks import MaskedDelta, SparseDelta
from fusion_bench_didi.deltas.plain import DenseDelta, LowRankDelta, OwnDelta
from fusion_bench_didi.deltas.tucker import BasesDelta, CoreDelta
from fusion_bench_didi.models.dynamic import DiDiModel, DynamicModel

FORMS = ("none", "bases", "dense", "low rank")
SHAPE = (6, 6)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shared_part(form, seed):
    if form == "bases":
        return BasesDelta(SHAPE, drawn(seed, 6, 2), drawn(seed + 1, 2, 6))
    if form == "dense":
        return DenseDelta(SHAPE, drawn(seed, 6, 6))
    if form == "low rank":
        return LowRankDelta(SHAPE, drawn(seed, 6, 1), drawn(seed + 1, 1, 6))
    return None


def expert(form, seed):
    """What may stand beside a shared part."""
    if form == "bases":
        return CoreDelta(SHAPE, drawn(seed, 2, 2))
    if form == "dense":
        return MaskedDelta.of(drawn(seed, 6, 6) > 0, 0.7)
    if form == "low rank":
        return LowRankDelta(SHAPE, drawn(seed, 6, 1), drawn(seed + 1, 1, 6))
    return SparseDelta.of(drawn(seed, 6, 6).relu(), torch.float32)


def base() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 3)).eval()


def model_of(form, seed, tasks):
    """A model of two tasks with experts and one that is as what is shared."""
    experts = {t: {"0.weight": expert(form, seed + 9 * i)} for i, t in enumerate(tasks)}
    experts[tasks[-1]] = {"1.bias": OwnDelta((3,), drawn(seed, 3))}
    shared = shared_part(form, seed)
    shared = {} if shared is None else {"0.weight": shared}
    return DiDiModel(base(), shared, experts, unit_bits=6 * 6 * 32)


def values(model: DynamicModel) -> dict[str, dict[str, Tensor]]:
    """Every task's tensors."""
    return {task: floats(model.materialize(task)) for task in model.tasks}
