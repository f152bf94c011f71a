"""The one writer of stored deltas: shards that are written behind the arithmetic, and mapped from there afterwards."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..deltas.base import Delta
from ..deltas.sink import EncodedTensor, Experts, Shared
from .deltas import entry_of, read_deltas
from .directory import write_json
from .tensors import file_digest, independent

#: Deltas of a merge wait in memory up to this size before they are written.
SHARD_BYTES = 2**27
#: Shards of a model that is in memory anyway.
MAX_SHARD = 5 * 10**9
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class DeltaWriter:
    """A :class:`~fusion_bench_didi.deltas.sink.Sink` that writes to a directory from a thread of its own.

    As a context: left by an error, it waits for the shard that is being written, and writes no other.

    Args:
        directory: exists; gets ``model.safetensors``, or shards and their index.
        tasks: in the order of ``EncodedTensor.experts``.
        shard_bytes: what waits in memory at most.

    Attributes:
        manifest: what :func:`~.deltas.read_deltas` needs, once it is closed.
    """

    def __init__(
        self, directory: Path, tasks: Sequence[str], *, shard_bytes: int | None = None
    ):
        self.manifest: dict[str, Any] = {
            "tasks": list(tasks),
            "deltas": [],
            "files": {},
        }
        self._directory = directory
        self._limit = SHARD_BYTES if shard_bytes is None else shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._places: set[int] = set()
        self._size = 0
        self._shards: list[tuple[Path, list[str], int]] = []
        self._digests: list[Future[str]] = []
        self._thread = ThreadPoolExecutor(1)

    def put(self, tensor: EncodedTensor) -> None:
        tasks = (None, *self.manifest["tasks"])
        deltas = (tensor.shared, *tensor.experts)
        for task, delta in zip(tasks, deltas, strict=True):
            if delta is not None:
                self.put_delta(task, tensor.name, delta)

    def put_delta(self, task: str | None, name: str, delta: Delta) -> None:
        """Take one delta; ``task`` None for the shared part."""
        entry = entry_of(task, name, delta)
        self.manifest["deltas"].append(entry)
        for part, value in delta.tensors().items():
            value = independent(value)
            if value.nbytes and value.data_ptr() in self._places:
                value = value.clone()  # several tasks may hold one tensor
            self._places.add(value.data_ptr())
            self._waiting[f"{entry['key']}.{part}"] = value
            self._size += value.nbytes
        if self._size >= self._limit:
            self._flush()

    def close(self) -> tuple[Shared, Experts]:
        """Write what waits, name the shards, and map all of it."""
        self.finish()
        return read_deltas(self._directory, self.manifest, verify=False)

    def finish(self) -> dict[str, Any]:
        """Write what waits and name the shards; the manifest."""
        self._flush()
        digests = [digest.result() for digest in self._digests]
        count, weight_map, total = len(self._shards), {}, 0
        for i, ((file, names, size), digest) in enumerate(zip(self._shards, digests)):
            final = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            final = _SINGLE if count == 1 else final
            os.replace(file, self._directory / final)
            self.manifest["files"][final] = digest
            weight_map.update(dict.fromkeys(names, final))
            total += size
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(self._directory / _INDEX, index)
        return self.manifest

    def __enter__(self) -> "DeltaWriter":
        return self

    def __exit__(self, *error) -> None:
        self._waiting = {}
        self._thread.shutdown(cancel_futures=True)

    def _flush(self) -> None:
        if self._digests:
            self._digests[-1].result()  # never more than one shard waits for the disk
        if self._waiting:
            file = self._directory / f"shard-{len(self._shards)}.safetensors"
            self._shards.append((file, list(self._waiting), self._size))
            self._digests.append(self._thread.submit(_write, file, self._waiting))
            self._waiting, self._places, self._size = {}, set(), 0


def write_deltas(
    directory: Path,
    shared: Mapping[str, Delta],
    experts: Mapping[str, Mapping[str, Delta]],
) -> dict[str, Any]:
    """Write all deltas; returns the manifest for :func:`~.deltas.read_deltas`."""
    with DeltaWriter(directory, list(experts), shard_bytes=MAX_SHARD) as writer:
        for task, deltas in ((None, shared), *experts.items()):
            for name, delta in deltas.items():
                writer.put_delta(task, name, delta)
        return writer.finish()


def _write(file: Path, tensors: dict[str, Tensor]) -> str:
    """Write a shard; its SHA-256."""
    save_file(tensors, file, metadata={"format": "pt"})
    return file_digest(file)
