"""Where first-pass bases wait for the second pass: in memory up to a limit, in scratch files beyond it."""

import itertools
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..lowrank.svd import HalfSVD


class FactorStore:
    """Bases by matrix name, each handed out once.

    Args:
        memory_gb: held in memory; what comes later goes to files in a temporary directory (``TMPDIR`` says where), which
            is removed with the store.
    """

    def __init__(self, memory_gb: float):
        self._left = memory_gb * 2**30
        self._held: dict[str, tuple[HalfSVD, ...]] = {}
        self._files: dict[str, Path] = {}
        self._count = itertools.count()
        self._directory: tempfile.TemporaryDirectory | None = None

    def put(self, name: str, bases: tuple[HalfSVD, ...]) -> None:
        """Keep the bases of a matrix, in place of those it may have."""
        self.drop(name)
        size = _bytes(bases)
        if size <= self._left:
            self._left -= size
            self._held[name] = bases
            return
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="fusion_bench_didi-")
        file = Path(self._directory.name) / f"{next(self._count)}.safetensors"
        tensors = {}
        for i, basis in enumerate(bases):
            tensors[f"{i}.vectors"] = basis.vectors.contiguous()
            tensors[f"{i}.S"] = basis.S.contiguous()
            tensors[f"{i}.tail"] = torch.tensor(basis.tail_energy, dtype=torch.float64)
        save_file(tensors, file)
        self._files[name] = file

    def get(self, name: str) -> tuple[HalfSVD, ...]:
        """What was put there.

        Raises:
            KeyError: if there is nothing of that name.
        """
        if name in self._held:
            return self._held[name]
        tensors = load_file(self._files[name])
        return tuple(
            HalfSVD(
                tensors[f"{i}.vectors"], tensors[f"{i}.S"], float(tensors[f"{i}.tail"])
            )
            for i in range(len(tensors) // 3)
        )

    def pop(self, name: str) -> tuple[HalfSVD, ...]:
        """As :meth:`get`; it is forgotten here."""
        bases = self.get(name)
        self.drop(name)
        return bases

    def drop(self, name: str) -> None:
        if name in self._held:
            self._left += _bytes(self._held.pop(name))
        if name in self._files:
            self._files.pop(name).unlink()


def _bytes(bases: tuple[HalfSVD, ...]) -> int:
    return sum(b.vectors.nbytes + b.S.nbytes for b in bases)
