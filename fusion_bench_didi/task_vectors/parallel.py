"""Work on many matrices at once: reading runs ahead of the arithmetic, and cores do not wait for one another."""

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import psutil
import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Bytes by which a process grows before it gives back what it does not use.
GROWTH = 2**28


def workers_for(device: torch.device | str) -> int:
    """One thread per core on the CPU; on an accelerator one that reads while another computes."""
    if torch.device(device).type == "cpu":
        return torch.get_num_threads()
    # torch loads its decompositions at the first call, and fails where two threads make it
    torch.linalg.qr(torch.ones(1, 1, device=device))
    return 2


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int
) -> Iterator[Result]:
    """``map`` on threads, in order, never more than ``workers`` results ahead of the reader.

    Every call runs on one thread of its own: decompositions of single matrices scale badly over threads, many matrices
    side by side scale well, and a result does not depend on the number of threads. An exception reaches the reader in
    its turn; calls that have not begun are dropped then.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    ahead: deque[Future] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


_ALONE = threading.Lock()


def exclusive_if(condition: bool) -> AbstractContextManager:
    """While the block runs no other block for which the condition held does."""
    return _ALONE if condition else nullcontext()


class HeapTrimmer:
    """Gives freed memory back to the system where the C library can (glibc), whenever the process has grown by some.

    Results that stay are scattered between large blocks that were used and freed; without this the process keeps them. What
    is given back after every matrix, though, is taken anew for the next: in a virtual machine that can cost as much time as
    the arithmetic. Pages of files, which the system takes back by itself, are no growth.

    Args:
        processes: that grow side by side, each by its part of :data:`GROWTH`.
    """

    def __init__(self, processes: int = 1):
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._growth, self._held = GROWTH // processes, 0
        self._process = psutil.Process()

    def __call__(self) -> None:
        if self._trim and self._resident() > self._held + self._growth:
            self._trim(0)
            self._held = self._resident()

    def _resident(self) -> int:
        """Bytes that are resident and of no file."""
        found = self._process.memory_info()
        return found.rss - getattr(found, "shared", 0)
