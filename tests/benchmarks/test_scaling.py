"""Seconds of a merge are its own, without those of the thread that watches its memory."""

import time

from benchmarks import resident
from benchmarks.processes import on_ranks
from benchmarks.scaling import measured


def test_looking_at_memory_does_not_count(monkeypatch):
    monkeypatch.setattr(resident, "LOOKS", 1e-5)
    (found,) = on_ranks(1, measured(lambda: time.sleep(0.5)))
    assert found["wall"] > 0.5 and 0 <= found["cpu"] < 0.1
