"""Models under ``torch.autocast``: forwards are cast as plain layers are, weights are what they are without."""

import pytest
import torch
from exact_models import clip_tower, llama, tokens
from helpers import didi, family, floats, same_bits
from torch import nn

from fusion_bench_didi.lowrank.arithmetic import own_arithmetic
from fusion_bench_didi.serving.banks import Serving

TASKS = ("a", "b", "c")
IDS = [*TASKS, *TASKS]


KINDS = {
    "tower": (clip_tower, lambda: {"pixel_values": torch.randn(6, 3, 16, 16)}),
    "language": (llama, lambda: {"input_ids": tokens(6, 4)}),
}


def cast():
    return torch.autocast("cpu", torch.bfloat16)


def answer(model: nn.Module, inputs: dict, **tasks) -> torch.Tensor:
    return model(**inputs, **tasks)[0].detach()


@pytest.mark.parametrize("factors", ["float32", "auto"])
@pytest.mark.parametrize("serving", [Serving(), Serving(memory_limit_gb=0)])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batches_are_cast_as_single_tasks_are(kind, serving, factors):
    torch.manual_seed(0)
    build, given = KINDS[kind]
    model = didi(family(build(), TASKS), budget=1.0, factor_dtype=factors)
    model.serving, inputs = serving, given()
    before = answer(model, inputs, task_ids=IDS)
    with cast():
        mixed = answer(model, inputs, task_ids=IDS)
    assert model.mixed.network is not None, "single tasks one after another"
    with cast():
        for i, task in enumerate(IDS):
            model.set_task(task)
            alone = answer(model, {k: v[i : i + 1] for k, v in inputs.items()})
            assert mixed.dtype == alone.dtype
            torch.testing.assert_close(mixed[i], alone[0], rtol=0.02, atol=0.02)
    model.unset_task()
    assert answer(model, inputs, task_ids=IDS).equal(before), "still cast"


@pytest.mark.parametrize("gradients", [torch.no_grad, torch.enable_grad])
def test_weights_that_were_cast_are_not_those_of_the_next_task(gradients):
    torch.manual_seed(0)
    model = didi(family(clip_tower(), TASKS), budget=1.0)
    model.backbone.requires_grad_(True)  # whose casts are kept to the end of the block
    inputs, expected = KINDS["tower"][1](), {}
    with gradients():
        for task in TASKS:
            model.set_task(task)
            with cast():
                expected[task] = answer(model, inputs)
        with cast():
            for task in TASKS:
                model.set_task(task)
                assert answer(model, inputs).equal(expected[task]), task


@pytest.mark.parametrize("factors", ["float32", "int8", "auto"])
def test_weights_are_the_same_under_autocast(factors):
    torch.manual_seed(0)
    models = family(clip_tower(), TASKS)
    with cast():
        model = didi(models, budget=0.5, factor_dtype=factors)
    again = didi(models, budget=0.5, factor_dtype=factors)
    for task in TASKS:
        expected = floats(again.materialize(task))
        with cast():
            assert same_bits(floats(model.materialize(task)), expected)
            model.set_task(task)
        assert same_bits(floats(model.backbone), expected)


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_own_products_keep_all_bits_and_the_process_gets_its_setting_back(precision):
    pytest.importorskip("torch", "2.9", reason="one setting for all before")
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    torch.set_float32_matmul_precision(precision)
    try:
        before = [backend.fp32_precision for backend in backends]
        with pytest.raises(KeyError), own_arithmetic(), cast():
            with own_arithmetic():
                assert {backend.fp32_precision for backend in backends} == {"ieee"}
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            raise KeyError
        assert [backend.fp32_precision for backend in backends] == before
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
