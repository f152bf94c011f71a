"""A setting that would do nothing here is an error that names it: patterns without effect, aliases of no model, all left out."""

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.utils import instantiate
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from helpers import BASE, didi, family
from torch import nn

from fusion_bench_didi.errors import SettingsError, UnknownTaskError
from fusion_bench_didi.method import (
    DARE,
    BitDelta,
    CATMerging,
    ComPEFT,
    DeltaCoMe,
    DiDiMerging,
    EMRMerging,
    FreeMerging,
    RoutedMethod,
    SEMerging,
    TallMaskMerging,
    TaskVectorQuantization,
    TSwitch,
    UltraDelta,
)
from fusion_bench_didi.method.merge import MERGE
from fusion_bench_didi.method.wemoe import WEMoEMerging


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = (
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 4),
        )


@pytest.fixture
def pool():
    return family(Net())


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"as_vectors": "body.bias"}, "as_vectors: 'body.bias'"),
        ({"as_vectors": ["body.weight", "norm.*"]}, r"as_vectors: 'norm.\*'"),
        ({"as_vectors": "body.*", "exclude": "body.weight"}, r"as_vectors: 'body.\*'"),
        ({"as_vectors": "body.*", "own": "body.*"}, r"as_vectors: 'body.\*'"),
        ({"own": "head.weight", "exclude": "head.*"}, "own: 'head.weight'"),
        ({"own": ["head.*", "body.*"], "exclude": "h*"}, r"own: 'head.\*'"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_pattern_without_effect(pool, settings, named, dry_run):
    with pytest.raises(SettingsError, match=f"{named} does nothing"):
        didi(pool, budget=3, dry_run=dry_run, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"as_vectors": "*"},
        {"as_vectors": "body.*"},
        {"as_vectors": ["body.*", "head.*"], "exclude": "*bias"},
        {"own": "head.*", "exclude": "head.bias"},
    ],
)
def test_a_pattern_with_some_effect(pool, settings):
    assert didi(pool, budget=3, **settings).tasks == ["mnist", "svhn"]


@pytest.mark.parametrize("method", [DiDiMerging, EMRMerging])
@pytest.mark.parametrize("aliases", [{"MNIST": "digits"}, {"a": "svhn", "b": ""}])
def test_an_alias_of_no_model(pool, method, aliases):
    with pytest.raises(
        UnknownTaskError,
        match=r"task_aliases=\{.*no model of the pool.*'mnist', 'svhn'",
    ):
        method(task_aliases=aliases).run(BaseModelPool(pool))
    method(task_aliases={"digits": "MNIST", "numbers": "svhn"}).run(BaseModelPool(pool))


@pytest.mark.parametrize("only", ["bias", "norm"])
@pytest.mark.parametrize("factor_dtype", ["auto", "float32", "int4"])
def test_all_that_is_changed_is_left_out(pool, only, factor_dtype):
    base = pool[BASE]
    for task in ("mnist", "svhn"):
        for name, value in pool[task].named_parameters():
            if only not in name:
                value.data.copy_(base.get_parameter(name))
    with pytest.raises(
        SettingsError, match=r"vectors=.?pretrained.? leaves out all that"
    ):
        didi(pool, vectors="pretrained", factor_dtype=factor_dtype)
    assert didi(pool, vectors="shared", budget=2, factor_dtype=factor_dtype).touched


HEAD = {"head": "mlp"}
#: Class, what makes settings idle, values at which they are refused, and beside what they are read.
IDLE = [
    (TallMaskMerging, {"multi_task": "task_arithmetic"}, {"ties_keep": 0.3}, {}),
    (MERGE, {"objective": "proxy"}, {"validation_samples": 4}, {}),
    (
        MERGE,
        {"operators": ["average"]},
        {"scaling": 0.5, "ties_keep": 0.1, "low_rank_bits": 8},
        {},
    ),
    (CATMerging, {"directions": 0}, {"weight": 1.0, "images": 9, "seed": 1}, {}),
    (CATMerging, {"scale": 0.0}, {"directions": 2, "weight": 1.0, "images": 9}, {}),
    (DARE, {"drop": 0.0}, {"seed": 1}, {}),
    (UltraDelta, {"drop": 0.0, "step": 0.0}, {"seed": 1}, {}),
    (FreeMerging, {"expert_scale": 0.0}, {"keep": 0.1}, {}),
    (FreeMerging, {"expert_scale": 0.0, "filter": "code"}, {"keep": 0.1}, {}),
    *(
        (
            RoutedMethod,
            {"router": router},
            {
                "hard": False,
                "temperature": 2.0,
                "fallback": "shared",
                "threshold": 0.1,
                "head": "mlp",
                "images": 9,
                "seed": 1,
                "router_options": {"directions": 3},
            },
            {**HEAD, "fallback": "shared", "threshold": 0.5},
        )
        for router in ("oracle", "none")
    ),
    (RoutedMethod, {"router": "projection"}, {"images": 9, "seed": 1}, HEAD),
    (SEMerging, {}, {"images": 9, "seed": 1}, HEAD),
    (SEMerging, {}, {"threshold": 0.5}, {"fallback": "shared"}),
    (SEMerging, {}, {"fallback": "shared"}, {"threshold": 0.5}),
    (SEMerging, {"assignment": "hard"}, {"temperature": 0.5}, {"assignment": "soft"}),
    (
        SEMerging,
        {"head": "mlp"},
        {"prefer": "far", "normalization": "none"},
        {"head": "none"},
    ),
    (SEMerging, {}, {"didi": {"budget": 1.1}}, {"experts": "didi"}),
    (
        WEMoEMerging,
        {"max_steps": 0},
        {
            "training": "published",
            "lr": 0.1,
            "lr_schedule": "cosine",
            "batch_size": 3,
            "batch_reduce": True,
            "use_grad_accumulate": False,
            "num_workers": 1,
        },
        {},
    ),
]


