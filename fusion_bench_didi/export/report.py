"""What an export carries of every tensor, and what it loses."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from textwrap import wrap
from typing import Any, Literal

from ..task_vectors.alignment import of_all_layers

#: As low-rank factors; whole; at the changed positions; in the base checkpoint that is exported too; not at all.
How = Literal["factors", "whole", "sparse", "base", "left out"]


@dataclass(frozen=True)
class Carried:
    """How one tensor of one task is exported.

    Args:
        error: norm of what is lost, in parts of the norm of the task's change; 1 where all of the change is. For a task that
            keeps the base model's tensor, in parts of what all tasks share, which the adapter has to take back.
        rank: of factors.
        why: no better.
    """

    how: How
    error: float = 0.0
    rank: int | None = None
    why: str = ""


@dataclass(frozen=True)
class ExportReport:
    """Report of an export: what was written, and what is lost by it.

    Args:
        form: ``peft``, ``plain`` or ``patch``.
        directory: where it lies.
        tensors: by task, then name; of the tensors that the merged model changes.
        bytes: of the files with weights, by task; ``_pretrained_`` for a base checkpoint.
        outputs: by task the largest difference of an output to that of ``materialize``, in parts of the largest output;
            None where the model could not be tried.
        notes: what else a user has to know.
    """

    form: str
    directory: str
    tensors: Mapping[str, Mapping[str, Carried]]
    bytes: Mapping[str, int]
    outputs: Mapping[str, float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def lossy(self) -> dict[str, dict[str, Carried]]:
        """By task, the tensors of which something is lost beyond the rounding of types of 16 and 32 bits."""
        return {
            task: {n: c for n, c in tensors.items() if c.why}
            for task, tensors in self.tensors.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """The report, JSON-plain."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.form} in {self.directory}"]
        for task, size in self.bytes.items():
            lines.append(f"  {task}: {size / 1e6:.2f} MB{self._summary(task)}")
        for (how, why), losses in self._alike().items():
            low, high = min(losses.values()), max(losses.values())
            share = f"{low:.2%}" if low == high else f"{low:.2%} to {high:.2%}"
            lines.append(f"  {how}, {share} of the change is lost ({why}):")
            lines += [f"    {line}" for line in wrap(", ".join(losses), 116)]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _alike(self) -> dict[tuple[str, str], dict[str, float]]:
        """Losses for one reason in all tasks: the largest part of a change that is lost, by name without the number of a layer."""
        found: dict[tuple[str, str], dict[str, float]] = {}
        for tensors in self.lossy.values():
            for name, one in tensors.items():
                losses = found.setdefault((one.how, one.why), {})
                kind = of_all_layers(name)
                losses[kind] = max(losses.get(kind, 0.0), one.error)
        return found

    def _summary(self, task: str) -> str:
        carried = self.tensors.get(task, {}).values()
        counts = {how: sum(c.how == how for c in carried) for how in How.__args__}
        parts = [f"{count} {how}" for how, count in counts.items() if count]
        output = self.outputs.get(task)
        if output is not None:
            parts.append(f"outputs differ by up to {output:.2g} of the largest")
        return f" ({', '.join(parts)})" if parts else ""
