"""Suites that lie in a folder, behind the host's own pools.

::

    <root>/clip/                       CLIPModel and CLIPProcessor of the base model
    <root>/vision/_pretrained_/        its vision tower, and vision/<task>/ the fine-tuned ones
    <root>/data/<task>/                train, validation and test images as parquet
    <root>/suite.json or tasks.json    class names per task

``root`` in the YAML is all they need; all loading and evaluating is the host's. Whatever a YAML file says explicitly wins.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from fusion_bench.utils.instantiate_utils import set_print_function_call
from omegaconf import DictConfig, OmegaConf
from transformers import CLIPModel

from ..errors import SettingsError, spelled
from ..files import from_home
from ..options import FilePath, checked
from ..taskpool.loading import check_loading
from .registry import register_suite_tasks
from .tasks import Split


def both_roots() -> str:
    """How the folder of a suite is given to its two pools."""
    roots = (spelled(f"{pool}.root") for pool in ("modelpool", "taskpool"))
    return " and ".join(dict.fromkeys(roots))


def open_folder(
    root: FilePath | Path, tasks: Sequence[str] | None = None
) -> tuple[Path, list[str]]:
    """The folder and the chosen tasks, whose class names the host knows from now on.

    Args:
        tasks: some of the suite's, in the order wanted; all if None.

    Raises:
        FileNotFoundError: if this is no suite.
        SettingsError: for tasks that the suite does not have.
    """
    root = from_home(root).absolute()
    if not (root / "clip").is_dir():
        raise FileNotFoundError(
            f"{root} holds no suite (there is no clip/ in it). Give the folder: {both_roots()}."
        )
    available = list(register_suite_tasks(root))
    chosen = available if tasks is None else list(tasks)
    unknown = [name for name in chosen if name not in available]
    if unknown:
        raise SettingsError(
            f"tasks: the suite {root.name} has no {', '.join(unknown)}. Choose from {', '.join(available)}, or leave it "
            "null for all."
        )
    return root, chosen


@checked
class FolderCLIPVisionModelPool(CLIPVisionModelPool):
    """The models and images of a suite.

    Args:
        root: the folder.
        tasks: some of the suite's tasks, in the order wanted; all of them if None.
        **kwargs: whatever the host's pool takes; it wins.
    """

    _config_mapping = CLIPVisionModelPool._config_mapping | {
        key: key for key in ("root", "tasks")
    }

    def __init__(
        self, *, root: FilePath, tasks: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        folder, names = open_folder(root, tasks)
        towers = {
            name: str(folder / "vision" / name) for name in ("_pretrained_", *names)
        }
        given = {
            "models": OmegaConf.create(towers),
            "processor": str(folder / "clip"),
            "train_datasets": _datasets(folder, names, "train"),
            "val_datasets": _datasets(folder, names, "validation"),
            "test_datasets": _datasets(folder, names, "test"),
        }
        super().__init__(**(given | kwargs))
        self.root, self.tasks = root, tasks
        self._whole_base = None if "models" in kwargs else str(folder / "clip")

    def load_clip_model(self, model_name: str, *args: Any, **kwargs: Any) -> CLIPModel:
        """Both towers of the base model; ``vision/_pretrained_`` has but one."""
        if model_name == "_pretrained_" and self._whole_base is not None:
            return CLIPModel.from_pretrained(self._whole_base, *args, **kwargs)
        return super().load_clip_model(model_name, *args, **kwargs)


@checked
class FolderCLIPVisionModelTaskPool(CLIPVisionModelTaskPool):
    """Zero-shot classification on a suite's images.

    Args:
        root, tasks: as for :class:`FolderCLIPVisionModelPool`.
        split: the images to evaluate on; nothing may be chosen on ``test``.
        decode_once: keep the preprocessed images in memory, for many evaluations of small images.
        **kwargs: whatever the host's pool takes; it wins.
    """

    _config_mapping = CLIPVisionModelTaskPool._config_mapping | {
        key: key for key in ("root", "tasks", "split", "decode_once")
    }

    def __init__(
        self,
        *,
        root: FilePath,
        tasks: Sequence[str] | None = None,
        split: Split = "test",
        decode_once: bool = False,
        **kwargs: Any,
    ) -> None:
        folder, names = open_folder(root, tasks)
        given = {
            "test_datasets": _datasets(folder, names, split),
            "clip_model": str(folder / "clip"),
            "processor": str(folder / "clip"),
        }
        super().__init__(**(given | kwargs))
        check_loading(self)
        self.root, self.tasks = root, tasks
        self.split, self.decode_once = split, decode_once

    def setup(self) -> None:
        with set_print_function_call(False):  # a box per dataset
            super().setup()
        if self.decode_once and not self.fast_dev_run:
            self.test_dataloaders = {
                task: list(loader) for task, loader in self.test_dataloaders.items()
            }


def _datasets(folder: Path, tasks: Sequence[str], split: Split) -> DictConfig:
    """Datasets as the host's own YAML files give them, with folders for hub names."""
    loaders = {
        name: {
            "_target_": "datasets.load_dataset",
            "path": str(folder / "data" / name),
            "split": split,
        }
        for name in tasks
    }
    return OmegaConf.create(loaders)
