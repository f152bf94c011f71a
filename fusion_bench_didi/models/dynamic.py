"""A backbone with stored task deltas that turns into the model of one task at a time, exactly.

Weights are always computed as *pristine base + change of the task*, never added to and subtracted from live weights,
so that a task's weights do not depend on what was switched on before.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from fusion_bench.models.modulator import ModulatedModel
from packaging.version import Version
from torch import Tensor, nn

from ..checkpoint.deltas import read_deltas
from ..checkpoint.stream import write_deltas
from ..deltas.base import Delta, last_of
from ..deltas.plain import OwnDelta
from ..deltas.storage import StorageReport, account
from ..errors import DiDiError, SettingsError, UnknownTaskError
from ..lowrank.arithmetic import without_autocast
from ..pools.task_settings import CONFIGURATION
from ..routers.base import Router
from ..routers.files import RouterName, make_router
from ..serving.banks import Serving
from ..serving.calls import check_meant
from ..serving.copies import adopted, deep_copy
from ..serving.forward import MixedForward
from ..serving.held import Held
from ..serving.layers import is_turned
from ..serving.making import AnyBank, bank_of
from ..serving.own_settings import OwnSettings, put
from ..serving.shadow import let_pickle
from ..serving.unwritten import without_rescaling
from ..serving.weights import BackboneWeights
from ..task_vectors.live_models import uncompiled
from . import saving
from .experts import NamedModules, TaskExpert
from .methods import attribute, no_task
from .model_card import CardFacts
from .overview import as_html, overview
from .task_settings import settings_of, settle, told_of

#: What mixed forwards were made for, and they by the factor on the shared part.
Mixed = tuple[tuple, dict[float, MixedForward]]
_UNMADE: Mixed = (), {}
#: Releases before 2.9 say of torch.compile that it exports.
_TELLS_EXPORT = Version(torch.__version__) >= Version("2.9")


class DynamicModel(ModulatedModel):
    """A frozen backbone, a shared part and T experts; behaves as the backbone of the current task.

    Args:
        backbone: the base model; it is taken over and its weights are overwritten by :meth:`set_task`. Of several models on one,
            one at a time can have a task set, and the others do nothing meanwhile.
        shared: deltas that every task uses, by tensor name.
        experts: deltas per task.
        unit_bits: size of one fine-tuned model, the unit of the storage account.
        info: JSON-plain facts that are saved with the model (method, settings, ranks, ...).
        backbone_bits: see :class:`~fusion_bench_didi.deltas.storage.StorageReport`; ``unit_bits`` if None.

    Attributes:
        router: finds the tasks of a batch for which none is given; see :meth:`attach_router`.
        serving: how mixed batches trade memory for time, a :class:`~fusion_bench_didi.serving.banks.Serving`; may be set at any time.

    Threads may run mixed batches at the same time. A task that is set is everyone's: models that are switched are not for
    several threads.

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
        backbone = adopted(uncompiled(backbone))
        super().__init__(without_rescaling(backbone), {})
        self.backbone.requires_grad_(False)
        self.modulators: NamedModules[TaskExpert] = NamedModules()
        self.shared: NamedModules[Delta] = NamedModules(shared)
        self.unit_bits = unit_bits
        self.backbone_bits = unit_bits if backbone_bits is None else backbone_bits
        self.info = dict(info or {})
        self.router: Router | None = None
        self.serving = Serving()
        self._has_task = False  # a name would make torch.compile start anew per task
        self._configured: dict[str, Any] = {}  # what the base model's says, while a task is set  # fmt: skip
        self._mixed: Mixed = _UNMADE
        self._weights = BackboneWeights(self.backbone)
        for task, deltas in experts.items():
            self.add_modulator(task, TaskExpert(deltas))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone" or name.startswith("__"):
                raise
            value = getattr(super().__getattr__("backbone"), name)
            return attribute(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make their own working copies of the experts."""
        let_pickle(self.backbone)
        return {**self.__dict__, "_mixed": _UNMADE}

    def __deepcopy__(self, memo: dict[int, Any]) -> "DynamicModel":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with self._weights.lock:
            deep_copy(self.backbone, memo)
            twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As of any module, the backbone's tensors with their base values, whatever task is on: so every one can be loaded.

        With ``keep_vars`` the live ones.

        Raises:
            DiDiError: if a forward, or another merged model, wrote to the backbone.
        """
        self._weights.unwritten.check()
        found = super().state_dict(*args, **kwargs)
        places = dict(zip(("destination", "prefix", "keep_vars"), args), **kwargs)
        if not places.get("keep_vars"):
            start = places.get("prefix", "") + "backbone."
            for name, value in self._weights.kept.items():
                if start + name in found:
                    found[start + name] = value.detach()
        return found

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; the task that is on stays on, on top of the base values that were loaded."""
        task = self._current_task
        found = super().load_state_dict(*args, **kwargs)
        if task is not None:
            self.set_task(task)
        return found

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """What is loaded takes the place of base values; what was made of those is made again."""
        self._weights.unwritten.check()
        self.unset_task()
        self.backbone_changed()
        super()._load_from_state_dict(*args, **kwargs)

    def backbone_changed(self) -> None:
        """To be called after a change of how the backbone runs: what was made for mixed batches is made again.

        Raises:
            DiDiError: if tensors of the backbone have other shapes than what the tasks were made for.
        """
        self._forget_mixed()
        self._weights.check_shapes()

    def _forget_mixed(self) -> None:
        """What was made for mixed batches is made again when the next one comes."""
        self._mixed = _UNMADE

    @property
    def serving(self) -> Serving:
        return self._serving

    @serving.setter
    def serving(self, value: Serving) -> None:
        if not isinstance(value, Serving):
            raise SettingsError(
                f"model.serving is to be {value!r}, expected a fusion_bench_didi.models.Serving, such as "
                "Serving(memory_limit_gb=8)."
            )
        self._serving = value

    @property
    def tasks(self) -> list[str]:
        return list(self.modulators.keys())

    @property
    def _stored(self) -> tuple[dict[str, Delta], dict[str, dict[str, Delta]]]:
        """Deltas of the shared part by tensor name, and those of every task."""
        experts = {t: dict(e.deltas.items()) for t, e in self.modulators.items()}
        return dict(self.shared.items()), experts

    @property
    def touched(self) -> list[str]:
        """Names of the tensors that the shared part or some expert changes."""
        shared, experts = self._stored
        return list(dict.fromkeys(itertools.chain(shared, *experts.values())))

    def add_modulator(self, task_name: str, modulator: TaskExpert) -> None:
        """Hold one more task.

        Raises:
            ValueError: if it is held already.
            DiDiError: if a router is attached, which knows only the tasks there were.
        """
        self._check_unrouted()
        super().add_modulator(task_name, modulator)
        self._forget_mixed()

    def remove_modulator(self, task_name: str) -> None:
        """Forget a task; if it is the current one the base weights come back first.

        Raises:
            DiDiError: if a router is attached, which could find it.
        """
        self._known(task_name)
        self._check_unrouted()
        if self._current_task == task_name:
            self.modulators[task_name].remove(self)
        before = set(self.touched)
        del self.modulators[task_name]
        self._weights.forget(before - set(self.touched))
        self._forget_mixed()

    def _check_unrouted(self) -> None:
        if self.router is not None:
            raise DiDiError(
                f"A {self.router.kind} router of the tasks {self.tasks} is attached. Take it off first, attach_router(None), and "
                "attach one of the tasks there are then."
            )

    def hold(
        self,
        shared: Mapping[str, Delta],
        experts: Mapping[str, Mapping[str, Delta]],
    ) -> None:
        """Hold other deltas than before; no task is set then.

        Raises:
            DiDiError: if a router is attached, which may have looked at those before.
        """
        self._check_unrouted()
        self.unset_task()
        before = set(self.touched)
        made = {task: TaskExpert(deltas) for task, deltas in experts.items()}
        self.shared, self.modulators = NamedModules(shared), NamedModules(made)
        device = next(self.backbone.parameters()).device
        self.shared.to(device)
        self.modulators.to(device)
        self._weights.forget(before - set(self.touched))
        self._forget_mixed()

    def set_task(self, task_name: str) -> None:
        """Make the backbone the model of this task; its configuration has the task's names of classes, and what losses read.

        Raises:
            UnknownTaskError: naming the tasks there are.
        """
        self._known(task_name)
        with self._weights.lock:
            if self._current_task == task_name:
                return
            self._current_task, self._has_task = None, False
            self._as_base()
            try:
                self.modulators[task_name].apply(self)
                self._weights.forget_derived(self.backbone, self.touched)
            except BaseException:  # some tensors would be of one task, some of another
                self.restore()
                raise
            told = settings_of(self.info, task_name, self.backbone)
            self._configured = put(self.backbone, told)
            self._current_task, self._has_task = task_name, True

    def _as_base(self) -> None:
        """Let the backbone's configuration say what it did before a task was set."""
        put(self.backbone, self._configured)
        self._configured = {}

    def unset_task(self) -> None:
        """Give the backbone its base weights back; ``forward`` then needs a task first."""
        with self._weights.lock:
            if self._current_task is not None:
                self.modulators[self._current_task].remove(self)

    def forward(
        self,
        *args,
        task_ids: Tensor | Sequence[int | str | None] | None = None,
        task_weights: Tensor | Sequence[Sequence[float]] | None = None,
        **kwargs,
    ) -> Any:
        """The backbone's output: under the weights given, else under the current task, else as the router says.

        Args:
            task_ids: one per sample (B,), positions in :attr:`tasks` or names; their number, or None, is the shared model.
            task_weights: (B, T) soft weights over :attr:`tasks`; a row of zeros is the shared model, scaled as the attached router
                has it.

        Raises:
            UnknownTaskError: if there is neither weights, task nor router, and for tasks that the model does not hold.
            DiDiError: for a number of tasks other than that of the samples; for a backbone that takes arguments of these names itself,
                which may be given by position; and where outputs of several tasks, such as those
                of heads of different shapes, are not one batch. Where gradients are asked of samples of several tasks. Where a
                router would have to find the tasks of samples that go on from a cache.
        """
        if task_ids is not None or task_weights is not None:
            if _exporting() and not any(f.trusted for f in self._mixed[1].values()):
                raise DiDiError(
                    "torch.export of a mixed batch needs one run of such a batch before, in which it is seen how to run it."
                )
            forward = self.mixed_for(task_weights)
            if forward.takes_tasks:
                check_meant(self.backbone.forward, args, task_ids, task_weights)
            return forward(task_ids, task_weights, args, kwargs)
        if self._has_task:
            return self.run_alone(self.backbone, *args, **kwargs)
        if self.router is not None:
            weights = self.router.route(self, *args, **kwargs)
            return self.mixed(None, weights, args, kwargs)
        raise no_task(self)

    def run_alone(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a function of the backbone returns, which may not write to the weights.

        Raises:
            DiDiError: if it did.
        """
        return self._weights.unwritten.run(
            self.backbone, lambda: function(*args, **kwargs)
        )

    @property
    def mixed(self) -> MixedForward:
        """The forward for batches of several tasks by weights, as a router gives them, which may scale the shared part."""
        return self.mixed_at(1.0 if self.router is None else self.router.shared_scale)

    def mixed_for(self, task_weights: Any) -> MixedForward:
        """:attr:`mixed` for weights; for None, that is for tasks which are named, all of the shared part whatever the router does."""
        return self.mixed_at(1.0) if task_weights is None else self.mixed

    def mixed_at(self, shared_scale: float) -> MixedForward:
        """:attr:`mixed` with the shared part scaled; made at first use, again if the model was moved or its tasks are others."""
        first = next(self.backbone.parameters())
        state = (tuple(self.tasks), first.device, first.dtype, self.serving)
        of, made = self._mixed
        if of != state or shared_scale not in made:
            self._make_mixed(shared_scale, state)
        return self._mixed[1][shared_scale]

    @torch.compiler.disable
    def _make_mixed(self, shared_scale: float, state: tuple) -> None:
        with self._weights.lock:
            self._weights.tie(self.backbone)
            of, made = self._mixed
            if of != state:
                made = {}
            limit = self.serving.memory_limit_gb
            held = next((forward.held for forward in made.values()), None)
            if held is None and limit is not None:
                held = Held(limit * 2**30)
            if shared_scale not in made:
                # tensors that are made in inference mode could not be used outside of it
                with torch.inference_mode(False):
                    made[shared_scale] = MixedForward(
                        self._weights,
                        self._banks(shared_scale, held),
                        self.tasks,
                        held=held,
                        settings=self._own_settings(),
                    )
            self._mixed = state, made

    def _own_settings(self) -> OwnSettings:
        told = [told_of(self.info, CONFIGURATION, task) for task in self.tasks]
        return OwnSettings(self.backbone, told, lambda: self._configured)

    def _banks(self, shared_scale: float, held: Held | None) -> dict[str, AnyBank]:
        """Every touched tensor under every task, as the backbone lays it out."""
        experts, banks = self.modulators.values(), {}
        for name in self.touched:
            owner, _, leaf = name.rpartition(".")
            banks[name] = bank_of(
                functools.partial(self.base_tensor, name),
                self.shared.get(name),
                [expert.deltas.get(name) for expert in experts],
                shared_scale=shared_scale,
                turned=is_turned(self.backbone.get_submodule(owner), leaf),
                serving=self.serving,
                held=held,
                name=name,
                tasks=self.tasks,
            )
        return banks

    def attach_router(
        self, router: Router | RouterName | None, **options: Any
    ) -> "DynamicModel":
        """Let a router find the task of every sample; None takes it off again.

        A task that is set by hand still comes first.

        Args:
            router: or its name, ``projection`` and ``representation`` need no data; others are to be fitted.
            options: of the router that is named.

        Raises:
            UnknownTaskError: if the router is for other tasks.
            SettingsError: for options of none, or of a router that was made already.
        """
        if isinstance(router, str):
            router = make_router(router, self.tasks, **options)
        elif options:
            raise SettingsError(
                f"{', '.join(options)}: of a router that is given by its name."
            )
        if router is not None:
            router.bind(self)
        self.unset_task()
        self.router = router
        return self

    @property
    def storage(self) -> StorageReport:
        """Bits per part, task and tensor, and the ratios ``x_excl`` and ``x_incl``."""
        return account(
            *self._stored,
            unit_bits=self.unit_bits,
            backbone_bits=self.backbone_bits,
            routing_bits=0 if self.router is None else self.router.bits,
        )

    @torch.no_grad()
    def materialize(self, task_name: str, *, as_base: Container[str] = ()) -> nn.Module:
        """A plain, independent model of one task, of the backbone's own class; with the names of classes and the settings of
        losses and of generation of the task's checkpoint, unless some tensor shall be the base model's.

        Args:
            as_base: names of tensors that are as in the base model.

        Raises:
            DiDiError: if a copy of the backbone would still run the backbone.
        """
        self._known(task_name)
        expert, plain = self.modulators[task_name], self._weights.copied()
        put(plain, self._configured)
        for name in self.touched:
            base = name in as_base
            value = self.base_tensor(name) if base else self.task_tensor(name, expert)
            self._weights.put(plain, name, value)
        self._weights.forget_derived(plain, self.touched)
        if not as_base:
            settle(plain, self.info, task_name)
        return plain

    @without_autocast()
    def task_tensor(self, name: str, expert: TaskExpert) -> Tensor:
        """``W_0 + change`` of one tensor under one expert, as ``Delta.applied`` gives it; a tensor of the task's own as it is."""
        base = self.base_tensor(name)
        last, below = last_of(expert.deltas.get(name), self.shared.get(name))
        return base if last is None else last.applied(base, below)

    def base_tensors(self) -> dict[str, Tensor]:
        """Base values of all touched tensors that some task is made of; tasks may each have their own instead.

        Raises:
            CheckpointMismatchError: if the backbone lacks one of the touched tensors.
        """
        experts = self.modulators.values()
        values = {name: self.base_tensor(name) for name in self.touched}
        return {
            name: value
            for name, value in values.items()
            if not all(isinstance(e.deltas.get(name), OwnDelta) for e in experts)
        }

    def base_tensor(self, name: str) -> Tensor:
        """The base model's value, whatever task is on."""
        return self._weights.base(name)

    def write(self, name: str, value: Tensor) -> None:
        """Overwrite a live tensor, keeping its base value; :meth:`set_task` does so with all that a task changes."""
        self._weights.write(name, value)

    def restore(self) -> None:
        """Write the base values back; no task is set then."""
        self._current_task, self._has_task = None, False
        self._as_base()
        self._weights.restore()

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        overwrite: bool = False,
        license: str = "unknown",
        datasets: Sequence[str] = (),
    ) -> None:
        """Write weights, configuration and model card; the directory appears whole or not at all.

        Args:
            license: for the card, an identifier of the hub: ``mit``, ``apache-2.0``, ...
            datasets: for the card, on which the fine-tuned models were trained, by their names on the hub.

        Raises:
            FileExistsError: if it exists and ``overwrite`` is false.
        """
        card = CardFacts(license=license, datasets=tuple(datasets))
        saving.save(self, save_directory, overwrite=overwrite, card=card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        license: str = "unknown",
        datasets: Sequence[str] = (),
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload merged model",
    ) -> str:
        """Upload the merged model, shared part and all experts; :meth:`from_pretrained` loads it by the same name.

        Args:
            repo_id: ``user/name``; made if there is none.
            base_model: repository of the base model, if the merge took it from elsewhere.
            license, datasets: as of :meth:`save_pretrained`.
            private, token, revision, commit_message: as of ``huggingface_hub``.

        Returns:
            where the commit is to be seen.
        """
        from .publishing import push  # only where it is asked for

        return push(
            self,
            repo_id,
            base_model=base_model,
            license=license,
            datasets=datasets,
            private=private,
            token=token,
            revision=revision,
            message=commit_message,
        )

    def described(self) -> dict[str, Any]:
        """Facts about the model, JSON-plain: everything of the saved configuration that needs no file."""
        return saving.described(self)

    def __repr__(self) -> str:
        return overview(self.described())

    def _repr_html_(self) -> str:
        return as_html(self.described())

    def write_config(
        self,
        directory: Path,
        parts: Mapping[str, Any],
        *,
        card: CardFacts = CardFacts(),
        taken: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Write what stands beside the weights, which :meth:`write_parts` wrote and returned ``parts`` of.

        Args:
            taken: checksums of the base model's tensors that were taken before.
        """
        saving.write_config(self, directory, parts, card=card, taken=taken)

    def write_parts(self, directory: Path) -> dict[str, Any]:
        """Write what is stored; returns what :meth:`from_parts` needs, JSON-plain, with ``tasks`` among it."""
        return write_deltas(directory, *self._stored)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        backbone: nn.Module | str | Path | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "DynamicModel":
        """Load what :meth:`save_pretrained` or :meth:`push_to_hub` wrote: the class that was saved, if it is one of this kind.

        Args:
            directory: or repository of the hub, ``"user/name"``.
            backbone: the base model, or its directory or repository; loaded from where the merge took it if None.
            revision, token: of the repository.

        Raises:
            CheckpointMismatchError: for damaged files, a model of another class, or another backbone than the one that was merged.
        """
        return saving.load(cls, directory, backbone, revision=revision, token=token)

    @classmethod
    def from_parts(
        cls,
        directory: Path,
        config: Mapping[str, Any],
        backbone: nn.Module,
        info: Mapping[str, Any],
    ) -> "DynamicModel":
        """The model from what :meth:`write_parts` wrote."""
        return cls(
            backbone,
            *read_deltas(directory, config),
            unit_bits=config["unit_bits"],
            backbone_bits=config["backbone_bits"],
            info=info,
        )

    def _known(self, task_name: str) -> None:
        if not isinstance(task_name, str) or task_name not in self.modulators:
            raise UnknownTaskError(
                f"Task {task_name!r} is not in the merged model, which holds {self.tasks}."
            )


class DiDiModel(DynamicModel):
    """The merged model of DiDi-Merging: low-rank shared part and experts under one budget."""


def _exporting() -> bool:
    """Whether torch.export traces this."""
    return _TELLS_EXPORT and torch.compiler.is_exporting()
