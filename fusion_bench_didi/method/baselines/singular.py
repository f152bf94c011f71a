"""Truncated singular value decompositions in the form in which they are stored (TSV-C, Twin-Merging)."""

import torch
from torch import Tensor

from ...deltas.base import Delta
from ...deltas.coded import CodedDelta, CodedLowRankDelta
from ...deltas.plain import DenseDelta, LowRankDelta, SpectralDelta
from ...lowrank.svd import spectrum
from ...quantization.coded_matrix import code_product, code_rows, step_within
from ...task_vectors.tensor import matrix_shape


def rank_of(shape: tuple[int, ...], fraction: float) -> int:
    """``int(min(m, n) * fraction)`` in floating point, as the released codes of both methods round."""
    return int(min(matrix_shape(shape)) * fraction)


def stored_dense(shape: tuple[int, ...], rank: int, *, fold_sigma: bool = True) -> bool:
    """Whether the factors would take at least the room of the matrix."""
    m, n = matrix_shape(shape)
    return rank * (m + n + (not fold_sigma)) >= m * n


def truncated(
    tensor: Tensor,
    rank: int,
    *,
    dtype: torch.dtype,
    fold_sigma: bool = True,
    name: str = "",
) -> Delta | None:
    """The best approximation of ``rank``, as factors or, where that is smaller, dense; None for rank 0.

    Args:
        tensor: viewed as out x everything else.
        fold_sigma: multiply the singular values into the factors, r (m + n) values; otherwise r (m + n + 1).
    """
    shape = tuple(tensor.shape)
    if rank <= 0:
        return None
    found = spectrum(
        tensor.view(matrix_shape(shape)), max_rank=rank, exact=True, name=name
    )
    if stored_dense(shape, rank, fold_sigma=fold_sigma):
        return DenseDelta.of(shape, found.head(), dtype)
    if fold_sigma:
        return LowRankDelta.of(shape, found.cut(rank).to("cpu"), dtype)
    parts = {"up": found.U, "sigma": found.S, "down": found.Vh}
    return SpectralDelta(shape, **{k: v.to(dtype).cpu() for k, v in parts.items()})


def truncated_and_coded(
    tensor: Tensor, rank: int, *, bits: float, name: str = ""
) -> Delta | None:
    """The same in entropy-coded numbers, all of them by one step as in DiDi's experts; None for rank 0.

    Args:
        tensor: not of zeros alone.
        bits: per value of the factors or, where it is dense, per entry, on average.
    """
    shape, (m, n) = tuple(tensor.shape), matrix_shape(tensor.shape)
    if rank <= 0:
        return None
    matrix = tensor.reshape(m, n)
    if rank >= min(m, n):
        return coded(tensor, bits=bits)
    found = spectrum(matrix, max_rank=rank, exact=True, name=name)
    if stored_dense(shape, rank):
        return coded(found.head().view(shape), bits=bits)
    lengths, total = torch.tensor((m, n)).repeat_interleave(rank), bits * rank * (m + n)
    values = found.S[:rank]
    step = step_within(values.cpu().repeat(2) / lengths.sqrt(), lengths, total)
    vectors = found.Vh[:rank].mT if m >= n else found.U[:, :rank]
    codes = code_product(matrix, vectors, values, step, total)
    return CodedLowRankDelta.of(shape, codes)


def coded(tensor: Tensor, *, bits: float) -> CodedDelta:
    """All entries as entropy-coded numbers.

    Args:
        tensor: not of zeros alone.
        bits: per entry on average.
    """
    m, n = matrix_shape(tensor.shape)
    matrix, total = tensor.reshape(m, n), bits * m * n
    step = step_within(matrix.square().mean(1).sqrt(), torch.full((m,), n), total)
    return CodedDelta.of(tuple(tensor.shape), code_rows(matrix, step, total))
