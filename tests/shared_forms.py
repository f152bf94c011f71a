"""Models of one small matrix that share something in every form there is."""

import torch
from helpers import floats, normal
from torch import Tensor, nn

from fusion_bench_didi.deltas.masks import MaskedDelta, SparseDelta
from fusion_bench_didi.deltas.plain import DenseDelta, LowRankDelta, OwnDelta
from fusion_bench_didi.deltas.tucker import BasesDelta, CoreDelta
from fusion_bench_didi.models.dynamic import DiDiModel, DynamicModel

FORMS = ("none", "bases", "dense", "low rank")
SHAPE = (6, 6)


def shared_part(form, seed):
    if form == "bases":
        return BasesDelta(SHAPE, normal(6, 2, seed=seed), normal(2, 6, seed=seed + 1))
    if form == "dense":
        return DenseDelta(SHAPE, normal(6, 6, seed=seed))
    if form == "low rank":
        return LowRankDelta(SHAPE, normal(6, 1, seed=seed), normal(1, 6, seed=seed + 1))
    return None


def expert(form, seed):
    """What may stand beside a shared part."""
    if form == "bases":
        return CoreDelta(SHAPE, normal(2, 2, seed=seed))
    if form == "dense":
        return MaskedDelta.of(normal(6, 6, seed=seed) > 0, 0.7)
    if form == "low rank":
        return LowRankDelta(SHAPE, normal(6, 1, seed=seed), normal(1, 6, seed=seed + 1))
    return SparseDelta.of(normal(6, 6, seed=seed).relu(), torch.float32)


def base() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 3)).eval()


def model_of(form, seed, tasks):
    """A model of two tasks with experts and one that is as what is shared."""
    experts = {t: {"0.weight": expert(form, seed + 9 * i)} for i, t in enumerate(tasks)}
    experts[tasks[-1]] = {"1.bias": OwnDelta((3,), normal(3, seed=seed))}
    shared = shared_part(form, seed)
    shared = {} if shared is None else {"0.weight": shared}
    return DiDiModel(base(), shared, experts, unit_bits=6 * 6 * 32)


def values(model: DynamicModel) -> dict[str, dict[str, Tensor]]:
    """Every task's tensors."""
    return {task: floats(model.materialize(task)) for task in model.tasks}
