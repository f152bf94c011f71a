"""The first pass where form and precision of every matrix are chosen together with the ranks (``lowrank.candidates``).

Offered are, in every precision allowed: experts only; experts beside a truncated shared matrix, where the mean holds more
than unrelated tasks would give; and common subspaces, where the budget is small enough for them to pay.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .lowrank import (
    Basis,
    Candidate,
    CommonOffer,
    Matrix,
    MatrixSpectra,
    Offer,
    choose,
    common_spaces,
    energy_of,
    full_rank,
    greedy,
    leading,
    sharing,
    singular_values,
    subtracting,
    togetherness,
)
from .precision import Precision
from .whole import (
    WORTH_SHARING,
    certainly_whole,
    row_of_whole,
    still_whole,
)
from .work import REACH, SPENT, Work

#: Common subspaces are looked into where the even share is below this part of what a matrix costs whole.
WORTH_COMMON = 0.35
#: ... and the leading directions of all tasks together hold this much more than those of unrelated tasks.
WORTH_TOGETHER = 1.05

Table = list[MatrixSpectra]
StoredAs = dict[str, Precision]


@dataclass(frozen=True)
class Common:
    """A matrix that is stored in common subspaces.

    Args:
        sizes: p and q.
        offer: what other sizes would do.
        precision: of bases and cores.
    """

    sizes: tuple[int, int]
    offer: CommonOffer
    precision: Precision

    @property
    def bits(self) -> int:
        return self.offer.price(self.sizes)


@dataclass(frozen=True)
class FirstPass:
    """What the first pass found.

    Args:
        table: rows of the matrices whose ranks are to be allocated.
        stored_as: precision of these.
        common: the other matrices.
    """

    table: Table
    stored_as: StoredAs
    common: dict[str, Common]

    @property
    def common_bits(self) -> int:
        return sum(common.bits for common in self.common.values())


@dataclass(frozen=True)
class _Option:
    """An offer, the precision that it is in, and the candidate it is made of (None for common subspaces)."""

    offer: Offer
    precision: Precision
    candidate: Candidate | None = None


def joint_pass(work: Work) -> FirstPass:
    """Choose how each matrix is stored, then decompose against what was chosen."""
    names = work.layout.matrices
    cheapest = {n: work.layout.precisions[n][0] for n in names}
    whole = certainly_whole(work)
    reach = {name: work.first_guess(name) for name in names if name not in whole}
    rows = work.rows("decompose", reach, cheapest, dict.fromkeys(names, 0))
    rows += [row_of_whole(work, name, cheapest[name]) for name in whole]
    table = sorted(rows, key=lambda row: row.name)
    while longer := work.extended(table, greedy(table, work.budget), cheapest):
        table = longer
    own = {row.name: _candidate(work, row) for row in table}
    options = {n: list(_in_all_precisions(work, n, own[n])) for n in names}
    picks, mu = _chosen(work, options)
    sharable = work.settings.residual == "truncated" and mu > 0
    sharers = [n for n in names if sharable and whole.get(n, True)]
    alone = {n: options[n][i].candidate for n, i in zip(names, picks)}
    look = lambda n: _shared_too(work, n, alone[n], mu, n in whole)  # noqa: E731
    if work.settings.static != "none":
        for name, more in work.over("share", look, sharers):
            options[name] += [
                o for c in more for o in _in_all_precisions(work, name, c)
            ]
    unsettled = [n for n in sharers if n not in whole]
    for name, offers in work.over("share", lambda n: _common(work, n), unsettled):
        options[name] += offers
    if any(len(options[n]) > len(work.layout.precisions[n]) for n in names):
        picks, mu = _chosen(work, options)
    chosen = {n: options[n][i] for n, i in zip(names, picks)}
    common = {
        n: Common(o.offer.sizes(mu), o.offer, o.precision)
        for n, o in chosen.items()
        if o.candidate is None
    }
    for name in names:
        work.store.drop(name if name in common else common_key(name))
    stored_as = {n: o.precision for n, o in chosen.items() if n not in common}
    picked = {n: chosen[n].candidate for n in stored_as}
    mixed = {n: c.shared_rank for n, c in picked.items() if c.shared_rank}
    reach = {n: picked[n].sigma.shape[1] for n in mixed}
    with_shared = work.rows("share", reach, stored_as, mixed)
    rows = {row.name: row for row in (*table, *with_shared)}
    rows = [
        replace(rows[n], price=p.price(*work.shape(n))) for n, p in stored_as.items()
    ]
    return FirstPass(rows, stored_as, common)


def _chosen(
    work: Work, options: Mapping[str, list[_Option]]
) -> tuple[list[int], float]:
    return choose([[o.offer for o in row] for row in options.values()], work.budget)


def grown(common: Mapping[str, Common], left: int) -> dict[str, Common]:
    """What is left of the budget, in bits, spent on larger subspaces, one step at a time where it gains most per bit."""
    common = dict(common)
    while True:
        steps = ((c.offer.step(c.sizes, left), name) for name, c in common.items())
        gain, sizes, name = max(
            ((*step, name) for step, name in steps if step), default=(0.0, None, "")
        )
        if sizes is None:
            return common
        larger = replace(common[name], sizes=sizes)
        left -= larger.bits - common[name].bits
        common[name] = larger


def common_key(name: str) -> str:
    """Where a matrix has its common bases in the store."""
    return f"{name}/common"


def _candidate(work: Work, row: MatrixSpectra) -> Candidate:
    """Experts only, in the cheapest precision."""
    precision = work.layout.precisions[row.name][0]
    return Candidate(
        0,
        row.price,
        precision.name,
        row.sigma[1:],
        row.tail_energy[1:],
        precision.rounding,
        precision.rounding_dense,
    )


def _in_all_precisions(
    work: Work, name: str, candidate: Candidate
) -> Iterator[_Option]:
    for p in work.layout.precisions[name]:
        priced = replace(
            candidate,
            price=p.price(*work.shape(name)),
            precision=p.name,
            rounding=p.rounding,
            rounding_dense=p.rounding_dense,
        )
        yield _Option(priced.offer(work.weights[name]), p, priced)


def _shared_too(
    work: Work, name: str, own: Candidate, level: float, whole: bool
) -> list[Candidate]:
    """What might pay beside experts only, at so much error per bit.

    Args:
        own: experts only, in the precision in which they are best.
        whole: low rank is no choice for them, and ``own`` has no singular values.
    """
    vectors, weights = work.read(name), work.weights[name]
    full = full_rank(*work.shape(name))
    q = work.first_guess(name) if whole else own.sigma.shape[1]
    shared = work.shared(name, vectors)
    found = leading(shared, max_rank=q, name=name)
    mean = found.S.cpu()
    gain = weights.sum() * mean.square() / own.price.per_rank
    # a shared component gains at most this much per bit; where it gains T levels, every expert would hold it too
    ranks = {int((gain >= level * times).sum()) for times in (1, len(weights))}
    most = min(q, own.price.cap) if found.tail_energy > 0 else own.price.cap
    ranks = {full if k >= most else k for k in ranks}
    candidates = []
    for k in sorted(ranks - {0}):
        if not whole and sharing(mean, own.sigma, weights, k) < WORTH_SHARING:
            continue
        left = subtracting(shared if k == full else found.factors(shared, k))
        spectra = None
        if whole:
            spectra = still_whole(work, name, map(left, vectors), level)
        sigma, tail = spectra or _spectra(map(left, vectors), q)
        candidates.append(replace(own, shared_rank=k, sigma=sigma, tail_energy=tail))
    return candidates


def _spectra(matrices: Iterable[Matrix], rank: int) -> tuple[Tensor, Tensor]:
    """(T, q) leading singular values and (T,) energies beyond them."""
    sigma, tails = [], []
    for matrix in matrices:
        values = singular_values(matrix, max_rank=rank).cpu()
        energy = float(energy_of(matrix))
        tails.append(max(energy - float(values.double().square().sum()), 0))
        sigma.append(values)
    return torch.stack(sigma), torch.tensor(tails)


def _common(work: Work, name: str) -> list[_Option]:
    """Common subspaces in every precision in which they may pay; their bases go to the store.

    None where the even share pays for the whole matrix in a precision that loses little: finer ones do not compete then.
    """
    shape, vectors = work.shape(name), None
    options: list[_Option] = []
    precisions = work.layout.precisions[name]
    held = any(
        p.rounding_dense < SPENT and work.share(name) >= p.price(*shape).dense
        for p in precisions
    )
    one_by_one = work.task_vectors.one_by_one(name)
    if held or one_by_one or not work.settings.in_common:
        return options
    bases = work.store.get(name)[1:]
    if togetherness(bases, work.weights[name]) < WORTH_TOGETHER:
        return options
    for precision in precisions:
        share = work.share(name) / precision.price(*shape).dense
        if share > WORTH_COMMON:
            continue
        if vectors is None:
            vectors = work.read(name)
            # bases alone cannot take more than what the matrix is likely to be given
            most = REACH * work.share(name) * len(vectors) / precision.bits
            spaces = common_spaces(
                vectors,
                work.weights[name],
                max_up=max(int(most / shape[0]), 1),
                max_down=max(int(most / shape[1]), 1),
                name=name,
            )
            empty = spaces.up.new_zeros(0)
            bases = (spaces.up, spaces.down.mT)
            work.store.put(common_key(name), tuple(Basis(b, empty, 0.0) for b in bases))
        p, q = spaces.sizes_up[:, None], spaces.sizes_down
        tasks = sum(bool(energy_of(tau) > 0) for tau in vectors)
        offer = CommonOffer.of(
            spaces,
            precision.common_bits(shape, tasks, p, q),
            precision.common_rounding(shape, p, q),
            tasks,
        )
        options.append(_Option(offer, precision))
    return options
