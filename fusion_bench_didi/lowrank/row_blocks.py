"""Large matrices a few rows at a time, so that several passes over the same entries find them in the cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .factored import as_dense
from .factors import Matrix

#: Two matrices (m, n) of any floating type whose difference is meant; nothing is subtracted where the second is None.
Difference = tuple[Tensor, Tensor | None]
#: Entries of a block at most, some megabytes in float32: less fits the caches of a core better, but cores that work side by
#: side then wait for one another between the many short calls.
BLOCK = 5 * 2**17


def wide(values: Tensor) -> Tensor:
    """In the type in which differences are taken before they become float32: that of float64 checkpoints, float32 of others."""
    return values if values.dtype == torch.float64 else values.float()


def blocks_of_rows(matrix: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of (m, n) evenly; of a multiple of eight rows, but for the last. One on an accelerator."""
    m, n = matrix.shape
    count = -(-m * n // BLOCK) if matrix.device.type == "cpu" else 1
    step = 8 * -(-m // (8 * max(count, 1)))
    for start in range(0, m, max(step, 1)):
        yield slice(start, min(start + step, m))


def differences(terms: Sequence[Difference]) -> Iterator[tuple[int, slice, Tensor]]:
    """Blocks of ``matrix - minus`` in float32: of which terms, which rows, and what they are.

    Matrices take turns block by block, so that a ``minus`` that they have in common comes from memory once. Blocks may be
    views where nothing is subtracted.
    """
    for rows in blocks_of_rows(terms[0][0]):
        last = block = None
        for t, (matrix, minus) in enumerate(terms):
            if minus is not last:
                last, block = minus, None if minus is None else wide(minus[rows])
            x = wide(matrix[rows])
            yield t, rows, (x if block is None else x - block).float()


def materialize(terms: Difference) -> Tensor:
    """One difference (m, n) in float32, whole."""
    matrix, minus = terms
    return (wide(matrix) if minus is None else wide(matrix) - wide(minus)).float()


def row_norms(terms: Sequence[Difference]) -> Tensor:
    """(T, m) norms of the rows of differences in float32, summed in it."""
    like = terms[0][0]
    norms = torch.empty(len(terms), len(like), device=like.device)
    for t, rows, x in differences(terms):
        norms[t, rows] = torch.linalg.vector_norm(x, dim=1)
    return norms


def squared_norms(terms: Sequence[Difference], norms: Tensor | None = None) -> Tensor:
    """(T,) squared Frobenius norms in float64 of differences in float32; rows are summed in float32.

    Zero only where nothing differs, also where the squares underflow.

    Args:
        norms: (T, m) of the rows, if they are known.
    """
    norms = row_norms(terms) if norms is None else norms
    energies = norms.double().square().sum(1)
    for t in (energies == 0).nonzero().flatten().tolist():
        matrix, minus = terms[t]
        rest = matrix.double() if minus is None else matrix.double() - minus.double()
        energies[t] = rest.square().sum()
    return energies


def minus(terms: Sequence[Difference], part: Matrix | None) -> list[Difference]:
    """Differences of which a matrix (m, n) is taken away as well; the same where it is None."""
    if part is None:
        return list(terms)
    dense, found, last, both = as_dense(part), [], None, None
    for matrix, other in terms:
        if other is not None and other is not last:
            last, both = other, wide(other) + dense
        found.append((matrix, dense if other is None else both))
    return found


def shares(weights: Tensor) -> list[float]:
    """What each of the weights (T,) is of their sum; equal parts where all are zero."""
    if not bool((weights > 0).any()):
        weights = torch.ones_like(weights)
    return (weights / weights.sum()).tolist()


def mean_of(terms: Sequence[Difference], weights: Tensor) -> Tensor:
    """``sum_t w_t x_t / sum_t w_t`` of differences x_t, (m, n) float32; weights (T,) as of :func:`shares`."""
    share = shares(weights)
    total = torch.zeros(terms[0][0].shape, device=terms[0][0].device)
    for t, rows, x in differences(terms):
        total[rows].add_(x, alpha=share[t])
    return total


def cast(
    terms: Sequence[Difference], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Differences in a floating type, and (T,) squared norms of what that loses, float64."""
    like = terms[0][0]
    values = [torch.empty(m.shape, dtype=dtype, device=m.device) for m, _ in terms]
    lost = torch.empty(len(terms), len(like), device=like.device)
    for t, rows, x in differences(terms):
        values[t][rows] = x
        rest = values[t][rows].float() - x
        lost[t, rows] = torch.linalg.vector_norm(rest, dim=1)
    return values, lost.double().square().sum(1)
