"""Time and memory of a block of code."""

import contextlib
import ctypes
import gc
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_GB = 2**30


@dataclass
class Cost:
    """Time and memory that a block took.

    Args:
        seconds: wall time.
        peak_gb: on a GPU the most that torch had allocated; else the most that the process had resident, libraries
            and pools included.
        added_gb: how much of that was not there before.
    """

    seconds: float = 0.0
    peak_gb: float = 0.0
    added_gb: float = 0.0


@contextlib.contextmanager
def measured() -> Iterator[Cost]:
    """Cost of the block, filled in at its end."""
    cost = Cost()
    free_memory()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    before = torch.cuda.memory_allocated() if cuda else peak_resident()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        if cuda:
            torch.cuda.synchronize()
        cost.seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if cuda else peak_resident()
        cost.peak_gb, cost.added_gb = peak / _GB, (peak - before) / _GB


@contextlib.contextmanager
def standing() -> Iterator[None]:
    """Within, what is there at the start is not looked through for garbage: with all libraries that takes half a second.

    Where something is set aside already it stays so, and nothing else is.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def free_memory() -> None:
    """Give back what nobody refers to, so that one method does not count for the next; but of what :func:`standing` set aside."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> None:
    """Let :func:`peak_resident` begin anew; on Linux only, elsewhere the peak is that of the whole run."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """Bytes that the process had resident at most; on Linux without what a larger parent had when it was started."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
