"""What is decided upon separately: attention and MLP of each block, and the rest.

The rule, from parameter names alone. The *block* of a tensor is its name up to the first path segment that is a number
(``vision_model.encoder.layers.3``, ``transformer.h.3``, ``encoder.block.3``). What follows is matched against
``PATTERNS``; the first that is found gives the part, and the component is ``<block>.<part>``. Tensors without a block, and
those of a block that match nothing, form the component ``rest``. The norm in front of a sublayer belongs to it.

Source: "homologous blocks (attention and MLP per layer, plus the rest)" is a reading note's of the paper; the patterns are ours.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..errors import SettingsError
from ..task_vectors.reader import TaskVectors
from ..task_vectors.sources import digest_of

REST = "rest"
#: part -> regular expression searched for in what follows the block's name; tried in order
PATTERNS = {
    "attention": r"(?i)attn|(?<!post_)attention|(layer_?norm|ln_|norm)1|input_layernorm",
    "mlp": r"(?i)mlp|fc_?\d|c_fc|ffn|feed_?forward|dense|(layer_?norm|ln_|norm)2|post_attention_layernorm",
}


@dataclass(frozen=True)
class Component:
    """Tensors that are merged in one way.

    Args:
        name: unique.
        tensors: sorted.
        bits: of one fine-tuned model.
        numel: entries.
    """

    name: str
    tensors: tuple[str, ...]
    bits: int
    numel: int

    @property
    def dense_bits(self) -> int:
        """One 8-bit module: a byte per entry, and two float32 ends per tensor."""
        return 8 * self.numel + 64 * len(self.tensors)


def component_of(name: str, patterns: Mapping[str, str] = PATTERNS) -> str:
    """The component of one tensor."""
    segments = name.split(".")
    number = next((i for i, s in enumerate(segments) if s.isdigit()), None)
    if number is None:
        return REST
    block, inside = segments[: number + 1], ".".join(segments[number + 1 :])
    for part, pattern in patterns.items():
        if re.search(pattern, inside):
            return ".".join((*block, part))
    return REST


def components(
    task_vectors: TaskVectors,
    names: Iterable[str],
    patterns: Mapping[str, str] = PATTERNS,
) -> list[Component]:
    """The changed tensors by component; natural order of names, the rest last.

    Raises:
        SettingsError: for a name of a component that can be none of a file.
    """
    if odd := [part for part in patterns if not re.fullmatch(r"\w[\w-]*", part)]:
        raise SettingsError(
            f"components names {odd[0]!r}: modules are saved under these names. Take letters, digits, _ and -."
        )
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(component_of(name, patterns), []).append(name)
    found = []
    for component, tensors in sorted(groups.items(), key=_natural):
        bits = sum(map(task_vectors.bits, tensors))
        numel = sum(task_vectors.infos[name].numel for name in tensors)
        found.append(Component(component, tuple(tensors), bits, numel))
    return found


def _natural(item: tuple[str, object]) -> tuple:
    pieces = re.split(r"(\d+)", item[0])
    return item[0] == REST, [int(p) if p.isdigit() else p for p in pieces]


#: Components held at once; (T, size of the component) float32 each.
_KEPT = 64


class ComponentReader:
    """Task vectors of a component, the last few kept in memory.

    Args:
        task_vectors: aligned checkpoints, tasks in a fixed order.
    """

    def __init__(self, task_vectors: TaskVectors):
        self.tasks = list(task_vectors.tasks)
        self._task_vectors = task_vectors
        self._all = lru_cache(maxsize=_KEPT)(self._load)

    @cached_property
    def checkpoints(self) -> str:
        """A short name of what is read: other checkpoints have another, though they are of the same tasks."""
        identity = json.dumps(self._task_vectors.identity, sort_keys=True)
        return digest_of(identity.encode())

    def read(
        self, component: Component, tasks: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """(T, *shape) per tensor, of the given tasks in the given order."""
        rows = [self.tasks.index(t) for t in (self.tasks if tasks is None else tasks)]
        return {n: v[rows] for n, v in self._all(component).items()}

    def gram(self, component: Component) -> Tensor:
        """(T, T) inner products of the task vectors, float64."""
        flat = [v.flatten(1) for v in self.read(component).values()]
        return torch.stack([f.double() @ f.double().T for f in flat]).sum(0)

    def _load(self, component: Component) -> dict[str, Tensor]:
        return {name: self._task_vectors.read(name) for name in component.tensors}
