"""Own arithmetic as it is meant, whatever the process asks of its models: casts of autocast, products in TF32, other defaults.

A singular value a thousandth of the largest is lost in products of ten bits, and what is decoded under ``torch.autocast``
would be another model.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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
    float32 keep all its bits, both on all threads of the process."""
    with ExitStack() as stack:
        stack.enter_context(without_autocast())
        stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        kinds = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        if all(hasattr(kind, "fp32_precision") for kind in kinds):
            for kind in kinds:
                stack.callback(setattr, kind, "fp32_precision", kind.fp32_precision)
                kind.fp32_precision = "ieee"
        else:  # before torch 2.9
            before = torch.get_float32_matmul_precision()
            stack.callback(torch.set_float32_matmul_precision, before)
            torch.set_float32_matmul_precision("highest")
        yield
