"""Networks that share a backbone's tensors, whatever its modules say of themselves."""

import pytest
import torch
from exact_models import exact_model, pool_of, seeded
from helpers import BASE
from mixed_net import close
from torch import nn

from fusion_bench_didi.errors import UnknownTaskError


class Listing(nn.Module):
    """Holds a layer, and a list that is empty."""

    def __init__(self):
        super().__init__()
        self.inner, self.entries = nn.Linear(6, 6), []

    def __len__(self) -> int:
        return len(self.entries)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Untrue(nn.Linear):
    def __bool__(self) -> bool:
        raise TypeError("ambiguous")


class Around(nn.Module):
    """One layer before another, and a place for one that is not there."""

    def __init__(self, first: nn.Module):
        super().__init__()
        self.first, self.last = first, nn.Linear(6, 3)
        self.register_module("none", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).tanh())


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


MADE = {
    "a module of length 0": lambda: Around(Listing()),
    "a model of length 0": Listing,
    "a module without truth": lambda: Around(Untrue(6, 6)),
    "a compiled layer": lambda: Around(compiled(nn.Linear(6, 6))),
}
TASKS = ["b", "a", None, "b"]


@pytest.mark.parametrize("how", ["layered", "grouped"])
@pytest.mark.parametrize("what", MADE)
@torch.no_grad()
def test_modules_are_there_whatever_their_truth_is(what, how):
    models = pool_of(seeded(MADE[what]))
    model, x = exact_model(models, how), torch.randn(4, 6)
    held = [(vars(m), vars(m).copy()) for m in model.backbone.modules()]
    for _ in range(2):
        found = model(x, task_ids=TASKS)
        for i, task in enumerate(TASKS):
            close(found[i : i + 1], models[task or BASE](x[i : i + 1]))
    for now, before in held:  # nothing was set on a module by way of what wraps it
        assert all(now[key] is value for key, value in before.items())


@torch.no_grad()
def test_a_compiled_part_that_is_looked_at_refuses_to_run_and_the_model_runs():
    models = pool_of(seeded(MADE["a compiled layer"]))
    model, x = exact_model(models), torch.randn(2, 6)
    part = model.first
    with pytest.raises(UnknownTaskError):
        part(x)
    found = model(x, task_ids=["a", "a"])
    close(found, models["a"](x))
