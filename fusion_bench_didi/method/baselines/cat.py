"""CAT-Merging (Sun et al., "A Training-Free Approach for Resolving Conflicts in Model Merging", ICML 2025).

Example:

    fusion_bench method=didi/cat modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \
        taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fusion_bench import auto_register_config
from fusion_bench.modelpool import BaseModelPool
from torch import Tensor, nn

from ...pools.images import load_images, require_images
from ...task_vectors.reader import TaskVectors
from ...task_vectors.scan import scan
from ..base import PoolMethod

log = logging.getLogger(__name__)


@auto_register_config
class CATMerging(PoolMethod):
    """Task arithmetic after the directions in which tasks disturb each other are cut from the task vectors. Static.

    ``theta = theta_0 + alpha sum_k (I - B_k B_k^T) tau_k`` where the columns of ``B_k`` are the top ``c`` eigenvectors of
    ``sum_{i != k} tau_k C_i tau_k^T - lambda tau_k C_k tau_k^T`` and ``C_i`` is the second moment of the inputs of this linear
    layer in fine-tuned model i on a few unlabelled images of task i. Scales of layer norms and all shifts are treated
    coordinate by coordinate in the same way.

    Data: ``images`` images per task, labels unused, from the pool's train datasets, or its validation datasets.

    Source: the paper's description; its code was not at hand, so all of this is reconstructed. Inferred: moments are
    averaged over tokens; only positive eigenvalues are cut; ``lambda`` 5, ``c`` 3, ``alpha`` .3 (the paper tunes
    ``alpha``); tensors that belong to no ``nn.Linear`` or ``nn.LayerNorm`` that is *called* (embeddings, convolutions,
    the bare QKV matrix of ``nn.MultiheadAttention``) are added up as they are.

    Args: as the keys of ``config/method/didi/cat.yaml``.
    """

    title = "CAT-Merging"

    def __init__(
        self,
        scale: float = 0.3,
        directions: int = 3,
        weight: float = 5.0,
        images: int = 3,
        seed: int = 0,
        exclude: Sequence[str] = (),
        task_aliases: Mapping[str, str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if directions < 0 or images < 1:
            raise ValueError(
                f"directions={directions} must be at least 0, images={images} at least 1."
            )

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        """Merge the pool into one static model.

        Raises:
            ModelPoolError: if the pool has no images for some task; before any weight is read.
        """
        modelpool = self.checked(modelpool)
        require_images(
            modelpool,
            self.task_aliases,
            purpose="CAT-Merging needs a few unlabelled images per task",
        )
        backbone, task_vectors = self.opened(modelpool)
        with self.profile("scan"):
            names = scan(task_vectors, self.fabric.device).changed
        with self.profile("layer inputs"):
            inputs = [
                self._inputs(modelpool, task)
                for task in self.track(task_vectors.tasks, "layer inputs")
            ]
        with self.profile("trim"):
            live = {
                **dict(backbone.named_parameters()),
                **dict(backbone.named_buffers()),
            }
            for name in self.track(names, "trimming"):
                value = live[name]
                change = self._merged(task_vectors, name, inputs)
                value.copy_(value.float() + self.scale * change.to(value.device))
        self.print_profile_summary()
        return backbone

    def _merged(
        self, task_vectors: TaskVectors, name: str, inputs: list[dict[str, Tensor]]
    ) -> Tensor:
        """The sum of the trimmed task vectors of one tensor."""
        vectors = task_vectors.read(name, self.fabric.device)
        if any(name not in found for found in inputs):
            return vectors.sum(0)
        found = [i[name].to(vectors) for i in inputs]
        options = {"count": self.directions, "weight": float(self.weight)}
        if vectors.ndim == 3:
            return sum(
                without_directions(tau, removal_basis(tau, found, k, **options))
                for k, tau in enumerate(vectors)
            )
        energies = torch.stack([x.square().mean(0) for x in found])  # (T, n)
        return sum(
            without_conflicts(tau, energies, k, **options)
            for k, tau in enumerate(vectors)
        )

    def _inputs(self, modelpool: BaseModelPool, task: str) -> dict[str, Tensor]:
        """What each tensor of the fine-tuned model is multiplied with, on a few images of its task."""
        pixels = load_images(
            modelpool, task, self.images, seed=self.seed, aliases=self.task_aliases
        )
        model = modelpool.load_model(task)
        found = record_inputs(model, pixels.to(next(model.parameters()).device))
        if not found:
            log.warning("%s: no nn.Linear or nn.LayerNorm was called.", task)
        return found


def record_inputs(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
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
    training = model.training
    try:
        model.eval()(pixels)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


def removal_basis(
    vector: Tensor, inputs: Sequence[Tensor], task: int, *, count: int, weight: float
) -> Tensor:
    """Output directions in which ``tau_k`` disturbs other tasks more than it serves its own.

    The top eigenvectors of ``G_k = sum_{i != k} tau_k C_i tau_k^T - lambda tau_k C_k tau_k^T`` with ``C_i = X_i^T X_i / N_i``;
    those of eigenvalues that are not positive are left, for their removal would lose more than it gains.

    Args:
        vector: (m, n) of task ``task``.
        inputs: per task, (N_i, n).
        count: c.
        weight: lambda.

    Returns:
        (m, at most c), orthonormal columns.
    """
    outputs = [x @ vector.mT / len(x) ** 0.5 for x in inputs]  # (N_i, m)
    rows = torch.cat(outputs).double()  # (N, m)
    signs = torch.cat(
        [
            torch.full((len(x),), -weight if i == task else 1.0)
            for i, x in enumerate(inputs)
        ]
    ).to(rows)
    # the eigenvectors lie in the span of the rows: work in it where that is smaller
    span, coordinates = torch.linalg.qr(rows.mT)  # (m, p), (p, N)
    form = (coordinates * signs) @ coordinates.mT  # (p, p)
    values, vectors = torch.linalg.eigh(form)  # ascending
    top = vectors[:, -count:][:, values[-count:] > 0] if count else vectors[:, :0]
    return (span @ top).to(vector.dtype)


def without_directions(vector: Tensor, basis: Tensor) -> Tensor:
    """``(I - B B^T) tau``."""
    return vector - basis @ (basis.mT @ vector)


def without_conflicts(
    vector: Tensor, energies: Tensor, task: int, *, count: int, weight: float
) -> Tensor:
    """The diagonal case, for scales and shifts: zero the ``count`` coordinates that disturb others most.

    Coordinate j disturbs by ``g[j] = (sum_{i != k} e_i[j] - lambda e_k[j]) dv_k[j]^2``; as above only where positive.

    Args:
        vector: (n,) change of a scale or shift by task ``task``.
        energies: (T, n) mean square of what each task multiplies it with; ones for shifts.
    """
    own = energies[task]
    conflict = (energies.sum(0) - own - weight * own) * vector.square()
    top = conflict.topk(min(count, len(conflict)))
    return vector.index_fill(0, top.indices[top.values > 0], 0.0)


def normalized_inputs(inputs: Tensor, eps: float) -> Tensor:
    """What a layer norm multiplies its scale with."""
    return torch.nn.functional.layer_norm(inputs, inputs.shape[-1:], eps=eps)
