"""The second pass over the matrices: cut to the sizes decided on, refine, pack, and measure what was kept out."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from .deltas import Delta
from .in_common import Common, common_key
from .lowrank import (
    Basis,
    Decomposition,
    MatrixSpectra,
    refine,
    refine_common,
    zero_like,
)
from .packing import cut, pack, pack_common, pack_shared
from .parallel import alone, ordered_map, workers_for
from .precision import Precision
from .whole import pack_whole
from .work import Work

#: Stored forms of one matrix: the shared one, and one per task.
Stored = tuple[Delta | None, list[Delta | None]]


def second_pass(
    work: Work,
    table: Sequence[MatrixSpectra],
    ranks: Sequence[Tensor],
    precision: Mapping[str, Precision],
    common: Mapping[str, Common],
) -> Iterator[tuple[str, Stored, Tensor]]:
    """Matrix by matrix: name, stored forms (shared, one per task), and (T,) errors; the store is used up.

    Args:
        table, ranks: the matrices of experts, and (T + 1,) ranks of each.
        precision: how each of these is stored.
        common: the other matrices.
    """
    jobs = {name: partial(_in_common, work, name, c) for name, c in common.items()}
    for row, k in zip(table, ranks):
        jobs[row.name] = partial(_experts, work, row, k, precision[row.name])

    def one(name: str) -> tuple[Stored, Tensor]:
        with alone(work.task_vectors.large(name)):
            return jobs[name]()

    names = work.large_first(jobs)
    results = ordered_map(one, names, workers=workers_for(work.device))
    for i, (name, (stored, errors)) in enumerate(zip(names, results)):
        work.progress("refine", i, len(names))
        yield name, stored, errors
        del stored, errors  # not kept while the next is waited for
        work.release()


def _experts(
    work: Work, row: MatrixSpectra, k: Tensor, precision: Precision
) -> tuple[Stored, Tensor]:
    """One matrix as experts on a shared module."""
    full, plain = k == row.full, work.metric(row.name) is None
    plain = plain and not work.task_vectors.factored(row.name)
    if plain and row.fixed_shared == 0 and bool(((k == 0) | full)[1:].all()):
        work.store.drop(row.name)
        return pack_whole(work, row.name, (k[1:] > 0).tolist(), precision)
    bases = work.store.pop(row.name)
    if plain and row.fixed_shared and bool(full[1:].all()):
        first = _shared_beside_whole(work, row, bases[0], precision)
        return pack_whole(work, row.name, full[1:].tolist(), precision, first)
    vectors, settled = work.read(row.name), row.fixed_shared is not None
    if settled and not row.fixed_shared:
        shared = zero_like(vectors[0])
    else:
        shared = work.shared(row.name, vectors)
    parts, ranks = Decomposition(bases[0], bases[1:]), k.tolist()
    modules = refine(
        cut(parts, ranks, row.full, shared, vectors, settled=settled),
        vectors,
        weights=work.weights[row.name],
        how=work.settings.refinement,
        settings=work.settings.refining,
        settled=settled,
    )
    metric = work.metric(row.name)
    if metric is not None:
        vectors = work.task_vectors.matrices(row.name, work.device)
        modules = metric.plain(modules)
    shape = work.task_vectors.infos[row.name].shape
    return pack(modules, ranks, vectors, shape=shape, precision=precision)


def _shared_beside_whole(
    work: Work, row: MatrixSpectra, basis: Basis, precision: Precision
) -> Delta:
    """The shared form of experts that are whole: they take what it leaves, and have no say in it."""
    vectors, rank = work.task_vectors, row.fixed_shared
    shape = vectors.infos[row.name].shape
    terms = vectors.terms(row.name, vectors.tasks, work.device)
    shared = work.shared_of(row.name, terms)
    if rank < row.full:
        shared = basis.factors(shared, rank)
    return pack_shared(shared, rank, shape=shape, precision=precision)


def _in_common(work: Work, name: str, common: Common) -> tuple[Stored, Tensor]:
    """One matrix in common subspaces."""
    vectors, (m, n), (p, q) = work.read(name), work.shape(name), common.sizes
    kept = work.store.pop(common_key(name))
    left, right = (b.vectors.to(work.device) for b in kept)
    up = torch.eye(m).to(left) if p == m else left[:, :p]
    down = torch.eye(n).to(right) if q == n else right[:, :q].mT
    if work.settings.refinement != "none":
        refining = work.settings.refining
        up, down = refine_common(
            vectors,
            work.weights[name],
            up,
            down,
            sweeps=refining.sweeps,
            tolerance=refining.tolerance,
        )
    metric = work.metric(name)
    if metric is not None:
        vectors = work.task_vectors.matrices(name, work.device)
        down = down if q == n else down @ metric.inverse.to(down)
    shape = work.task_vectors.infos[name].shape
    return pack_common(
        up, down, vectors, shape=shape, precision=common.precision, metric=metric
    )
