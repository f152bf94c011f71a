"""Every choice of a merge, refused at birth where it is none of those there are or has no effect."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..allocation.learned import LearningSettings
from ..allocation.water_filling import Allocation
from ..deltas.precision import FactorType
from ..errors import BudgetError, SettingsError
from ..lowrank.refinement import Refinement, RefinementSettings
from ..lowrank.static_merge import SharedMerge
from ..options import Gigabytes, PositiveCount, Scale, Share, check_fields
from ..quantization.dead_zone import Quantizer

#: Whether directions of coded experts are made as long as they were, which few bits shorten.
Gain = Literal["auto", "none"]
#: Weight of a squared error: ``none`` is 1, ``matrix`` one over the energy of the task's matrix, ``root`` the geometric mean of both.
Normalization = Literal["none", "root", "matrix"]
#: What experts are residuals to: the shared part as it is stored, or the whole shared matrix (Eq. 3 of the paper).
Residual = Literal["truncated", "full"]
#: What tasks may share: a static merge of the task vectors cut to a rank (``mean``, ``task_arithmetic``, ``ties``), the bases of a
#: Tucker-2 form (``subspaces``), per matrix the better of mean and these (``auto``), or nothing.
Shared = Literal["auto", "mean", "task_arithmetic", "ties", "subspaces", "none"]
#: Biases, norms and other vectors: one copy per task, their mean for all, or the base model's.
VectorPolicy = Literal["expert", "shared", "pretrained"]

#: Keys of the YAML for the fields of the two groups of settings.
LEARNING_KEYS = {
    "steps": "rank_steps",
    "lr": "rank_lr",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "penalty": "penalty",
    "coupled": "coupling",
    "shift": "rank_shift",
    "fallback": "rank_fallback",
}
REFINING_KEYS = {
    "sweeps": "refine_sweeps",
    "tolerance": "refine_tolerance",
    "steps": "refine_steps",
    "lr": "refine_lr",
}
#: What is read at one value of another setting only: that setting, and the value.
_READ_WITH = {
    **dict.fromkeys((*LEARNING_KEYS.values(), "warm_start"), ("allocation", "learned")),
    **dict.fromkeys(
        ("refine_sweeps", "refine_tolerance"), ("refinement", "alternating")
    ),
    **dict.fromkeys(("refine_steps", "refine_lr"), ("refinement", "adam")),
    **dict.fromkeys(("gain", "quantizer"), ("factor_dtype", "auto")),
    "shared_scale": ("shared", "task_arithmetic"),
    "ties_keep": ("shared", "ties"),
}


@dataclass(frozen=True)
class Budget:
    """Stored values in units of one fine-tuned model.

    Args:
        ratio: the budget.
        include_backbone: the ratio counts the backbone too, so that ``ratio - 1`` is left for the modules.

    Raises:
        BudgetError: for a ratio that leaves nothing.
    """

    ratio: float
    include_backbone: bool = False

    def __post_init__(self):
        check_fields(self)
        floor = 1.0 if self.include_backbone else 0.0
        if not math.isfinite(self.ratio) and self.ratio != math.inf:
            raise BudgetError(f"budget={self.ratio} is not a number.")
        if self.ratio <= floor:
            hint = (
                "it counts the backbone (budget_includes_backbone=true), which alone is 1"
                if self.include_backbone
                else "it is what is stored beyond the backbone"
            )
            raise BudgetError(
                f"budget={self.ratio} leaves nothing to store: {hint}. Give a value above {floor:g}, 1.4 for instance."
            )

    def bits(self, unit_bits: int) -> int:
        """The bits that may be stored beyond the backbone."""
        ratio = self.ratio - 1.0 if self.include_backbone else self.ratio
        return math.floor(min(ratio * unit_bits, 2.0**62))

    def named(self, excl: float) -> float:
        """A ratio beyond the backbone in this budget's own reading."""
        return excl + 1.0 if self.include_backbone else excl


