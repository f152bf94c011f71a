"""DiDi-Merging (Du & Lin, "Dynamic Model Merging Made Slim", arXiv 2605.18904).

Example:

    fusion_bench method=didi modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \\
        taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8
"""

import logging
from dataclasses import asdict
from typing import Any

from fusion_bench import auto_register_config
from fusion_bench.modelpool import BaseModelPool

from ..allocation.water_filling import Allocation
from ..checkpoint.journal import Journal
from ..deltas.precision import FactorType
from ..deltas.sink import Sink
from ..errors import CheckpointMismatchError
from ..lowrank.arithmetic import own_arithmetic
from ..lowrank.refinement import Refinement
from ..merging.dry_run import describe
from ..merging.pipeline import merge
from ..merging.settings import (
    Gain,
    MergeSettings,
    Normalization,
    Residual,
    Shared,
    VectorPolicy,
)
from ..models import DiDiModel
from ..options import (
    Aliases,
    Count,
    FilePath,
    Gigabytes,
    NonNegative,
    Patterns,
    Positive,
    PositiveCount,
    Scale,
    Share,
)
from ..pools.opening import load_backbone, open_pool
from ..quantization.dead_zone import Quantizer
from ..task_vectors.alignment import codes
from ..task_vectors.reader import TaskVectors
from .base import Encoded, PoolMethod, Resume, progress_bars

log = logging.getLogger(__name__)


@auto_register_config
class DiDiMerging(PoolMethod):
    """One frozen backbone, one low-rank shared module and one low-rank expert per task, under one budget.

    ``W_t = W_0 + B_0 A_0 + B_t A_t``: the shared matrix is a static merge of the task vectors, experts are residuals
    (Eq. 2-3), both are cut to ranks chosen without data (Eq. 7-13) and refitted to the stored task vectors (Eq. 14-16).
    Entries of the pool may be LoRA adapters, whose task vectors stay factored throughout (``lowrank/factored.py``).
    The paper's settings are not published; ``config/method/didi.yaml`` says what each key does. Its defaults are ours;
    ``config/method/didi/paper.yaml`` is what the paper says, with what had to be inferred named there.

    Args: as the keys of ``config/method/didi.yaml``, which ``didi settings didi`` prints.

    Raises:
        SettingsError, BudgetError: at construction.
        ModelPoolError, CheckpointMismatchError, UnknownTaskError, BudgetError: before any weight is read.
        NonFiniteError: before any decomposition.
    """

    title = "DiDi-Merging"
    model_class = DiDiModel

    def __init__(
        self,
        budget: float = 1.4,
        budget_includes_backbone: bool = False,
        shared: Shared = "auto",
        shared_scale: Scale = 0.3,
        ties_keep: Share = 0.2,
        residual: Residual = "truncated",
        allocation: Allocation = "greedy",
        warm_start: bool = True,
        rank_steps: Count = 300,
        rank_lr: Positive = 0.01,
        beta_start: Positive = 0.5,
        beta_end: Positive = 10.0,
        penalty: NonNegative = 10.0,
        coupling: bool = True,
        rank_shift: Scale = 0.5,
        rank_fallback: bool = True,
        refinement: Refinement = "alternating",
        refine_sweeps: Count = 20,
        refine_tolerance: NonNegative = 3e-5,
        refine_steps: Count = 300,
        refine_lr: Positive = 0.01,
        normalization: Normalization = "root",
        vectors: VectorPolicy = "expert",
        as_vectors: Patterns = (),
        own: Patterns = (),
        exclude: Patterns = (),
        factor_dtype: FactorType = "auto",
        max_rank: PositiveCount | None = None,
        quantizer: Quantizer = "scalar",
        gain: Gain = "auto",
        factor_memory_gb: Gigabytes = 4.0,
        output_dir: FilePath | None = None,
        overwrite: bool = False,
        resume: Resume = "continue",
        task_aliases: Aliases = None,
        dry_run: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.settings()
        self.tensor_patterns()

    def settings(self) -> MergeSettings:
        """The configuration as the pipeline takes it.

        Raises:
            BudgetError: for an impossible budget.
            SettingsError: for values that are not there, or have no effect.
        """
        return MergeSettings.of(vars(self))

    def run(self, modelpool: Any) -> DiDiModel | None:
        """Merge the pool.

        Returns:
            the merged model; None after a dry run.
        """
        with self.together():
            modelpool = self.checked(modelpool)
            if self.dry_run:
                if self.processes.leads:
                    self._tell(modelpool)
                return None
            model = self.merged(modelpool)
        return self.connect(model, modelpool)

    def _tell(self, modelpool: BaseModelPool) -> None:
        """Print what the merge would store."""
        vectors = _by_headers(modelpool, self.tensor_patterns())
        streamed = self.output_dir is not None
        with own_arithmetic():
            print(describe(vectors, self.settings(), streamed=streamed))

    def encoded(
        self, task_vectors: TaskVectors, sink: Sink, journal: Journal | None
    ) -> Encoded:
        ranks, settings = self.processes, self.settings()
        bars = progress_bars(self.title, ranks)
        with self.profile("merge"), bars as progress:
            result = merge(
                task_vectors,
                settings,
                device=self.fabric.device,
                progress=progress,
                sink=sink,
                ranks=ranks,
                journal=journal,
            )
        facts = {"budget": self.budget, "settings": asdict(settings), **result.facts()}
        bits = result.storage.unit_bits
        return Encoded(result.shared, result.experts, bits, facts)


def _by_headers(modelpool: BaseModelPool, choice: dict[str, Any]) -> TaskVectors:
    """The pool without a weight read; but where headers alone do not line up, or hold codes of other numbers, as its classes load
    them, which tie tensors, give them other names, and may not read such numbers.
    """
    try:
        vectors = open_pool(modelpool, **choice)
        if not codes(vectors.base):
            return vectors
    except CheckpointMismatchError:
        pass
    log.info("Headers alone do not tell what is merged; the base model is loaded.")
    return open_pool(modelpool, load_backbone(modelpool), **choice)
