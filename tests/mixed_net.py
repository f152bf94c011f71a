"""A small model of two tasks whose outputs in a mixed batch are known."""

from types import SimpleNamespace

import pytest
import torch
from exact_models import exact_model, pool_of, seeded
from helpers import BASE
from torch import nn

IDS = [1, 0, 1, 0, 2]


NAMES = ["b", "a", "b", "a", None]


class Net(nn.Module):
    """Two layers, one answer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).tanh())


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


@pytest.fixture
def net() -> SimpleNamespace:
    models = pool_of(seeded(Net))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    plain = [models["a"], models["b"], models[BASE]]
    rows = [plain[t](x[i : i + 1]) for i, t in enumerate(IDS)]
    return SimpleNamespace(model=exact_model(models), x=x, expected=torch.cat(rows))
