"""Task vectors that share their rows and columns."""

import torch
from torch import Tensor, nn


def in_common(
    m: int = 24, n: int = 20, size: int = 4, tasks: int = 4, noise: float = 0.1
) -> Tensor:
    """(T, m, n) whose rows and columns are the same few for all tasks, in unrelated combinations."""
    g = torch.Generator().manual_seed(m * n + size)
    up, down = torch.randn(m, size, generator=g), torch.randn(size, n, generator=g)
    own = torch.randn(tasks, size, size, generator=g)
    return up @ own @ down + noise * torch.randn(tasks, m, n, generator=g)


def linears(
    tasks: int = 8, side: int = 64, size: int = 8, noise: float = 0.02
) -> dict[str, nn.Linear]:
    """A pool's models of one such matrix: the identity, and the tasks ``0``, ``1``, ..."""
    changes = in_common(side, side, size, tasks, noise)

    def layer(change: Tensor | float) -> nn.Linear:
        made = nn.Linear(side, side, bias=False)
        made.weight.data = torch.eye(side) + change
        return made

    tuned = {str(t): layer(change) for t, change in enumerate(changes)}
    return {"_pretrained_": layer(0.0), **tuned}
