"""The product of a sorted batch with one matrix per task: the arithmetic of a mixed forward.

One operator for ``torch.compile`` too: how many samples a task has is data to it, not shape, so that a compiled model is not
compiled again for every batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .banks import MatrixBank

#: Rows up to which, in 16 bits, the factors of all tasks are multiplied at once: so few are bound by calls and by what is read.
FEW = 32


def _product(
    x: Tensor,
    tasks: Tensor,
    counts: Tensor,
    biases: Tensor | None,
    matrices: Sequence[Tensor],
    first: Tensor,
    last: Tensor,
    owner: Tensor,
    ranks: Sequence[int],
) -> Tensor:
    n, m = first.shape[0], last.shape[1]
    rows, batch = x.reshape(-1, n), x.shape[0]
    per_sample = rows.shape[0] // batch
    sizes = [per_sample * count for count in counts.tolist()]
    if sum(sizes) != rows.shape[0]:
        raise IndexError(f"A task number is not in 0 ... {len(matrices) - 1}.")
    y = x.new_empty(rows.shape[0], m)
    owners, lengths = _runs(matrices, sizes)
    cast = {task: matrices[task].to(x.dtype) for task in owners}
    biases = None if biases is None else biases.to(x.dtype)
    parts = zip(rows.split_with_sizes(lengths), y.split_with_sizes(lengths), owners)
    if biases is not None and len(owners) == sum(map(bool, sizes)):
        own = biases.unbind()
        for part, out, task in parts:
            torch.addmm(own[task], part, cast[task], out=out)
    else:
        if biases is not None:
            y.view(batch, per_sample, m).copy_(biases.index_select(0, tasks)[:, None])
        for part, out, task in parts:
            out.addmm_(part, cast[task], beta=0 if biases is None else 1)
    if len(owner):
        first, last = first.to(x.dtype), last.to(x.dtype)
    if len(rows) <= FEW and x.dtype.itemsize == 2 and len(owner):
        own = owner == tasks.repeat_interleave(per_sample)[:, None]
        y.addmm_((rows @ first).masked_fill_(~own, 0), last)
    elif len(owner):
        parts = zip(rows.split_with_sizes(sizes), y.split_with_sizes(sizes))
        factors = zip(first.split_with_sizes(ranks, 1), last.split_with_sizes(ranks))
        for (part, out), (a, b) in zip(parts, factors):
            if len(part) and len(b):
                out.addmm_(part @ a, b)
    return y.view(*x.shape[:-1], m)


def _runs(matrices: Sequence[Tensor], sizes: list[int]) -> tuple[list[int], list[int]]:
    """Where neighbors have one matrix: the first task of each run, and its rows."""
    owners: list[int] = []
    lengths: list[int] = []
    for task, size in enumerate(sizes):
        if not size:
            continue
        if owners and matrices[task] is matrices[owners[-1]]:
            lengths[-1] += size
        else:
            owners.append(task)
            lengths.append(size)
    return owners, lengths


_operator = torch.library.custom_op(
    "fusion_bench_didi::product_by_task",
    _product,
    mutates_args=(),
    schema="(Tensor x, Tensor tasks, Tensor counts, Tensor? biases, Tensor[] matrices, Tensor first, Tensor last, "
    "Tensor owner, int[] ranks) -> Tensor",
)


@_operator.register_fake
def _(x, tasks, counts, biases, matrices, first, last, owner, ranks):
    return x.new_empty(*x.shape[:-1], last.shape[1])


def product_by_task(
    x: Tensor, tasks: Tensor, counts: Tensor, biases: Tensor | None, bank: MatrixBank
) -> Tensor:
    """``x_t W_t + b_t`` for the samples x_t of each task.

    Args:
        x: (B, ..., n), sorted by task.
        tasks: (B,) the task of each sample.
        counts: samples per task, on the CPU.
        biases: ``b_t`` (m,) per task.
        bank: of the ``W_t`` (n, m); neighbors that are one tensor are multiplied in one product.

    Returns:
        (B, ..., m).

    Raises:
        IndexError: if the counts leave samples out.
    """
    product = _operator if torch.compiler.is_compiling() else _product
    factors = bank.first, bank.last, bank.owner, bank.ranks
    return product(x, tasks, counts, biases, bank.matrices, *factors)
