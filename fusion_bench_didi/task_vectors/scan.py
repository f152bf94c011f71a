"""One read of every tensor: is it finite, is it changed, and how much energy has each task vector?"""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..distributed.ownership import SOLO, Crew
from ..errors import ModelPoolError, NonFiniteError, spelled
from ..lowrank.factors import energy_of
from ..lowrank.row_blocks import row_norms, squared_norms
from .loop import spread
from .parallel import workers_for
from .reader import TaskVectors
from .tensor import ChangedTensor

#: Squared norms that float32 can calculate with: above, sums of squares overflow; below, per entry, squares underflow, and
#: nothing that a task changes by is left of it in a sum with any weight but zero.
PER_ENTRY, LARGEST = 1e-34, 1e30

#: What else is to be found out while a tensor is in memory: called with it, its (T,) energies and (T, m) norms of rows, of which
#: there are none where some task changes it by an adapter's factors.
Observe = Callable[[ChangedTensor, Tensor, Tensor | None], Any]


@dataclass(frozen=True)
class Scan:
    """What one read of every tensor tells.

    Args:
        energy: per tensor, (T,) squared norms of the task vectors, float64.
        negligible: per tensor, (T,) whether a task's change is so small that it counts as none; only tensors that have such.
        own: per tensor that tasks keep as they have it, (T,) whether it differs from the base model's.
        observed: per tensor, what was asked beside that.
    """

    energy: Mapping[str, Tensor]
    negligible: Mapping[str, Tensor] = field(default_factory=dict)
    own: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    observed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changed(self) -> list[str]:
        """Names of mergeable tensors that at least one task changed."""
        return [name for name, e in self.energy.items() if bool((e > 0).any())]

    @property
    def changed_own(self) -> list[str]:
        """Names of tensors that some task keeps as it has them."""
        return [name for name, own in self.own.items() if any(own)]


def scan(
    task_vectors: TaskVectors,
    device: torch.device | str = "cpu",
    *,
    observe: Observe | None = None,
    crew: Crew = SOLO,
) -> Scan:
    """Read every tensor once, for energies and faults.

    Args:
        crew: who reads what; all get the same.

    Raises:
        NonFiniteError: naming every task and tensor with NaN or infinity.
        ModelPoolError: if no task differs from the base model.
    """

    def one(name: str) -> tuple[Tensor, Tensor, Any]:
        tensor = task_vectors.tensor(name, device)
        energy, norms = _energies(tensor)
        negligible = (energy > 0) & (energy < PER_ENTRY * tensor.numel)
        energy[negligible] = 0
        asked = observe is not None and _usable(energy)
        return energy, negligible, observe(tensor, energy, norms) if asked else None

    names, workers = list(task_vectors.infos), workers_for(device)
    found = dict(spread(crew, "scan", one, names, workers=workers))
    faults = [
        fault
        for name, (energy, _, _) in found.items()
        if not _usable(energy)
        for fault in _non_finite(task_vectors, name, energy)
    ]
    tasks, own = task_vectors.tasks, {}

    def kept(name: str) -> list[int | None]:
        """Entries that are not finite, by task; None where a task has the base model's value."""
        values = (task_vectors.own_value(name, task) for task in tasks)
        return [None if v is None else int((~v.isfinite()).sum()) for v in values]

    for name, bad in spread(crew, "scan", kept, task_vectors.own_infos, workers=1):
        own[name] = tuple(count is not None for count in bad)
        counts = zip(tasks, bad)
        faults += [f"{task}: {name} ({n} entries)" for task, n in counts if n]
    if faults:
        raise NonFiniteError(
            "Some checkpoints hold NaN, infinity or changes beyond what float32 can square:\n  "
            + "\n  ".join(faults)
            + f"\nFix or leave out these models; a single tensor can be left out with {spelled('exclude', '[...]')}."
        )
    result = Scan(
        {name: energy for name, (energy, _, _) in found.items()},
        {name: few for name, (_, few, _) in found.items() if bool(few.any())},
        own,
        {name: seen for name, (_, _, seen) in found.items() if seen is not None},
    )
    _check_something_changed(task_vectors, result)
    return result


