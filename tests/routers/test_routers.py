"""Mixed batches equal single tasks, and routers find tasks, count what they store, and survive saving."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool
from helpers import QUICK, TOWER, OpenClipLike, didi, family, tower_of
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    ResNetConfig,
    ResNetModel,
)

from fusion_bench_didi.errors import DiDiError, ModelPoolError, UnknownTaskError
from fusion_bench_didi.method.baselines.emr import EMRMerging
from fusion_bench_didi.method.baselines.twin import TwinMerging
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.method.routed import RoutedMethod, fit_router_to
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.routers.base import weights_from
from fusion_bench_didi.routers.capture import pooled
from fusion_bench_didi.routers.features import OracleRouter
from fusion_bench_didi.routers.files import make_router
from fusion_bench_didi.routers.heads import HEADS, fit_head, head_scores
from fusion_bench_didi.serving.banks import Serving
from fusion_bench_didi.serving.mixtures import ByWeight
from fusion_bench_didi.taskpool import attach


def images(count=12, side=32, seed=0):
    return torch.randn(
        count, 3, side, side, generator=torch.Generator().manual_seed(seed)
    )


def one_by_one(model, pixels, ids):
    """Every sample alone, under the plain model of its task."""
    plain = [model.materialize(task).eval() for task in model.tasks]
    with torch.no_grad():
        rows = [plain[t](pixels[i : i + 1]) for i, t in enumerate(ids.tolist())]
    return torch.cat([r if isinstance(r, torch.Tensor) else r[1] for r in rows])


@pytest.fixture
def merged(tiny_clip):
    model = didi(tiny_clip.pool_models(), budget=0.7).eval()
    model.serving = Serving(dense_above=0.5, small=0)  # most experts stay factors
    return model


# --- mixed batches ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["checkpoint", "int8", "int4"])
@pytest.mark.parametrize("budget", [0.3, 0.7, 9.0])
def test_mixed_batch_equals_one_by_one(tiny_clip, dtype, budget):
    model = didi(tiny_clip.pool_models(), budget=budget, factor_dtype=dtype).eval()
    model.serving = Serving(dense_above=0.5, small=0)
    pixels, ids = images(), torch.randint(3, (12,))
    found = model(pixels, task_ids=ids).pooler_output
    assert model.mixed.network is not None, "CLIP is run in one pass"
    torch.testing.assert_close(
        found, one_by_one(model, pixels, ids), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("method", [TwinMerging, EMRMerging])
def test_baselines_run_mixed_batches_too(tiny_clip, method):
    model = method().run(BaseModelPool(tiny_clip.pool_models())).eval()
    pixels, ids = images(), torch.arange(12) % 3
    found = model(pixels, task_ids=ids).pooler_output
    torch.testing.assert_close(
        found, one_by_one(model, pixels, ids), atol=1e-5, rtol=1e-5
    )


def test_soft_weights_equal_merging_sample_by_sample(merged):
    pixels = images(20)
    weights = torch.rand(20, 3).softmax(1)
    found = merged(pixels, task_weights=weights).pooler_output
    expected = merged.mixed.grouped(
        ByWeight.of(weights), merged.mixed.call((pixels,), {})
    ).pooler_output
    assert merged.mixed.network is not None
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_weights_of_zero_are_the_shared_model(merged):
    pixels = images(4)
    found = merged(pixels, task_weights=torch.zeros(4, 3)).pooler_output
    plain = merged.backbone
    tensors = {n: t.value(3) for n, t in merged.mixed.banks.items()}
    expected = torch.func.functional_call(plain, tensors, (pixels,)).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_live_weights_are_not_touched(merged):
    before = {n: p.clone() for n, p in merged.backbone.named_parameters()}
    merged(images(), task_ids=torch.arange(12) % 3)
    after = dict(merged.backbone.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not any("forward" in vars(m) for m in merged.backbone.modules())


@pytest.mark.parametrize("batch", [1, 17])
def test_unknown_architectures_go_group_by_group(batch):
    """Fused attention reads its weights without calling the layer that owns them; a batch of the token count, too."""
    model = didi(family(OpenClipLike()), budget=1.0).eval()
    pixels, ids = images(batch), torch.arange(batch) % 2
    found = model(pixels, task_ids=ids)
    assert model.mixed.network is None
    torch.testing.assert_close(
        found, one_by_one(model, pixels, ids), atol=1e-5, rtol=1e-5
    )


def test_gpt2_mixed_batch():
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=40, n_positions=16)
    model = didi(family(GPT2Model(config)), budget=1.0).eval()
    tokens, ids = torch.randint(40, (6, 9)), torch.tensor([0, 1, 1, 0, 1, 0])
    found = model(tokens, task_ids=ids).last_hidden_state
    for i, task in enumerate(ids.tolist()):
        with torch.no_grad():
            alone = model.materialize(model.tasks[task]).eval()(tokens[i : i + 1])
        torch.testing.assert_close(
            found[i : i + 1], alone.last_hidden_state, atol=1e-5, rtol=1e-5
        )


# --- weights and heads --------------------------------------------------------------


def test_weights_from_scores():
    scores = torch.tensor([[2.0, 0.0, 0.0], [0.1, 0.0, 0.05]])
    assert weights_from(scores, hard=True).tolist() == [[1, 0, 0], [1, 0, 0]]
    assert weights_from(scores, hard=False).sum(1).tolist() == pytest.approx([1, 1])
    unknown = weights_from(scores, hard=True, threshold=0.5)
    assert unknown.tolist() == [[1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("head", sorted(HEADS))
def test_heads_learn_separable_tasks(head):
    labels = torch.arange(3).repeat_interleave(60)
    noise = torch.randn(180, 8, generator=torch.Generator().manual_seed(0))
    features = noise + 4 * torch.eye(8)[labels]
    tensors = fit_head(head, features, labels)
    found = head_scores(head, features, tensors).argmax(1)
    assert (found == labels).float().mean() > 0.95


# --- routers on a model -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["projection", "representation", "mlp"])
def test_routed_forward_uses_the_routers_weights(merged, kind, tmp_path):
    router = make_router(kind, merged.tasks)
    merged.attach_router(router)
    before = merged.storage.x_excl
    if kind == "mlp":
        fit_router_to(merged, [images(8, seed=t) + t for t in range(3)])
        assert merged.storage.x_excl > before
        assert merged.storage.routing_bits == router.bits > 0
    pixels = images()
    found = merged(pixels).pooler_output
    assert router.last.shape == (12, 3) and router.samples == 12
    expected = one_by_one(merged, pixels, router.last.argmax(1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "saved")
    again = DiDiModel.from_pretrained(tmp_path / "saved", backbone=merged.backbone)
    assert again.router.options() == router.options()
    assert again.storage.as_dict() == merged.storage.as_dict()
    torch.testing.assert_close(again.eval()(pixels).pooler_output, found)


def test_projection_router_finds_inputs_that_lie_in_an_experts_subspace(tiny_clip):
    """Patches made of one task's leading input directions go to that task, without any data."""
    model = didi(tiny_clip.pool_models(), budget=9.0).eval()
    name = f"{TOWER}embeddings.patch_embedding"
    router = make_router("projection", model.tasks, layers=[name], directions=2)
    model.attach_router(router)
    for task in range(3):
        basis = router._buffers["basis_0"][2 * task : 2 * task + 2]  # (2, 192)
        mix = torch.randn(5, 16, 2, generator=torch.Generator().manual_seed(task))
        patches = (mix @ basis).mT  # (5, 192, 16)
        pixels = torch.nn.functional.fold(patches, 32, 8, stride=8)
        assert router.route(model, pixels).argmax(1).tolist() == [task] * 5


