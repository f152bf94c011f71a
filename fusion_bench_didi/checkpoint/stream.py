"""Where stored deltas go while a merge runs: into memory, or to disk behind the arithmetic."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..deltas.base import Delta
from ..deltas.sink import Experts, Shared
from .deltas import entry_of, read_deltas
from .tensors import file_digest, independent

#: Deltas wait in memory up to this size before they are written.
SHARD_BYTES = 2**27


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
