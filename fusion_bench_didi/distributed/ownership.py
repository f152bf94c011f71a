"""Which rank works on which tensor: it alone reads it, decomposes it, encodes it and writes it; what is small goes to all."""

import heapq
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .ranks import ALONE, Ranks


def owners(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """The rank of every tensor: the largest first, each to the rank that has least so far; ties by kind, name and rank.

    Tensors of one kind, whose names differ by the number of a layer, follow one another: kinds of equal size may take different
    time, and so every rank gets as many of each.

    Args:
        sizes: bytes to be read.
        count: of ranks.
    """

    def turn(name: str) -> tuple[int, list[str], str]:
        kind = [part for part in name.split(".") if not part.isdigit()]
        return -sizes[name], kind, name

    loads = [(0, rank) for rank in range(count)]
    found = {}
    for name in sorted(sizes, key=turn):
        load, rank = heapq.heappop(loads)
        found[name] = rank
        heapq.heappush(loads, (load + sizes[name], rank))
    return found


class Memory(Protocol):
    """Results that earlier runs of the same merge found."""

    def stage(self, name: str) -> str:
        """A name for one round of a stage that the same round had in an earlier run."""

    def recall(self, stage: str, name: str) -> Any:
        """The earlier result for a tensor; None where there is none."""

    def record(self, stage: str, name: str, found: Any) -> None:
        """Keep what was found of a tensor."""


@dataclass(frozen=True)
class Crew:
    """The ranks of one merge, what each of them owns, and what is finished.

    Args:
        owner: rank by tensor name; not asked where there is one rank.
        memory: None where nothing is kept for later runs.
    """

    ranks: Ranks = ALONE
    owner: Mapping[str, int] | None = None
    memory: Memory | None = None

    @classmethod
    def of(
        cls, ranks: Ranks, sizes: Mapping[str, int], memory: Memory | None = None
    ) -> "Crew":
        """Tensors of these sizes in bytes, shared out."""
        return cls(ranks, owners(sizes, ranks.size), memory)

    def mine(self, names: Collection[str]) -> list[str]:
        """Names of the tensors that this rank owns."""
        if self.ranks.size == 1:
            return list(names)
        return [name for name in names if self.owner[name] == self.ranks.rank]


SOLO = Crew()
