"""Merge a language model of 1.1 B parameters with four experts under a memory limit that the system enforces.

    python -m benchmarks.memory                  # 3 GB; docs/memory.md and .json

The checkpoints (11 GB, sharded bfloat16) are made on first use. The merge runs in a control group of its own (``memory``
of version 1, or version 2; both need root), which also counts the files' pages in the cache: what is over the limit is
given back or the merge is killed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SHAPES, pool_of
from benchmarks.floor import Machine, floor, seconds
from benchmarks.suites import in_words, machine, write_json

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class Limit:
    """A control group with a memory limit.

    Raises:
        SystemExit: if none can be made here.
    """

    def __init__(self, gigabytes: float):
        first = V1.is_dir()
        self._group = (V1 if first else V2) / f"fusion_bench_didi-{os.getpid()}"
        self._peak = "memory.max_usage_in_bytes" if first else "memory.peak"
        try:
            self._group.mkdir()
            limit = "memory.limit_in_bytes" if first else "memory.max"
            (self._group / limit).write_text(str(int(gigabytes * 2**30)))
        except OSError as error:
            raise SystemExit(f"No control group can be made here: {error}") from error

    def enter(self) -> None:
        """Put this process under the limit."""
        (self._group / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> float | None:
        """Remove the group; its peak in GiB where it is told."""
        peak = self._group / self._peak
        used = int(peak.read_text()) / 2**30 if peak.is_file() else None
        self._group.rmdir()
        return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--limit-gb", type=float, default=3.0)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    directories = pool_of(arguments.shape, arguments.tasks)
    files = [f for d in directories.values() for f in Path(d).glob("*.safetensors")]
    size = sum(f.stat().st_size for f in files) / 2**30
    command = [sys.executable, "-m", "benchmarks.speed", "--child", "didi_disk"]
    command += ["--shape", arguments.shape, "--tasks", str(arguments.tasks)]
    rows = [run(command, arguments.limit_gb) for _ in range(arguments.runs)]
    row = sorted(rows, key=lambda r: r["seconds"])[(len(rows) - 1) // 2]
    speed = Machine.measured(Path(directories["_pretrained_"]), cold=True)
    needs = floor(directories, row.pop("decomposed"), row["written"])
    least = seconds(needs, speed)
    record = {
        "machine": machine(),
        "files_gb": size,
        "limit_gb": arguments.limit_gb,
        "rates": asdict(speed),
        "floor": least,
        **row,
    }
    write_json(arguments.out / "memory.json", record)
    stages = ", ".join(f"{name} {value:.0f}" for name, value in row["stages"].items())
    text = f"""# A language model merged in little memory

`python -m benchmarks.memory` on {in_words(machine())}.

{arguments.shape}, {arguments.tasks} experts, {size:.1f} GB of sharded bfloat16 files, merged at 1.4 into a directory of
{row['written'] / 2**30:.1f} GB under a limit of {arguments.limit_gb} GB set on the process's control group, the files' cached
pages counted (the cache was emptied before).

| | |
|---|--:|
| seconds | {row['seconds']:.0f} |
| floor: one read, six elementwise passes, decompositions at the rate of a matrix product, one write | {least:.0f} |
| over the floor | {row['seconds'] / least:.1f} |
| peak of the control group, GB | {used_text(row['group_gb'])} |
| relative error of the merge | {row['relative_error']:.4f} |

Seconds per stage: {stages}.
"""
    (arguments.out / "memory.md").write_text(text)


def run(command: list[str], limit_gb: float) -> dict[str, Any]:
    """One merge within a limit of memory: what it prints of itself, the wall clock, and the peak of its control group."""
    _forget_files()
    limit = Limit(limit_gb)
    begin = time.perf_counter()
    done = subprocess.run(
        command, preexec_fn=limit.enter, capture_output=True, text=True
    )
    wall, used = time.perf_counter() - begin, limit.close()
    if done.returncode:
        raise SystemExit(f"exit status {done.returncode}:\n{done.stderr[-3000:]}")
    row = json.loads(done.stdout.strip().splitlines()[-1])
    row |= {"wall": wall, "group_gb": used}
    print({key: row[key] for key in ("seconds", "group_gb", "stages")}, flush=True)
    return row


def used_text(used: float | None) -> str:
    return "not told" if used is None else f"{used:.2f}"


def _forget_files() -> None:
    """Empty the system's file cache, so that every page is counted where it is used."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        print(f"the file cache was not emptied: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
