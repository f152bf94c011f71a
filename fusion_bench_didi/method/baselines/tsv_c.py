"""TSV-Compress (Gargiulo et al., "Task Singular Vectors", CVPR 2025, arXiv 2412.00081).

Example:

    fusion_bench method=didi/tsv_c modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \\
        taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8
"""

from typing import Any, Literal

from fusion_bench import auto_register_config

from ...deltas.plain import DenseDelta
from ...deltas.sink import EncodedTensor
from ...options import Share
from ...task_vectors.tensor import ChangedTensor
from ..base import DynamicMethod
from .singular import rank_of, truncated


@auto_register_config
class TSVCompression(DynamicMethod):
    """Every task vector by its leading singular vectors; nothing is shared.

    ``W_t = W_0 + U_r S_r V_r^T`` with ``r = int(min(m, n) f)``, ``f = 1 / T`` in floating point as in the released code (below 49
    tasks that is the floor), coefficient 1, for every 2-D tensor (position embeddings included); tensors of other dimensions are kept whole per task, convolutions among them.
    No data; the task is given.

    Source: the paper and its released code. As there, ``conv=dense``. The host exports a class of this method that
    raises ``NotImplementedError``. The paper speaks of 10 % of a task vector per task; at its rank of 1 / T the account here
    finds 22 % on real8 (T = 8), convolution and vectors included.

    Args: as the keys of ``config/method/didi/tsv_c.yaml``, which ``didi settings didi/tsv_c`` prints.
    """

    title = "TSV-C"

    def __init__(
        self,
        rank_fraction: Share | None = None,
        conv: Literal["dense", "matrix"] = "dense",
        fold_sigma: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)

    def encode(self, tensor: ChangedTensor) -> EncodedTensor:
        vectors, shape = tensor.stacked(), tensor.shape
        low_rank = len(shape) == 2 or self.conv == "matrix"
        if low_rank and min(tensor.sides) >= 2:
            rank = rank_of(shape, self.rank_fraction or 1 / len(vectors))
            options = {"dtype": tensor.dtype, "fold_sigma": self.fold_sigma}
            found = [
                truncated(tau, rank, name=tensor.name, **options) for tau in vectors
            ]
        else:
            found = [DenseDelta(shape, tau.to(tensor.dtype).cpu()) for tau in vectors]
        experts = [d if tau.any() else None for d, tau in zip(found, vectors)]
        return EncodedTensor(tensor.name, None, experts)
