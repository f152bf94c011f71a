"""EMR-Merging (Huang et al., "Tuning-Free High-Performance Model Merging", NeurIPS 2024), the host's own.

Example:

    fusion_bench method=didi/emr modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \\
        taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fusion_bench import auto_register_config
from fusion_bench.method.emr_merging.utils import emr_merge

from ...deltas.masks import MaskedDelta
from ...deltas.plain import DenseDelta
from ...task_vectors.reader import TaskVectors
from ..base import DynamicMethod, Stored


@auto_register_config
class EMRMerging(DynamicMethod):
    """Elect a unified vector; mask and rescale it per task.

    ``gamma = sign(sum_t tau_t)``, ``tau_uni = gamma max_t |tau_t|`` over entries with ``tau_t gamma > 0``,
    ``W_t = W_0 + r_t 1[tau_t gamma > 0] tau_uni`` where ``r_t`` restores the mean size (sums over tensors of means).

    Source: the host's ``emr_merge`` is run as it is, tensors and tasks in its order, and its result kept with masks of one
    bit per entry (1.25 models beyond the backbone at T = 8; the literature's 4x has byte masks and the backbone). The
    host's own model cannot be evaluated from the command line, cannot be saved, and drifts as tasks are switched.

    Args: as the keys of ``config/method/didi/emr.yaml``.
    """

    title = "EMR-Merging"

    def __init__(
        self,
        exclude: Sequence[str] = (),
        task_aliases: Mapping[str, str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)

    def order(self, tasks: Iterable[str]) -> list[str]:
        """The pool's, as in the host."""
        return list(tasks)

    def compress(self, task_vectors: TaskVectors, names: Sequence[str]) -> Stored:
        tasks = task_vectors.tasks
        changed = set(names)
        state_dicts: list[dict] = [{} for _ in tasks]
        # the backbone's order: the host adds up means over tensors, and sums of floats depend on it
        for name in filter(changed.__contains__, task_vectors.base.infos()):
            dtype = task_vectors.tuned_dtype(name)
            for state_dict, tau in zip(state_dicts, task_vectors.read(name)):
                state_dict[name] = tau.to(dtype)
        unified, masks, scales = emr_merge(state_dicts)
        scales = scales.nan_to_num()  # 0 / 0 for a task that equals the base model
        return Stored(
            {n: DenseDelta(tuple(v.shape), v) for n, v in unified.items()},
            {
                task: {n: MaskedDelta.of(m[t], scales[t]) for n, m in masks.items()}
                for t, task in enumerate(tasks)
            },
        )
