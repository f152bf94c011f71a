"""A backbone that runs with other tensors for a while, and is the same afterwards, whatever happens in between."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..task_vectors.ties import tensor_of
from .copies import holders_of, rebind
from .shadow import slots_of
from .weights import BackboneWeights


class Places:
    """Where tensors of a backbone are, that others are to stand for.

    Args:
        weights: of the backbone.
        names: of the tensors; tied ones have several places.
    """

    def __init__(self, weights: BackboneWeights, names: Iterable[str]):
        self._weights, self._backbone = weights, weights.backbone
        self._slots = slots_of(self._backbone, names)
        live = [tensor_of(self._backbone, name) for name in self._slots]
        self._holders = holders_of(self._backbone, live)

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
            self._weights.derived.forget(self._backbone, tensors, for_a_while=True)
            with self._weights.shapes.following(self._backbone, others):
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
