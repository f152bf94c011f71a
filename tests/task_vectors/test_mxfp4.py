"""Mxfp4 is read as transformers decodes it, where the configuration says so; blocks without fitting scales are refused."""

import pytest
import torch
from torch import nn

from fusion_bench_didi.errors import CheckpointMismatchError
from fusion_bench_didi.task_vectors.mxfp4 import Mxfp4Source
from fusion_bench_didi.task_vectors.sources import ModuleSource, TensorSource

TOLD = {"quantization_config": {"quant_method": "mxfp4"}}


def source(config=TOLD, **tensors: torch.Tensor) -> TensorSource:
    """Of a live model with these tensors."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return Mxfp4Source.over(ModuleSource(module, "mnist"), config)


def coded(*shape: int) -> dict[str, torch.Tensor]:
    """All bytes in turn, and scales from 1 to 254."""
    count = torch.Size(shape).numel()
    blocks = (torch.arange(16 * count) % 256).to(torch.uint8).view(*shape, 16)
    scales = (1 + torch.arange(count) % 254).to(torch.uint8).view(shape)
    return {"up_blocks": blocks, "up_scales": scales}


def test_numbers_are_those_that_transformers_decodes():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = coded(2, 127, 4)
    want = mxfp4.convert_moe_packed_tensors(*tensors.values()).cpu()
    read = source(**tensors)
    info, found = read.infos()["up"], read.read("up")
    assert (info.shape, info.dtype) == (found.shape, found.dtype) == ((2, 128, 127), want.dtype)  # fmt: skip
    assert torch.equal(found, want)


def test_what_is_no_pair_is_read_as_it_is():
    pair = coded(1, 2, 1)
    alone, bias = {"down_blocks": pair["up_blocks"].clone()}, {"bias": torch.ones(3)}
    read = source(**pair, **alone, **bias)
    assert set(read.infos()) == {"up", *alone, *bias}
    assert torch.equal(read.read("bias"), torch.ones(3))
    assert set(source(None, **pair).infos()) == set(pair)


@pytest.mark.parametrize(
    "other",
    [{"up_scales": torch.ones(1, 2, 2).byte()}, {"up_scales": torch.ones(1, 2, 1)}, {"up_blocks": torch.ones(1, 2, 1, 16)}],  # fmt: skip
)
def test_scales_that_do_not_fit_are_refused(other):
    with pytest.raises(CheckpointMismatchError, match="mnist: up_blocks is .*Download"):
        source(**{**coded(1, 2, 1), **other})
