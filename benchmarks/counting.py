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
from fusion_bench_didi.quantization import dead_zone
from fusion_bench_didi.task_vectors import loop
from fusion_bench_didi.task_vectors.file_sources import SafetensorsSource

#: Decompositions, by the names that torch gives them; each counts as l s^2 of its long and short side.
DECOMPOSITIONS = {
    "_linalg_eigh": "eigh",
    "linalg_inv_ex": "inv",
    "_linalg_svd": "svd",
    "linalg_qr": "qr",
    "linalg_cholesky_ex": "cholesky",
}
#: What makes tensors or looks at them without touching their numbers.
UNTOUCHED = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "detach"))


def sized(kind: str, size: float) -> str:
    """Work of one kind and size, sizes by powers of four: a small product gets on more slowly than a large one."""
    return f"{kind} {int(math.log2(max(size, 1))) // 2}"


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
            work = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self.now[sized("product", work)] += work
        elif name in DECOMPOSITIONS:
            long, short = sorted(tensors[0].shape[-2:], reverse=True)
            batch = math.prod(tensors[0].shape[:-2])
            kind = sized(DECOMPOSITIONS[name], long * short)
            self.now[kind] += batch * long * short * short
        elif tensors and name not in UNTOUCHED:
            numbers = max(t.numel() for t in tensors)
            made = max((t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)), default=0)  # fmt: skip
            kind = "fresh" if made == numbers and not name.endswith("_") else "pass"
            self.now[sized(kind, numbers)] += numbers
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
