"""Budgets that hold next to nothing, or nothing."""

import re

import pytest
import torch
from helpers import didi, merge_settings, task_vectors
from steep_layers import decaying
from torch import nn

from fusion_bench_didi.errors import BudgetError
from fusion_bench_didi.merging.pipeline import merge
from fusion_bench_didi.merging.settings import Budget


def pool() -> dict[str, nn.Module]:
    sizes = [(40, 30), (60, 20)]
    models = {"_pretrained_": nn.ParameterList(torch.zeros(s) for s in sizes)}
    for seed, task in enumerate("ab"):
        models[task] = nn.ParameterList(decaying(*size, seed) for size in sizes)
    return models


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("excl", [1e-9, 1e-3])
@pytest.mark.parametrize(
    "settings",
    [
        {"factor_dtype": "auto", "allocation": "greedy"},
        {"factor_dtype": "int4", "allocation": "uniform", "residual": "full"},
        {"factor_dtype": "int4", "allocation": "learned"},
        {"factor_dtype": "checkpoint", "residual": "full"},
    ],
)
def test_one_that_holds_nothing_is_refused_with_one_that_does(settings, excl, whole):
    """Otherwise all tasks would be the base model, and nothing would say so."""
    vectors = task_vectors(pool())
    with pytest.raises(BudgetError) as refusal:
        merge(vectors, merge_settings(Budget(excl + whole, whole), **settings))
    (named,) = re.findall(r"takes (\d+\.\d+)", str(refusal.value))
    assert excl + whole < float(named) < 0.03 + whole
    found = merge(vectors, merge_settings(Budget(float(named), whole), **settings))
    assert 0 < found.storage.x_excl <= float(named) - whole


def test_a_refused_one_leaves_nothing_to_go_on_from(tmp_path):
    """Or the same directory would be refused to a larger one."""
    settings = {"factor_dtype": "auto", "allocation": "greedy"}
    place = tmp_path / "merged"
    with pytest.raises(BudgetError, match="nothing of any task fits"):
        didi(pool(), budget=1e-9, output_dir=str(place), **settings)
    assert not place.exists()
    didi(pool(), budget=0.1, output_dir=str(place), **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
