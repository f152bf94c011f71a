"""What a budget is, and what the tensors cost under it."""

import math
from dataclasses import dataclass

import torch

from .errors import BudgetError


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


def dtype_bits(dtype: torch.dtype) -> int:
    return 8 * torch.empty((), dtype=dtype).element_size()
