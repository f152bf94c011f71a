"""A backbone that runs with other tensors for a while, and is the same afterwards, whatever happens in between."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .copies import holders_of, rebind
from .derived import Derived
from .shadow import slots_of, tensor_of
from .shapes import Shapes


class Places:
    """Where tensors of a backbone are, that others are to stand for.

    Args:
        backbone: whose tensors they are.
        names: of the tensors; tied ones have several places.
        shapes: of the backbone.
        derived: what its modules keep beside their tensors.
    """

    def __init__(
        self,
        backbone: nn.Module,
        names: Iterable[str],
        shapes: Shapes,
        derived: Derived,
    ):
        self._backbone, self._shapes, self._derived = backbone, shapes, derived
        self._slots = slots_of(backbone, names)
        live = [tensor_of(backbone, name) for name in self._slots]
        self._holders = holders_of(backbone, live)

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Put other tensors into all places of the backbone's own; nothing is written to any of them.

        Every forward gets copies of the buffers, for it may write to them (statistics of batch norms, tables of rotary
        embeddings), and what it notes down on a module is forgotten.

        Args:
            tensors: by name, of any shape.
        """
        facts = [vars(module) for module in self._backbone.modules()]
        inner = (f[key] for f in facts for key in ("_parameters", "_buffers") if f[key])
        before = [(now, dict(now)) for now in (*facts, *inner)]
        live = {name: tensor_of(self._backbone, name) for name in tensors}
        try:
            _copy_buffers(self._backbone)
            pairs = {
                id(own): (own, self._put(n, tensors[n])) for n, own in live.items()
            }
            rebind(self._holders, pairs)
            others = {
                name: tuple(tensors[name].shape)
                for name, own in live.items()
                if tensors[name].shape != own.shape
            }
            self._derived.forget(self._backbone, tensors, for_a_while=True)
            with self._shapes.following(self._backbone, others):
                yield
        finally:
            for now, own in reversed(before):
                _put_back(now, own)

    def _put(self, name: str, tensor: Tensor) -> Tensor:
        """Returns what was put there."""
        made: dict[str, Tensor] = {}
        for module, leaf in self._slots[name]:
            kind = "_buffers" if leaf in module._buffers else "_parameters"
            if kind not in made:
                buffer = kind == "_buffers"
                made[kind] = tensor.clone() if buffer else nn.Parameter(tensor, False)
            getattr(module, kind)[leaf] = made[kind]
        return next(iter(made.values()))


def _copy_buffers(backbone: nn.Module) -> None:
    copies: dict[int, Tensor] = {}
    for module in backbone.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.clone()
                module._buffers[leaf] = copies[id(buffer)]


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    for key in [key for key in now if key not in before]:
        del now[key]
    for key, value in before.items():
        if now.get(key, now) is not value:
            now[key] = value
