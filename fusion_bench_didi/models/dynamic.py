"""A backbone with stored task deltas that turns into the model of one task at a time, exactly.

Weights are always computed as *pristine base + change of the task*, never added to and subtracted from live weights,
so that a task's weights do not depend on what was switched on before.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fusion_bench.models.modulator import ModulatedModel, TaskModulator
from torch import Tensor, nn

from ..checkpoint import (
    CONFIG,
    FORMAT,
    fingerprint,
    load_backbone,
    read_config,
    read_deltas,
    versions,
    whole_directory,
    write_deltas,
    write_json,
)
from ..deltas import Delta
from ..errors import CheckpointMismatchError, UnknownTaskError
from ..storage import StorageReport, account
from .mixed import MixedForward
from .model_card import model_card

if TYPE_CHECKING:
    from ..routers import Router


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
        modulated_model._current_task = None


class _NamedModules(nn.ModuleDict):
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


class DynamicModel(ModulatedModel):
    """A frozen backbone, a shared part and T experts; behaves as the backbone of the current task.

    Args:
        backbone: the base model; it is taken over and its weights are overwritten by :meth:`set_task`.
        shared: deltas that every task uses, by tensor name.
        experts: deltas per task.
        unit_bits: size of one fine-tuned model, the unit of the storage account.
        info: JSON-plain facts that are saved with the model (method, settings, ranks, ...).
        backbone_bits: see :class:`~fusion_bench_didi.storage.StorageReport`; ``unit_bits`` if None.

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
        self.modulators = _NamedModules()
        self.shared = DeltaDict(shared)
        self.unit_bits = unit_bits
        self.backbone_bits = unit_bits if backbone_bits is None else backbone_bits
        self.info = dict(info or {})
        self.router: Router | None = None
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
        self._current_task = task_name

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
            task_ids: (B,) positions in :attr:`tasks`, one per sample.
            task_weights: (B, T) soft weights over :attr:`tasks`; a row of zeros is the shared model.

        Raises:
            UnknownTaskError: if there is neither weights, task nor router.
        """
        if task_ids is not None:
            task_weights = torch.eye(len(self.tasks), device=task_ids.device)[task_ids]
        if task_weights is not None:
            return self.mixed(task_weights, *args, **kwargs)
        if self._current_task is not None:
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
        """As :attr:`mixed`; made at first use, again if the model was moved or lost a task."""
        first = next(self.backbone.parameters())
        state = (tuple(self.tasks), first.device, first.dtype)
        if self._mixed_state != state:
            self._mixed, self._mixed_state = {}, state
        if shared_scale not in self._mixed:
            self._mixed[shared_scale] = MixedForward(self, shared_scale=shared_scale)
        return self._mixed[shared_scale]

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

    def save_pretrained(
        self, save_directory: str | Path, *, overwrite: bool = False, **_: Any
    ) -> None:
        """Write weights, configuration and model card; the directory appears whole or not at all.

        Raises:
            FileExistsError: if it exists and ``overwrite`` is false.
        """
        with whole_directory(save_directory, overwrite=overwrite) as directory:
            manifest = write_deltas(
                directory,
                dict(self.shared.items()),
                {t: dict(e.deltas.items()) for t, e in self.modulators.items()},
            )
            config = {
                "format": FORMAT,
                "model_class": type(self).__name__,
                "unit_bits": self.unit_bits,
                "backbone_bits": self.backbone_bits,
                "backbone": {
                    "class": f"{type(self.backbone).__module__}.{type(self.backbone).__qualname__}",
                    "source": None,
                    **self.info.get("backbone", {}),
                    "fingerprint": self.backbone_fingerprint(),
                },
                "storage": self.storage.as_dict(),
                "info": {k: v for k, v in self.info.items() if k != "backbone"},
                "versions": versions(),
                **manifest,
            }
            if self.router is not None:
                from ..routers import write_router

                config["router"] = write_router(directory, self.router)
            write_json(directory / CONFIG, config)
            (directory / "README.md").write_text(model_card(config))

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, backbone: nn.Module | None = None
    ) -> "DynamicModel":
        """Load what :meth:`save_pretrained` wrote.

        Args:
            backbone: the base model; loaded from where the merge took it if None.

        Raises:
            CheckpointMismatchError: for damaged files, or another backbone than the one that was merged.
        """
        config = read_config(directory)
        shared, experts = read_deltas(Path(directory), config)
        model = cls(
            backbone if backbone is not None else load_backbone(config["backbone"]),
            shared,
            experts,
            unit_bits=config["unit_bits"],
            backbone_bits=config["backbone_bits"],
            info={**config["info"], "backbone": config["backbone"]},
        )
        if model.backbone_fingerprint() != config["backbone"]["fingerprint"]:
            raise CheckpointMismatchError(
                f"The backbone given is not the one that {directory} was merged from "
                f"({config['backbone']['class']} from {config['backbone']['source']}): its weights differ. "
                "Pass the base model of the merge."
            )
        if "router" in config:
            from ..routers import read_router

            model.attach_router(read_router(Path(directory), config["router"]))
        return model

    def backbone_fingerprint(self) -> str:
        """Digest of the base values of all touched tensors.

        Raises:
            CheckpointMismatchError: if the backbone lacks one of them.
        """
        return fingerprint({name: self.base_tensor(name) for name in self.touched})

    def task_tensor(self, name: str, expert: TaskExpert) -> Tensor:
        """``W_0 + change`` of one tensor under one expert, in float32."""
        base = self.base_tensor(name)
        shared, delta = self.shared.get(name), expert.deltas.get(name)
        change = None if shared is None else shared.change()
        if delta is not None:
            change = delta.change(change)
        return base.float() if change is None else base.float() + change

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
        """Write the base values back."""
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

    def _known(self, task_name: str) -> None:
        if task_name not in self.modulators:
            raise UnknownTaskError(
                f"Task {task_name!r} is not in the merged model, which holds {self.tasks}."
            )


class DiDiModel(DynamicModel):
    """The merged model of DiDi-Merging: low-rank shared part and experts under one budget."""


def _named_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from ((n, p.detach()) for n, p in module.named_parameters())
    yield from module.named_buffers()
