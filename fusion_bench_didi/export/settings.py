"""How adapters are made."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..errors import SettingsError
from ..options import PositiveCount, check_fields

#: The largest rank that vLLM's kernels are made for.
MOST_PADDED = 512
#: The type of 8 bits that readers of adapters cast from; of integers none takes scales.
EIGHT_BITS = "float8_e4m3fn"


@dataclass(frozen=True)
class AdapterSettings:
    """How adapters are made.

    Args:
        shared: what all tasks share is in every adapter (``concat``), or in a base checkpoint beside them (``fold``).
        max_rank: of any module of an adapter; no limit if None.
        pad_rank: all modules of one rank, filled up with zeros, for servers that know no other; at most 512.
        factor_dtype: of the factors; the base model's if None. In ``float8_e4m3fn`` they take half the bytes of bfloat16,
            and rounding loses some per cent of every change.
        carry: ``linear``: layers that servers read; ``all``: also convolutions, embeddings, norms and biases, which PEFT
            reads.

    Raises:
        SettingsError: for values that are none of these, or contradict each other.
    """

    shared: Literal["concat", "fold"] = "concat"
    max_rank: PositiveCount | None = None
    pad_rank: bool = False
    factor_dtype: Literal["float32", "bfloat16", "float16", "float8_e4m3fn"] | None = (
        None
    )
    carry: Literal["linear", "all"] = "linear"

    def __post_init__(self):
        check_fields(self)
        if self.pad_rank and (self.max_rank or 0) > MOST_PADDED:
            raise SettingsError(
                f"max_rank={self.max_rank} with pad_rank: servers of one rank per adapter go to {MOST_PADDED}. Give at most that."
            )

    @property
    def limit(self) -> int | None:
        """The largest rank of a module."""
        return MOST_PADDED if self.pad_rank and not self.max_rank else self.max_rank

    def dtype(self, model: nn.Module) -> torch.dtype:
        """Type of an adapter's factors before they are rounded to 8 bits."""
        if self.factor_dtype == EIGHT_BITS:
            return torch.float32
        if self.factor_dtype is not None:
            return getattr(torch, self.factor_dtype)
        return next(p.dtype for p in model.parameters() if p.is_floating_point())
