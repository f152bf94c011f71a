"""Budgets that hold next to nothing, or nothing."""

import re

import pytest
import torch
from helpers import merge_settings, task_vectors
from steep_layers import decaying
from torch import nn

from fusion_bench_didi.errors import BudgetError
from fusion_bench_didi.merging.pipeline import merge
from fusion_bench_didi.merging.settings import Budget


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
    sizes = [(40, 30), (60, 20)]
    models = {"_pretrained_": nn.ParameterList(torch.zeros(s) for s in sizes)}
    for seed, task in enumerate("ab"):
        models[task] = nn.ParameterList(decaying(*size, seed) for size in sizes)
    vectors = task_vectors(models)
    with pytest.raises(BudgetError) as refusal:
        merge(vectors, merge_settings(Budget(excl + whole, whole), **settings))
    (named,) = re.findall(r"takes (\d+\.\d+)", str(refusal.value))
    assert excl + whole < float(named) < 0.03 + whole
    found = merge(vectors, merge_settings(Budget(float(named), whole), **settings))
    assert 0 < found.storage.x_excl <= float(named) - whole
