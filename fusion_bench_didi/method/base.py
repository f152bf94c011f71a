"""What the methods share: how a pool is opened, and how a dynamic model is handed to the host."""

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fusion_bench import BaseAlgorithm
from fusion_bench.mixins import LightningFabricMixin, SimpleProfilerMixin
from fusion_bench.modelpool import BaseModelPool
from omegaconf import OmegaConf
from rich.progress import track
from torch import nn

from ..deltas.base import Delta
from ..deltas.storage import dtype_bits, folded_backbone_bits
from ..models.dynamic import DynamicModel
from ..models.pool_saving import attach_saving
from ..pools.merged_adapters import adapted
from ..pools.opening import (
    as_pool,
    backbone_reference,
    check_pool,
    load_backbone,
    open_pool,
)
from ..pools.task_names import check_tasks, pool_tasks
from ..task_vectors.reader import TaskVectors
from ..taskpool.task_switching import attach

log = logging.getLogger(__name__)


class PoolMethod(LightningFabricMixin, SimpleProfilerMixin, BaseAlgorithm):
    """A method that reads a base model and its fine-tuned models.

    Subclasses take ``exclude`` (patterns of tensors left at the base model's value) and ``task_aliases``.
    """

    title: ClassVar[str]
    exclude: Sequence[str] | None = None
    task_aliases: Mapping[str, str] | None = None

    def checked(self, modelpool: Any) -> BaseModelPool:
        """The pool, after every check that needs no file.

        Raises:
            ModelPoolError: no base model, fewer than two tasks, or names that mean the same task.
            UnknownTaskError: if the task pool has a task that no model covers.
        """
        modelpool = as_pool(modelpool)
        check_pool(modelpool)
        taskpool = getattr(self._program, "taskpool", None)
        if taskpool is not None:
            asked = pool_tasks(taskpool)
            check_tasks(asked, modelpool.model_names, self.task_aliases)
        return adapted(modelpool)

    def opened(self, modelpool: BaseModelPool) -> tuple[nn.Module, TaskVectors]:
        """The base model and the task vectors, tasks in :meth:`order`.

        Raises:
            CheckpointMismatchError: listing all faults of all checkpoints.
        """
        with self.profile("load backbone"):
            backbone = load_backbone(modelpool)
        vectors = open_pool(modelpool, backbone, exclude=tuple(self.exclude or ()))
        return backbone, vectors.ordered(self.order(modelpool.model_names))

    def order(self, tasks: Iterable[str]) -> list[str]:
        """The order in which sums over tasks are taken; sorted, so that the pool's order changes no bit."""
        return sorted(tasks)

    def facts(self, modelpool: BaseModelPool, backbone: nn.Module) -> dict[str, Any]:
        """What is saved with every model: the method, its settings and where its models came from."""
        settings = OmegaConf.to_container(self.config, resolve=True)
        return {
            "method": self.title,
            "settings": {k: v for k, v in settings.items() if not k.startswith("_")},
            "parents": {
                name: entry if isinstance(entry, str) else None
                for name, entry in modelpool._models.items()
                if name in modelpool.model_names
            },
            "backbone": backbone_reference(modelpool, backbone),
        }

    def track(self, names: Sequence[str], stage: str) -> Iterator[str]:
        """The names, with a progress bar."""
        yield from track(names, f"{self.title}: {stage}", transient=True)

    def connect(self, model: DynamicModel, modelpool: BaseModelPool) -> DynamicModel:
        """Make the program's task pool tell the model its task, and the model pool save it in its own form."""
        log.info(
            "%s: %d tasks, x_excl %.4f, x_incl %.4f",
            self.title,
            len(model.tasks),
            model.storage.x_excl,
            model.storage.x_incl,
        )
        taskpool = getattr(self._program, "taskpool", None)
        if taskpool is not None:
            attach(taskpool, known=model.tasks, aliases=self.task_aliases)
        attach_saving(modelpool)
        return model


@dataclass(frozen=True)
class Stored:
    """What a dynamic method keeps.

    Args:
        shared: by tensor name.
        experts: by task, then tensor name.
        folded: the shared part is only ever used as base + shared, and that sum is stored once; methods that need
            the two apart count both.
    """

    shared: Mapping[str, Delta]
    experts: Mapping[str, Mapping[str, Delta]]
    folded: bool = False


class DynamicMethod(PoolMethod):
    """A method whose result is one backbone, a shared part and an expert per task."""

    @abstractmethod
    def compress(self, task_vectors: TaskVectors, names: Sequence[str]) -> Stored:
        """The stored deltas.

        Args:
            task_vectors: checked, tasks in :meth:`order`.
            names: the tensors that some task changed.
        """

    def run(self, modelpool: Any) -> DynamicModel:
        """Merge the pool."""
        modelpool = self.checked(modelpool)
        backbone, task_vectors = self.opened(modelpool)
        with self.profile("scan"):
            names = task_vectors.scan(self.fabric.device).changed
        with self.profile("compress"):
            stored = self.compress(task_vectors, names)
        self.print_profile_summary()
        sizes = {
            name: task_vectors.infos[name].numel
            * dtype_bits(task_vectors.tuned_dtype(name))
            for name in names
        }
        backbone_bits = None
        if stored.folded:
            backbone_bits = folded_backbone_bits(sizes, stored.shared, stored.experts)
        model = DynamicModel(
            backbone,
            stored.shared,
            {task: stored.experts[task] for task in modelpool.model_names},
            unit_bits=sum(sizes.values()),
            backbone_bits=backbone_bits,
            info={**self.facts(modelpool, backbone), "folded": stored.folded},
        )
        return self.connect(model, modelpool)
