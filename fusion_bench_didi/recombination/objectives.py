"""The two objectives of a decision: how well the tasks do, and what is stored.

``performance`` is the mean over tasks of a normalized score (1 = the fine-tuned model itself), ``storage`` is ``x_excl`` of
the distinct modules. The score of a task depends on its chain of modules only, so tasks whose chain occurred before are
not evaluated again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from .components import Component, ComponentReader
from .genome import Genome, groups, operator_of_task, together
from .library import Library, ModularExpert
from .operators import rate_of

Chain = tuple[ModularExpert, ...]
#: Normalized score of one task under a chain of modules; 1 is what the fine-tuned model reaches.
Scorer = Callable[[str, Chain], float]


@dataclass(frozen=True)
class Evaluation:
    """One decision and what it is worth.

    Args:
        genome: nested lists (C, 2, T).
        performance: mean of ``scores``; more is better.
        storage: ``x_excl``; less is better.
        scores: per task.
    """

    genome: list
    performance: float
    storage: float
    scores: Mapping[str, float]

    @property
    def costs(self) -> tuple[float, float]:
        """Both objectives, to be minimised."""
        return 1 - self.performance, self.storage

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Space:
    """The space of decisions: components, tasks and operators.

    Args:
        components: C of them.
        tasks: T names, sorted.
        operators: O names.
        unit_bits: one fine-tuned model.
        grams: (C, T, T) inner products of the task vectors.
        scaling: of task arithmetic.
    """

    components: Sequence[Component]
    tasks: Sequence[str]
    operators: Sequence[str]
    unit_bits: int
    grams: np.ndarray
    scaling: float = 0.3

    @classmethod
    def of(
        cls,
        components: Sequence[Component],
        reader: ComponentReader,
        operators: Sequence[str],
        *,
        scaling: float = 0.3,
    ) -> "Space":
        return cls(
            components,
            reader.tasks,
            operators,
            sum(c.bits for c in components),
            torch.stack([reader.gram(c) for c in components]).numpy(),
            scaling,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of components C, tasks T and operators O."""
        return len(self.components), len(self.tasks), len(self.operators)

    @property
    def alone(self) -> np.ndarray:
        """(O,) static operators are one and the same for a single task: the first of them."""
        static = [o for o, name in enumerate(self.operators) if rate_of(name) is None]
        return np.array(
            [static[0] if o in static else o for o in range(len(self.operators))]
        )

    def nominal_storage(self, genomes: np.ndarray) -> np.ndarray:
        """``x_excl`` of genomes (..., C, 2, T) before any module is made: low-rank modules count with their whole budget,
        a dense one in equal parts for the tasks that share it."""
        rates = np.array([rate_of(name) or 0.0 for name in self.operators])
        own = rates[operator_of_task(genomes)]  # (..., C, T)
        size = together(genomes).sum(-1)
        bits = np.array([c.bits for c in self.components])[:, None]
        dense = np.array([c.dense_bits for c in self.components])[:, None]
        return (
            np.where(own > 0, own * bits, dense / size).sum((-1, -2)) / self.unit_bits
        )

    def chains(self, genome: Genome, library: Library) -> dict[str, Chain]:
        """The modules of each task, one per component."""
        chains: dict[str, list[ModularExpert]] = {task: [] for task in self.tasks}
        for component, row in zip(self.components, genome):
            for operator, members in groups(row):
                names = [self.tasks[t] for t in members]
                module = library.get(component, names, self.operators[operator])
                for name in names:
                    chains[name].append(module)
        return {task: tuple(chain) for task, chain in chains.items()}


class Evaluator:
    """Turns genomes into evaluations.

    Args:
        space: what can be decided.
        library: makes the modules.
        scorer: judges chains.
    """

    def __init__(self, space: Space, library: Library, scorer: Scorer):
        self.space, self.library, self.scorer = space, library, scorer
        self._scores: dict[tuple[str, ...], float] = {}

    def __call__(self, genome: Genome) -> Evaluation:
        chains = self.space.chains(genome, self.library)
        scores = {task: self._score(task, chain) for task, chain in chains.items()}
        return Evaluation(
            genome.tolist(),
            float(np.mean(list(scores.values()))),
            stored_bits(chains.values()) / self.space.unit_bits,
            scores,
        )

    def _score(self, task: str, chain: Chain) -> float:
        key = (task, *(module.id for module in chain))
        if key not in self._scores:
            self._scores[key] = self.scorer(task, chain)
        return self._scores[key]


def stored_bits(chains: Iterable[Chain]) -> int:
    """Bits of the distinct modules."""
    return sum({m.id: m.bits for chain in chains for m in chain}.values())


class ReconstructionScorer:
    """Data-free proxy: ``1 - sum_c ||change_c - tau_c||^2 / sum_c ||tau_c||^2`` of a task.

    1 for the fine-tuned model, 0 for the base model, below 0 where merging does harm. Inferred: the reading note knows no such
    objective.
    """

    def __init__(self, components: Sequence[Component], reader: ComponentReader):
        self._components = {c.name: c for c in components}
        self._reader = reader
        self._errors: dict[tuple[str, str], float] = {}
        energy = sum(reader.gram(c).diagonal() for c in components)
        # a task that equals the base model loses as the others do on average
        energy = energy.where(energy > 0, energy.mean()).tolist()
        self._energy = dict(zip(reader.tasks, energy))

    def __call__(self, task: str, chain: Chain) -> float:
        lost = sum(self._error(task, module) for module in chain)
        return 1 - lost / self._energy[task]

    def _error(self, task: str, module: ModularExpert) -> float:
        key = (task, module.id)
        if key not in self._errors:
            vectors = self._reader.read(self._components[module.component], [task])
            change, error = module.change(task), 0.0
            for name, tau in vectors.items():
                rest = tau[0] - change[name] if name in change else tau[0]
                error += float(rest.double().square().sum())
            self._errors[key] = error
        return self._errors[key]
