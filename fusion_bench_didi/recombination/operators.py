"""How the tasks of one group become one module of a component.

``average``, ``task_arithmetic`` and ``ties`` give one dense change for the group, stored in 8 bits after range shrinking.
``didi@r`` gives a low-rank shared matrix and a low-rank expert per task in 4-bit codes, and may take ``r`` times the size
of the component in one fine-tuned model *per task* of the group. A group of one task has nothing to merge: the three
static operators are the same there, the task vector itself.

Inferred: the scale of TIES (1, disjoint mean) and of task arithmetic (0.3); the fourth operator of the paper is known by
its abbreviation only, DiDi's low-rank modules stand in its place.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..deltas import Delta
from ..lowrank import (
    Decomposition,
    decompose,
    greedy,
    shared_matrix,
    spectra_of,
    spectrum,
)
from ..packing import cut, kept_out, pack
from ..precision import Precision
from ..quantised import AffineDelta
from ..task_vectors import matrix_shape

STATIC = ("average", "task_arithmetic", "ties")
LOW_RANK = "didi@"


@dataclass(frozen=True)
class OperatorSettings:
    """What the operators share.

    Args:
        scaling: task arithmetic: factor on the sum.
        ties_keep: TIES: fraction of each task's entries that take part.
        clip: range shrinking: fraction of a tensor's entries beyond each end of the 8-bit range.
        bits: of the low-rank codes, 4 or 8.
    """

    scaling: float = 0.3
    ties_keep: float = 0.2
    clip: float = 1e-4
    bits: int = 4

    def __post_init__(self):
        if not 0 <= self.clip < 0.5:
            raise ValueError(f"clip={self.clip} is not in [0, 0.5).")
        if self.bits not in (4, 8):
            raise ValueError(f"low_rank_bits={self.bits}; choose 4 or 8.")

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Parts:
    """What is stored for a group: deltas for all its tasks, and deltas per task on top of them."""

    shared: Mapping[str, Delta]
    experts: Mapping[str, Mapping[str, Delta]]


class Spectra:
    """Decompositions of matrices, of which low-rank modules of other sizes and groups need the same again.

    Args:
        memory_floats: numbers kept; what was used longest ago goes first.
    """

    def __init__(self, *, memory_floats: int = 2**27):
        self._memory, self._held = memory_floats, 0
        self._kept: OrderedDict[tuple, tuple[Decomposition, int]] = OrderedDict()

    def get(
        self, name: str, tasks: Sequence[str], how: str, vectors: Tensor, shared: Tensor
    ) -> Decomposition:
        """Of the shared matrix and of what it leaves of each task vector (g, m, n)."""
        if how != "none":
            key = (name, how, *tasks)
            return self._cached(
                key, lambda: decompose(vectors, shared, coupled=False, name=name)
            )
        own = [
            self._cached(
                (name, task), lambda t=tau: Decomposition(spectrum(t, name=name), ())
            ).shared
            for task, tau in zip(tasks, vectors)
        ]
        nothing = self._cached(
            (name,), lambda: Decomposition(spectrum(shared), ())
        ).shared
        return Decomposition(nothing, tuple(own))

    def _cached(self, key: tuple, make: Callable[[], Decomposition]) -> Decomposition:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        made = make()
        size = sum(s.U.numel() + s.Vh.numel() for s in (made.shared, *made.experts))
        self._kept[key] = made, size
        self._held += size
        while self._held > self._memory and len(self._kept) > 1:
            self._held -= self._kept.popitem(last=False)[1][1]
        return made


def rate_of(operator: str) -> float | None:
    """The budget of a low-rank operator; None for a static one.

    Raises:
        ValueError: for an unknown operator.
    """
    if operator in STATIC:
        return None
    if operator.startswith(LOW_RANK):
        rate = float(operator.removeprefix(LOW_RANK))
        if rate > 0:
            return rate
    raise ValueError(
        f"operator {operator!r}; choose from {', '.join(STATIC)} and {LOW_RANK}<size per task>, {LOW_RANK}0.1 for instance."
    )


def combine(
    operator: str,
    vectors: Mapping[str, Tensor],
    tasks: Sequence[str],
    *,
    unit_bits: int,
    settings: OperatorSettings,
    spectra: Spectra,
) -> Parts:
    """Merge the task vectors of one component over one group.

    Args:
        operator: see the module's docstring.
        vectors: (g, *shape) per tensor.
        tasks: the g tasks.
        unit_bits: the component in one fine-tuned model.
        spectra: kept between calls.
    """
    vectors = {name: v for name, v in vectors.items() if bool(v.any())}
    rate = rate_of(operator)
    if rate is None:
        merged = static_merge(operator, vectors, settings)
        return Parts(
            {n: AffineDelta.of(v, clip=settings.clip) for n, v in merged.items()}, {}
        )
    budget = int(rate * unit_bits * len(tasks))
    return low_rank(vectors, tasks, budget=budget, settings=settings, spectra=spectra)


def static_merge(
    operator: str, vectors: Mapping[str, Tensor], settings: OperatorSettings
) -> dict[str, Tensor]:
    """One change per tensor; TIES trims over the whole component."""
    if not vectors:
        return {}
    flat = torch.cat([v.flatten(1) for v in vectors.values()], 1)  # (g, N)
    how = "mean" if operator == "average" else operator
    if len(flat) == 1:
        merged = flat[0]
    else:
        merged = shared_matrix(
            flat[:, None],
            how=how,
            scale=settings.scaling,
            keep=settings.ties_keep,
        )[0]
    pieces = merged.split([v[0].numel() for v in vectors.values()])
    return {n: p.view(v.shape[1:]) for (n, v), p in zip(vectors.items(), pieces)}


def low_rank(
    vectors: Mapping[str, Tensor],
    tasks: Sequence[str],
    *,
    budget: int,
    settings: OperatorSettings,
    spectra: Spectra,
) -> Parts:
    """DiDi's modules of one component: greedy ranks, experts refitted to what the stored shared matrix leaves.

    Made with a shared part and without, and the one that keeps more is taken. Biases and norms are kept per task in
    8 bits. The full pipeline's learned ranks and sweeps take ten times as long, too long for thousands of modules.

    Args:
        budget: bits for the whole group.
    """
    matrices = {n: v for n, v in vectors.items() if min(matrix_shape(v.shape[1:])) >= 2}
    experts: dict[str, dict[str, Delta]] = {task: {} for task in tasks}
    for name, v in vectors.items():
        if name not in matrices:
            for task, tau in zip(tasks, v):
                if bool(tau.any()):
                    experts[task][name] = AffineDelta.of(tau, clip=settings.clip)
    budget -= sum(d.bits for deltas in experts.values() for d in deltas.values())
    ways = ("none", "mean") if len(tasks) > 1 else ("none",)
    _, stored = min(
        (
            _low_rank_matrices(matrices, tasks, how, max(budget, 0), settings, spectra)
            for how in ways
        ),
        key=lambda form: form[0],
    )
    shared = {n: first for n, (first, _) in stored.items() if first is not None}
    for name, (_, others) in stored.items():
        for task, delta in zip(tasks, others):
            if delta is not None:
                experts[task][name] = delta
    return Parts(shared, experts)


def _low_rank_matrices(matrices, tasks, how: str, budget: int, settings, spectra):
    """Weighted error, and stored deltas per matrix, for one way to share."""
    precision = Precision(f"int{settings.bits}", settings.bits)
    work, table = {}, []
    for name, v in matrices.items():
        v = v.view(len(v), *matrix_shape(v.shape[1:]))
        weights = _weights(v)
        shared = shared_matrix(v, how=how, weights=weights)
        parts = spectra.get(name, tasks, how, v, shared)
        work[name] = v, weights, shared, parts
        table.append(
            spectra_of(
                name,
                parts,
                weights=weights,
                price=precision.price(*shared.shape),
                shape=tuple(shared.shape),
                fixed_shared=0 if how == "none" else None,
            )
        )
    error, stored = 0.0, {}
    for row, ranks in zip(table, greedy(table, budget)):
        v, weights, shared, parts = work[row.name]
        k = ranks.tolist()
        stored[row.name] = pack(
            cut(parts, k, row.full, shared),
            k,
            v,
            shape=tuple(matrices[row.name].shape[1:]),
            precision=precision,
        )
        error += float((weights * kept_out(*stored[row.name], v)).sum())
    return error, stored


def _weights(vectors: Tensor) -> Tensor:
    """(g,) 1 / ||tau_t||, as in the pipeline's ``normalisation=root``."""
    energy = vectors.double().square().sum((1, 2))
    energy = torch.where(energy > 0, energy, energy[energy > 0].mean())
    return energy.rsqrt().float()
