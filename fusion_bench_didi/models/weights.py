"""The weights of one task at a time: base values kept, live ones written."""

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import CheckpointMismatchError

if TYPE_CHECKING:
    from .experts import TaskExpert


class Weights:
    """The part of a :class:`~.dynamic.DynamicModel` that computes, writes and restores its backbone's weights."""

    @torch.no_grad()
    def materialize(self, task_name: str) -> nn.Module:
        """A plain, independent model of one task, of the backbone's own class."""
        self._known(task_name)
        model = copy.deepcopy(self.backbone)
        tensors = dict(_named_tensors(model))
        for name in self.touched:
            change = self.task_tensor(name, self.modulators[task_name])
            tensors[name].copy_(change.to(tensors[name].dtype))
        return model

    def base_tensors(self) -> dict[str, Tensor]:
        """Base values of all touched tensors.

        Raises:
            CheckpointMismatchError: if the backbone lacks one of them.
        """
        return {name: self.base_tensor(name) for name in self.touched}

    def task_tensor(self, name: str, expert: "TaskExpert") -> Tensor:
        """``W_0 + change`` of one tensor under one expert, in float32."""
        base = self.base_tensor(name)
        shared, delta = self.shared.get(name), expert.deltas.get(name)
        if delta is None and shared is None:
            return base.float()
        change = shared.change() if delta is None else delta.change(shared)
        return base.float() + change

    def base_tensor(self, name: str) -> Tensor:
        """The base model's value, whatever task is on."""
        live = self._live(name)
        kept = self._pristine.get(name, live)
        if kept.device != live.device or kept.dtype != live.dtype:
            kept = self._pristine[name] = kept.to(live.device, live.dtype)
        return kept

    def write(self, name: str, value: Tensor) -> None:
        """Overwrite a live tensor, keeping its base value."""
        live = self._live(name)
        if name not in self._pristine:
            self._pristine[name] = live.clone()
        live.copy_(value)

    def restore(self) -> None:
        """Write the base values back; no task is set then."""
        self._current_task, self._has_task = None, False
        for name, value in self._pristine.items():
            self._live(name).copy_(value)

    def _live(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        try:
            return getattr(self.backbone.get_submodule(owner), leaf).detach()
        except AttributeError:
            raise CheckpointMismatchError(
                f"The backbone ({type(self.backbone).__name__}) has no tensor {name!r}, which the merged model changes. "
                "Pass the base model of the merge."
            ) from None


def _named_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from ((n, p.detach()) for n, p in module.named_parameters())
    yield from module.named_buffers()
