"""The mathematics of the methods that DiDi is compared with: pure functions on tensors."""

from .cat import normalized_inputs, removal_basis, without_conflicts, without_directions
from .free import compensation, high_pass, ideal_filter, released_filter, top_of_rows
from .singular import rank_of, stored_dense, truncated
from .tall_mask import elected_sum, task_mask, trim, trim_threshold

__all__ = [
    "elected_sum",
    "compensation",
    "high_pass",
    "ideal_filter",
    "normalized_inputs",
    "rank_of",
    "released_filter",
    "removal_basis",
    "stored_dense",
    "task_mask",
    "top_of_rows",
    "trim",
    "trim_threshold",
    "truncated",
    "without_conflicts",
    "without_directions",
]
