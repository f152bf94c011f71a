"""A device that is simulated: where tensors are is checked as on an accelerator, and the arithmetic happens on the CPU.

Tensors of two devices in one operation are an error, but for scalars, as they are on every accelerator of torch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__)


class OnDevice(Tensor):
    """A tensor of the device; what it holds is on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def __getitem__(self, index: Any) -> "OnDevice":
        return OnDevice(self.held[tree_map(_held, index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        chosen = any(isinstance(one, Tensor) for one in tree_leaves(index))
        if chosen and isinstance(value, Tensor) and not isinstance(value, OnDevice):
            if value.dim():
                raise RuntimeError("two devices in __setitem__ of chosen entries")
        self.held[tree_map(_held, index)] = _held(value)

    def item(self) -> Any:
        return self.held.item()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor of a device to numpy")

    def __array__(self, *_: Any) -> Any:
        raise TypeError("can't convert a tensor of a device to numpy")

    def __bool__(self) -> bool:
        return bool(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def __index__(self) -> int:
        return self.held.__index__()

    def __float__(self) -> float:
        return float(self.held)

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None) -> Any:
        return _run(function, args, kwargs or {})


class _Simulation(TorchDispatchMode):
    """Sees what is made on the device, or moved there, of tensors that are not."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        return _run(function, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """What operations do not show: tensors made of Python's numbers, and products that squeeze in place."""

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = dict(kwargs or {})
        if function in PRODUCTS:
            return _run(function, args, kwargs)
        if function not in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            return function(*args, **kwargs)
        of_device = function is Tensor.new_tensor and args[0].device == DEVICE
        target = kwargs.pop("device", DEVICE if of_device else None)
        if of_device:
            function, args = torch.tensor, args[1:]
        made = function(*args, **kwargs)
        return made if target is None else made.to(target)


def _run(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, OnDevice)]
    here = [x for x in tensors if not isinstance(x, OnDevice) and x.dim()]
    if there and here and function not in MOVES:
        raise RuntimeError(f"two devices in {function}")
    target = kwargs.get("device")
    moved = bool(there) if target is None else _is_simulated(target)
    if target is not None and moved:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    held_args, held = tree_map(_held, (args, kwargs))
    result = function(*held_args, **held)
    if not moved:
        return result
    # in place: the tensor that was given, unless its shape is another one now
    same = {id(x.held): x for x in there if x.shape == x.held.shape}
    return tree_map(lambda x: same.get(id(x), _on_device(x)), result)


def _is_simulated(device: torch.device | str) -> bool:
    return torch.device(device).type == DEVICE.type


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


def _on_device(value: Any) -> Any:
    return OnDevice(value) if isinstance(value, Tensor) else value


@contextmanager
def simulated() -> Iterator[torch.device]:
    """The device, while the block runs, on this thread; the test is skipped where torch, before 2.9, has no guard for it."""
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        pytest.skip("torch has no guard of a simulated device")
    torch._C._ensureCUDADeviceGuardSet()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with patch.object(torch.cuda, "_lazy_init"), _Simulation(), _Calls():
            yield DEVICE
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
