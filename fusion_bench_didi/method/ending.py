"""The last lines of a run: the host's program prints its report, and then what the merge came to.

The program has no signal for its end. What it calls last is wrapped on the *instance*, as for task pools: saving, evaluation,
and the hand-over of the report's file.
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fusion_bench.programs import FabricModelFusionProgram
from omegaconf import OmegaConf
from torch import nn

from ..checkpoint.directory import write_json
from ..models import DynamicModel
from ..models.pool_saving import fill_log_dir, saved_at
from ..pools.task_names import pool_tasks
from ..report.answer import Answer
from ..report.comparison import Comparison
from ..report.metrics import figure, log_metrics
from ..report.units import storage_units

log = logging.getLogger(__name__)
_MARK = "_didi_ending"


class Ending:
    """Gathers what a program says of a method's model, and prints it when the program is done.

    Args:
        method: has a ``title`` and a program.
    """

    def __init__(self, method: Any):
        self.method, self.program = method, method._program
        self.files: dict[str, str] = {}
        self.seconds: float | None = None
        self.answer: Answer | None = None
        self._start = time.perf_counter()
        self._stock: dict[str, Callable] = {}

    def attach(self) -> None:
        """Wrap what the program calls after the merge."""
        for name in ("save_merged_model", "evaluate_merged_model", "log_artifact"):
            self._stock[name] = getattr(self.program, name)
            setattr(self.program, name, getattr(self, name))
        setattr(self.program, _MARK, True)

    def save_merged_model(self, merged_model: Any) -> None:
        """As the program's; the merge is over here."""
        self.seconds = time.perf_counter() - self._start
        self._stock["save_merged_model"](merged_model)
        if place := saved_at(self.program) or self.method.output_dir:
            self.files["model"] = str(Path(place))
        if self.program.taskpool is None:
            self._finish(merged_model, {})

    def evaluate_merged_model(
        self, taskpool: Any, merged_model: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As the program's; the report goes whole to a file, and without its long lists to the program."""
        before = self._reports()
        evaluate = self._stock["evaluate_merged_model"]
        report = _plain(evaluate(taskpool, merged_model, *args, **kwargs))
        place = self._place()
        if place is not None and self.program.fabric.is_global_zero:
            self._write(report, place, before)
        last = self.program.report_save_path is None
        self._gather(merged_model, report, taskpool)
        if last:
            self._finish(merged_model, report)
        return self._short(report) if isinstance(report, Mapping) else report

    def log_artifact(self, *args: Any, **kwargs: Any) -> Any:
        """As the program's, which hands on its report and is done."""
        done = self._stock["log_artifact"](*args, **kwargs)
        file = Path(kwargs.get("local_path") or args[0])
        self.files.setdefault("report", str(file))
        self._finish(None, {})
        return done

    def _place(self) -> Path | None:
        """Where the run writes to: the logger's directory, else that of the program's report."""
        path = self.program.report_save_path
        if self.program.log_dir:
            return Path(self.program.log_dir)
        return Path(path).parent if path else None

    def _reports(self) -> set[Path]:
        place = self._place()
        return set(place.glob("report*.json")) if place else set()

    def _write(self, report: Any, place: Path, before: set[Path]) -> None:
        """The whole report into the file that the task pool wrote, or into one of that name where it wrote none."""
        made = sorted(self._reports() - before)
        place.mkdir(parents=True, exist_ok=True)
        free = (place / f"report{f'_{i}' * (i > 0)}.json" for i in range(10**6))
        file = made[-1] if made else next(f for f in free if not f.exists())
        write_json(file, report)
        self.files["details"] = str(file)
        if not made:
            log.info("Evaluation report saved to %s", file)

    def _short(self, report: Mapping[str, Any]) -> dict[str, Any]:
        told = report.get("didi")
        if told is None or "details" not in self.files:
            return dict(report)
        kept = ("method", "budget", "relative_error", "router")
        short = {key: told[key] for key in kept if key in told}
        short["storage"] = storage_units(told["storage"])
        return {**report, "didi": {**short, "details": self.files["details"]}}

    def _gather(self, model: Any, report: Any, taskpool: Any) -> None:
        told = report if isinstance(report, Mapping) else {}
        asked = pool_tasks(taskpool)
        found = {task: figure(told.get(task)) for task in asked}
        found = {task: one for task, one in found.items() if one is not None}
        known = self._known() if found else {}
        dynamic = model if isinstance(model, DynamicModel) else None
        info = dynamic.info if dynamic is not None else {}
        self.answer = Answer(
            self._title(info),
            asked if found else dynamic.tasks if dynamic is not None else [],
            {task: name for task, (name, _) in found.items()},
            {task: value for task, (_, value) in found.items()},
            known.get("pretrained", {}),
            known.get("individuals", {}),
            [task for task in asked if task not in found],
            dynamic.storage.as_dict() if dynamic is not None else {},
            info.get("relative_error"),
            self.seconds,
            self.files,
        )

    def _known(self) -> dict[str, dict[str, float]]:
        place = self._place()
        if place is None:
            return {}
        given = {k: getattr(self.program, f"_{k}") for k in ("modelpool", "taskpool")}
        plain = {k: OmegaConf.to_container(v, resolve=True) for k, v in given.items()}
        plain["fast_dev_run"] = bool(self.program.fast_dev_run)
        if (found := Comparison.nearest(place, plain)) is None:
            return {}
        file, comparison = found
        self.files["others by"] = str(file)
        return comparison.references

    def _title(self, info: Mapping[str, Any]) -> str:
        budget = f", budget {info['budget']:g}" if info.get("budget") else ""
        return f"{self.method.title}{budget}"

    def _finish(self, model: nn.Module | None, report: Mapping[str, Any]) -> None:
        if self.answer is None:
            self._gather(model, report, self.program.taskpool)
        self._detach()
        fabric = self.program.fabric
        log_metrics(fabric, self.answer.metrics)
        if fabric.is_global_zero:
            print(f"\n{self.answer}")

    def _detach(self) -> None:
        for name in self._stock:
            vars(self.program).pop(name, None)
        vars(self.program).pop(_MARK, None)


def _plain(value: Any) -> Any:
    """A report that JSON takes: numbers of libraries as Python's, what is none as text."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    known = value is None or isinstance(value, (str, int, float))
    return value if known else str(value)


def attach_ending(method: Any) -> None:
    """Let the program that runs a method end in its answer; the outermost method's, where one runs another."""
    program = method._program
    stock = isinstance(program, FabricModelFusionProgram)
    if not stock or type(program).run is not FabricModelFusionProgram.run:
        return
    if not getattr(program, _MARK, False):
        fill_log_dir(program)
        Ending(method).attach()
