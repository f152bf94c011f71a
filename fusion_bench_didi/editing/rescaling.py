"""A merged model at a smaller budget, from what it stores: no checkpoint is needed.

What is stored is decoded into task vectors, one matrix at a time and as factors where it is stored as such, and these are merged
at the smaller budget. Two roundings follow one another, so that the error is at most

    ``||tau - D'|| <= ||tau - D|| + ||D - D'||``,

where D is what was stored of a task vector tau, and D' what is stored of D; where the two errors are orthogonal, their squares
add up.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..deltas.plain import OwnDelta
from ..errors import BudgetError
from ..lowrank.arithmetic import own_arithmetic
from ..merging.given import Given
from ..merging.pipeline import merge
from ..merging.results import MergeResult
from ..merging.settings import Budget, MergeSettings
from ..task_vectors.reader import TaskVectors
from ..task_vectors.sources import TensorInfo
from .places import Edited, Place, in_place
from .settings import merged_with
from .sources import DecodedExpert, Zeros
from .stored import Stored

#: Parts of a task vector's energy below which what was kept of it does not tell how large it was.
_TOLD = 0.05
#: Part of the bits that may stay unused, and how often it is merged at most to use more of them.
SPARE, TRIES = 0.03, 5


def rescale(
    place: Place,
    *,
    budget: float,
    settings: MergeSettings | None = None,
    device: torch.device | str = "cpu",
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    drop_router: bool = False,
) -> Edited:
    """Store the tasks of a merged model anew within a smaller budget; a router that does not look at the experts stays.

    Args:
        place: a model, which is changed, or the directory of one, of which the deltas alone are read.
        budget: for all of it, in the unit of the model's account.
        settings: of the merge; those that the model was merged with if None.
        output_dir: where to write; the directory itself if None and ``overwrite`` is set.
        drop_router: take off a router: one by projections or representations is for the experts as they were.

    Raises:
        BudgetError: if the model is as small already, or tensors that are kept whole take more.
        FileExistsError, SettingsError, CheckpointMismatchError, DiDiError: before anything is changed.
    """
    limit = Budget(budget)

    def edit(stored: Stored) -> Stored:
        if drop_router:
            stored = replace(stored, routing_bits=0)
        return rescaled(stored, limit, settings, device=device)

    return in_place(
        place,
        edit,
        output_dir=output_dir,
        overwrite=overwrite,
        drop_router=drop_router,
        keeps_tasks=True,
    )


@own_arithmetic()
def rescaled(
    stored: Stored,
    budget: Budget,
    settings: MergeSettings | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Stored:
    """The stored model within a smaller budget."""
    start = time.perf_counter()
    total, before = budget.bits(stored.unit_bits), stored.storage
    if total >= before.excl_bits:
        raise BudgetError(
            f"budget={budget.ratio} is no smaller than what the model takes, {before.x_excl:.6g}. Give less; more can only come of the "
            "checkpoints."
        )
    own = {
        task: {n: d for n, d in deltas.items() if isinstance(d, OwnDelta)}
        for task, deltas in stored.experts.items()
    }
    kept = sum(d.bits for deltas in own.values() for d in deltas.values())
    whole = kept + stored.routing_bits
    left = total - whole
    if left < 0 or whole and not left:
        raise BudgetError(
            f"budget={budget.ratio} is too small: tensors that tasks keep as they are, and the router, alone take "
            f"{whole / stored.unit_bits:.6f}. Give more than that."
        )
    limit = Budget(left / stored.unit_bits) if left else budget
    if settings is None:
        settings = merged_with(stored.info, limit)
    settings = replace(settings, budget=limit)
    given = Given(stored.unit_bits, kept=_parts(stored), enough=kept > 0)
    result = _fullest(decoded(stored), left, settings, given, device)
    experts = {task: {**result.experts[task], **own[task]} for task in stored.tasks}
    after = replace(stored, shared=result.shared, experts=experts).useful()
    after = replace(after, info=_told_anew(stored.info, result, budget, settings))
    return after.edited(
        "rescale",
        budget=budget.ratio,
        before=before.x_excl,
        relative_error=result.report.relative_error,
        seconds=time.perf_counter() - start,
    )


def _fullest(
    task_vectors: TaskVectors,
    bits: int,
    settings: MergeSettings,
    given: Given,
    device: torch.device | str,
) -> MergeResult:
    """The merge that loses least of those that take no more than so many bits.

    What was coded consists of few values, so that codes take far less at a step than at one a little finer, and a merge within
    the budget may leave much of it unused: it is then made at larger ones.

    Args:
        settings: with the budget of so many bits.
    """
    fits: list[MergeResult] = []
    fitting, over, ratio = settings.budget.ratio, None, settings.budget.ratio
    for _ in range(TRIES):
        one = merge(
            task_vectors,
            replace(settings, budget=Budget(ratio)),
            device=device,
            given=given,
        )
        taken = one.storage.excl_bits
        if fits and taken > bits:
            over = ratio
        else:
            fits.append(one)
            fitting = ratio
            if taken >= (1 - SPARE) * bits or settings.factor_dtype != "auto":
                break
        if over is None:
            ratio = fitting * min(bits / max(taken, 1), 2.0)
        else:
            ratio = (fitting + over) / 2
    return min(fits, key=lambda one: one.report.relative_error)


def decoded(stored: Stored) -> TaskVectors:
    """Stored deltas as task vectors on a base model of zeros; tensors of a task's own are left out."""
    experts = {
        task: {n: d for n, d in expert.items() if not isinstance(d, OwnDelta)}
        for task, expert in stored.experts.items()
    }
    infos = {
        name: TensorInfo(delta.shape, stored.dtype)
        for deltas in (stored.shared, *experts.values())
        for name, delta in deltas.items()
    }
    tuned = {t: DecodedExpert(t, e, stored.shared, infos) for t, e in experts.items()}
    return TaskVectors(Zeros(infos), tuned)


