R"""
# Task Singular Vector Compression (TSV-C)

Keeps, of the task vector of every matrix, the leading `1 / T` of its singular directions,
so that T models take about the space of one beside the base model. Nothing is merged: each
task is evaluated with its own weights. No data are needed; the task has to be known.

## Example Usage:

```bash
fusion_bench \
    method=task_singular_vector/TaskSingularVectorCompression \
    modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8_model_only \
    taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8
```

## References:

- Gargiulo, et al. Task Singular Vectors: Reducing Task Interference in Model Merging.
    https://arxiv.org/abs/2412.00081
- See `docs/algorithms/tsv_compression.md` for more details.
"""

import logging
from copy import deepcopy
from typing import Optional, Union

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool, auto_register_config
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.models.modulator.weight_delta import (
    LowRank,
    WeightDeltaModel,
    WeightDeltaModulator,
    changeable_tensors,
)
from torch import Tensor

log = logging.getLogger(__name__)


def truncate(matrix: Tensor, rank: int) -> Union[Tensor, LowRank]:
    """
    The best approximation of a rank, the singular values split evenly over both factors.

    Args:
        matrix: (m, n).
        rank: Of the approximation.

    Returns:
        `up` (m, r) and `down` (r, n), or the product where that is smaller.
    """
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:rank].sqrt()
    up, down = U[:, :rank] * root, root[:, None] * Vh[:rank]
    if up.numel() + down.numel() >= matrix.numel():
        return up @ down
    return up, down


@auto_register_config
class TaskSingularVectorCompression(LightningFabricMixin, BaseAlgorithm):
    """
    Task Singular Vector Compression (TSV-C).

    Matrices are cut to a rank; tensors of other dimensions are kept whole, one per task.

    Args:
        rank_fraction: Part of the singular directions of a matrix that is kept of each task
            vector. `None` is one over the number of tasks.
    """

    def __init__(self, rank_fraction: Optional[float] = None, **kwargs):
        super().__init__(**kwargs)

    @torch.no_grad()
    def run(self, modelpool: BaseModelPool) -> WeightDeltaModel:
        if not isinstance(modelpool, BaseModelPool):
            modelpool = BaseModelPool(modelpool)
        backbone = modelpool.load_pretrained_model()
        if modelpool.has_instance_models:
            backbone = deepcopy(backbone)  # it will be overwritten
        base = changeable_tensors(backbone)
        fraction = self.rank_fraction or 1 / len(modelpool.model_names)

        modulators = {}
        for model_name in modelpool.model_names:
            tuned = changeable_tensors(modelpool.load_model(model_name))
            deltas = {}
            for name, value in base.items():
                delta = tuned[name].to(value.device).float() - value.float()
                if not delta.any():
                    continue
                if delta.ndim != 2 or min(delta.shape) < 2:
                    deltas[name] = delta.to(value.dtype)
                    continue
                rank = int(min(delta.shape) * fraction)
                if rank == 0:
                    continue
                found = truncate(delta.to(self.fabric.device), rank)
                if isinstance(found, Tensor):
                    deltas[name] = found.to(value)
                else:
                    deltas[name] = tuple(factor.to(value) for factor in found)
            modulators[model_name] = WeightDeltaModulator(deltas)

        model = WeightDeltaModel(backbone, modulators)
        size = sum(v.numel() for v in base.values())
        log.info(
            "TSV-C stores %.3f times the numbers of one model, beside the base model.",
            model.numel() / size,
        )
        return model
