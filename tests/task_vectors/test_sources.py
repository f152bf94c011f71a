"""Sources over other sources: what is said of the files beneath is said of them too."""

import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fusion_bench_didi.distributed.ranks import ALONE
from fusion_bench_didi.editing.sources import BesideShared, SharedBase
from fusion_bench_didi.errors import CheckpointMismatchError
from fusion_bench_didi.task_vectors import sources
from fusion_bench_didi.task_vectors.cast import CastSource
from fusion_bench_didi.task_vectors.file_sources import PickleSource, SafetensorsSource
from fusion_bench_didi.task_vectors.float8 import Float8Source
from fusion_bench_didi.task_vectors.mxfp4 import Mxfp4Source
from fusion_bench_didi.task_vectors.renaming import RenamedSource
from fusion_bench_didi.task_vectors.sources import ModuleSource, WrappedSource

WRAPPERS = {
    BesideShared: lambda source: BesideShared(source, source, {}),
    CastSource: lambda source: CastSource(source, {"a": torch.bfloat16}),
    Float8Source: Float8Source,
    Mxfp4Source: Mxfp4Source,
    RenamedSource: lambda source: RenamedSource(source, {"b": "a"}),
    SharedBase: lambda source: SharedBase(source, {}),
}
KINDS = {".safetensors": (SafetensorsSource, save_file), ".bin": (PickleSource, torch.save)}  # fmt: skip


@pytest.mark.parametrize("ending", KINDS)
@pytest.mark.parametrize("kind", WRAPPERS)
def test_files_beneath_are_watched(tmp_path, kind, ending):
    file, (of_files, write) = tmp_path / f"m{ending}", KINDS[ending]
    write({"a": torch.ones(3)}, file)
    inner = of_files([file], "mnist")
    inner.extra = {"state": b"1"}
    source = WRAPPERS[kind](WRAPPERS[kind](inner) if kind is not RenamedSource else inner)  # fmt: skip
    source.check()
    assert source.identity == inner.identity and str(file) in source.identity
    assert (source.label, source.extra) == ("mnist", inner.extra)
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointMismatchError, match="mnist.*changed while"):
        source.check()


def test_every_wrapper_is_among_them():
    assert set(WrappedSource.__subclasses__()) == set(WRAPPERS)


def test_a_pickle_that_changes_while_a_tensor_is_taken_from_it_is_refused(tmp_path):
    file = tmp_path / "m.bin"
    torch.save({"a": torch.ones(3)}, file)
    source = PickleSource([file], "mnist")
    value = source._tensors["a"]
    late = SimpleNamespace(clone=lambda: (value.clone(), os.utime(file, ns=(1, 1)))[0])
    source._tensors["a"] = late
    with pytest.raises(CheckpointMismatchError, match="mnist.*changed while"):
        source.read("a")


def test_files_that_change_while_values_of_a_module_are_summed_up(
    tmp_path, monkeypatch
):
    file = tmp_path / "m.bin"
    torch.save({"weight": torch.ones(3, 3)}, file)
    source = ModuleSource(nn.Linear(3, 3), "mnist", PickleSource([file], "mnist"))
    taken = sources.digests
    monkeypatch.setattr(
        sources, "digests", lambda t: (os.utime(file, ns=(1, 1)), taken(t))[1]
    )
    with pytest.raises(CheckpointMismatchError, match="mnist.*changed while"):
        source.take_digests(ALONE)
