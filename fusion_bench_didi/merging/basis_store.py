"""Half SVDs between planning and encoding: in memory up to a limit, in scratch files beyond it."""

import itertools
import threading
import weakref
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..checkpoint.locks import Scratch
from ..lowrank.svd import HalfSVD

Bases = tuple[HalfSVD, ...]


class BasisStore:
    """Keeps bases for whoever holds what :meth:`keep` returned; may be used from several threads.

    Args:
        memory_gb: held in memory; what comes later goes to files in a temporary directory (``TMPDIR`` says where), which
            is removed with the store, or by the next one if the process is killed.
    """

    def __init__(self, memory_gb: float):
        self._left = memory_gb * 2**30
        self._lock = threading.Lock()
        self._count = itertools.count()
        self._scratch: Scratch | None = None

    def keep(self, bases: Bases) -> "KeptBases":
        """Hold bases until the result is gone, or was taken."""
        size = sum(b.vectors.nbytes + b.S.nbytes for b in bases)
        with self._lock:
            fits = size <= self._left
            if fits:
                self._left -= size
            elif self._scratch is None:
                self._scratch = Scratch()
        if fits:
            kept = KeptBases(bases, None)
            kept._released = weakref.finalize(kept, self._give_back, size)
        else:
            file = self._scratch.path / f"{next(self._count)}.safetensors"
            save_file(_tensors(bases), file)
            kept = KeptBases(None, file)
            kept._released = weakref.finalize(kept, file.unlink, missing_ok=True)
        # at the end of the process there is nothing to give back
        kept._released.atexit = False
        return kept

    def _give_back(self, size: int) -> None:
        with self._lock:
            self._left += size


class KeptBases:
    """Bases that a store holds; on the rank that decomposed the matrix, which also encodes it."""

    _released: weakref.finalize

    def __init__(self, bases: Bases | None, file: Path | None):
        self._bases, self._file = bases, file

    def __reduce__(self):
        """On another rank, which does not encode this matrix, they are not there."""
        return KeptBases, (None, None)

    def load(self) -> Bases:
        """The bases, which stay where they are."""
        if self._bases is not None:
            return self._bases
        tensors = load_file(self._file)
        return tuple(
            HalfSVD(
                tensors[f"{i}.vectors"], tensors[f"{i}.S"], float(tensors[f"{i}.tail"])
            )
            for i in range(len(tensors) // 3)
        )

    def take(self) -> Bases:
        """As :meth:`load`, once: their place is free from then on."""
        bases = self.load()
        self._bases = None
        self._released()
        return bases


def _tensors(bases: Bases) -> dict[str, torch.Tensor]:
    tensors = {}
    for i, basis in enumerate(bases):
        tensors[f"{i}.vectors"] = basis.vectors.contiguous()
        tensors[f"{i}.S"] = basis.S.contiguous()
        tensors[f"{i}.tail"] = torch.tensor(basis.tail_energy, dtype=torch.float64)
    return tensors
