"""What a process sets for its models changes neither what is merged nor what is decoded: default type and device, inference mode."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from exact_models import clip_tower
from fusion_bench.modelpool import BaseModelPool
from helpers import BASE, didi, family, floats, same_bits
from torch.overrides import _get_current_function_mode_stack
from transformers import CLIPVisionModel

from fusion_bench_didi import DiDiModel
from fusion_bench_didi.artifacts.saving import load_artifact
from fusion_bench_didi.editing.loading import load_tasks
from fusion_bench_didi.lowrank.arithmetic import own_arithmetic

TASKS = ("a", "b")


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    # stands for an accelerator that new tensors would be put on
    "device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "deterministic": deterministic,
}
MERGES = {
    "codes": {"budget": 0.3, "factor_dtype": "auto", "gain": "auto"},
    "floats": {"budget": 1.0},
    "packed": {"budget": 0.5, "factor_dtype": "int4"},
}


@pytest.fixture(scope="module")
def models() -> dict:
    return family(clip_tower(), TASKS)


@pytest.fixture(scope="module")
def merged(models) -> DiDiModel:
    return didi(models, budget=0.5)


@pytest.fixture(scope="module")
def plain(request, models):
    """Settings of a merge, its tasks' weights, images, and the answer to them."""
    settings = MERGES[request.param]
    model = didi(models, **settings)
    expected = {task: floats(model.materialize(task)) for task in TASKS}
    images = torch.randn(4, 3, 16, 16)
    return settings, expected, images, model(images, task_ids=[0, 1, 1, 0])[0]


#: Every setting with codes, and every merge under two of them.
TRIED = [
    *(("codes", setting) for setting in SETTINGS),
    *zip(("floats", "floats", "packed", "packed"), SETTINGS),
]


@pytest.mark.parametrize("plain, setting", TRIED, indirect=["plain"])
def test_settings_of_the_process_change_nothing(setting, plain, models, tmp_path):
    settings, expected, images, answer = plain
    with SETTINGS[setting]():
        didi(models, **settings, output_dir=str(tmp_path / "merged"))
        backbone = copy.deepcopy(models[BASE])
        model = DiDiModel.from_pretrained(tmp_path / "merged", backbone=backbone)
        for task in TASKS:
            assert same_bits(floats(model.materialize(task)), expected[task])
            model.set_task(task)
        model.unset_task()
        mixed = model(images, task_ids=[0, 1, 1, 0])[0]
    torch.testing.assert_close(mixed, answer)
    for task in TASKS:
        model.set_task(task)
        assert same_bits(floats(model.backbone), expected[task])


@pytest.mark.parametrize("compiled", [(BASE,), ("a",), (BASE, *TASKS)])
def test_compiled_models_are_merged_as_what_they_wrap(models, compiled, tmp_path):
    expected = didi(models, budget=0.5)
    wrapped = {n: torch.compile(m) if n in compiled else m for n, m in models.items()}
    model = didi(wrapped, budget=0.5)
    assert type(model.backbone) is CLIPVisionModel
    for task in TASKS:
        plain = floats(expected.materialize(task))
        assert same_bits(floats(model.materialize(task)), plain)
    model.save_pretrained(tmp_path / "merged")
    images = torch.randn(2, 3, 16, 16)
    mixed, answer = (m(images, task_ids=[0, 1])[0] for m in (model, expected))
    assert mixed.equal(answer)


@pytest.mark.parametrize("place", ["loaded", "loaded by name", "some tasks", "made"])
def test_a_base_model_that_is_given_compiled_is_what_was_compiled(
    place, models, merged, tmp_path
):
    base = torch.compile(copy.deepcopy(models[BASE]))
    if place == "made":
        experts = {t: dict(e.deltas.items()) for t, e in merged.modulators.items()}
        shared = dict(merged.shared.items())
        model = DiDiModel(base, shared, experts, unit_bits=merged.unit_bits)
    else:
        merged.save_pretrained(tmp_path / "merged")
        load = {"loaded": DiDiModel.from_pretrained, "loaded by name": load_artifact}
        if place == "some tasks":
            model = load_tasks(tmp_path / "merged", TASKS, base)
        else:
            model = load[place](tmp_path / "merged", base)
    assert type(model.backbone) is CLIPVisionModel
    for task in TASKS:
        plain, expected = model.materialize(task), merged.materialize(task)
        assert type(plain) is CLIPVisionModel
        assert same_bits(floats(plain), floats(expected))
    images = torch.randn(2, 3, 16, 16)
    found, answer = (m(images, task_ids=[0, 1])[0] for m in (model, merged))
    torch.testing.assert_close(found, answer)


def test_a_pool_that_compiles_what_it_loads_gives_what_it_compiled(models):
    class Compiling(BaseModelPool):
        def load_model(self, *args, **kwargs):
            return torch.compile(super().load_model(*args, **kwargs))

    model = didi(Compiling(models), budget=0.5)
    assert type(model.materialize(TASKS[0])) is CLIPVisionModel


def test_calls_of_torch_pass_through_python_only_where_new_tensors_go_elsewhere():
    with own_arithmetic():
        assert not _get_current_function_mode_stack()
    with torch.device("meta"), own_arithmetic():
        assert torch.empty(1).device.type == "cpu"


def test_settings_come_back_when_the_last_of_several_blocks_ends():
    first, second = own_arithmetic(), own_arithmetic()
    with default_dtype(torch.bfloat16), ThreadPoolExecutor(1) as other:
        first.__enter__()
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float32, "the other is still inside"
        other.submit(second.__exit__, None, None, None).result()
        assert torch.get_default_dtype() == torch.bfloat16
