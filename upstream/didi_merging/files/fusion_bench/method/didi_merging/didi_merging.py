R"""
DiDi-Merging: one backbone, one low-rank shared module and one low-rank expert per task.

    W_t = W_0 + B_0 A_0 + B_t A_t

The shared module is the mean of the task vectors, experts are what it leaves of each; both
are truncated to ranks that are learned without data under one storage budget, and fitted to
the task vectors. Each task is evaluated with its own expert.

Example Usage:

```bash
fusion_bench \
    method=didi_merging/didi_merging_m \
    modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \
    taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8
```

Reference:
    Du and Lin. "Dynamic Model Merging Made Slim." https://arxiv.org/abs/2605.18904

The paper's code is not public. What its text leaves open is chosen here and named in
`docs/algorithms/didi_merging.md`.
"""

import logging
import math
from copy import deepcopy
from typing import Dict, List, Mapping, Tuple, Union

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool, auto_register_config
from fusion_bench.mixins import LightningFabricMixin, SimpleProfilerMixin
from fusion_bench.models.modulator.weight_delta import (
    LowRank,
    WeightDelta,
    WeightDeltaModel,
    WeightDeltaModulator,
    changeable_tensors,
)
from torch import Tensor
from tqdm.auto import tqdm

from .decomposition import Decomposition, Factors, decompose, shared_matrix
from .rank_allocation import Modules, allocate, rank_bound
from .refinement import refine

log = logging.getLogger(__name__)

Stored = Union[Tensor, LowRank, None]


