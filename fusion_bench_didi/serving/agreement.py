"""Whether two ways to run a batch give the same, but for rounding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .outputs import Layout
from .trees import Path, leaves

#: relative; a wrong layer order is off by far more, rounding of float32 by far less
AGREEMENT = 1e-3
#: In fewer bits rounding adds up from layer to layer: results may be so many times as far off, in length, as when the weights are
#: rounded once more.
ROUNDINGS = 3


def rounded_again(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor that is off by a rounding of a type, its own if None, at random but always the same; whole numbers are not rounded."""
    if not x.is_floating_point():
        return x
    unit = torch.finfo(dtype or x.dtype).eps / 2
    generator = torch.Generator(x.device).manual_seed(0)
    noise = torch.rand(x.shape, generator=generator, device=x.device)
    return (x.float() * (1 + unit * (2 * noise - 1))).to(x.dtype)


def agree(
    alone: Sequence[Any], found: Any, layout: Layout, again: Sequence[Any] | None = None
) -> bool:
    """Whether what single tasks give is what one pass of all of them gives, but for rounding.

    Args:
        again: what single tasks give with weights that are rounded once more, as the measure of rounding.
    """
    lists, compared = layout.lists, 0
    expected = [leaves(part, lists) for part in alone]
    noisy = expected if again is None else [leaves(part, lists) for part in again]

    def close(expected: Tensor, found: Tensor, noisy: Tensor) -> bool:
        if not expected.is_floating_point() or expected.shape != found.shape:
            return expected.shape == found.shape
        if again is None:
            return _close(expected, found)
        return _as_close(expected, found, noisy)

    for path, value in leaves(found, lists).items():
        if path in lists:
            one, other = (
                _items([part.get(path) for part in of]) for of in (expected, noisy)
            )
            items, compared = leaves(value), compared + 1
            if not one.keys() == other.keys() == items.keys():
                return False
            held = [at for at, item in items.items() if isinstance(item, Tensor)]
            if not all(close(one[at], items[at], other[at]) for at in held):
                return False
            continue
        sides = layout.sides.get(path)
        if not isinstance(value, Tensor) or sides is None or len(sides) > 1:
            continue
        parts, others = ([part.get(path) for part in of] for of in (expected, noisy))
        if not all(isinstance(part, Tensor) for part in parts):
            return False
        if sides:
            compared += 1
            whole, other = (torch.cat(some, sides[0][0]) for some in (parts, others))
            if not close(whole, value, other):
                return False
        elif value.ndim:
            if not all(close(p, value, other) for p, other in zip(parts, others)):
                return False
        elif path in layout.steady and not _of_all(torch.stack(parts), value):
            return False
    return compared > 0


def _of_all(parts: Tensor, found: Tensor) -> bool:
    """Whether a number is that of every part, or their mean or sum; one that a weight gives is of its own task alone."""
    if not parts.is_floating_point():
        return True
    options = (found.expand_as(parts), parts), (found, parts.mean()), (found, parts.sum())  # fmt: skip
    return any(_close(other, one) for one, other in options)


def _items(lists: Sequence[Any]) -> dict[Path, Any]:
    """Leaves of lists, one after another."""
    held = [one for one in lists if isinstance(one, (tuple, list))]
    return leaves([item for one in held for item in one])


def _close(expected: Tensor, found: Tensor) -> bool:
    if not expected.numel():
        return True
    error = _difference(expected, found).abs()
    scale = expected.masked_fill(~expected.isfinite(), 0).abs().amax().clamp_min(1e-6)
    coarse = AGREEMENT if expected.dtype == torch.float32 else 30 * AGREEMENT
    return bool((error <= coarse * scale).all())


def _as_close(expected: Tensor, found: Tensor, noisy: Tensor) -> bool:
    """Whether a result is no farther off than rounding the weights once more takes it, by :data:`ROUNDINGS`."""
    off, rounding = (
        torch.linalg.vector_norm(_difference(expected, x).float())
        for x in (found, noisy)
    )
    return bool(rounding.isfinite() and off <= ROUNDINGS * rounding)


def _difference(expected: Tensor, found: Tensor) -> Tensor:
    same = (expected == found) | (expected.isnan() & found.isnan())  # also infinities
    return (expected - found).masked_fill(same, 0)
