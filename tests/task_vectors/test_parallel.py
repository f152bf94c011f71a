"""Workers in order, and memory given back."""

import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from fusion_bench_didi.task_vectors import sources
from fusion_bench_didi.task_vectors.parallel import GROWTH, HeapTrimmer, ordered_map
from fusion_bench_didi.task_vectors.sources import SafetensorsSource


def test_ordered_map_keeps_order_and_never_runs_far_ahead():
    begun, lock = [], threading.Lock()

    def work(i: int) -> int:
        with lock:
            begun.append(i)
        return i * i

    results = ordered_map(work, range(20), workers=3)
    assert next(results) == 0
    assert max(begun) <= 3
    assert list(results) == [i * i for i in range(1, 20)]


def test_ordered_map_hands_on_the_first_error_and_restores_threads():
    threads = torch.get_num_threads()

    def work(i: int) -> int:
        if i == 2:
            raise ValueError("two")
        return i

    results = ordered_map(work, range(10), workers=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        list(results)
    assert torch.get_num_threads() == threads


def test_memory_is_given_back_when_the_process_has_grown(monkeypatch):
    resident, given = [0], []

    class Process:
        def memory_info(self):
            return SimpleNamespace(rss=resident[0])

    monkeypatch.setattr(
        "fusion_bench_didi.task_vectors.parallel.psutil.Process", Process
    )
    release = HeapTrimmer()
    release._trim = lambda _: given.append(resident[0])
    for resident[0] in (GROWTH // 2, 2 * GROWTH, 3 * GROWTH, 3 * GROWTH + 1):
        release()
    assert given == [2 * GROWTH, 3 * GROWTH + 1]


@pytest.mark.parametrize("numel, most", [(4, 16), (2**21, 5)])
def test_small_tensors_are_let_go_like_large_ones(tmp_path, monkeypatch, numel, most):
    """A few bytes of a file map a whole page of the system's cache, of up to 2 MB."""
    names = [f"w{i:02d}" for i in range(32)]
    save_file({name: torch.ones(numel) for name in names}, tmp_path / "a.safetensors")
    source = SafetensorsSource([tmp_path / "a.safetensors"], "a")
    opened = []
    real = sources.safe_open
    monkeypatch.setattr(
        sources, "safe_open", lambda *a, **k: opened.append(a) or real(*a, **k)
    )
    for name in names:
        assert bool((source.read(name) == 1).all())
    assert len(opened) >= len(names) // most
