"""A random forest that guesses the performance of decisions that were not evaluated.

Features, per component and task: the operator of the task's group (one-hot), the share of the tasks in that group, and how
far the group's static merge is from the task vector,

    ``e = ||s sum_{i in G} tau_i - tau_t||^2 / ||tau_t||^2``,  ``s`` = 1 / |G|, or the scale of task arithmetic,

from the (T, T) inner products alone (TIES counts as averaging; 0 for low-rank operators). Then the means of all of these
over tasks, over components and over both, from which a forest learns faster than from many single ones.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestRegressor

from .genome import Genome, operator_of_task, together
from .objectives import Space
from .operators import rate_of


def features(space: Space, genomes: NDArray) -> NDArray:
    """One row per genome (N, C, 2, T)."""
    N, O = len(genomes), space.shape[2]
    operator = operator_of_task(genomes)  # (N, C, T)
    same = together(genomes)
    size = same.sum(-1)
    static = np.array([rate_of(name) is None for name in space.operators])
    summing = np.array([name == "task_arithmetic" for name in space.operators])
    s = np.where(summing[operator], space.scaling, 1 / size)
    rows = (same * space.grams).sum(-1)  # <tau_t, sum of its group>
    own = np.maximum(np.einsum("ctt->ct", space.grams), 1e-300)
    group = (same * rows[..., None, :]).sum(-1)  # ||sum of the group||^2
    lost = (s * s * group - 2 * s * rows) / own + 1
    lost = np.where(static[operator] & (size > 1), lost, 0.0)
    one_hot = np.eye(O)[operator]
    share = size / space.shape[1]
    table = np.concatenate([one_hot, share[..., None], lost[..., None]], -1)
    summaries = [table.mean(2), table.mean(1), table.mean((1, 2))]
    return np.concatenate([x.reshape(N, -1) for x in (table, *summaries)], 1)


def fitted(
    space: Space,
    genomes: list[Genome],
    performance: list[float],
    *,
    trees: int,
    seed: int,
) -> Callable[[list[Genome]], NDArray]:
    """What guesses the performance of genomes, by a forest fitted to those that were evaluated."""
    forest = RandomForestRegressor(
        n_estimators=trees, max_features=0.3, random_state=seed, n_jobs=1
    )
    forest.fit(features(space, np.stack(genomes)), performance)
    return lambda others: forest.predict(features(space, np.stack(others)))
