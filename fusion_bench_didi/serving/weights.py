"""The weights of a backbone: base values kept, live ones written."""

import threading
from collections.abc import Iterable, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointMismatchError, DiDiError
from ..task_vectors.live_models import all_tensors
from ..task_vectors.ties import separate, tensor_of, tie, tied_names
from .copies import deep_copy
from .derived import Derived
from .shadow import unwatched
from .shapes import Shapes
from .unwritten import Unwritten


class BackboneWeights:
    """Tensors of a backbone that are overwritten and come back, also by others of another shape.

    Args:
        backbone: whose tensors they are.

    Attributes:
        lock: held while tensors are read or written; also by whoever replaces the backbone's tensors for a while.
        shapes: what the backbone was loaded with.
        derived: what its modules keep that they work out of their weights.
        unwritten: what no forward may have written to, nor another merged model.

    Raises:
        DiDiError: while another merged model has a task set on the backbone.
    """

    def __init__(self, backbone: nn.Module):
        separate(backbone)
        self.backbone = backbone
        self.lock = threading.RLock()
        self.shapes = Shapes(backbone)
        self.derived = Derived(backbone)
        self._base: dict[str, Tensor] = {}
        self.unwritten = Unwritten(backbone, self._base)
        self.unwritten.check()
        self._aliases = tied_names(backbone)
        self.tie(backbone)
        named = all_tensors(backbone).items()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in named}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    def copied(self) -> nn.Module:
        """An independent copy of the backbone as it is now."""
        self.unwritten.check()
        with self.lock:
            return unwatched(deep_copy(self.backbone))

    def tie(self, model: nn.Module) -> None:
        """Tie the tensors of the backbone or a copy of it again that were tied, whatever has become of them on a move."""
        tie(model, self._aliases)

    def live(self, name: str) -> Tensor:
        """The tensor as it is now.

        Raises:
            CheckpointMismatchError: if the backbone lacks it.
            DiDiError: if something else gave it another shape, which what is written would undo.
        """
        held = _held(self.backbone, name)
        shape = tuple(held.shape)
        if shape != self._shapes.setdefault(name, shape):
            raise DiDiError(
                f"The backbone's {name} is {shape} now, and was {self._shapes[name]} when the tasks were merged, which are made for that. "
                "Resize the base model and the fine-tuned ones before the merge, or one task's plain model, materialize(...)."
            )
        return held.detach()

    def check_shapes(self) -> None:
        """
        Raises:
            DiDiError: as :meth:`live`, for any tensor.
        """
        with self.lock:
            for name, _ in self.backbone.named_parameters():
                self.live(name)

    @property
    def kept(self) -> dict[str, Tensor]:
        """Base values of what was overwritten, by every name that it has."""
        with self.lock:
            again = {n: f for n, f in self._aliases.items() if f in self._base}
            names = {name: name for name in self._base} | again
            return {name: self.base(first) for name, first in names.items()}

    def base(self, name: str) -> Tensor:
        """The base value, whatever was written; in the live tensor's type and on its device.

        Raises:
            DiDiError: if a forward wrote to the backbone.
        """
        self.unwritten.check()
        with self.lock:
            live = self.live(name)
            kept = self._base.get(name, live)
            if kept.device != live.device or kept.dtype != live.dtype:
                kept = self._base[name] = kept.to(live.device, live.dtype)
            return kept

    def write(self, name: str, value: Tensor) -> None:
        """Overwrite a live tensor, keeping its base value; :meth:`forget_derived` goes after the last one."""
        with self.lock:
            if name not in self._base:
                self.unwritten.writing()
                self._base[name] = self.live(name).clone()
            self.put(self.backbone, name, value)

    def put(self, model: nn.Module, name: str, value: Tensor) -> None:
        """Write a value into the backbone or a copy of it; what states the shapes of tensors follows, and :meth:`forget_derived`
        goes after the last one."""
        with self._switching(model):
            self.tie(model)
            held, shape = _held(model, name), tuple(value.shape)
            as_stated = held.shape == shape == self.shapes.sides.get(name, shape)
            if held.shape == shape and not _repeats(held):
                held.detach().copy_(value)
            else:
                with torch.inference_mode(False), torch.no_grad():
                    other = torch.empty(shape, dtype=held.dtype, device=held.device)
                    # the same object: it may have several names
                    held.data = other.copy_(value)
            if model is self.backbone:
                self._shapes[name] = shape
            if not as_stated:
                self.shapes.follow(model, name, shape)

    def forget_derived(self, model: nn.Module, names: Iterable[str]) -> None:
        """Forget what modules of the backbone or a copy of it have worked out of tensors that were written."""
        with self._switching(model):
            self.derived.forget(model, names)

    def _switching(self, model: nn.Module) -> AbstractContextManager[None]:
        return self.unwritten.switching() if model is self.backbone else nullcontext()

    def restore(self) -> None:
        """Write all base values back; their copies are no longer needed."""
        with self.lock:
            names = list(self._base)
            try:
                while self._base:
                    self.put(self.backbone, *self._base.popitem())
            finally:
                self.forget_derived(self.backbone, names)

    def forget(self, names: Set[str]) -> None:
        """Write base values back for good."""
        with self.lock:
            for name in names & self._base.keys():
                self.put(self.backbone, name, self._base.pop(name))
                self.forget_derived(self.backbone, [name])


def _held(model: nn.Module, name: str) -> Tensor:
    """A tensor of the backbone or a copy of it."""
    try:
        found = tensor_of(model, name)
    except AttributeError:
        found = None
    if not isinstance(found, Tensor):
        raise CheckpointMismatchError(
            f"The backbone ({type(model).__name__}) has no tensor {name!r}, which the merged model changes. "
            "Pass the base model of the merge."
        )
    return found


def _repeats(tensor: Tensor) -> bool:
    """Whether several entries lie in one place, as after ``expand``, so that they cannot be written."""
    sides = zip(tensor.stride(), tensor.shape)
    return any(step == 0 and side > 1 for step, side in sides)
