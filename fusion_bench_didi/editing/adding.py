"""One more task for a finished merged model, from its checkpoint alone; what is there stays as it is.

The shared part is frozen. What it leaves of the new task vector, ``tau - S``, is the task vector of one model on the base model
with its shared part, and is merged as any: singular values against bits, forms, ranks and precisions in one budget. Where the
shared part is the bases of a Tucker form, cores in these compete with the task's own factors (``merging/forms/given_bases.py``).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fusion_bench.modelpool import BaseModelPool
from omegaconf import DictConfig
from torch import nn

from ..deltas.storage import told
from ..deltas.tucker import Bases, Core
from ..errors import CheckpointMismatchError, ModelPoolError, some
from ..files import as_text
from ..lowrank.arithmetic import own_arithmetic
from ..merging.given import Given
from ..merging.pipeline import merge
from ..merging.results import MergeResult
from ..merging.settings import Budget, MergeSettings
from ..models.dynamic import DynamicModel
from ..options import Patterns, as_patterns
from ..pools.entries import BASE, origin_of
from ..pools.opening import needed_apart, open_pool
from ..pools.task_names import normalized
from ..pools.task_settings import task_settings
from ..task_vectors.reader import TaskVectors
from ..task_vectors.scan import account_of, scan
from .facts import with_error, with_tasks
from .places import Edited, Place, edited_model, target_of
from .settings import of_one_task
from .sources import BesideShared, SharedBase
from .stored import Stored


def add_task(
    place: Place,
    checkpoint: str | Path | Mapping[str, Any] | nn.Module,
    name: str,
    *,
    budget: float,
    settings: MergeSettings | None = None,
    exclude: Patterns = (),
    as_vectors: Patterns = (),
    own: Patterns = (),
    backbone: nn.Module | str | Path | None = None,
    device: torch.device | str = "cpu",
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    drop_router: bool = False,
) -> Edited:
    """Fit one more expert beside the shared part as it is; other tasks' outputs stay as they are, to the bit.

    Args:
        place: a model, which is changed, or the directory of one, which is loaded.
        checkpoint: a fine-tuned model of the same base model: what a model pool may have as an entry.
        budget: what the expert may take, in the unit of the model's account.
        settings: precision and weights of errors; those of the merge if None. Nothing is shared anew, whatever they say.
        exclude, as_vectors, own: patterns of tensors, as of a merge.
        backbone: of a directory, or where that lies; loaded from where the merge took it if None.
        output_dir: where to write; the directory itself if None and ``overwrite`` is set.
        drop_router: take off a router, which does not know the task.

    Raises:
        ModelPoolError: for a name that is taken, or no name.
        BudgetError: if the budget cannot hold the tensors that are stored whole.
        CheckpointMismatchError, NonFiniteError: for a checkpoint that does not fit.
        FileExistsError, SettingsError, DiDiError: before anything is changed.
    """
    limit = Budget(budget)
    with target_of(place, output_dir, overwrite=overwrite) as target:
        model = place
        if not isinstance(place, nn.Module):
            model = DynamicModel.from_pretrained(place, backbone)
        stored = Stored.of(model)
        check_name(name, stored.tasks)
        model.unset_task()
        wanted = {"exclude": exclude, "as_vectors": as_vectors, "own": own}
        pool = pool_beside(model, checkpoint, name)
        vectors = open_checkpoint(pool, model, name, **wanted)
        own = task_settings(pool, model.backbone)
        settings = of_one_task(settings or stored.info, limit)

        def edit(stored: Stored) -> Stored:
            start = time.perf_counter()
            fit = fitted(stored, vectors, settings, device=device)
            added = joined(stored, name, fit, origin_of(pool, name), own)
            return added.edited(
                "add",
                task=name,
                budget=budget,
                added_bits=added.storage.excl_bits - stored.storage.excl_bits,
                relative_error=fit.relative_error,
                forms=dict(fit.result.report.forms),
                precision=dict(fit.result.report.precision),
                seconds=time.perf_counter() - start,
            )

        return edited_model(model, edit, target, drop_router)


@dataclass(frozen=True)
class Fit:
    """One task fitted to what is stored.

    Args:
        result: of the merge of what the shared part leaves.
        energy: squared norm of the task vector.
        relative_error: the part of it that is not reproduced.
        tensors: what became of every tensor of the checkpoint.
    """

    result: MergeResult
    energy: float
    relative_error: float
    tensors: Mapping[str, Any]


@own_arithmetic()
def fitted(
    stored: Stored,
    task_vectors: TaskVectors,
    settings: MergeSettings,
    *,
    device: torch.device | str = "cpu",
) -> Fit:
    """The expert of one more task, within the settings' budget.

    Args:
        task_vectors: of the one task.
    """
    (task,) = task_vectors.tasks
    whole = scan(task_vectors, device)
    shared = {n: d for n, d in stored.shared.items() if not isinstance(d, Bases)}
    bases = {n: d for n, d in stored.shared.items() if isinstance(d, Bases)}
    source = task_vectors.tuned[task]
    if source.partial:
        source = BesideShared(source, task_vectors.base, shared)
    beside = replace(
        task_vectors, base=SharedBase(task_vectors.base, shared), tuned={task: source}
    )
    products = ((name, delta.product()) for name, delta in shared.items())
    ranks = {name: found.rank for name, found in products if found is not None}
    given = Given(
        stored.unit_bits,
        whole.energy,
        bases=bases,
        ranks=ranks,
        enough=bool(stored.shared),
    )
    result = merge(beside, settings, device=device, given=given)
    report = result.report
    lost = sum(float(e.sum()) for e in report.errors.values())
    energy = sum(float(e.sum()) for e in whole.energy.values())
    kept = told(result.experts[task])
    tensors = account_of(task_vectors, whole, told(shared), {task: kept})
    return Fit(result, energy, lost / max(energy, 1e-300), tensors[task])


def joined(
    stored: Stored,
    name: str,
    fit: Fit,
    parent: str | None,
    own: Mapping[str, Mapping[str, Any]],
) -> Stored:
    """The stored model with one expert more.

    Args:
        own: settings of the task, by kind.
    """
    (expert,) = fit.result.experts.values()
    (ranks,) = fit.result.ranks.experts.values()
    for tensor, delta in expert.items():
        if isinstance(delta, Core):
            ranks = {**ranks, tensor: min(delta.core().shape)}
    facts = {"parents": {name: parent}, "tensors": {name: dict(fit.tensors)}, **own}
    known = {"relative_errors": fit.relative_error, "energies": fit.energy}
    facts |= {key: {name: value} for key, value in known.items() if key in stored.info}
    facts["ranks"] = {"experts": {name: dict(ranks)}}
    experts = {**stored.experts, name: expert}
    info = with_error(with_tasks(stored.info, facts), experts)
    return replace(stored, experts=experts, info=info, routing_bits=0)


def pool_beside(model: DynamicModel, checkpoint: Any, name: str) -> BaseModelPool:
    """The pool of a merged model's backbone and one checkpoint."""
    if isinstance(checkpoint, Mapping):
        checkpoint = DictConfig(dict(checkpoint))
    elif isinstance(checkpoint, (str, Path)):
        checkpoint = as_text(checkpoint)
    return BaseModelPool({BASE: model.backbone, name: checkpoint})


