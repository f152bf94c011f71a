"""What the methods share: how a pool is opened, and how a dynamic model is connected to the host."""

import logging
import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from fusion_bench import BaseAlgorithm, auto_register_config
from fusion_bench.mixins import LightningFabricMixin, SimpleProfilerMixin
from fusion_bench.modelpool import BaseModelPool
from omegaconf import OmegaConf
from rich import get_console
from rich.progress import Progress as Bars
from torch import Tensor, nn

from ..checkpoint.deltas import versions
from ..checkpoint.directory import alone, check_target, common_directory
from ..checkpoint.journal import Journal, check_journal, left_if_worth, open_journal
from ..checkpoint.loaders import described, obstacle
from ..checkpoint.stream import DeltaWriter
from ..deltas.sink import EncodedTensor, Experts, InMemory, Shared, Sink
from ..deltas.storage import told
from ..distributed.ownership import Crew
from ..distributed.ranks import ALONE, Ranks, check_started, ranks_here
from ..errors import CheckpointMismatchError, SettingsError, some, spelled
from ..files import from_home
from ..lowrank.arithmetic import own_arithmetic
from ..lowrank.factored import as_dense
from ..merging.encoding import keep_own
from ..merging.finished import Finished
from ..models import DynamicModel
from ..models.pool_saving import attach_saving, check_saving, saved_at
from ..options import (
    Aliases,
    FilePath,
    Patterns,
    as_patterns,
    check_arguments,
    unknown_setting,
)
from ..pools.entries import origin_of
from ..pools.host_forms import as_pool
from ..pools.merged_adapters import adapted
from ..pools.opening import (
    backbone_reference,
    backbone_source,
    check_pool,
    load_backbone,
    open_pool,
)
from ..pools.task_names import check_aliases, check_tasks, pool_tasks
from ..pools.task_settings import task_settings
from ..report.units import readable
from ..task_vectors.loop import Progress, Result, each
from ..task_vectors.reader import TaskVectors
from ..task_vectors.scan import account_of, model_bits, scan
from ..task_vectors.tensor import ChangedTensor
from ..taskpool.task_switching import aliases_of, attach, check_switching
from .ending import attach_ending

log = logging.getLogger(__name__)

#: What becomes of a merge into output_dir that was cut off.
Resume = Literal["continue", "fresh"]
#: Settings that change nothing of what is stored.
RUNNING = "output_dir overwrite resume task_aliases dry_run factor_memory_gb".split()
#: Keys of earlier releases by what they are called now.
RENAMED = {"normalisation": "normalization"}
#: Keys of earlier releases that are gone, with the only value that still means what it did.
REMOVED = {"metric": "none", "probe_samples": None}


class Encoded(NamedTuple):
    """What a merge leaves in a sink, the bits of one fine-tuned model, and facts."""

    shared: Shared
    experts: Experts
    unit_bits: int
    facts: Mapping[str, Any]


