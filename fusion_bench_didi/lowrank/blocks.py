"""Large matrices a few rows at a time, so that several passes over the same entries find them in the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

#: Entries of a block, a megabyte in float32: some of these fit a core's caches, and each pays for the call on it.
BLOCK = 2**18


def blocks_of_rows(matrix: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of (m, n); of a multiple of eight rows, but for the last. One on an accelerator."""
    m, n = matrix.shape
    step = 8 * max(BLOCK // max(n, 1) // 8, 1)
    if matrix.device.type != "cpu":
        step = max(m, 1)
    for start in range(0, m, step):
        yield slice(start, min(start + step, m))


def difference(matrix: Tensor, less: Tensor | None, rows: slice) -> Tensor:
    """Rows of ``matrix - less`` in float32, ``less`` zero if None."""
    x = matrix[rows].float()
    return x if less is None else torch.sub(x, less[rows].float())


def energy_of_difference(matrix: Tensor, less: Tensor) -> Tensor:
    """Squared Frobenius norm of ``matrix - less`` in float64 (scalar); difference and norms of rows in float32.

    Zero only where the two are equal, also where the squares underflow.

    Args:
        matrix, less: (m, n) of any floating type.
    """

    def norms(dtype: torch.dtype) -> Tensor:
        found = torch.empty(len(matrix), dtype=dtype, device=matrix.device)
        for rows in blocks_of_rows(matrix):
            x = difference(matrix, less, rows).to(dtype)
            found[rows] = torch.linalg.vector_norm(x, dim=1)
        return found.double()

    found = norms(torch.float32)
    if not bool(found.any()) and not torch.equal(matrix, less):
        found = norms(torch.float64)
    return found.square().sum()


def cast_difference(
    matrix: Tensor, less: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``matrix - less`` (m, n) in a floating type, and the squared norm of what the cast lost, float64.

    Args:
        matrix, less: (m, n) of any floating type; the difference is taken in float32.
    """
    value = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    lost = torch.empty(len(matrix), device=matrix.device)
    for rows in blocks_of_rows(matrix):
        x = difference(matrix, less, rows)
        value[rows] = x
        lost[rows] = torch.linalg.vector_norm(value[rows].float() - x, dim=1)
    return value, lost.double().square().sum()
