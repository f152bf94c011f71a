"""One unit for every account: what a fine-tuned model's changed tensors take, counters and heads of other sizes among them."""

import copy

import pytest
import torch
from exact_models import Classifier, seeded
from fusion_bench.method import SimpleAverageAlgorithm
from helpers import BASE, fine_tuned, pool_facts
from torch import nn

from fusion_bench_didi.artifacts.saving import load_artifact, save_artifact
from fusion_bench_didi.checkpoint.deltas import read_config, write_manifest
from fusion_bench_didi.errors import CheckpointMismatchError
from fusion_bench_didi.method import (
    BitDelta,
    DiDiMerging,
    EMRMerging,
    FreeMerging,
    TallMaskMerging,
    TSVCompression,
    TwinMerging,
)
from fusion_bench_didi.pools.host_forms import as_pool
from fusion_bench_didi.programs.sizes import individuals_size, model_size

DYNAMIC = (
    *(BitDelta, DiDiMerging, EMRMerging, FreeMerging),
    *(TallMaskMerging, TSVCompression, TwinMerging),
)


def pool_of(heads: tuple[int, ...]) -> dict[str, nn.Module]:
    models = {BASE: seeded(Classifier)}
    for seed, (task, classes) in enumerate(zip("abc", heads), 1):
        models[task] = fine_tuned(seeded(lambda: Classifier(classes)), seed)
        models[task].norm.running_mean.add_(seed)
        models[task].norm.running_var.mul_(seed + 1)
        models[task].norm.num_batches_tracked.fill_(2**40 + seed)
    return models


@pytest.mark.parametrize("method", DYNAMIC, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("heads", [(3, 3), (3, 5)], ids=str)
def test_methods_and_programs_have_one_unit_and_count_what_is_written(
    method, heads, tmp_path
):
    models = pool_of(heads)
    facts = pool_facts(as_pool(models), copy.deepcopy(models[BASE]))
    floats = 8 * 8 + 5 * 8 + (3 * 9 + heads[1] * 9) // 2
    assert facts.unit_bits == 32 * floats + 64  # and an int64 counter
    merged = method().run(as_pool(models))
    assert merged.unit_bits == facts.unit_bits
    size = model_size(merged, copy.deepcopy(models[BASE]), facts)
    found = save_artifact(
        merged, tmp_path / "saved", base=models[BASE], types=facts.types
    )
    assert round(size.x_excl * facts.unit_bits) == 8 * found.beyond


def test_static_merges_and_individuals_write_their_counters(tmp_path):
    models = pool_of((3, 3))
    pool = as_pool(models)
    facts = pool_facts(pool, models[BASE])
    static = SimpleAverageAlgorithm(inplace=False).run(pool)
    for what, made, count in (
        ("static", static, 1),
        ("individuals", list(pool.named_models()), 2),
    ):
        found = save_artifact(
            made, tmp_path / what, base=models[BASE], types=facts.types
        )
        assert 8 * found.beyond == count * facts.unit_bits


@pytest.mark.parametrize("heads", [(3, 5), (5, 3), (2, 2), (3, 4, 7), (1, 3, 2)], ids=str)  # fmt: skip
def test_individuals_with_heads_of_other_sizes_are_written_and_come_back(
    heads, tmp_path
):
    models = pool_of(heads)
    facts = pool_facts(as_pool(models), models[BASE])
    base, own = copy.deepcopy(models.pop(BASE)), iter(models.items())
    found = save_artifact(own, tmp_path / "saved", base=base, types=facts.types)
    size = individuals_size(facts)
    assert round(size.x_excl * facts.unit_bits) == 8 * found.beyond == facts.whole_bits
    assert abs(found.replaced - facts.unit_bits // 8) <= facts.sizes
    again = load_artifact(tmp_path / "saved", copy.deepcopy(base))
    x = torch.ones(2, 8)
    for (task, model), classes in zip(models.items(), heads):
        assert again[task].head.out_features == classes
        assert again[task].state_dict().keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert value.equal(again[task].state_dict()[name]), name
        assert model.eval()(x).equal(again[task].eval()(x))


class Deeper(Classifier):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(8, 8)


class Wider(Classifier):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv1d(8, 3, 1)


@pytest.mark.parametrize("make", [Deeper, Wider])
def test_individuals_that_are_no_models_like_the_base_are_refused(make, tmp_path):
    models = pool_of((3, 4))
    facts = pool_facts(as_pool(models), models[BASE])
    own = [("a", models["a"]), ("b", seeded(make))]
    with pytest.raises(TypeError, match=f"{make.__name__} cannot be saved"):
        save_artifact(own, tmp_path / "saved", base=models[BASE], types=facts.types)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("own", [["mlp.weight", "none"], "head.weight", [3]], ids=str)
def test_tensors_of_their_own_are_some_of_those_written(own, tmp_path):
    models = pool_of((3, 5))
    facts = pool_facts(as_pool(models), models[BASE])
    base, saved = models.pop(BASE), tmp_path / "saved"
    save_artifact(models.items(), saved, base=base, types=facts.types)
    config = read_config(saved)
    config["experts"][1]["own"] = own
    write_manifest(saved / "config.json", config)
    with pytest.raises(CheckpointMismatchError, match="experts.*own"):
        load_artifact(saved, base)