def open_checkpoint(
    pool: BaseModelPool, model: DynamicModel, name: str, **patterns: Patterns
) -> TaskVectors:
    """A checkpoint lined up with a merged model's backbone; headers are read, where it is a file.

    Args:
        pool: of both.

    Raises:
        ModelPoolError: if it cannot be found or loaded.
        CheckpointMismatchError: listing all faults, and where it needs tensors apart that the backbone ties.
    """
    if apart := needed_apart(pool, model.backbone, [name]):
        raise CheckpointMismatchError(
            f"{name}: {some(apart)} differ from the tensors that the backbone ties them to, and the tasks that are there use them "
            "tied. Merge all tasks anew, this one among them."
        )
    chosen = {key: as_patterns(value) for key, value in patterns.items()}
    vectors = open_pool(pool, model.backbone, **chosen)
    fresh = frozenset(model.info.get("backbone", {}).get("fresh") or ())
    return replace(vectors, fresh=fresh) if fresh else vectors


def check_name(name: str, tasks: list[str]) -> None:
    """A new task's name must be a name, and no other task's.

    Raises:
        ModelPoolError: if it is not.
    """
    if not isinstance(name, str) or not name.strip() or name.startswith("_"):
        raise ModelPoolError(
            f"{name!r} is no name for a task, expected text that does not begin with an underscore."
        )
    if twin := [task for task in tasks if normalized(task) == normalized(name)]:
        raise ModelPoolError(
            f"The merged model has a task {twin[0]!r} already, which {name!r} would mean too. Choose another name, or remove that."
        )
