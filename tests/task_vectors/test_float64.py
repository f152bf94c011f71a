"""Checkpoints in float64: task vectors are differences of what they hold, not of what float32 makes of it."""

import torch
from helpers import BASE, didi, task_vectors
from torch import nn

from fusion_bench_didi.lowrank.row_blocks import differences, materialize, squared_norms


def test_small_changes_of_large_weights_are_exact():
    generator = torch.Generator().manual_seed(0)
    models = {
        name: nn.Linear(20, 30, bias=False, dtype=torch.float64)
        for name in (BASE, "a", "b")
    }
    change = 1e-9 * torch.randn(30, 20, generator=generator).double()
    models["a"].weight.data = models[BASE].weight.data + change
    models["b"].weight.data = models[BASE].weight.data.clone()
    exact = (models["a"].weight - models[BASE].weight).detach().float()
    tensor = task_vectors(models).tensor("weight")
    terms = tensor.differences()
    ways = [
        tensor.matrices(),
        [tensor.matrix(task) for task in range(2)],
        [materialize(term) for term in terms],
        [x for _, _, x in differences(terms)],
    ]
    for found, unchanged in ways:
        assert torch.equal(found, exact) and found.dtype == torch.float32
        assert not unchanged.any()
    whole = squared_norms(terms)
    torch.testing.assert_close(
        whole[0], exact.double().square().sum(), rtol=1e-6, atol=0
    )
    assert whole[1] == 0


def test_a_task_takes_nothing_from_what_the_base_model_holds():
    """Not the bits of its weights that float32 does not have."""
    generator = torch.manual_seed(0)
    models = {BASE: nn.Linear(20, 30, bias=False, dtype=torch.float64)}
    for task in "ab":
        models[task] = nn.Linear(20, 30, bias=False, dtype=torch.float64)
        change = torch.zeros(30, 20, dtype=torch.float64)
        change[:3] = 1e-9 * torch.randn(3, 20, generator=generator).double()
        models[task].weight.data = models[BASE].weight.data + change
    base = models[BASE].weight.detach().clone()
    model = didi(models, budget=0.3, factor_dtype="auto")
    for task, reported in model.info["relative_errors"].items():
        exact = models[task].weight.detach() - base
        lost = model.materialize(task).weight.detach() - base - exact
        found = float(lost.square().sum() / exact.square().sum())
        assert 0.0 < reported < 0.5
        torch.testing.assert_close(found, reported, rtol=1e-2, atol=0)