@dataclass(frozen=True)
class MergeSettings:
    """Every choice of the merge; ``config/method/didi.yaml`` says what each does, and so do the types of those that name ways.

    Args:
        max_rank: of what a task changes in any matrix, the shared part and its expert together; no matrix is stored whole
            then. What adapters of that rank carry.
        quantizer: of coded experts: every number by itself (``scalar``), or rows along a ``trellis``, which saves 5 to 8 % of the
            bytes at equal error and takes two to three times as long to merge.
        gain: ``auto`` makes every direction of coded experts as long as rounding found it; ``none`` leaves them at the least
            squared error, which is shorter.

    Raises:
        SettingsError: naming every value that is none of those there are, and every one that has no effect beside the
            others, with what would give it one.
    """

    budget: Budget
    shared: Shared = "auto"
    shared_scale: Scale = 0.3
    ties_keep: Share = 0.2
    residual: Residual = "truncated"
    allocation: Allocation = "greedy"
    refinement: Refinement = "alternating"
    normalization: Normalization = "root"
    vectors: VectorPolicy = "expert"
    factor_dtype: FactorType = "auto"
    quantizer: Quantizer = "scalar"
    gain: Gain = "auto"
    learning: LearningSettings = LearningSettings()
    warm_start: bool = True
    refining: RefinementSettings = RefinementSettings()
    factor_memory_gb: Gigabytes = 4.0
    max_rank: PositiveCount | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "MergeSettings":
        """From all keys of ``config/method/didi.yaml``; others are left alone.

        Raises:
            BudgetError, SettingsError: as by the classes.
        """
        names = {f.name for f in fields(cls)} - {"budget", "learning", "refining"}
        learning = {name: given[key] for name, key in LEARNING_KEYS.items()}
        refining = {name: given[key] for name, key in REFINING_KEYS.items()}
        return cls(
            budget=Budget(given["budget"], given["budget_includes_backbone"]),
            learning=LearningSettings(**learning),
            refining=RefinementSettings(**refining),
            **{name: given[name] for name in names},
        )

    def __post_init__(self):
        check_fields(self)
        faults = [*self._at_odds(), *self._without_effect()]
        if faults:
            raise SettingsError(
                "These settings would do nothing, or something else:\n  "
                + "\n  ".join(faults)
            )

    @property
    def static(self) -> SharedMerge:
        """How the shared matrix is made, if there may be one."""
        named = {"auto": "mean", "subspaces": "none"}
        return named.get(self.shared, self.shared)

    @property
    def tucker(self) -> bool:
        """Whether matrices may be stored as cores in shared bases."""
        return self.shared in ("auto", "subspaces") and self.residual == "truncated"

    @property
    def joint(self) -> bool:
        """Whether form and precision are chosen per matrix before the ranks."""
        splits = self.residual == "truncated" and self.shared != "none"
        return (splits and self.allocation != "uniform") or self.factor_dtype == "auto"

    @property
    def _settled(self) -> bool:
        """Whether shared ranks are chosen before those of experts, or there are none: no cross terms remain then."""
        return self.joint or self.static == "none"

    def _at_odds(self) -> Iterator[str]:
        """Pairs of settings of which one would be ignored."""
        if self.residual == "full" and self.factor_dtype == "auto":
            yield (
                "residual=full with factor_dtype=auto: a precision is chosen together with what is shared, for residuals to "
                "the part that is stored. Set factor_dtype=checkpoint, float32 or one of the integer types, or residual=truncated."
            )
        if self.residual == "full" and self.shared in ("subspaces", "none"):
            yield (
                f"residual=full with shared={self.shared}: there is no shared matrix whose residuals could be stored. Set "
                "shared=mean (auto, task_arithmetic, ties), or residual=truncated."
            )
        if self.max_rank is not None:
            yield from self._beyond_adapters()
        if self.allocation == "uniform" and not self.joint and self.shared != "none":
            if self.residual == "truncated":
                spaces = self.shared == "subspaces"
                yield (
                    f"residual=truncated with allocation=uniform, shared={self.shared}: uniform ranks leave nothing shared to choose "
                    f"first. Set {'allocation=greedy' if spaces else 'residual=full'}, or shared=none."
                )
        if self.allocation == "learned" and self.warm_start and self._settled:
            yield (
                "allocation=learned from a warm start: where shared ranks are chosen first, the greedy ranks that it would "
                "start from are the optimum. Set allocation=greedy, residual=full (as in the paper), or warm_start=false."
            )

    def _beyond_adapters(self) -> Iterator[str]:
        """Settings by which a task's change would be of a larger rank than ``max_rank``."""
        if self.vectors == "expert":
            yield (
                "max_rank with vectors=expert: adapters carry no biases and norms of a task. Set vectors=shared, which an export "
                "folds into its base model, or pretrained."
            )
        if self.allocation != "greedy" or self.residual != "truncated":
            yield (
                f"max_rank with allocation={self.allocation}, residual={self.residual}: ranks of the shared part and of experts are "
                "bounded together where that of the shared part is chosen first. Set allocation=greedy, residual=truncated."
            )

    def _without_effect(self) -> Iterator[str]:
        """Values other than the default that nothing reads."""
        changed = {
            *_changed(self, {}),
            *_changed(self.learning, LEARNING_KEYS),
            *_changed(self.refining, REFINING_KEYS),
        }
        for key in (key for key in _READ_WITH if key in changed):
            setting, value = _READ_WITH[key]
            found = getattr(self, setting)
            if found != value:
                yield f"{key} is of {setting}={value}, not {found}."
            elif setting == "refinement" and self.shared == "none":
                yield f"{key}: with shared=none nothing couples the experts. Set shared."
        if self.allocation == "learned" and self._settled and not self.learning.coupled:
            yield "coupling is of residual=full with a shared matrix: no cross terms remain otherwise."
        if self.refinement == "adam" and self.shared == "none":
            yield (
                "refinement=adam: with shared=none nothing couples the experts, which are the best of their ranks already. Set "
                "shared, or refinement=none."
            )


def _changed(group: Any, keys: dict[str, str]) -> list[str]:
    """Keys of the fields of a group of settings that are not at their default."""
    changed = [f.name for f in fields(group) if getattr(group, f.name) != f.default]
    return [keys.get(name, name) for name in changed]
