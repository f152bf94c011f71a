"""What one read of every tensor tells: changes that count, and such that are too small to be calculated with."""

import pytest
import torch
from helpers import merge_settings, task_vectors
from torch import nn

from fusion_bench_didi.errors import ModelPoolError
from fusion_bench_didi.merging.pipeline import merge


def pool(*sizes: tuple[float, float], dtype: torch.dtype = torch.float32):
    """Two matrices of zeros that tasks change by normal numbers of such sizes."""
    generator = torch.Generator().manual_seed(0)
    zeros = [torch.zeros(30, 40, dtype=dtype) for _ in range(2)]
    models = {"_pretrained_": nn.ParameterList(zeros)}
    for task, own in zip("abc", sizes):
        noise = torch.randn(2, 30, 40, generator=generator, dtype=dtype)
        models[task] = nn.ParameterList(size * x for size, x in zip(own, noise))
    return task_vectors(models)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tiny", [1e-19, 1e-22, 1e-30])
def test_changes_whose_squares_underflow_are_named_and_left(tiny, dtype):
    vectors = pool((1.0, tiny), (tiny, 1.0), (1.0, 1.0), dtype=dtype)
    report = merge(vectors, merge_settings(0.3, factor_dtype="auto")).report
    for task, left in {"a": ["1"], "b": ["0"], "c": []}.items():
        assert report.tensors[task]["left as in the base model"] == left
        assert report.tensors[task]["merged"] == 2 - len(left)
    for name, tensor in report.errors.items():
        whole = report.energy[name]
        assert bool((tensor <= 1.2 * whole + 1e-30).all()) and bool((whole > 0).any())


def test_a_pool_of_nothing_else_is_refused():
    with pytest.raises(ModelPoolError, match="but for less than any weight notices"):
        merge(pool((1e-20, 1e-19), (0.0, 1e-30)), merge_settings(0.3))


@pytest.mark.parametrize("size", [1e-16, 1e12])
def test_others_are_merged_as_if_they_were_of_common_size(size):
    found = [
        merge(pool((x, x), (x, x)), merge_settings(0.5, factor_dtype="auto")).report
        for x in (1.0, size)
    ]
    one, other = (report.relative_error for report in found)
    assert other == pytest.approx(one, rel=1e-3)
