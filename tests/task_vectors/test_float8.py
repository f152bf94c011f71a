"""Float8 is read by its scales; where they are missing, or stand for blocks that nobody told, it is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fusion_bench_didi.errors import CheckpointMismatchError
from fusion_bench_didi.task_vectors.float8 import Float8Source
from fusion_bench_didi.task_vectors.sources import ModuleSource


def float8(rows: int = 128, columns: int = 128) -> torch.Tensor:
    return torch.ones(rows, columns).to(torch.float8_e4m3fn)


def source(config=None, **tensors: torch.Tensor) -> Float8Source:
    """Of a live model with these tensors."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return Float8Source.over(ModuleSource(module, "mnist"), config)


def quantized(**told) -> dict:
    return {"quantization_config": told}


def blocks(rows: int, columns: int, *sides: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A scale per block, each another, and the same per entry."""
    shape = [math.ceil(n / side) for n, side in zip((rows, columns), sides)]
    scale = torch.arange(1.0, 1 + math.prod(shape)).view(shape)
    whole = scale.repeat_interleave(sides[0], 0).repeat_interleave(sides[1], 1)
    return scale, whole[:rows, :columns]


# --- scales that are missing ------------------------------------------------------


def test_a_matrix_without_a_scale_beside_one_that_has_it():
    found = source(a=float8(), a_scale=torch.ones(1), b=float8(), c=torch.ones(2, 2))
    assert set(found.faults) == {"b"}
    assert "without a scale" in found.faults["b"] and "a has one" in found.faults["b"]


@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8", "compressed-tensors"])
@pytest.mark.parametrize("form", ["file", "object"])
def test_no_scale_where_the_configuration_tells_of_scales(method, form):
    config = quantized(quant_method=method)
    if form == "object":
        told = SimpleNamespace(to_dict=lambda: {"quant_method": method})
        config = SimpleNamespace(quantization_config=told)
    found = source(config, a=float8(), norm=torch.ones(3).to(torch.float8_e5m2))
    assert set(found.faults) == {"a"} and f"quant_method={method}" in found.faults["a"]


@pytest.mark.parametrize("config", [None, {}, quantized(bits=8), quantized(quant_method=5), {"quantization_config": 5}])  # fmt: skip
def test_without_scales_and_without_a_word_of_them_numbers_are_as_they_are(config):
    found = source(config, a=float8(), norm=torch.ones(3).to(torch.float8_e5m2))
    assert not found.faults and found.read("a").eq(1).all()


# --- blocks -----------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(96, 96), (100, 40), (128, 128), (1, 48)])
def test_blocks_are_those_of_the_configuration(sides):
    scale, whole = blocks(128, 192, *sides)
    config = quantized(quant_method="fp8", weight_block_size=[*sides])
    found = source(config, a=float8(128, 192), a_scale_inv=scale)
    assert found.read("a").equal(whole)


def test_blocks_of_experts_in_one_tensor():
    scale, whole = blocks(128, 192, 96, 96)
    weight = torch.stack([float8(128, 192)] * 3)
    config = quantized(quant_method="fp8", weight_block_size=[96, 96])
    found = source(config, a=weight, a_scale_inv=torch.stack([scale, 2 * scale, scale]))
    assert found.read("a").equal(torch.stack([whole, 2 * whole, whole]))


@pytest.mark.parametrize("scale", [torch.ones(2, 3), torch.ones(1), torch.ones(128, 1)])
def test_scales_of_other_blocks_than_the_configuration_says(scale):
    config = quantized(quant_method="fp8", weight_block_size=[128, 128])
    with pytest.raises(CheckpointMismatchError, match=r"expected \(1, 2\).*=\[128, 128\]"):  # fmt: skip
        source(config, a=float8(128, 192), a_scale_inv=scale)


@pytest.mark.parametrize("told", [5, "96", [96], [96, 0], [96, "96"]])
def test_sides_of_blocks_that_are_none(told):
    with pytest.raises(CheckpointMismatchError, match="weight_block_size=.*expected rows"):  # fmt: skip
        source(quantized(weight_block_size=told), a=float8())


@pytest.mark.parametrize(
    "shape, sides",
    [
        ((128, 128), (64, 64)),
        ((192, 128), (128, 128)),  # rows alone could be in blocks of 96
        ((576, 1024), (128, 128)),
        ((192, 256), (64, 128)),
        ((192, 256), (1, 128)),
        ((192, 256), (192, 1)),
    ],
)
def test_blocks_that_follow_from_shapes(shape, sides):
    scale, whole = blocks(*shape, *sides)
    assert source(a=float8(*shape), a_scale_inv=scale).read("a").equal(whole)


@pytest.mark.parametrize(
    "shape, side",
    [((192, 128), 96), ((192, 192), 96), ((192, 192), 128), ((480, 480), 96)],
)
def test_blocks_that_shapes_do_not_tell(shape, side):
    scale, _ = blocks(*shape, side, side)
    with pytest.raises(CheckpointMismatchError, match="Say rows and columns of a block as .*weight_block_size"):  # fmt: skip
        source(a=float8(*shape), a_scale_inv=scale)
