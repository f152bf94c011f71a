"""What a merge would do, from headers alone."""

from ..deltas.storage import dtype_bits
from ..report.units import readable
from ..task_vectors.reader import TaskVectors
from .inventory import Inventory, matrix_budget, take_inventory
from .settings import MergeSettings


def describe(
    task_vectors: TaskVectors, settings: MergeSettings, *, streamed: bool = False
) -> str:
    """A table of the matrices, what a rank costs in each, the ranks of an even split, and the cost of the run.

    Nothing but headers is read, so every tensor counts as changed.

    Args:
        streamed: whether tensors are written to a directory as they are made.

    Raises:
        BudgetError: if the budget cannot hold the vectors.
    """
    inventory = take_inventory(task_vectors, settings)
    left = matrix_budget(inventory, settings)
    modules = len(task_vectors.tasks) + (settings.shared != "none")
    numel = sum(map(inventory.numel, inventory.matrices))
    share = left / (modules * numel) if numel else 0.0
    sharing = "low-rank modules" + " and other vectors" * bool(inventory.flat)
    lines = [
        f"{len(task_vectors.tasks)} tasks: {', '.join(task_vectors.tasks)}",
        f"{len(inventory.matrices)} matrices, {len(inventory.vectors) + len(inventory.flat)} vectors, {len(inventory.own)} tensors "
        "of each task's own; "
        "one fine-tuned model is "
        f"{readable(inventory.unit_bits)}, the budget {settings.budget.ratio} leaves {readable(left)} for "
        f"{sharing} after {readable(inventory.vector_bits)} of vectors and {readable(inventory.own_bits)} of own tensors.",
        "",
        "bytes/rank: what one more rank of the shared part or of one task's expert takes in the matrix. even rank: what each of them "
        "would get",
        "if all matrices and tasks had equal shares of the budget; the merge itself shares it by what reduces the error most.",
        "",
        f"{'matrix':<60} {'shape':>14} {'bytes/rank':>11} {'even rank':>10}",
    ]
    for name in inventory.matrices:
        (m, n), rate = inventory.sides[name], inventory.rate(name)
        even = int(share * m * n / rate.per_rank)
        even = min(even, task_vectors.joint_rank(name))
        top = "dense" if rate.most is None else str(rate.cap)
        rank = top if even > rate.cap else str(even)
        cost = rate.per_rank // 8
        lines.append(f"{name:<60} {f'{m} x {n}':>14} {cost:>11} {rank:>10}")
    read = _read_gb(task_vectors, inventory)
    held = inventory.unit_bits if streamed else 2 * inventory.unit_bits + left
    peak = _peak_gb(task_vectors, inventory, settings, held)
    lines += [
        "",
        f"to read: {readable(8e9 * read)} per pass; predicted peak memory: {readable(8e9 * peak)}",
    ]
    return "\n".join(lines)


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
