"""Images of all tasks in one shuffled stream, each scored within the labels of its own task.

Task by task, a router may look good because a whole batch is of one kind. Here every batch is mixed, as requests are.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from fusion_bench import auto_register_config
from fusion_bench.models.hf_clip import HFCLIPClassifier
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from fusion_bench.tasks.clip_classification import get_classnames_and_templates
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.dynamic import DynamicModel
from ..options import Aliases, PositiveCount, Seed, checked
from ..pools.task_names import resolve_task
from ..routers.features import OracleRouter
from .loading import check_loading
from .task_switching import aliases_of, dynamic_model_in, routes_anew, told_of


@checked
@auto_register_config
class MixedStreamCLIPVisionModelTaskPool(CLIPVisionModelTaskPool):
    """Evaluates static models, models with a router, and dynamic models that are given each sample's task.

    Args:
        stream_batch_size: images per mixed batch.
        seed: of the order.
        limit: images per task, the first ones; None for all.
        task_aliases: task pool name -> model name.
        **kwargs: the host pool's arguments.
    """

    def __init__(
        self,
        *args: Any,
        stream_batch_size: PositiveCount = 64,
        seed: Seed = 0,
        limit: PositiveCount | None = None,
        task_aliases: Aliases = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        check_loading(self)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, name: str | None = None, **_: Any) -> dict:
        """Accuracy per task and on average, and how well the model's router knew the tasks.

        Returns:
            JSON-plain; under ``routing``: ``accuracy``, ``tasks``, ``confusion`` (rows: true task; columns: task with the
            largest weight, then none), ``unknown_rate``; absent for static models. ``seconds`` is the model's alone.
        """
        if not self._is_setup:
            self.setup()
        tasks = list(self.test_datasets)
        model = self.fabric.to_device(model).eval()
        heads = self._heads(tasks)
        dynamic, ids = dynamic_model_in(model), None
        if dynamic is not None:
            known, aliases = list(dynamic.modulators.keys()), aliases_of(self)
            found = [resolve_task(task, known, aliases) for task in tasks]
            ids = torch.tensor([known.index(name) for name in found])
        routes_anew(dynamic)
        hits = torch.zeros(len(tasks))
        counts, seconds, confusion = hits.clone(), 0.0, None
        for images, labels, owners in self._stream(tasks):
            truth = None if ids is None else ids[owners]
            start = time.perf_counter()
            states = _forward(dynamic or model, images, truth)
            seconds += time.perf_counter() - start
            embeds = F.normalize(self.clip_model.visual_projection(states), dim=-1)
            for row, label, owner in zip(embeds, labels.tolist(), owners.tolist()):
                hits[owner] += int((heads[owner] @ row).argmax()) == label
                counts[owner] += 1
            routed = _routed(dynamic)
            if routed is not None:
                if confusion is None:
                    shape = (len(known), len(known) + 1)
                    confusion = torch.zeros(shape, dtype=torch.long)
                confusion.index_put_((truth, routed), torch.tensor(1), accumulate=True)
        scores = hits / counts.clamp_min(1)
        report: dict[str, Any] = {
            task: {"accuracy": float(score)} for task, score in zip(tasks, scores)
        }
        report["average"] = {"accuracy": float(scores.mean())}
        report["seconds"] = seconds
        if name is not None:
            report["name"] = name
        if confusion is not None:
            right = confusion.diagonal().sum() / confusion.sum()
            report["routing"] = {
                "accuracy": float(right),
                "tasks": known,
                "confusion": confusion.tolist(),
                "unknown_rate": dynamic.router.unknown_rate,
            }
        if isinstance(dynamic, DynamicModel):
            report["didi"] = told_of(dynamic)
        return report

    def _heads(self, tasks: list[str]) -> list[Tensor]:
        """Class embeddings per task, (classes, n)."""
        classifier = HFCLIPClassifier(self.clip_model, processor=self.processor)
        heads = []
        for task in tasks:
            classifier.set_classification_task(*get_classnames_and_templates(task))
            heads.append(F.normalize(classifier.zeroshot_weights, dim=-1))
        return heads

    def _stream(self, tasks: list[str]):
        """Batches of images, labels and positions in ``tasks``."""
        sizes, limit = [len(self.test_datasets[t]) for t in tasks], self.limit
        if self.fast_dev_run:  # one batch, in which every task is
            share = max(self.stream_batch_size // len(tasks), 1)
            limit = min(limit or share, share)
        sizes = [min(size, limit or size) for size in sizes]
        owners = torch.arange(len(tasks)).repeat_interleave(torch.tensor(sizes))
        places = torch.cat([torch.arange(size) for size in sizes])
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(owners), generator=generator)
        for batch in order.split(self.stream_batch_size):
            items = [
                self.test_datasets[tasks[int(owners[i])]][int(places[i])] for i in batch
            ]
            images = torch.stack([torch.as_tensor(image) for image, _ in items])
            labels = torch.tensor([int(label) for _, label in items])
            yield self.fabric.to_device(images), labels, owners[batch]


def _forward(model: nn.Module, images: Tensor, truth: Tensor | None) -> Tensor:
    """Pooled states of a mixed batch; the true tasks are told only to models that cannot find them."""
    router = getattr(model, "router", None)
    if isinstance(router, OracleRouter):
        router.tell(truth)
    if truth is None or (isinstance(model, DynamicModel) and router is not None):
        return _pooled(model(images))
    if isinstance(model, DynamicModel):
        return _pooled(model(images, task_ids=truth))
    states: list[Tensor] = [images] * len(images)
    names = list(model.modulators.keys())
    for task in truth.unique().tolist():  # the host's EMR: one task at a time
        where = (truth == task).nonzero().squeeze(1)
        model.set_task(names[task])
        for i, row in zip(where.tolist(), _pooled(model(images[where]))):
            states[i] = row
    return torch.stack(states)


def _pooled(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output["pooler_output"] if isinstance(output, Mapping) else output[1]


def _routed(model: nn.Module | None) -> Tensor | None:
    """The task of each sample of the last batch by its largest weight; T where all are zero."""
    router = getattr(model, "router", None) if isinstance(model, DynamicModel) else None
    if router is None or router.last is None:
        return None
    weights = router.last
    none = (weights == 0).all(1)
    return torch.where(none, weights.shape[1], weights.argmax(1)).cpu()
