"""Random matrices of decaying and of low rank."""

import torch
from torch import Tensor


def decaying(m: int, n: int, seed: int) -> Tensor:
    """Squared singular values falling about like 1 / i."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(m, generator=g) + 1
    return torch.randn(m, n, generator=g) * order.rsqrt()[:, None]


def low_rank(m: int, n: int, seed: int, rank: int = 6) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g)
