"""What tasks add to a backbone: deltas by tensor name, one expert per task."""

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

import torch
from fusion_bench.models.modulator import TaskModulator
from torch import nn

from ..deltas.base import Delta
from ..deltas.names import escaped, unescaped
from ..lowrank.arithmetic import without_autocast
from .interface import Merged

Held = TypeVar("Held", bound=nn.Module)


class NamedModules(nn.Module, Generic[Held]):
    """A dictionary of modules under any names, in the order in which they came.

    ``nn.ModuleDict`` forbids dots (``llama-3.1``), and the names of its own attributes (``type``, ``keys``, ``train``).

    Args:
        modules: by name.
    """

    def __init__(self, modules: Mapping[str, Held] | None = None):
        super().__init__()
        for name, module in (modules or {}).items():
            self[name] = module

    @staticmethod
    def _key(name: str) -> str:
        return "/" + escaped(name)  # what no attribute begins with

    def __getitem__(self, name: str) -> Held:
        try:
            return self._modules[self._key(name)]
        except KeyError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, module: Held) -> None:
        self.add_module(self._key(name), module)

    def __delitem__(self, name: str) -> None:
        del self._modules[self._key(name)]

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._modules)

    def get(self, name: str) -> Held | None:
        return self._modules.get(self._key(name))

    def keys(self) -> list[str]:
        return [unescaped(key[1:]) for key in self._modules]

    def values(self) -> list[Held]:
        return list(self._modules.values())

    def items(self) -> list[tuple[str, Held]]:
        return list(zip(self.keys(), self.values()))


class TaskExpert(TaskModulator):
    """One task's deltas on top of the backbone and the shared part.

    Args:
        deltas: by tensor name.
    """

    def __init__(self, deltas: Mapping[str, Delta]):
        super().__init__()
        self.deltas: NamedModules[Delta] = NamedModules(deltas)

    def apply(
        self, modulated_model: Merged | Callable[[nn.Module], None]
    ) -> "TaskExpert | None":
        """Write the task's weights into the live backbone, one pass over the touched tensors.

        The host's modulators call this as torch calls what does something with every module; a function is applied so.
        """
        if not isinstance(modulated_model, nn.Module):
            return nn.Module.apply(self, modulated_model)
        with torch.no_grad(), without_autocast():
            for name in modulated_model.touched:
                modulated_model.write(name, modulated_model.task_tensor(name, self))
        return None

    @torch.no_grad()
    def remove(self, modulated_model: Merged) -> None:
        """Remove the expert: restore the base model."""
        modulated_model.restore()
