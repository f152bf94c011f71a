"""What a budget is, and what the tensors cost under it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..allocation.learned import LearningSettings
from ..allocation.water_filling import Allocation
from ..deltas.precision import precisions
from ..errors import BudgetError
from ..lowrank.refinement import Refinement, RefinementSettings
from ..lowrank.static_merge import SharedMerge

Normalization = Literal[
    "none", "task", "root", "matrix", "base", "depth", "sensitivity"
]


Residual = Literal["truncated", "full"]


Shared = Literal["auto", "mean", "task_arithmetic", "ties", "subspaces", "none"]


VectorPolicy = Literal["expert", "shared", "pretrained"]


@dataclass(frozen=True)
class Budget:
    """Stored values in units of one fine-tuned model.

    Args:
        ratio: the budget.
        include_backbone: the ratio counts the backbone too, so that ``ratio - 1`` is left for the modules.

    Raises:
        BudgetError: for a ratio that leaves nothing.
    """

    ratio: float
    include_backbone: bool = False

    def __post_init__(self):
        floor = 1.0 if self.include_backbone else 0.0
        if not math.isfinite(self.ratio) and self.ratio != math.inf:
            raise BudgetError(f"budget={self.ratio} is not a number.")
        if self.ratio <= floor:
            hint = (
                "it counts the backbone (budget_includes_backbone=true), which alone is 1"
                if self.include_backbone
                else "it is what is stored beyond the backbone"
            )
            raise BudgetError(
                f"budget={self.ratio} leaves nothing to store: {hint}. Give a value above {floor:g}, 1.4 for instance."
            )

    def bits(self, unit_bits: int) -> int:
        """The bits that may be stored beyond the backbone."""
        ratio = self.ratio - 1.0 if self.include_backbone else self.ratio
        return 2**62 if math.isinf(ratio) else math.floor(ratio * unit_bits)

    def named(self, excl: float) -> float:
        """A ratio beyond the backbone in this budget's own reading."""
        return excl + 1.0 if self.include_backbone else excl


@dataclass(frozen=True)
class MergeSettings:
    """Every choice of the merge; ``config/method/didi.yaml`` says what each does.

    Args:
        shared: what tasks may share: a static merge of the task vectors cut to a rank, common ``subspaces``, either of the
            mean and these (``auto``), or nothing.
        residual: experts are what is left of the task vector by the shared part as it is stored (``truncated``), or by
            the whole shared matrix (``full``, Eq. 3 of the paper).
        normalization: weight of a squared error: ``none`` 1 (plain MSE); ``task`` 1 / (energy of the task);
            ``matrix`` 1 / (energy of this matrix of the task), the relative error; ``root`` the geometric mean of
            ``none`` and ``matrix``; ``base`` 1 / (energy of the base model's matrix); ``depth`` as ``root``, divided by the
            number of the block; ``sensitivity`` by how much the output reacts to the matrix (``probe.py``).
        sensitivity: per matrix, for that normalization; matrices that are missing count like the average one.
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
    normalization: Normalization = "root"
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
            ("normalization", self.normalization, get_args(Normalization)),
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
