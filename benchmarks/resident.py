"""What a process has in memory while a block runs: pages of its own, and pages of files that it has mapped.

Only the first kind is what one more process takes of a machine. Pages of files are there once, however many processes map
them, and the system drops them when it needs the room; what is called resident counts them in every process.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusion_bench_didi.programs.measure import forget_peak

#: Seconds between two looks.
LOOKS = 0.005
_KEYS = {"own": "RssAnon", "files": "RssFile", "resident": "VmHWM"}


def now() -> dict[str, int]:
    """Bytes of this process; ``resident`` is the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    told = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(told[key].split()[0]) for name, key in _KEYS.items()}


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """The most of each while the block runs, filled in at its end; of ``own``, what was added to before.

    Looking takes seconds of the process itself, which ``looking`` tells: more, the longer it waits for others.
    """
    forget_peak()
    before, done = now(), threading.Event()
    most = dict(before)

    def watch() -> None:
        while not done.wait(LOOKS):
            for name, size in now().items():
                most[name] = max(most[name], size)
        found["looking"] = time.thread_time()

    found: dict[str, float] = {}
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        most["resident"] = now()["resident"]
        found.update(most, own=most["own"] - before["own"])
