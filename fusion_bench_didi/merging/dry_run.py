"""What a merge would do, from headers alone."""

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
    read = _read_gb(task_vectors, inventory)
    held = inventory.unit_bits if streamed else 2 * inventory.unit_bits + left
    peak = _peak_gb(task_vectors, inventory, settings, held)
    return "\n".join(
        [
            *_facts(task_vectors.tasks, inventory, settings, left),
            "",
            *_table(task_vectors, inventory, settings, left),
            "",
            f"to read: {readable(8e9 * read)} per pass; predicted peak memory: {readable(8e9 * peak)}",
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
    return [
        f"{len(tasks)} tasks: {', '.join(tasks)}",
        counts,
        f"one fine-tuned model is {readable(inventory.unit_bits)}; budget {settings.budget.ratio:g} is at most {readable(whole)} beyond "
        f"the backbone and leaves {readable(left)} for {sharing}{after}",
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
    kinds: dict[tuple[str, ...], int] = {}
    for name in inventory.matrices:
        (m, n), rate = inventory.sides[name], inventory.rate(name)
        even = int(share * m * n / rate.per_rank)
        even = min(even, task_vectors.joint_rank(name))
        top = "dense" if rate.most is None else str(rate.cap)
        rank = top if even > rate.cap else str(even)
        kind = (of_all_layers(name), f"{m} x {n}", str(rate.per_rank // 8), rank)
        kinds[kind] = kinds.get(kind, 0) + 1
    heads = ("matrix", "how many", "shape", "bytes/rank", "even rank")
    rows = [heads, *((name, str(k), *rest) for (name, *rest), k in kinds.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows
    ] + [
        "bytes/rank: of one more rank of the shared part or of one task's expert. even rank: what each of them would get if all had "
        "equal shares of",
        "the budget (dense: the matrix whole); the merge itself shares it by what reduces the error most.",
    ]


def _read_gb(task_vectors: TaskVectors, inventory: Inventory) -> float:
    """All fine-tuned tensors, and the base model's where it is subtracted from them; an adapter's factors."""
    bits = 0
    for name in (*inventory.competing, *inventory.vectors):
        ranks, info = task_vectors.ranks(name), task_vectors.infos[name]
        sides = sum(inventory.sides[name])
        whole = ranks.count(None)
        numbers = (whole + (whole > 0)) * info.numel + sides * sum(
            r or 0 for r in ranks
        )
        bits += numbers * dtype_bits(task_vectors.tuned_dtype(name))
    return bits / 8e9


def _peak_gb(task_vectors, inventory, settings, held) -> float:
    """What is held (the backbone; live, pristine and with its modules where nothing is written), kept factors up to their
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
    kept = min(kept, settings.factor_memory_gb * 2**30)
    return (held / 8 + kept + working) / 1e9
