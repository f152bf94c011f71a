"""A backbone with stored task deltas that turns into the model of one task at a time, exactly.

Weights are always computed as *pristine base + change of the task*, never added to and subtracted from live weights,
so that a task's weights do not depend on what was switched on before.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from fusion_bench.models.modulator import ModulatedModel
from torch import Tensor, nn

from ..deltas.base import Delta
from ..deltas.storage import StorageReport, account
from ..errors import UnknownTaskError
from ..serving.banks import Serving
from ..serving.forward import MixedForward
from .experts import DeltaDict, NamedModules, TaskExpert
from .saving import Saving
from .weights import Weights

if TYPE_CHECKING:
    from ..routers.base import Router


class DynamicModel(Saving, Weights, ModulatedModel):
    """A frozen backbone, a shared part and T experts; behaves as the backbone of the current task.

    Args:
        backbone: the base model; it is taken over and its weights are overwritten by :meth:`set_task`.
        shared: deltas that every task uses, by tensor name.
        experts: deltas per task.
        unit_bits: size of one fine-tuned model, the unit of the storage account.
        info: JSON-plain facts that are saved with the model (method, settings, ranks, ...).
        backbone_bits: see :class:`~fusion_bench_didi.storage.StorageReport`; ``unit_bits`` if None.

    Attributes:
        router: finds the tasks of a batch for which none is given; see :meth:`attach_router`.
        serving: how mixed batches trade memory for time, a :class:`~.tables.Serving`; may be set at any time.

    Unknown attributes are looked up in the backbone, so that host classifiers find ``config``, ``generate`` or
    ``train_preprocess``.
    """

    def __init__(
        self,
        backbone: nn.Module,
        shared: Mapping[str, Delta],
        experts: Mapping[str, Mapping[str, Delta]],
        *,
        unit_bits: int,
        info: Mapping[str, Any] | None = None,
        backbone_bits: int | None = None,
    ):
        super().__init__(backbone, {})
        self.backbone.requires_grad_(False)
        self.modulators = NamedModules()
        self.shared = DeltaDict(shared)
        self.unit_bits = unit_bits
        self.backbone_bits = unit_bits if backbone_bits is None else backbone_bits
        self.info = dict(info or {})
        self.router: Router | None = None
        self.serving = Serving()
        self._has_task = False  # a name would make torch.compile start anew per task
        self._mixed: dict[float, MixedForward] = {}
        self._mixed_state: tuple | None = None
        self._pristine: dict[str, Tensor] = {}
        for task, deltas in experts.items():
            self.add_modulator(task, TaskExpert(deltas))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("backbone"), name)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make their own working copies of the experts."""
        return {**self.__dict__, "_mixed": {}, "_mixed_state": None}

    @property
    def tasks(self) -> list[str]:
        return list(self.modulators.keys())

    @property
    def touched(self) -> list[str]:
        """Names of the tensors that the shared part or some expert changes."""
        names = dict.fromkeys(self.shared)
        for expert in self.modulators.values():
            names.update(dict.fromkeys(expert.deltas))
        return list(names)

    def remove_modulator(self, task_name: str) -> None:
        """Forget a task; if it is the current one the base weights come back first."""
        self._known(task_name)
        if self._current_task == task_name:
            self.modulators[task_name].remove(self)
        kept = set(self.touched)
        del self.modulators[task_name]
        for name in kept - set(self.touched):
            if name in self._pristine:
                self.write(name, self._pristine.pop(name))

    def set_task(self, task_name: str) -> None:
        """Make the backbone the model of this task.

        Raises:
            UnknownTaskError: naming the tasks there are.
        """
        self._known(task_name)
        if self._current_task == task_name:
            return
        self.modulators[task_name].apply(self)
        self._current_task, self._has_task = task_name, True

    def unset_task(self) -> None:
        """Give the backbone its base weights back; ``forward`` then needs a task first."""
        if self._current_task is not None:
            self.modulators[self._current_task].remove(self)

    def forward(
        self,
        *args,
        task_ids: Tensor | None = None,
        task_weights: Tensor | None = None,
        **kwargs,
    ) -> Any:
        """The backbone's output: under the weights given, else under the current task, else as the router says.

        Args:
            task_ids: (B,) positions in :attr:`tasks`, one per sample; their number stands for the shared model.
            task_weights: (B, T) soft weights over :attr:`tasks`; a row of zeros is the shared model.

        Raises:
            UnknownTaskError: if there is neither weights, task nor router.
        """
        if task_ids is not None:
            return self.mixed.by_task(task_ids, *args, **kwargs)
        if task_weights is not None:
            return self.mixed(task_weights, *args, **kwargs)
        if self._has_task:
            return self.backbone(*args, **kwargs)
        if self.router is not None:
            return self.mixed(self.router.route(self, *args, **kwargs), *args, **kwargs)
        raise UnknownTaskError(
            f"No task is set. Call set_task(...) with one of {self.tasks}, evaluate with a task-aware pool, or attach "
            "a router."
        )

    @property
    def mixed(self) -> MixedForward:
        """The forward for batches of several tasks."""
        return self.mixed_at(1.0 if self.router is None else self.router.shared_scale)

    def mixed_at(self, shared_scale: float) -> MixedForward:
        """As :attr:`mixed`; made at first use, again if the model was moved or its tasks are others."""
        first = next(self.backbone.parameters())
        state = (tuple(self.tasks), first.device, first.dtype, self.serving)
        if self._mixed_state != state:
            self._mixed, self._mixed_state = {}, state
        if shared_scale not in self._mixed:
            self._make_mixed(shared_scale)
        return self._mixed[shared_scale]

    @torch.compiler.disable
    def _make_mixed(self, shared_scale: float) -> None:
        self._mixed[shared_scale] = MixedForward(
            self, shared_scale=shared_scale, serving=self.serving
        )

    def attach_router(self, router: "Router | None") -> "DynamicModel":
        """Let a router find the task of every sample; None takes it off again.

        A task that is set by hand still comes first.

        Raises:
            UnknownTaskError: if the router is for other tasks.
        """
        if router is not None:
            router.bind(self)
        self.unset_task()
        self.router = router
        return self

    @property
    def storage(self) -> StorageReport:
        """Bits per part, task and tensor, and the ratios ``x_excl`` and ``x_incl``."""
        return account(
            dict(self.shared.items()),
            {t: dict(e.deltas.items()) for t, e in self.modulators.items()},
            unit_bits=self.unit_bits,
            backbone_bits=self.backbone_bits,
            routing_bits=0 if self.router is None else self.router.bits,
        )

    def _known(self, task_name: str) -> None:
        if task_name not in self.modulators:
            raise UnknownTaskError(
                f"Task {task_name!r} is not in the merged model, which holds {self.tasks}."
            )


class DiDiModel(DynamicModel):
    """The merged model of DiDi-Merging: low-rank shared part and experts under one budget."""
