"""The demo suite behind the host's own pools: ``modelpool=didi/demo taskpool=didi/demo``.

These classes make sure that the suite is there and hand the host local folders; all
loading and evaluating is the host's. Whatever a YAML file says explicitly wins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from omegaconf import DictConfig, OmegaConf
from transformers import CLIPModel

from .registry import register_suite_tasks
from .suite import Size, build_suite
from .tasks import Split

_OWN_KEYS = {key: key for key in ("seed", "cache_dir", "size", "tasks")}


def _open_suite(
    seed: int, cache_dir: str | Path | None, size: Size, tasks: Sequence[str] | None
) -> tuple[Path, list[str]]:
    """The suite's folder and the names of the chosen tasks, known to the host."""
    suite = build_suite(cache_dir, seed, size=size)
    available = list(register_suite_tasks(suite))
    chosen = available if tasks is None else list(tasks)
    unknown = [name for name in chosen if name not in available]
    if unknown:
        raise ValueError(
            f"tasks: the demo suite has no {', '.join(unknown)}. "
            f"Choose from {', '.join(available)}, or leave it null for all."
        )
    return suite, chosen


def _datasets(suite: Path, tasks: Sequence[str], split: Split) -> DictConfig:
    """What the host's own dataset YAML files say, with folders for hub names."""
    loaders = {
        name: {
            "_target_": "datasets.load_dataset",
            "path": str(suite / "data" / name),
            "split": split,
        }
        for name in tasks
    }
    return OmegaConf.create(loaders)


class DemoCLIPVisionModelPool(CLIPVisionModelPool):
    """The base model and the fine-tuned models of the demo suite, with its pictures.

    Args:
        seed: of the suite.
        cache_dir: where suites live, see :func:`.suite.build_suite`.
        size: ``full``, or ``tiny`` for tests.
        tasks: some of the suite's tasks, in the order wanted; all of them if None.
        **kwargs: whatever the host's pool takes.
    """

    _config_mapping = CLIPVisionModelPool._config_mapping | _OWN_KEYS

    def __init__(
        self,
        *,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        size: Size = "full",
        tasks: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        suite, names = _open_suite(seed, cache_dir, size, tasks)
        towers = {
            name: str(suite / "vision" / name) for name in ("_pretrained_", *names)
        }
        given = {
            "models": OmegaConf.create(towers),
            "processor": str(suite / "clip"),
            "train_datasets": _datasets(suite, names, "train"),
            "val_datasets": _datasets(suite, names, "validation"),
            "test_datasets": _datasets(suite, names, "test"),
        }
        super().__init__(**(given | kwargs))
        self.seed, self.cache_dir, self.size, self.tasks = seed, cache_dir, size, tasks
        self._whole_base = None if "models" in kwargs else str(suite / "clip")

    def load_clip_model(self, model_name: str, *args: Any, **kwargs: Any) -> CLIPModel:
        """Both towers of the base model; ``vision/_pretrained_`` has but one."""
        if model_name == "_pretrained_" and self._whole_base is not None:
            return CLIPModel.from_pretrained(self._whole_base, *args, **kwargs)
        return super().load_clip_model(model_name, *args, **kwargs)


class DemoCLIPVisionModelTaskPool(CLIPVisionModelTaskPool):
    """Zero-shot classification on the demo suite's pictures.

    Args:
        seed, cache_dir, size, tasks: as for :class:`DemoCLIPVisionModelPool`.
        split: the pictures to evaluate on; leave ``test`` for the last word.
        **kwargs: whatever the host's pool takes, ``dataloader_kwargs`` say.
    """

    _config_mapping = (
        CLIPVisionModelTaskPool._config_mapping | _OWN_KEYS | {"split": "split"}
    )

    def __init__(
        self,
        *,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        size: Size = "full",
        tasks: Sequence[str] | None = None,
        split: Split = "test",
        **kwargs: Any,
    ) -> None:
        suite, names = _open_suite(seed, cache_dir, size, tasks)
        given = {
            "test_datasets": _datasets(suite, names, split),
            "clip_model": str(suite / "clip"),
            "processor": str(suite / "clip"),
        }
        super().__init__(**(given | kwargs))
        self.seed, self.cache_dir, self.size, self.tasks = seed, cache_dir, size, tasks
        self.split = split
