"""What a machine does per second, of each kind of work that ``benchmarks.counting`` counts."""

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.counting import counting
from benchmarks.floor import Machine
from benchmarks.processes import Job
from fusion_bench_didi.lowrank.svd import EIGEN_COST
from fusion_bench_didi.quantization.entropy import encode_runs, frequencies

#: Side of the matrices that are timed, columns of thin ones, numbers that are coded, and tasks of two merges of next to nothing.
SIDE, THIN, CODED, FEW = 768, 256, 2**20, (2, 300)


@dataclass(frozen=True)
class Rates:
    """Per second; ``call`` and ``fixed`` are seconds.

    Args:
        operations: of matrix products, as thin as those of a range finder.
        eigen: likewise, as eigenproblems get on.
        cache, memory: numbers of one elementwise operation, in the processor's caches or from memory.
        read, write, hashed: bytes.
        coded: numbers.
        sent: bytes to another process.
        call: of one operation of torch on next to nothing, with the Python around it.
        fixed: of a merge of nothing.
    """

    operations: float
    eigen: float
    cache: float
    memory: float
    read: float
    write: float
    hashed: float
    coded: float
    sent: float
    call: float
    fixed: float

    @classmethod
    def measured(cls) -> "Rates":
        """Of one thread here."""
        with tempfile.TemporaryDirectory() as home:
            file = Path(home) / "model.safetensors"
            save_file({f"w{i}": torch.ones(2**22) for i in range(16)}, file)
            machine = Machine.measured(Path(home))
        square = torch.randn(SIDE, SIDE)
        square = square @ square.mT
        tall, thin = torch.randn(4 * SIDE, SIDE), torch.randn(SIDE, THIN)
        large, content = torch.ones(2**25), bytes(2**26)
        symbols = torch.randn(CODED).mul(2).round().clamp(-8, 7).long() + 8
        table = frequencies(symbols, 16)
        sent = torch.ones(2**24)
        call, fixed = _overheads()
        return cls(
            operations=2
            * tall.numel()
            * THIN
            / least(lambda: tall.mT @ (tall @ thin))
            * 2,
            eigen=EIGEN_COST["cpu"]
            * SIDE**3
            / least(lambda: torch.linalg.eigh(square)),
            cache=machine.elementwise,
            memory=large.numel() / least(lambda: large.add_(1)),
            read=machine.read,
            write=machine.write,
            hashed=len(content) / least(lambda: hashlib.sha256(content).digest()),
            coded=CODED / least(lambda: encode_runs([(symbols, table)])),
            sent=sent.nbytes / (2 * least(lambda: sent.clone())),
            call=call,
            fixed=fixed,
        )


def least(function: Callable[[], object], runs: int = 5) -> float:
    """Of some runs, in seconds of the processor."""
    found = []
    for _ in range(runs):
        begun = time.process_time()
        function()
        found.append(time.process_time() - begun)
    return min(found)


def _overheads() -> tuple[float, float]:
    """Seconds per call and of a merge of nothing, by two merges of tiny matrices."""
    from benchmarks.scaling import measured, small_pool
    from fusion_bench_didi.method.didi import DiDiMerging

    found = []
    for count in FEW:
        pool = small_pool(count)
        with tempfile.TemporaryDirectory() as home:

            def merge(to: str = "merged") -> None:
                DiDiMerging(budget=0.2, output_dir=str(Path(home) / to)).run(pool)

            runs = [Job(1, measured(lambda i=i: merge(f"m{i}"))).results()[0] for i in range(5)]  # fmt: skip
            with counting() as counts:
                merge("counted")
        calls = sum(part["calls"] for part in counts.values())
        found.append((calls, min(run["cpu"] for run in runs)))
    (few, short), (many, long) = found
    call = (long - short) / (many - few)
    return call, max(short - call * few, 0.0)


def seconds(
    counts: Mapping[str, Mapping[str, float]], rates: Rates, processes: int = 1
) -> dict[str, float]:
    """Seconds of the slowest of so many processes, by kind of work.

    Args:
        counts: of ``benchmarks.counting``, with bytes ``written`` and ``hashed``.
    """
    mean = {
        kind: counts["own"].get(kind, 0) + counts["shared"].get(kind, 0) / processes
        for kind in {*counts["own"], *counts["shared"]}
    }
    rate, told = asdict(rates), mean.get("messages", 0)
    kinds = {
        "products": mean.get("operations", 0) / rate["operations"],
        "eigenproblems": mean.get("eigen", 0) / rate["eigen"],
        "elementwise": mean.get("in cache", 0) / rate["cache"]
        + mean.get("from memory", 0) / rate["memory"],
        "reading": mean.get("read", 0) / rate["read"],
        "coding": mean.get("coded", 0) / rate["coded"],
        "writing": mean.get("written", 0) / rate["write"]
        + mean.get("hashed", 0) / rate["hashed"],
        "messages": told / rate["sent"] if processes > 1 else 0.0,
        "calls": rate["call"] * mean["calls"],
        "start": rate["fixed"],
    }
    return kinds
