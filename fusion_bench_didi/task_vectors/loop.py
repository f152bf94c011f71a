"""The one loop over tensors: names are worked on side by side, large ones first, and results come with progress."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from .parallel import HeapTrimmer, exclusive_if, ordered_map, workers_for
from .reader import TaskVectors

#: Called with the stage, the tensors done and the tensors in all.
Progress = Callable[[str, int, int], None]
Result = TypeVar("Result")


def no_progress(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


def each(
    task_vectors: TaskVectors,
    stage: str,
    function: Callable[[str], Result],
    names: Iterable[str],
    *,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
    trimmer: HeapTrimmer | None = None,
) -> Iterator[tuple[str, Result]]:
    """Names and results; large tensors first, so that no core waits for one at the end, and one by one where they are huge.

    Args:
        function: of a tensor's name; called on several threads.
        trimmer: gives freed memory back between results.
    """
    infos = task_vectors.infos
    names = sorted(names, key=lambda name: (-infos[name].numel, name))

    def one(name: str) -> Result:
        with exclusive_if(task_vectors.tensor(name).large):
            return function(name)

    results = ordered_map(one, names, workers=workers_for(device))
    for done, (name, result) in enumerate(zip(names, results)):
        progress(stage, done, len(names))
        yield name, result
        del result  # not kept while the next is waited for
        if trimmer is not None:
            trimmer()
