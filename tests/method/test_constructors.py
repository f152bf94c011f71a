"""Constructors refuse names that they do not have, with the nearest one, and values that cannot be, before they do anything."""

import pytest

from fusion_bench_didi import method as methods
from fusion_bench_didi.demo import pools, text_pools
from fusion_bench_didi.demo.mixed_pools import MixedDemoTaskPool
from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.method.wemoe import WEMoEMerging
from fusion_bench_didi.routers import ROUTERS, make_router
from fusion_bench_didi.taskpool.clip_vision import TaskAwareCLIPVisionModelTaskPool
from fusion_bench_didi.taskpool.mixed_stream import MixedStreamCLIPVisionModelTaskPool
from fusion_bench_didi.taskpool.text import (
    PerplexityTaskPool,
    TextClassificationTaskPool,
)

POOLS = {
    pools.DemoCLIPVisionModelPool: ("sede", "seed"),
    pools.DemoCLIPVisionModelTaskPool: ("splitt", "split"),
    text_pools.FolderTextModelPool: ("task", "tasks"),
    text_pools.FolderTextTaskPool: ("maxlength", "max_length"),
    MixedDemoTaskPool: ("stream_batchsize", "stream_batch_size"),
    MixedStreamCLIPVisionModelTaskPool: ("test_dataset", "test_datasets"),
    TaskAwareCLIPVisionModelTaskPool: ("task_alias", "task_aliases"),
    PerplexityTaskPool: ("contxt", "context"),
    TextClassificationTaskPool: ("colums", "columns"),
}


@pytest.mark.parametrize("cls", POOLS, ids=lambda cls: cls.__name__)
def test_pools_name_the_nearest_setting(cls):
    given, meant = POOLS[cls]
    with pytest.raises(SettingsError, match=f"has no setting {given}.*mean {meant}"):
        cls(**{given: 1})


@pytest.mark.parametrize("name", [*methods.__all__, "WEMoEMerging"])
def test_methods_name_the_nearest_setting(name):
    cls = WEMoEMerging if name == "WEMoEMerging" else getattr(methods, name)
    with pytest.raises(SettingsError, match="no setting task_alias.*task_aliases"):
        cls(task_alias={})


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_name_the_nearest_setting(kind):
    with pytest.raises(SettingsError, match="no setting temprature.*temperature"):
        make_router(kind, ["a", "b"], temprature=2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_router("projection", ["a"], directions=0),
        lambda: make_router("mlp", ["a"], pooling="max"),
        lambda: make_router("representation", ["a"], threshold=1.5),
        lambda: pools.DemoCLIPVisionModelPool(size="tiny", seed=-1),
        lambda: pools.DemoCLIPVisionModelTaskPool(size="small"),
        lambda: text_pools.FolderTextTaskPool(root="", data="x"),
        lambda: PerplexityTaskPool({}, "tokenizer", context=1),
        lambda: TextClassificationTaskPool("place", "tokenizer", limit=0),
        lambda: MixedDemoTaskPool(size="tiny", stream_batch_size=True),
    ],
)
def test_impossible_values_are_refused(make):
    with pytest.raises(SettingsError, match="another type or range"):
        make()


def test_whole_numbers_become_what_the_setting_is():
    router = make_router("mlp", ["a", "b"], temperature=2, hard=False)
    assert isinstance(router.temperature, float)
