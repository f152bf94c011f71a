"""Own arithmetic as it is meant, whatever the process asks of its models: casts of autocast, products in TF32, other defaults.

A singular value a thousandth of the largest is lost in products of ten bits, and what is decoded under ``torch.autocast``
would be another model.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """This thread's products are not cast meanwhile; also a decorator."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def own_arithmetic() -> Iterator[None]:
    """As :func:`without_autocast`; new tensors are of float32 and on the CPU, where nothing else is said, and products of
    float32 keep all its bits: the type and the products on all threads of the process, until the last block ends.
    """
    with ExitStack() as stack:
        stack.enter_context(without_autocast())
        if torch.empty(0).device.type != "cpu":
            # only then: every call of torch passes through Python meanwhile, which takes as long as a small tensor's sum
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_PROCESS)
        yield


class _Process:
    """Settings of the whole process while one thread or several are in the block."""

    def __init__(self):
        self._lock, self._inside, self._before = Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._set()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._before.close()

    def _set(self) -> None:
        self._before.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        backends = torch.backends.cuda, torch.backends.mkldnn
        kinds = [getattr(backend, "matmul", None) for backend in backends]
        if all(hasattr(kind, "fp32_precision") for kind in kinds):
            for kind in kinds:
                before = kind.fp32_precision
                self._before.callback(setattr, kind, "fp32_precision", before)
                kind.fp32_precision = "ieee"
        else:  # before torch 2.9
            before = torch.get_float32_matmul_precision()
            self._before.callback(torch.set_float32_matmul_precision, before)
            torch.set_float32_matmul_precision("highest")


_PROCESS = _Process()
