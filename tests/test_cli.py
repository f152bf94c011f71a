"""The real command in its own process: merge, save, evaluate with the host's stock pools, report."""

import json
import os
import subprocess
import sysconfig
from pathlib import Path

import datasets
import pytest
from helpers import pictures, write_clip
from omegaconf import OmegaConf

from fusion_bench_didi.models.dynamic import DiDiModel

pytestmark = pytest.mark.slow
TASKS = ("mnist", "svhn", "eurosat")


def fusion_bench(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    script = Path(sysconfig.get_path("scripts")) / "fusion_bench"
    out = cwd / "out"
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cwd / "cache")}
    return subprocess.run(
        [
            str(script),
            f"--config-dir={cwd / 'conf'}",
            f"hydra.run.dir={out}",
            f"path.log_dir={out}",
            "print_config=false",
            *arguments,
        ],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def workplace(tiny_clip, tmp_path) -> Path:
    """Models, data and a configuration of stock pools, as a user would have them."""
    clip = write_clip(tmp_path / "clip", tiny_clip.base)
    models = tiny_clip.save(tmp_path / "models")
    data = {}
    for seed, task in enumerate(TASKS):
        rows = pictures(seed)
        columns = {key: [row[key] for row in rows] for key in ("image", "label")}
        features = datasets.Features(
            image=datasets.Image(), label=datasets.Value("int64")
        )
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(folder / "test-00000-of-00001.parquet")
        data[task] = {
            "_target_": "datasets.load_dataset",
            "path": str(folder),
            "split": "test",
        }
    pool = {
        "defaults": [{"CLIPVisionModelPool@": "_template"}],
        "models": {name: str(models / name) for name in ("_pretrained_", *TASKS)},
        "processor": str(clip),
    }
    tasks = {
        "defaults": [{"CLIPVisionModelTaskPool@": "_template"}],
        "base_model": str(clip),
        "test_datasets": data,
        "dataloader_kwargs": {
            "batch_size": 6,
            "num_workers": 0,
            "pin_memory": False,
        },
    }
    for group, content in (("modelpool", pool), ("taskpool", tasks)):
        (tmp_path / "conf" / group).mkdir(parents=True)
        OmegaConf.save(content, tmp_path / "conf" / group / "tiny.yaml")
    return tmp_path


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
    assert (
        "DiDi-Merging: decompose (" in log
    )  # a line per stage where there is no terminal
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


def test_command_prints_the_plan_of_a_dry_run(workplace):
    done = fusion_bench(
        "method=didi", "method.dry_run=true", "modelpool=tiny", cwd=workplace
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "3 tasks: mnist, svhn, eurosat" in done.stdout
    assert "vision_model.encoder.layers.0.mlp.fc1.weight" in done.stdout
