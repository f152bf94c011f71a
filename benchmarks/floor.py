"""What this machine can do at most: the floor under a merge's time."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from fusion_bench.modelpool import BaseModelPool
from safetensors.torch import load_file

from fusion_bench_didi.factor_store import FactorStore
from fusion_bench_didi.layout import MergeSettings, lay_out, matrix_budget
from fusion_bench_didi.lowrank import sketched
from fusion_bench_didi.lowrank.svd import EIGEN_COST, searched
from fusion_bench_didi.pool_reader import open_pool
from fusion_bench_didi.work import Work


@dataclass(frozen=True)
class Machine:
    """Measured rates.

    Args:
        flops: float32 multiply-adds of a 2048^3 product, two operations each, per second.
        read, write: bytes per second; reading from the system's cache, writing until it is on disk.
    """

    flops: float
    read: float
    write: float

    @classmethod
    def measured(cls, directory: Path) -> "Machine":
        """By a matrix product, one checkpoint of ``directory`` and a file of 512 MB beside it."""
        a = torch.randn(2048, 2048)
        product = min(_timed(lambda: a @ a) for _ in range(5))
        file = max(directory.glob("*.safetensors"), key=lambda f: f.stat().st_size)
        read = min(_timed(lambda: _copies(file)) for _ in range(3))
        with tempfile.TemporaryFile(dir=directory) as out:
            block = bytes(2**24)

            def write() -> None:
                for _ in range(32):
                    out.write(block)
                out.flush()

            written = _timed(write)
        return cls(2 * 2048**3 / product, file.stat().st_size / read, 2**29 / written)


def floor(pool: Mapping[str, str], settings: MergeSettings, written: float) -> dict:
    """Operations and bytes that a merge of these checkpoints cannot do without.

    Counted are the decompositions (products, orthogonalisations, eigenproblems at their usual operation count), one read
    of every file, and the bytes written.
    """
    vectors = open_pool(BaseModelPool(dict(pool)))
    layout = lay_out(vectors, settings, None)
    work = Work(
        vectors,
        settings,
        layout,
        matrix_budget(layout, settings),
        {},
        "cpu",
        lambda *_: None,
        FactorStore(0),
    )
    operations = 0.0
    for name in layout.matrices:
        side, long = sorted(work.shape(name))
        q = work.first_guess(name)
        if sketched((side, long), q):
            p = searched(q, side)
            one = 6 * long * side * p + 4 * side * p**2 + EIGEN_COST["cpu"] * p**3
        else:
            one = 2 * long * side**2 + EIGEN_COST["cpu"] * side**3
        operations += one * (len(vectors.tasks) + 1)
    files = [f for d in pool.values() for f in Path(d).glob("*.safetensors")]
    return {
        "operations": operations,
        "read": sum(f.stat().st_size for f in files),
        "written": written,
    }


def seconds(needs: Mapping[str, float], machine: Machine) -> float:
    """The floor on this machine."""
    return (
        needs["operations"] / machine.flops
        + needs["read"] / machine.read
        + needs["written"] / machine.write
    )


def _copies(file: Path) -> None:
    for tensor in load_file(file).values():
        tensor.clone()


def _timed(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin
