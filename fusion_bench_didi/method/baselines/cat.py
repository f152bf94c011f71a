"""CAT-Merging (Sun et al., "A Training-Free Approach for Resolving Conflicts in Model Merging", ICML 2025)."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from fusion_bench import auto_register_config
from fusion_bench.modelpool import BaseModelPool
from torch import Tensor, nn

from ...lowrank.arithmetic import own_arithmetic
from ...lowrank.row_blocks import wide
from ...options import (
    Aliases,
    Count,
    NonNegative,
    Patterns,
    PositiveCount,
    Scale,
    Seed,
    refuse_idle,
)
from ...pools.entries import load_model
from ...pools.inputs import Inputs, load_inputs, parts, require_inputs
from ...task_vectors.live_models import all_tensors
from ...task_vectors.reader import TaskVectors
from ..base import PoolMethod

log = logging.getLogger(__name__)


@auto_register_config
class CATMerging(PoolMethod):
    """Task arithmetic after each task's vector has lost what disturbs the other tasks most. Static.

    For a linear layer, ``B_k`` (m, c) are the top ``c`` eigenvectors of

    ``G_k = sum_{i != k} tau_i (C_k - lambda C_i) tau_i^T``,

    the output directions in which the *other* task vectors act on task k's inputs more than they are worth to their own
    tasks; ``C_i`` is the second moment of the layer's inputs in fine-tuned model i on a few unlabelled images of task i.
    They are cut from all other task vectors, ``tau_i <- (I - B_k B_k^T) tau_i`` for all ``i != k``, and
    ``theta = theta_0 + alpha sum_i tau_i``. Scales of layer norms and all shifts are treated coordinate by coordinate in the same way;
    a shift is multiplied with 1 in every task, so that for ``lambda >= 1`` none is cut.

    Data: ``images`` images (or texts) per task, labels unused, from the pool's train datasets, or its validation datasets.

    Source: two independent second-hand descriptions, a review of the paper and a port of its code to language models,
    which agree in the formula; the authors' code was not at hand. Inferred: all ``B_k`` are found from the whole task
    vectors, then cut one after the other, tasks sorted by name; moments are averaged over tokens; only positive
    eigenvalues are cut; ``lambda`` 5, ``c`` 3, ``alpha`` .3 (the paper tunes ``alpha``). The port also scales what is left back
    to its norm, looks at inputs in ``theta_0 + alpha tau_i`` and has a rule of its own for shifts; none of that is done
    here. Tensors that belong to no ``nn.Linear`` or ``nn.LayerNorm`` that is *called* (embeddings, convolutions, the bare QKV
    matrix of ``nn.MultiheadAttention``) are added up as they are.
    """

    title = "CAT-Merging"
    dynamic = False

    def __init__(
        self,
        scale: Scale = 0.3,
        directions: Count = 3,
        weight: NonNegative = 5.0,
        images: PositiveCount = 3,
        seed: Seed = 0,
        exclude: Patterns = (),
        task_aliases: Aliases = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not self.scale:
            of = "of the change of the base model, and scale=0"
            cut = ("directions", "weight", "images", "seed")
            refuse_idle(self, dict.fromkeys(cut, of))
        elif not self.directions:
            of = "of the directions that are cut, and directions=0"
            refuse_idle(self, dict.fromkeys(("weight", "images", "seed"), of))

    @torch.no_grad()
    @own_arithmetic()
    def run(self, modelpool: Any) -> nn.Module:
        """Merge the pool into one static model.

        Raises:
            ModelPoolError: if directions are cut and the pool has no images for some task; before any weight is read.
        """
        modelpool = self.checked(modelpool)
        if self.directions:
            require_inputs(
                modelpool,
                self.task_aliases,
                purpose="CAT-Merging needs a few unlabelled images or texts per task",
            )
        backbone, task_vectors = self.opened(modelpool)
        with self.profile("scan"):
            names = self.changed(task_vectors)
        with self.profile("layer inputs"):
            tasks = task_vectors.tasks if self.directions else []
            inputs = [
                self._inputs(modelpool, task)
                for task in self.track(tasks, "layer inputs")
            ]
        with self.profile("trim"):
            live = all_tensors(backbone)
            for name in self.track(names, "trimming"):
                value = live[name]
                change = self._merged(task_vectors, name, inputs)
                value.copy_(wide(value) + self.scale * change.to(value.device))
        return backbone

    def _merged(
        self, task_vectors: TaskVectors, name: str, inputs: list[dict[str, Tensor]]
    ) -> Tensor:
        """The sum of the trimmed task vectors of one tensor; without inputs nothing is trimmed."""
        vectors = task_vectors.read(name, self.fabric.device)
        if not inputs or any(name not in found for found in inputs):
            return vectors.sum(0)
        found = [i[name].to(vectors) for i in inputs]
        options = {"count": self.directions, "weight": float(self.weight)}
        if vectors.ndim == 3:
            bases = [
                removal_basis(vectors, found, k, **options) for k in range(len(found))
            ]
            return without_directions(vectors, bases).sum(0)
        energies = torch.stack([x.square().mean(0) for x in found])  # (T, n)
        return without_conflicts(vectors, energies, **options).sum(0)

    def _inputs(self, modelpool: BaseModelPool, task: str) -> dict[str, Tensor]:
        """Inputs of each tensor of the fine-tuned model, on a few images of its task."""
        inputs = load_inputs(
            modelpool, task, self.images, seed=self.seed, aliases=self.task_aliases
        )
        model = load_model(modelpool, task)
        found = record_inputs(model, inputs)
        if not found:
            log.warning("%s: no nn.Linear or nn.LayerNorm was called.", task)
        return found


def record_inputs(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Inputs of all linear layers and layer norms that are called, by the name of the tensor they are multiplied with.

    Returns:
        weights of linear layers: (N, n) inputs; scales of layer norms: (N, n) normalized inputs; biases: (1, n) ones.
    """
    found: dict[str, Tensor] = {}

    def hook(prefix: str):
        def record(module: nn.Module, args: tuple) -> None:
            rows = args[0].detach().float().flatten(0, -2)  # (N, n)
            if isinstance(module, nn.LayerNorm):
                rows = normalized_inputs(rows, module.eps)
            key = f"{prefix}.weight"
            rows = rows if key not in found else torch.cat([found[key], rows])
            found[key] = rows.cpu()
            if module.bias is not None:
                found[f"{prefix}.bias"] = torch.ones(1, len(module.bias))

        return record

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.LayerNorm))
    ]
    training, device = model.training, next(model.parameters()).device
    # one text at a time: padding is no input
    size = len(inputs) if isinstance(inputs, Tensor) else 1
    try:
        for args, named in parts(inputs, size):
            named = {key: value.to(device) for key, value in named.items()}
            model.eval()(*(x.to(device) for x in args), **named)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


