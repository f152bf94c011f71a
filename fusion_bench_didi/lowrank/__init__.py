"""The mathematics: pure functions on tensors. No files, no models, no devices by name."""

from .allocation import (
    Allocation,
    MatrixSpectra,
    Price,
    greedy,
    spectra_of,
    total_cost,
    uniform,
)
from .candidates import Candidate, choose, upgrade, water_level
from .decomposition import Decomposition, SharedMerge, decompose, shared_matrix
from .factors import LowRankFactors, Spectrum, full_rank
from .learning import LearningSettings, learn_ranks, truncation_error
from .refinement import Modules, Refinement, RefinementSettings, refine
from .svd import singular_values, spectrum, subspace_step

__all__ = [
    "Allocation",
    "Candidate",
    "Decomposition",
    "LearningSettings",
    "LowRankFactors",
    "MatrixSpectra",
    "Modules",
    "Price",
    "Refinement",
    "RefinementSettings",
    "SharedMerge",
    "Spectrum",
    "choose",
    "decompose",
    "full_rank",
    "greedy",
    "learn_ranks",
    "refine",
    "shared_matrix",
    "singular_values",
    "spectra_of",
    "spectrum",
    "subspace_step",
    "total_cost",
    "truncation_error",
    "uniform",
    "upgrade",
    "water_level",
]
