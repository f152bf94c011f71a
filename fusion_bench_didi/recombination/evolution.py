"""What pymoo does for the search: selection by rank and crowding, and an NSGA-II run on the surrogate.

pymoo is imported where it is used: it is an extra.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from ..options import NonNegative, PositiveCount, Seed, check_fields
from .genome import Genome, canonical, crossover, mutate
from .objectives import Space


@dataclass(frozen=True)
class SearchSettings:
    """How long and how hard to search.

    Args:
        population: decisions kept, and evaluated per generation.
        evaluations: real ones in all, the first population included.
        seed: of everything that is drawn.
        surrogate_generations: of the inner NSGA-II.
        trees: of the forest.
        mutation_rate: expected number of components that a mutation touches beyond the first.
    """

    population: Annotated[PositiveCount, Field(ge=4)] = 20
    evaluations: PositiveCount = 300
    seed: Seed = 0
    surrogate_generations: PositiveCount = 15
    trees: PositiveCount = 100
    mutation_rate: NonNegative = 1.0

    def __post_init__(self):
        check_fields(self)


def survivors(costs: np.ndarray, count: int) -> list[int]:
    """Indices of the best by rank, then crowding, in ascending order."""
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem
    from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

    if len(costs) <= count:
        return list(range(len(costs)))
    population = Population.new(F=costs, index=np.arange(len(costs)))
    best = RankAndCrowding().do(
        Problem(n_var=1, n_obj=2),
        population,
        n_survive=count,
        random_state=np.random.default_rng(0),
    )
    return sorted(int(i) for i in best.get("index"))


def evolve(
    space: Space,
    start: list[Genome],
    guess: Callable[[list[Genome]], np.ndarray],
    settings: SearchSettings,
    seed: int,
) -> list[Genome]:
    """NSGA-II on the surrogate; its last population.

    Args:
        start: the first population.
        guess: (N, 2) costs of N genomes.
    """
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.crossover import Crossover
    from pymoo.core.duplicate import ElementwiseDuplicateElimination
    from pymoo.core.mutation import Mutation
    from pymoo.core.problem import Problem
    from pymoo.optimize import minimize

    C, T, O = space.shape
    rate = settings.mutation_rate / C

    def genomes(x: np.ndarray) -> np.ndarray:
        return x.astype(np.int64).reshape(-1, C, 2, T)

    class Guess(Problem):
        def __init__(self):
            super().__init__(n_var=C * 2 * T, n_obj=2, xl=0, xu=max(T, O), vtype=int)

        def _evaluate(self, x, out, *args, **kwargs):
            out["F"] = guess(list(genomes(x)))

    class ByComponent(Crossover):
        def __init__(self):
            super().__init__(2, 2, prob=0.9)

        def _do(self, problem, x, *args, random_state=None, **kwargs):
            pairs = zip(genomes(x[0]), genomes(x[1]))
            children = [crossover(a, b, random_state) for a, b in pairs]
            return np.stack(children, 1).reshape(2, len(children), -1)

    class OfGroups(Mutation):
        def _do(self, problem, x, *args, random_state=None, **kwargs):
            changed = [
                canonical(mutate(g, random_state, operators=O, rate=rate), space.alone)
                for g in genomes(x)
            ]
            return np.stack(changed).reshape(len(x), -1)

    class Same(ElementwiseDuplicateElimination):
        def is_equal(self, a, b):
            return np.array_equal(a.X, b.X)

    algorithm = NSGA2(
        pop_size=2 * settings.population,
        sampling=np.stack(start).reshape(len(start), -1),
        crossover=ByComponent(),
        mutation=OfGroups(),
        eliminate_duplicates=Same(),
        n_offsprings=2 * settings.population,
    )
    length = ("n_gen", settings.surrogate_generations)
    result = minimize(Guess(), algorithm, length, seed=seed)
    return list(genomes(result.pop.get("X")))
