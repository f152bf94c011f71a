"""The end of a run of the host's program: few lines, details in a file, figures for the loggers."""

import json
from copy import copy
from pathlib import Path

import lightning
import pytest
import torch
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.programs import FabricModelFusionProgram
from fusion_bench.taskpool import BaseTaskPool
from lightning.fabric.loggers import CSVLogger
from omegaconf import OmegaConf

from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.method import DiDiMerging, RoutedMethod
from fusion_bench_didi.models.pool_saving import fill_log_dir


class Scores(BaseTaskPool):
    """Tells of each task a figure that depends on the expert that is on."""

    def __init__(self, tasks):
        super().__init__()
        self._test_datasets = dict.fromkeys(tasks)

    def evaluate_single_task(self, task_name, model):
        return {"accuracy": len(task_name) / 10, "loss": 1.0}

    def evaluate(self, model):
        return {t: self.evaluate_single_task(t, model) for t in self._test_datasets}


@pytest.fixture
def program(tmp_path) -> FabricModelFusionProgram:
    empty = OmegaConf.create({})
    made = FabricModelFusionProgram(
        empty,
        empty,
        empty,
        print_config=False,
        report_save_path=str(tmp_path / "program_report.json"),
    )
    logger = CSVLogger(tmp_path / "log", name="", version="")
    made._fabric_instance = lightning.Fabric(
        accelerator="cpu", devices=1, loggers=logger
    )
    return made


def end(program, method, models) -> dict:
    """What the program does with a method, in its order."""
    program.modelpool = BaseModelPool(models)
    program.taskpool = Scores(["mnist", "svhn", "eurosat"])
    method._program = program
    model = method.run(program.modelpool)
    program.save_merged_model(model)
    report = program.evaluate_merged_model(program.taskpool, model)
    program.log_artifact(local_path=program.report_save_path)
    return report


def test_a_run_ends_in_its_answer(program, tiny_clip, tmp_path, capfd):
    program.merged_model_save_path = "{log_dir}/merged"
    method = DiDiMerging(budget=0.6, refine_sweeps=2)
    report = end(program, method, tiny_clip.pool_models())
    printed = capfd.readouterr().out
    lines = printed[printed.index("task  ") :].splitlines()
    assert len(lines) <= 11
    assert lines[1].split() == ["mnist", "50.0"]
    assert lines[4].split() == ["average", "53.3"]
    told = dict(line.split(maxsplit=1) for line in lines[5:])
    assert told["method"].startswith("DiDi-Merging, budget 0.6, 3 tasks")
    assert "0.60x of one fine-tuned model" in told["storage"]
    assert told["model"] == str(tmp_path / "log" / "merged")
    assert Path(told["details"]) == tmp_path / "log" / "report.json"

    whole = json.loads((tmp_path / "log" / "report.json").read_text())["didi"]
    assert set(whole["ranks"]["experts"]) == set(tiny_clip.tasks)
    assert report["didi"]["details"] == told["details"]
    assert "ranks" not in report["didi"] and len(json.dumps(report["didi"])) < 1000
    names = (tmp_path / "log" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"accuracy/average", "storage/x_of_all", "seconds"} <= set(names)


def quiet_program(**given) -> FabricModelFusionProgram:
    """One without a logger."""
    made = FabricModelFusionProgram(None, OmegaConf.create({}), OmegaConf.create({}), print_config=False, **given)  # fmt: skip
    made._fabric_instance = lightning.Fabric(accelerator="cpu", devices=1)
    return made


def test_without_a_logger_the_run_has_the_directory_of_its_paths(
    tiny_clip, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    program = quiet_program(
        report_save_path="{log_dir}/program_report.json",
        merged_model_save_path="{log_dir}/model",
        path=OmegaConf.create({"log_dir": str(tmp_path / "run")}),
    )
    end(program, DiDiMerging(budget=0.6, refine_sweeps=2), tiny_clip.pool_models())
    assert {file.name for file in tmp_path.iterdir()} == {"run"}
    assert any((tmp_path / "run" / "model").glob("*.safetensors"))
    assert f"{tmp_path}/run/program_report.json" in capfd.readouterr().out


@pytest.mark.parametrize("key", ["report_save_path", "merged_model_save_path"])
def test_a_place_in_no_directory_is_refused_before_the_merge(tiny_clip, key):
    program = quiet_program(**{key: "{log_dir}/x"})
    with pytest.raises(SettingsError, match=f"{key}={{log_dir}}/x .*fabric.loggers"):
        end(program, DiDiMerging(budget=0.6), tiny_clip.pool_models())


def test_places_without_a_logger_stay_as_they_are(tmp_path):
    given = {key: str(tmp_path / key) for key in ("report_save_path", "merged_model_save_path")}  # fmt: skip
    program = quiet_program(**given)
    fill_log_dir(program)
    assert {key: getattr(program, key) for key in given} == given


@pytest.mark.parametrize("report", [None, [0.5], {"mnist": {"accuracy": torch.tensor(0.5)}}], ids=["none", "list", "some"])  # fmt: skip
def test_what_is_not_reported_is_named(
    program, tiny_clip, tmp_path, capfd, monkeypatch, report
):
    monkeypatch.setattr(Scores, "evaluate", lambda self, model: report and copy(report))
    end(program, DiDiMerging(budget=0.6, refine_sweeps=2), tiny_clip.pool_models())
    printed = capfd.readouterr().out
    some = isinstance(report, dict)
    missing = "eurosat, svhn" if some else "eurosat, mnist, svhn"
    assert f"no figure  of {missing}: the task pool reports none" in printed
    assert "3 tasks" in printed and "of keeping all 3" in printed
    assert ("mnist          50.0" in printed) == some
    written = json.loads((tmp_path / "log" / "report.json").read_text())
    assert written["mnist"] == {"accuracy": 0.5} if some else written == report


def test_the_outermost_method_speaks_and_a_second_run_anew(program, tiny_clip, capfd):
    inner = {
        "_target_": "fusion_bench_didi.method.DiDiMerging",
        "budget": 0.6,
        "refine_sweeps": 2,
    }
    method = RoutedMethod(base_method=inner, router_options={"directions": 2})
    for _ in range(2):
        end(program, method, tiny_clip.pool_models())
        printed = capfd.readouterr().out
        assert printed.count("method     Routed") == printed.count("storage  ") == 1
    assert "evaluate_merged_model" not in vars(program)
