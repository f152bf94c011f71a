"""More saved files to be damaged: checkpoints of a pool, rows of a comparison, models of format 1."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusion_bench_didi.artifacts import load_artifact
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.pools.weight_files import WeightFiles
from fusion_bench_didi.programs.entries import Entry
from fusion_bench_didi.programs.entry_run import summary
from fusion_bench_didi.programs.results import assemble, blank_row
from fusion_bench_didi.programs.rows import RowStore

FORMAT_1 = Path(__file__).parent / "data" / "format1"


def _shards() -> list[dict[str, Tensor]]:
    last = {"b.weight": torch.ones(6, 4).bfloat16(), "steps": torch.tensor(3)}
    return [{"a.weight": torch.ones(4, 6), "a.bias": torch.ones(4)}, last]


def _index(place: Path, name: str) -> None:
    names = [dict.fromkeys(shard, f"{i}") for i, shard in enumerate(_shards())]
    content = {"metadata": {"total_size": 1}, "weight_map": {**names[0], **names[1]}}
    (place / name).write_text(json.dumps(content))
    (place / "config.json").write_text(json.dumps({"model_type": "bert"}))


def write_shards(place: Path) -> None:
    place.mkdir()
    for i, tensors in enumerate(_shards()):
        save_file(tensors, place / f"{i}")
    _index(place, "model.safetensors.index.json")


def write_pickles(place: Path) -> None:
    """The first of the format before torch 1.6."""
    place.mkdir()
    for i, tensors in enumerate(_shards()):
        torch.save(tensors, place / f"{i}", _use_new_zipfile_serialization=i > 0)
    _index(place, "pytorch_model.bin.index.json")


def write_float8(place: Path) -> None:
    place.mkdir()
    tensors = {
        "a.weight": torch.ones(256, 256).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.ones(2, 2),
        "a.input_scale": torch.ones(()),
        "b.weight": torch.ones(4, 4).to(torch.float8_e5m2),
        "b.weight_scale": torch.ones(4),
        "c.weight": torch.ones(3),
    }
    save_file(tensors, place / "model.safetensors")


def read_weights(place: Path) -> None:
    source = WeightFiles(place, "task").open()
    if source is not None:
        for name in source.infos().keys() - source.faults.keys():
            source.read(name)


_ENTRY = Entry("emr", "EMR", "emr", "dynamic")
_SETTINGS = {"format": 1, "seed": 0, "versions": {"fusion-bench-didi": "1"}}


def write_rows(place: Path) -> None:
    found = {"complete": True, "x_excl": 1.5, "accuracy": {"a": 0.5, "b": 0.75}}
    row = {**blank_row(_ENTRY, {"method": "emr"}), **found, "notes": ["n"]}
    RowStore(place, _SETTINGS).save("emr", row)


def read_rows(place: Path) -> None:
    store = RowStore(place, _SETTINGS)
    store.check("emr", {"method": "emr"})
    row = store.load("emr")
    if row is not None:
        summary(row)
        facts = SimpleNamespace(unit_bits=8)
        common = {"entries": [_ENTRY], "settings": _SETTINGS, "tasks": ["a", "b"]}
        assemble([row], facts=facts, **common)


def old_body() -> nn.Module:
    """The base model of the files of format 1, which were written before manifests were sealed."""
    base = nn.Sequential(
        nn.Linear(20, 24),
        nn.GELU(),
        nn.LayerNorm(24),
        nn.Linear(24, 16),
        nn.Tanh(),
        nn.Linear(16, 6),
    )
    base.load_state_dict(load_file(FORMAT_1 / "backbone.safetensors"))
    return base.eval()


def write_old(place: Path) -> None:
    shutil.copytree(FORMAT_1 / "didi_tucker_8_bits", place)


def read_old(place: Path) -> None:
    model = load_artifact(place, old_body())
    if isinstance(model, DynamicModel):
        for task in model.tasks:
            model.set_task(task)
