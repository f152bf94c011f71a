"""What is to be merged: tensors by class, their sizes, and what each costs in the precisions allowed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..allocation.spectra import Rate
from ..deltas.precision import Precision, precisions, vector_dtype, vector_precisions
from ..deltas.storage import dtype_bits
from ..errors import BudgetError
from ..lowrank.factors import full_rank
from ..task_vectors.reader import TaskVectors
from ..task_vectors.scan import Scan, model_bits
from ..task_vectors.sources import TensorInfo
from ..task_vectors.tensor import merged_sides
from .given import Given
from .settings import MergeSettings


@dataclass(frozen=True)
class Inventory:
    """The tensors of one merge.

    Args:
        matrices, vectors, own: changed tensors by class, sorted; own ones are kept as each task has them.
        flat: vectors of no fixed precision, which compete with the matrices for bits; not among ``vectors``.
        sides: (m, n) of each tensor viewed as a matrix.
        unit_bits: one fine-tuned model.
        vector_bits, own_bits: what vectors and own tensors will cost.
        precisions: allowed for each tensor that competes, cheapest first.
        vector_dtypes: of each vector.
        max_rank: of shared part and expert together, of matrices of larger full rank; no limit if None.
        taken: of it, by a shared part that stands already.
    """

    matrices: tuple[str, ...]
    vectors: tuple[str, ...]
    flat: tuple[str, ...]
    own: tuple[str, ...]
    sides: Mapping[str, tuple[int, int]]
    unit_bits: int
    vector_bits: int
    own_bits: int
    precisions: Mapping[str, tuple[Precision, ...]]
    vector_dtypes: Mapping[str, torch.dtype]
    max_rank: int | None = None
    taken: Mapping[str, int] = field(default_factory=dict)

    @property
    def fixed_bits(self) -> int:
        """What does not compete."""
        return self.vector_bits + self.own_bits

    @property
    def competing(self) -> tuple[str, ...]:
        """Tensors among which the budget is divided, sorted."""
        return tuple(sorted((*self.matrices, *self.flat)))

    @property
    def mostly_flat(self) -> bool:
        """Whether most entries that compete are those of vectors, as where biases alone are trained."""
        return sum(map(self.numel, self.flat)) > sum(map(self.numel, self.matrices))

    def cheapest(self, name: str) -> Precision:
        """The cheapest precision of a tensor."""
        return self.precisions[name][0]

    def rate(self, name: str) -> Rate:
        """Bits per rank and dense of a module in its cheapest precision."""
        return self.rate_in(self.cheapest(name), name)

    def rate_in(self, precision: Precision, name: str, *, shared_rank: int = 0) -> Rate:
        """Bits per rank and dense of a module in a precision, beside a shared part of a rank."""
        most = self.most(name)
        left = None if most is None else max(most - shared_rank, 0)
        return precision.rate(*self.sides[name]).limited(left)

    def most(self, name: str) -> int | None:
        """The largest rank that a task's change of a matrix may have; None where any may."""
        free = self.max_rank is None or full_rank(*self.sides[name]) <= self.max_rank
        return None if free else max(self.max_rank - self.taken.get(name, 0), 0)

    def numel(self, name: str) -> int:
        m, n = self.sides[name]
        return m * n


