"""MERGE (Qiu et al., "Fine-Grained Model Merging via Modular Expert Recombination", 2026, arXiv 2602.06552).

Example:

    fusion_bench method=didi/merge modelpool=didi/demo taskpool=didi/demo
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from fusion_bench import auto_register_config

from ..checkpoint.directory import write_json
from ..distributed.ranks import check_alone
from ..errors import DiDiError, SettingsError, spelled
from ..files import from_home
from ..lowrank.arithmetic import own_arithmetic
from ..options import (
    Aliases,
    FilePath,
    Fraction,
    Gigabytes,
    NonNegative,
    Pattern,
    Patterns,
    PositiveCount,
    Scale,
    Seed,
    Share,
    refuse_idle,
)
from ..recombination.components import PATTERNS, ComponentReader, components
from ..recombination.evolution import SearchSettings
from ..recombination.front import named_picks, pareto_front, plot_front
from ..recombination.library import Library, save_modules
from ..recombination.model import RecombinedModel
from ..recombination.objectives import (
    Evaluation,
    Evaluator,
    ReconstructionScorer,
    Scorer,
    Space,
)
from ..recombination.operators import OperatorSettings, rate_of
from ..recombination.search import nsga2
from ..recombination.validation import check_pools, scorer_from_pools
from .base import PoolMethod, progress_bars

log = logging.getLogger(__name__)
#: what a search leaves: its state, and the front that it found
STATE, FRONT = "search.json", "front.json"


@auto_register_config
class MERGE(PoolMethod):
    """Per component (attention and MLP of each block, and the rest) a partition of the tasks and an operator per group.

    Searched by surrogate-assisted NSGA-II for mean normalized validation performance against storage of the distinct
    modules. The front, its modules and the state of the search are left in ``directory``; the model of ``pick`` is
    returned. The task is given, as for every dynamic model here; a router can be put in front.

    Source: a reconstruction from the abstract and a reading note; body and code of the paper were not at hand, and no figure
    of it was reproduced. ``fusion_bench_didi.recombination`` says what is inferred.

    Raises:
        ModelPoolError, DiDiError: before any search, if ``objective=validation`` lacks data or heads.
    """

    title = "MERGE"

    def __init__(
        self,
        objective: Literal["validation", "proxy"] = "validation",
        validation_samples: PositiveCount | None = 256,
        pick: Literal["performance", "balanced", "storage"] | int = "balanced",
        operators: Sequence[str] = (
            *("average", "task_arithmetic", "ties"),
            *("didi@0.03", "didi@0.06", "didi@0.12"),
        ),
        scaling: Scale = 0.3,
        ties_keep: Share = 0.2,
        clip: Fraction = 1e-4,
        low_rank_bits: Literal[4, 8] = 4,
        components: Mapping[str, Pattern] | None = None,
        population: PositiveCount = 20,
        evaluations: PositiveCount = 300,
        surrogate_generations: PositiveCount = 15,
        trees: PositiveCount = 100,
        mutation_rate: NonNegative = 1.0,
        seed: Seed = 0,
        directory: FilePath | None = None,
        library_memory_gb: Gigabytes = 2.0,
        exclude: Patterns = (),
        task_aliases: Aliases = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not self.operators:
            raise SettingsError("operators is empty; give [average] at least.")
        for operator in self.operators:
            rate_of(operator)
        self.search_settings()
        self.operator_settings()
        refuse_idle(self, dict(self._idle()))

    def _idle(self) -> Iterator[tuple[str, str]]:
        """Settings that nothing reads, and what they are of."""
        if self.objective != "validation":
            yield "validation_samples", f"of objective=validation, not {self.objective}"
        static = {name for name in self.operators if rate_of(name) is None}
        for key, operator in (("scaling", "task_arithmetic"), ("ties_keep", "ties")):
            if operator not in static:
                yield key, f"of the operator {operator}, which is not among operators"
        if len(static) == len(set(self.operators)):
            yield "low_rank_bits", "of operators didi@..., and there is none"

    def search_settings(self) -> SearchSettings:
        names = [field.name for field in fields(SearchSettings)]
        return SearchSettings(**{name: getattr(self, name) for name in names})

    def operator_settings(self) -> OperatorSettings:
        return OperatorSettings(
            self.scaling, self.ties_keep, self.clip, self.low_rank_bits
        )

    @own_arithmetic()
    def run(self, modelpool: Any) -> RecombinedModel:
        """Search, leave front and library, and return the picked model."""
        if find_spec("pymoo") is None:
            raise DiDiError(
                "MERGE searches with pymoo, which is not installed: pip install 'fusion-bench-didi[merge]'."
            )
        check_alone(self.processes, self.title)
        directory = self._directory()
        modelpool = self.checked(modelpool)
        if self.objective == "validation":
            tasks = self.order(modelpool.model_names)
            check_pools(modelpool, self.taskpool, tasks, self.task_aliases)
        backbone, task_vectors = self.opened(modelpool)
        facts = self.facts(modelpool, backbone, task_vectors)
        with self.profile("scan"):
            names = self.changed(task_vectors)
        patterns = PATTERNS if self.components is None else self.components
        parts = components(task_vectors, names, patterns)
        reader = ComponentReader(task_vectors)
        space = Space.of(parts, reader, list(self.operators), scaling=self.scaling)
        if self.objective == "proxy":
            scorer: Scorer = ReconstructionScorer(parts, reader)
        else:
            with self.profile("validation images"):
                scorer = scorer_from_pools(
                    modelpool,
                    self.taskpool,
                    backbone,
                    task_vectors,
                    samples=self.validation_samples,
                    seed=self.seed,
                    aliases=self.task_aliases,
                )
        memory = int(8 * 2**30 * self.library_memory_gb)
        library = Library(reader, self.operator_settings(), memory_bits=memory)
        described = self._described(space, scorer, reader.checkpoints)
        found = self._searched(directory, space, library, scorer, described)
        front = [found[i] for i in pareto_front(found)]
        picks = named_picks(front)
        with self.profile("library"):
            chains = self._leave(directory, space, library, found, front, picks)
        index = self._picked(picks, len(front))
        chosen = front[index]
        log.info(
            "%d evaluations, %d modules made, %d points on the front; pick %s: performance %.4f, x_excl %.4f",
            len(found),
            library.made,
            len(front),
            self.pick,
            chosen.performance,
            chosen.storage,
        )
        model = RecombinedModel(
            backbone,
            {m.id: m for chain in chains[index].values() for m in chain},
            {
                task: [m.id for m in chains[index][task]]
                for task in modelpool.model_names
            },
            unit_bits=space.unit_bits,
            info={
                **facts,
                "components": {c.name: list(c.tensors) for c in parts},
                "chosen": chosen.as_dict(),
                "picks": {name: front[i].costs for name, i in picks.items()},
            },
        )
        return self.connect(model, modelpool)

    def _searched(
        self,
        directory: Path | None,
        space: Space,
        library: Library,
        scorer: Scorer,
        described: dict[str, Any],
    ) -> list[Evaluation]:
        """All that the search tried, in order."""
        with self.profile("search"), progress_bars(self.title) as progress:
            return nsga2(
                space,
                Evaluator(space, library, scorer),
                self.search_settings(),
                state=directory and directory / STATE,
                described=described,
                progress=lambda done, n: progress("evaluations", done - 1, n),
            )

    def _picked(self, picks: dict[str, int], points: int) -> int:
        """The point of the front that is asked for, by name or number."""
        index = picks[self.pick] if self.pick in picks else int(self.pick)
        if not -points <= index < points:
            raise SettingsError(f"pick={self.pick}: the front has {points} points.")
        return index

    def _directory(self) -> Path | None:
        """Where front, library and state go; nothing is written without a place."""
        log_dir = self.log_dir if self._program is not None else None
        place = self.directory or (log_dir and Path(log_dir) / "merge")
        if not place:
            return None
        place = from_home(place)
        front, state = place / FRONT, place / STATE
        if front.exists() and not state.exists():
            raise FileExistsError(
                f"{front} exists without a {STATE} beside it, so it may be of something else. Choose another "
                f"{spelled('directory')}, or remove it."
            )
        return place

    def _described(self, space: Space, scorer: Any, checkpoints: str) -> dict[str, Any]:
        """Facts in which a state of the search must agree to be continued."""
        return {
            "objective": self.objective,
            "validation_samples": self.validation_samples,
            "individuals": getattr(scorer, "individual", None),
            "tasks": list(space.tasks),
            "checkpoints": checkpoints,
            "components": {c.name: list(c.tensors) for c in space.components},
            "operators": list(space.operators),
            "operator_settings": asdict(self.operator_settings()),
        }

    def _leave(
        self,
        directory: Path | None,
        space: Space,
        library: Library,
        found: list[Evaluation],
        front: list[Evaluation],
        picks: dict[str, int],
    ) -> list[dict]:
        """Front, plot and library of all its modules; returns the chains of each point."""
        chains = [space.chains(np.array(e.genome), library) for e in front]
        if directory is None:
            return chains
        used = [m for point in chains for chain in point.values() for m in chain]
        save_modules(directory / "library", used)
        points = [
            {
                **e.as_dict(),
                "chains": {task: [m.id for m in chain] for task, chain in c.items()},
            }
            for e, c in zip(front, chains)
        ]
        write_json(
            directory / FRONT,
            {
                "method": self.title,
                "objective": self.objective,
                "unit_bits": space.unit_bits,
                "components": {c.name: list(c.tensors) for c in space.components},
                "operators": list(space.operators),
                "evaluations": len(found),
                "picks": picks,
                "front": points,
            },
        )
        plot_front(found, directory)
        return chains
