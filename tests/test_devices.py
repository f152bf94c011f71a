"""On an accelerator: every operation finds its tensors on one device, and what is stored is what the CPU stores."""

import json

import pytest
import torch
from lightning.fabric import Fabric
from simulated_device import simulated
from test_golden import CASES, FILE, found

from fusion_bench_didi.task_vectors import loop, scan

#: What takes longest, and goes the ways of others.
SLOW = (
    "MERGE, proxy",
    "default",
    "large matrices, whole",
    "output_dir",
    "subspaces",
    "uniform",
)


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
