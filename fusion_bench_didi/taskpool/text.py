"""Text tasks: accuracy of sequence classifiers, and perplexity of language models, under each task's expert.

Reports are laid out as those of the host's CLIP pools, so that whatever reads these reads them: figures per task, and their
average.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.taskpool import BaseTaskPool
from fusion_bench.utils import count_parameters
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..errors import DiDiError
from ..files import from_home
from ..options import Aliases, FilePath, PositiveCount, Split, checked
from .rehearsal import rehearses
from .task_switching import attach

#: a batch, and what it is scored against
Batch = tuple[dict[str, Tensor], Tensor]


class _TextTaskPool(BaseTaskPool, LightningFabricMixin):
    """Goes over tasks, and batches of each; subclasses say what a batch is and how a model does on it.

    They set ``_test_datasets``, files by task, and then :func:`attach` themselves.
    """

    def __init__(
        self,
        tokenizer: str | Any,
        *,
        batch_size: PositiveCount = 64,
        limit: PositiveCount | None = None,
        fast_dev_run: bool | None = None,
        task_aliases: Aliases = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.fast_dev_run = rehearses(fast_dev_run)
        self.tokenizer, self.batch_size, self.limit = tokenizer, batch_size, limit
        self.task_aliases = task_aliases
        self._made: dict[str, list[Batch]] = {}
        self._loaded: Any = None

    @property
    def loaded_tokenizer(self) -> Any:
        if self._loaded is None:
            named = isinstance(self.tokenizer, (str, Path))
            load = AutoTokenizer.from_pretrained
            self._loaded = load(self.tokenizer) if named else self.tokenizer
        return self._loaded

    @abstractmethod
    def make_batches(self, task_name: str) -> Iterator[Batch]:
        """Everything that the task is scored on."""

    @abstractmethod
    def logits(
        self, task_name: str, model: nn.Module, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """(..., classes) for a batch."""

    @torch.no_grad()
    def evaluate_single_task(
        self, task_name: str, model: nn.Module
    ) -> dict[str, float]:
        """Accuracy, and cross-entropy per answer."""
        if task_name not in self._made:
            some = 1 if self.fast_dev_run else None
            batches = islice(self.make_batches(task_name), some)
            self._made[task_name] = list(batches)
        right = count = 0
        loss = 0.0
        for inputs, answers in self._made[task_name]:
            on_device = {k: self.fabric.to_device(v) for k, v in inputs.items()}
            logits = self.logits(task_name, model, on_device).float().cpu()
            logits, answers = logits.flatten(0, -2), answers.flatten()
            known = answers >= 0
            logits, answers = logits[known], answers[known]
            right += int((logits.argmax(-1) == answers).sum())
            loss += float(F.cross_entropy(logits, answers, reduction="sum"))
            count += len(answers)
        if not count:
            raise DiDiError(
                f"{task_name} has no labeled sample, so nothing can be measured. Give other files, or leave the task out."
            )
        return {"accuracy": right / count, "loss": loss / count}

    def evaluate(
        self, model: nn.Module, name: str | None = None, **_: Any
    ) -> dict[str, Any]:
        """Figures per task, and their mean under ``average``."""
        model = self.fabric.to_device(model).eval()
        trainable, whole = count_parameters(model)
        info = {"trainable_params": trainable, "all_params": whole}
        info |= {"trainable_percentage": trainable / whole}
        report: dict[str, Any] = {"model_info": info}
        if name is not None:
            info["name"] = name
        tasks = list(self._test_datasets)
        for task in tasks:
            report[task] = self.evaluate_single_task(task, model)
        report["average"] = {
            key: sum(report[task][key] for task in tasks) / len(tasks)
            for key in report[tasks[0]]
        }
        return report


@checked
class TextClassificationTaskPool(_TextTaskPool):
    """Accuracy of sequence classifiers on ``ROOT/TASK/{train,validation,test}-*.parquet``, each task under its expert.

    Args:
        root: directory of the tasks.
        tokenizer: its directory, or a tokenizer.
        tasks: some of the directories in ``root``, in the order wanted; all if None.
        split: ``train``, ``validation`` or ``test``; nothing may be chosen on the last.
        heads: where the evaluated models are encoders without a head: task -> directory of a sequence classifier, whose
            head is put on them. None: the models are classifiers, with a head of each task's own where they have experts.
        max_length: tokens of a text.
        columns: what ``text`` and ``label`` are called in the files.
        batch_size: texts at a time.
        limit: texts per task, the first ones; None for all.
        fast_dev_run: evaluate one batch per task; None: as the program says.
        task_aliases: task -> model name, for names that the naming rule does not match.
    """

    def __init__(
        self,
        root: FilePath,
        tokenizer: str | Any,
        *,
        tasks: Sequence[str] | None = None,
        split: Split = "test",
        heads: Mapping[str, FilePath] | None = None,
        max_length: PositiveCount = 128,
        columns: Mapping[Literal["text", "label"], str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(tokenizer, **kwargs)
        self.root, self.split, self.max_length = root, split, max_length
        self.tasks, self.heads = tasks, dict(heads or {})
        self.columns = {"text": "text", "label": "label", **(columns or {})}
        self._test_datasets = parquet_files(root, tasks, split)
        if self.heads and (lacking := set(self._test_datasets) - set(self.heads)):
            raise DiDiError(
                f"heads has none for {sorted(lacking)}, expected a directory of a sequence classifier for every task, or no heads "
                "at all where the evaluated models hold their own."
            )
        self._shells: dict[str, nn.Module] = {}
        attach(self)

    def make_batches(self, task_name: str) -> Iterator[Batch]:
        """Texts of about one length together, padded to the longest."""
        rows = pd.read_parquet(self._test_datasets[task_name]).head(self.limit)
        texts, labels = (rows[self.columns[c]].tolist() for c in ("text", "label"))
        cut = {"truncation": True, "max_length": self.max_length}
        ids = self.loaded_tokenizer(texts, **cut)["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            found = [texts[i] for i in chosen]
            inputs = self.loaded_tokenizer(found, padding=True, return_tensors="pt", **cut)  # fmt: skip
            yield dict(inputs), torch.tensor([labels[i] for i in chosen])

    def logits(
        self, task_name: str, model: nn.Module, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        if not self.heads:
            return model(**inputs).logits
        shell = self._shell(task_name)
        setattr(shell, shell.base_model_prefix, model)
        try:
            return shell(**inputs).logits
        finally:
            setattr(shell, shell.base_model_prefix, nn.Identity())

    def _shell(self, task_name: str) -> nn.Module:
        """The task's classifier without its encoder."""
        if task_name not in self._shells:
            load = AutoModelForSequenceClassification.from_pretrained
            shell = load(from_home(self.heads[task_name])).eval()
            setattr(shell, shell.base_model_prefix, nn.Identity())
            self._shells[task_name] = self.fabric.to_device(shell)
        return self._shells[task_name]


