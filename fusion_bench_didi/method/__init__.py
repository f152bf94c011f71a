"""The classes that YAML instantiates; they hold configuration, not mathematics."""

from .cat import CATMerging
from .didi import DiDiMerging
from .emr import EMRMerging
from .free import FreeMerging
from .routed import RoutedMethod
from .se_merging import SEMerging
from .tall_mask import TallMaskMerging
from .tsv_c import TSVCompression
from .twin import TwinMerging

__all__ = [
    "CATMerging",
    "DiDiMerging",
    "EMRMerging",
    "FreeMerging",
    "RoutedMethod",
    "SEMerging",
    "TSVCompression",
    "TallMaskMerging",
    "TwinMerging",
]
