"""What a run ends with, and what loggers get: few lines, three units, figures of others only where they are known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric.loggers import CSVLogger

from fusion_bench_didi.report.answer import Answer
from fusion_bench_didi.report.comparison import Comparison
from fusion_bench_didi.report.metrics import (
    falls,
    figure,
    is_share,
    log_metrics,
    row_metrics,
)
from fusion_bench_didi.report.terminal import print_table
from fusion_bench_didi.report.units import readable, storage_units

STORAGE = {
    "unit_bits": 8_000_000,
    "x_excl": 1.4,
    "x_incl": 2.4,
    "expert_bits": {"a": 1, "b": 2, "c": 3},
}
FIGURES = {"a": 0.9, "b": 0.6, "c": 0.3}


def row(key: str, accuracy: dict, **changes) -> dict:
    mean = sum(accuracy.values()) / len(accuracy)
    return {
        "key": key,
        "method": key,
        "error": None,
        "accuracy": accuracy,
        "average": mean,
        "retention": {"mean_of_ratios": 0.5},
        "x_excl": 1.4,
        "x_incl": 2.4,
        "bytes_excl": 1_400_000,
        "seconds": None,
        **changes,
    }


def comparison(*rows: dict, **config) -> dict:
    return {"tasks": list(FIGURES), "rows": list(rows), "config": config}


def test_answer_is_a_table_and_a_line_per_fact():
    answer = Answer(
        "Some-Merging, budget 1.4",
        [*FIGURES],
        figures=FIGURES,
        own={"a": 1.0, "b": 0.8, "c": 0.5},
        storage=STORAGE,
        error=0.01,
        seconds=3.21,
        files={"details": "there/report.json"},
    )
    lines = str(answer).splitlines()
    assert lines[0].split() == ["task", "accuracy", "own", "model", "retention"]
    assert lines[2].split() == ["b", "60.0", "80.0", "75.0"]
    assert lines[4].split() == ["average", "60.0", "76.7", "75.0"]
    told = "\n".join(lines[5:])
    assert "1.40x" in told and "1.40 MB" in told and "0.80x of keeping all 3" in told
    assert "3.2 s" in told and "there/report.json" in told
    assert len(lines) == 9


def test_what_is_not_known_is_not_printed():
    lines = str(Answer("Static", ["a"], figures={"a": 0.5}, own={"b": 1})).splitlines()
    assert lines[0].split() == ["task", "accuracy", "own", "model"]
    assert lines[1].split() == ["a", "50.0", "–"]
    assert "retention" not in Answer("", ["a"], figures={"a": 0.5}).metrics
    assert "tasks: a" not in lines[-1] and len(lines) == 4


@pytest.mark.parametrize("name", ["loss", "perplexity", "test/mse"])
def test_what_is_no_share_is_not_in_per_cent(name):
    figures = {"a": 0.0051, "b": 0.0057}
    answer = Answer("", [*figures], dict.fromkeys(figures, name), figures, own=figures)
    lines = str(answer).splitlines()
    assert lines[0].split() == ["task", name, "own", "model"]
    assert [line.split()[1] for line in lines[1:4]] == ["0.0051", "0.0057", "0.0054"]
    assert answer.metrics[f"{name}/average"] == pytest.approx(0.0054)
    assert "retention" not in answer.metrics


def test_accuracies_above_one_are_as_they_were_told():
    lines = str(Answer("", ["a"], figures={"a": 93.75}, own={"a": 96})).splitlines()
    assert lines[1].split() == ["a", "93.75", "96"]


def test_figures_of_several_kinds_are_named_and_have_no_average():
    figures, names = {"a": 0.9375, "b": 0.0057}, {"a": "accuracy", "b": "loss"}
    answer = Answer("", [*figures], names, figures)
    lines = str(answer).splitlines()
    assert lines[0].split() == ["task", "figure"]
    assert lines[1].split() == ["a:", "accuracy", "0.9375"]
    assert lines[2].split() == ["b:", "loss", "0.0057"]
    assert lines[3].split() == ["average", "–"]
    assert answer.metrics == {"accuracy/a": 0.9375, "loss/b": 0.0057}
    # shares have one, as published tables of GLUE do
    names = {"b": "spearman_rho"}
    assert str(Answer("", [*figures], names, figures)).splitlines()[3].split() == ["average", "47.2"]  # fmt: skip


def test_tasks_without_a_figure_are_named():
    answer = Answer("X", [*"abc"], figures={"a": 0.5, "c": 1.0}, own=FIGURES, missing=["b"], storage=STORAGE)  # fmt: skip
    lines = str(answer).splitlines()
    assert lines[2].split() == ["b", "–", "60.0"]
    assert lines[4].split() == ["average", "–", "60.0"]
    assert "3 tasks" in lines[5] and lines[6].startswith("no figure  of b:")
    assert answer.metrics.keys() & {"accuracy/average", "retention"} == set()


def test_units_of_storage():
    units = storage_units(STORAGE)
    assert units["megabytes"] == pytest.approx(1.4)
    assert units["x_of_all"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    "bits, text",
    [(0, "0 bytes"), (8 * 999, "999 bytes"), (8 * 1234, "1.23 kB"), (8 * 56_700, "56.7 kB"), (8 * 999_900, "1.00 MB"), (8e15, "1000 TB")],  # fmt: skip
)
def test_readable_sizes(bits, text):
    assert readable(bits) == text


def test_figure_of_a_task():
    assert figure({"loss": 2, "accuracy": 0.5}) == ("accuracy", 0.5)
    assert figure({"perplexity": 3.0, "loss": 1.0}) == ("perplexity", 3.0)
    assert figure(0.25) == ("figure", 0.25)
    assert figure({"text": "none"}) is None and figure(None) is None
    # numbers of libraries are numbers, and accuracy comes before what else there is
    tensor = {"accuracy": torch.tensor(0.5), "loss": 0.3}
    assert figure(tensor) == ("accuracy", 0.5)
    assert figure({"loss": 0.3, "accuracy": np.float32(0.5)}) == ("accuracy", 0.5)
    assert figure(torch.tensor(0.25)) == ("figure", 0.25)
    assert figure({"accuracy": torch.tensor([0.5, 0.1]), "f1": 0.2}) == ("f1", 0.2)


def test_a_figure_of_which_more_is_better_comes_first():
    assert figure({"loss": 0.3, "f1": 0.5}) == ("f1", 0.5)
    assert figure({"loss": 0.3, "mse": 0.5}) == ("loss", 0.3)


@pytest.mark.parametrize(
    "name",
    "loss eval_loss nll NLL perplexity word_perplexity ppl mse rmse mae error_rate err wer cer bits_per_byte".split(),
)
def test_less_is_better_of_some(name):
    assert falls(name) and not is_share(name, 0.5)


@pytest.mark.parametrize("name", "accuracy acc top1 f1 exact_match water auc".split())
def test_shares_are_within_0_and_1(name):
    assert is_share(name, 0) and is_share(name, 1 + 1e-7)
    for value in (-0.1, 1.1, 93.8, float("nan"), float("inf")):
        assert not is_share(name, value)
    assert is_share("spearman_rho", -0.1) and not is_share("spearman_rho", -1.1)


def test_figures_of_others_come_from_a_comparison_on_equal_pools(tmp_path):
    base, own = row("pretrained", FIGURES), row("individuals", {**FIGURES, "a": 1.0})
    pools = {"modelpool": {"x": 1}, "taskpool": {"y": 2}}
    told = comparison(base, own, row("didi", FIGURES), **pools)
    (tmp_path / "comparison.json").write_text(json.dumps(told))
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    file, found = Comparison.nearest(run, pools)
    assert file == tmp_path / "comparison.json"
    own = {**FIGURES, "a": 1.0}
    assert found.references == {"pretrained": FIGURES, "individuals": own}
    assert Comparison.nearest(run, {**pools, "taskpool": {"y": 3}}) is None
    assert Comparison.nearest(run, {**pools, "fast_dev_run": True}) is None
    assert Comparison.nearest(run / "too" / "deep", pools) is None


def test_table_of_a_comparison_says_what_failed(capsys):
    rows = [row("didi", FIGURES), row("bad", FIGURES, error="ValueError: no")]
    print_table(comparison(*rows))
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "didi" in line)
    told = ["didi", "60.0", "50.0", "1.40", "1.40", "MB", "0.80", "–", "90", "60", "30"]
    assert line.split() == told
    assert "bad" in printed and "failed" in printed


def test_loggers_get_the_figures_at_once(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fabric = SimpleNamespace(_loggers=[logger], loggers=[logger], is_global_zero=True)
    fabric.log_dict = logger.log_metrics
    log_metrics(fabric, row_metrics(row("didi", FIGURES)))
    log_metrics(fabric, Answer("", ["a"], figures={"a": 0.5}, storage=STORAGE).metrics)
    head, *values = (tmp_path / "metrics.csv").read_text().splitlines()
    names = head.split(",")
    assert {"didi/average", "didi/accuracy/a", "storage/megabytes"} <= set(names)
    assert "didi/seconds" not in names and len(values) == 2
