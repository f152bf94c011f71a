"""A backbone that runs with other tensors for a while, and is the same afterwards, whatever happens in between."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from .shadow import Slot
from .shapes import Shapes


@contextmanager
def with_tensors(
    backbone: nn.Module,
    tensors: Mapping[str, Tensor],
    slots: Mapping[str, Sequence[Slot]],
    shapes: Shapes,
) -> Iterator[None]:
    """Put other tensors into all places of the backbone's own; nothing is written to any of them.

    Every forward gets copies of the buffers, for it may write to them (statistics of batch norms, tables of rotary embeddings),
    and what it notes down on a module is forgotten.

    Args:
        tensors: by name, of any shape.
        slots: where each of them is, see :func:`~.shadow.slots_of`.
        shapes: of the backbone.
    """
    before = [(module, dict(vars(module))) for module in backbone.modules()]
    held = [
        (place, dict(place))
        for module, facts in before
        for place in (facts["_parameters"], facts["_buffers"])
        if place
    ]
    sides = {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if tensor.shape != getattr(*slots[name][0]).shape
    }
    copies: dict[int, Tensor] = {}
    try:
        for _, facts in before:
            for leaf, buffer in facts["_buffers"].items():
                if buffer is not None:
                    if id(buffer) not in copies:
                        copies[id(buffer)] = buffer.clone()
                    facts["_buffers"][leaf] = copies[id(buffer)]
        for name, tensor in tensors.items():
            made: dict[bool, Tensor] = {}
            for module, leaf in slots[name]:
                is_buffer = leaf in module._buffers
                if is_buffer not in made:
                    made[is_buffer] = (
                        tensor.clone() if is_buffer else nn.Parameter(tensor, False)
                    )
                (module._buffers if is_buffer else module._parameters)[leaf] = made[
                    is_buffer
                ]
        with shapes.following(backbone, sides):
            yield
    finally:
        for place, own in (*held, *((vars(m), facts) for m, facts in before)):
            _put_back(place, own)


def _put_back(now: dict, before: dict) -> None:
    for key in [key for key in now if key not in before]:
        del now[key]
    for key, value in before.items():
        if now.get(key) is not value:
            now[key] = value
