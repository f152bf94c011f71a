"""What this machine can do at most: the floor under a merge's time."""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fusion_bench_didi.lowrank import svd

#: Subtract the base and add up squares; subtract again, scale, round and clamp.
PASSES = 6
#: Additions of one block that are timed together.
ADDITIONS = 2000

#: A matrix that was decomposed: its shape, the rank reached, and how many such (tasks, and their shared matrix).
Decomposed = tuple[tuple[int, int], int, int]


@dataclass(frozen=True)
class Machine:
    """Measured rates.

    Args:
        flops: float32 multiply-adds of a 2048^3 product, two operations each, per second.
        elementwise: float32 additions of blocks that stay in the cache, per second.
        read, write: bytes per second; reading from the system's cache or from the disk, writing to the system.
    """

    flops: float
    elementwise: float
    read: float
    write: float

    @classmethod
    def measured(
        cls,
        directory: Path,
        *,
        cold: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> "Machine":
        """By matrix products, additions, one checkpoint of ``directory`` and a file of 512 MB beside it.

        Args:
            cold: whether the checkpoint is read from the disk.
            clock: seconds of the wall, or of the processor.
        """
        a = torch.randn(2048, 2048)
        product = min(_timed(lambda: a @ a, clock) for _ in range(5))
        block = torch.randn(2**16)
        addition = min(_timed(lambda: _additions(block), clock) for _ in range(5))
        file = max(directory.glob("*.safetensors"), key=lambda f: f.stat().st_size)
        reads = []
        for _ in range(3):
            if cold:
                forget(file)
            reads.append(_timed(lambda: _copies(file), clock))
        chunk = bytes(2**24)

        def write() -> None:
            with tempfile.TemporaryFile(dir=directory) as out:
                for _ in range(32):
                    out.write(chunk)
                out.flush()

        # the first time the system may have to find the pages
        written = min(_timed(write, clock) for _ in range(3))
        return cls(
            flops=2 * 2048**3 / product,
            elementwise=ADDITIONS * block.numel() / addition,
            read=file.stat().st_size / min(reads),
            write=2**29 / written,
        )

    @classmethod
    def median(cls, measured: Sequence["Machine"]) -> "Machine":
        """Of each rate."""
        rates = [astuple(machine) for machine in measured]
        return cls(*map(statistics.median, zip(*rates)))


def floor(
    pool: Mapping[str, str], decomposed: Sequence[Decomposed], written: float
) -> dict:
    """Operations and bytes that a merge of these checkpoints cannot do without.

    Counted are the decompositions that it made (products, orthogonalisations, eigenproblems at their usual operation
    count), :data:`PASSES` elementwise operations on every number of the task vectors, one read of every file, and the
    bytes written. Refinement, sampling and packing are not.
    """
    total = 0.0
    for shape, rank, matrices in decomposed:
        total += matrices * operations(shape, rank)
    files = {n: list(Path(d).glob("*.safetensors")) for n, d in pool.items()}
    tuned = [f for name, some in files.items() for f in some if name != "_pretrained_"]
    return {
        "operations": total,
        "elementwise": PASSES * sum(_numbers(f) for f in tuned),
        "read": sum(f.stat().st_size for some in files.values() for f in some),
        "written": written,
    }


def operations(shape: Sequence[int], rank: int) -> float:
    """Operations that ``rank`` directions of an (m, n) matrix cost on a CPU by the way that is taken, as of products."""
    way = svd._cheapest(shape, rank, "cpu")
    return sum(svd._operations(shape, rank, "cpu")[way])


def _numbers(file: Path) -> int:
    with safe_open(file, "pt") as f:
        return sum(math.prod(f.get_slice(name).get_shape()) for name in f.keys())


def seconds(needs: Mapping[str, float], machine: Machine) -> float:
    """The floor on this machine."""
    return (
        needs["operations"] / machine.flops
        + needs["elementwise"] / machine.elementwise
        + needs["read"] / machine.read
        + needs["written"] / machine.write
    )


def _additions(block: Tensor) -> None:
    out = torch.empty_like(block)
    for _ in range(ADDITIONS):
        torch.add(block, block, out=out)


def _copies(file: Path) -> None:
    for tensor in load_file(file).values():
        tensor.clone()


def forget(file: Path) -> None:
    """Drop a file from the system's cache, so that it is read from the disk."""
    with open(file, "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _timed(function: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    function()
    return clock() - begin
