"""Weights of the objective: by matrix, by task, by direction."""

import copy

import pytest
import torch
from helpers import didi, merge_settings
from test_common import as_task_vectors, in_common
from torch import nn

from fusion_bench_didi.errors import ModelPoolError
from fusion_bench_didi.lowrank.factors import LowRankFactors
from fusion_bench_didi.lowrank.refinement import FactorSet
from fusion_bench_didi.merging.loss_weights import block_of
from fusion_bench_didi.merging.metric import Metric, input_moments
from fusion_bench_didi.merging.pipeline import merge


def moment(n: int, seed: int = 0) -> torch.Tensor:
    """Of inputs that use some directions a thousand times as much as others."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, n, generator=g) * torch.logspace(0, -1.5, n)
    return x.mT @ x / len(x)


def test_root_and_inverse_belong_together():
    metric = Metric.of(moment(12))
    torch.testing.assert_close(
        metric.root @ metric.inverse, torch.eye(12), atol=1e-5, rtol=0
    )
    # only the shape of the moment counts
    torch.testing.assert_close(Metric.of(7 * moment(12)).root, metric.root)
    identity = Metric.of(torch.eye(5)).root
    torch.testing.assert_close(identity, torch.eye(5))


def test_modules_come_back_from_the_weighed_task_vectors():
    metric, g = Metric.of(moment(6)), torch.Generator().manual_seed(1)
    up, down = torch.randn(4, 2, generator=g), torch.randn(2, 6, generator=g)
    weighed = LowRankFactors(up, metric.weighed(down))
    back = metric.plain(FactorSet(weighed, (None, weighed)))
    torch.testing.assert_close(back.shared.dense(), up @ down)
    assert back.experts[0] is None
    torch.testing.assert_close(back.experts[1].dense(), up @ down)


def test_moments_are_those_of_the_rows_that_a_weight_multiplies():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 2, stride=2), nn.Flatten(2), nn.Linear(9, 5), nn.LayerNorm(5)
    )
    x = torch.randn(7, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    names = [name for name, _ in model.named_parameters()]
    found = input_moments(model, names, list(x.split(3)))
    assert set(found) == {"0.weight", "2.weight"}
    rows = model[:2](x).reshape(-1, 9)
    expected = (rows.mT @ rows / len(rows)).double()
    torch.testing.assert_close(found["2.weight"], expected, atol=1e-5, rtol=1e-5)
    blocks = nn.functional.unfold(x, 2, stride=2).mT.reshape(-1, 12)
    expected = (blocks.mT @ blocks / len(blocks)).double()
    torch.testing.assert_close(found["0.weight"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", ["none", "mean", "auto"])
def test_weighed_merge_serves_the_weighed_error(shared):
    tau = in_common(24, 16, noise=1.0)
    vectors, moments = as_task_vectors(tau), {"0.weight": moment(16)}
    metric = Metric.of(moments["0.weight"])

    def weighed_error(result) -> float:
        rest = [
            t
            - result.experts[f"task{i}"]["0.weight"].change(
                result.shared.get("0.weight")
            )
            for i, t in enumerate(tau)
        ]
        return float(metric.weighed(torch.stack(rest)).square().sum())

    plain = merge(vectors, merge_settings(0.6, shared=shared))
    weighed = merge(vectors, merge_settings(0.6, shared=shared, moments=moments))
    assert weighed_error(weighed) < weighed_error(plain)
    assert plain.report.relative_error < weighed.report.relative_error
    exact = merge(vectors, merge_settings(float("inf"), moments=moments))
    assert exact.report.relative_error < 1e-10


@pytest.mark.parametrize("metric", ["probes", "none"])
def test_method_measures_by_itself(tiny_clip, metric):
    model = didi(copy.deepcopy(tiny_clip.pool_models()), budget=0.4, metric=metric)
    assert model.info["relative_error"] < 1


def test_images_are_asked_for_by_name(tiny_clip):
    models = copy.deepcopy(tiny_clip.pool_models())
    with pytest.raises(ModelPoolError, match="metric=images needs .*use metric=probes"):
        didi(models, metric="images")
    with pytest.raises(ValueError, match="metric='x'; choose none, probes or images"):
        didi(models, metric="x")


@pytest.mark.parametrize("normalization", ["base", "depth", "task", "matrix", "none"])
def test_every_weighting_keeps_the_budget(tiny_clip, normalization):
    models = copy.deepcopy(tiny_clip.pool_models())
    model = didi(models, budget=0.5, normalization=normalization)
    assert 0.45 < model.storage.x_excl <= 0.5


def test_blocks_are_counted_from_the_name():
    assert block_of("vision_model.encoder.layers.0.mlp.fc1.weight") == 1
    assert block_of("model.layers.11.self_attn.q_proj.weight") == 12
    assert block_of("vision_model.embeddings.patch_embedding.weight") == 1
