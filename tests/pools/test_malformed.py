"""What is no model pool, or one with holes, is told in one clear error before anything is loaded."""

import pytest
import torch
from exact_models import llama, pool_of
from fusion_bench.compat.modelpool import DictModelPool
from fusion_bench.modelpool import (
    AutoModelPool,
    BaseModelPool,
    CausalLMPool,
    CLIPVisionModelPool,
    Seq2SeqLMPool,
)
from helpers import BASE
from omegaconf import OmegaConf
from torch import nn

from fusion_bench_didi.errors import ModelPoolError
from fusion_bench_didi.method import (
    BitDelta,
    CATMerging,
    DiDiMerging,
    SEMerging,
    TSVCompression,
)
from fusion_bench_didi.method.wemoe import WEMoEMerging

PLACE = "pretrained_model_name_or_path"


def lazily(**entries):
    return CausalLMPool({BASE: "base", "b": "b", **entries}, tokenizer=None)


#: what is given in place of a pool -> what the message says
POOLS = {
    "nothing": (lambda: None, "is a NoneType, expected"),
    "a number": (lambda: 3, "is a int, expected"),
    "a path": (lambda: "pool.yaml", "is a str, expected"),
    "a model": (llama, "is a LlamaForCausalLM, expected"),
    "no models": (lambda: {}, "no base model"),
    "a list": (lambda: [llama(), llama(), llama()], "no base model"),
    "a tuple": (lambda: (llama(), llama(), llama()), "no base model"),
    "a list of nothing": (lambda: [None, None], "no base model"),
    "no base model": (lambda: {"a": llama(), "b": llama()}, "no base model"),
    "a pool's configuration": (
        lambda: {"models": {BASE: "x", "a": "y", "b": "z"}},
        "is the configuration of one .*instantiate",
    ),
    "the same as the host reads it": (
        lambda: OmegaConf.create({"_target_": "CausalLMPool", "models": {BASE: "x"}}),
        "is the configuration of one .*instantiate",
    ),
    "no mapping": (lambda: BaseModelPool(None), "BaseModelPool is a NoneType"),
    "none of a class": (
        lambda: CausalLMPool(None, tokenizer=None),
        "CausalLMPool is a NoneType",
    ),
    "no list": (
        lambda: AutoModelPool(OmegaConf.create({"type": "AutoModelPool"})),
        "AutoModelPool has no list of models",
    ),
    "a list that is null": (
        lambda: AutoModelPool(OmegaConf.create({"models": None})),
        "AutoModelPool has no list of models",
    ),
    "an empty list": (lambda: AutoModelPool(OmegaConf.create({"models": []})), "no base model"),  # fmt: skip
    "an entry to fill in": (lambda: lazily(a="???"), "'a': 'Missing"),
    "a place to fill in": (lambda: lazily(a={PLACE: "???"}), "'a': 'Missing"),
    "an entry from elsewhere": (lambda: lazily(a="${nowhere}"), "'a': .*nowhere"),
}
#: one entry of a pool of modules -> what the message says
ENTRIES = {
    "nothing": (None, "'a' from None"),
    "a number": (7, "'a' from 7"),
    "a tensor": (torch.ones(2), "'a' from tensor"),
    "no place": ({}, f"'a' has {PLACE}=None"),
    "a place that is none": ({PLACE: None}, f"'a' has {PLACE}=None"),
    "an empty place": ({PLACE: ""}, f"'a' has {PLACE}=''"),
    "a number for a place": ({PLACE: 7}, f"'a' has {PLACE}=7"),
}


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("what", POOLS)
def test_what_is_no_pool(what, dry_run):
    make, message = POOLS[what]
    with pytest.raises(ModelPoolError, match=message):
        DiDiMerging(dry_run=dry_run).run(make())


@pytest.mark.parametrize("what", ENTRIES)
def test_entries_that_are_no_models(what):
    entry, message = ENTRIES[what]
    models = {**pool_of(llama()), "a": entry}
    with pytest.raises(ModelPoolError, match=message):
        DiDiMerging().run(models)


@pytest.mark.parametrize(
    "method",
    [BitDelta, CATMerging, TSVCompression, WEMoEMerging, SEMerging],
    ids=lambda cls: cls.__name__,
)
@pytest.mark.parametrize("what", ["nothing", "a pool's configuration", "no list"])
def test_every_method_tells_it(method, what):
    make, message = POOLS[what]
    settings = {"base_method": None} if method is SEMerging else {}
    with pytest.raises(ModelPoolError, match=message):
        method(**settings).run(make())


@pytest.mark.parametrize("cls", [Seq2SeqLMPool, CLIPVisionModelPool])
def test_classes_that_complete_entries(cls):
    given = {} if cls is CLIPVisionModelPool else {"tokenizer": None}
    pool = cls({BASE: {PLACE: 1}, "a": {PLACE: 2}, "b": {PLACE: 3}}, **given)
    with pytest.raises(ModelPoolError, match=f"has {PLACE}=[12]"):
        DiDiMerging().run(pool)


def test_a_refused_pool_of_the_first_version_is_left_as_it_was():
    pool = AutoModelPool(OmegaConf.create({"type": "AutoModelPool"}))
    for _ in range(2):
        with pytest.raises(ModelPoolError, match="has no list of models"):
            DiDiMerging().run(pool)
    assert type(pool) is AutoModelPool


def test_models_may_be_a_module_dictionary_or_the_first_versions():
    models = pool_of(llama())
    for pool in (nn.ModuleDict(models), DictModelPool(models)):
        assert DiDiMerging(budget=0.5).run(pool).tasks == ["a", "b"]
