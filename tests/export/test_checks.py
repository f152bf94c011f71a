"""Laws of what an export is held against: an adapter that is none, or half of one, is told; rounding is not."""

import copy

import pytest
import torch
from helpers import normal
from torch import Tensor, nn

from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.export.checks import check_close
from fusion_bench_didi.export.report import Carried

TYPES = [torch.bfloat16, torch.float16, torch.float32]
#: Of an entry's change, in parts of the entries of the base model.
SIZES = [0.01, 0.1, 1.0]


def layer(weight: Tensor, dtype: torch.dtype) -> nn.Module:
    made = nn.Linear(*weight.shape[::-1], bias=False).to(dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
    return made


def check(product: Tensor, read: Tensor, dtype: torch.dtype, *, cut: float = 0.0):
    """An adapter by which ``read`` is added where a task adds ``product``, of which the report says what is lost."""
    start = layer(0.05 * normal(64, 48), dtype)
    base = start.weight.detach().float()
    wanted, found = (layer(base + change, dtype) for change in (product, read))
    change = wanted.weight.detach().float() - base
    kept = product * (1 - cut)
    carried = Carried("factors", float((change - kept).norm() / change.norm()))
    check_close(found, wanted, start, start, {"weight": carried}, "The adapter")


def product(size: float) -> Tensor:
    return 0.05 * size * normal(64, 3, seed=1) @ normal(3, 48, seed=2) / 3**0.5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TYPES)
def test_rounding_is_allowed(dtype, size):
    """Of sums in the order of someone else too, and of the product in the model's type."""
    exact = product(size)
    check(exact, exact, dtype)
    check(exact, exact * (1 + 1e-7 * normal(64, 48, seed=3)), dtype)
    check(exact, exact.to(dtype).float(), dtype)
    check(exact, 0.7 * exact, dtype, cut=0.3)


@pytest.mark.parametrize("part", [0.0, -1.0, 0.5, 2.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TYPES)
def test_another_change_is_told(dtype, size, part):
    if dtype is torch.bfloat16 and size == 0.01 and part in (0.5, 2.0):
        size = 0.03  # else the half is below what the type tells apart
    with pytest.raises(DiDiError, match="weight is off by"):
        check(product(size), part * product(size), dtype)


def test_what_the_report_does_not_speak_of_stays_to_the_bit():
    base = nn.Linear(3, 3)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.bias[0] += 1e-6
    with pytest.raises(DiDiError, match="changes bias, which the task does not"):
        check_close(other, base, base, base, {}, "The adapter")
