"""Exports held against ``materialize``: weight by weight, and the outputs of one made-up batch where there are any."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DiDiError
from ..task_vectors.live_models import all_tensors
from .report import Carried

#: Units of rounding that the arithmetic of a reader may differ by from ours.
UNITS = 8
#: The unit of rounding of the type in which readers multiply factors.
_EPS = torch.finfo(torch.float32).eps
#: What a reader's order of sums changes of most of an output in float32, in parts of its largest entry; far more than it does.
SAME = 1e-3
#: The setting by which a model ties its head to its embedding.
TIED = "tie_word_embeddings"
_WAYS_OUT = "Export as plain or patch, or with carry=linear in place of carry=all."


def state(module: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model, those that it does not save too."""
    return {name: value.detach() for name, value in all_tensors(module).items()}


def check_equal(found: Mapping[str, Tensor], wanted: nn.Module, what: str) -> None:
    """Every tensor that was read must be, bit for bit, the model's of that name.

    Raises:
        DiDiError: naming the first that is not, or that is missing.
    """
    expected = wanted.state_dict()
    lacking = missing(found, expected)
    for name, value in expected.items():
        if name in lacking:
            raise DiDiError(f"{what} lacks {name}, so it was not kept.")
        if name in found and not same_bits(found[name], value):
            raise DiDiError(
                f"{what}: {name} is not what the merged model has, so it was not kept."
            )


def missing(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> set[str]:
    """Names of wanted tensors that were not found, nor were others that they are tied to."""
    there = {value.data_ptr() for name, value in wanted.items() if name in found}
    absent = ((n, value) for n, value in wanted.items() if n not in found)
    return {name for name, value in absent if value.data_ptr() not in there}


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
    under: nn.Module,
    carried: Mapping[str, Carried],
    what: str,
) -> None:
    """Tensors must be off by no more than the report says and rounding explains; those it does not speak of, by nothing.

    Args:
        under: the model that the adapter is of: ``base``, or that with the shared part in it.

    Raises:
        DiDiError: naming the first that is not.
    """
    read, expected, before, start = map(state, (found, wanted, base, under))
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


def example_inputs(model: nn.Module, other: nn.Module) -> dict[str, Tensor]:
    """A small input of a model of transformers, which another one takes too; empty where none can be told from its configuration.

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
    vocabulary = _vocabulary(model, other)
    if main not in ("input_ids", "input_features") or vocabulary is None:
        return {}
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (1, 8), generator=draw)
    found = {"input_ids": ids.to(device)}
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = found["input_ids"]
    if main == "input_features":  # of Whisper, which halves the length
        sides = [getattr(config, n, None) for n in ("num_mel_bins", "max_source_positions")]  # fmt: skip
        if not all(isinstance(side, int) for side in sides):
            return {}
        sound = torch.randn(1, sides[0], 2 * sides[1], generator=draw)
        found |= {main: sound.to(device, first.dtype)}
        del found["input_ids"]
    return found


def _vocabulary(*models: nn.Module) -> int | None:
    """How many tokens all of the models know; None where one does not tell."""
    configs = [getattr(model, "config", None) for model in models]
    texts = [c.get_text_config() for c in configs if hasattr(c, "get_text_config")]
    sizes = [getattr(text, "vocab_size", None) for text in texts]
    told = len(sizes) == len(models) and all(isinstance(n, int) for n in sizes)
    return min(sizes) if told else None


def outputs_differ(
    found: nn.Module,
    wanted: nn.Module,
    base: nn.Module,
    inputs: Mapping[str, Any],
    what: str,
) -> tuple[float | None, str]:
    """The largest difference of two models' outputs in parts of the largest output, or None and why it cannot be told.

    Args:
        found: ``base`` with an adapter on it.

    Raises:
        DiDiError: if the model fails with the adapter alone.
    """
    if not inputs:
        return None, "the model's configuration does not tell what to try it with"
    there, failure = _tried(wanted, inputs)
    if failure:
        return None, f"the model fails {failure}"
    here, failure = _tried(found, inputs)
    if failure:
        if _tried(base, inputs)[1]:
            return None, f"the base model fails {failure}"
        raise DiDiError(
            f"{what}: the model runs without it, and fails with it as PEFT puts it on {failure}; it was not kept. {_WAYS_OUT}"
        )
    shapes = [[tuple(value.shape) for value in one] for one in (here, there)]
    if shapes[0] != shapes[1]:
        return None, "of shapes {} with the adapter, {} of the task".format(*shapes)
    return max((float(off.max()) for off in _off(here, there)), default=0.0), ""


def check_runs(found: nn.Module, inputs: Mapping[str, Any], what: str) -> float:
    """An adapter must compute what the weights do that it is merged to; by how much outputs of PEFT's merged model are off.

    Of most of every output: a rounding may send single tokens to another expert.

    Args:
        found: a model in float32 with an adapter on it; the adapter is merged into it.

    Raises:
        DiDiError: if it does not.
    """
    floats = {
        name: value.float()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    inputs = {**inputs, **floats}
    here, failure = _tried(found, inputs)
    config = getattr(found.get_base_model(), "config", None)
    tied = getattr(config, TIED, None)
    merged = found.merge_and_unload()
    left = _tried(merged, inputs)[0]
    if tied:  # PEFT says that heads are untied, and some models compute otherwise then
        setattr(config, TIED, tied)
    there, other = _tried(merged, inputs)
    if failure or other:  # of a model that is not for this type
        return 0.0
    if (off := _most(_off(here, there))) > SAME:
        raise DiDiError(
            f"{what}: most of some output is off by {off:.2g} of the largest, though all weights are right, because PEFT does not put "
            f"it on as the model computes; it was not kept. {_WAYS_OUT}"
        )
    return _most(_off(left, there))


@torch.no_grad()
def _tried(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[list[Tensor], str]:
    """Outputs of a model, with the same numbers drawn every time, and how it fails, if it does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return list(_floats(model.eval()(**inputs))), ""
        except Exception as error:  # of any type, of the model and of what it calls
            return [], f"({type(error).__name__}: {error})"


def _off(here: Sequence[Tensor], there: Sequence[Tensor]) -> Iterator[Tensor]:
    """Differences of outputs, entry by entry, in parts of the largest entry."""
    for one, other in zip(here, there):
        one, other = one.double(), other.double()
        alike = (one == other) | (one.isnan() & other.isnan())
        off = (one - other).abs().nan_to_num(nan=torch.inf).masked_fill(alike, 0.0)
        size = other[other.isfinite()].abs().max() if other.isfinite().any() else 0.0
        yield off / size if size else off


def _most(off: Iterable[Tensor]) -> float:
    """What half of the entries of every output are off by at most."""
    return max((float(one.median()) for one in off), default=0.0)


def _floats(output: Any) -> Iterator[Tensor]:
    """Floating-point tensors of an output, those that hold something."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        for value in output:
            yield from _floats(value)
    elif isinstance(output, Tensor) and output.is_floating_point() and output.numel():
        yield output
