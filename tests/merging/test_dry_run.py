"""A dry run plans, finds faults in headers, and reads no weights."""

import copy
import functools

import pytest
from helpers import PLAIN, didi
from merged_tasks import pool

from fusion_bench_didi.errors import ModelPoolError
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.task_vectors.file_sources import SafetensorsSource


def test_dry_run_prints_the_plan_and_reads_no_weights(pool, monkeypatch, capsys):
    @functools.wraps(pool.load_model)  # a pool of a class of its own is not read
    def no_reading(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(SafetensorsSource, "read", no_reading)
    monkeypatch.setattr(pool, "load_model", no_reading)
    with pytest.raises(ModelPoolError, match="weights were read"):
        didi(pool, budget=1.4)
    assert DiDiMerging(budget=1.4, dry_run=True, **PLAIN).run(pool) is None
    plan = capsys.readouterr().out
    assert "3 tasks: eurosat, mnist, svhn" in plan
    line = next(line for line in plan.splitlines() if "layers.*.mlp.fc1.weight" in line)
    assert line.split()[1:6] == ["2", "64", "x", "32", str(4 * (64 + 32))]
    assert "never takes more than the budget says" in plan
    assert "to read:" in plan and "predicted peak memory" in plan


def test_dry_run_finds_the_faults_that_headers_show(pool, monkeypatch):
    from fusion_bench_didi.errors import BudgetError

    with pytest.raises(BudgetError, match="too small"):
        didi(pool, budget=0.001, dry_run=True)


def test_dry_run_of_a_merge_into_a_directory_predicts_less_memory(
    pool, capsys, tmp_path
):
    peaks = []
    for place in (None, str(tmp_path / "merged")):
        didi(pool, budget=1.4, dry_run=True, output_dir=place)
        last = capsys.readouterr().out.strip().splitlines()[-1]
        peaks.append(float(last.split()[-2]))
    assert not (tmp_path / "merged").exists() and peaks[1] <= peaks[0]


@pytest.mark.parametrize("budget", [1e6, "inf"])
def test_no_more_memory_is_predicted_than_every_module_takes_whole(
    pool, capsys, budget
):
    """However large the budget is, or endless."""
    didi(pool, budget=float(budget), dry_run=True)
    told = capsys.readouterr().out
    amount, unit = told.split()[-2:]
    assert unit in ("kB", "MB") and float(amount) < 1000
    assert ("without a limit" in told) == (budget == "inf")


def test_dry_run_works_on_live_models(tiny_clip, capsys):
    models = copy.deepcopy(tiny_clip.pool_models())
    assert didi(models, budget=1.4, dry_run=True) is None
    assert "layers.*.self_attn.q_proj.weight" in capsys.readouterr().out
