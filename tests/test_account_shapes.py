"""Published storage figures from shapes alone; derivations in the docstrings of account_shapes."""

import copy

import pytest
import torch
from fusion_bench.models.smile_moe.linear_from_module import SmileMoELinear
from fusion_bench.models.we_moe import WeightEnsemblingMoE
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks import published_storage as shapes_alone
from fusion_bench_didi.artifacts.host_moe import host_storage
from fusion_bench_didi.method.baselines.emr import EMRMerging
from fusion_bench_didi.method.baselines.free import FreeMerging
from fusion_bench_didi.method.baselines.tsv_c import TSVCompression
from fusion_bench_didi.method.baselines.twin import TwinMerging

TASKS = tuple("abcdefgh")
P = 87_456_000


@pytest.fixture(scope="module")
def vit() -> CLIPVisionModel:
    with torch.device("meta"):
        return CLIPVisionModel(CLIPVisionConfig())


@pytest.fixture(scope="module")
def shapes(vit):
    return shapes_alone.shapes_of(vit)


def test_the_model_is_the_published_one(shapes):
    assert shapes_alone.tsv_c(shapes, TASKS).unit_bits == 32 * P


def test_masks_of_one_bit(shapes):
    report = shapes_alone.masked(shapes, TASKS)
    assert report.x_excl == pytest.approx(1.25, abs=1e-4)
    assert report.x_incl == pytest.approx(2.25, abs=1e-4)


@pytest.mark.parametrize(
    "options, x",
    [({}, 1.685), ({"conv": "matrix"}, 1.5025), ({"fold_sigma": False}, 1.685)],
)
def test_tsv_c(shapes, options, x):
    report = shapes_alone.tsv_c(shapes, TASKS, **options)
    assert report.x_excl == pytest.approx(x, abs=1e-3)
    assert report.x_incl == pytest.approx(1 + x, abs=1e-3)
    assert report.expert_bits["a"] / report.unit_bits == pytest.approx(x / 8, abs=1e-3)


def test_tsv_c_without_the_convolution(shapes):
    kept = {name: shape for name, shape in shapes.items() if len(shape) < 4}
    report = shapes_alone.tsv_c(kept, TASKS)
    assert report.excl_bits / (32 * P) == pytest.approx(1.469, abs=1e-3)


def test_folded_methods(vit, shapes):
    twin = shapes_alone.twin(shapes, TASKS)
    assert twin.backbone_bits == 0 and twin.x_incl == twin.x_excl
    linear = {
        f"{n}.weight": (l.m, l.n) for n, l in shapes_alone.linears_of(vit).items()
    }
    weights_only = shapes_alone.twin(linear, TASKS)
    assert sum(weights_only.expert_bits.values()) / (32 * P) == pytest.approx(
        8 * 0.1442, abs=1e-3
    )
    free = shapes_alone.free(shapes, TASKS)
    # 7 of 768 and 30 of 3072 per row are a little less than 1 %
    assert free.x_incl == pytest.approx(1.16, abs=0.02)
    untouched = ("layer_norm", "layrnorm", "layernorm", "embed")
    left = sum(
        torch.Size(shape).numel()
        for name, shape in shapes.items()
        if any(word in name for word in untouched)
    )
    assert free.backbone_bits == 32 * left


def test_smile(vit):
    linears = shapes_alone.linears_of(vit).values()
    report = shapes_alone.smile(P, linears, TASKS, rank=128, gate_rank=16)
    assert round(report.x_incl * P) == 268_605_696
    assert report.x_incl == pytest.approx(3.07, abs=5e-3)


def test_wemoe(vit):
    mlps = [m for n, m in vit.named_modules() if n.endswith(".mlp")]
    blocks = [(sum(p.numel() for p in mlp.parameters()), 768) for mlp in mlps]
    assert blocks == [(4_722_432, 768)] * 12
    report = shapes_alone.wemoe(P, blocks, TASKS)
    assert round(report.x_incl * P) == 547_970_400
    assert report.x_incl == pytest.approx(6.27, abs=5e-3)


def _values(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [4, -1])
def test_smile_is_what_the_host_stores(bias, rank):
    base = nn.Linear(12, 8, bias=bias)
    tuned = [nn.Linear(12, 8, bias=bias) for _ in range(3)]
    layer = SmileMoELinear(base, tuned, gate_k=2, k=rank, full_matrices=False)
    expected = shapes_alone.smile(
        _values(base),
        [shapes_alone.LinearShape(8, 12, bias)],
        "abc",
        rank=rank,
        gate_rank=2,
    )
    found = host_storage(nn.Sequential(layer), "abc", unit_bits=32 * _values(base))
    assert found == expected
    assert found.excl_bits + found.backbone_bits == 32 * _values(layer)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_wemoe_is_what_the_host_stores(layers):
    mlp = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
    block = WeightEnsemblingMoE(
        4,
        copy.deepcopy(mlp),
        [copy.deepcopy(mlp) for _ in "ab"],
        router_hidden_layers=layers,
    )
    model = nn.Sequential(nn.Linear(3, 4), block)
    values = _values(nn.Sequential(nn.Linear(3, 4), mlp))
    expected = shapes_alone.wemoe(
        values, [(_values(mlp), 4)], "ab", router_layers=layers
    )
    found = host_storage(model, "ab", unit_bits=32 * values)
    assert found == expected
    assert found.excl_bits + found.backbone_bits == 32 * _values(model)


def test_other_models_have_no_host_account(tiny_clip):
    assert host_storage(tiny_clip.base, "ab", unit_bits=1) is None


@pytest.mark.parametrize(
    "method, from_shapes",
    [
        (EMRMerging(), shapes_alone.masked),
        (TSVCompression(), shapes_alone.tsv_c),
        (TwinMerging(), shapes_alone.twin),
        (FreeMerging(), shapes_alone.free),
    ],
    ids=lambda value: type(value).__name__,
)
def test_shapes_and_methods_agree(tiny_clip, method, from_shapes):
    found = method.run(tiny_clip.pool_models()).storage
    expected = from_shapes(shapes_alone.shapes_of(tiny_clip.base), tiny_clip.tasks)
    assert found.as_dict() == {**expected.as_dict(), "layer_bits": found.layer_bits}
    assert dict(found.layer_bits) == dict(expected.layer_bits)
