"""Mixed batches in every way they are run: by slices or by groups, factors or matrices, compiled, in bfloat16."""

import contextlib
import copy
import io
import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import TOWER, didi, family, floats, normal, same_bits, tower_of
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaModel

from fusion_bench_didi.deltas.masks import MaskedDelta, SparseDelta
from fusion_bench_didi.deltas.plain import LowRankDelta
from fusion_bench_didi.deltas.quantized import RoundedLowRankDelta
from fusion_bench_didi.deltas.tucker import CoreDelta, RoundedBasesDelta
from fusion_bench_didi.errors import UnknownTaskError
from fusion_bench_didi.lowrank.factors import LowRankFactors
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.quantization.rounding import round_factors
from fusion_bench_didi.serving import agreement
from fusion_bench_didi.serving.banks import MatrixBank, Serving, laid_out, side_by_side
from fusion_bench_didi.serving.forward import MixedForward
from fusion_bench_didi.serving.grouped_matmul import product_by_task
from fusion_bench_didi.serving.making import bank_of
from fusion_bench_didi.serving.mixtures import ByTask, ByWeight, mix_of


def images(count: int = 12, seed: int = 0) -> torch.Tensor:
    return normal(count, 3, 32, 32, seed=seed)


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


@pytest.fixture(scope="module", params=["float32", "int8", "int4", "int3", "auto"])
def stored_as(request, make_tiny_clip) -> tuple[str, DynamicModel]:
    pool = make_tiny_clip().pool_models()
    return request.param, didi(pool, budget=0.7, factor_dtype=request.param).eval()


@pytest.mark.parametrize("limit", [None, 0, 1e-4])
@pytest.mark.parametrize("dense_above", [0.0, 0.25, math.inf])
def test_factors_and_matrices_give_what_materialised_models_give(
    stored_as, dense_above, limit
):
    dtype, model = stored_as
    model.serving = Serving(dense_above, small=0, memory_limit_gb=limit)
    pixels, ids = images(), task_ids()
    found = model(pixels, task_ids=ids).pooler_output
    kept = [t for t in model.mixed.banks.values() if isinstance(t, MatrixBank)]
    assert model.mixed.network is not None
    if limit is not None:
        assert not kept and model.mixed.held.nbytes <= limit * 2**30
    elif dense_above == 0:
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


