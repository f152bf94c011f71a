"""What is to be merged: tensors by class, their sizes, and what each costs in the precisions allowed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..allocation.spectra import Rate
from ..deltas.precision import Precision, precisions, vector_dtype
from ..deltas.storage import dtype_bits
from ..errors import BudgetError
from ..task_vectors.reader import TaskVectors
from ..task_vectors.scan import Scan
from ..task_vectors.tensor import matrix_shape
from .settings import MergeSettings


@dataclass(frozen=True)
class Inventory:
    """The tensors of one merge.

    Args:
        matrices, vectors: changed tensors by class, sorted.
        sides: (m, n) of each tensor viewed as a matrix.
        unit_bits: one fine-tuned model.
        vector_bits: what the vectors will cost.
        precisions: allowed for each matrix, cheapest first.
        vector_dtypes: of each vector.
    """

    matrices: tuple[str, ...]
    vectors: tuple[str, ...]
    sides: Mapping[str, tuple[int, int]]
    unit_bits: int
    vector_bits: int
    precisions: Mapping[str, tuple[Precision, ...]]
    vector_dtypes: Mapping[str, torch.dtype]

    def cheapest(self, name: str) -> Precision:
        """The cheapest precision of a matrix."""
        return self.precisions[name][0]

    def rate(self, name: str) -> Rate:
        """What a module of a matrix costs in its cheapest precision."""
        return self.cheapest(name).rate(*self.sides[name])

    def numel(self, name: str) -> int:
        m, n = self.sides[name]
        return m * n


def take_inventory(
    task_vectors: TaskVectors, settings: MergeSettings, scan: Scan | None = None
) -> Inventory:
    """Sort the tensors into classes and price them; without a scan every tensor counts as changed."""
    names = scan.changed if scan else list(task_vectors.infos)
    matrices = [n for n in names if task_vectors.is_matrix(n)]
    vectors = [n for n in names if not task_vectors.is_matrix(n)]
    own = {n: task_vectors.tuned_dtype(n) for n in names}
    sizes = {n: task_vectors.infos[n].numel for n in names}

    def copies(name: str) -> int:
        if settings.vectors == "expert":
            tasks = len(task_vectors.tasks)
            return int((scan.energy[name] > 0).sum()) if scan else tasks
        return int(settings.vectors == "shared")

    unit_bits = sum(sizes[n] * dtype_bits(own[n]) for n in names)
    as_is = sum(sizes[n] * dtype_bits(own[n]) * copies(n) for n in vectors)
    share = as_is / max(settings.budget.bits(unit_bits), 1)
    stored = {
        n: vector_dtype(settings.factor_dtype, own[n], share=share) for n in vectors
    }
    return Inventory(
        matrices=tuple(matrices),
        vectors=tuple(vectors),
        sides={n: matrix_shape(task_vectors.infos[n].shape) for n in names},
        unit_bits=unit_bits,
        vector_bits=sum(sizes[n] * dtype_bits(stored[n]) * copies(n) for n in vectors),
        precisions={n: precisions(settings.factor_dtype, own[n]) for n in matrices},
        vector_dtypes=stored,
    )


def matrix_budget(inventory: Inventory, settings: MergeSettings) -> int:
    """Bits left for matrices.

    Raises:
        BudgetError: with the smallest budget that holds the vectors.
    """
    left = settings.budget.bits(inventory.unit_bits) - inventory.vector_bits
    if left < 0:
        # rounded up, so that the value printed is enough
        millionths = -(-inventory.vector_bits * 10**6 // inventory.unit_bits)
        smallest = settings.budget.named(millionths / 1e6)
        raise BudgetError(
            f"budget={settings.budget.ratio} is too small: the vectors (biases, norms, ...) alone take "
            f"{smallest:.6f}. Give at least that, or store fewer with method.vectors=shared or pretrained."
        )
    return left
