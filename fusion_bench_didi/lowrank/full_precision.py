"""Own arithmetic in the type of its operands, whatever the process asks of its models: casts of autocast, products in TF32.

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
def full_precision() -> Iterator[None]:
    """As :func:`without_autocast`, and products of float32 keep all its bits, on all threads of the process."""
    with ExitStack() as stack:
        stack.enter_context(without_autocast())
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
