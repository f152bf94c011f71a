"""Where stored deltas go while a merge runs: into memory, or to disk behind the arithmetic."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import entry_of, file_digest, independent, read_deltas
from .deltas import Delta

#: Deltas wait in memory up to this size before they are written.
SHARD_BYTES = 2**27

Shared = Mapping[str, Delta]
Experts = Mapping[str, Mapping[str, Delta]]


class DeltaSink(Protocol):
    """Takes deltas one by one and gives all of them back."""

    def put(self, task: str | None, name: str, delta: Delta) -> None:
        """Take the delta of a tensor; ``task`` None for the shared part."""

    def close(self) -> tuple[Shared, Experts]:
        """All deltas, shared and by task."""


class InMemory:
    """Keeps deltas as they are."""

    def __init__(self, tasks: tuple[str, ...]):
        self._shared: dict[str, Delta] = {}
        self._experts: dict[str, dict[str, Delta]] = {task: {} for task in tasks}

    def put(self, task: str | None, name: str, delta: Delta) -> None:
        (self._shared if task is None else self._experts[task])[name] = delta

    def close(self) -> tuple[Shared, Experts]:
        return self._shared, self._experts


class OnDisk:
    """Writes deltas to shards of a directory from a thread of its own; they come back mapped from there, not loaded.

    Args:
        directory: exists; gets ``model-00001.safetensors``, ...
        tasks: in the order of the manifest.
    """

    def __init__(self, directory: Path, tasks: tuple[str, ...]):
        self._directory = directory
        self._tensors: dict[str, Tensor] = {}
        self._size = 0
        self._writer = ThreadPoolExecutor(1)
        self._pending: Future | None = None
        #: What :func:`~fusion_bench_didi.checkpoint.read_deltas` needs.
        self.manifest: dict[str, Any] = {
            "tasks": list(tasks),
            "deltas": [],
            "files": {},
        }

    def put(self, task: str | None, name: str, delta: Delta) -> None:
        entry = entry_of(task, name, delta)
        self.manifest["deltas"].append(entry)
        for part, value in delta.tensors().items():
            self._tensors[f"{entry['key']}.{part}"] = independent(value)
            self._size += value.nbytes
        if self._size >= SHARD_BYTES:
            self._flush()

    def close(self) -> tuple[Shared, Experts]:
        self._flush()
        self._wait()
        self._writer.shutdown()
        return read_deltas(self._directory, self.manifest)

    def _flush(self) -> None:
        self._wait()
        if self._tensors:
            number = len(self.manifest["files"]) + 1
            file = self._directory / f"model-{number:05d}.safetensors"
            self.manifest["files"][file.name] = ""
            self._pending = self._writer.submit(self._write, file, self._tensors)
            self._tensors, self._size = {}, 0

    def _write(self, file: Path, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, file, metadata={"format": "pt"})
        self.manifest["files"][file.name] = file_digest(file)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None
