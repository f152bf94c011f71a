"""The mathematics: pure functions on tensors. No files, no models, no devices by name."""

from .allocation import (
    Allocation,
    MatrixSpectra,
    Price,
    greedy,
    spectra_of,
    total_cost,
    uniform,
    whole_from,
)
from .candidates import Candidate, Offer, choose, sharing, upgrade
from .common import (
    CommonOffer,
    common_spaces,
    cores,
    refine_common,
    togetherness,
)
from .decomposition import (
    Decomposition,
    SharedMerge,
    decompose,
    halved,
    halves,
    shared_matrix,
)
from .factored import all_factored, as_dense, as_product, inner, subtracting, zero_like
from .factors import LowRankFactors, Matrix, Spectrum, energy_of, full_rank
from .learning import LearningSettings, learn_ranks, truncation_error
from .refinement import Modules, Refinement, RefinementSettings, refine
from .subspace import subspace_step
from .svd import (
    Basis,
    leading,
    singular_values,
    sketched,
    spectrum,
)

__all__ = [
    "Allocation",
    "Basis",
    "Candidate",
    "CommonOffer",
    "Decomposition",
    "LearningSettings",
    "LowRankFactors",
    "Matrix",
    "MatrixSpectra",
    "Modules",
    "Offer",
    "Price",
    "Refinement",
    "RefinementSettings",
    "SharedMerge",
    "Spectrum",
    "all_factored",
    "as_dense",
    "as_product",
    "choose",
    "common_spaces",
    "cores",
    "decompose",
    "energy_of",
    "full_rank",
    "greedy",
    "inner",
    "halved",
    "halves",
    "leading",
    "learn_ranks",
    "refine",
    "refine_common",
    "shared_matrix",
    "sharing",
    "singular_values",
    "sketched",
    "spectra_of",
    "spectrum",
    "subspace_step",
    "subtracting",
    "togetherness",
    "total_cost",
    "truncation_error",
    "uniform",
    "upgrade",
    "whole_from",
    "zero_like",
]
