"""Exports held against ``materialize``: weight by weight, and the outputs of one made-up batch where there are any."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DiDiError
from .report import Carried

#: Units of rounding that the arithmetic of a reader may differ by from ours.
UNITS = 8
#: The unit of rounding of the type in which readers multiply factors.
_EPS = torch.finfo(torch.float32).eps


def state(module: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model, those that it does not save too."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: value.detach() for name, value in named}


def check_equal(found: Mapping[str, Tensor], wanted: nn.Module, what: str) -> None:
    """Every tensor that was read must be, bit for bit, the model's of that name.

    Raises:
        DiDiError: naming the first that is not, or that is missing.
    """
    expected = wanted.state_dict()
    tied = {value.data_ptr() for name, value in expected.items() if name in found}
    for name, value in expected.items():
        if name not in found:
            if value.data_ptr() not in tied:
                raise DiDiError(f"{what} lacks {name}, so it was not kept.")
        elif not same_bits(found[name], value):
            raise DiDiError(
                f"{what}: {name} is not what the merged model has, so it was not kept."
            )


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are of one type and shape and hold the same bits."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(bits(left), bits(right))


def bits(value: Tensor) -> Tensor:
    """A tensor's entries as integers, on the CPU, so that zeros of both signs differ and NaN is itself."""
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    value = value.detach().contiguous().cpu()
    if not value.is_floating_point():
        return value
    return value.view(widths[value.element_size()])


@torch.no_grad()
def check_close(
    found: nn.Module,
    wanted: nn.Module,
    base: nn.Module,
    carried: Mapping[str, Carried],
    what: str,
    under: nn.Module | None = None,
) -> None:
    """Tensors must be off by no more than the report says and rounding explains; those it does not speak of, by nothing.

    Args:
        under: the model that the adapter is of, where that is not ``base`` but has the shared part in it.

    Raises:
        DiDiError: naming the first that is not.
    """
    read, expected, before = state(found), state(wanted), state(base)
    start = before if under is None else state(under)
    for name, value in expected.items():
        here = read.get(name)
        if here is None or here.shape != value.shape:
            if name in carried and carried[name].how == "left out":
                continue
            raise DiDiError(f"{what} has no {name} of its shape, so it was not kept.")
        if name not in carried:
            if not same_bits(here, before[name]):
                raise DiDiError(
                    f"{what} changes {name}, which the task does not; it was not kept."
                )
            continue
        off = torch.linalg.vector_norm(_unexplained(here, value))
        kept = torch.equal(value, before[name])
        origin = (start if kept else before)[name]
        change = torch.linalg.vector_norm(value.double() - origin.double())
        size = torch.linalg.vector_norm(value.double())
        allowed = (1.01 * carried[name].error + UNITS * _eps(value)) * change
        allowed += UNITS * _EPS * size
        if not off <= allowed:
            raise DiDiError(
                f"{what}: {name} is off by {float(off):.3g}, expected at most {float(allowed):.3g}; it was not kept. Report "
                "this with the architecture, or export as plain or patch."
            )


def _unexplained(found: Tensor, wanted: Tensor) -> Tensor:
    """By how much entries were off at least before they were rounded to their type.

    Rounding moves an entry by half a unit at most, and, since what is wanted is of the type, no further than it was off.
    """
    off = (found.double() - wanted.double()).abs()
    if not found.is_floating_point():
        return off
    smallest = torch.finfo(found.dtype).smallest_normal
    unit = _eps(found) * found.double().abs().clamp(min=smallest)
    return torch.maximum(off / 2, off - unit / 2)


def _eps(value: Tensor) -> float:
    """The unit of rounding of a tensor's type; none of whole numbers."""
    return torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0


def example_inputs(model: nn.Module, vocabulary: int | None) -> dict[str, Tensor]:
    """A small input of a model of transformers; empty where none can be told from its configuration.

    One text: of several, classifiers of texts need a token that fills up the shorter ones.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", "")
    draw = torch.Generator().manual_seed(0)
    first = next(model.parameters(), None)
    device = first.device if first is not None else "cpu"
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None)
        channels = getattr(vision, "num_channels", 3)
        if not isinstance(size, int):
            return {}
        pixels = torch.randn(2, channels, size, size, generator=draw)
        return {main: pixels.to(device, first.dtype)}
    if main != "input_ids" or vocabulary is None:
        return {}
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (1, 8), generator=draw)
    found = {main: ids.to(device)}
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = found[main]
    return found


def _vocabulary(*models: nn.Module) -> int | None:
    """How many tokens all of the models know; None where one does not tell."""
    configs = [getattr(model, "config", None) for model in models]
    texts = [c.get_text_config() for c in configs if hasattr(c, "get_text_config")]
    sizes = [getattr(text, "vocab_size", None) for text in texts]
    told = len(sizes) == len(models) and all(isinstance(n, int) for n in sizes)
    return min(sizes) if told else None


@torch.no_grad()
def outputs_differ(
    found: nn.Module, wanted: nn.Module, inputs: Mapping[str, Any] | None
) -> tuple[float | None, str]:
    """The largest difference of two models' outputs in parts of the largest output, or None and why it cannot be told."""
    if inputs is None:
        inputs = example_inputs(wanted, _vocabulary(found, wanted))
    if not inputs:
        return None, "the model's configuration does not tell what to try it with"
    try:
        results = [list(_floats(m.eval()(**inputs))) for m in (found, wanted)]
    except Exception as error:  # of any type, of the model and of what it calls
        return None, f"the model fails ({type(error).__name__}: {error})"
    shapes = [[tuple(value.shape) for value in one] for one in results]
    if shapes[0] != shapes[1]:
        return None, "of shapes {} with the adapter, {} of the task".format(*shapes)
    worst = 0.0
    for here, there in zip(*results):
        size = float(there.abs().max())
        off = float((here.double() - there.double()).abs().max())
        worst = max(worst, off / size if size else off)
    return worst, ""


def _floats(output: Any) -> Iterator[Tensor]:
    """Floating-point tensors of an output, those that hold something."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floats(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _floats(value)
