"""The product of a sorted batch with one matrix per task: the arithmetic of a mixed forward.

One operator for ``torch.compile`` too: how many samples a task has is data to it, not shape, so that a compiled model is not
compiled again for every batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _product(
    x: Tensor,
    counts: Tensor,
    offset: Tensor | None,
    matrices: Sequence[Tensor],
    firsts: Sequence[Tensor],
    lasts: Sequence[Tensor],
) -> Tensor:
    n, m = firsts[0].shape[0], lasts[0].shape[1]
    rows, batch = x.reshape(-1, n), x.shape[0]
    per_sample = rows.shape[0] // batch
    sizes = [per_sample * count for count in counts.tolist()]
    if sum(sizes) != rows.shape[0]:
        raise IndexError(f"A task number is not in 0 ... {len(matrices) - 1}.")
    y = x.new_empty(rows.shape[0], m)
    if offset is not None:
        y.view(batch, per_sample, m).copy_(offset[:, None])
    keep = 0 if offset is None else 1
    tasks, lengths = _runs(matrices, sizes)
    for part, out, task in zip(rows.split(lengths), y.split(lengths), tasks):
        out.addmm_(part, matrices[task], beta=keep)
    ranks = [last.shape[0] for last in lasts]
    if any(ranks):
        parts = zip(rows.split(sizes), y.split(sizes), firsts, lasts, sizes, ranks)
        for part, out, first, last, size, rank in parts:
            if size and rank:
                out.addmm_(part @ first, last)
    return y.view(*x.shape[:-1], m)


def _runs(matrices: Sequence[Tensor], sizes: list[int]) -> tuple[list[int], list[int]]:
    """Where neighbours have one matrix: the first task of each run, and its rows; nothing that is made on use is made."""
    kept = getattr(matrices, "kept", matrices)
    tasks: list[int] = []
    lengths: list[int] = []
    for task, size in enumerate(sizes):
        if not size:
            continue
        if tasks and kept[task] is kept[tasks[-1]]:
            lengths[-1] += size
        else:
            tasks.append(task)
            lengths.append(size)
    return tasks, lengths


_operator = torch.library.custom_op(
    "fusion_bench_didi::product_by_task",
    _product,
    mutates_args=(),
    schema="(Tensor x, Tensor counts, Tensor? offset, Tensor[] matrices, Tensor[] firsts, Tensor[] lasts) -> Tensor",
)


@_operator.register_fake
def _(x, counts, offset, matrices, firsts, lasts):
    return x.new_empty(*x.shape[:-1], lasts[0].shape[1])


def product_by_task(
    x: Tensor,
    counts: Tensor,
    offset: Tensor | None,
    matrices: Sequence[Tensor],
    firsts: Sequence[Tensor],
    lasts: Sequence[Tensor],
) -> Tensor:
    """``x_t W_t + (x_t A_t) B_t + offset`` for the samples x_t of each task.

    Args:
        x: (B, ..., n), sorted by task.
        counts: samples per task, on the CPU.
        offset: (B, m), or (1, m) for all.
        matrices: ``W_t`` (n, m) per task; neighbours that are one tensor are multiplied in one product.
        firsts, lasts: ``A_t`` (n, r) and ``B_t`` (r, m) per task, r = 0 for none.

    Returns:
        (B, ..., m).

    Raises:
        IndexError: if the counts leave samples out.
    """
    if torch.compiler.is_compiling():
        return _operator(x, counts, offset, [*matrices], [*firsts], [*lasts])
    return _product(x, counts, offset, matrices, firsts, lasts)
