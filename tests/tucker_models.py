"""Task vectors that share their rows and columns."""

import torch
from torch import Tensor


def in_common(
    m: int = 24, n: int = 20, size: int = 4, tasks: int = 4, noise: float = 0.1
) -> Tensor:
    """(T, m, n) whose rows and columns are the same few for all tasks, in unrelated combinations."""
    g = torch.Generator().manual_seed(m * n + size)
    up, down = torch.randn(m, size, generator=g), torch.randn(size, n, generator=g)
    own = torch.randn(tasks, size, size, generator=g)
    return up @ own @ down + noise * torch.randn(tasks, m, n, generator=g)
