"""DiDi's low-rank modules of one component and one group, within a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..allocation.spectra import spectra_of
from ..allocation.water_filling import greedy
from ..deltas.base import Delta
from ..deltas.precision import Precision
from ..deltas.quantized import AffineDelta
from ..lowrank.decomposition import Decomposition, decompose
from ..lowrank.factors import Spectrum
from ..lowrank.static_merge import shared_matrix
from ..lowrank.svd import spectrum
from ..merging.context import loss_weights
from ..merging.forms.experts import encode, truncate
from ..task_vectors.tensor import matrix_shape
from .recent import Recent


@dataclass(frozen=True)
class Parts:
    """Deltas of a group: for all its tasks, and per task on top of them."""

    shared: Mapping[str, Delta]
    experts: Mapping[str, Mapping[str, Delta]]


#: Numbers that a cache keeps.
_KEPT = 2**27


class SVDCache:
    """Decompositions of matrices, of which low-rank modules of other sizes and groups need the same again."""

    def __init__(self) -> None:
        self._kept = Recent(_KEPT, _numbers)

    def get(
        self, name: str, tasks: Sequence[str], how: str, vectors: Tensor, shared: Tensor
    ) -> Decomposition:
        """Spectra of the shared matrix and of what it leaves of each task vector (g, m, n)."""
        if how != "none":
            key = (name, how, *tasks)
            return self._kept.get(
                key, lambda: decompose(vectors, shared, coupled=False, name=name)
            )

        def alone(key: tuple[str, ...], matrix: Tensor) -> Spectrum:
            found = self._kept.get(
                key, lambda: Decomposition(spectrum(matrix, name=name), ())
            )
            return found.shared

        own = [alone((name, task), tau) for task, tau in zip(tasks, vectors)]
        return Decomposition(alone((name,), shared), tuple(own))


def _numbers(made: Decomposition) -> int:
    return sum(s.U.numel() + s.Vh.numel() for s in (made.shared, *made.experts))


def low_rank(
    vectors: Mapping[str, Tensor],
    tasks: Sequence[str],
    *,
    budget: int,
    bits: int,
    clip: float,
    spectra: SVDCache,
) -> Parts:
    """DiDi's modules of one component: greedy ranks, experts refitted to what the stored shared matrix leaves.

    Made with a shared part and without, and the one that keeps more is taken. Biases and norms are kept per task in
    8 bits. Ranks are not learned and nothing is swept, as thousands of modules are made.

    Args:
        budget: bits for the whole group.
        bits: of the low-rank codes, 4 or 8.
        clip: range shrinking of what is kept whole.
    """
    matrices = {n: v for n, v in vectors.items() if min(matrix_shape(v.shape[1:])) >= 2}
    experts: dict[str, dict[str, Delta]] = {task: {} for task in tasks}
    for name, v in vectors.items():
        if name not in matrices:
            for task, tau in zip(tasks, v):
                if bool(tau.any()):
                    experts[task][name] = AffineDelta.of(tau, clip=clip)
    budget -= sum(d.bits for deltas in experts.values() for d in deltas.values())
    ways = ("none", "mean") if len(tasks) > 1 else ("none",)
    found = (
        _low_rank_matrices(matrices, tasks, how, max(budget, 0), bits, spectra)
        for how in ways
    )
    _, stored = min(found, key=lambda form: form[0])
    shared = {n: first for n, (first, _) in stored.items() if first is not None}
    for name, (_, others) in stored.items():
        for task, delta in zip(tasks, others):
            if delta is not None:
                experts[task][name] = delta
    return Parts(shared, experts)


def _low_rank_matrices(matrices, tasks, how: str, budget: int, bits: int, spectra):
    """Weighted error, and stored deltas per matrix, for one way to share."""
    precision = Precision(f"int{bits}", bits)
    views = {n: v.view(len(v), *matrix_shape(v.shape[1:])) for n, v in matrices.items()}
    energies = {n: v.double().square().sum((1, 2)) for n, v in views.items()}
    weights = loss_weights(energies, "root")
    work, table = {}, []
    for name, v in views.items():
        shared = shared_matrix(v, how=how, weights=weights[name])
        parts = spectra.get(name, tasks, how, v, shared)
        work[name] = v, shared, parts
        table.append(
            spectra_of(
                name,
                parts,
                weights=weights[name],
                rate=precision.rate(*shared.shape),
                shape=tuple(shared.shape),
                shared_rank=0 if how == "none" else None,
            )
        )
    error, stored = 0.0, {}
    for row, ranks in zip(table, greedy(table, budget)):
        v, shared, parts = work[row.name]
        k = ranks.tolist()
        first, experts, errors = encode(
            truncate(parts, k, row.full, shared, v),
            k,
            v,
            shape=tuple(matrices[row.name].shape[1:]),
            precision=precision,
        )
        stored[row.name] = first, experts
        error += float((weights[row.name] * errors).sum())
    return error, stored
