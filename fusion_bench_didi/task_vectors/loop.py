"""The one loop over tensors: names are worked on side by side, large ones first, and results come with progress.

Of several processes each works on the tensors that it owns, and all get all results.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from ..distributed.ownership import SOLO, Crew
from .parallel import HeapTrimmer, exclusive_if, ordered_map, workers_for
from .reader import TaskVectors

#: Called with the stage, the tensors done and the tensors in all.
Progress = Callable[[str, int, int], None]
#: Called with the tensors done and the tensors in all, of one rank and stage.
Heard = Callable[[int, int], None]
Result = TypeVar("Result")


def no_one(done: int, total: int) -> None:
    """A listener that ignores progress."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Progress that is told to nobody."""


def by_size(task_vectors: TaskVectors, names: Iterable[str]) -> list[str]:
    """Tensors in the order in which they are worked on: large ones first, ties by name."""
    infos = task_vectors.infos
    return sorted(names, key=lambda name: (-infos[name].numel, name))


def each(
    task_vectors: TaskVectors,
    stage: str,
    function: Callable[[str], Result],
    names: Iterable[str],
    *,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
    trimmer: HeapTrimmer | None = None,
    crew: Crew = SOLO,
    kept: bool = True,
) -> Iterator[tuple[str, Result]]:
    """Names and results; large tensors first, so that no core waits for one at the end, and one by one where they are huge.

    Args:
        function: of a tensor's name; called on several threads.
        trimmer: gives freed memory back between results.
        crew: who works on what; results of other ranks are copies.
        kept: as of :func:`spread`.
    """
    names = by_size(task_vectors, names)

    def one(name: str) -> Result:
        with exclusive_if(task_vectors.tensor(name).large):
            return function(name)

    def heard(done: int, total: int) -> None:
        progress(stage, done, total)
        if trimmer is not None:
            trimmer()

    workers = workers_for(device)
    return spread(crew, stage, one, names, workers=workers, kept=kept, heard=heard)


def spread(
    crew: Crew,
    stage: str,
    function: Callable[[str], Result],
    names: Iterable[str],
    *,
    workers: int = 1,
    kept: bool = True,
    heard: Heard = no_one,
) -> Iterator[tuple[str, Result]]:
    """Names and results, in the order of the names; every rank calls the function of its own.

    Args:
        kept: results are for later runs too, which do not call it again.
        heard: called after each result of this rank's own with how many came before it, and how many there will be.
    """
    names, memory = list(names), crew.memory if kept else None
    mine = crew.mine(names)
    turn = stage if memory is None else memory.stage(stage)

    def one(name: str) -> Result:
        found = None if memory is None else memory.recall(turn, name)
        if found is None:
            with crew.ranks.working(f"{name} ({stage})"):
                found = function(name)
                if memory is not None:
                    memory.record(turn, name, found)
        return found

    def results() -> Iterator[tuple[str, Result]]:
        for done, result in enumerate(ordered_map(one, mine, workers=workers)):
            heard(done, len(mine))
            yield mine[done], result
            del result  # not kept while the next is waited for

    if crew.ranks.size == 1:
        yield from results()
        return
    found = crew.ranks.gathered(dict(results()))
    for name in names:
        yield name, found.pop(name)
