"""The choices of a merge, and what the tensors cost under them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from .budget import Budget, dtype_bits
from .errors import BudgetError
from .lowrank import (
    Allocation,
    LearningSettings,
    Refinement,
    RefinementSettings,
    SharedMerge,
)
from .precision import Precision, precisions, vector_dtype
from .task_vectors import Scan, TaskVectors, matrix_shape

Normalisation = Literal[
    "none", "task", "root", "matrix", "base", "depth", "sensitivity"
]
Residual = Literal["truncated", "full"]
Shared = Literal["auto", "mean", "task_arithmetic", "ties", "subspaces", "none"]
VectorPolicy = Literal["expert", "shared", "pretrained"]


@dataclass(frozen=True)
class MergeSettings:
    """Every choice of the merge; ``config/method/didi.yaml`` says what each does.

    Args:
        shared: what tasks may share: a static merge of the task vectors cut to a rank, common ``subspaces``, either of the
            mean and these (``auto``), or nothing.
        residual: experts are what is left of the task vector by the shared part as it is stored (``truncated``), or by
            the whole shared matrix (``full``, Eq. 3 of the paper).
        normalisation: weight of a squared error: ``none`` 1 (plain MSE); ``task`` 1 / (energy of the task);
            ``matrix`` 1 / (energy of this matrix of the task), the relative error; ``root`` the geometric mean of
            ``none`` and ``matrix``; ``base`` 1 / (energy of the base model's matrix); ``depth`` as ``root``, divided by the
            number of the block; ``sensitivity`` by how much the output reacts to the matrix (``probe.py``).
        sensitivity: per matrix, for that normalisation; matrices that are missing count like the average one.
        moments: per matrix, second moments (n, n) of its inputs by which errors are weighed (``metric.py``).
        factor_dtype: one of ``precision.NAMES``.
    """

    budget: Budget
    shared: Shared = "auto"
    shared_scale: float = 0.3
    ties_keep: float = 0.2
    residual: Residual = "truncated"
    allocation: Allocation = "learned"
    refinement: Refinement = "alternating"
    normalisation: Normalisation = "root"
    vectors: VectorPolicy = "expert"
    factor_dtype: str = "auto"
    learning: LearningSettings = LearningSettings()
    warm_start: bool = True
    refining: RefinementSettings = RefinementSettings()
    factor_memory_gb: float = 4.0
    sensitivity: Mapping[str, float] | None = None
    moments: Mapping[str, torch.Tensor] | None = None

    def __post_init__(self):
        for name, value, allowed in (
            ("shared", self.shared, get_args(Shared)),
            ("residual", self.residual, get_args(Residual)),
            ("allocation", self.allocation, get_args(Allocation)),
            ("refinement", self.refinement, get_args(Refinement)),
            ("normalisation", self.normalisation, get_args(Normalisation)),
            ("vectors", self.vectors, get_args(VectorPolicy)),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}; choose one of {allowed}.")
        precisions(self.factor_dtype, torch.float32)

    @property
    def static(self) -> SharedMerge:
        """How the shared matrix is made, if there may be one."""
        named = {"auto": "mean", "subspaces": "none"}
        return named.get(self.shared, self.shared)

    @property
    def in_common(self) -> bool:
        """Whether matrices may be stored in common subspaces."""
        return self.shared in ("auto", "subspaces") and self.residual == "truncated"

    @property
    def joint(self) -> bool:
        """Whether shared ranks or precisions are chosen per matrix before the experts' ranks."""
        splits = self.residual == "truncated" and self.shared != "none"
        return (splits and self.allocation != "uniform") or self.factor_dtype == "auto"


@dataclass(frozen=True)
class Layout:
    """What is to be merged, known after one read of the files.

    Args:
        matrices, vectors: changed tensors by class, sorted.
        unit_bits: one fine-tuned model.
        vector_bits: what the vectors will cost.
        precisions: allowed for each matrix.
        vector_dtypes: of each vector.
    """

    matrices: tuple[str, ...]
    vectors: tuple[str, ...]
    unit_bits: int
    vector_bits: int
    precisions: Mapping[str, tuple[Precision, ...]]
    vector_dtypes: Mapping[str, torch.dtype]


def lay_out(
    task_vectors: TaskVectors, settings: MergeSettings, scan: Scan | None
) -> Layout:
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
    return Layout(
        matrices=tuple(matrices),
        vectors=tuple(vectors),
        unit_bits=unit_bits,
        vector_bits=sum(sizes[n] * dtype_bits(stored[n]) * copies(n) for n in vectors),
        precisions={n: precisions(settings.factor_dtype, own[n]) for n in matrices},
        vector_dtypes=stored,
    )


def matrix_budget(layout: Layout, settings: MergeSettings) -> int:
    """Bits left for low-rank modules.

    Raises:
        BudgetError: with the smallest budget that holds the vectors.
    """
    left = settings.budget.bits(layout.unit_bits) - layout.vector_bits
    if left < 0:
        # rounded up, so that the value printed is enough
        millionths = -(-layout.vector_bits * 10**6 // layout.unit_bits)
        smallest = settings.budget.named(millionths / 1e6)
        raise BudgetError(
            f"budget={settings.budget.ratio} is too small: the vectors (biases, norms, ...) alone take "
            f"{smallest:.6f}. Give at least that, or store fewer with method.vectors=shared or pretrained."
        )
    return left


def matrix_price(layout: Layout, task_vectors: TaskVectors, name: str):
    """The price of a matrix in its cheapest precision."""
    return layout.precisions[name][0].price(
        *matrix_shape(task_vectors.infos[name].shape)
    )
