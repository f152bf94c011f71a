"""What a merge would do, from headers alone."""

import math
from collections import Counter
from collections.abc import Sequence

from ..deltas.storage import dtype_bits
from ..report.units import readable
from ..task_vectors.alignment import of_all_layers
from ..task_vectors.reader import TaskVectors
from .inventory import Inventory, matrix_budget, take_inventory
from .settings import MergeSettings


def describe(
    task_vectors: TaskVectors, settings: MergeSettings, *, streamed: bool = False
) -> str:
    """A table of the matrices, what a rank costs in each, the ranks of an even split, and the cost of the run.

    Nothing but headers is read, so every tensor counts as changed: the budget is an upper bound, what it leaves for matrices a lower one.

    Args:
        streamed: whether tensors are written to a directory as they are made.

    Raises:
        BudgetError: if the budget cannot hold the vectors.
    """
    inventory = take_inventory(task_vectors, settings)
    left = matrix_budget(inventory, settings)
    read = readable(_read_bits(task_vectors, inventory))
    modules = len(task_vectors.tasks) + (settings.shared != "none")
    most = min(left, modules * inventory.unit_bits)  # every module whole
    held = inventory.unit_bits if streamed else 2 * inventory.unit_bits + most
    peak = readable(held + _working_bits(task_vectors, inventory, settings))
    return "\n".join(
        [
            *_facts(task_vectors.tasks, inventory, settings, left),
            "",
            *_table(task_vectors, inventory, settings, left),
            "",
            f"to read: {read} per pass; predicted peak memory: {peak}",
        ]
    )


def _facts(
    tasks: Sequence[str], inventory: Inventory, settings: MergeSettings, left: int
) -> list[str]:
    vectors = len(inventory.vectors) + len(inventory.flat)
    counts = f"{len(inventory.matrices)} matrices, {vectors} vectors"
    if inventory.own:
        counts += f", {len(inventory.own)} tensors of each task's own"
    whole = settings.budget.bits(inventory.unit_bits)
    sharing = "matrices" + " and vectors" * bool(inventory.flat)
    fixed = {"vectors": inventory.vector_bits, "own tensors": inventory.own_bits}
    taken = [f"{readable(bits)} of {what}" for what, bits in fixed.items() if bits]
    after = f" after {' and '.join(taken)}" if taken else ""
    limit = (
        "without a limit"
        if settings.budget.ratio == math.inf
        else f"is at most {readable(whole)} beyond the backbone and leaves {readable(left)} for {sharing}"
    )
    return [
        f"{len(tasks)} tasks: {', '.join(tasks)}",
        counts,
        f"one fine-tuned model is {readable(inventory.unit_bits)}; budget {settings.budget.ratio:g} {limit}{after}",
        "Headers do not tell what changed, so every tensor counts: the merge never takes more than the budget says here, and what "
        "does not change leaves more for the matrices.",
    ]


def _table(
    task_vectors: TaskVectors, inventory: Inventory, settings: MergeSettings, left: int
) -> list[str]:
    """A line per kind of matrix: of layers that are alike all are told in one."""
    modules = len(task_vectors.tasks) + (settings.shared != "none")
    numel = sum(map(inventory.numel, inventory.matrices))
    share = left / (modules * numel) if numel else 0.0
    kinds: Counter[tuple[str, ...]] = Counter()
    for name in inventory.matrices:
        (m, n), rate = inventory.sides[name], inventory.rate(name)
        even = int(share * m * n / rate.per_rank)
        even = min(even, task_vectors.joint_rank(name))
        top = "dense" if rate.most is None else str(rate.cap)
        rank = top if even > rate.cap else str(even)
        kinds[of_all_layers(name), f"{m} x {n}", str(rate.per_rank // 8), rank] += 1
    heads = ("matrix", "how many", "shape", "bytes/rank", "even rank")
    rows = [heads, *((name, str(k), *rest) for (name, *rest), k in kinds.items())]
    first, *others = (max(map(len, column)) for column in zip(*rows))
    return [
        *(
            "  ".join([name.ljust(first), *map(str.rjust, rest, others)])
            for name, *rest in rows
        ),
        "bytes/rank: of one more rank of the shared part or of one task's expert. even rank: what each of them would get if all had "
        "equal shares of",
        "the budget (dense: the matrix whole); the merge itself shares it by what reduces the error most.",
    ]


def _read_bits(task_vectors: TaskVectors, inventory: Inventory) -> int:
    """All fine-tuned tensors, and the base model's where it is subtracted from them; an adapter's factors."""
    bits = 0
    for name in (*inventory.competing, *inventory.vectors):
        ranks, info = task_vectors.ranks(name), task_vectors.infos[name]
        whole = ranks.count(None)
        numbers = (whole + (whole > 0)) * info.numel
        numbers += sum(inventory.sides[name]) * sum(filter(None, ranks))
        bits += numbers * dtype_bits(task_vectors.tuned_dtype(name))
    return bits


def _working_bits(
    task_vectors: TaskVectors, inventory: Inventory, settings: MergeSettings
) -> float:
    """Beside what is held (the backbone; live, pristine and with its modules where nothing is written): kept factors up to their
    limit, one matrix of all models."""
    tasks = len(task_vectors.tasks)
    working = kept = 0
    for name in inventory.matrices:
        m, n = inventory.sides[name]
        rank = task_vectors.joint_rank(name)
        # float32 task vectors, residuals, and the float64 work space of one decomposition
        numbers = rank * (m + n) if task_vectors.factored(name) else m * n
        working = max(working, 4 * numbers * (2 * tasks + 6))
        kept += 4 * (tasks + 1) * rank // 2 * (m + n)
    return 8 * (min(kept, settings.factor_memory_gb * 2**30) + working)
