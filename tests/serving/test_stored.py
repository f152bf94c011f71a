"""Mixed batches out of what is stored: nothing but backbone, deltas and what is held stays in memory, whatever is asked."""

import copy
import gc
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import didi, normal
from simulated_device import simulated
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fusion_bench_didi.deltas.coded import CodedDelta
from fusion_bench_didi.deltas.plain import LowRankDelta, OwnDelta
from fusion_bench_didi.deltas.quantized import RoundedDenseDelta, RoundedLowRankDelta
from fusion_bench_didi.deltas.tucker import BasesDelta, CoreDelta
from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.lowrank.factors import LowRankFactors
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.quantization.coded_matrix import code_rows
from fusion_bench_didi.quantization.codes import pack_codes
from fusion_bench_didi.quantization.rounding import round_factors, round_rows
from fusion_bench_didi.serving.banks import Serving
from fusion_bench_didi.serving.held import Held
from fusion_bench_didi.serving.stored import StoredBank

SLIM = Serving(memory_limit_gb=0)


def images(count: int = 12) -> torch.Tensor:
    return normal(count, 3, 32, 32)


def task_ids(count: int = 12) -> torch.Tensor:
    return torch.arange(count) * 5 % 3


@pytest.fixture
def merged(tiny_clip) -> DynamicModel:
    return didi(tiny_clip.pool_models(), budget=0.7).eval()


