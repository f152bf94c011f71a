"""What tasks add to a backbone: deltas by tensor name, one expert per task."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from fusion_bench.models.modulator import TaskModulator
from torch import nn

from ..deltas.base import Delta

if TYPE_CHECKING:
    from .dynamic import DynamicModel


class DeltaDict(nn.Module):
    """Deltas by tensor name. (``nn.ModuleDict`` forbids the dots in names.)"""

    def __init__(self, deltas: Mapping[str, Delta]):
        super().__init__()
        self._names = {name: name.replace(".", "/") for name in deltas}
        for name, delta in deltas.items():
            self.add_module(self._names[name], delta)

    def __getitem__(self, name: str) -> Delta:
        return self._modules[self._names[name]]

    def get(self, name: str) -> Delta | None:
        return self[name] if name in self._names else None

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def items(self) -> Iterable[tuple[str, Delta]]:
        return ((name, self[name]) for name in self._names)


class TaskExpert(TaskModulator):
    """What one task adds to the backbone and to the shared part."""

    def __init__(self, deltas: Mapping[str, Delta]):
        super().__init__()
        self.deltas = DeltaDict(deltas)

    @torch.no_grad()
    def apply(self, modulated_model: "DynamicModel") -> None:
        """Write the task's weights into the live backbone, one pass over the touched tensors."""
        for name in modulated_model.touched:
            modulated_model.write(name, modulated_model.task_tensor(name, self))

    @torch.no_grad()
    def remove(self, modulated_model: "DynamicModel") -> None:
        """Restore the base model."""
        modulated_model.restore()


class NamedModules(nn.ModuleDict):
    """A module dictionary whose keys may hold dots (model names such as ``llama-3.1``)."""

    @staticmethod
    def _safe(key: str) -> str:
        return key.replace(".", "\u2024")  # one dot leader

    def __getitem__(self, key):
        return super().__getitem__(self._safe(key))

    def __setitem__(self, key, module):
        super().__setitem__(self._safe(key), module)

    def __delitem__(self, key):
        super().__delitem__(self._safe(key))

    def __contains__(self, key):
        return super().__contains__(self._safe(key))

    def keys(self):
        return [key.replace("\u2024", ".") for key in super().keys()]

    def __iter__(self):
        return iter(self.keys())

    def items(self):
        return list(zip(self.keys(), self.values()))
