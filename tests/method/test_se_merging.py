"""SE-Merging: the reconstruction's parts, and what it must equal where its distances are perfect."""

import copy

import pytest
import torch
from fusion_bench.method import (
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
)
from fusion_bench.modelpool import BaseModelPool
from helpers import QUICK, didi

from fusion_bench_didi.method.se_merging import SEMerging
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.routers.files import make_router
from fusion_bench_didi.routers.representation import distance, normalized
from fusion_bench_didi.serving.mixtures import ByWeight


def pool_of(tiny):
    """Copies: the host's merges overwrite models in memory."""
    return BaseModelPool(copy.deepcopy(tiny.pool_models()))


def images(count=12, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def se(tiny, base=None, **options):
    base = SimpleAverageAlgorithm() if base is None else base
    method = SEMerging(base_method=base, **options)
    return method.run(pool_of(tiny)).eval()


def test_distances_and_their_normalization():
    merged = torch.tensor([[1.0, 0.0]])
    expert = torch.tensor([[1.0, 2.0]])
    assert distance(merged, expert, "l2").tolist() == [2.0]
    assert distance(merged, merged, "cosine").item() == pytest.approx(0)
    d = torch.tensor([[1.0, 2.0, 3.0]])
    assert normalized(d, "minmax").tolist() == [[0, 0.5, 1]]
    assert normalized(d, "mean").tolist() == [[0.5, 1, 1.5]]


def test_hard_with_a_perfect_distance_equals_the_individuals(tiny_clip, monkeypatch):
    model = se(tiny_clip, assignment="hard")
    pixels, ids = images(), torch.arange(12) % 3
    perfect = 1 - torch.eye(3)[ids]
    monkeypatch.setattr(model.router, "features", lambda *a, **k: perfect)
    found = model(pixels).pooler_output
    for i, t in enumerate(ids.tolist()):
        with torch.no_grad():
            alone = tiny_clip.tuned[model.tasks[t]](pixels[i : i + 1]).pooler_output
        torch.testing.assert_close(found[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("assignment", ["soft", "hard"])
@pytest.mark.parametrize("experts", ["individuals", "didi"])
def test_batch_equals_one_by_one(tiny_clip, assignment, experts):
    didi = {**QUICK, "budget": 0.7, "factor_dtype": "int8"}
    more = {"didi": didi} if experts == "didi" else {}
    model = se(tiny_clip, assignment=assignment, experts=experts, **more)
    pixels = images()
    together = model(pixels).pooler_output
    weights = model.router.last
    alone = torch.cat([model(x[None]).pooler_output for x in pixels])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    dense = model.mixed.grouped(
        ByWeight.of(weights), model.mixed.call((pixels,), {})
    ).pooler_output
    torch.testing.assert_close(together, dense, atol=1e-5, rtol=1e-5)


def test_distances_are_those_of_the_models_themselves(tiny_clip):
    model = se(tiny_clip, layers=[-1], normalization="none")
    pixels = images(5)
    merged = SimpleAverageAlgorithm().run(pool_of(tiny_clip))

    def states(plain):
        with torch.no_grad():
            out = plain.eval()(pixels, output_hidden_states=True)
        return out.hidden_states[-1][:, 0]

    expected = [
        (states(merged) - states(tiny_clip.tuned[t])).norm(dim=1) for t in model.tasks
    ]
    found = model.router.features(model, pixels)
    torch.testing.assert_close(found, torch.stack(expected, 1), atol=1e-4, rtol=1e-4)


def test_even_coefficients_give_the_static_base(tiny_clip):
    """A hot softmax of mass 1 is averaging; with the mass of task arithmetic it is task arithmetic."""
    arithmetic = TaskArithmeticAlgorithm(scaling_factor=0.3)
    for base, mass in ((SimpleAverageAlgorithm(), 1.0), (arithmetic, 0.9)):
        model = se(tiny_clip, base, temperature=1e6, total_mass=mass)
        pool = pool_of(tiny_clip)
        with torch.no_grad():
            expected = base.run(pool).eval()(images()).pooler_output
        found = model(images()).pooler_output
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["ids", "names"])
def test_tasks_that_are_named_are_theirs_whatever_the_router_scales(tiny_clip, how):
    options = {"shared": "mean", "factor_dtype": "float32", "residual": "full"}
    model = didi(tiny_clip.pool_models(), budget=0.9, **options).eval()
    assert len(model.shared), "nothing is shared that could be scaled"
    pixels, tasks = images()[:3], [2, 0, 1]
    given = tasks if how == "ids" else [model.tasks[t] for t in tasks]
    expected = model(pixels, task_ids=given).pooler_output
    router = make_router("representation", model.tasks, total_mass=0.5, hard=False)
    model.attach_router(router)
    found = model(pixels, task_ids=given).pooler_output
    torch.testing.assert_close(found, expected)
    weights = router.route(model, pixels)
    routed = model(pixels).pooler_output
    torch.testing.assert_close(routed, model(pixels, task_weights=weights).pooler_output)  # fmt: skip
    assert not torch.allclose(routed, expected)


def test_storage_is_one_backbone_and_the_task_vectors(tiny_clip):
    assert se(tiny_clip).storage.x_incl == pytest.approx(4.0)
    ties = TiesMergingAlgorithm(
        scaling_factor=0.3, threshold=20, remove_keys=[], merge_func="sum"
    )
    model = se(tiny_clip, ties)
    assert model.storage.x_incl == pytest.approx(5.0), "the merged model is stored too"


@pytest.mark.parametrize(
    "base, scale",
    [
        (SimpleAverageAlgorithm(), 1 / 3),
        (TaskArithmeticAlgorithm(scaling_factor=0.3), 0.3),
    ],
)
def test_slim_experts_are_merged_themselves_and_store_nothing_more(
    tiny_clip, base, scale
):
    didi = {**QUICK, "budget": 0.7, "factor_dtype": "int8", "residual": "full"}
    model = se(tiny_clip, base, experts="didi", didi=didi)
    assert len(model.shared) > 0
    assert model.storage.routing_bits == 0
    assert 0.65 < model.storage.x_excl <= 0.7
    plain = [model.materialize(task) for task in model.tasks]
    merged = copy.deepcopy(model.backbone)
    with torch.no_grad():
        for name, value in merged.named_parameters():
            value += scale * sum(p.get_parameter(name) - value for p in plain)
        expected = merged.eval()(images(), output_hidden_states=True)
    found = model.router.merged_states(model, (images(),), {})
    torch.testing.assert_close(
        found[0], expected.hidden_states[-1][:, 0], atol=1e-4, rtol=1e-4
    )


def test_slim_experts_with_another_merge_store_it(tiny_clip):
    ties = TiesMergingAlgorithm(
        scaling_factor=0.3, threshold=20, remove_keys=[], merge_func="sum"
    )
    didi = {**QUICK, "budget": 0.7}
    model = se(tiny_clip, ties, experts="didi", didi=didi)
    assert 1.65 < model.storage.x_excl <= 1.7


def test_save_and_load(tiny_clip, tmp_path):
    model = se(tiny_clip, TaskArithmeticAlgorithm(scaling_factor=0.3), total_mass=0.5)
    found = model(images()).pooler_output
    model.save_pretrained(tmp_path / "se")
    again = DynamicModel.from_pretrained(tmp_path / "se", backbone=model.backbone)
    torch.testing.assert_close(again.eval()(images()).pooler_output, found)


def test_nonsense_is_refused(tiny_clip):
    with pytest.raises(ValueError, match="assignment='maybe'"):
        SEMerging(base_method=SimpleAverageAlgorithm(), assignment="maybe")
    with pytest.raises(ValueError, match="distance='l7'"):
        se(tiny_clip, distance="l7")