class PoolMethod(LightningFabricMixin, SimpleProfilerMixin, BaseAlgorithm):
    """A method that reads a base model and its fine-tuned models.

    Settings are the keys of the method's YAML file, which ``didi settings METHOD`` prints; all take ``exclude`` (patterns of tensors
    left at the base model's value) and ``task_aliases``.

    Raises:
        SettingsError: for a key that the method does not have.
    """

    title: ClassVar[str]
    #: whether what is merged finds every sample's task by itself
    routes: bool = False
    #: whether it is a model with experts, which appears in a directory whole or not at all
    dynamic: ClassVar[bool] = True
    #: of the model that :meth:`merged` makes
    model_class: ClassVar[type[DynamicModel]] = DynamicModel
    exclude: Sequence[str] | None = None
    own: Sequence[str] | None = None
    task_aliases: Mapping[str, str] | None = None
    output_dir: str | None = None
    overwrite: bool = False
    resume: Resume = "continue"

    def __init__(self, **kwargs: Any):
        for old, new in RENAMED.items():
            if old in kwargs and hasattr(self, new):
                _deprecated(f"{old} is called {new} now.")
                setattr(self, new, kwargs.pop(old))
        for key, value in REMOVED.items():
            if key in kwargs and (value is None or kwargs[key] == value):
                _deprecated(f"{key} has no effect any more.")
                kwargs.pop(key)
        known = self._config_mapping.values()
        for key in kwargs:
            more = " All of them, explained: didi settings METHOD."
            raise unknown_setting(type(self).__name__, key, known, more=more)
        super().__init__()
        check_arguments(self)
        if self.overwrite and self.output_dir is None:
            raise SettingsError("overwrite is of output_dir, which is not set.")

    @property
    def processes(self) -> Ranks:
        """The processes that Fabric, or whoever started this one, made for the job."""
        self.fabric  # starts them
        return ranks_here()

    @property
    def taskpool(self) -> Any:
        """That of the program that runs this method; None where there is none."""
        return getattr(self._program, "taskpool", None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Other ranks are told if the block fails here."""
        ranks = self.processes
        try:
            yield
        except BaseException as error:
            ranks.fail(error)
            raise

    def checked(self, modelpool: Any) -> BaseModelPool:
        """The pool, after every check that needs no file.

        Raises:
            ModelPoolError: no base model, one that cannot be told of, fewer than two tasks, or names that mean the same task.
            UnknownTaskError: if the task pool has a task that no model covers, or an alias means none.
            DiDiError: if the task pool cannot tell a model its task, or what is saved cannot be written where it shall be.
            RankError: if the host was started in several processes that do not know of one another.
            FileExistsError: if something lies there.
        """
        attach_ending(self)
        # a script of one's own under torchrun may merge in one of its processes
        if self._program is not None:
            check_started(self.processes)
        if self.resume != "continue" and self._place() is None:
            raise SettingsError(
                "resume is of output_dir or merged_model_save_path, and neither is set."
            )
        modelpool = as_pool(modelpool)
        check_pool(modelpool)
        check_aliases(self.task_aliases, modelpool.model_names)
        if self.dynamic:
            backbone_source(modelpool)
        if self.processes.leads:
            if self.dynamic:
                check_saving(self._program, self.output_dir)
            if self.output_dir is not None:
                check_target(self.output_dir, overwrite=self.overwrite)
            if place := self._place():
                check_journal(place)
        if self.taskpool is not None:
            if not self.routes:
                check_switching(self.taskpool)
            aliases = aliases_of(self.taskpool, self.task_aliases)
            check_tasks(pool_tasks(self.taskpool), modelpool.model_names, aliases)
        return adapted(modelpool)

    def opened(self, modelpool: BaseModelPool) -> tuple[nn.Module, TaskVectors]:
        """The base model and the task vectors, tasks in :meth:`order`.

        Raises:
            CheckpointMismatchError: listing all faults of all checkpoints.
        """
        with self.profile("load backbone"):
            backbone = load_backbone(modelpool)
        vectors = open_pool(modelpool, backbone, **self.tensor_patterns())
        for name, other in vectors.misnamed.items():
            log.warning(
                "The base model's checkpoint has no %s, which every task then keeps as its own, but %r, which no %s loads. Give it the "
                "name of the other if it is meant to be that.",
                name,
                other,
                type(backbone).__name__,
            )
        return backbone, vectors.ordered(self.order(modelpool.model_names))

    def tensor_patterns(self) -> dict[str, tuple[str, ...]]:
        """The patterns of tensors among the settings."""
        keys = [k for k in ("exclude", "as_vectors", "own") if hasattr(self, k)]
        return {key: as_patterns(getattr(self, key)) for key in keys}

    def changed(self, task_vectors: TaskVectors) -> list[str]:
        """Names of the tensors that some task changed, for methods that keep nothing of a single task.

        Raises:
            CheckpointMismatchError: naming tensors that only their task could have: heads, statistics, what the base model
                lacks.
        """
        found = scan(task_vectors, self.fabric.device)
        if found.changed_own:
            raise CheckpointMismatchError(
                f"{self.title} makes what tasks share, and {some(found.changed_own)} are each task's own (heads, statistics of "
                "batches, tensors that the base model's checkpoint lacks). Leave them at the base model's value with "
                f"{spelled('exclude', '[...]')}, or choose a method that keeps them, didi for instance."
            )
        return found.changed

    def order(self, tasks: Iterable[str]) -> list[str]:
        """The order in which sums over tasks are taken; sorted, so that the pool's order changes no bit."""
        return sorted(tasks)

    def told_settings(self) -> dict[str, Any]:
        """Settings as they are saved with a model."""
        found = OmegaConf.to_container(self.config, resolve=True)
        return {key: value for key, value in found.items() if not key.startswith("_")}

    def facts(
        self, modelpool: BaseModelPool, backbone: nn.Module, task_vectors: TaskVectors
    ) -> dict[str, Any]:
        """Facts saved with every model: the method, its settings, where its models came from, what they say of their tasks, and what
        is left out of the base model's checkpoint.

        Raises:
            CheckpointMismatchError: for a file of settings that cannot be read; so they are taken before anything is merged.
        """
        reference = backbone_reference(modelpool, backbone)
        if reason := obstacle(reference["class"], described(reference["source"])):
            log.warning("Saved, the merged model will not load its base model by itself. %s", reason)  # fmt: skip
        unused = task_vectors.unused_of_base
        return {
            "method": self.title,
            "settings": self.told_settings(),
            "parents": {n: origin_of(modelpool, n) for n in modelpool.model_names},
            **task_settings(modelpool, backbone),
            "backbone": reference,
            **({"unused_of_base": unused} if unused else {}),
        }

    def track(self, names: Sequence[str], stage: str) -> Iterator[str]:
        """The names, with a progress bar."""
        with progress_bars(self.title) as progress:
            for done, name in enumerate(names):
                yield name
                progress(stage, done, len(names))

    def merged(self, modelpool: BaseModelPool) -> DynamicModel:
        """The model that :meth:`encoded` makes of a checked pool, in memory or in ``output_dir``."""
        backbone, task_vectors = self.opened(modelpool)
        facts = self.facts(modelpool, backbone, task_vectors)

        def make(sink: Sink, journal: Journal | None) -> DynamicModel:
            made = self.encoded(task_vectors, sink, journal)
            return self.model_class(
                backbone,
                made.shared,
                {name: made.experts[name] for name in modelpool.model_names},
                unit_bits=made.unit_bits,
                info={**facts, **made.facts},
            )

        return self._streamed(task_vectors, make)

    def encoded(
        self, task_vectors: TaskVectors, sink: Sink, journal: Journal | None
    ) -> Encoded:
        """Every tensor through the sink; of methods that make their model by :meth:`merged`.

        Args:
            task_vectors: checked, tasks in :meth:`order`.
            journal: keeps what is finished, if there is one.
        """
        raise NotImplementedError

    @own_arithmetic()
    def _streamed(
        self,
        task_vectors: TaskVectors,
        make: Callable[[Sink, Journal | None], DynamicModel],
    ) -> DynamicModel:
        """The model that ``make`` leaves in a sink: in memory, or in ``output_dir``, which appears whole or not at all.

        What is finished lies in a journal beside it, or beside where the program will save it, until the model lies there.
        """
        tasks, ranks = task_vectors.tasks, self.processes
        self._check_alike(task_vectors, ranks)
        place, *others = ranks.gather(self._place())
        if ignored := {str(one) for one in others if one not in (place, None)}:
            log.warning("All processes write to %s, the output of rank 0, and none to %s.", place, some(ignored))  # fmt: skip
        if place is None:
            return make(InMemory(tasks), None)
        with ExitStack() as stack:
            target: Path | None = None
            if self.output_dir is not None:
                made = common_directory(ranks, place, overwrite=self.overwrite)
                target = stack.enter_context(made)
            elif ranks.leads:
                stack.enter_context(alone(place))
            task_vectors.take_digests(ranks)
            journal = open_journal(
                place,
                self.identity(task_vectors) if ranks.leads else {},
                fresh=self.resume == "fresh",
                ranks=ranks,
            )
            if journal is None:
                return make(InMemory(tasks), None)
            stack.enter_context(left_if_worth(journal, ranks))
            writer = DeltaWriter(target, tasks, journal)
            model = make(writer, journal)
            if target is not None and ranks.leads:
                model.write_config(
                    target,
                    {**writer.manifest, "tasks": model.tasks},
                    taken=task_vectors.base.digests,
                )
        return model

    def _check_alike(self, task_vectors: TaskVectors, ranks: Ranks) -> None:
        """Every process was given the same: each works on a part, and what one stores, another's settings or inputs would not.

        Raises:
            SettingsError: naming what differs; on all of them.
        """
        if ranks.size == 1:
            return
        here = self._told_identity(), task_vectors.glimpses
        (settings, contents), *others = ranks.gather(here)
        for rank, (its_settings, its_contents) in enumerate(others, 1):
            differ = [
                f"{key.removeprefix('method.')} is {its_settings[key]} and {value}"
                for key, value in settings.items()
                if its_settings.get(key, value) != value
            ]
            differ += [
                f"the content of {name} is another"
                for name in {**contents, **its_contents}
                if contents.get(name) != its_contents.get(name)
            ]
            if differ:
                raise SettingsError(
                    f"Rank {rank} was given something else to merge than rank 0: {some(differ)}. Give all processes the same command, "
                    "and the same checkpoints where they lie on several machines."
                )

    def _place(self) -> Path | None:
        """Where the model will lie, written by this method or by the program."""
        path = self.output_dir
        if path is None and self.dynamic:
            path = saved_at(self._program)
        return path and Path(os.path.realpath(from_home(path)))

    def identity(self, task_vectors: TaskVectors) -> dict[str, str]:
        """Method, settings, inputs and versions, which a merge that was cut off must share with the one that goes on."""
        kernels = (
            f"{self.fabric.device.type}, {torch.backends.cpu.get_cpu_capability()}"
        )
        told = {**self._told_identity(), **task_vectors.identity}
        return {**told, "kernels": kernels}

    def _told_identity(self) -> dict[str, str]:
        """Method, settings and versions."""
        settings = {
            f"method.{key}": repr(value)
            for key, value in self.told_settings().items()
            if key not in RUNNING
        }
        known = {f"version of {name}": told for name, told in versions().items()}
        return {"method": type(self).__name__, **settings, **known}

    def connect(self, model: DynamicModel, modelpool: BaseModelPool) -> DynamicModel:
        """Make the program's task pool tell the model its task, and the model pool save it in its own form."""
        size = readable(model.storage.excl_bits)
        log.info("%s: %d tasks in %s", self.title, len(model.tasks), size)
        if empty := _without_anything(model):
            log.warning(
                "Nothing is stored for %s, so that they are the base model: give more budget, or let the method take more tensors.",
                ", ".join(empty),
            )
        if same := _equal_to_base(model):
            log.warning(
                "No tensor of %s differs from the base model. Was another checkpoint meant?",
                ", ".join(same),
            )
        if self.taskpool is not None:
            attach(self.taskpool, known=model.tasks, aliases=self.task_aliases)
        attach_saving(modelpool, self.processes)
        return model


@auto_register_config
class DynamicMethod(PoolMethod):
    """A method whose result is one backbone, a shared part and an expert per task, made tensor by tensor.

    Args:
        exclude: patterns of tensors left at the base model's value.
        own: patterns of tensors kept as each task has them.
        task_aliases: task pool name -> model name.
        output_dir: write the merged model there while it is made, never holding it; it stays mapped from there.
        overwrite: of ``output_dir``.
        resume: a merge that was cut off goes on (``continue``), or is forgotten (``fresh``).
    """

    def __init__(
        self,
        exclude: Patterns = (),
        own: Patterns = (),
        task_aliases: Aliases = None,
        output_dir: FilePath | None = None,
        overwrite: bool = False,
        resume: Resume = "continue",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)

    def prepare(
        self, task_vectors: TaskVectors, names: Sequence[str], progress: Progress
    ) -> None:
        """Prepare whatever needs more than one tensor, such as a threshold over a whole model.

        Args:
            task_vectors: checked, tasks in :meth:`order`.
            names: the tensors that some task changed.
        """

    @abstractmethod
    def encode(self, tensor: ChangedTensor) -> EncodedTensor | None:
        """Encode one tensor; None if nothing of it is stored. Called on several threads."""

    def run(self, modelpool: Any) -> DynamicModel:
        """Merge the pool."""
        with self.together():
            modelpool = self.checked(modelpool)
            model = self.merged(modelpool)
        return self.connect(model, modelpool)

    def read(self, task_vectors: TaskVectors, name: str, task: int) -> Tensor:
        """One task vector of one tensor, in its shape, float32.

        Args:
            task: its position.
        """
        matrix = task_vectors.tensor(name, self.fabric.device).matrix(task)
        return as_dense(matrix).view(task_vectors.infos[name].shape)

    def each(
        self,
        task_vectors: TaskVectors,
        stage: str,
        function: Callable[[str], Result],
        names: Sequence[str],
        **options: Any,
    ) -> Iterator[tuple[str, Result]]:
        """Names and results of the one loop over tensors, on this method's device and all ranks."""
        options |= {"device": self.fabric.device, "crew": self._crew}
        return each(task_vectors, stage, function, names, **options)

    def encoded(
        self, task_vectors: TaskVectors, sink: Sink, journal: Journal | None
    ) -> Encoded:
        self.tasks = task_vectors.tasks
        device, memory = self.fabric.device, journal and Finished(journal)
        self._crew = crew = Crew.of(self.processes, task_vectors.sizes, memory)
        with self.profile("scan"):
            found = scan(task_vectors, device, crew=crew)
        names = found.changed

        def encode(name: str) -> None:
            if sink.recall(name) is None:
                tensor = self.encode(task_vectors.tensor(name, device))
                if tensor is not None:
                    sink.put(tensor.cpu())

        bars = progress_bars(self.title, crew.ranks)
        with self.profile("compress"), bars as progress:
            self.prepare(task_vectors, names, progress)
            order = keep_own(task_vectors, found.changed_own, sink, crew)
            options = {"progress": progress, "kept": False}
            done = self.each(task_vectors, "encode", encode, names, **options)
            order += [name for name, _ in done]
            shared, experts = sink.close(order, crew.ranks)
        own_of = {task: told(deltas) for task, deltas in experts.items()}
        account = account_of(task_vectors, found, told(shared), own_of)
        bits = sum(model_bits(task_vectors, found).values())
        return Encoded(shared, experts, bits, {"tensors": account})


@contextmanager
def progress_bars(title: str, ranks: Ranks = ALONE) -> Iterator[Progress]:
    """A bar per stage, of rank 0; where nobody sees bars, a line in the log as it begins."""
    console = get_console()
    watched = console.is_terminal or console.is_jupyter
    with Bars(
        console=console, transient=True, disable=not (ranks.leads and watched)
    ) as bars:
        rows: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in rows:
                rows[stage] = bars.add_task(stage, total=total)
                if not watched:
                    count = "1 step" if total == 1 else f"{total} steps"
                    log.info("%s: %s, %s", title, stage, count)
            bars.update(rows[stage], completed=done + 1, total=total)

        yield progress


def _without_anything(model: DynamicModel) -> list[str]:
    """Tasks that differ from the base model in the checkpoints, and not in what is stored."""
    return [
        task
        for task, told in model.info.get("tensors", {}).items()
        if told["left as in the base model"]
        and not told["merged"]
        and not told["kept as the task has them"]
    ]


def _equal_to_base(model: DynamicModel) -> list[str]:
    """Tasks whose checkpoints are the base model, as far as nothing of them was left out."""
    differing = (
        *("merged", "kept as the task has them", "left as in the base model"),
        "excluded",
    )
    tensors = model.info.get("tensors", {}).items()
    return [task for task, told in tensors if not any(told[key] for key in differing)]


def _deprecated(what: str) -> None:
    warnings.warn(what, DeprecationWarning, stacklevel=4)
