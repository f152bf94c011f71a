"""Workers in order, and memory given back."""

import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from fusion_bench_didi.distributed.ownership import Crew
from fusion_bench_didi.distributed.ranks import Ranks
from fusion_bench_didi.task_vectors import file_sources
from fusion_bench_didi.task_vectors.file_sources import SafetensorsSource
from fusion_bench_didi.task_vectors.loop import spread
from fusion_bench_didi.task_vectors.parallel import GROWTH, HeapTrimmer, ordered_map


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


@pytest.mark.parametrize("processes", [1, 2])
def test_memory_is_given_back_when_the_process_has_grown(monkeypatch, processes):
    """By what is of no file, and by less where several processes grow."""
    resident, shared, given = [0], [0], []

    class Process:
        def memory_info(self):
            return SimpleNamespace(rss=resident[0] + shared[0], shared=shared[0])

    monkeypatch.setattr(
        "fusion_bench_didi.task_vectors.parallel.psutil.Process", Process
    )
    release, most = HeapTrimmer(processes), GROWTH // processes
    release._trim = lambda _: given.append(resident[0])
    for resident[0] in (most // 2, 2 * most, 3 * most, 3 * most + 1):
        release()
        shared[0] += 2 * most
    assert given == [2 * most, 3 * most + 1]


class First(Ranks):
    """Rank 0 of two, the other of which has nothing to tell."""

    size = 2

    def __init__(self, told: list[str]):
        self._told = told

    def gather(self, value):
        self._told.append("gather")
        return [value, {}]


def test_a_rank_is_heard_while_it_works():
    """Not when others have finished too: memory is given back meanwhile."""
    told: list[str] = []
    crew = Crew(First(told), {"a": 0, "b": 1, "c": 0})
    heard = lambda done, total: told.append(f"{done} of {total}")  # noqa: E731
    found = spread(crew, "stage", str.upper, ["a", "c"], heard=heard)
    assert dict(found) == {"a": "A", "c": "C"}
    assert told == ["0 of 2", "1 of 2", "gather"]


@pytest.mark.parametrize("numel, most", [(4, 16), (2**21, 5)])
def test_small_tensors_are_let_go_like_large_ones(tmp_path, monkeypatch, numel, most):
    """A few bytes of a file map a whole page of the system's cache, of up to 2 MB."""
    names = [f"w{i:02d}" for i in range(32)]
    save_file({name: torch.ones(numel) for name in names}, tmp_path / "a.safetensors")
    source = SafetensorsSource([tmp_path / "a.safetensors"], "a")
    opened = []
    real = file_sources.safe_open
    monkeypatch.setattr(
        file_sources, "safe_open", lambda *a, **k: opened.append(a) or real(*a, **k)
    )
    for name in names:
        assert bool((source.read(name) == 1).all())
    assert len(opened) >= len(names) // most