def test_unknown_inputs_fall_back_to_the_shared_model(merged):
    options = {"fallback": "shared", "threshold": 1.0}
    merged.attach_router(make_router("projection", merged.tasks, **options))
    pixels = images(4)
    found = merged(pixels).pooler_output
    assert merged.router.unknown_rate == 1.0
    expected = merged(pixels, task_weights=torch.zeros(4, 3)).pooler_output
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["projection", "representation", "anchored"])
def test_threads_are_routed_at_the_same_time(merged, kind):
    """What a router records is its own thread's, though the layers are everyone's."""
    router = make_router(kind.replace("anchored", "representation"), merged.tasks)
    if kind == "anchored":
        names = merged.touched
        router.anchor({n: 0.1 * merged.base_tensor(n) for n in names})
    merged.attach_router(router)
    batches = [images(seed=seed) for seed in range(2)]
    expected = [router.features(merged, pixels) for pixels in batches]
    before = {n: p.clone() for n, p in merged.backbone.named_parameters()}
    barrier, been = threading.Barrier(2), threading.local()

    def meet(*_):
        if not hasattr(been, "here"):
            been.here = True
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait(timeout=0.5)

    tower_of(merged.backbone).embeddings.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda x: router.features(merged, x), batches))
    for one, alone in zip(found, expected):
        torch.testing.assert_close(one, alone, atol=1e-5, rtol=1e-5)
    after = dict(merged.backbone.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_anchors_of_any_tensor_come_back():
    router = make_router("representation", ["a", "b"])
    changes = {name: torch.randn(2) for name in ("m.x", "m/x", "m~x", "m.x.y")}
    again = make_router("representation", ["a", "b"])
    again.load(router.anchor(changes).tensors())
    found = again.anchor_changes()
    assert found.keys() == changes.keys()
    assert all(found[name].equal(changes[name]) for name in changes)


def test_a_task_set_by_hand_comes_first(merged):
    merged.attach_router(make_router("projection", merged.tasks))
    merged.set_task("svhn")
    pixels = images(3)
    found = merged(pixels).pooler_output
    assert torch.equal(found, merged.backbone(pixels).pooler_output)


def test_router_of_other_tasks_is_refused(merged):
    with pytest.raises(UnknownTaskError, match="other|holds"):
        merged.attach_router(make_router("projection", ["a", "b"]))


def test_unknown_names_are_refused(merged):
    with pytest.raises(DiDiError, match="router='guess'.*choose one of"):
        make_router("guess", merged.tasks)
    with pytest.raises(DiDiError, match="head='tree'"):
        make_router("projection", merged.tasks, head="tree")
    with pytest.raises(DiDiError, match="no block 9; there are 2"):
        merged.attach_router(make_router("mlp", merged.tasks, layers=[9]))
    with pytest.raises(DiDiError, match="No layer is called 'blocks'; there are"):
        merged.attach_router(make_router("projection", merged.tasks, layers=["blocks"]))


@pytest.mark.parametrize("kind, way", [("mlp", "fit_router_to"), ("oracle", "tell")])
def test_a_router_that_lacks_something_says_what(merged, kind, way):
    merged.attach_router(make_router(kind, merged.tasks))
    with pytest.raises(DiDiError, match=way):
        merged(images(3))


@pytest.mark.parametrize(
    "kind, options, told",
    [
        ("projection", {"threshold": 0.5}, "threshold=0.5 is of fallback=shared"),
        ("mlp", {"fallback": "shared"}, "no effect with threshold=0"),
        ("representation", {"temperature": 0.2}, "temperature=0.2 has no effect"),
        ("representation", {"head": "mlp", "prefer": "far"}, "prefer is of distances"),
        ("representation", {"head": "mlp", "normalization": "none"}, "normalization"),
        ("none", {"layers": [0]}, "layers: router=none has no options"),
        ("mlp", {"layers": []}, "layers names none"),
        ("representation", {"layers": []}, "layers names none"),
    ],
)
def test_options_without_effect_are_refused(merged, kind, options, told):
    with pytest.raises(DiDiError, match=told):
        merged.attach_router(kind, **options)
    assert merged.router is None


def test_a_head_keeps_its_type_and_knows_every_task(merged):
    router = make_router("mlp", merged.tasks)
    features = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DiDiError, match="no sample of .'svhn'"):
        router.fit(features, torch.arange(9) % 2 * 2)
    router.fit(features, torch.arange(9) % 3, epochs=1)
    expected, bits = router.scores(features), router.bits
    assert router.half().bits == bits and router.scores(features).equal(expected)
    merged.attach_router(router).bfloat16()
    assert merged.storage.routing_bits == bits