@pytest.mark.parametrize(
    "method, beside, key, value, read",
    [
        pytest.param(
            method, beside, key, value, read, id=f"{method.__name__} {beside} {key}"
        )
        for method, beside, idle, read in IDLE
        for key, value in idle.items()
    ],
)
def test_a_value_that_nothing_reads(method, beside, key, value, read):
    with pytest.raises(SettingsError, match=rf"{key} (\(budget\) )?is of "):
        method(**beside, **{key: value})
    method(**{**read, key: value})


@pytest.mark.parametrize(
    "method, beside",
    [
        ("tall_mask", ["multi_task=task_arithmetic"]),
        ("merge", ["objective=proxy", "operators=[average]"]),
        ("cat", ["directions=0"]),
        ("routed", ["router=oracle"]),
        ("routed", ["router=none"]),
        ("routed", ["router=projection"]),
        ("se_merging", []),
        ("wemoe", ["max_steps=0"]),
    ],
)
def test_defaults_of_the_configuration_pass(method, beside):
    """The command gives every key."""
    overrides = [f"method=didi/{method}", *(f"method.{one}" for one in beside)]
    config = initialize_hydra_config("fabric_model_fusion", overrides)
    instantiate(config.method)


def test_a_threshold_of_no_task(pool):
    every = {"mnist": 0.3, "svhn": 0.5}
    with pytest.raises(SettingsError, match="threshold is of tasks that thresholds"):
        TallMaskMerging(threshold=0.2, thresholds=every).run(pool)
    TallMaskMerging(thresholds=every).run(pool)
    TallMaskMerging(threshold=0.2, thresholds={"mnist": 0.3}).run(pool)


class Scaled(Net):
    """With a single value, as the temperature of CLIP."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))


@pytest.mark.parametrize("others", ["pretrained", "bfloat16"])
@pytest.mark.parametrize(
    "method, settings",
    [
        *((one, {}) for one in (TSwitch, ComPEFT, DARE, TaskVectorQuantization)),
        (TaskVectorQuantization, {"base_width": 3}),
        (BitDelta, {"tensors": "all"}),
    ],
)
def test_others_than_all_tensors_are_single_values(pool, method, settings, others):
    with pytest.raises(SettingsError, match="others is of tensors that are not compr"):
        method(**settings, others=others).run(pool)
    method(**settings).run(pool)
    method(**{**settings, "tensors": "matrices"}, others=others).run(pool)
    scaled = family(Scaled())
    model = method(**settings, others=others).run(scaled)
    kept = model.materialize("svhn").temperature
    expected = scaled["_pretrained_" if others == "pretrained" else "svhn"].temperature
    torch.testing.assert_close(kept, expected, atol=2e-3, rtol=0)


def test_all_tensors_with_the_others_of_the_class_pass(pool):
    UltraDelta(tensors="all").run(pool)


@pytest.mark.parametrize(
    "settings",
    [{"bits": 100}, {"bits": 16.5}, {"bits": 0}, {"eight": 4097}, {"three": 5000}],
)
def test_more_directions_than_there_are(settings):
    with pytest.raises(SettingsError, match=next(iter(settings))):
        DeltaCoMe(**settings)
    DeltaCoMe(bits=16, eight=4096, three=4096)


def test_a_filter_that_nothing_passes():
    with pytest.raises(SettingsError, match="cutoff=1.5 removes every frequency"):
        FreeMerging(cutoff=1.5)
    FreeMerging(cutoff=1.4)
    FreeMerging(cutoff=1.5, filter="code")
