"""What a merge does, counted while it runs: products, eigenproblems, passes over numbers, calls, coded numbers, messages.

Everything that torch computes is seen as it is dispatched; nothing is estimated from shapes. What is counted while a tensor is
worked on is apart from what every process does for itself.
"""

import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fusion_bench_didi.distributed.ranks import Ranks
from fusion_bench_didi.lowrank.svd import EIGEN_COST
from fusion_bench_didi.quantization import dead_zone
from fusion_bench_didi.task_vectors import loop
from fusion_bench_didi.task_vectors.file_sources import SafetensorsSource

#: Tensors from this size on come from memory and not from the processor's caches.
LARGE = 2**19
_EIGEN = ("_linalg_eigh", "linalg_inv", "_linalg_svd", "linalg_qr", "linalg_cholesky")
#: In operations of l s^2; twice that for what is not here.
_CUBES = {"_linalg_eigh": EIGEN_COST["cpu"], "_linalg_svd": 2 * EIGEN_COST["cpu"]}


class Counting(TorchDispatchMode):
    """Counts by kind; ``shared`` of them while a tensor is worked on, ``own`` otherwise."""

    def __init__(self):
        super().__init__()
        self.shared: Counter[str] = Counter()
        self.own: Counter[str] = Counter()
        self.within = 0

    @property
    def now(self) -> Counter:
        return self.shared if self.within else self.own

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, packet = func.__name__.partition(".")[0], func._overloadpacket
        if func.is_view:
            return out
        self.now["calls"] += 1
        tensors = [t for t in tree_leaves((args, out)) if isinstance(t, Tensor)]
        if packet in flop_registry:
            self.now["operations"] += flop_registry[packet](
                *args, **(kwargs or {}), out_val=out
            )
        elif name in _EIGEN:
            long, short = sorted(tensors[0].shape[-2:], reverse=True)
            batch = math.prod(tensors[0].shape[:-2])
            cost = _CUBES.get(name, 2.0)
            self.now["eigen"] += batch * cost * long * short * short
        elif tensors:
            numbers = max(t.numel() for t in tensors)
            large = numbers >= LARGE
            self.now["from memory" if large else "in cache"] += numbers
        return out


@contextmanager
def counting() -> Iterator[dict[str, dict[str, float]]]:
    """Counts of the block, filled in at its end; the block works on one thread."""
    found: dict[str, dict[str, float]] = {}
    mode = Counting()

    @contextmanager
    def working(_: Ranks, what: str) -> Iterator[None]:
        mode.within += 1
        try:
            yield
        finally:
            mode.within -= 1

    def told(function: Callable, items: Any, *, workers: int) -> Iterator[Any]:
        for item in items:
            result = function(item)
            mode.own["messages"] += len(pickle.dumps(result))
            yield result

    def encode(runs: Any) -> Tensor:
        mode.now["coded"] += sum(symbols.numel() for symbols, _ in runs)
        return stock(runs)

    def read(source: SafetensorsSource, name: str) -> Tensor:
        value = stock_read(source, name)
        mode.now["read"] += value.nbytes
        return value

    stock, stock_read = dead_zone.encode_runs, SafetensorsSource.read
    with ExitStack() as stack:
        stack.enter_context(patch.object(Ranks, "working", working))
        stack.enter_context(patch.object(loop, "ordered_map", told))
        stack.enter_context(patch.object(dead_zone, "encode_runs", encode))
        stack.enter_context(patch.object(SafetensorsSource, "read", read))
        stack.enter_context(mode)
        yield found
    found.update(shared=dict(mode.shared), own=dict(mode.own))
