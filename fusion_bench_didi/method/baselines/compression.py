"""What methods have in common that write every task vector down by itself, in fewer bits (delta compression)."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...deltas.base import Delta
from ...deltas.plain import DenseDelta
from ...deltas.sink import EncodedTensor
from ...errors import SettingsError, some
from ...options import refuse_idle
from ...task_vectors.loop import Progress
from ...task_vectors.reader import TaskVectors
from ...task_vectors.tensor import ChangedTensor
from ..base import DynamicMethod

#: Which tensors are compressed: weights of linear layers, everything of two sides and more, or vectors too.
Compressed = Literal["linear", "matrices", "all"]
#: What becomes of the others: whole in the checkpoints' type or in 16 bits, or left at the base model's value.
Others = Literal["checkpoint", "bfloat16", "pretrained"]
#: A part of all entries that is left out: never all.
Dropped = Annotated[float, Field(ge=0, lt=1)]


#: Names of embeddings; some of GPT-2, T5 and BART do not say so.
_EMBEDDINGS = re.compile(
    r"embed|(^|\.)(wte|wpe|shared|relative_attention_bias)\.weight$"
)


def is_linear(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is the weight of a linear layer, by its name and sides; embeddings are none."""
    return len(shape) == 2 and min(shape) > 1 and not _EMBEDDINGS.search(name)


class DeltaCompression(DynamicMethod):
    """Base of methods that compress each task vector for itself, tensor by tensor; nothing is shared.

    Subclasses take ``tensors`` and ``others``, and say how one tensor of one task is stored.

    Raises:
        SettingsError: for a subclass whose constructor does not take these two.
    """

    tensors: Compressed
    others: Others

    def __init__(self, **kwargs: Any):
        if missing := {"tensors", "others"}.difference(self._config_mapping.values()):
            raise SettingsError(
                f"{type(self).__name__} does not take {some(missing)}, which every DeltaCompression has. Make them arguments of its "
                "constructor, which @auto_register_config before the class turns into its settings."
            )
        super().__init__(**kwargs)

    @abstractmethod
    def delta(self, name: str, task: str, tau: Tensor) -> Delta | None:
        """How one tensor of one task is stored; None for nothing.

        Args:
            tau: the task vector there, in the tensor's shape, float32.
        """

    def compresses(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a tensor is among those that the method is for."""
        if self.tensors == "all":
            return len(shape) > 0
        if self.tensors == "linear":
            return is_linear(name, shape)
        return len(shape) > 1

    def prepare(
        self, task_vectors: TaskVectors, names: Sequence[str], progress: Progress
    ) -> None:
        """
        Raises:
            SettingsError: for ``others`` where there are none.
        """
        sizes = self.compressed(task_vectors, names)
        if self.tensors == "all" and len(sizes) == len(names):
            of = "of tensors that are not compressed; with tensors=all these are single values, and none is changed"
            refuse_idle(self, {"others": of})

    def compressed(
        self, task_vectors: TaskVectors, names: Sequence[str]
    ) -> dict[str, int]:
        """Number of entries of those among the names that are compressed."""
        sizes = {name: task_vectors.infos[name] for name in names}
        return {n: i.numel for n, i in sizes.items() if self.compresses(n, i.shape)}

    def encode(self, tensor: ChangedTensor) -> EncodedTensor | None:
        name, shape = tensor.name, tensor.shape
        compressed = self.compresses(name, shape)
        if not compressed and self.others == "pretrained":
            return None
        dtype = torch.bfloat16 if self.others == "bfloat16" else tensor.dtype

        def stored(task: str, tau: Tensor) -> Delta | None:
            if compressed:
                return self.delta(name, task, tau)
            return DenseDelta.of(shape, tau, dtype)

        pairs = zip(self.tasks, tensor.stacked())
        experts = [stored(task, tau) if tau.any() else None for task, tau in pairs]
        return EncodedTensor(name, None, experts)
