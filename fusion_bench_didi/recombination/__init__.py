"""MERGE (Qiu et al., arXiv 2602.06552): which tasks share what, per component, as a search over two objectives.

A reconstruction from the abstract and a reading note of the paper; what is inferred is named where it is done.
"""

from .components import PATTERNS, Component, ComponentReader, components
from .evolution import SearchSettings
from .front import PICKS, named_picks, pareto_front, plot_front
from .library import Library, ModularExpert, load_modules, module_id, save_modules
from .model import RecombinedModel
from .objectives import Evaluation, Evaluator, ReconstructionScorer, Space, stored_bits
from .operators import OperatorSettings, rate_of
from .search import nsga2

__all__ = [
    "Component",
    "ComponentReader",
    "Evaluation",
    "Evaluator",
    "Library",
    "ModularExpert",
    "OperatorSettings",
    "PATTERNS",
    "PICKS",
    "ReconstructionScorer",
    "RecombinedModel",
    "SearchSettings",
    "Space",
    "components",
    "load_modules",
    "module_id",
    "named_picks",
    "nsga2",
    "pareto_front",
    "plot_front",
    "rate_of",
    "save_modules",
    "stored_bits",
]
