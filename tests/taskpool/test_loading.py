"""What torch's loaders are given is checked when a pool is made, not after the merge."""

import pytest
from omegaconf import OmegaConf

from fusion_bench_didi.demo.folder_pools import FolderCLIPVisionModelTaskPool
from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.taskpool.clip_vision import TaskAwareCLIPVisionModelTaskPool
from fusion_bench_didi.taskpool.mixed_stream import MixedStreamCLIPVisionModelTaskPool
from fusion_bench_didi.taskpool.openclip_vision import (
    TaskAwareOpenCLIPVisionModelTaskPool,
)

CLIP = {"processor": "none", "clip_model": "none"}
POOLS = {
    TaskAwareCLIPVisionModelTaskPool: CLIP,
    MixedStreamCLIPVisionModelTaskPool: CLIP,
    TaskAwareOpenCLIPVisionModelTaskPool: {"classification_heads": {}},
}


@pytest.fixture(params=[*POOLS, FolderCLIPVisionModelTaskPool])
def pool(request, tmp_path):
    """Makes a pool with settings of its loaders, as they come from YAML."""
    kind, given = request.param, {"test_datasets": {"dots": []}}
    if kind in POOLS:
        given |= POOLS[kind]
    else:
        (tmp_path / "clip").mkdir()
        (tmp_path / "tasks.json").write_text('{"dots": {"classnames": ["0", "1"]}}')
        given["root"] = str(tmp_path)
    return lambda told: kind(**given, dataloader_kwargs=OmegaConf.create(told))


@pytest.mark.parametrize(
    "setting",
    [
        *({"batch_size": value} for value in (0, -1, None, 1.5, "8", True)),
        *({"num_workers": value} for value in (-1, None, "2")),
    ],
)
def test_sizes_that_no_loader_takes(pool, setting):
    ((key, value),) = setting.items()
    with pytest.raises(SettingsError, match=f"dataloader_kwargs.{key}={value!r}: "):
        pool({"shuffle": False, **setting})


@pytest.mark.parametrize("told", [{}, {"batch_size": 1, "num_workers": 0, "pin_memory": False}])  # fmt: skip
def test_others_are_taken(pool, told):
    assert pool(told)._dataloader_kwargs == told