@checked
class PerplexityTaskPool(_TextTaskPool):
    """Perplexity of language models on text files, each task under its expert.

    ``accuracy`` is that of the next token, so that comparisons, in which more is better, can be made of it.

    Args:
        files: task -> a file, a pattern, or several.
        tokenizer: its directory, or a tokenizer.
        context: tokens of a window.
        batch_size: windows at a time.
        limit: tokens per task, the first ones; None for all.
        fast_dev_run: evaluate one batch per task; None: as the program says.
        task_aliases: task -> model name, for names that the naming rule does not match.
    """

    def __init__(
        self,
        files: Mapping[str, str | Sequence[str]],
        tokenizer: str | Any,
        *,
        context: Annotated[int, Field(ge=2)] = 512,
        batch_size: PositiveCount = 8,
        **kwargs: Any,
    ):
        super().__init__(tokenizer, batch_size=batch_size, **kwargs)
        self.files, self.context = files, context
        if not files:
            raise DiDiError("files names no task. Give text files by task.")
        self._test_datasets = {
            task: _found(task, given) for task, given in files.items()
        }
        attach(self)

    def make_batches(self, task_name: str) -> Iterator[Batch]:
        """Windows that do not overlap; every token but the first of a window is predicted from those before it in there."""
        texts = [p.read_text(errors="replace") for p in self._test_datasets[task_name]]
        ids = [t for text in texts for t in self._ids(text)][: self.limit]
        windows = [
            torch.tensor(ids[start : start + self.context])
            for start in range(0, len(ids), self.context)
            if len(ids) - start > 1
        ]
        if not windows:
            raise DiDiError(
                f"The files of {task_name!r} hold {len(ids)} tokens, expected at least two."
            )
        for start in range(0, len(windows), self.batch_size):
            chosen = windows[start : start + self.batch_size]
            mask = [torch.ones_like(window) for window in chosen]
            pad = nn.utils.rnn.pad_sequence
            inputs = {
                "input_ids": pad(chosen, batch_first=True),
                "attention_mask": pad(mask, batch_first=True),
            }
            following = [window[1:] for window in chosen]
            yield inputs, pad(following, batch_first=True, padding_value=-1)

    def _ids(self, text: str) -> list[int]:
        return self.loaded_tokenizer(text, verbose=False)["input_ids"]

    def logits(
        self, task_name: str, model: nn.Module, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        return model(**inputs).logits[:, :-1]

    def evaluate_single_task(
        self, task_name: str, model: nn.Module
    ) -> dict[str, float]:
        """Accuracy of the next token, loss per token, and perplexity."""
        found = super().evaluate_single_task(task_name, model)
        return {
            **found,
            "perplexity": torch.tensor(found["loss"], dtype=torch.float64).exp().item(),
        }


def parquet_files(
    root: str | Path, tasks: Sequence[str] | None, split: str
) -> dict[str, list[Path]]:
    """The files of a split by task.

    Raises:
        DiDiError: naming the tasks without any.
    """
    place = from_home(root)
    there = sorted(p.name for p in place.glob("*") if p.is_dir())
    chosen = there if tasks is None else list(tasks)
    found = {task: sorted((place / task).glob(f"{split}-*.parquet")) for task in chosen}
    empty = [task for task, files in found.items() if not files]
    if empty or not found:
        raise DiDiError(
            f"{place} holds no {split}-*.parquet for {empty or 'any task'}; there are {there}. Give the directory of the tasks as "
            "root, and some of them as tasks."
        )
    return found


def _found(task: str, given: str | Sequence[str]) -> list[Path]:
    patterns = [given] if isinstance(given, str) else list(given)
    files = [Path(p) for pattern in patterns for p in sorted(glob(pattern))]
    if not files:
        raise DiDiError(
            f"files.{task}: nothing is there by {patterns}, expected text files."
        )
    return files
