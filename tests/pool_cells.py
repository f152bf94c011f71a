"""What a model pool must be able to do, a function per column: each returns nothing, or raises."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from helpers import PLAIN, QUICK, floats
from host_pools import HostPool
from torch import Tensor, nn

from fusion_bench_didi import load
from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.pools.opening import load_backbone, load_model
from fusion_bench_didi.taskpool import attach
from fusion_bench_didi.taskpool.lm_eval_harness import is_harness

TOLERANCE = 2e-4


@dataclass
class Bench:
    """A pool on disk, and what several cells need of it."""

    row: HostPool
    place: Path
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def pool(self) -> Any:
        if "pool" not in self.made:
            self.made["pool"] = self.row.write(self.place)
        return self.made["pool"]

    @property
    def merged(self) -> DiDiModel:
        """With a budget for everything."""
        if "merged" not in self.made:
            self.made["merged"] = self.merge(float("inf"))
        return self.made["merged"]

    def merge(self, budget: float, taskpool: Any = None, **settings: Any) -> Any:
        method = DiDiMerging(budget=budget, **{**PLAIN, **QUICK, **settings})
        method._program = SimpleNamespace(taskpool=taskpool)
        return method.run(self.pool)

    def run(self, model: nn.Module, **task: Any) -> Tensor:
        """The outputs of a batch, in float32."""
        inputs = self.row.inputs
        with torch.no_grad():
            if isinstance(inputs, tuple):
                found = model(*inputs, **task)
            else:
                found = model(**inputs, **task)
        return (found if isinstance(found, Tensor) else found[0]).float()

    def close(self, found: Tensor, expected: Tensor) -> None:
        """Within rounding of the type that the models are in."""
        first = next(p for p in self.merged.parameters() if p.is_floating_point())
        tolerance = TOLERANCE if first.dtype == torch.float32 else 0.1
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def dry_run(bench: Bench) -> None:
    """Prints the plan of every matrix, and merges nothing."""
    file = bench.place / "plan.txt"
    with file.open("w") as out, contextlib.redirect_stdout(out):
        assert bench.merge(1.4, dry_run=True) is None
    assert f"{len(bench.pool.model_names)} tasks" in file.read_text()
    assert len(file.read_text().splitlines()) > 8


def merge(bench: Bench) -> None:
    """Keeps within its budget, in the type of the base model."""
    model = bench.merge(0.5)
    assert 0 < model.storage.x_excl <= 0.5
    found, want = floats(model.backbone), floats(load_backbone(bench.pool))
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in want.items()}  # fmt: skip


def evaluate(bench: Bench) -> None:
    """A stock task pool gives every task the figures of the task's own model."""
    if bench.row.taskpool is None:
        raise DiDiError("No task pool of the host runs such models.")
    pool, taskpool = bench.pool, bench.row.taskpool(bench.place, bench.pool)
    model = bench.merge(float("inf"), taskpool)
    report = taskpool.evaluate(model)
    for task in pool.model_names:
        plain = bench.row.taskpool(bench.place, pool)
        if is_harness(plain):
            attach(plain)  # by itself it returns nothing
        with _trainable(load_model(pool, task)) as own:
            assert report[task] == _near(plain.evaluate(own)[task])


def save_and_load(bench: Bench) -> None:
    """Through the pool's own ``save_model``; back with the base model at hand, and without."""
    place = bench.place / "merged"
    model = bench.merged
    bench.pool.save_model(model, str(place))
    DiDiModel.from_pretrained(place, load_backbone(bench.pool))
    again = load(place)
    assert type(again.backbone) is type(model.backbone)
    for task in model.tasks:
        left, right = floats(model.materialize(task)), floats(again.materialize(task))
        assert left.keys() == right.keys()
        assert all(left[name].equal(right[name]) for name in left)


def materialize(bench: Bench) -> None:
    """A plain model of its own, with the fine-tuned model's tensors, statistics to the bit, and outputs."""
    model = bench.merged
    plain = {task: model.materialize(task) for task in model.tasks}
    model.set_task(model.tasks[0])  # plain models do not follow it
    for task, one in plain.items():
        own = load_model(bench.pool, task).eval()
        assert type(one) is type(own)
        found, expected = one.state_dict(), own.state_dict()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            if "running_" in name or not value.is_floating_point():
                assert found[name].equal(value), name
            bench.close(found[name].float(), value.float())
        if bench.row.inputs:
            bench.close(bench.run(one.eval()), bench.run(own))


def mixed_batch(bench: Bench) -> None:
    """Every sample as its own task has it."""
    if not bench.row.inputs:
        raise DiDiError(
            "The pool gives a list of layers, which have no forward of their own to run a batch by."
        )
    model = bench.merged.eval()
    tasks = [model.tasks[i % 2] for i in range(4)]
    expected = {}
    for task in model.tasks:
        model.set_task(task)
        expected[task] = bench.run(model)
    model.unset_task()
    found = bench.run(model, task_ids=tasks)
    for i, task in enumerate(tasks):
        bench.close(found[i], expected[task][i])


CELLS: dict[str, Callable[[Bench], None]] = {
    "dry run": dry_run,
    "merge": merge,
    "evaluate": evaluate,
    "save and load": save_and_load,
    "materialize": materialize,
    "mixed batch": mixed_batch,
}


def outcome(bench: Bench, cell: str) -> str:
    """``yes``, or what the refusal says; other errors are raised."""
    try:
        CELLS[cell](bench)
    except DiDiError as error:
        return str(error).replace(str(bench.place), "DIRECTORY")
    return "yes"


@contextlib.contextmanager
def _trainable(model: nn.Module):
    """Fabric wants something to train."""
    yield model.eval().requires_grad_(True)


def _near(report: Any) -> Any:
    import pytest

    return pytest.approx(report, abs=1e-3)