@auto_register_config
class DiDiMerging(LightningFabricMixin, SimpleProfilerMixin, BaseAlgorithm):
    """
    DiDi-Merging.

    Args:
        budget: Numbers stored beyond the backbone, in units of one fine-tuned model.
        rank_steps: Adam steps of the rank stage.
        rank_lr: Its step size, in units of a matrix's full rank.
        beta_start: Steepness of the smooth truncation at the first step.
        beta_end: And at the last.
        penalty: Weight of the budget's violation against the relative error.
        refine_steps: Adam steps of the refinement, per matrix.
        refine_lr: Its step size, for matrices of unit norm.

    Raises:
        ValueError: If the biases, norms and other vectors alone exceed the budget.
    """

    def __init__(
        self,
        budget: float = 1.4,
        rank_steps: int = 300,
        rank_lr: float = 0.01,
        beta_start: float = 0.5,
        beta_end: float = 10.0,
        penalty: float = 10.0,
        refine_steps: int = 300,
        refine_lr: float = 0.01,
        **kwargs,
    ):
        super().__init__(**kwargs)

    def run(self, modelpool: BaseModelPool) -> WeightDeltaModel:
        if not isinstance(modelpool, BaseModelPool):
            modelpool = BaseModelPool(modelpool)
        with self.profile("load models"):
            backbone = modelpool.load_pretrained_model()
            if modelpool.has_instance_models:
                backbone = deepcopy(backbone)  # it will be overwritten
            base = changeable_tensors(backbone)
            tasks = sorted(
                modelpool.model_names
            )  # no result depends on the pool's order
            tuned = {t: changeable_tensors(modelpool.load_model(t)) for t in tasks}
        changed = [
            name
            for name, value in sorted(base.items())
            if any(not torch.equal(value, tuned[t][name].to(value)) for t in tasks)
        ]
        bits = {name: 8 * base[name].element_size() for name in changed}
        unit = sum(base[name].numel() * bits[name] for name in changed)
        budget = math.floor(self.budget * unit)

        def task_vectors(name: str) -> Tensor:
            """(T, *shape) in float32."""
            value = base[name].to(self.fabric.device, torch.float32)
            return torch.stack([tuned[t][name].to(value) - value for t in tasks])

        shared: Dict[str, Stored] = {}
        experts: Dict[str, Dict[str, Stored]] = {t: {} for t in tasks}
        matrices = [name for name in changed if min(_sides(base[name])) >= 2]
        for name in changed:
            if name in matrices:
                continue
            for task, tau in zip(tasks, task_vectors(name)):
                if tau.any():  # biases, norms: one copy per task
                    experts[task][name] = tau.to(base[name])
                    budget -= tau.numel() * bits[name]
        if budget < 0:
            raise ValueError(
                f"budget={self.budget} is too small: biases, norms and other vectors alone "
                f"take {self.budget - budget / unit:.4f}."
            )
        with self.profile("decompose"), torch.no_grad():
            parts: Dict[str, Decomposition] = {}
            for name in tqdm(matrices, "Decomposing"):
                size = rank_bound(_sides(base[name]), bits[name], budget)
                vectors = task_vectors(name).flatten(2)
                parts[name] = decompose(vectors, size)
        with self.profile("allocate ranks"):
            table = [Modules.of(parts[n], _sides(base[n]), bits[n]) for n in matrices]
            ranks = allocate(
                table,
                budget,
                unit=unit,
                steps=self.rank_steps,
                lr=self.rank_lr,
                beta=(self.beta_start, self.beta_end),
                penalty=self.penalty,
            )
        with self.profile("refine"), torch.no_grad():
            for name, k in zip(tqdm(matrices, "Refining"), ranks):
                first, others = self._encode(
                    task_vectors(name).flatten(2), parts.pop(name), k.tolist()
                )
                shared[name] = _stored(first, base[name])
                for task, expert in zip(tasks, others):
                    experts[task][name] = _stored(expert, base[name])
        self.print_profile_summary()
        model = WeightDeltaModel(
            backbone,
            {
                t: WeightDeltaModulator(_present(experts[t]))
                for t in modelpool.model_names
            },
            WeightDelta(_present(shared)),
        )
        log.info(
            "DiDi-Merging stores %.4f times the numbers of one model, beside the base model.",
            model.numel() / max(sum(base[name].numel() for name in changed), 1),
        )
        return model

    def _encode(
        self, task_vectors: Tensor, parts: Decomposition, ranks: List[int]
    ) -> Tuple[Union[Factors, Tensor], List[Union[Factors, Tensor]]]:
        """The modules of one matrix at their ranks; dense where that is full."""
        mean, full = shared_matrix(task_vectors), min(task_vectors.shape[1:])
        if ranks[0] < full:
            shared = parts.shared.cut(mean, ranks[0])
        else:
            eye = torch.eye(full).to(mean)
            tall = mean.shape[0] >= mean.shape[1]
            shared = Factors(mean, eye) if tall else Factors(eye, mean)
        experts = [
            None if k >= full else spectrum.cut(tau - mean, k)
            for tau, spectrum, k in zip(task_vectors, parts.experts, ranks[1:])
        ]
        shared, experts = refine(
            shared,
            experts,
            task_vectors,
            steps=self.refine_steps,
            lr=self.refine_lr,
        )
        common = shared.dense()
        filled = [
            tau - common if expert is None else expert
            for tau, expert in zip(task_vectors, experts)
        ]
        return common if ranks[0] >= full else shared, filled


def _sides(tensor: Tensor) -> Tuple[int, int]:
    """A tensor as a matrix: out x everything else; a vector is 1 x n."""
    if tensor.ndim < 2:
        return 1, tensor.numel()
    return tensor.shape[0], tensor[0].numel()


def _stored(module: Union[Factors, Tensor], like: Tensor) -> Stored:
    """In the type and on the device of the checkpoints; None for rank zero."""
    if isinstance(module, Tensor):
        return module.to(like).view(like.shape)
    return tuple(factor.to(like) for factor in module) if module.rank else None


def _present(deltas: Mapping[str, Stored]) -> Dict[str, Union[Tensor, LowRank]]:
    return {name: delta for name, delta in deltas.items() if delta is not None}
