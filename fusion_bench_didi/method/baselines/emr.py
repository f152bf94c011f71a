"""EMR-Merging (Huang et al., "Tuning-Free High-Performance Model Merging", NeurIPS 2024), the host's own."""

from collections.abc import Iterable, Sequence

import torch
from fusion_bench import auto_register_config
from fusion_bench.method.emr_merging.utils import emr_merge
from torch import Tensor

from ...deltas.masks import MaskedDelta
from ...deltas.plain import DenseDelta
from ...deltas.sink import EncodedTensor
from ...task_vectors.loop import Progress
from ...task_vectors.reader import TaskVectors
from ...task_vectors.tensor import ChangedTensor
from ..base import DynamicMethod


@auto_register_config
class EMRMerging(DynamicMethod):
    """Elect a unified vector; mask and rescale it per task.

    ``gamma = sign(sum_t tau_t)``, ``tau_uni = gamma max_t |tau_t|`` over entries with ``tau_t gamma > 0``,
    ``W_t = W_0 + r_t 1[tau_t gamma > 0] tau_uni`` where ``r_t`` restores the mean size (sums over tensors of means).

    Source: the host's ``emr_merge`` is run as it is on every tensor, tasks in its order, and its result kept with masks of one
    bit per entry (1.25 models beyond the backbone at T = 8; the literature's 4x has byte masks and the backbone). The
    host's own model cannot be evaluated from the command line, cannot be saved, and drifts as tasks are switched.
    """

    title = "EMR-Merging"

    def order(self, tasks: Iterable[str]) -> list[str]:
        """The pool's, as in the host."""
        return list(tasks)

    def prepare(
        self, task_vectors: TaskVectors, names: Sequence[str], progress: Progress
    ) -> None:
        changed, tasks = set(names), len(task_vectors.tasks)
        sizes, unified_sizes = torch.zeros(2, tasks)
        # the backbone's order: the host adds up means over tensors, and sums of floats depend on it
        order = list(filter(changed.__contains__, task_vectors.base.infos()))
        for i, name in enumerate(order):
            vectors, unified, masks = _elected(task_vectors.tensor(name))
            for t, (tau, mask) in enumerate(zip(vectors, masks)):
                sizes[t] += tau.abs().mean()
                unified_sizes[t] += (unified * mask).abs().mean()
            progress("rescaling", i, len(order))
        # 0 / 0 for a task that equals the base model
        self._scales = (sizes / unified_sizes).nan_to_num()

    def encode(self, tensor: ChangedTensor) -> EncodedTensor:
        _, unified, masks = _elected(tensor)
        experts = [MaskedDelta.of(m, r) for m, r in zip(masks, self._scales)]
        return EncodedTensor(tensor.name, DenseDelta(tensor.shape, unified), experts)


def _elected(tensor: ChangedTensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Task vectors of one tensor in the checkpoints' type, the unified one, and a mask per task; by the host."""
    vectors = [tau.to(tensor.dtype).cpu() for tau in tensor.stacked()]
    unified, masks, _ = emr_merge([{tensor.name: tau} for tau in vectors])
    return vectors, unified[tensor.name], masks[tensor.name]