@pytest.fixture
def language() -> DynamicModel:
    """Tied embeddings, of which tasks change some or all by every kind of delta."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    names = {n: tuple(p.shape) for n, p in model.named_parameters() if p.ndim == 2}
    shared = {
        n: LowRankDelta(s, normal(s[0], 2) / 9, normal(2, s[1]) / 9)
        for n, s in names.items()
    }

    def coded(s, seed):
        return CodedDelta.of(
            s, code_rows(normal(*s, seed=seed) / 9, 0.1, 3.0 * s[0] * s[1])
        )

    def rounded(s, seed):
        codes, scale = round_rows(normal(*s, seed=seed) / 9, 3)
        return RoundedDenseDelta(s, pack_codes(codes, 3), scale, 3)

    def product(s, seed):
        low = LowRankFactors(
            normal(s[0], 2, seed=seed) / 9, normal(2, s[1], seed=seed) / 9
        )
        return RoundedLowRankDelta.of(s, round_factors(low, bits=4))

    def own(s, seed):
        return OwnDelta(s, normal(*s, seed=seed) / 9)

    makers = {"coded": coded, "rounded": rounded, "product": product, "own": own}
    experts = {
        t: {n: make(s, i) for i, (n, s) in enumerate(names.items())}
        for t, make in makers.items()
    }
    experts["nothing"] = {}
    return DynamicModel(model, shared, experts, unit_bits=10**6)


@pytest.mark.parametrize("limit", [0, 2e-5, 1])
def test_every_form_in_tied_embeddings_and_layers(language, limit):
    """Three batches, so that what is held is used."""
    tokens = torch.arange(12 * 5).view(12, 5) % 64
    ids = torch.arange(12) % 6
    names = [*language.tasks, None]
    expected = torch.cat(
        [
            (
                language.materialize(names[t])(row[None]).logits
                if names[t]
                else language(row[None], task_ids=[None]).logits
            )
            for row, t in zip(tokens, ids.tolist())
        ]
    )
    language.serving = Serving(memory_limit_gb=limit)
    weights = torch.eye(6)[ids][:, :5].contiguous()
    soft = weights * 0.5 + 0.1
    for _ in range(3):
        found = language(tokens, task_ids=ids).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    mixed = language(tokens, task_weights=soft).logits
    assert language.mixed.network is not None
    language.serving = Serving()
    torch.testing.assert_close(
        language(tokens, task_weights=soft).logits, mixed, atol=1e-4, rtol=1e-4
    )


def test_generation_gives_the_tokens_of_each_task(language):
    language.serving = SLIM
    tokens = torch.arange(5 * 4).view(5, 4) % 64
    found = language.generate(
        tokens, task_ids=language.tasks, max_new_tokens=4, do_sample=False
    )
    for row, out, task in zip(tokens, found, language.tasks):
        alone = language.materialize(task).generate(
            row[None], max_new_tokens=4, do_sample=False
        )
        assert out.equal(alone[0]), task


def test_nothing_stays_that_is_not_stored(merged):
    """Tensors alive after the first batch and after more: those of the model and vectors per task."""
    pixels, ids = images(), task_ids()
    merged.serving = SLIM
    gc.collect()
    before = _alive()
    merged(pixels, task_ids=ids)
    gc.collect()
    banks = merged.mixed.banks.values()
    vectors = sum(b.values.nbytes for b in banks if not isinstance(b, StoredBank))
    matrix = min(b.base().nbytes for b in banks if isinstance(b, StoredBank))
    kept = _alive() - before
    assert vectors <= kept < vectors + matrix
    merged(pixels, task_ids=ids)
    gc.collect()
    assert _alive() - before <= kept
    for bank in banks:
        if isinstance(bank, StoredBank):
            assert not any(isinstance(v, torch.Tensor) for v in vars(bank).values())
    assert merged.mixed.shared_network is None and merged.mixed.held.nbytes == 0


def _alive() -> int:
    kinds = (
        o
        for o in gc.get_objects()
        if type(o) in (torch.Tensor, torch.nn.Parameter) and o.layout == torch.strided
    )
    return sum(
        {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kinds
        }.values()
    )


@pytest.mark.parametrize("limit", [0, 1])
def test_inference_mode_bfloat16_and_threads(merged, limit):
    pixels, ids = images(), task_ids()
    expected = merged(pixels, task_ids=ids).pooler_output
    merged.serving = Serving(memory_limit_gb=limit)
    with torch.inference_mode():
        merged(pixels, task_ids=ids)
    with ThreadPoolExecutor(4) as threads:
        runs = [threads.submit(merged, pixels, task_ids=ids) for _ in range(8)]
    for run in runs:
        torch.testing.assert_close(
            run.result().pooler_output, expected, atol=1e-5, rtol=1e-5
        )
    merged.bfloat16()
    found = merged(pixels.bfloat16(), task_ids=ids).pooler_output
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_compiled_graphs_break_where_products_decode(merged):
    pixels, ids = images(), task_ids()
    expected = merged(pixels, task_ids=ids).pooler_output
    merged.serving = SLIM
    merged(pixels, task_ids=ids)
    torch._dynamo.reset()
    compiled = torch.compile(merged, backend="eager")
    found = compiled(pixels, task_ids=ids).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert merged.mixed.network is not None


def test_a_task_that_is_set_does_not_change_a_mixed_batch(merged):
    pixels, ids = images(), task_ids()
    merged.serving = SLIM
    expected = merged(pixels, task_ids=ids).pooler_output
    base = {n: p.clone() for n, p in merged.backbone.named_parameters()}
    merged.set_task(merged.tasks[1])
    assert merged(pixels, task_ids=ids).pooler_output.equal(expected)
    merged.unset_task()
    assert merged(pixels, task_ids=ids).pooler_output.equal(expected)
    assert all(p.equal(base[n]) for n, p in merged.backbone.named_parameters())


def test_base_weights_are_kept_twice_only_while_a_task_is_set(merged):
    assert not merged._weights._base
    merged.set_task(merged.tasks[0])
    assert merged._weights._base
    merged.unset_task()
    assert not merged._weights._base


def of_bases(tasks: int = 3) -> DynamicModel:
    """Two layers whose experts are written in bases of their own shape."""
    side, size = 16, 4
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(2)))
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shared = {
        n: BasesDelta(s, normal(side, size), normal(size, side))
        for n, s in names.items()
    }
    experts = {
        f"t{t}": {
            n: CoreDelta(s, normal(size, size, seed=t) / 99) for n, s in names.items()
        }
        for t in range(tasks)
    }
    return DynamicModel(model.eval(), shared, experts, unit_bits=10**6)


@pytest.mark.parametrize("rows", [1, 40], ids=["factors", "whole"])
def test_bases_add_nothing_to_the_backbone(rows, monkeypatch):
    """No product decodes a shared part that is zero, or adds it."""
    model = of_bases()
    x, ids = normal(4, rows, 16), [0, 2, 1, None]
    expected = model(x, task_ids=ids)
    model.serving = SLIM
    monkeypatch.setattr(BasesDelta, "own", lambda self: 1 / 0)
    model(x, task_ids=ids)
    assert model.mixed.trusted
    torch.testing.assert_close(model(x, task_ids=ids), expected)


def test_the_shared_matrix_is_held_as_those_of_experts(language, monkeypatch):
    tokens, ids = torch.arange(12 * 5).view(12, 5) % 64, torch.arange(12) % 6
    language.serving = Serving(memory_limit_gb=1)
    expected = language(tokens, task_ids=ids).logits
    assert len(language.tasks) in language.mixed.held.tasks
    monkeypatch.setattr(LowRankDelta, "own", lambda self: 1 / 0)
    assert language(tokens, task_ids=ids).logits.equal(expected)


# --- what is held -------------------------------------------------------------------


def block(size: int = 8) -> tuple[torch.Tensor]:
    return (torch.zeros(size, dtype=torch.uint8),)


def test_the_task_asked_for_least_recently_makes_room():
    held = Held(20)
    for task in (0, 1):
        held.ask([task])
        assert held.get("a", task, 8, block)
    held.ask([0])
    assert held.get("a", 0, 8, lambda: 1 / 0)
    held.ask([2])
    assert held.get("a", 2, 8, block) and sorted(held.tasks) == [0, 2]
    assert held.nbytes == 16


def test_a_batch_that_is_too_large_keeps_what_it_has():
    held = Held(20)
    for _ in range(3):
        held.ask(range(4))
        found = [held.get("a", task, 8, block) is not None for task in range(4)]
        assert found == [True, True, False, False]
    assert held.get("a", 3, 21, block) is None and held.nbytes == 16


def test_what_could_not_be_made_takes_no_room():
    held = Held(math.inf)
    held.ask([0])

    def broken():
        raise MemoryError

    with pytest.raises(MemoryError):
        held.get("a", 0, 8, broken)
    assert held.nbytes == 0 and held.tasks == []
    assert held.get("a", 0, 8, lambda: (torch.ones(2),)) is not None


def test_threads_hold_one_copy():
    held, start = Held(100), threading.Barrier(4)

    def get(_):
        start.wait()
        return held.get("a", 0, 8, block)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(get, range(4)))
    assert held.nbytes == 8 and len({id(made) for made in found}) == 1


@pytest.mark.parametrize("limit", ["memory_limit_gb", "dense_above", "small"])
def test_a_limit_is_no_number_below_zero(limit):
    with pytest.raises(SettingsError, match=limit):
        Serving(**{limit: -1})


def test_on_an_accelerator_every_form_is_decoded_there(language):
    tokens, ids = torch.arange(12 * 5).view(12, 5) % 64, torch.arange(12) % 6
    language.serving = SLIM
    expected = language(tokens, task_ids=ids).logits
    with simulated() as device:
        there = copy.deepcopy(language).to(device)
        for limit in (0, 1):
            there.serving = Serving(memory_limit_gb=limit)
            found = there(tokens.to(device), task_ids=ids).logits
            assert found.device == device
            torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-5)
