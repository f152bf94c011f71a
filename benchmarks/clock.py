"""Seconds of calls that are taken in turns, and the least that a forward can take."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

#: turns, and turns of what takes more than a second
RUNS, RUNS_OF_LARGE = 31, 3

Call = Callable[[], object]
Rows = dict[str, dict[str, float]]


class Clock:
    """Seconds of calls on one device: of the processor on a CPU, where other work may run, else of the wall."""

    def __init__(self, device: str):
        self.device = device

    def __call__(self, call: Call) -> float:
        begin = self._now()
        call()
        return self._now() - begin

    def in_turns(self, calls: dict[str, Call]) -> Rows:
        """Median seconds, and median ratios to the first call; every call is made once before."""

        def turn() -> dict[str, float]:
            return {name: self(call) for name, call in calls.items()}

        turn()
        turns, first = [turn()], next(iter(calls))
        large = max(turns[0].values()) > 1
        turns += [turn() for _ in range((RUNS_OF_LARGE if large else RUNS) - 1)]
        return {
            name: {
                "seconds": statistics.median(t[name] for t in turns),
                "ratio": statistics.median(t[name] / t[first] for t in turns),
            }
            for name in calls
        }

    def _now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.accelerator.synchronize()
        return time.perf_counter()


def floor_of(plain: nn.Module, pixels: Tensor, clock: Clock) -> float:
    """Seconds of the plain model's products at the rate of one large product."""
    counter = FlopCounterMode(display=False)
    with counter:
        plain(pixels)
    a = torch.randn(3200, 768, device=pixels.device, dtype=pixels.dtype)
    b = torch.randn(768, 3072, device=pixels.device, dtype=pixels.dtype)
    product = clock.in_turns({"product": lambda: a @ b})["product"]["seconds"]
    return counter.get_total_flops() / (2 * 3200 * 768 * 3072) * product


def keep_heap() -> None:
    """Let freed memory stay with the process, as in one that has served larger batches.

    glibc gives back what is free beyond twice the largest block that was ever freed. On small towers, whether a call takes
    its pages anew, for half as much time again, was else an accident of what ran before it.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
