"""How much task vectors have in common: overlap of their leading subspaces, and energy of their mean over chance."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .svd import HalfSVD, singular_values

#: Directions that are looked at, in parts of the short side.
_PART = 0.1


def subspace_overlap(bases: Sequence[HalfSVD], weights: Tensor) -> float:
    """How much more the leading short-side directions of all tasks together hold than if tasks used unrelated ones.

    Unrelated are the same directions with their entries shuffled, task by task: the spectra stay, what is common goes.

    Args:
        bases: T of equal shape.
        weights: (T,) of the squared errors.
    """
    side = bases[0].vectors.shape[0]
    known = min(basis.vectors.shape[1] for basis in bases)  # what every task has
    count = min(max(int(_PART * side), 2), max(known, 1))
    seed = torch.Generator().manual_seed(side)
    own, shuffled = [], []
    for basis, weight in zip(bases, weights.tolist()):
        vectors = basis.vectors[:, :count]
        own.append(weight**0.5 * vectors * basis.S[:count])
        order = torch.randperm(side, generator=seed).to(basis.vectors.device)
        shuffled.append(own[-1][order])

    def held(parts: list[Tensor]) -> float:
        stack = torch.cat(parts, 1)
        return float(singular_values(stack, max_rank=count).square().sum())

    return held(own) / max(held(shuffled), 1e-300)


def mean_overlap(mean: Tensor, sigma: Tensor, weights: Tensor, rank: int) -> float:
    """How much more the ``rank`` leading directions of the mean hold than those of the average task, per stored number.

    ``(sum_t w_t) sum_i s_i^2 / mean_t(w_t sum_i sigma_ti^2)``: about 1 for unrelated tasks, where sharing is no gain, and T
    for equal ones.

    Args:
        mean: (q,) singular values of the weighted mean.
        sigma: (T, q) of the task vectors.
        weights: (T,).
    """
    own = (weights[:, None] * sigma[:, :rank].square()).sum(1).mean()
    own = own.clamp(min=torch.finfo(own.dtype).tiny)
    return float(weights.sum() * mean[:rank].square().sum() / own)
