"""Random matrices of decaying and of low rank, as task vectors of layers, and merges of them."""

import torch
from helpers import merge_settings
from torch import Tensor, nn

from fusion_bench_didi.merging.pipeline import merge
from fusion_bench_didi.merging.results import MergeResult
from fusion_bench_didi.task_vectors.reader import TaskVectors
from fusion_bench_didi.task_vectors.sources import ModuleSource

TASKS = ("a", "b", "c")


def decaying(m: int, n: int, seed: int) -> Tensor:
    """Squared singular values falling about like 1 / i."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(m, generator=g) + 1
    return torch.randn(m, n, generator=g) * order.rsqrt()[:, None]


def low_rank(m: int, n: int, seed: int, rank: int = 6) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g)


def steep(m: int, n: int, seed: int) -> Tensor:
    """Squared singular values falling about like 1 / i^2."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(m, generator=g) + 1.0
    mixed = torch.linalg.qr(torch.randn(m, m, generator=g)).Q
    return mixed @ (torch.randn(m, n, generator=g) / order[:, None])


def layers(values: list[Tensor]) -> nn.ModuleList:
    made = nn.ModuleList(nn.Linear(v.shape[1], v.shape[0], bias=False) for v in values)
    for layer, value in zip(made, values):
        layer.weight.data = value
    return made


def task_vectors(*makers, still: bool = False, side: int | None = None) -> TaskVectors:
    """Layers of 320 x 280 and turned, or square, one per maker; with ``still`` the last task leaves the first alone."""
    shapes = [(320, 280) if i % 2 == 0 else (280, 320) for i in range(len(makers))]
    if side:
        shapes = [(side, side)] * len(makers)
    base = [torch.randn(s, generator=torch.Generator().manual_seed(9)) for s in shapes]
    tuned = {}
    for t, task in enumerate(TASKS):
        own = [make(*s, 10 * i + t) for i, (make, s) in enumerate(zip(makers, shapes))]
        if still and task == TASKS[-1]:
            own[0] = torch.zeros_like(own[0])
        weights = layers([b + 0.1 * tau for b, tau in zip(base, own)])
        tuned[task] = ModuleSource(weights, task)
    return TaskVectors(ModuleSource(layers(base), "base"), tuned)


def merged(vectors: TaskVectors, bits: float, **choice) -> MergeResult:
    """With so many bits per entry of a task vector on average."""
    settings = merge_settings(bits * len(TASKS) / 32, factor_dtype="auto", **choice)
    return merge(vectors, settings)
