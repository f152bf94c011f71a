"""A setting that would do nothing here is an error that names it: patterns without effect, aliases of no model, all left out."""

import pytest
from fusion_bench.modelpool import BaseModelPool
from helpers import BASE, didi, family
from torch import nn

from fusion_bench_didi.errors import SettingsError, UnknownTaskError
from fusion_bench_didi.method.baselines.emr import EMRMerging
from fusion_bench_didi.method.didi import DiDiMerging


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
