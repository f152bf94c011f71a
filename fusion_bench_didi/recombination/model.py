"""The merged model of one decision: a chain of library modules per task."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..deltas.base import Delta
from ..deltas.storage import StorageReport, account
from ..models.dynamic import DynamicModel
from ..task_vectors.tower_names import spelling
from .library import ModularExpert, load_modules, save_modules

MODULES = "modules"


class RecombinedModel(DynamicModel):
    """Behaves as any dynamic model; tasks of one group hold the same module, which is stored and counted once.

    Args:
        backbone: the base model, taken over.
        modules: by id.
        chains: per task, ids of its modules.
        unit_bits: one fine-tuned model.
        info: JSON-plain facts.
    """

    def __init__(
        self,
        backbone: nn.Module,
        modules: Mapping[str, ModularExpert],
        chains: Mapping[str, Sequence[str]],
        *,
        unit_bits: int,
        info: Mapping[str, Any] | None = None,
    ):
        self.__dict__["library"] = dict(modules)
        self.__dict__["chains"] = {task: tuple(c) for task, c in chains.items()}
        experts = {
            task: {
                name: delta
                for key in chain
                for name, delta in modules[key].deltas(task).items()
            }
            for task, chain in chains.items()
        }
        super().__init__(backbone, {}, experts, unit_bits=unit_bits, info=info)

    def remove_modulator(self, task_name: str) -> None:
        """Forget a task, the modules that no other task uses, and its part of those that others use."""
        super().remove_modulator(task_name)
        del self.chains[task_name]
        used = {key for chain in self.chains.values() for key in chain}
        for key, module in list(self.library.items()):
            del self.library[key]
            if key in used:
                self.library[key] = module.without(task_name)

    @property
    def storage(self) -> StorageReport:
        """Distinct modules: ``shared_bits`` what several tasks use, ``expert_bits`` what one task uses."""
        shared: dict[str, Delta] = {}
        experts: dict[str, dict[str, Delta]] = {task: {} for task in self.chains}
        layers: dict[str, int] = {}
        for key, module in self.library.items():
            users = [task for task, chain in self.chains.items() if key in chain]
            target = shared if len(users) > 1 else experts[users[0]]
            target.update({f"{key}/{n}": d for n, d in module.shared.items()})
            for task, deltas in module.experts.items():
                if task in experts:
                    experts[task].update({f"{key}//{n}": d for n, d in deltas.items()})
            for deltas in module.parts:
                for name, delta in deltas.items():
                    layers[name] = layers.get(name, 0) + delta.bits
        counted = account(
            shared,
            experts,
            unit_bits=self.unit_bits,
            backbone_bits=self.backbone_bits,
            routing_bits=0 if self.router is None else self.router.bits,
        )
        return replace(counted, layer_bits=layers)

    def write_parts(self, directory: Path) -> dict[str, Any]:
        """Each module once, and the chains."""
        save_modules(directory / MODULES, self.library.values())
        return {"tasks": self.tasks, "chains": self.chains}

    @classmethod
    def from_parts(
        cls,
        directory: Path,
        config: Mapping[str, Any],
        backbone: nn.Module,
        info: Mapping[str, Any],
    ) -> "RecombinedModel":
        ids = [key for chain in config["chains"].values() for key in chain]
        modules = load_modules(directory / MODULES, ids)
        held = (deltas for m in modules.values() for deltas in m.parts)
        spell = spelling((name for deltas in held for name in deltas), backbone)
        return cls(
            backbone,
            {key: module.spelled(spell) for key, module in modules.items()},
            config["chains"],
            unit_bits=config["unit_bits"],
            info=info,
        )
