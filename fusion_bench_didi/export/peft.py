"""PEFT adapters, one per task: ``W_t = W + B A`` with the scale in B.

In every module ``lora_alpha`` is the rank, so that the scale is 1, and both patterns are written with full names: PEFT,
and readers of one rank and one alpha per adapter, then compute the same. What all tasks share is concatenated to every task's
factors, or folded into a base checkpoint that is written too.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.companions import (
    Companions,
    companions_at,
    companions_for,
    companions_of,
    copy_companions,
    copy_files,
    unlike,
)
from ..errors import DiDiError, some
from ..models.dynamic import DynamicModel
from ..models.task_settings import with_own_vocabulary
from ..pools.entries import BASE
from ..task_vectors.live_models import of_peft
from ..task_vectors.ties import tensor_of
from .adapters import Adapter
from .checks import (
    SAME,
    TIED,
    check_close,
    check_runs,
    example_inputs,
    outputs_differ,
)
from .common import (
    asked_tasks,
    base_model,
    export_directory,
    folder,
    source_of,
    weight_bytes,
    write_report,
)
from .modules import sites
from .plain import write_checkpoint
from .report import Carried, ExportReport
from .settings import EIGHT_BITS, AdapterSettings


def to_peft(
    model: DynamicModel,
    directory: str | Path,
    *,
    tasks: Sequence[str] | str | None = None,
    settings: AdapterSettings = AdapterSettings(),
    base: str | Path | None = None,
    inputs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write an adapter per task, ``directory/TASK``, and with ``shared=fold`` its base model, ``directory/_pretrained_``. A task whose
    own checkpoint has another tokenizer or processor than the base model has it beside its adapter.

    PEFT reads each adapter back; merged into the base model it gives the weights of ``materialize`` but for what the report
    says, and applied to it the outputs that the report compares.

    Args:
        tasks: all if None.
        base: repository or directory that the adapters name as their base; where the merge took it from if None.
        inputs: keyword arguments of the model to compare outputs with; made up where the model's configuration tells how.

    Raises:
        DiDiError: if the base model has layers of PEFT, nothing of a task is in a form that an adapter carries, or PEFT reads something
            else.
        UnknownTaskError: for tasks that the model does not hold.
        FileExistsError: if the directory exists and ``overwrite`` is false, or it is no export, or other weights lie in it.
    """
    asked, source = asked_tasks(model, tasks), source_of(model, base)
    _check_plain(model.backbone)
    before, of_base = base_model(model), companions_at(**source)
    parents, grown = model.info.get("parents", {}), with_own_vocabulary(model)
    fold = settings.shared == "fold"
    under = _folded(model) if fold else before
    taking = sites(before)
    tensors: dict[str, dict[str, Carried]] = {}
    differ: dict[str, float | None] = {}
    untried: dict[str, list[str]] = {}
    unfound: dict[str, list[str]] = {}
    sizes, notes, worst = {}, [], 0.0
    with export_directory(directory, overwrite=overwrite) as (place, final):
        if fold:
            write_checkpoint(under, place / BASE)
            note = copy_companions(place / BASE, of_base)
            notes += [note] if note else []
            sizes[BASE] = weight_bytes(place / BASE)
            source = {"place": str(final / BASE)}
        elif not source:
            notes.append("the adapters name no base model: it was in memory. Name its directory or repository (base).")  # fmt: skip
        for task in asked:
            home = place / folder(task)
            tensors[task] = Adapter(model, task, settings, under, taking).write(
                home, source
            )
            if task in grown:
                notes.append(f"{task} has a vocabulary of its own, which no adapter carries: its adapter alone is not its model; export it as a plain checkpoint.")  # fmt: skip
            elif why := _copy_own(home, of_base, companions_of(parents.get(task))):
                unfound.setdefault(why, []).append(task)
            sizes[task] = weight_bytes(home)
            wanted, found = model.materialize(task), applied(under, home)
            given = example_inputs(wanted, found) if inputs is None else inputs
            what = f"The adapter of {task}"
            differ[task], why = outputs_differ(found, wanted, under, given, what)
            if why:
                untried.setdefault(why, []).append(task)
            merged = found.merge_and_unload()
            check_close(merged, wanted, before, under, tensors[task], what)
            del wanted, found, merged  # before there is one in float32
            if differ[task] is not None:
                off = check_runs(applied(under, home).float(), given, what)
                worst = max(worst, off)
        for why, some in untried.items():
            notes.append(f"outputs of {', '.join(some)} were not compared, weights were: {why}.")  # fmt: skip
        for why, some in unfound.items():
            notes.append(f"{', '.join(some)}: no tokenizer or processor of its own was copied: {why}.")  # fmt: skip
        if worst > SAME:
            notes.append(
                f"merge_and_unload() of PEFT sets {TIED} to false, by which outputs of this model change, by {worst:.2g} of the largest and "
                f"more: set model.config.{TIED} = True after it, or use adapters unmerged."
            )
        if settings.factor_dtype == EIGHT_BITS:
            errors = [c.error for t in tensors.values() for c in t.values() if c.rank]
            notes.append(
                f"in 8 bits factors lose up to {max(errors, default=0.0):.1%} of a tensor's change; factor_dtype=bfloat16 takes twice the bytes "
                "and loses a sixteenth of that."
            )
        report = ExportReport("peft", str(final), tensors, sizes, differ, tuple(notes))
        return write_report(place, report)


def _check_plain(backbone: nn.Module) -> None:
    """PEFT puts adapters on models without layers of its own.

    Raises:
        DiDiError: if it has some.
    """
    if found := [n or "the model" for n, m in backbone.named_modules() if of_peft(m)]:
        raise DiDiError(
            f"The base model has layers of PEFT ({some(found)}), and no adapter is put on those. Export it as plain or patch, or merge "
            "plain models, which merge_and_unload() returns."
        )


def _copy_own(home: Path, of_base: Companions, own: Companions) -> str:
    """Put beside an adapter what the base model's tokenizer or processor does not do for it; why not, if it cannot be had."""
    found = companions_for(of_base, own)
    copy_files(home, unlike(found, of_base).files)
    return f"{found.place} {found.fault}" if found.fault else ""


def applied(base: nn.Module, adapter: Path) -> nn.Module:
    """A copy of a base model with an adapter on it, as PEFT reads it."""
    from peft import PeftModel

    with warnings.catch_warnings():
        # of its own: biases that are trained, tied weights, layers that are (in, out)
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(base), adapter).eval()


@torch.no_grad()
def _folded(model: DynamicModel) -> nn.Module:
    """The base model with what all tasks share added, in its own type."""
    folded = base_model(model)
    for name, shared in model.shared.items():
        tensor_of(folded, name).copy_(shared.applied(model.base_tensor(name)))
    return folded
