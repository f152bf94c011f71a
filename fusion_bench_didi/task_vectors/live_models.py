"""Models in memory: taken out of what wraps them; whose tensors are not the weights that they were loaded with, or no plain tensors."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointMismatchError, some
from .quantized import unread

#: How RWKV models of transformers say that a forward has divided their weights, and the setting by which they do it.
DIVIDED, EVERY = "layers_are_rescaled", "rescale_every"
#: Where torch has layers that hold whole numbers in packed form.
_PACKED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")

#: Methods by which a class of tensors computes with other numbers than it holds, and what torch puts there to rule that out.
_COMPUTING = ("__torch_function__", "__torch_dispatch__", "dequantize")
_DISABLED = (
    torch._C._disabled_torch_function_impl,
    torch._C._disabled_torch_dispatch_impl,
)
#: Where bitsandbytes keeps the scales of codes that are kept as floating point.
_STATE = "quant_state"

#: What torch calls the state of a module that is none of its tensors.
EXTRA_STATE = "_extra_state"
#: Where transformers keeps what it has quantized a model by.
_QUANTIZER = "hf_quantizer"

#: What every module has.
OF_ALL_MODULES = frozenset(vars(nn.Module()))
#: Where ``torch.compile`` keeps the model that it wraps.
_COMPILED = "_orig_mod"


def uncompiled(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` wrapped, in which tensors have the names of their checkpoints; any other model itself."""
    while _COMPILED in model._modules:
        model = model._modules[_COMPILED]
    return model


def of_peft(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT, or what PEFT puts around a model."""
    return type(module).__module__.startswith("peft.")


def all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, each once under the first of its names; those that are not saved too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check_values(model: nn.Module, label: str) -> None:
    """A live model must hold the values of its weights.

    Args:
        label: for messages.

    Raises:
        CheckpointMismatchError: if some are elsewhere (accelerate's offloading), or others than those of its checkpoint, or no plain
            tensors that can be read and replaced.
    """
    for found, way_out in _closed(model):
        raise CheckpointMismatchError(
            f"{label} ({type(model).__name__}): {found}, whose values cannot be read and replaced. Give {way_out}."
        )
    tensors = {**model.state_dict(keep_vars=True), **dict(model.named_parameters())}
    if absent := [n for n, t in tensors.items() if getattr(t, "is_meta", False)]:
        raise CheckpointMismatchError(
            f"{label} ({type(model).__name__}) has {len(absent)} of {len(tensors)} weights not in memory: {some(absent)} are on the "
            "meta device, where device_map leaves what it offloads. Give the model's directory, or load it without device_map."
        )
    check_undivided(model, label)


def _closed(model: nn.Module) -> Iterator[tuple[str, str]]:
    """What a model holds its weights in other than plain tensors, and what to give in its place."""
    for name, module in model.named_modules():
        shown, kind = name or "the model", type(module)
        if isinstance(module, torch.jit.ScriptModule):
            yield f"{shown} is a torch.jit program", "what it was scripted or traced from"  # fmt: skip
        elif kind.__module__.startswith(_PACKED):
            yield f"{shown} is a quantized layer", "the model before it was quantized"
        elif kind.__name__ == "FullyShardedDataParallel":
            yield f"{shown} is shared out among processes", "the whole model"
        elif method := unread(vars(module).get(_QUANTIZER)):
            yield f"{shown} is quantized by {method}", "the model before it was quantized"  # fmt: skip
    for name, tensor in model.named_parameters():
        packed = hasattr(tensor, "__tensor_flatten__") or _is_code(tensor)
        if packed and not tensor.is_nested:
            kind = type(tensor).__name__
            yield f"{name} is a {kind}", "plain tensors, gathered and not quantized"
    yield from _with_scales(model)


def _is_whole(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _is_code(tensor: torch.Tensor) -> bool:
    """Whether a parameter of a class of its own stands for other numbers: whole, or with tensors beside them (scales, a codebook) by
    which the class computes.
    """
    if type(tensor) is nn.Parameter:
        return False
    if _is_whole(tensor):
        return True
    own = set(type(tensor).__mro__) - set(nn.Parameter.__mro__)
    methods = [vars(kind).get(key) for kind in own for key in _COMPUTING]
    if _STATE not in vars(tensor) and not {*methods} - {None, *_DISABLED}:
        return False
    beside = list(vars(tensor).values())
    within = [v for b in beside for v in getattr(b, "__dict__", {}).values()]
    return any(isinstance(value, torch.Tensor) for value in (*beside, *within))


def _may_scale(value: Any) -> bool:
    """Whether an entry of a state may be scales of whole numbers, or hold some (HQQ)."""
    if isinstance(value, torch.Tensor):
        return not _is_whole(value)
    return isinstance(value, Mapping)


def _with_scales(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Parameters of whole numbers whose layer saves more numbers in floating point than its tensors: their scales."""
    whole = [name for name, tensor in model.named_parameters() if _is_whole(tensor)]
    if not whole:
        return
    known = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    known |= {n for n, _ in model.named_buffers(remove_duplicate=False)}
    state = model.state_dict()
    beside = [n for n, v in state.items() if n not in known and _may_scale(v)]
    for name in whole:
        layer = name[: name.rfind(".") + 1]
        others = {EXTRA_STATE, *model.get_submodule(layer[:-1])._modules}
        ends = [n.removeprefix(layer) for n in beside if n.startswith(layer)]
        if found := [layer + end for end in ends if end.split(".")[0] not in others]:
            yield (
                f"{name} is of {model.get_parameter(name).dtype}, with {some(found)} beside it",
                "the model before it was quantized",
            )


def check_undivided(model: nn.Module, label: str) -> None:
    """A live model must not have divided its weights in a forward.

    Raises:
        CheckpointMismatchError: if it has.
    """
    for module in model.modules():
        every = getattr(getattr(module, "config", None), EVERY, None) or 0
        if getattr(module, DIVIDED, False) and every > 0:
            raise CheckpointMismatchError(
                f"{label} ({type(module).__name__}) has divided weights of its layers in a forward ({DIVIDED}), so that they are not "
                f"those of its checkpoint. Give the model's directory, or the model as it was loaded, with {EVERY}=0 in its "
                "configuration if it is to run before the merge."
            )
