"""What a run ends with: some ten lines that say how good the merged model is, what it takes, and where it lies."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import some
from .comparison import mean
from .metrics import ACCURACY, is_share
from .units import storage_line, storage_units


@dataclass(frozen=True)
class Answer:
    """Everything that a finished run is asked about.

    Args:
        title: of the method.
        tasks: in the order of the table.
        names: what the figures are, per task; accuracies where nothing is said.
        figures, base, own: per task, of the merged model, of the base model and of the task's own fine-tuned model; the
            last two as far as they are known.
        missing: tasks that were evaluated, and of which nothing was reported.
        storage: as by ``StorageReport.as_dict``; empty where nothing is counted.
        error: energy of the task vectors that is not reproduced, in parts of all; None if unknown.
        seconds: of the merge.
        files: what was written, by what it is.
    """

    title: str
    tasks: Sequence[str]
    names: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    base: Mapping[str, float] = field(default_factory=dict)
    own: Mapping[str, float] = field(default_factory=dict)
    missing: Sequence[str] = ()
    storage: Mapping = field(default_factory=dict)
    error: float | None = None
    seconds: float | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([*self._table(), *self._facts()])

    @property
    def metrics(self) -> dict[str, float]:
        """The figures by name, as loggers take them."""
        found = {f"{self._name(task)}/{task}": v for task, v in self.figures.items()}
        if (average := self._average(self.figures)) is not None:
            found[f"{self._metric}/average"] = average
        if ratios := self._ratios():
            found["retention"] = mean(list(ratios.values()))
        if self.storage:
            sizes = storage_units(self.storage)
            found |= {f"storage/{name}": value for name, value in sizes.items()}
        if self.error is not None:
            found["relative_error"] = self.error
        if self.seconds is not None:
            found["seconds"] = self.seconds
        return found

    def _name(self, task: str) -> str:
        return self.names.get(task, ACCURACY)

    @property
    def _metric(self) -> str:
        """What all figures are."""
        return (
            "figure" if self._mixed else next(map(self._name, self.figures), ACCURACY)
        )

    @property
    def _mixed(self) -> bool:
        return len(set(map(self._name, self.figures))) > 1

    @property
    def _shares(self) -> bool:
        """Whether figures are given in per cent, and divided."""
        known = {t: v for t, v in self.figures.items() if math.isfinite(v)}
        return all(is_share(self._name(task), v) for task, v in known.items())

    def _average(self, column: Mapping[str, float]) -> float | None:
        """The mean over tasks; None where one is missing, or figures are of several kinds that are not shares."""
        if self._mixed and not self._shares:
            return None
        return mean([column.get(task) for task in [*self.figures, *self.missing]])

    def _ratios(self) -> dict[str, float]:
        """Retention per task; none unless it is known of all."""
        if not self.figures or any(not self.own.get(task) for task in self.figures):
            return {}
        if not self._shares or self.missing:
            return {}
        return {task: value / self.own[task] for task, value in self.figures.items()}

    def _table(self) -> list[str]:
        if not self.figures:
            return []
        columns = {
            self._metric: self.figures,
            "base model": self.base,
            "own model": self.own,
            "retention": self._ratios(),
        }
        columns = {head: column for head, column in columns.items() if column}
        heads = {task: task for task in self.tasks}
        if self._mixed:
            heads |= {task: f"{task}: {self._name(task)}" for task in self.figures}
        width = max(len("average"), *map(len, heads.values()))
        lines = [f"{'task':<{width}}" + _cells(columns)]
        for task, head in heads.items():
            values = (column.get(task) for column in columns.values())
            lines.append(f"{head:<{width}}" + _cells(map(self._printed, values)))
        means = map(self._average, columns.values())
        return [*lines, f"{'average':<{width}}" + _cells(map(self._printed, means))]

    def _printed(self, value: float | None) -> str:
        """In per cent where figures are shares."""
        if value is None:
            return "–"
        return f"{100 * value:.1f}" if self._shares else f"{value:.4g}"

    def _facts(self) -> list[str]:
        count = f"{len(self.storage.get('expert_bits', self.tasks))} tasks" + (
            "" if self.figures else f": {', '.join(self.tasks)}"
        )
        lines = [f"{'method':<11}{self.title}, {count}"]
        if self.error is not None:
            lines[0] += f", relative error {self.error:.2g}"
        if self.missing:
            lines.append(f"{'no figure':<11}of {some(self.missing)}: the task pool reports none")  # fmt: skip
        if self.storage:
            lines.append(f"{'storage':<11}{storage_line(self.storage)}")
        if self.seconds is not None:
            lines.append(f"{'merged in':<11}{self.seconds:.1f} s")
        lines += [f"{what:<11}{place}" for what, place in self.files.items()]
        return lines


def _cells(texts: Iterable[str]) -> str:
    return "".join(f"{text:>12}" for text in texts)
