"""Weightings of the objective that were tried: by matrix, by task, by direction."""

from types import SimpleNamespace

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool
from helpers import BASE, didi
from torch import nn

from benchmarks.metric import Metric, input_moments, unweighed, weighed
from benchmarks.objectives import OPTIONS, block_of, scores_of
from benchmarks.probe import sensitivity


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
def test_a_merge_of_weighed_models_serves_the_weighed_error(tiny_clip, shared):
    base = tiny_clip.base
    names = [n for n, p in base.named_parameters() if n.endswith("fc1.weight")]
    metrics = {n: Metric.of(moment(base.get_parameter(n).shape[1])) for n in names}

    def weighed_error(models) -> float:
        rest = [
            metrics[n].root.T
            @ (m.get_parameter(n) - tiny_clip.tuned[t].get_parameter(n)).T
            for t, m in models.items()
            for n in names
        ]
        return float(sum(x.square().sum() for x in rest))

    others = [n for n, _ in base.named_parameters() if n not in names]
    choice = {"budget": 0.6, "shared": shared, "exclude": others}
    tuned = {t: weighed(base, m, metrics) for t, m in tiny_clip.tuned.items()}
    plain = didi(tiny_clip.pool_models(), **choice)
    other = didi({BASE: base, **tuned}, **choice)
    plain = {t: plain.materialize(t) for t in tuned}
    turned = {t: unweighed(base, other.materialize(t), metrics) for t in tuned}
    assert weighed_error(turned) < weighed_error(plain)


def test_weighing_is_undone(tiny_clip):
    name = next(n for n, p in tiny_clip.base.named_parameters() if "fc1.weight" in n)
    side = tiny_clip.base.get_parameter(name).shape[1]
    metrics, model = {name: Metric.of(moment(side))}, tiny_clip.tuned["mnist"]
    turned = weighed(tiny_clip.base, model, metrics)
    assert not turned.get_parameter(name).allclose(model.get_parameter(name))
    back = unweighed(tiny_clip.base, turned, metrics)
    for key, value in model.named_parameters():
        torch.testing.assert_close(back.get_parameter(key), value)


def test_blocks_are_counted_from_the_name():
    assert block_of("vision_model.encoder.layers.0.mlp.fc1.weight") == 1
    assert block_of("model.layers.11.self_attn.q_proj.weight") == 12
    assert block_of("vision_model.embeddings.patch_embedding.weight") == 1


def test_sensitivity_sees_a_dead_layer(tiny_clip):
    model = tiny_clip.base
    names = [n for n, p in model.named_parameters() if n.endswith("fc1.weight")]
    dead = model.get_submodule(names[0].removesuffix("fc1.weight") + "fc2")
    torch.nn.init.zeros_(dead.weight)
    found = sensitivity(model, names, samples=2)
    assert found[names[0]] == 0 < found[names[1]]
    assert found == sensitivity(model, names, samples=2)
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("label", [o for o in OPTIONS if "weights" in OPTIONS[o]])
def test_every_weighting_that_was_tried_merges_vectors_too(tiny_clip, label):
    pool = BaseModelPool({"_pretrained_": tiny_clip.base, **tiny_clip.tuned})
    errors = {}

    def accuracy(model):
        return errors.update(model.info["relative_errors"])

    names = [n for n, p in tiny_clip.base.named_parameters() if p.ndim > 1]
    suite = SimpleNamespace(modelpool=pool, accuracy=accuracy)
    problem = SimpleNamespace(suite=suite, base=tiny_clip.base, names=names)
    scores_of(problem, 0.5, "auto", OPTIONS[label])
    assert len(errors) == 3 and all(0 < error < 1 for error in errors.values())
