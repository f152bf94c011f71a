"""Decomposing matrices as far as the budget reaches, and further where ranks came to the end of what is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..allocation.spectra import MatrixSpectra, spectra_of
from ..allocation.water_filling import dense_from
from ..deltas.precision import Precision
from ..lowrank.decomposition import Decomposition, decompose, half_decompose, half_of
from ..lowrank.factors import Matrix
from .basis_store import KeptBases
from .context import MergeContext
from .rank_bounds import RankBounds

#: Couplings are kept in float32 up to this size in all, in bfloat16 beyond it.
COUPLING_BYTES = 2**30
#: A dense form is not doubted if the directions seen leave out more than this part of the energy.
SPENT = 0.05


@dataclass(frozen=True)
class Decomposed:
    """One matrix as modules whose ranks are to be allocated.

    Args:
        spectra: singular values and rates of its modules.
        bases: half SVDs of the shared matrix and of each expert; None where nothing was decomposed.
        piloted: one task's spectrum told how far to decompose.
    """

    spectra: MatrixSpectra
    bases: KeptBases | None
    piloted: bool = False

    def priced(self, precision: Precision) -> "Decomposed":
        """A copy priced in another precision."""
        rate = precision.rate(*self.spectra.shape).limited(self.spectra.rate.most)
        return replace(self, spectra=replace(self.spectra, rate=rate))


def decomposed(
    context: MergeContext,
    bounds: RankBounds,
    name: str,
    *,
    reach: int,
    shared_rank: int | None,
    vectors: Sequence[Matrix] | None = None,
    adapters_only: bool = False,
) -> Decomposed:
    """Half SVDs of all modules of a matrix up to a rank.

    Args:
        reach: that rank.
        shared_rank: experts are residuals to S cut to this rank, or to the whole of S if None.
        vectors: T of (m, n); read if None.
        adapters_only: the others are stored whole or not at all, beside nothing shared.
    """
    if vectors is None:
        vectors = context.tensor(name).matrices()
    if adapters_only:
        parts = half_decompose(
            vectors, None, max_rank=reach, factored_only=True, name=name
        )
    else:
        parts = _decompose(context, bounds, name, vectors, reach, shared_rank)
    spectra = spectra_of(
        name,
        parts,
        weights=context.weights[name],
        rate=context.inventory.rate(name),
        shape=context.sides(name),
        shared_rank=shared_rank,
    )
    return Decomposed(spectra, context.store.keep((parts.shared, *parts.experts)))


def extended(
    context: MergeContext,
    bounds: RankBounds,
    table: Mapping[str, Decomposed],
    ranks: Mapping[str, Tensor],
) -> dict[str, Decomposed]:
    """Matrices with longer spectra, where the ranks came to the end of those that are known."""
    reach = {}
    for name, one in table.items():
        if name in context.inventory.flat:
            continue  # there are no directions
        known, bound = one.spectra.sigma.shape[1], bounds.rank_bound(name)
        if known < bound and _short(bounds, one, ranks[name]):
            reach[name] = bounds.reach(name, max(2 * known, bounds.initial_rank(name)))

    def longer(name: str) -> Decomposed:
        before = table[name].spectra
        shared_rank = before.shared_rank
        found = decomposed(
            context, bounds, name, reach=reach[name], shared_rank=shared_rank
        )
        return replace(found, spectra=replace(found.spectra, rate=before.rate))

    return dict(context.each("extend", longer, reach))


def _short(bounds: RankBounds, one: Decomposed, ranks: Tensor) -> bool:
    """Whether a longer spectrum might be put to use."""
    row = one.spectra
    known, dense = row.sigma.shape[1], bounds.even_share_pays_dense(row.name)
    last = None if dense else dense_from(row)[0]
    for j in row.free:
        if known <= ranks[j] < row.full and row.tail_energy[j] > 0:
            return True
        if ranks[j] >= row.full and not one.piloted:
            rest = float(row.tail_energy[j])
            seen = float(row.sigma[j].double().square().sum())
            if rest < SPENT * (rest + seen):
                return True
            if last is not None and last[j] >= known:
                return True
    return False


def _decompose(
    context: MergeContext,
    bounds: RankBounds,
    name: str,
    vectors: Sequence[Matrix],
    reach: int,
    shared_rank: int | None,
) -> Decomposition:
    if shared_rank == 0:
        return half_decompose(vectors, None, max_rank=reach, name=name)
    shared, settings = context.static_merge(name, vectors), context.settings
    learned = shared_rank is None and settings.allocation == "learned"
    if learned and settings.learning.coupled:
        whole = decompose(vectors, shared, max_rank=reach, name=name)
        if _coupling_bytes(context, bounds) > COUPLING_BYTES:
            whole = replace(whole, coupling=whole.coupling.reduced())
        return half_of(whole)
    return half_decompose(
        vectors, shared, shared_rank=shared_rank, max_rank=reach, name=name
    )


def _coupling_bytes(context: MergeContext, bounds: RankBounds) -> int:
    """Bytes of the couplings of all matrices in float32, as far as the budget reaches."""
    reach = (bounds.rank_bound(name) for name in context.inventory.matrices)
    return 4 * len(context.tasks) * sum(q**2 for q in reach)
