"""Matrices as factors: decompositions, shared parts and refinement; pure functions on tensors."""

from .decomposition import Decomposition, decompose, halved, halves
from .factored import all_factored, as_dense, as_product, inner, subtracting, zero_like
from .factors import LowRankFactors, Matrix, Spectrum, energy_of, full_rank
from .overlap import sharing, togetherness
from .refinement import Modules, Refinement, RefinementSettings, refine
from .static_merge import SharedMerge, shared_matrix
from .subspace_iteration import subspace_step
from .svd import Basis, leading, singular_values, sketched, spectrum
from .tucker import common_spaces, cores, refine_common

__all__ = [
    "Basis",
    "Decomposition",
    "LowRankFactors",
    "Matrix",
    "Modules",
    "Refinement",
    "RefinementSettings",
    "SharedMerge",
    "Spectrum",
    "all_factored",
    "as_dense",
    "as_product",
    "common_spaces",
    "cores",
    "decompose",
    "energy_of",
    "full_rank",
    "halved",
    "halves",
    "inner",
    "leading",
    "refine",
    "refine_common",
    "shared_matrix",
    "sharing",
    "singular_values",
    "sketched",
    "spectrum",
    "subspace_step",
    "subtracting",
    "togetherness",
    "zero_like",
]
