"""What a run ends with: some ten lines that say how good the merged model is, what it takes, and where it lies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .comparison import mean
from .units import storage_line, storage_units


@dataclass(frozen=True)
class Answer:
    """Everything that a finished run is asked about.

    Args:
        title: of the method.
        tasks: in the order of the table.
        metric: what the figures are.
        figures, base, own: per task, of the merged model, of the base model and of the task's own fine-tuned model; the
            last two as far as they are known.
        storage: as by ``StorageReport.as_dict``; empty where nothing is counted.
        error: energy of the task vectors that is not reproduced, in parts of all; None if unknown.
        seconds: of the merge.
        files: what was written, by what it is.
    """

    title: str
    tasks: Sequence[str]
    metric: str = "accuracy"
    figures: Mapping[str, float] = field(default_factory=dict)
    base: Mapping[str, float] = field(default_factory=dict)
    own: Mapping[str, float] = field(default_factory=dict)
    storage: Mapping = field(default_factory=dict)
    error: float | None = None
    seconds: float | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([*self._table(), *self._facts()])

    @property
    def metrics(self) -> dict[str, float]:
        """The figures by name, as loggers take them."""
        found = {f"{self.metric}/{task}": v for task, v in self.figures.items()}
        if self.figures:
            found[f"{self.metric}/average"] = mean(list(self.figures.values()))
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

    def _ratios(self) -> dict[str, float]:
        """Retention per task; none unless it is known of all."""
        if not self.figures or any(not self.own.get(task) for task in self.figures):
            return {}
        return {task: value / self.own[task] for task, value in self.figures.items()}

    def _table(self) -> list[str]:
        if not self.figures:
            return []
        columns = {
            self.metric: self.figures,
            "base model": self.base,
            "own model": self.own,
            "retention": self._ratios(),
        }
        columns = {head: column for head, column in columns.items() if column}
        width = max(len("average"), *map(len, self.tasks))
        lines = [f"{'task':<{width}}" + "".join(f"{head:>12}" for head in columns)]
        for task in self.figures:
            cells = (_percent(column.get(task)) for column in columns.values())
            lines.append(f"{task:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
        means = (
            _percent(mean([column.get(task) for task in self.figures]))
            for column in columns.values()
        )
        return [
            *lines,
            f"{'average':<{width}}" + "".join(f"{cell:>12}" for cell in means),
        ]

    def _facts(self) -> list[str]:
        count = f"{len(self.tasks)} tasks" + (
            "" if self.figures else f": {', '.join(self.tasks)}"
        )
        lines = [f"{'method':<11}{self.title}, {count}"]
        if self.error is not None:
            lines[0] += f", relative error {self.error:.2g}"
        if self.storage:
            lines.append(f"{'storage':<11}{storage_line(self.storage)}")
        if self.seconds is not None:
            lines.append(f"{'merged in':<11}{self.seconds:.1f} s")
        lines += [f"{what:<11}{place}" for what, place in self.files.items()]
        return lines


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def figure(result: object) -> tuple[str, float] | None:
    """Name and value of what a task pool says of a task: its accuracy, or its first number; None where there is none."""
    if _is_number(result):
        return "figure", float(result)
    if not isinstance(result, Mapping):
        return None
    numbers = {k: float(v) for k, v in result.items() if _is_number(v)}
    name = "accuracy" if "accuracy" in numbers else next(iter(numbers), None)
    return None if name is None else (name, numbers[name])


def _is_number(value: object) -> bool:
    """Python's numbers, and those of libraries: of no sides."""
    return hasattr(value, "__float__") and not getattr(value, "ndim", 0)
