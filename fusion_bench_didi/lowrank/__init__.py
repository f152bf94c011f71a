"""Matrices as factors: decompositions, shared parts and refinement; pure functions on tensors."""

from .decomposition import Decomposition, decompose, half_decompose, half_of
from .factored import all_factored, as_dense, as_product, inner, subtracting, zero_like
from .factors import LowRankFactors, Matrix, Spectrum, energy_of, full_rank
from .overlap import mean_overlap, subspace_overlap
from .refinement import FactorSet, Refinement, RefinementSettings, refine
from .static_merge import SharedMerge, shared_matrix
from .subspace_iteration import subspace_step
from .svd import HalfSVD, half_svd, singular_values, sketched, spectrum
from .tucker import cores, refine_tucker, tucker_bases

__all__ = [
    "HalfSVD",
    "Decomposition",
    "LowRankFactors",
    "Matrix",
    "FactorSet",
    "Refinement",
    "RefinementSettings",
    "SharedMerge",
    "Spectrum",
    "all_factored",
    "as_dense",
    "as_product",
    "tucker_bases",
    "cores",
    "decompose",
    "energy_of",
    "full_rank",
    "half_of",
    "half_decompose",
    "inner",
    "half_svd",
    "refine",
    "refine_tucker",
    "shared_matrix",
    "mean_overlap",
    "singular_values",
    "sketched",
    "spectrum",
    "subspace_step",
    "subtracting",
    "subspace_overlap",
    "zero_like",
]
