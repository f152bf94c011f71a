"""The classes that YAML instantiates; they hold configuration, not mathematics."""

from .baselines.bitdelta import BitDelta
from .baselines.cat import CATMerging
from .baselines.dare import DARE
from .baselines.emr import EMRMerging
from .baselines.free import FreeMerging
from .baselines.tall_mask import TallMaskMerging
from .baselines.tsv_c import TSVCompression
from .baselines.twin import TwinMerging
from .didi import DiDiMerging
from .routed import RoutedMethod
from .se_merging import SEMerging

__all__ = [
    "BitDelta",
    "CATMerging",
    "DARE",
    "DiDiMerging",
    "EMRMerging",
    "FreeMerging",
    "RoutedMethod",
    "SEMerging",
    "TSVCompression",
    "TallMaskMerging",
    "TwinMerging",
]
