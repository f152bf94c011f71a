"""The writers of stored deltas: pieces of one tensor each, written as they are made, and the shards that are cut of them.

Shards are cut by the order of the tensors, not by who was ready when, so that files are the same to the byte however many
threads and processes made them.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..deltas.base import Delta
from ..deltas.grouped import apart
from ..deltas.sink import EncodedTensor, Experts, Shared, batched
from ..distributed.ranks import ALONE, Ranks
from ..files import file_digest
from .deltas import GROUPED, entry_of, read_deltas, written_by
from .directory import write_json
from .journal import ENCODED, Journal
from .tensors import independent

#: Pieces are put together to shards of this size; what is larger is a shard by itself.
SHARD_BYTES = 2**27
#: Shards of a model that is in memory anyway.
MAX_SHARD = 5 * 10**9
#: The file of weights, and what says where each tensor is if there are several.
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Piece:
    """One tensor of all tasks as it lies in a file of its own.

    Args:
        entries: of its deltas in the manifest.
        keys: of what is stored, in this order.
        size: bytes of that.
        file: None where nothing is stored.
        digest: SHA-256 of the file.
        errors: (T,) squared, of what is not reproduced; None where it was not measured.
    """

    entries: list[dict[str, Any]]
    keys: list[str]
    size: int
    file: Path | None = None
    digest: str = ""
    errors: Tensor | None = None


class DeltaWriter:
    """A :class:`~fusion_bench_didi.deltas.sink.Sink` that writes every tensor at once, in the thread that made it.

    Args:
        directory: exists, for all ranks; gets ``model.safetensors``, or shards and their index. None where the model is written
            later: its tensors stay mapped from the journal until then.
        tasks: in the order of ``EncodedTensor.experts``.
        journal: where tensors wait for their shard, those of earlier runs too.

    Attributes:
        manifest: what :func:`~.deltas.read_deltas` needs, once it is closed.
    """

    def __init__(self, directory: Path | None, tasks: Sequence[str], journal: Journal):
        self.manifest: dict[str, Any] = {}
        self._tasks = list(tasks)
        self._directory, self._journal = directory, journal
        self._pieces: dict[str, Piece] = {}

    def put(self, tensor: EncodedTensor) -> None:
        owners = zip(
            (None, *self._tasks), (tensor.shared, *tensor.experts), strict=True
        )
        entries, tensors = _listed((owner, tensor.name, d) for owner, d in owners)
        size, file, digest = sum(t.nbytes for t in tensors.values()), None, ""
        if tensors:
            file = self._journal.new_file()
            digest = _write(file, tensors)
        errors = tensor.errors
        piece = Piece(entries, list(tensors), size, file, digest, errors)
        told = None if errors is None else errors.tolist()
        facts = {"entries": entries, "keys": piece.keys, "size": size, "errors": told}
        self._journal.done(ENCODED, tensor.name, file=file, digest=digest, facts=facts)
        self._pieces[tensor.name] = piece

    def recall(self, name: str) -> Piece | None:
        line = self._journal.find(ENCODED, name)
        if line is None:
            self._journal.begin(ENCODED, name)
            return None
        told = dict(line.facts)
        if told["errors"] is not None:
            told["errors"] = torch.tensor(told["errors"], dtype=torch.float64)
        piece = Piece(**told, file=line.file, digest=line.digest)
        self._pieces[name] = piece
        return piece

    def close(
        self, order: Sequence[str], ranks: Ranks = ALONE
    ) -> tuple[Shared, Experts]:
        """Put the pieces of all ranks together to shards, and map all of it; every rank writes some."""
        found = ranks.gathered(self._pieces)
        pieces = [found[name] for name in order if name in found]
        entries = [entry for piece in pieces for entry in piece.entries]
        if self._directory is None:
            files = {piece.file.name: piece.digest for piece in pieces if piece.file}
            self.manifest = _manifest(self._tasks, entries, files)
            return read_deltas(self._journal.path, self.manifest, verify=False)
        stored = [piece for piece in pieces if piece.file]
        shards = batched(stored, lambda piece: piece.size, SHARD_BYTES)
        names = _names(len(shards))
        mine = list(zip(names, shards))[ranks.rank :: ranks.size]
        digests = ranks.gathered({name: self._shard(name, s) for name, s in mine})
        files = {name: digests[name] for name in names}
        self.manifest = _manifest(self._tasks, entries, files)
        if ranks.leads:
            keys = [[key for piece in shard for key in piece.keys] for shard in shards]
            total = sum(piece.size for piece in stored)
            _write_index(self._directory, names, keys, total)
        return read_deltas(self._directory, self.manifest, verify=False)

    def _shard(self, name: str, pieces: Sequence[Piece]) -> str:
        """Write one shard; returns its SHA-256."""
        file = self._directory / name
        if len(pieces) == 1:
            try:
                os.link(pieces[0].file, file)
            except OSError:  # the file system has no second names
                shutil.copyfile(pieces[0].file, file)
            return pieces[0].digest
        tensors: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for piece in pieces:
                held = stack.enter_context(safe_open(piece.file, framework="pt"))
                tensors |= {key: held.get_tensor(key) for key in piece.keys}
            return _write(file, tensors)


def write_deltas(
    directory: Path,
    shared: Mapping[str, Delta],
    experts: Mapping[str, Mapping[str, Delta]],
) -> dict[str, Any]:
    """Write all deltas of a model in memory; returns the manifest for :func:`~.deltas.read_deltas`."""
    common, own, groups = apart(experts)
    deltas = [(None, name, delta) for name, delta in shared.items()]
    deltas += [(None, name, delta, label) for (label, name), delta in common.items()]
    for task, some in own.items():
        deltas += [(task, name, delta) for name, delta in some.items()]
    shards = batched(deltas, lambda one: one[2].bits // 8, MAX_SHARD)
    names, digests, keys, entries = _names(len(shards)), {}, [], []
    for name, shard in zip(names, shards):
        told, tensors = _listed(shard)
        entries += told
        keys.append(list(tensors))
        digests[name] = _write(directory / name, tensors)
    total = sum(delta.bits for _, _, delta, *_ in deltas) // 8
    _write_index(directory, names, keys, total)
    manifest = _manifest(list(experts), entries, digests)
    return {**manifest, **({"groups": groups, "format": GROUPED} if groups else {})}


def _listed(
    deltas: Iterable[tuple],
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Entries of the manifest, and tensors by key, of deltas behind their tasks and tensors' names; labels of groups may follow."""
    entries, tensors = [], {}
    places: set[int] = set()
    for task, name, delta, *group in deltas:
        if delta is None:
            continue
        entry = entry_of(task, name, delta, *group)
        entries.append(entry)
        for part, value in delta.tensors().items():
            value = independent(value)
            if value.nbytes and value.data_ptr() in places:
                value = value.clone()  # several tasks may hold one tensor
            places.add(value.data_ptr())
            tensors[f"{entry['key']}.{part}"] = value
    return entries, tensors


def _names(count: int) -> list[str]:
    """Files of so many shards."""
    if count == 1:
        return [_SINGLE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _manifest(
    tasks: list[str], entries: list, files: Mapping[str, str]
) -> dict[str, Any]:
    return {"tasks": tasks, "deltas": entries, "files": files}


def _write_index(
    directory: Path, names: Sequence[str], keys: Sequence[Sequence[str]], total: int
) -> None:
    """Where each tensor is, if there are several files."""
    if len(names) > 1:
        where = {key: name for name, held in zip(names, keys) for key in held}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(directory / _INDEX, index)


def _write(file: Path, tensors: dict[str, Tensor]) -> str:
    """Write a shard or a piece, which says who wrote it; its SHA-256."""
    save_file(tensors, file, metadata=written_by())
    return file_digest(file)
