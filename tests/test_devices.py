"""On an accelerator: every operation finds its tensors on one device, and what is stored is what the CPU stores."""

import json

import pytest
import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file
from simulated_device import OnDevice, simulated
from test_golden import CASES, FILE, found
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusion_bench_didi.deltas.plain import DenseDelta, OwnDelta
from fusion_bench_didi.export import patched, to_patch, to_plain
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.quantization.dead_zone import encode, quantize
from fusion_bench_didi.task_vectors import loop, scan

#: What takes longest, and goes the ways of others; rows along a trellis are held below.
SLOW = (
    "MERGE, proxy",
    "adapters, cut",
    "default",
    "default, few bits",
    "large matrices, whole",
    "output_dir",
    "subspaces",
    "trellis",
    "uniform",
)

#: Operations whose result has a size that depends on values.
SIZED = (torch.ops.aten.nonzero.default, torch.ops.aten._unique2.default)


@pytest.fixture
def device(monkeypatch):
    """The device that methods run on; on one thread, since only it sees the simulation."""
    for module in (loop, scan):
        monkeypatch.setattr(module, "workers_for", lambda device: 1)
    with simulated() as device:
        monkeypatch.setattr(Fabric, "device", device)
        yield device


@pytest.mark.parametrize("case", [case for case in CASES if case not in SLOW])
def test_merges_of_all_kinds(case, device, tmp_path):
    expected = json.loads(FILE.read_text())["cases"][case]
    now = found(case, tmp_path)
    for key in ("x_excl", "error"):
        if expected.get(key) is not None:
            assert now[key] == pytest.approx(expected[key], rel=0.02, abs=1e-9)


def test_tensors_of_two_devices_are_an_error():
    """The simulation can fail."""
    with simulated() as device:
        there = torch.ones(2, 2, device=device)
        assert there.device == device and (there + 1).sum().item() == 8
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(2, 2)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert (there.cpu() + torch.ones(2, 2)).device.type == "cpu"


class _Waits(TorchDispatchMode):
    """Counts what makes the program wait for the device: copies from there, and results whose size is found there."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if OnDevice in types:
            back = str((kwargs or {}).get("device", "")) == "cpu"
            self.count += back or function in SIZED
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("quantizer", ["scalar", "trellis"])
def test_numbers_of_rows_are_those_of_the_cpu(device, quantizer):
    rows = torch.randn(9, 33, generator=torch.Generator().manual_seed(0))
    rows *= torch.logspace(-1, 2, 9)[:, None]
    there, here = (quantize(x, 1.0, quantizer) for x in (rows.to(device), rows))
    assert there.symbols.device.type == there.values().device.type != "cpu"
    assert there.symbols.cpu().equal(here.symbols) and there.bits == here.bits
    assert there.classes.cpu().equal(here.classes)
    assert encode([there]).equal(encode([here]))


def test_coding_waits_no_more_often_for_many_spreads_than_for_one(device):
    spreads = torch.logspace(0, 3, 24)[:, None]
    rows = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    waits = []
    for values in (rows * spreads, rows):
        codes = quantize(values.to(device), 1.0)
        with _Waits() as seen:
            stream = encode([codes])
        waits.append(seen.count)
        assert stream.equal(encode([quantize(values, 1.0)]))
    assert waits[0] == waits[1] > 0


class _Whole(nn.Linear):
    """With a buffer of whole numbers."""

    def __init__(self):
        super().__init__(6, 6)
        self.register_buffer("count", torch.arange(4))


@pytest.mark.parametrize("export", [to_patch, to_plain])
def test_exports_of_every_type_and_form(export, device, tmp_path):
    few, base = torch.zeros(6, 6), _Whole()
    few[0, 1] = 2.0
    before = {name: value.clone() for name, value in base.state_dict().items()}
    deltas = {
        "weight": DenseDelta((6, 6), few),
        "bias": DenseDelta((6,), torch.ones(6)),
        "count": OwnDelta((4,), torch.tensor([0, 1, 2, 9])),
    }
    model = DiDiModel(base, {}, {"a": deltas}, unit_bits=1).to(device)
    export(model, tmp_path / "out")
    if export is to_patch:
        file, there = tmp_path / "out/a.safetensors", model.state_dict()
        there = {name.removeprefix("backbone."): v for name, v in there.items()}
        after = patched(file, there)
        assert {value.device for value in after.values()} == {device}
        assert patched(file, before)["weight"].equal(after["weight"].cpu())
    else:
        after = load_file(tmp_path / "out/a/model.safetensors")
    assert after["count"].tolist() == [0, 1, 2, 9]
    for name in ("weight", "bias"):
        change = deltas[name].change().cpu()
        assert after[name].cpu().equal(before[name] + change)
