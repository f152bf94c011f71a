"""Tasks and entries are spread over ranks: each once, on all of its samples, and with the figures of one process."""

import json
import os

import lightning as L
import pytest
from omegaconf import OmegaConf

from benchmarks.processes import on_ranks
from fusion_bench_didi.demo.pools import DemoCLIPVisionModelPool as Models
from fusion_bench_didi.demo.pools import DemoCLIPVisionModelTaskPool as Tasks
from fusion_bench_didi.distributed.fabrics import fabric_of_one
from fusion_bench_didi.distributed.ranks import ranks_here
from fusion_bench_didi.errors import RankError
from fusion_bench_didi.method import DiDiMerging
from fusion_bench_didi.programs.compare import ComparisonProgram
from fusion_bench_didi.programs.entries import dependent, read_entries
from fusion_bench_didi.programs.scoring import Scorer
from fusion_bench_didi.taskpool.over_ranks import combined, evaluated
from fusion_bench_didi.taskpool.task_switching import attach

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

DIDI = {"refine_sweeps": 2}
ENTRIES = {
    "individuals": {"method": "individuals", "group": "reference"},
    "averaging": {"method": "simple_average", "group": "static"},
    "emr": {"method": "didi/emr", "group": "dynamic"},
    "as_emr": {
        "method": "didi",
        "overrides": DIDI,
        "budget_of": "emr",
        "group": "dynamic",
    },
}


def of_two(rank: int) -> L.Fabric:
    """As each of two processes that Fabric has started gets it: its loaders give a half of the samples."""
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE="2", NODE_RANK="0")
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    assert fabric.world_size == 2
    return fabric


def task_pool(demo_suite: dict[str, str]) -> Tasks:
    return Tasks(**demo_suite, dataloader_kwargs={"batch_size": 7})


def test_tasks_are_evaluated_once_and_whole(demo_suite):
    def evaluate(rank: int | None) -> tuple[dict, list[str]]:
        model = DiDiMerging(budget=0.6, **DIDI).run(Models(**demo_suite))
        taskpool, done = task_pool(demo_suite), []
        if rank is not None:
            taskpool._fabric_instance = of_two(rank)
        stock = taskpool._evaluate
        taskpool._evaluate = lambda *a, **k: done.append(k["task_name"]) or stock(*a, **k)  # fmt: skip
        attach(taskpool)
        report = taskpool.evaluate(model)
        report["didi"] = None
        return report, done

    one, tasks = evaluate(None)
    (first, some), (second, others) = on_ranks(2, evaluate)
    assert first == second == one
    assert list(first) == list(one)
    assert some and others and sorted(some + others) == sorted(tasks)


def test_rows_are_those_of_one_process(demo_suite, tmp_path):
    def compare(rank: int | None) -> tuple[dict, list[str]]:
        directory = tmp_path / ("one" if rank is None else "two")
        config = {
            "entries": ENTRIES,
            "modelpool": {
                "_target_": f"{Models.__module__}.{Models.__name__}",
                **demo_suite,
            },
            "taskpool": {
                "_target_": f"{Tasks.__module__}.{Tasks.__name__}",
                **demo_suite,
            },
            "path": {"log_dir": str(directory)},
            "seed": 0,
            "report": False,
        }
        program = ComparisonProgram(**OmegaConf.create(config))
        if rank is not None:
            program._fabric_instance = of_two(rank)
        seen, stock = [], Scorer.scores
        Scorer.scores = lambda *a: seen.append(a[-1]) or stock(*a)
        try:
            return program.run(), seen
        finally:
            Scorer.scores = stock

    one, scored = compare(None)
    (first, some), (second, others) = on_ranks(2, compare)
    assert timeless(first) == timeless(second) == timeless(one)
    written = json.loads((tmp_path / "two" / "comparison.json").read_text())
    assert {**first, "made": None} == {**written, "made": None}
    assert sorted(some + others) == sorted(scored)  # whoever asks first


def timeless(comparison: dict) -> dict:
    rows = [
        {k: v for k, v in row.items() if k not in ("seconds", "peak_gb", "added_gb")}
        for row in comparison["rows"]
    ]
    assert not any(row["error"] for row in rows)
    plain = {key: value for key, value in comparison.items() if key != "made"}
    return {**plain, "rows": rows}


def test_entries_stay_with_those_they_depend_on():
    entries = read_entries(ENTRIES)
    groups = [[entry.key for entry in group] for group in dependent(entries)]
    assert groups == [["individuals"], ["averaging"], ["emr", "as_emr"]]
    alone = [[entry.key] for entry in entries if entry.key != "emr"]
    left = dependent([entry for entry in entries if entry.key != "emr"])
    assert [[e.key for e in group] for group in left] == alone


def test_entries_stay_with_those_whose_directory_they_share():
    """Two searches that go on from one another would find each other's lock."""
    here, there = {"directory": "a"}, {"directory": "b"}
    config = {
        "search": {"method": "didi/merge", "overrides": here},
        "emr": {"method": "didi/emr"},
        "other": {"method": "didi/merge", "overrides": there},
        "routed": {"method": "didi/routed", "overrides": {"base_method": here}},
        "plain": {"method": {"_target_": "X", "directory": "b"}},
        "as_emr": {"method": "didi", "budget_of": "emr"},
        "both": {"method": "X", "overrides": here, "budget_of": "as_emr"},
    }
    entries = read_entries({k: {**e, "group": "dynamic"} for k, e in config.items()})
    groups = [[entry.key for entry in group] for group in dependent(entries)]
    assert groups == [
        ["search", "emr", "routed", "as_emr", "both"],
        ["other", "plain"],
    ]


def test_numbers_are_shared_out_once():
    def share(_: int) -> list[list[int]]:
        ranks, found = ranks_here(), []
        for count in (5, 0, 3):
            found.append(list(ranks.share(count)))
            ranks.gather(None)
        return found

    for count, first, second in zip((5, 0, 3), *on_ranks(2, share)):
        assert sorted(first + second) == list(range(count))
    assert share(0) == [[0, 1, 2, 3, 4], [], [0, 1, 2]]


def test_a_pool_that_tells_nothing_of_its_tasks_is_refused():
    class Silent:
        tasks = None

        def __init__(self):
            self.tasks = ["a", "b", "c"]

        def evaluate(self, model):
            return {"figure": 1.0}

    def evaluate(_: int) -> None:
        pool, ranks = Silent(), ranks_here()
        ranks.gather(None)  # each has found the others
        evaluated(pool, pool.evaluate, None, ranks=ranks)

    for error in on_ranks(2, evaluate):
        assert isinstance(error, RankError) and "Silent reports no figures" in str(
            error
        )


def test_ranks_without_a_task_get_the_report_too():
    parts = [{"a": {"x": 1.0}, "average": {"x": 1.0}}, None]
    assert combined(parts, ["a"]) == parts[0]


def test_a_process_by_itself_keeps_device_and_precision(monkeypatch):
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    assert fabric_of_one(fabric) is fabric
    monkeypatch.setattr(L.Fabric, "world_size", 2)
    alone = fabric_of_one(fabric)
    assert alone is not fabric and alone.device == fabric.device
    assert alone._precision.precision == "bf16-true"
