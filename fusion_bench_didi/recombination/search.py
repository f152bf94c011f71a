"""Surrogate-assisted NSGA-II over decisions.

One generation: fit the surrogate to everything evaluated so far; run NSGA-II on it from the current population (guessed
performance against nominal storage, which needs no model); evaluate for real the ``population`` best of its end that are
new; keep the best ``population`` of old and new by rank and crowding.

pymoo does the sorting, crowding, tournaments and the inner run, because its operators may be ours: a partition of the tasks
is no list of independent variables, which is all that optuna's NSGA-II sampler knows how to cross. The outer loop is ours
so that its whole state is the list of evaluations; every generation draws from its own seed, hence a killed search goes on
to the result of an unbroken one.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path

import numpy as np

from ..checkpoint.directory import alone, write_json
from ..checkpoint.fields import Field, read_object, sealed
from ..errors import DiDiError, spelled
from .evolution import SearchSettings, evolve, survivors
from .genome import Genome, canonical, mutate, no_merging, one_group, random_genome
from .objectives import Evaluation, Space
from .surrogate import fitted

Evaluate = Callable[[Genome], Evaluation]
Progress = Callable[[int, int], None]


def first_population(space: Space, size: int, rng: np.random.Generator) -> list:
    """All together and each for itself under every operator, then random decisions."""
    C, T, O = space.shape
    start = [make(C, T, o) for o in range(O) for make in (one_group, no_merging)]
    found = [canonical(g, space.alone) for g in start]
    draw = _fresh(lambda: _draw(space, rng), found)
    return [*_distinct(found), *islice(draw, size)][:size]


def nsga2(
    space: Space,
    evaluate: Evaluate,
    settings: SearchSettings,
    *,
    state: Path | None = None,
    described: dict | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Evaluation]:
    """Everything that was evaluated, in order.

    Args:
        state: file that is written after each generation and continued if it exists.
        described: what else a state must agree in to be continued (tasks, data, ...), JSON-plain.

    Raises:
        DiDiError: if the state is of another search, cannot be read, or another run is writing it.
    """
    label = {**asdict(settings), **(described or {})}
    del label["evaluations"]  # more of them continue a search that ended
    with nullcontext() if state is None else alone(state):
        archive, kept, generation = _load(state, label, space)
        while len(archive) < settings.evaluations:
            rng = np.random.default_rng([settings.seed, generation])
            room = min(settings.population, settings.evaluations - len(archive))
            if generation == 0:
                proposed = first_population(space, room, rng)
            else:
                proposed = _propose(space, archive, kept, room, settings, generation)
            if not proposed:
                break  # every decision was evaluated
            for genome in proposed:
                archive.append(evaluate(genome))
                progress(len(archive), settings.evaluations)
            young = range(len(archive) - len(proposed), len(archive))
            pool = [*kept, *young]
            costs = np.array([archive[i].costs for i in pool])
            kept = [pool[i] for i in survivors(costs, settings.population)]
            generation += 1
            _save(state, label, archive, kept, generation)
    return archive


def _draw(space: Space, rng: np.random.Generator) -> Genome:
    return canonical(random_genome(rng, *space.shape), space.alone)


def _fresh(make: Callable[[], Genome], seen: list[Genome]) -> Iterator[Genome]:
    """New genomes until a thousand in a row were seen before: a small space is exhausted some time."""
    known, misses = {g.tobytes() for g in seen}, 0
    while misses < 1000:
        genome = make()
        misses += 1
        if genome.tobytes() not in known:
            known.add(genome.tobytes())
            misses = 0
            yield genome


def _distinct(genomes: list[Genome]) -> list[Genome]:
    return list({g.tobytes(): g for g in genomes}.values())


def _propose(
    space: Space,
    archive: list[Evaluation],
    kept: list[int],
    count: int,
    settings: SearchSettings,
    generation: int,
) -> list[Genome]:
    """New decisions that the surrogate likes best."""
    seed = int(np.random.SeedSequence([settings.seed, generation]).generate_state(1)[0])
    genomes = [np.array(e.genome) for e in archive]
    performance = [e.performance for e in archive]
    guessed = fitted(
        space, genomes, performance, trees=settings.trees, seed=seed % 2**31
    )

    def guess(candidates: list[Genome]) -> np.ndarray:
        storage = space.nominal_storage(np.stack(candidates))
        return np.column_stack([1 - guessed(candidates), storage])

    ended = evolve(space, [genomes[i] for i in kept], guess, settings, seed)
    seen = {g.tobytes() for g in genomes}
    fresh = [g for g in _distinct(ended) if g.tobytes() not in seen]
    rng = np.random.default_rng([settings.seed, generation, 1])
    rate = settings.mutation_rate / space.shape[0]

    def child() -> Genome:
        parent = genomes[kept[rng.integers(len(kept))]]
        made = mutate(parent, rng, operators=space.shape[2], rate=rate)
        return canonical(made, space.alone)

    missing = max(count - len(fresh), 0)
    fresh += islice(_fresh(child, [*genomes, *fresh]), missing)
    if not fresh:
        return []
    return [fresh[i] for i in survivors(guess(fresh), count)]


def _load(
    state: Path | None, label: dict, space: Space
) -> tuple[list[Evaluation], list[int], int]:
    if state is None or not state.is_file():
        return [], [], 0
    found = Field(state, read_object(state, finite=False))
    there = found["search"].mapping()
    expected = json.loads(json.dumps(label))
    if there != expected:
        differ = sorted(
            k for k in {*there, *expected} if there.get(k) != expected.get(k)
        )
        raise DiDiError(
            f"{state} is of another search ({', '.join(differ)} differ). "
            f"Choose another {spelled('directory')}, or remove the file to search anew."
        )
    archive = [_evaluation(e, space) for e in found["evaluations"].elements()]
    kept = [i.integer(0, len(archive) - 1) for i in found["kept"].elements()]
    if archive and not kept:
        found["kept"].fail("some evaluations")
    return archive, kept, found["generation"].integer(1)


def _evaluation(field: Field, space: Space) -> Evaluation:
    """An evaluation as it comes from a file."""
    if sorted(field.mapping()) != sorted(f.name for f in fields(Evaluation)):
        field.fail("an evaluation")
    C, T, O = space.shape
    genome = field["genome"].elements()
    for component in genome:
        rows = [[i.integer() for i in row.elements()] for row in component.elements()]
        shaped = [len(row) for row in rows] == [T, T]
        if not shaped or max(rows[0]) >= T or max(rows[1]) >= O:
            component.fail(f"groups and operators of {T} tasks")
    if len(genome) != C:
        field["genome"].fail(f"{C} components")
    numbers = [field["performance"], field["storage"]]
    numbers += [score for _, score in field["scores"].entries()]
    for number in numbers:
        number.number()
    return Evaluation(**field.mapping())


def _save(state, label, archive, kept, generation) -> None:
    if state is None:
        return
    found = {
        "search": label,
        "generation": generation,
        "kept": kept,
        "evaluations": [e.as_dict() for e in archive],
    }
    write_json(state, sealed(found, finite=False))
