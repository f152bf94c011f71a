"""Suites that lie in a folder of the demo suite's layout, behind the host's own pools.

::

    <root>/clip/                       CLIPModel and CLIPProcessor of the base model
    <root>/vision/_pretrained_/        its vision tower, and vision/<task>/ the fine-tuned ones
    <root>/data/<task>/                train, validation and test images as parquet
    <root>/suite.json or tasks.json    class names per task

What the demo pools do for the suite that they make, for suites that somebody else made: ``root`` in the YAML is all
they need.
"""

from pathlib import Path
from typing import Any

from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from omegaconf import OmegaConf

from .pools import _datasets
from .registry import register_suite_tasks
from .tasks import Split


def open_folder(root: str | Path) -> tuple[Path, list[str]]:
    """The folder and its tasks, whose class names the host knows from now on.

    Raises:
        FileNotFoundError: if this is no suite.
    """
    root = Path(root).expanduser().absolute()
    if not (root / "clip").is_dir():
        raise FileNotFoundError(
            f"{root} holds no suite (there is no clip/ in it). Give the folder with modelpool.root and taskpool.root."
        )
    return root, list(register_suite_tasks(root))


class FolderCLIPVisionModelPool(CLIPVisionModelPool):
    """The models and images of a suite.

    Args:
        root: the folder.
        **kwargs: whatever the host's pool takes; it wins.
    """

    _config_mapping = CLIPVisionModelPool._config_mapping | {"root": "root"}

    def __init__(self, *, root: str, **kwargs: Any) -> None:
        folder, names = open_folder(root)
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
        self.root = root


class FolderCLIPVisionModelTaskPool(CLIPVisionModelTaskPool):
    """Zero-shot classification on a suite's images.

    Args:
        root: the folder.
        split: the images to evaluate on; nothing may be chosen on ``test``.
        decode_once: keep the preprocessed images in memory, for many evaluations of small images.
        **kwargs: whatever the host's pool takes; it wins.
    """

    _config_mapping = CLIPVisionModelTaskPool._config_mapping | {
        key: key for key in ("root", "split", "decode_once")
    }

    def __init__(
        self,
        *,
        root: str,
        split: Split = "test",
        decode_once: bool = False,
        **kwargs: Any,
    ) -> None:
        folder, names = open_folder(root)
        given = {
            "test_datasets": _datasets(folder, names, split),
            "clip_model": str(folder / "clip"),
            "processor": str(folder / "clip"),
        }
        super().__init__(**(given | kwargs))
        self.root, self.split, self.decode_once = root, split, decode_once

    def setup(self) -> None:
        super().setup()
        if self.decode_once:
            self.test_dataloaders = {
                task: list(loader) for task, loader in self.test_dataloaders.items()
            }
