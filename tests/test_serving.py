"""Mixed batches in every way they are run: by slices or by groups, factors or matrices, compiled, in bfloat16."""

import copy
import io
import math

import pytest
import torch
from helpers import didi, family, floats, same_bits
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaModel

from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.serving.banks import MatrixBank, Serving
from fusion_bench_didi.serving.grouped_matmul import product_by_task
from fusion_bench_didi.serving.mixtures import ByTask, ByWeight, mix_of


def images(count: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator)


def task_ids(count: int = 12, tasks: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(tasks, (count,), generator=generator)


@torch.no_grad()
def one_by_one(model: DynamicModel, pixels: torch.Tensor, ids: torch.Tensor):
    """Every sample alone, under the plain model of its task."""
    plain = [model.materialize(task).eval() for task in model.tasks]
    rows = [plain[t](x[None]).pooler_output for x, t in zip(pixels, ids.tolist())]
    return torch.cat(rows)


@pytest.fixture
def merged(tiny_clip) -> DynamicModel:
    """Keeps factors and matrices."""
    model = didi(tiny_clip.pool_models(), budget=0.7).eval()
    model.serving = Serving(small=0)
    return model


# --- the same result, however it is run ---------------------------------------------


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("dense_above", [0.0, 0.25, math.inf])
@pytest.mark.parametrize("dtype", ["float32", "int8", "int4", "int3", "auto"])
def test_factors_and_matrices_give_what_materialised_models_give(
    tiny_clip, dense_above, dtype, hold
):
    model = didi(tiny_clip.pool_models(), budget=0.7, factor_dtype=dtype).eval()
    model.serving = Serving(dense_above, small=0, hold=hold)
    pixels, ids = images(), task_ids()
    found = model(pixels, task_ids=ids).pooler_output
    kept = [t for t in model.mixed.banks.values() if isinstance(t, MatrixBank)]
    assert model.mixed.network is not None
    if dense_above == 0:
        assert not any(bank.last.numel() for bank in kept)
    elif dtype == "float32":
        assert any(bank.last.numel() for bank in kept)
    expected = one_by_one(model, pixels, ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_is_close_to_float32(merged):
    pixels, ids = images(), task_ids()
    expected = merged(pixels, task_ids=ids).pooler_output
    found = merged.bfloat16()(pixels.bfloat16(), task_ids=ids).pooler_output
    assert found.dtype == torch.bfloat16 and merged.mixed.network is not None
    alone = one_by_one(merged, pixels.bfloat16(), ids)
    assert (found - alone).abs().max() < 0.05 * expected.abs().max()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_pieces_of_a_batch_give_what_the_batch_gives(merged):
    pixels, ids = images(), task_ids()
    expected = merged(pixels, task_ids=ids)
    for limit in (1, 5):
        merged.mixed.limit = limit
        found = merged(pixels, task_ids=ids)
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-5)


def test_pieces_hold_every_sample_once_and_cut_between_tasks():
    ids = torch.tensor([2, 0, 2, 1, 3, 2, 2, 0])
    pieces = ByTask.of(ids, 3).pieces(3)
    assert [piece.tasks.tolist() for piece in pieces] == [[0, 0, 1], [2] * 4, [3]]
    assert torch.cat([piece.order for piece in pieces]).sort()[0].equal(torch.arange(8))
    for piece in pieces:
        assert ids[piece.order].equal(piece.tasks)
        assert piece.counts.equal(piece.tasks.bincount(minlength=4))


def test_the_number_of_tasks_stands_for_the_shared_model(merged):
    pixels = images(4)
    shared = merged(pixels, task_weights=torch.zeros(4, 3)).pooler_output
    ids = torch.tensor([3, 0, 3, 1])
    found = merged(pixels, task_ids=ids).pooler_output
    torch.testing.assert_close(found[[0, 2]], shared[[0, 2]], atol=1e-5, rtol=1e-5)
    expected = one_by_one(merged, pixels, ids.clamp(max=2))
    torch.testing.assert_close(found[[1, 3]], expected[[1, 3]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_a_number_of_no_task_is_refused(merged, wrong):
    with pytest.raises(IndexError):
        merged(images(2), task_ids=torch.tensor([0, wrong]))


def test_weights_are_told_apart():
    one_hot = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    assert mix_of(one_hot).tasks.tolist() == [0, 1, 2]
    for soft in ([0.0, 0.5], [0.5, 0.5], [1.0, 1.0], [-1.0, 0.0]):
        assert isinstance(mix_of(torch.tensor([soft, [0.0, 1.0]])), ByWeight)


def test_equal_soft_weights_for_all_equal_one_merged_model(merged):
    pixels, row = images(6), torch.tensor([0.2, 0.3, 0.5])
    found = merged(pixels, task_weights=row.expand(6, 3)).pooler_output
    mixed = row.expand(6, 3).clone()
    mixed[0] = torch.tensor([1.0, 0.0, 0.0])  # so that they are mixed sample by sample
    expected = merged(pixels, task_weights=mixed).pooler_output
    torch.testing.assert_close(found[1:], expected[1:], atol=1e-5, rtol=1e-5)


def test_a_batch_of_one(merged):
    pixels = images(1)
    found = merged(pixels, task_ids=torch.tensor([2])).pooler_output
    expected = one_by_one(merged, pixels, torch.tensor([2]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_llama_runs_in_one_pass():
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = didi(family(LlamaModel(config)), budget=0.8).eval()
    tokens, ids = task_ids(48, 40).view(6, 8), task_ids(6, 2)
    found = model(tokens, task_ids=ids, use_cache=False).last_hidden_state
    assert model.mixed.network is not None
    for i, task in enumerate(ids.tolist()):
        with torch.no_grad():
            plain = model.materialize(model.tasks[task]).eval()
            alone = plain(tokens[i : i + 1], use_cache=False).last_hidden_state
        torch.testing.assert_close(found[i : i + 1], alone, atol=1e-4, rtol=1e-4)


class SeesThrough(nn.Module):
    """Uses a layer's weight without calling the layer, or hands it tokens first."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "uses the weight":
            x = x @ self.inner.weight.mT
        else:
            x = self.inner(x.transpose(0, 1)).transpose(0, 1)
        return self.last(x)


@pytest.mark.parametrize("how", ["uses the weight", "tokens first"])
@pytest.mark.parametrize("tokens", [2, 6])
def test_layers_that_are_used_otherwise_are_found_out(how, tokens, caplog):
    model = didi(family(SeesThrough(how)), budget=1.5).eval()
    x = torch.randn(6, tokens, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([1, 0, 0, 1, 0, 1])
    found = model(x, task_ids=ids)
    assert model.mixed.network is None and "group by group" in caplog.text
    for i, task in enumerate(ids.tolist()):
        alone = model.materialize(model.tasks[task])(x[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone, atol=1e-5, rtol=1e-5)


class Attends(nn.Module):
    """Queries, keys and values of one input, of two inputs, or of one that is changed in between."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name in ("q_proj", "k_proj", "v_proj"):
                self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0
        other = x.flip(1) if self.how == "two inputs" else x
        query = self.q_proj(x)
        key = self.k_proj(x.mul_(2) if self.how == "changed" else other)
        return (query @ key.mT).softmax(-1) @ self.v_proj(other)


@pytest.mark.parametrize("how", ["one input", "two inputs", "changed"])
def test_neighbors_that_multiply_together_give_what_they_give_alone(how, caplog):
    model = didi(family(Attends(how)), budget=9.0).eval()
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([1, 0, 0, 1, 0, 1])
    for _ in range(2):
        found = model(x, task_ids=ids)
        for i, task in enumerate(ids.tolist()):
            alone = model.materialize(model.tasks[task])(x[i : i + 1])
            torch.testing.assert_close(found[i : i + 1], alone, atol=1e-5, rtol=1e-5)
    if how == "changed":
        assert model.mixed.network is None and "group by group" in caplog.text
    else:
        network = model.mixed.network
        assert network.q_proj.fused is network.v_proj.fused is not None
        assert model.mixed.running.current is None


def test_the_shared_model_is_the_model_of_no_task(merged):
    pixels = images(4)
    expected = merged(pixels, task_ids=torch.full((4,), 3)).pooler_output
    for mode in (merged.train, merged.eval):
        mode()
        found = merged.mixed.shared(pixels).pooler_output
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --- the product --------------------------------------------------------------------


def test_product_by_task_is_a_product_per_task():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    common, own = draw(6, 5), draw(6, 5)
    matrices = [common, common, own, common]
    ranks = [2, 0, 0, 1]
    firsts, lasts = [draw(6, r) for r in ranks], [draw(r, 5) for r in ranks]
    counts = torch.tensor([2, 0, 3, 1])
    alone = [draw(6, 5) for _ in ranks]
    x, bias = draw(6, 4, 6), draw(4, 5)
    tasks = torch.arange(4).repeat_interleave(counts)
    before = bias.clone()
    for kept in (matrices, alone):
        for biases in (None, bias, bias[:1].expand(4, -1)):
            found = product_by_task(x, tasks, counts, biases, kept, firsts, lasts)
            for i, t in enumerate(tasks.tolist()):
                expected = x[i] @ (kept[t] + firsts[t] @ lasts[t])
                if biases is not None:
                    expected = expected + biases[t]
                torch.testing.assert_close(found[i], expected)
            product_by_task(draw(6, 6), tasks, counts, biases, kept, firsts, lasts)
    assert bias.equal(before), "an input was written to"


# --- modes --------------------------------------------------------------------------


def test_inference_mode_and_what_it_made_serves_outside(merged):
    pixels, ids = images(), task_ids()
    with torch.inference_mode():
        inside = merged(pixels, task_ids=ids).pooler_output
        merged.set_task("svhn")
        single = merged(pixels).pooler_output
        merged.unset_task()
    torch.testing.assert_close(merged(pixels, task_ids=ids).pooler_output, inside)
    merged.set_task("mnist")
    merged.set_task("svhn")
    assert merged(pixels).pooler_output.detach().equal(single)


def test_setting_a_task_leaves_mixed_batches_as_they_are(tiny_clip):
    """Working copies must not share memory with the live weights, with or without a shared part."""
    for options in ({"shared": "none"}, {"residual": "full"}):
        model = didi(tiny_clip.pool_models(), budget=0.7, **options).eval()
        pixels, ids = images(), task_ids(tasks=4)
        before = model(pixels, task_ids=ids).pooler_output
        model.set_task("mnist")
        assert model(pixels, task_ids=ids).pooler_output.equal(before)


def test_mixed_batches_leave_the_weights_as_they_are(merged):
    before = floats(merged.backbone)
    merged(images(), task_ids=task_ids())
    merged(images(), task_weights=torch.rand(12, 3))
    assert same_bits(before, floats(merged.backbone))


def test_the_network_follows_the_backbone_into_training(merged):
    merged(images(), task_ids=task_ids())
    merged.train()
    merged(images(), task_ids=task_ids())
    assert merged.mixed.network.training
    merged.eval()
    merged(images(), task_ids=task_ids())
    assert not merged.mixed.network.training


def test_a_served_model_can_be_copied_and_pickled(merged):
    pixels, ids = images(), task_ids()
    expected = merged(pixels, task_ids=ids).pooler_output
    file = io.BytesIO()
    torch.save(merged, file)
    file.seek(0)
    for twin in (copy.deepcopy(merged), torch.load(file, weights_only=False)):
        assert twin(pixels, task_ids=ids).pooler_output.equal(expected)


def test_compiled_equals_eager_with_one_graph_for_all_batches(merged):
    pixels = images()
    merged(pixels, task_ids=task_ids())  # the first batch is checked, not compiled
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(merged, backend=counter, fullgraph=True)
    for seed in range(3):
        ids = task_ids(tasks=4, seed=seed)
        found = compiled(pixels, task_ids=ids).pooler_output
        expected = merged(pixels, task_ids=ids).pooler_output
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


def test_compiled_tasks_share_one_graph(merged):
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(merged, backend=counter)
    pixels = images(2)
    for task in ("mnist", "svhn", "eurosat", "mnist"):
        merged.set_task(task)
        found, expected = compiled(pixels), merged(pixels)
        torch.testing.assert_close(found.pooler_output, expected.pooler_output)
    assert counter.frame_count == 1


@pytest.mark.parametrize("weights", [None, "soft"])
def test_compiled_routing_equals_eager(merged, weights):
    from fusion_bench_didi.routers.files import make_router

    merged.attach_router(make_router("projection", merged.tasks, hard=weights is None))
    torch._dynamo.reset()
    compiled = torch.compile(merged, backend="aot_eager")
    for seed in range(2):
        pixels = images(seed=seed)
        found, expected = compiled(pixels), merged(pixels)
        torch.testing.assert_close(
            found.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5
        )


@pytest.mark.slow
def test_compiled_by_inductor_equals_eager(merged):
    pixels, ids = images(), task_ids()
    torch._dynamo.reset()
    found = torch.compile(merged)(pixels, task_ids=ids).pooler_output
    expected = one_by_one(merged, pixels, ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
