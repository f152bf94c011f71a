"""The second pass over the matrices: cut to the sizes decided on, refine, pack, and measure what was kept out."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor

from ..allocation.spectra import MatrixSpectra
from ..deltas.base import Delta
from ..deltas.plain import DenseDelta
from ..deltas.precision import Precision
from ..parallel import exclusive_if, ordered_map, workers_for
from ..task_vectors.reader import TaskVectors
from ..task_vectors.scan import Scan
from .context import Work
from .forms.experts import _experts
from .forms.tucker import Common, _in_common
from .inventory import Inventory
from .reconstruction import Stored
from .settings import MergeSettings


def second_pass(
    work: Work,
    table: Sequence[MatrixSpectra],
    ranks: Sequence[Tensor],
    precision: Mapping[str, Precision],
    common: Mapping[str, Common],
) -> Iterator[tuple[str, Stored, Tensor]]:
    """Matrix by matrix: name, stored forms (shared, one per task), and (T,) errors; the store is used up.

    Args:
        table, ranks: the matrices of experts, and (T + 1,) ranks of each.
        precision: how each of these is stored.
        common: the other matrices.
    """
    jobs = {name: partial(_in_common, work, name, c) for name, c in common.items()}
    for row, k in zip(table, ranks):
        jobs[row.name] = partial(_experts, work, row, k, precision[row.name])

    def one(name: str) -> tuple[Stored, Tensor]:
        with exclusive_if(work.task_vectors.large(name)):
            return jobs[name]()

    names = work.large_first(jobs)
    results = ordered_map(one, names, workers=workers_for(work.device))
    for i, (name, (stored, errors)) in enumerate(zip(names, results)):
        work.progress("refine", i, len(names))
        yield name, stored, errors
        del stored, errors  # not kept while the next is waited for
        work.release()


def pack_vectors(
    task_vectors: TaskVectors,
    scan: Scan,
    inventory: Inventory,
    settings: MergeSettings,
) -> Iterator[tuple[str | None, str, Delta]]:
    """Biases, norms and the like under the vector policy: task (None for all), name, delta."""
    if settings.vectors == "pretrained":
        return
    for name in inventory.vectors:
        vectors, dtype = task_vectors.read(name), inventory.vector_dtypes[name]
        shape = task_vectors.infos[name].shape
        if settings.vectors == "shared":
            yield None, name, DenseDelta(shape, vectors.mean(0).to(dtype))
            continue
        for task, tau, energy in zip(task_vectors.tasks, vectors, scan.energy[name]):
            if energy > 0:
                yield task, name, DenseDelta(shape, tau.to(dtype))
