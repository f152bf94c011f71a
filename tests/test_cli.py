"""The real command in its own process: merge, save, evaluate with the host's stock pools, report."""

import json
from pathlib import Path

import pytest
from fusion_bench.utils import instantiate
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from helpers import pictures
from workplaces import TASKS, fusion_bench, write_workplace

from fusion_bench_didi.models.dynamic import DiDiModel

pytestmark = pytest.mark.slow


@pytest.fixture
def workplace(tiny_clip, tmp_path) -> Path:
    return write_workplace(tmp_path, tiny_clip)


def test_command_merges_saves_evaluates_and_reports(workplace, tiny_clip):
    done = fusion_bench(
        "method=didi/s",
        "method.factor_dtype=checkpoint",
        "modelpool=tiny",
        "taskpool=tiny",
        f"merged_model_save_path={workplace / 'merged'}",
        f"report_save_path={workplace / 'report' / 'program_report.json'}",
        cwd=workplace,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Failed to pretty print" not in done.stdout + done.stderr
    report = json.loads((workplace / "report" / "program_report.json").read_text())
    for task in TASKS:
        assert 0 <= report[task]["accuracy"] <= 1
    last = done.stdout.strip().splitlines()[-11:]
    assert last[0].split() == ["task", "accuracy"]
    assert [line.split()[0] for line in last[1:5]] == [*TASKS, "average"]
    assert f"model      {workplace / 'merged'}" in last
    assert "3 tasks" in last[5] and "of keeping all 3 models" in last[6]

    whole = json.loads(Path(report["didi"]["details"]).read_text())
    log = (workplace / "out" / "cli.log").read_text()
    assert f"report saved to {report['didi']['details']}" in log
    assert "DiDi-Merging: decompose, " in log  # a line per stage: nobody sees bars
    storage = whole["didi"]["storage"]
    assert 1.2 < storage["x_excl"] <= 1.24
    assert storage["x_incl"] == pytest.approx(storage["x_excl"] + 1)
    assert set(whole["didi"]["ranks"]["experts"]) == set(TASKS)

    model = DiDiModel.from_pretrained(workplace / "merged")
    assert model.storage.as_dict() == storage
    assert model.tasks == list(TASKS)

    # the report is of each task's own expert: the saved model gives the same losses
    from fusion_bench_didi.taskpool.clip_vision import TaskAwareCLIPVisionModelTaskPool

    pool = TaskAwareCLIPVisionModelTaskPool(
        test_datasets={t: pictures(i) for i, t in enumerate(TASKS)},
        processor=str(workplace / "clip"),
        clip_model=str(workplace / "clip"),
        dataloader_kwargs={"batch_size": 6},
    )
    again = pool.evaluate(model.eval())
    for task in TASKS:
        assert again[task] == pytest.approx(report[task])


def test_a_method_of_a_configuration_prints_the_plan_of_a_dry_run(workplace, capfd):
    """In this process, which has imported everything already."""
    changes = [
        f"hydra.searchpath=[file://{workplace / 'conf'}]",
        *("method=didi", "method.dry_run=true", "modelpool=tiny"),
    ]
    config = initialize_hydra_config("fabric_model_fusion", changes)
    method, pool = map(instantiate, (config.method, config.modelpool))
    assert method.run(pool) is None
    plan = capfd.readouterr().out
    assert "3 tasks: mnist, svhn, eurosat" in plan
    assert "vision_model.encoder.layers.*.mlp.fc1.weight" in plan
