"""What only one task can have: every method keeps it to the bit, or refuses by its name."""

import pytest
from exact_models import Classifier, seeded
from helpers import BASE, didi, fine_tuned
from torch import nn

from fusion_bench_didi.errors import CheckpointMismatchError
from fusion_bench_didi.method import (
    CATMerging,
    EMRMerging,
    FreeMerging,
    SEMerging,
    TallMaskMerging,
    TSVCompression,
    TwinMerging,
)
from fusion_bench_didi.method.merge import MERGE

OWN = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
KEEPING = [EMRMerging, FreeMerging, TallMaskMerging, TSVCompression, TwinMerging]


def models(heads: bool = True) -> dict[str, nn.Module]:
    base = seeded(Classifier)
    found = {BASE: base}
    for seed, (task, classes) in enumerate({"a": 3, "b": 5 if heads else 3}.items(), 1):
        found[task] = fine_tuned(seeded(lambda: Classifier(classes)), seed)
        found[task].norm.running_var.mul_(10.0 ** (-6 * seed))
        found[task].norm.running_mean.add_(seed)
        found[task].norm.num_batches_tracked.fill_(2**40 + seed)
    return found


@pytest.mark.parametrize("method", KEEPING, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("heads", [True, False])
def test_methods_keep_heads_and_statistics(method, heads, tmp_path):
    pool = models(heads)
    merged = method(output_dir=str(tmp_path / "merged")).run(pool)
    for task in "ab":
        found, want = merged.materialize(task).state_dict(), pool[task].state_dict()
        own = (*OWN, "head.weight", "head.bias") if heads else OWN
        for name in own:
            assert found[name].dtype == want[name].dtype
            assert found[name].equal(want[name]), name
        account = merged.info["tensors"][task]
        assert set(account["kept as the task has them"]) == set(own)


@pytest.mark.parametrize("experts", ["individuals", "didi"])
def test_se_merging_starts_from_a_merge_of_what_is_shared(experts):
    pool = models()
    method = SEMerging(
        base_method={"_target_": "fusion_bench.method.SimpleAverageAlgorithm"},
        experts=experts,
        didi={"budget": 9} if experts == "didi" else None,
        layers=["mlp"],
    )
    merged = method.run(pool)
    for task in "ab":
        found, want = merged.materialize(task).state_dict(), pool[task].state_dict()
        for name in (*OWN, "head.weight", "head.bias"):
            assert found[name].equal(want[name]), name


def test_the_account_names_what_a_method_leaves_as_it_was():
    pool = models(heads=False)
    merged = FreeMerging().run(pool)  # attention and MLP only
    account = merged.info["tensors"]["a"]
    left = ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert account["left as in the base model"] == left
    assert account["merged"] == 2
    for name in left:
        found = merged.materialize("a").get_parameter(name)
        assert found.equal(pool[BASE].get_parameter(name))


def test_the_account_of_vectors_that_are_left_out():
    merged = didi(models(heads=False), vectors="pretrained", budget=2)
    account = merged.info["tensors"]["b"]
    assert account["left as in the base model"] == [
        "head.bias",
        "mlp.bias",
        "norm.bias",
        "norm.weight",
    ]
    assert account["merged"] == 2


@pytest.mark.parametrize("heads", [True, False])
def test_methods_of_what_tasks_share_refuse_it_by_name(heads, monkeypatch):
    monkeypatch.setattr(
        "fusion_bench_didi.method.baselines.cat.require_inputs", lambda *_, **__: None
    )
    name = "head.bias, head.weight, norm" if heads else "norm.num_batches_tracked"
    merge = MERGE(objective="proxy", evaluations=4, population=4, trees=2)
    for method in (CATMerging(), merge):
        with pytest.raises(CheckpointMismatchError, match=f"{name}.*exclude=\\[...\\]"):
            method.run(models(heads))


def test_the_way_out_of_the_refusal_works():
    pool = models(heads=False)
    found = MERGE(
        objective="proxy",
        evaluations=4,
        population=4,
        trees=2,
        surrogate_generations=1,
        exclude="norm.[rn]u*",
    ).run(pool)
    assert "norm.running_var" not in found.touched
    assert found.backbone.norm.running_var.equal(pool[BASE].norm.running_var)
