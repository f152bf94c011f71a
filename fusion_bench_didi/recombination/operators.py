"""How the tasks of one group become one module of a component.

``average``, ``task_arithmetic`` and ``ties`` give one dense change for the group, stored in 8 bits after range shrinking.
``didi@r`` gives a low-rank shared matrix and a low-rank expert per task in 4-bit codes, and may take ``r`` times the size
of the component in one fine-tuned model *per task* of the group. A group of one task has nothing to merge: the three
static operators are the same there, the task vector itself.

Inferred: the scale of TIES (1, disjoint mean) and of task arithmetic (0.3); the fourth operator of the paper is known by
its abbreviation only, DiDi's low-rank modules stand in its place.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..deltas.quantized import AffineDelta
from ..errors import SettingsError
from ..lowrank.static_merge import shared_matrix
from ..options import Scale, Share, check_fields
from .low_rank import Parts, SVDCache, low_rank

STATIC = ("average", "task_arithmetic", "ties")
LOW_RANK = "didi@"


@dataclass(frozen=True)
class OperatorSettings:
    """Settings that the operators share.

    Args:
        scaling: task arithmetic: factor on the sum.
        ties_keep: TIES: fraction of each task's entries that take part.
        clip: range shrinking: fraction of a tensor's entries beyond each end of the 8-bit range.
        bits: of the low-rank codes.
    """

    scaling: Scale = 0.3
    ties_keep: Share = 0.2
    clip: Annotated[float, Field(ge=0, lt=0.5)] = 1e-4
    bits: Literal[4, 8] = 4

    def __post_init__(self):
        check_fields(self)


def rate_of(operator: str) -> float | None:
    """The budget of a low-rank operator; None for a static one.

    Raises:
        SettingsError: for an unknown operator.
    """
    if operator in STATIC:
        return None
    if operator.startswith(LOW_RANK):
        with suppress(ValueError):
            rate = float(operator.removeprefix(LOW_RANK))
            if 0 < rate < math.inf:
                return rate
    raise SettingsError(
        f"operator {operator!r}; choose from {', '.join(STATIC)} and {LOW_RANK}<size per task>, {LOW_RANK}0.1 for instance."
    )


def combine(
    operator: str,
    vectors: Mapping[str, Tensor],
    tasks: Sequence[str],
    *,
    unit_bits: int,
    settings: OperatorSettings,
    spectra: SVDCache,
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
    return low_rank(
        vectors,
        tasks,
        budget=budget,
        bits=settings.bits,
        clip=settings.clip,
        spectra=spectra,
    )


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