def _parts(stored: Stored) -> dict[str, Tensor]:
    """(T,) what part of the energy of the task vectors that were merged is stored, as far as is known.

    Errors are weighed by the size of whole task vectors, as they were.
    """
    found = {}
    for name in stored.info.get("energy_kept", {}):
        kept = [_kept(stored.info, name, task) for task in sorted(stored.tasks)]
        found[name] = torch.tensor([k if k > _TOLD else 1.0 for k in kept]).double()
    return found


def _kept(info: Mapping[str, Any], name: str, task: str) -> float:
    """The part of a task vector's energy that is stored of a tensor; 1 where it is not known."""
    order, kept = info.get("energy_tasks", []), info.get("energy_kept", {})
    known = name in kept and task in order
    return kept[name][order.index(task)] if known else 1.0


def _at_most(first: float, again: float) -> float:
    """The relative error of two steps, the second of which is relative to what the first left."""
    most = math.sqrt(first) + math.sqrt(again) * (1 + math.sqrt(first))
    return most**2


def _told_anew(
    info: Mapping[str, Any],
    result: MergeResult,
    budget: Budget,
    settings: MergeSettings,
) -> dict[str, Any]:
    """Facts of the model: those of what is stored now, with the errors of both steps where they are against checkpoints."""
    found, facts = dict(info), result.facts()
    first, again = info.get("relative_error"), facts.pop("relative_error")
    tensors, errors = facts.pop("tensors"), facts.pop("relative_errors")
    del facts["energies"]  # of what was stored
    facts["energy_kept"] = {
        name: [
            part * _kept(info, name, task)
            for part, task in zip(parts, facts["energy_tasks"])
        ]
        for name, parts in facts["energy_kept"].items()
    }
    found |= {**facts, "budget": budget.ratio, "settings": asdict(settings)}
    if first is not None:
        found["relative_error"] = _at_most(first, again)
    known = info.get("relative_errors", {})
    found["relative_errors"] = {
        task: _at_most(known[task], error)
        for task, error in errors.items()
        if task in known
    }
    found["tensors"] = {
        task: {
            **info.get("tensors", {}).get(task, {}),
            "merged": told["merged"],
            "left as in the base model": told["left as in the base model"],
        }
        for task, told in tensors.items()
    }
    return found
