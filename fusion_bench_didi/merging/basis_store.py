"""Half SVDs between planning and encoding: in memory up to a limit, in scratch files beyond it."""

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..checkpoint.journal import Journal
from ..checkpoint.locks import Scratch
from ..lowrank.svd import HalfSVD

Bases = tuple[HalfSVD, ...]


class BasisStore:
    """Keeps bases for whoever holds what :meth:`keep` returned; may be used from several threads.

    Args:
        memory_gb: held in memory; what comes later goes to files in a temporary directory (``TMPDIR`` says where), which
            is removed with the store, or by the next one if the process is killed.
        journal: takes files in its place, which stay until what they are for is encoded.
    """

    def __init__(self, memory_gb: float, journal: Journal | None = None):
        self._left = memory_gb * 2**30
        self._journal = journal
        self._lock = threading.Lock()
        self._count = itertools.count()
        self._scratch: Scratch | None = None
        self._files: dict[str, set[Path]] = {}

    def keep(self, bases: Bases) -> "KeptBases":
        """Hold bases until the result is gone, or was taken."""
        size = sum(b.vectors.nbytes + b.S.nbytes for b in bases)
        with self._lock:
            fits = size <= self._left
            if fits:
                self._left -= size
            elif self._scratch is None and self._journal is None:
                self._scratch = Scratch()
        if fits:
            return KeptBases(bases, None, partial(self._give_back, size))
        file = self._written(bases)
        if self._journal is not None:
            return KeptBases(None, file)
        return KeptBases(None, file, partial(file.unlink, missing_ok=True))

    def lasting(self, kept: "KeptBases") -> Path:
        """The file of the journal that holds bases; they are written there if they are in memory."""
        return kept._file or self._written(kept._bases)

    def lay(self, name: str, files: Iterable[Path]) -> None:
        """Note files of the journal that hold bases of a matrix."""
        with self._lock:
            self._files.setdefault(name, set()).update(files)

    def encoded(self, name: str) -> None:
        """The bases of a matrix are not needed any more."""
        with self._lock:
            files = self._files.pop(name, ())
        for file in files:
            file.unlink(missing_ok=True)

    def _written(self, bases: Bases) -> Path:
        if self._journal is None:
            file = self._scratch.path / f"{next(self._count)}.safetensors"
        else:
            file = self._journal.new_file()
        save_file(_tensors(bases), file)
        return file

    def _give_back(self, size: int) -> None:
        with self._lock:
            self._left += size


class KeptBases:
    """Bases that a store holds; on the rank that decomposed the matrix, which also encodes it.

    Args:
        release: frees their place, once they are taken or nobody holds them any more.
    """

    def __init__(
        self,
        bases: Bases | None,
        file: Path | None,
        release: Callable[[], None] = lambda: None,
    ):
        self._bases, self._file = bases, file
        self._released = weakref.finalize(self, release)
        # at the end of the process there is nothing to give back
        self._released.atexit = False

    def __reduce__(self):
        """On another rank, which does not encode this matrix, they are not there."""
        return KeptBases, (None, None)

    def load(self) -> Bases:
        """The bases, which stay where they are."""
        if self._bases is not None:
            return self._bases
        found = load_file(self._file)
        return tuple(
            HalfSVD(found[f"{i}.vectors"], found[f"{i}.S"], float(found[f"{i}.tail"]))
            for i in range(len(found) // 3)
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
        tensors[f"{i}.vectors"] = basis.vectors.contiguous().cpu()
        tensors[f"{i}.S"] = basis.S.contiguous().cpu()
        tensors[f"{i}.tail"] = torch.tensor(basis.tail_energy, dtype=torch.float64)
    return tensors
