"""DiDi-Merging (Du & Lin, "Dynamic Model Merging Made Slim", arXiv 2605.18904).

Example:

    fusion_bench method=didi modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \\
        taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from fusion_bench import auto_register_config
from fusion_bench.modelpool import BaseModelPool
from rich.progress import Progress
from torch import Tensor, nn

from ..allocation.learned import LearningSettings
from ..checkpoint.directory import whole_directory
from ..checkpoint.stream import OnDisk
from ..deltas.sink import DeltaSink
from ..lowrank.refinement import RefinementSettings
from ..merging.dry_run import describe
from ..merging.metric import input_moments
from ..merging.pipeline import merge
from ..merging.probe import probe_inputs, sensitivity
from ..merging.results import MergeResult
from ..merging.settings import Budget, MergeSettings
from ..models.dynamic import DiDiModel
from ..pools.images import load_images, require_images
from ..pools.opening import load_backbone, open_pool
from ..task_vectors.reader import TaskVectors
from .base import PoolMethod

log = logging.getLogger(__name__)


@auto_register_config
class DiDiMerging(PoolMethod):
    """One frozen backbone, one low-rank shared module and one low-rank expert per task, under one budget.

    ``W_t = W_0 + B_0 A_0 + B_t A_t``: the shared matrix is a static merge of the task vectors, experts are residuals
    (Eq. 2-3), both are cut to ranks chosen without data (Eq. 7-13) and refitted to the stored task vectors (Eq. 14-16).
    Entries of the pool may be LoRA adapters, whose task vectors stay factored throughout (``lowrank/factored.py``).
    The paper's settings are not published; ``config/method/didi.yaml`` says what each key does.

    Args: as the keys of ``config/method/didi.yaml``.

    Raises:
        ModelPoolError, CheckpointMismatchError, UnknownTaskError, BudgetError: before any weight is read.
        NonFiniteError: before any decomposition.
    """

    title = "DiDi-Merging"

    def __init__(
        self,
        budget: float = 1.4,
        budget_includes_backbone: bool = False,
        shared: str = "auto",
        shared_scale: float = 0.3,
        ties_keep: float = 0.2,
        residual: str = "truncated",
        allocation: str = "learned",
        warm_start: bool = True,
        rank_steps: int = 300,
        rank_lr: float = 0.01,
        beta_start: float = 0.5,
        beta_end: float = 10.0,
        penalty: float = 10.0,
        coupling: bool = True,
        refinement: str = "alternating",
        refine_sweeps: int = 20,
        refine_tolerance: float = 3e-5,
        refine_steps: int = 300,
        refine_lr: float = 0.01,
        normalization: str = "root",
        metric: str = "none",
        probe_samples: int = 32,
        vectors: str = "expert",
        as_vectors: Sequence[str] = (),
        exclude: Sequence[str] = (),
        factor_dtype: str = "auto",
        factor_memory_gb: float = 4.0,
        output_dir: str | None = None,
        overwrite: bool = False,
        task_aliases: Mapping[str, str] | None = None,
        dry_run: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)

    def settings(self) -> MergeSettings:
        """The configuration as the pipeline takes it.

        Raises:
            BudgetError: for an impossible budget.
        """
        return MergeSettings(
            budget=Budget(float(self.budget), bool(self.budget_includes_backbone)),
            shared=self.shared,
            shared_scale=self.shared_scale,
            ties_keep=self.ties_keep,
            residual=self.residual,
            allocation=self.allocation,
            warm_start=self.warm_start,
            learning=LearningSettings(
                steps=self.rank_steps,
                lr=self.rank_lr,
                beta_start=self.beta_start,
                beta_end=self.beta_end,
                penalty=self.penalty,
                coupled=self.coupling,
            ),
            refinement=self.refinement,
            refining=RefinementSettings(
                sweeps=self.refine_sweeps,
                tolerance=self.refine_tolerance,
                steps=self.refine_steps,
                lr=self.refine_lr,
            ),
            normalization=self.normalization,
            vectors=self.vectors,
            factor_dtype=self.factor_dtype,
            factor_memory_gb=self.factor_memory_gb,
        )

    def run(self, modelpool: Any) -> DiDiModel | None:
        """Merge the pool.

        Returns:
            the merged model; None after a dry run.
        """
        settings = self.settings()
        if self.metric not in ("none", "probes", "images"):
            raise ValueError(f"metric={self.metric!r}; choose none, probes or images.")
        modelpool = self.checked(modelpool)
        choice = {
            "exclude": tuple(self.exclude or ()),
            "as_vectors": tuple(self.as_vectors or ()),
        }
        if self.dry_run:
            print(describe(open_pool(modelpool, **choice), settings))
            return None
        with self.profile("load backbone"):
            backbone = load_backbone(modelpool)
        task_vectors = open_pool(modelpool, backbone, **choice)
        settings = self._probed(modelpool, backbone, task_vectors, settings)
        if self.output_dir is None:
            result = self._merge(task_vectors, settings)
            model = self._model(modelpool, backbone, result)
        else:
            with whole_directory(self.output_dir, overwrite=self.overwrite) as place:
                sink = OnDisk(place, tuple(modelpool.model_names))
                result = self._merge(task_vectors, settings, sink)
                model = self._model(modelpool, backbone, result)
                model.write_config(place, sink.manifest)
        self.print_profile_summary()
        log.info("relative error %.4f", result.report.relative_error)
        return self.connect(model, modelpool)

    def _probed(
        self,
        modelpool: BaseModelPool,
        backbone: nn.Module,
        task_vectors: TaskVectors,
        settings: MergeSettings,
    ) -> MergeSettings:
        """With what has to be measured by running the base model."""
        names = [n for n in task_vectors.infos if task_vectors.is_matrix(n)]
        if settings.normalization == "sensitivity":
            with self.profile("probe"):
                found = sensitivity(backbone, names, samples=self.probe_samples)
            settings = replace(settings, sensitivity=found)
        if self.metric != "none":
            with self.profile("probe"):
                inputs = self._inputs(modelpool, backbone)
                found = input_moments(backbone, names, inputs)
            settings = replace(settings, moments=found)
        return settings

    def _inputs(self, modelpool: BaseModelPool, backbone: nn.Module) -> list[Tensor]:
        """For :func:`~fusion_bench_didi.metric.input_moments`, a batch each."""
        if self.metric == "probes":
            return probe_inputs(backbone, self.probe_samples)
        tasks, options = modelpool.model_names, {"aliases": self.task_aliases}
        require_images(
            modelpool,
            **options,
            purpose="metric=images needs a few unlabelled images per task",
            otherwise=", or use metric=probes",
        )
        count = max(self.probe_samples // len(tasks), 1)
        return [load_images(modelpool, t, count, seed=0, **options) for t in tasks]

    def _merge(
        self,
        task_vectors: TaskVectors,
        settings: MergeSettings,
        sink: DeltaSink | None = None,
    ) -> MergeResult:
        with self.profile("merge"), Progress(transient=True) as bar:
            rows: dict[str, Any] = {}

            def progress(stage: str, done: int, total: int) -> None:
                if stage not in rows:
                    rows[stage] = bar.add_task(stage, total=total)
                bar.update(rows[stage], completed=done + 1, total=total)

            return merge(
                task_vectors,
                settings,
                device=self.fabric.device,
                progress=progress,
                sink=sink,
            )

    def _model(self, modelpool, backbone, result: MergeResult) -> DiDiModel:
        info = {
            **self.facts(modelpool, backbone),
            "budget": self.budget,
            "settings": asdict(self.settings()),
            "relative_error": result.report.relative_error,
            "seconds": dict(result.report.seconds),
            "ranks": asdict(result.ranks),
            "energy_kept": result.report.energy_kept,
            "energy_tasks": list(result.report.tasks),
            "precision": dict(result.report.precision),
            "common": dict(result.report.common),
        }
        return DiDiModel(
            backbone,
            result.shared,
            {name: result.experts[name] for name in modelpool.model_names},
            unit_bits=result.storage.unit_bits,
            info=info,
        )
