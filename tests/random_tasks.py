"""Random task vectors, and tables of their spectra."""

import torch
from torch import Tensor

from fusion_bench_didi.allocation.learned import LearningSettings, learn_ranks
from fusion_bench_didi.allocation.spectra import MatrixSpectra, Rate, spectra_of
from fusion_bench_didi.allocation.water_filling import greedy, uniform
from fusion_bench_didi.lowrank.decomposition import decompose
from fusion_bench_didi.lowrank.static_merge import shared_matrix

SHAPES = [(12, 12), (20, 9), (6, 30)]


def random_tasks(
    m: int, n: int, *, tasks: int = 3, decay: float = 0.8, seed: int = 0
) -> Tensor:
    """(T, m, n) with decaying spectra around a common part."""
    g = torch.Generator().manual_seed(seed)
    k = min(m, n)
    sizes = decay ** torch.arange(k)

    def one() -> Tensor:
        left = torch.linalg.qr(torch.randn(m, k, generator=g)).Q
        right = torch.linalg.qr(torch.randn(n, k, generator=g)).Q
        return (left * sizes) @ right.mT

    common = one()
    return torch.stack([0.7 * common + one() for _ in range(tasks)])


def table_row(
    tau: Tensor,
    *,
    name: str = "w",
    max_rank: int | None = None,
    weights: Tensor | None = None,
    how: str = "mean",
) -> MatrixSpectra:
    m, n = tau.shape[1:]
    return spectra_of(
        name,
        decompose(tau, shared_matrix(tau, how=how), max_rank=max_rank),
        weights=torch.ones(len(tau)) if weights is None else weights,
        rate=Rate(per_rank=32 * (m + n), dense=32 * m * n),
        shape=(m, n),
        shared_rank=0 if how == "none" else None,
    )


def mixed_table(decay: float = 0.8, *, how: str = "mean", seed: int = 0, **kwargs):
    """Rows of different shapes and sizes of the change."""
    rows = []
    for i, shape in enumerate([*SHAPES, (12, 12)]):
        tau = (1 + i) * random_tasks(*shape, decay=decay, seed=seed + i)
        rows.append(table_row(tau, name=f"w{i}", how=how, **kwargs))
    return rows


def allocate(how: str, table, budget: int):
    if how == "learned":
        start = greedy(table, budget)
        return learn_ranks(
            table, budget, start=start, settings=LearningSettings(steps=60)
        )
    return {"greedy": greedy, "uniform": uniform}[how](table, budget)