def take_inventory(
    task_vectors: TaskVectors,
    settings: MergeSettings,
    scan: Scan | None = None,
    *,
    given: Given | None = None,
) -> Inventory:
    """Sort the tensors into classes and price them; without a scan every tensor counts as changed.

    Args:
        given: the finished model that is added to, whose account stands already.
    """
    infos = task_vectors.infos
    names = scan.changed if scan else list(infos)
    matrices = [n for n in names if task_vectors.is_matrix(n)]
    vectors = [n for n in names if not task_vectors.is_matrix(n)]
    chosen = settings.factor_dtype == "auto" and settings.vectors == "expert"
    flat = [n for n in vectors if chosen and min(merged_sides(infos[n].shape)) < 2]
    vectors = [n for n in vectors if n not in flat]
    types = {n: task_vectors.tuned_dtype(n) for n in names}
    sizes = {n: infos[n].numel for n in names}

    def copies(name: str) -> int:
        if settings.vectors == "expert":
            tasks = len(task_vectors.tasks)
            return int((scan.energy[name] > 0).sum()) if scan else tasks
        return int(settings.vectors == "shared")

    def all_vectors(dtypes: Mapping[str, torch.dtype]) -> int:
        """Bits of them in types."""
        return sum(sizes[n] * dtype_bits(dtypes[n]) * copies(n) for n in vectors)

    kept = scan.own if scan else dict.fromkeys(task_vectors.own_infos, ())
    own = {n: task_vectors.own_by_task(n) for n in kept}
    if given is not None:
        unit_bits = given.unit_bits
    elif scan:
        unit_bits = sum(model_bits(task_vectors, scan).values())
    else:
        unit_bits = sum(map(task_vectors.bits, names))
        unit_bits += sum(info[0].bits for info in own.values())
    share = all_vectors(types) / max(settings.budget.bits(unit_bits), 1)
    stored = {
        n: vector_dtype(settings.factor_dtype, types[n], share=share) for n in vectors
    }
    return Inventory(
        matrices=tuple(matrices),
        vectors=tuple(vectors),
        flat=tuple(flat),
        own=tuple(scan.changed_own if scan else kept),
        sides={n: merged_sides(infos[n].shape) for n in names},
        unit_bits=unit_bits,
        vector_bits=all_vectors(stored),
        own_bits=sum(_own_bits(own[n], which) for n, which in kept.items()),
        precisions={
            **{n: precisions(settings.factor_dtype, types[n]) for n in matrices},
            **{n: vector_precisions(types[n]) for n in flat},
        },
        vector_dtypes=stored,
        max_rank=settings.max_rank,
        taken={} if given is None else given.ranks,
    )


def _own_bits(infos: Sequence[TensorInfo], changed: Sequence[bool]) -> int:
    """Bits of tensors that tasks keep as their own; of all tasks where it is not known yet which do."""
    if len(changed) != len(infos):
        return sum(info.bits for info in infos)
    return sum(info.bits for info, one in zip(infos, changed) if one)


def matrix_budget(inventory: Inventory, settings: MergeSettings) -> int:
    """Bits of the budget that are left for matrices.

    Raises:
        BudgetError: with the smallest budget that holds the vectors and what tasks keep for themselves.
    """
    left = settings.budget.bits(inventory.unit_bits) - inventory.fixed_bits
    if left < 0:
        smallest = named_budget(inventory.fixed_bits, inventory, settings)
        what = "the vectors (biases, norms, ...)"
        if inventory.own_bits:
            what += f" and the tasks' own tensors ({', '.join(inventory.own[:3])} ...)"
        raise BudgetError(
            f"budget={settings.budget.ratio} is too small: {what} alone take {smallest}. Give at least that, or store "
            f"fewer: {', '.join(_ways_to_store_less(settings))}."
        )
    return left


def named_budget(bits: int, inventory: Inventory, settings: MergeSettings) -> str:
    """The budget that holds so many bits, as it would be given; rounded up, so that the value printed is enough."""
    ratio, digits = settings.budget.named(bits / inventory.unit_bits), 6
    while True:
        printed = f"{math.ceil(ratio * 10**digits) / 10**digits:.{digits}f}"
        budget = replace(settings.budget, ratio=float(printed))
        if budget.bits(inventory.unit_bits) >= bits:
            return printed
        digits += 1


def _ways_to_store_less(settings: MergeSettings) -> Iterator[str]:
    """Settings that are not set and take less of the budget before matrices get any."""
    if settings.vectors == "expert" and settings.factor_dtype != "auto":
        yield "factor_dtype=auto (vectors of as many bits as pay)"
        yield "vectors=shared"
    if settings.vectors == "shared" and settings.factor_dtype == "auto":
        yield "vectors=expert (of as many bits as pay)"
    if settings.vectors != "pretrained":
        yield "vectors=pretrained"
    yield "fewer patterns in as_vectors or own"
