"""TSV-Compress (Gargiulo et al., "Task Singular Vectors", CVPR 2025, arXiv 2412.00081)."""

from typing import Annotated, Any, Literal

import torch
from fusion_bench import auto_register_config
from pydantic import Field
from torch import Tensor

from ...deltas.base import Delta
from ...deltas.plain import DenseDelta
from ...deltas.sink import EncodedTensor
from ...errors import SettingsError
from ...options import Share
from ...task_vectors.tensor import ChangedTensor
from ..base import DynamicMethod
from .singular import rank_of, truncated, truncated_and_coded

#: Per value; more is what the checkpoints' type is for.
CodedBits = Annotated[float, Field(ge=0.01, le=8)]


@auto_register_config
class TSVCompression(DynamicMethod):
    """Every task vector by its leading singular vectors; nothing is shared.

    ``W_t = W_0 + U_r S_r V_r^T`` with ``r = int(min(m, n) f)``, ``f = 1 / T`` in floating point as in the released code (below 49
    tasks that is the floor), coefficient 1, for every 2-D tensor (position embeddings included); tensors of other dimensions are kept whole per task, convolutions among them.
    No data; the task is given.

    Source: the paper and its released code. As there, ``conv=dense``. The host exports a class of this method that
    raises ``NotImplementedError``. The paper speaks of 10 % of a task vector per task; at its rank of 1 / T the account here
    finds 22 % on real8 (T = 8), convolution and vectors included.

    ``bits`` is not of the paper: the same ranks in the codes of DiDi's experts, so that what bits are worth can be told from
    what the choice of ranks and bits per matrix is. Tensors of one side are in bfloat16 then.
    """

    title = "TSV-C"

    def __init__(
        self,
        rank_fraction: Share | None = None,
        conv: Literal["dense", "matrix"] = "dense",
        fold_sigma: bool = True,
        bits: CodedBits | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if self.bits is not None and not self.fold_sigma:
            raise SettingsError(
                "fold_sigma=False is of factors that are not coded; leave it, or set bits=null."
            )

    def encode(self, tensor: ChangedTensor) -> EncodedTensor:
        vectors = tensor.stacked()
        experts = [
            self._expert(tau, tensor, len(vectors)) if tau.any() else None
            for tau in vectors
        ]
        return EncodedTensor(tensor.name, None, experts)

    def _expert(self, tau: Tensor, tensor: ChangedTensor, tasks: int) -> Delta | None:
        shape, name = tensor.shape, tensor.name
        matrix = min(tensor.sides) >= 2
        rank = rank_of(shape, self.rank_fraction or 1 / tasks)
        low_rank = matrix and (len(shape) == 2 or self.conv == "matrix")
        if self.bits is not None and matrix:
            rank = rank if low_rank else min(tensor.sides)
            return truncated_and_coded(tau, rank, bits=self.bits, name=name)
        dtype = tensor.dtype if self.bits is None else torch.bfloat16
        if low_rank:
            options = {"dtype": dtype, "fold_sigma": self.fold_sigma}
            return truncated(tau, rank, name=name, **options)
        return DenseDelta.of(shape, tau, dtype)
