"""Low-rank experts on a low-rank shared part, or on nothing; at full rank a module is dense.

``tau_t ~ B_0 A_0 + B_t A_t``: the curves of experts alone are the reference that every other form has to beat.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...deltas.base import Delta
from ...deltas.precision import Precision
from ...deltas.sink import EncodedTensor
from ...lowrank.decomposition import Decomposition
from ...lowrank.factored import as_dense, as_product, subtracting, zero_like
from ...lowrank.factors import Matrix, energy_of
from ...lowrank.refinement import FactorSet, refine
from ...lowrank.row_blocks import minus, squared_norms
from ...lowrank.subspace_iteration import subspace_step
from ...lowrank.svd import HalfSVD
from ...task_vectors.tensor import ChangedTensor
from ..basis_store import KeptBases
from ..context import MergeContext
from ..reconstruction import change_of, encode_shared, squared_error
from ..spectra import Decomposed
from .base import Choice, Decision
from .pricing import in_all_precisions
from .uneven import at_its_price, beyond_gaussian


class Experts:
    """Experts alone, or residuals to the whole of a shared matrix (Eq. 3), of ranks that are allocated."""

    name = "experts"

    def curves(self, context: MergeContext, name: str, one: Decomposed) -> list[Choice]:
        """In every precision, from spectra that are known."""
        return choices_of(self, context, name, 0, *one.spectra.of_experts, one.bases)

    def encode(self, context: MergeContext, decision: Decision) -> EncodedTensor:
        name, row, k = decision.name, decision.spectra, decision.point
        tensor, precision = context.tensor(name), decision.precision
        full = k == row.full
        # vectors have no bases, adapters of them neither
        whole = not tensor.factored or decision.bases is None
        dense = bool(((k == 0) | full)[1:].all()) and whole
        if dense and row.shared_rank == 0:
            return encode_dense(context, tensor, (k[1:] > 0).tolist(), precision)
        bases = decision.bases.take()
        if dense and row.shared_rank and bool(full[1:].all()):
            shared = _shared_beside_dense(context, tensor, decision, bases[0])
            kept = full[1:].tolist()
            return encode_dense(context, tensor, kept, precision, shared)
        vectors = tensor.matrices()
        settled = row.shared_rank is not None
        if row.shared_rank == 0:
            shared = zero_like(vectors[0])
        else:
            shared = context.static_merge(name, vectors)
        parts, ranks = Decomposition(bases[0], bases[1:]), k.tolist()
        cut = truncate(
            parts, ranks, row.full, shared, vectors, residual_to_stored=settled
        )
        modules = refine(
            cut,
            vectors,
            weights=context.weights[name],
            how=context.settings.refinement,
            settings=context.settings.refining,
            residual_to_stored=settled,
        )
        made = encode(modules, ranks, vectors, shape=tensor.shape, precision=precision)
        return EncodedTensor(name, *made)

    def ranks(self, decision: Decision, tasks: int) -> list[int]:
        return decision.point.tolist()


def choices_of(
    form: Experts,
    context: MergeContext,
    name: str,
    shared_rank: int,
    sigma: Tensor,
    tail_energy: Tensor,
    bases: KeptBases | None,
    shared: Matrix | None = None,
) -> list[Choice]:
    """Experts of known spectra beside a shared part of some rank, in every precision.

    Args:
        sigma: (T, q).
        tail_energy: (T,).
        bases: half SVDs of the shared matrix and of the experts.
        shared: (m, n) the shared part at its rank.
    """
    curves = in_all_precisions(
        context, name, sigma, tail_energy, shared_rank=shared_rank
    )
    precisions, energy = context.inventory.precisions[name], 0.0
    if shared is not None:
        energy = float(energy_of(shared))
        beyond = beyond_gaussian(shared, shared_rank, precisions)
        curves = [
            at_its_price(curve, precision, more, energy)
            for curve, precision, more in zip(curves, precisions, beyond)
        ]
    return [
        Choice(
            form,
            precision,
            curve.curve,
            bases,
            curve.spectra(name, context.sides(name), shared_energy=energy),
        )
        for curve, precision in zip(curves, precisions)
        # what loses all of dense experts would still be bought of bits that nothing else wants
        if curve.rounding_dense < 1 or sigma.shape[1]
    ]


def truncate(
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
        residual_to_stored: the experts were decomposed against the shared module of its rank, not the whole of S.
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


def encode(
    modules: FactorSet,
    ranks: Sequence[int],
    task_vectors: Sequence[Matrix],
    *,
    shape: tuple[int, ...],
    precision: Precision,
) -> tuple[Delta | None, list[Delta | None], Tensor]:
    """Quantized modules of one matrix: the shared part, one expert per task, None where the rank is zero; (T,) squared errors.

    Where numbers are rounded to few bits, the experts are fitted to what the *stored* shared part leaves.

    Args:
        task_vectors: T of (m, n); multiplied out only for an expert that is stored dense.
        shape: of the tensor.
    """
    first = encode_shared(modules.shared, ranks[0], shape=shape, precision=precision)
    base = change_of(first)
    left = subtracting(base)
    experts: list[Delta | None] = []
    errors = []
    for factors, tau in zip(modules.experts, task_vectors):
        tau = tau.cpu()
        if factors is None:
            part = None if base is None else as_dense(base)
            (delta,), (error,) = precision.dense(shape, [(as_dense(tau), part)])
        elif factors.rank == 0:
            delta, error = None, energy_of(left(tau))
        else:
            rest, factors = left(tau), factors.to("cpu")
            if precision.rounding and first is not None:
                factors = subspace_step(rest, factors)
            delta, error = precision.low_rank(shape, factors, rest)
            if error is None:
                error = squared_error(first, delta, tau)
        experts.append(delta)
        errors.append(torch.as_tensor(error, dtype=torch.float64))
    return first, experts, torch.stack(errors)


def encode_dense(
    context: MergeContext,
    tensor: ChangedTensor,
    kept: Sequence[bool],
    precision: Precision,
    shared: Delta | None = None,
) -> EncodedTensor:
    """One matrix whose experts are dense or not stored, quantized straight from the checkpoints: no task vector is formed.

    Args:
        kept: (T,) whether a task's change is stored at all.
        shared: the shared part.
    """
    base, tasks = change_of(shared), range(len(kept))
    experts: dict[int, Delta] = {}
    errors: dict[int, Tensor] = {}
    if shared is None:
        errors = dict(zip(tasks, context.energy[tensor.name]))
    for together in tensor.together:
        some = [task for task in together if kept[task]]
        others = [task for task in together if not kept[task]]
        if some:
            differences = minus(tensor.differences(some), base)
            made, lost = precision.dense(tensor.shape, differences)
            experts.update(zip(some, made))
            errors.update(zip(some, lost))
        if others and shared is not None:
            rest = minus(tensor.differences(others), base)
            errors.update(zip(others, squared_norms(rest)))
    return EncodedTensor(
        tensor.name,
        shared,
        [experts.get(task) for task in tasks],
        torch.stack([errors[task] for task in tasks]),
    )


def _shared_beside_dense(
    context: MergeContext, tensor: ChangedTensor, decision: Decision, basis: HalfSVD
) -> Delta:
    """The shared part beside dense experts: they take what it leaves, and have no say in it."""
    name, rank = decision.name, decision.spectra.shared_rank
    shared = context.static_merge_of(name, tensor.differences())
    if rank < decision.spectra.full:
        shared = basis.factors(shared, rank)
    return encode_shared(shared, rank, shape=tensor.shape, precision=decision.precision)


EXPERTS = Experts()