@pytest.fixture(scope="module")
def deep() -> DynamicModel:
    """Rounding in bfloat16 adds up over its layers."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = LlamaModel(config).bfloat16().eval()
    pool = family(base, ("a", "b", "c"))
    return didi(pool, budget=0.5, factor_dtype="int8").eval()


@pytest.mark.parametrize("fault", [None, "shared", "scale", "strict"])
def test_rounding_that_adds_up_is_told_from_faults(deep, monkeypatch, fault):
    model = copy.deepcopy(deep)
    model.serving = Serving(dense_above=math.inf, small=0)
    product = ByTask.product

    def wrong(self, x, bank, biases=None):
        if fault == "shared":
            self = ByTask.of(torch.full_like(self.tasks, len(model.tasks)), 3)
        return product(self, x, bank, biases) * (1.1 if fault == "scale" else 1)

    monkeypatch.setattr(agreement, "AGREEMENT", 1e-5)  # as over many more layers
    if fault == "strict":  # what single tasks differ by says nothing
        monkeypatch.setattr(agreement, "ROUNDINGS", 0)
    elif fault:
        monkeypatch.setattr(ByTask, "product", wrong)
    ids = torch.arange(24).view(3, 8)
    found = model(input_ids=ids, task_ids=["c", "a", "b"]).last_hidden_state
    assert (model.mixed.network is None) == (fault is not None)
    for row, task in enumerate(["c", "a", "b"]):
        model.set_task(task)
        alone = model(input_ids=ids[row : row + 1]).last_hidden_state
        model.unset_task()
        off = (found[row] - alone[0]).float().norm() / alone.float().norm()
        assert off < 0.05


@pytest.mark.parametrize("fault", [1.0, math.inf, math.nan])
def test_rounding_that_overflows_measures_nothing(fault):
    expected = torch.ones(4, dtype=torch.float16)
    again = expected * fault if fault != 1.0 else expected * 1.01
    near = torch.full_like(expected, 1.02)
    assert agreement._as_close(expected, near, again) == (fault == 1.0)
    assert not agreement._as_close(expected, expected * 9, again)


def test_numbers_of_every_type_are_rounded_again():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.linspace(1, 2, 99, dtype=dtype)
        off = (agreement.rounded_again(x).double() / x.double() - 1).abs()
        assert 0 < off.max() <= torch.finfo(dtype).eps
        assert agreement.rounded_again(x).equal(agreement.rounded_again(x))
    for x in (torch.tensor(3), torch.tensor([True, False])):
        assert agreement.rounded_again(x) is x


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
    with pytest.raises(UnknownTaskError, match="not all in 0 ... 3"):
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


def close_to_each(model, x, ids, found):
    """What each sample's own plain model gives."""
    for i, task in enumerate(ids.tolist()):
        alone = model.materialize(model.tasks[task])(x[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone, atol=1e-5, rtol=1e-5)


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
    close_to_each(model, x, ids, found)


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
        close_to_each(model, x, ids, model(x, task_ids=ids))
    if how == "changed":
        assert model.mixed.network is None and "group by group" in caplog.text
    else:
        network = model.mixed.network
        assert network.q_proj.fused is network.v_proj.fused is not None
        assert model.mixed.running.current is None


class GroupedQueries(nn.Module):
    """A query of more values than key and value have."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, width in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
                self.add_module(name, nn.Linear(8, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = self.q_proj(x).unflatten(-1, (2, 8)).sum(-2), self.k_proj(x)
        return (query @ key.mT).softmax(-1) @ self.v_proj(x)


def test_keys_and_values_multiply_together_where_the_query_is_held_as_factors():
    model = didi(family(GroupedQueries()), budget=0.3, factor_dtype="int4").eval()
    model.serving = Serving(dense_above=math.inf, small=100)
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([1, 0, 0, 1, 0, 1])
    found = model(x, task_ids=ids)
    close_to_each(model, x, ids, found)
    network = model.mixed.network
    assert network.q_proj.fused is None and not network.q_proj.banks["weight"].held
    assert network.k_proj.fused is network.v_proj.fused is not None


def test_the_shared_model_is_the_model_of_no_task(merged):
    pixels = images(4)
    expected = merged(pixels, task_ids=torch.full((4,), 3)).pooler_output
    for mode in (merged.train, merged.eval):
        mode()
        call = merged.mixed.call((pixels,), {})
        mix = merged.mixed.mix([None] * 4, None, call)
        found = merged.mixed.shared(mix, call).pooler_output
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --- several threads ----------------------------------------------------------------


class Meeting:
    """A forward hook at which two threads wait for each other, once each; not for one that waits for something else."""

    def __init__(self, module: nn.Module):
        self.barrier, self.been = threading.Barrier(2), threading.local()
        module.register_forward_pre_hook(self)

    def __call__(self, *_):
        if not hasattr(self.been, "here"):
            self.been.here = True
            with contextlib.suppress(threading.BrokenBarrierError):
                self.barrier.wait(timeout=0.5)


def in_threads(*calls):
    """Results of calls that run at the same time."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(c) for c in calls]]


def served(model: DynamicModel, seed: int, **options):
    """What serves a batch of its own under tasks or weights of its own."""
    weights = {"task_ids": task_ids(tasks=4, seed=seed)} if not options else options
    return lambda: model(images(seed=seed), **weights).pooler_output


@pytest.mark.parametrize("where", ["embeddings", "encoder.layers.1.self_attn.k_proj"])
@pytest.mark.parametrize("how", ["by task", "by weight", "group by group"])
def test_threads_serve_one_model_at_the_same_time(tiny_clip, how, where):
    """They meet inside of the network, before its first layer and between layers that are fused."""
    model = didi(tiny_clip.pool_models(), budget=0.7).eval()
    options = [{}, {}]
    if how == "by weight":
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(2, 12, 3, generator=generator)
        options = [{"task_weights": rows} for rows in weights]
    calls = [served(model, i, **o) for i, o in enumerate(options)]
    calls[0]()  # the first batch is compared with single tasks
    if how == "group by group":
        model.mixed.network = None
    else:
        model.mixed.limit = 100  # one piece, so that both are there when they meet
    expected = [call() for call in calls]
    Meeting(model.backbone.get_submodule(f"{TOWER}{where}"))
    for found, alone in zip(in_threads(*calls), expected):
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(calls[0](), expected[0], atol=1e-5, rtol=1e-5)


def test_threads_that_come_first_wait_for_one_mixed_forward(merged, monkeypatch):
    made, make = [], MixedForward.__init__

    def counted(self, *args, **kwargs):
        made.append(self)
        make(self, *args, **kwargs)

    expected = [served(copy.deepcopy(merged), seed)() for seed in range(4)]
    monkeypatch.setattr(MixedForward, "__init__", counted)
    found = in_threads(*(served(merged, seed) for seed in range(4)))
    assert len(made) == 1 and made[0].trusted
    for one, alone in zip(found, expected):
        torch.testing.assert_close(one, alone, atol=1e-5, rtol=1e-5)


def test_a_pass_inside_of_a_pass_leaves_the_outer_one(merged):
    outer, inner = served(merged, 0), served(merged, 1)
    expected = outer(), inner()
    found = []

    def serve_another(*_):
        handle.remove()
        found.append(inner())

    middle = tower_of(merged.backbone).encoder.layers[1]
    handle = middle.register_forward_pre_hook(serve_another)
    assert outer().equal(expected[0]) and found[0].equal(expected[1])


def test_nothing_of_a_batch_is_kept_where_it_fails(merged):
    serve = served(merged, 0)
    serve()

    def stop(*_):
        raise RuntimeError("stop here")

    tower_of(merged.backbone).encoder.layers[1].register_forward_hook(stop)
    with pytest.raises(RuntimeError, match="stop here"):
        serve()
    assert merged.mixed.running.current is None


# --- banks --------------------------------------------------------------------------


def _shared_parts() -> dict:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    low = LowRankFactors(draw(6, 2), draw(2, 5))
    shared = RoundedLowRankDelta.of((6, 5), round_factors(low, bits=4))
    own = LowRankDelta((6, 5), draw(6, 1), draw(1, 5))
    bases = RoundedBasesDelta.of((6, 5), draw(6, 3), draw(2, 5), 8)
    return {
        "added": (shared, "scaled_product", own),
        "masked": (shared, "scaled_product", MaskedDelta.of(draw(6, 5) > 0, 0.7)),
        "sparse": (
            shared,
            "scaled_product",
            SparseDelta.of(torch.eye(6, 5), torch.float32),
        ),
        "core": (bases, "bases", CoreDelta((6, 5), draw(3, 2))),
    }


@pytest.mark.parametrize("turned", [None, True, False])
@pytest.mark.parametrize("form", ["added", "masked", "sparse", "core"])
def test_the_shared_part_of_a_tensor_is_decoded_once(form, turned, monkeypatch):
    shared, decoding, delta = _shared_parts()[form]
    decode, times = getattr(shared, decoding), []

    def counted(*given):
        times.append(decoding)
        return decode(*given)

    base, deltas = torch.ones(6, 5), [delta, None, delta, delta]
    expected = [
        base + shared.change() if d is None else base + d.change(shared) for d in deltas
    ]
    for dense_above in (0.0, math.inf):
        monkeypatch.setattr(shared, decoding, counted)
        serving = Serving(dense_above, small=0)
        options = {"turned": turned, "serving": serving}
        bank = bank_of(lambda: base, shared, deltas, **options)
        monkeypatch.undo()
        assert times == [decoding]
        times.clear()
        for task, value in enumerate(expected):
            torch.testing.assert_close(bank.value(task), value)
        torch.testing.assert_close(bank.value(4), base + shared.change())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bank_is_its_tensors_however_they_lie(dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    kept = [draw(4, 6), draw(4, 6)], [draw(4, 3), (draw(4, 2), draw(2, 3))]
    shared = draw(4, 6), draw(4, 3)
    for turned in (True, False):
        banks = [
            MatrixBank((4, 6), laid_out(s, turned), k, turned=turned)
            for s, k in zip(shared, kept)
        ]
        assert banks[1].shared.equal(shared[1]) and banks[1].last.equal(kept[1][1][1])
        first = banks[1].first
        by_columns = turned and dtype == torch.bfloat16
        assert first.mT.is_contiguous() == by_columns and first.equal(kept[1][1][0])
    wide = side_by_side([banks[0], MatrixBank((4, 6), shared[0], kept[0], turned=True)])
    for task, matrix in enumerate(kept[0]):
        assert wide.matrices[task].equal(torch.cat([matrix, matrix], 1))
        assert banks[0].matrices[task].equal(matrix)


# --- the product --------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_by_task_is_a_product_per_task(dtype, rows):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    close = {"rtol": 0.05, "atol": 0.1} if dtype == torch.bfloat16 else {}
    shared, own = draw(6, 5), draw(6, 5)
    two, one = (draw(6, 2), draw(2, 5)), (draw(6, 1), draw(1, 5))
    counts = torch.tensor([2, 0, 3, 1, 1])
    x, bias = draw(7, rows, 6), draw(5, 5)
    tasks = torch.arange(5).repeat_interleave(counts)
    before = bias.clone()
    for kept in ([two, None, own, one], [own] * 4, [None] * 4, [one, two] * 2):
        bank = MatrixBank((6, 5), shared, kept, turned=False)
        for biases in (None, bias, bias[:1].expand(5, -1)):
            found = product_by_task(x, tasks, counts, biases, bank)
            for i, t in enumerate(tasks.tolist()):
                expected = x[i] @ bank.value(t)
                if biases is not None:
                    expected = expected + biases[t]
                torch.testing.assert_close(found[i], expected, **close)
            product_by_task(draw(7, 6), tasks, counts, biases, bank)
    assert bias.equal(before), "an input was written to"


def test_a_task_that_overflows_leaves_the_others_of_a_small_batch_alone():
    one, far = torch.ones(2, 1), torch.tensor([[torch.inf], [1.0]])
    kept = [tuple(f.bfloat16() for f in (a, one.mT)) for a in (one, far)]
    zero = torch.zeros(2, 2, dtype=torch.bfloat16)
    bank = MatrixBank((2, 2), zero, kept, turned=False)
    x, counts = torch.ones(2, 2, dtype=torch.bfloat16), torch.tensor([1, 1, 0])
    found = product_by_task(x, torch.tensor([0, 1]), counts, None, bank)
    assert found[0].tolist() == [2, 2] and found[1].isinf().all()


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
    for twin in (copy.deepcopy(merged), pickled(merged)):
        assert twin(pixels, task_ids=ids).pooler_output.equal(expected)


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("asked", ["mixed", "set", "both", "twice"])
def test_models_that_were_asked_for_states_are_pickled_and_give_each_once(
    merged, asked
):
    pixels, ids = images(), task_ids()
    states = {"output_hidden_states": True}
    if asked != "mixed":
        merged.set_task("mnist")
        merged(pixels, **states)
        merged.unset_task()
    if asked != "set":
        merged(pixels, task_ids=ids, **states)
    expected = merged(pixels, task_ids=ids, **states).hidden_states
    one = pickled(merged)
    if asked == "twice":
        one = pickled(one)
    for twin in (one, copy.deepcopy(merged), merged):
        found = twin(pixels, task_ids=ids, **states).hidden_states
        assert len(found) == len(expected) == 1 + merged.config.num_hidden_layers
        assert all(f.equal(e) for f, e in zip(found, expected))


def test_plain_models_of_one_that_was_asked_for_states_are_plain(merged):
    pixels, states = images(), {"output_hidden_states": True}
    fresh = merged.materialize("mnist")
    expected = fresh(pixels, **states).hidden_states
    merged(pixels, task_ids=task_ids(), **states)
    one = merged.materialize("mnist")
    assert b"fusion_bench_didi" not in pickle.dumps(one)
    for model in (one, pickled(one)):
        found = model(pixels, **states).hidden_states
        assert len(found) == len(expected)
        assert all(f.equal(e) for f, e in zip(found, expected))


def test_compiled_equals_eager_with_one_graph_for_all_batches(merged):
    pytest.importorskip("torch", "2.9", reason="is no one graph before")
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


@pytest.mark.parametrize("hard, backend", [(True, "aot_eager"), (False, "eager")])
def test_compiled_routing_equals_eager(merged, hard, backend):
    from fusion_bench_didi.routers.files import make_router

    merged.attach_router(make_router("projection", merged.tasks, hard=hard))
    torch._dynamo.reset()
    compiled = torch.compile(merged, backend=backend)
    for seed in range(2):
        pixels = images(seed=seed)
        found, expected = compiled(pixels), merged(pixels)
        torch.testing.assert_close(
            found.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5
        )


def test_compiled_fused_layers_equal_eager_in_any_thread(tiny_clip):
    pytest.importorskip("torch", "2.9", reason="is no one graph before")
    model = didi(tiny_clip.pool_models(), budget=0.7).eval()
    pixels = images()
    model(pixels, task_ids=task_ids())
    layers = list(model.mixed.network.modules())
    assert any(getattr(layer, "fused", None) for layer in layers)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def both(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = task_ids(tasks=4, seed=seed)
        ways = (forward(pixels, task_ids=ids) for forward in (compiled, model))
        return tuple(output.pooler_output for output in ways)

    with ThreadPoolExecutor(1) as other:
        for seed, pair in enumerate([both(0), both(1), *other.map(both, (2, 3))]):
            torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiled_by_inductor_equals_eager(merged):
    pixels, ids = images(), task_ids()
    torch._dynamo.reset()
    found = torch.compile(merged)(pixels, task_ids=ids).pooler_output
    expected = one_by_one(merged, pixels, ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