def _check_something_changed(task_vectors: TaskVectors, found: Scan) -> None:
    """Some task must differ from the base model.

    Raises:
        ModelPoolError: if none does.
    """
    if found.changed or found.changed_own:
        return
    tasks = task_vectors.tasks
    nearly = ", but for less than any weight notices" if found.negligible else ""
    way_out = "Check that the pool does not load the base weights for every task"
    if any(map(task_vectors.excluded, tasks)):
        way_out = f"Give fewer patterns in {spelled('exclude')}, which leaves tensors out"  # fmt: skip
    raise ModelPoolError(
        f"All task vectors are zero: {', '.join(tasks)} equal the base model in every tensor that is merged{nearly}. {way_out}."
    )


def account_of(
    task_vectors: TaskVectors,
    scan: Scan,
    shared: Container[str],
    experts: Mapping[str, Container[str]],
) -> dict[str, dict[str, Any]]:
    """The account of every tensor of every checkpoint: by task, how many are merged and how many equal the base model's, and the
    names of all others with the reason.

    Args:
        shared: names of the tensors of which tasks share something.
        experts: by task, of which there is something of its own.
    """
    account = {}
    for t, task in enumerate(task_vectors.tasks):
        changed = [name for name, energy in scan.energy.items() if energy[t] > 0]
        few = [name for name, found in scan.negligible.items() if found[t]]
        left = [n for n in changed if n not in shared and n not in experts[task]]
        own = [name for name, kept in scan.own.items() if kept[t]]
        tensors, other = len(scan.energy) + len(scan.own), [*changed, *few, *own]
        account[task] = {
            "merged": len(changed) - len(left),
            "equal to the base model": tensors - len(other),
            "kept as the task has them": own,
            "left as in the base model": sorted(left + few),
            "excluded": task_vectors.excluded(task),
            "not taken from the checkpoint": dict(task_vectors.unused(task)),
        }
    return account


def _energies(tensor: ChangedTensor) -> tuple[Tensor, Tensor | None]:
    """(T,) squared norms, not finite where something that is read is not; no task vector is formed. And (T, m) of rows."""
    energies: dict[int, Tensor] = {}
    rows: list[Tensor] = []
    for task, rank in enumerate(tensor.ranks):
        if rank is not None:
            energies[task] = energy_of(tensor.factors(task).to(tensor.device))
    for tasks in tensor.together:
        others: Sequence[int] = [task for task in tasks if task not in energies]
        if others:
            terms = tensor.differences(others)
            norms = row_norms(terms)
            rows.append(norms.cpu())
            energies.update(zip(others, squared_norms(terms, norms)))
    found = torch.stack([energies[task] for task in range(len(tensor.ranks))]).cpu()
    if tensor.factored and bool(found.any()):
        # no difference was taken to the base model
        found += 0 * energy_of(tensor.base().to(tensor.device)).cpu()
    whole = all(rank is None for rank in tensor.ranks)
    return found, torch.cat(rows) if whole else None


def _usable(energy: Tensor) -> bool:
    """Whether a tensor's task vectors can be calculated with."""
    return bool((energy <= LARGEST).all())  # not of NaN either


def _non_finite(task_vectors: TaskVectors, name: str, energy: Tensor) -> list[str]:
    """Faults that make the energies of a tensor unusable, by task."""
    tensor, faults = task_vectors.tensor(name), []
    if not bool(tensor.base().float().isfinite().all()):
        return [f"the base model {task_vectors.base.label}: {name}"]
    for t, task in enumerate(task_vectors.tasks):
        factors = tensor.factors(t)
        where = "" if factors is None else " of lora_A and lora_B"
        read = (factors.up, factors.down) if factors else (tensor.tuned(t),)
        bad = sum(int((~part.float().isfinite()).sum()) for part in read)
        if bad:
            faults.append(f"{task}: {name} ({bad} entries{where})")
        elif not _usable(energy[t]):
            faults.append(
                f"{task}: {name} (a change of norm {math.sqrt(float(energy[t])):.1g})"
            )
    return faults


def model_bits(task_vectors: TaskVectors, scan: Scan) -> dict[str, int]:
    """Bits of every tensor that some task changed, of one fine-tuned model: the unit of the storage account.

    Of tensors that are of another size in every task, the average.
    """
    bits = {name: task_vectors.bits(name) for name in scan.changed}
    for name in scan.changed_own:
        found = [info.bits for info in task_vectors.own_by_task(name)]
        bits[name] = sum(found) // len(found)
    return bits
