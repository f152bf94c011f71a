"""Scores on labelled validation images, through the task's zero-shot head.

The method has no classifier: CLIP model, processor and class names are those of the program's task pool, and the
prediction is the host's own (``HFCLIPClassifier``). Only validation images are read here, never the task pool's.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DiDiError, ModelPoolError, spelled
from ..lowrank.row_blocks import wide
from ..pools.task_names import names_of, pool_tasks
from ..task_vectors.reader import TaskVectors
from .objectives import Chain


@dataclass(frozen=True)
class LabelledImages:
    """Preprocessed images (N, 3, h, w) and labels (N,) of one task."""

    images: Tensor
    labels: Tensor


class _Candidate(nn.Module):
    """The base model with other values of some tensors, none of them copied into it."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.tensors: Mapping[str, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(
            self.backbone, dict(self.tensors), args, kwargs
        )


#: Images at a time.
_BATCH = 64


class ValidationScorer:
    """Accuracy on validation images over the accuracy of the task's fine-tuned model on the same images.

    Models run on the device of the classifier; where that is another one than the base model's, a copy of this is put there.

    Args:
        backbone: the base model.
        classifier: a host classifier; its vision model is replaced while it is used.
        heads: class names and templates per task.
        data: per task.
        task_vectors: for the fine-tuned models that scores are relative to.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classifier: nn.Module,
        heads: Mapping[str, tuple],
        data: Mapping[str, LabelledImages],
        task_vectors: TaskVectors,
    ):
        self._classifier = classifier.eval()
        self._device = next(classifier.clip_model.parameters()).device
        if next(backbone.parameters()).device != self._device:
            backbone = copy.deepcopy(backbone).to(self._device)
        self._candidate = _Candidate(backbone).eval()
        self._data = data
        self._base = {n: task_vectors.tensor(n).base() for n in task_vectors.infos}
        self._heads = {}
        for task, (classnames, templates) in heads.items():
            classifier.set_classification_task(classnames, templates)
            self._heads[task] = classifier.zeroshot_weights
        self.individual = {
            task: self.accuracy(
                task,
                {n: task_vectors.tensor(n).tuned(t) for n in task_vectors.infos},
            )
            for t, task in enumerate(task_vectors.tasks)
        }

    def __call__(self, task: str, chain: Chain) -> float:
        tensors = {}
        for module in chain:
            for name, change in module.change(task).items():
                base = self._base[name]
                tensors[name] = (wide(base) + change).to(base.dtype)
        # a fine-tuned model that is never right counts as right once
        one = 1 / len(self._data[task].labels)
        return self.accuracy(task, tensors) / max(self.individual[task], one)

    @torch.no_grad()
    def accuracy(self, task: str, tensors: Mapping[str, Tensor]) -> float:
        """Accuracy of the base model with the given values of tensors."""
        clip, data = self._classifier.clip_model, self._data[task]
        there = {name: value.to(self._device) for name, value in tensors.items()}
        before, self._candidate.tensors = clip.vision_model, there
        clip.vision_model = self._candidate
        self._classifier.zeroshot_weights = self._heads[task]
        try:
            hits = 0
            for images, labels in zip(
                data.images.split(_BATCH), data.labels.split(_BATCH)
            ):
                found = self._classifier(images.to(self._device)).argmax(1)
                hits += int((found.cpu() == labels).sum())
        finally:
            clip.vision_model, self._candidate.tensors = before, {}
        return hits / len(data.labels)


def scorer_from_pools(
    modelpool: Any,
    taskpool: Any,
    backbone: nn.Module,
    task_vectors: TaskVectors,
    *,
    samples: int | None,
    seed: int = 0,
    aliases: Mapping[str, str] | None = None,
) -> ValidationScorer:
    """The scorer of ``objective: validation``, or why it cannot be had.

    Args:
        samples: images per task, a seeded draw; all if None.

    Raises:
        ModelPoolError: without validation data for every task.
        DiDiError: without a CLIP task pool.
    """
    check_pools(modelpool, taskpool, task_vectors.tasks, aliases)
    from fusion_bench.models.hf_clip import HFCLIPClassifier
    from fusion_bench.tasks.clip_classification import get_classnames_and_templates

    if not taskpool._is_setup:
        taskpool.setup()
    tasks = task_vectors.tasks
    # class names are registered under what the task pool calls a task
    heads = names_of(tasks, pool_tasks(taskpool), aliases)
    data = names_of(tasks, modelpool.val_dataset_names, aliases)
    return ValidationScorer(
        backbone,
        HFCLIPClassifier(taskpool.clip_model, processor=taskpool.processor),
        {
            task: get_classnames_and_templates(heads.get(task, data[task]))
            for task in tasks
        },
        {
            task: read_images(
                modelpool.load_val_dataset(data[task]),
                taskpool.data_processor,
                samples,
                seed,
            )
            for task in tasks
        },
        task_vectors,
    )


def check_pools(
    modelpool: Any,
    taskpool: Any,
    tasks: list[str],
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Check the pools for :func:`scorer_from_pools`; reads no data."""
    have = modelpool.val_dataset_names if modelpool._val_datasets is not None else []
    missing = sorted(set(tasks) - set(names_of(tasks, have, aliases)))
    if missing:
        raise ModelPoolError(
            f"MERGE chooses by accuracy on validation data, and the model pool has none for {missing} "
            f"({list(have) or 'nothing'}). Give {spelled('modelpool.val_datasets')}, or search without data: {_without_data()}."
        )
    if not hasattr(taskpool, "_clip_model"):
        found = "no task pool" if taskpool is None else type(taskpool).__name__
        raise DiDiError(
            f"MERGE scores validation images through zero-shot heads and needs a CLIP task pool for them; found {found}. "
            f"Give {spelled('taskpool', 'CLIPVisionModelTaskPool/...')}, or search without data: {_without_data()}."
        )


def _without_data() -> str:
    return spelled("objective", "proxy")


def read_images(
    dataset: Any, processor: Any, samples: int | None, seed: int
) -> LabelledImages:
    """Preprocessed once and kept: a search looks at the same images hundreds of times."""
    from fusion_bench.dataset.image_dataset import ImageClassificationDataset

    order = torch.randperm(
        len(dataset), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    wrapped = ImageClassificationDataset(dataset, processor)
    pairs = [wrapped[i] for i in sorted(order[:samples])]
    images = torch.stack([torch.as_tensor(image) for image, _ in pairs])
    return LabelledImages(images, torch.tensor([int(label) for _, label in pairs]))
