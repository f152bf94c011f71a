"""To be described."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...allocation.spectra import MatrixSpectra
from ...deltas.base import Delta
from ...deltas.precision import Precision
from ...lowrank.decomposition import Decomposition
from ...lowrank.factored import as_dense, as_product, subtracting, zero_like
from ...lowrank.factors import Matrix, energy_of
from ...lowrank.refinement import FactorSet, refine
from ...lowrank.subspace_iteration import subspace_step
from ..context import Work
from ..reconstruction import Stored, _kept_out, change_of, pack_shared
from .dense import pack_whole
from .shared_mean import _shared_beside_whole


def _experts(
    work: Work, row: MatrixSpectra, k: Tensor, precision: Precision
) -> tuple[Stored, Tensor]:
    """One matrix as experts on a shared module."""
    full, plain = k == row.full, work.metric(row.name) is None
    plain = plain and not work.task_vectors.factored(row.name)
    if plain and row.shared_rank == 0 and bool(((k == 0) | full)[1:].all()):
        work.store.drop(row.name)
        return pack_whole(work, row.name, (k[1:] > 0).tolist(), precision)
    bases = work.store.pop(row.name)
    if plain and row.shared_rank and bool(full[1:].all()):
        first = _shared_beside_whole(work, row, bases[0], precision)
        return pack_whole(work, row.name, full[1:].tolist(), precision, first)
    vectors, residual_to_stored = work.read(row.name), row.shared_rank is not None
    if residual_to_stored and not row.shared_rank:
        shared = zero_like(vectors[0])
    else:
        shared = work.shared(row.name, vectors)
    parts, ranks = Decomposition(bases[0], bases[1:]), k.tolist()
    modules = refine(
        cut(
            parts,
            ranks,
            row.full,
            shared,
            vectors,
            residual_to_stored=residual_to_stored,
        ),
        vectors,
        weights=work.weights[row.name],
        how=work.settings.refinement,
        settings=work.settings.refining,
        residual_to_stored=residual_to_stored,
    )
    metric = work.metric(row.name)
    if metric is not None:
        vectors = work.task_vectors.matrices(row.name, work.device)
        modules = metric.plain(modules)
    shape = work.task_vectors.infos[row.name].shape
    return pack(modules, ranks, vectors, shape=shape, precision=precision)


def cut(
    decomposition: Decomposition,
    ranks: Sequence[int],
    full: int,
    shared: Matrix,
    task_vectors: Sequence[Matrix],
    *,
    residual_to_stored: bool = False,
) -> FactorSet:
    """Truncated SVDs, Eq. 5; a full-rank expert is None (dense), a full-rank shared module is S itself.

    Args:
        ranks: of the shared module and of each expert.
        shared: (m, n) the whole shared matrix.
        task_vectors: T of (m, n).
        settled: the experts were decomposed against the shared module of its rank, not against the whole of S.
    """
    if ranks[0] < full:
        first = decomposition.shared.factors(shared, ranks[0])
    else:
        first = as_product(shared)
    left = subtracting(first if residual_to_stored else shared)
    experts = tuple(
        None if k >= full else spectrum.factors(left(tau), k)
        for tau, spectrum, k in zip(task_vectors, decomposition.experts, ranks[1:])
    )
    return FactorSet(first, experts)


def pack(
    modules: FactorSet,
    ranks: Sequence[int],
    task_vectors: Sequence[Matrix],
    *,
    shape: tuple[int, ...],
    precision: Precision,
) -> tuple[tuple[Delta | None, list[Delta | None]], Tensor]:
    """Stored forms of one matrix: the shared one and one per task, None where the rank is zero; (T,) squared errors.

    Where numbers are rounded to few bits, the experts are fitted to what the *stored* shared part leaves.

    Args:
        task_vectors: T of (m, n); multiplied out only for an expert that is stored dense.
        shape: of the tensor.
    """
    first = pack_shared(modules.shared, ranks[0], shape=shape, precision=precision)
    base = change_of(first)
    left = subtracting(base)
    others: list[Delta | None] = []
    errors = []
    for factors, tau in zip(modules.experts, task_vectors):
        tau = tau.cpu()
        if factors is None:
            less = None if base is None else as_dense(base)
            (delta,), (error,) = precision.dense(shape, [(as_dense(tau), less)])
        elif factors.rank == 0:
            delta, error = None, energy_of(left(tau))
        else:
            rest, factors = left(tau), factors.to("cpu")
            if precision.rounding and first is not None:
                factors = subspace_step(rest, factors)
            delta, error = precision.low_rank(shape, factors, rest)
            if error is None:
                error = _kept_out(first, delta, tau)
        others.append(delta)
        errors.append(torch.as_tensor(error, dtype=torch.float64))
    return (first, others), torch.stack(errors)
