"""Text suites that lie in folders: encoders fine-tuned with a classifier each, and their texts.

::

    <root>/_pretrained_/     encoder and tokenizer of the base model
    <root>/<task>/           sequence classifiers
    <data>/<task>/           train-*, validation-* and test-*.parquet with columns text and label

What is merged are the encoders; the classifiers' heads stay with their tasks, in the task pool, as zero-shot heads do in CLIP's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_bench import auto_register_config
from fusion_bench.modelpool import SequenceClassificationModelPool
from omegaconf import OmegaConf

from ..errors import ModelPoolError
from ..files import from_home
from ..options import FilePath, checked
from ..pools.entries import BASE, PLACE, TARGET
from ..taskpool.text import TextClassificationTaskPool, parquet_files
from .folder_pools import both_roots
from .tasks import Split


def tasks_of(root: str | Path, tasks: Sequence[str] | None = None) -> list[str]:
    """The tasks of a suite, some of them if asked.

    Raises:
        ModelPoolError: if there is no base model, or not every task.
    """
    place = from_home(root)
    there = sorted(p.parent.name for p in place.glob("*/config.json"))
    chosen = [n for n in there if n != BASE] if tasks is None else list(tasks)
    if lacking := {BASE, *chosen} - set(there):
        raise ModelPoolError(
            f"{place} holds no model for {sorted(lacking)}, only {there}. Give the folder as {both_roots()}, or "
            "some of its tasks as tasks."
        )
    return chosen


@checked
@auto_register_config
class FolderTextModelPool(SequenceClassificationModelPool):
    """The encoders and texts of a suite.

    Args:
        root: folder of the models.
        data: folder of the texts.
        tasks: some of the suite's tasks, in the order wanted; all of them if None.
        **kwargs: whatever the host's pool takes; it wins.
    """

    def __init__(
        self,
        *,
        root: FilePath,
        data: FilePath,
        tasks: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        names = tasks_of(root, tasks)
        folder = from_home(root).absolute()
        load = {TARGET: "transformers.AutoModel.from_pretrained"}
        given = {
            "models": {n: {**load, PLACE: str(folder / n)} for n in (BASE, *names)},
            "tokenizer": {
                TARGET: "transformers.AutoTokenizer.from_pretrained",
                PLACE: str(folder / BASE),
            },
            "train_datasets": _datasets(data, names, "train"),
            "val_datasets": _datasets(data, names, "validation"),
        }
        super().__init__(**({k: OmegaConf.create(v) for k, v in given.items()} | kwargs))  # fmt: skip


@checked
class FolderTextTaskPool(TextClassificationTaskPool):
    """Accuracy on a suite's texts.

    Args:
        root, data, tasks: as for :class:`FolderTextModelPool`.
        split: the texts to evaluate on; nothing may be chosen on ``test``.
        **kwargs: those of :class:`~fusion_bench_didi.taskpool.TextClassificationTaskPool`; they win.
    """

    def __init__(
        self,
        *,
        root: FilePath,
        data: FilePath,
        tasks: Sequence[str] | None = None,
        split: Split = "test",
        **kwargs: Any,
    ) -> None:
        names, folder = tasks_of(root, tasks), from_home(root).absolute()
        given = {
            "root": data,
            "tokenizer": str(folder / BASE),
            "tasks": names,
            "heads": {name: str(folder / name) for name in names},
            "split": split,
        }
        super().__init__(**(given | kwargs))


def _datasets(data: str, tasks: Sequence[str], split: Split) -> dict[str, Any]:
    return {
        task: {
            "_target_": "datasets.load_dataset",
            "path": "parquet",
            "data_files": [str(file.absolute()) for file in files],
            "split": "train",  # what datasets calls files without one
        }
        for task, files in parquet_files(data, tasks, split).items()
    }