@pytest.mark.parametrize("told", [[1, "mnist", 0], ["svhn", "mnist", None]])
def test_an_oracle_is_told_tasks_as_a_forward_is(merged, told):
    merged.attach_router(router := OracleRouter(merged.tasks))
    router.tell(told)
    found = merged(pixels := images(3)).pooler_output
    torch.testing.assert_close(found, merged(pixels, task_ids=told).pooler_output)
    with pytest.raises(UnknownTaskError, match="-1"):
        router.tell([-1, 0, 0])


@pytest.mark.parametrize("kind", ["projection", "mlp", "representation"])
def test_padding_does_not_reach_a_router(kind):
    """On either side, and with the mask in any place; a prompt's route is not its neighbors' business."""
    config = BertConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)  # fmt: skip
    models = family(BertModel(config))
    model = didi(models, budget=0.9).eval()
    router = make_router(kind, model.tasks)
    model.attach_router(router)
    ids = torch.randint(1, 50, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    expected = router.features(model, ids)
    torch.testing.assert_close(router.features(model, ids, mask), expected)
    pads, none = torch.full((2, 3), 7), torch.zeros(2, 3, dtype=torch.long)
    longer, seen = torch.cat([ids, pads], 1), torch.cat([mask, none], 1)
    named = router.features(model, ids_of := longer, attention_mask=seen)
    torch.testing.assert_close(router.features(model, ids_of, seen), named)
    torch.testing.assert_close(named, expected, atol=1e-4, rtol=1e-4)


def test_the_first_token_is_the_first_that_counts():
    states = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    first = torch.stack([states[0, 2], states[1, 0]])
    assert pooled(states, "cls", mask).equal(first)
    assert pooled(states, "both", mask)[:, :3].equal(first)
    assert pooled(states, "cls").equal(states[:, 0])


def test_channels_of_feature_maps_are_what_is_pooled():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")  # fmt: skip
    model = didi(family(ResNetModel(config).eval()), budget=0.9).eval()
    router = make_router("mlp", model.tasks, layers=["encoder.stages.1"], pooling="mean")  # fmt: skip
    model.attach_router(router)
    found = router.features(model, pixels := images(3))
    maps = model(pixels, task_ids=[None] * 3).last_hidden_state
    assert maps.shape[1] == 16
    torch.testing.assert_close(found, maps.flatten(2).mean(2))


# --- the method ---------------------------------------------------------------------


class Pool:
    """A task pool of the host's kind, reduced to what ``attach`` needs."""

    def __init__(self):
        self.test_datasets = {"mnist": None, "svhn": None}
        self.seen = []

    def on_task_evaluation_begin(self, model, task_name):
        self.seen.append(model.current_task)

    def evaluate(self, model):
        for task in self.test_datasets:
            self.on_task_evaluation_begin(model, task)
            model(images(2))
        return {}


def test_stock_pools_do_not_set_the_task_of_a_routed_model(tiny_clip):
    pool = Pool()
    base = DiDiMerging(**{**QUICK, "budget": 0.7})
    method = RoutedMethod(base_method=base, router="projection")
    method._program = SimpleNamespace(taskpool=pool)
    model = method.run(BaseModelPool(tiny_clip.pool_models()))
    report = pool.evaluate(model)
    assert pool.seen == [None, None]
    assert report["didi"]["router"]["samples"] == 4
    model.attach_router(None)
    attach(pool)
    pool.evaluate(model)
    assert pool.seen[2:] == ["mnist", "svhn"]


def test_heads_need_images(tiny_clip):
    base = DiDiMerging(**QUICK)
    method = RoutedMethod(base_method=base, router="mlp")
    with pytest.raises(ModelPoolError, match="train_datasets"):
        method.run(BaseModelPool(tiny_clip.pool_models()))
