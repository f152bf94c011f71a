"""
A backbone that becomes the model of one task at a time, by stored changes of its weights.

Weights are always the pristine base plus the change of the task, and the base values are
put back as they were: switching to and fro changes no bit of any task's weights.
"""

import itertools
from typing import Dict, Iterator, List, Mapping, Optional, Union

import torch
from fusion_bench.models.parameter_dict import ParameterDictModel
from fusion_bench.utils.type import TorchModelType
from torch import Tensor, nn

from .base import ModulatedModel, TaskModulator

LowRank = tuple[Tensor, Tensor]
"""`up` (m, r) and `down` (r, n); a tensor of more sides is seen as out x everything else."""


def changeable_tensors(model: nn.Module) -> Dict[str, Tensor]:
    """The floating point tensors of a model by name; tied ones under their first name."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: t.detach() for name, t in tensors if t.is_floating_point()}


class WeightDelta(nn.Module):
    """
    Changes of some tensors of a model, each dense or as a low-rank product.

    Args:
        deltas: By tensor name, a tensor of the same shape or a pair `(up, down)`.
    """

    def __init__(self, deltas: Mapping[str, Union[Tensor, LowRank]]):
        super().__init__()
        parts: Dict[str, Dict[str, nn.Parameter]] = {"dense": {}, "up": {}, "down": {}}
        for name, delta in deltas.items():
            if isinstance(delta, Tensor):
                delta = {"dense": delta}
            else:
                delta = dict(zip(("up", "down"), delta))
            for part, value in delta.items():
                parts[part][name] = nn.Parameter(
                    value.contiguous(), requires_grad=False
                )
        self._names = list(deltas)
        self.dense = ParameterDictModel(parts["dense"])
        self.up = ParameterDictModel(parts["up"])
        self.down = ParameterDictModel(parts["down"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def change(self, name: str) -> Tensor:
        """The change of one tensor: of its shape, or (m, n) where it is a product."""
        if name in self.up:
            return self.up[name] @ self.down[name]
        return self.dense[name]

    def numel(self) -> int:
        """Numbers stored."""
        return sum(p.numel() for p in self.parameters())


class WeightDeltaModulator(WeightDelta, TaskModulator[TorchModelType]):
    """What one task adds to the base model, beyond what all tasks share."""

    def apply(self, modulated_model: "WeightDeltaModel"):
        modulated_model.restore()
        shared = modulated_model.shared
        for name in dict.fromkeys([*shared, *self]):
            modulated_model.add(
                name, [d.change(name) for d in (shared, self) if name in d]
            )

    def remove(self, modulated_model: "WeightDeltaModel"):
        modulated_model.restore()
        modulated_model._current_task = None


class WeightDeltaModel(ModulatedModel[TorchModelType]):
    """
    One backbone, changes that all tasks share, and changes of each task.

    Args:
        backbone: The base model. Its weights are overwritten by `set_task`.
        modulators: By task.
        shared: Part of every task.
    """

    def __init__(
        self,
        backbone: TorchModelType,
        modulators: Mapping[str, WeightDeltaModulator],
        shared: Optional[WeightDelta] = None,
    ):
        super().__init__(backbone, dict(modulators))
        self.backbone.requires_grad_(False)
        self.shared = WeightDelta({}) if shared is None else shared
        self._pristine: Dict[str, Tensor] = {}

    @property
    def tasks(self) -> List[str]:
        return list(self.modulators)

    def numel(self) -> int:
        """Numbers stored beyond the backbone."""
        return self.shared.numel() + sum(m.numel() for m in self.modulators.values())

    @torch.no_grad()
    def add(self, name: str, changes: List[Tensor]):
        """Add changes to the pristine value of one tensor of the backbone."""
        live = self._live(name)
        self._pristine[name] = live.clone()
        value = live.float()
        for change in changes:
            value = value + change.float().view(live.shape)
        live.copy_(value)

    @torch.no_grad()
    def restore(self):
        """Put the base model's values back."""
        while self._pristine:
            name, value = self._pristine.popitem()
            self._live(name).copy_(value)

    def _live(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.backbone.get_submodule(owner), leaf).data
