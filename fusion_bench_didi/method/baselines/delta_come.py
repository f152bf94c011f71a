"""Delta-CoMe (Ping et al., NeurIPS 2024, arXiv 2406.08903), rounded without data."""

from typing import Annotated, Any, Literal

from fusion_bench import auto_register_config
from pydantic import Field
from torch import Tensor

from ...deltas.banded import BANDS, BandedLowRankDelta
from ...lowrank.factors import LowRankFactors
from ...lowrank.svd import spectrum
from ...quantization.rounding import round_factors
from ...task_vectors.tensor import matrix_shape
from .compression import DeltaCompression, Others

#: Shorter side of the matrices for which the paper's numbers of directions are meant.
_SIDE = 4096
#: Of a direction's scale.
_SCALE_BITS = 32

#: Per entry; with 16 a matrix needs no directions.
Bits = Annotated[float, Field(gt=0, le=16)]
#: Of a matrix of the side for which they are meant, which has no more.
Directions = Annotated[int, Field(ge=0, le=_SIDE)]


@auto_register_config
class DeltaCoMe(DeltaCompression):
    """Singular directions in fewer bits the less they hold: the first few in 8, some in 3, the rest in 2, the last in none.

    ``W_t = W_0 + sum_b Q_b(U_b S_b V_b^T)`` over bands b of 8, 3 and 2 bits, where as many directions take 2 bits as fit into
    ``bits`` per entry of the matrix.

    Reconstruction from the description: the bands of 2 and 32 directions are for sides of 4096 and from memory, and are
    fewer in proportion on smaller sides, one at least. Left out is its GPTQ, which needs texts; factors are rounded by
    ``quantization/rounding.py`` instead, to the least error of their product. Everything but linear layers stays the base
    model's, as in the released code.
    """

    title = "Delta-CoMe"

    def __init__(
        self,
        bits: Bits = 1.0,
        eight: Directions = 2,
        three: Directions = 32,
        tensors: Literal["linear", "matrices"] = "linear",
        others: Others = "pretrained",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)

    def delta(self, name: str, task: str, tau: Tensor) -> BandedLowRankDelta | None:
        shape = tuple(tau.shape)
        ranks = self.ranks(matrix_shape(shape))
        if sum(ranks) == 0:
            return None
        matrix = tau.reshape(matrix_shape(shape))
        factors = spectrum(matrix, max_rank=sum(ranks), name=name).cut(sum(ranks))
        ups, downs = factors.up.split(ranks, 1), factors.down.split(ranks)
        bands = [LowRankFactors(*pair) for pair in zip(ups, downs)]
        rounded = [round_factors(b, bits=width) for b, width in zip(bands, BANDS)]
        return BandedLowRankDelta.of(shape, rounded)

    def ranks(self, sides: tuple[int, int]) -> list[int]:
        """Directions in 8, 3 and 2 bits of a matrix (m, n)."""
        m, n = sides
        left, free, found = self.bits * m * n, min(m, n), []
        wanted = [self._at(self.eight, free), self._at(self.three, free), free]
        for count, width in zip(wanted, BANDS):
            cost = width * (m + n) + _SCALE_BITS
            count = min(count, free, int(left / cost))
            left, free = left - count * cost, free - count
            found.append(count)
        return found

    def _at(self, count: int, side: int) -> int:
        """A number of directions that is given for sides of 4096."""
        return max(round(count * side / _SIDE), min(count, 1))
