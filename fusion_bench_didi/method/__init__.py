"""The classes that YAML instantiates; they hold configuration, not mathematics."""

from .baselines.bitdelta import BitDelta
from .baselines.cat import CATMerging
from .baselines.compeft import ComPEFT
from .baselines.dare import DARE
from .baselines.delta_come import DeltaCoMe
from .baselines.emr import EMRMerging
from .baselines.free import FreeMerging
from .baselines.lossless import LosslessDifference
from .baselines.randes import RanDeS
from .baselines.t_switch import TSwitch
from .baselines.tall_mask import TallMaskMerging
from .baselines.tsv_c import TSVCompression
from .baselines.tvq import TaskVectorQuantization
from .baselines.twin import TwinMerging
from .baselines.ultra_delta import UltraDelta
from .didi import DiDiMerging
from .routed import RoutedMethod
from .se_merging import SEMerging

__all__ = [
    "BitDelta",
    "CATMerging",
    "ComPEFT",
    "DARE",
    "DeltaCoMe",
    "DiDiMerging",
    "EMRMerging",
    "FreeMerging",
    "LosslessDifference",
    "RanDeS",
    "RoutedMethod",
    "SEMerging",
    "TSVCompression",
    "TSwitch",
    "TallMaskMerging",
    "TaskVectorQuantization",
    "TwinMerging",
    "UltraDelta",
]
