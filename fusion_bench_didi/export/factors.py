"""The change of a tensor as two factors of bounded rank, in the type in which they are written."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowrank.factored import product_svd
from ..lowrank.factors import LowRankFactors, Spectrum
from ..lowrank.svd import half_svd

#: What float32 sums leave of an exact product, in parts of its norm.
EXACT = 1e-5


@dataclass(frozen=True)
class Fitted:
    """Factors as they are written, and what they lose.

    Args:
        lost: norm of the difference to the wanted change.
        cut: directions were left out.
    """

    factors: LowRankFactors
    lost: float
    cut: bool


def fitted(
    wanted: Tensor,
    product: LowRankFactors | None,
    *,
    max_rank: int | None,
    dtype: torch.dtype,
) -> Fitted:
    """Factors of a change: those that are stored where they do, else the best of the rank.

    Args:
        wanted: (m, n) float32.
        product: the same as it is stored, or close to it; None where it is stored otherwise.
        max_rank: no limit if None.
    """
    most = min(wanted.shape)
    limit = most if max_rank is None else min(most, max_rank)
    if product is None or product.rank > limit:
        product = _best(wanted, product, limit)
    size, left = (norm(x) for x in (wanted, wanted - product.dense()))
    factors = product.balanced().to(dtype)
    lost = norm(wanted - factors.to(torch.float32).dense())
    return Fitted(factors, lost, limit < most and left > EXACT * size)


def in_eight_bits(
    products: Mapping[str, LowRankFactors], dtype: torch.dtype
) -> tuple[dict[str, LowRankFactors], float]:
    """Factors in a type of 8 bits, and what all their products are multiplied by: one power of two, for the type's range is small.

    Args:
        products: with two factors of about one size each.
    """
    peak = max(
        (float(x.abs().max()) for p in products.values() for x in (p.up, p.down)),
        default=0.0,
    )
    if not 0 < peak < math.inf:
        return {name: p.to(dtype) for name, p in products.items()}, 1.0
    step = 2.0 ** math.floor(math.log2(torch.finfo(dtype).max / peak))
    found = {
        name: LowRankFactors((p.up * step).to(dtype), (p.down * step).to(dtype))
        for name, p in products.items()
    }
    return found, step**-2


def norm(value: Tensor) -> float:
    """The norm of all entries, in float32."""
    return float(torch.linalg.vector_norm(value.float()))


def _best(wanted: Tensor, product: LowRankFactors | None, limit: int) -> LowRankFactors:
    """The best factors of a rank; of fewer directions where there are no more."""
    if product is not None:
        U, S, V = product_svd(product)
        found = Spectrum(U, S, V.mT)
        return found.cut(min(limit, len(S))).to(torch.float32)
    half = half_svd(wanted, max_rank=limit)
    rank = min(limit, int((half.S > EXACT * half.S[:1].clamp(min=1e-30)).sum()))
    if rank == 0:
        return LowRankFactors.zeros(*wanted.shape, like=wanted)
    return half.factors(wanted, rank)