def removal_basis(
    vectors: Tensor, inputs: Sequence[Tensor], task: int, *, count: int, weight: float
) -> Tensor:
    """Output directions in which the other task vectors disturb a task more than they serve their own.

    The top eigenvectors of ``G_k = sum_{i != k} tau_i (C_k - lambda C_i) tau_i^T`` with ``C_i = X_i^T X_i / N_i``; those of
    eigenvalues that are not positive are left, for their removal would lose more than it gains.

    Args:
        vectors: (T, m, n).
        inputs: per task, (N_i, n).
        task: k.
        count: c.
        weight: lambda.

    Returns:
        (m, at most c), orthonormal columns.
    """
    disturbing = [i for i in range(len(vectors)) if i != task]
    pairs = [(i, task, 1.0) for i in disturbing] + [(i, i, -weight) for i in disturbing]
    outputs, signs = [], []
    for i, k, sign in pairs:
        rows = inputs[k] @ vectors[i].mT / len(inputs[k]) ** 0.5  # (N_k, m)
        outputs.append(rows.double())
        signs.append(rows.new_full((len(rows),), sign, dtype=torch.float64))
    # the eigenvectors lie in the span of the rows: work in it where that is smaller
    span, coordinates = torch.linalg.qr(torch.cat(outputs).mT)  # (m, p), (p, N)
    form = (coordinates * torch.cat(signs)) @ coordinates.mT  # (p, p)
    values, directions = torch.linalg.eigh(form)  # ascending
    count = min(count, len(values))
    top = directions[:, len(values) - count :]
    top = top[:, values[len(values) - count :] > 0]
    return (span @ top).to(vectors.dtype)


def without_directions(vectors: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """``tau_i <- (I - B_k B_k^T) tau_i`` for every k, one after the other, and every i other than k.

    Args:
        vectors: (T, m, n).
        bases: per task, (m, c_k).
    """
    left = list(vectors)
    for k, basis in enumerate(bases):
        left = [
            tau if i == k else tau - basis @ (basis.mT @ tau)
            for i, tau in enumerate(left)
        ]
    return torch.stack(left)


def without_conflicts(
    vectors: Tensor, energies: Tensor, *, count: int, weight: float
) -> Tensor:
    """The diagonal case, for scales and shifts: zero the coordinates in which a task is disturbed most, in all others.

    Coordinate j of task k is disturbed by ``g_k[j] = sum_{i != k} (e_k[j] - lambda e_i[j]) v_i[j]^2``; as above only where
    that is positive, and at most ``count`` of them.

    Args:
        vectors: (T, n) changes of a scale or shift.
        energies: (T, n) mean square of what each task multiplies it with; ones for shifts.
    """
    squares, left = vectors.square(), list(vectors)
    for k, own in enumerate(energies):
        conflict = (own - weight * energies) * squares  # (T, n)
        top = (conflict.sum(0) - conflict[k]).topk(min(count, vectors.shape[1]))
        disturbed = top.indices[top.values > 0]
        left = [
            v if i == k else v.index_fill(0, disturbed, 0.0) for i, v in enumerate(left)
        ]
    return torch.stack(left)


def normalized_inputs(inputs: Tensor, eps: float) -> Tensor:
    """Inputs of a layer norm after its normalization, which its scale multiplies."""
    return torch.nn.functional.layer_norm(inputs, inputs.shape[-1:], eps=eps)
