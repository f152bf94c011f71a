"""Files that appear whole or not at all.

A merged model is a directory: ``model.safetensors`` (in shards above 5 GB, with an index), ``config.json`` and a model
card. The configuration lists every stored delta, so that nothing is parsed out of tensor names, and the SHA-256 of every
weight file, so that a damaged file is refused.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .deltas import Delta
from .errors import CheckpointMismatchError, DiDiError
from .kinds import KINDS

FORMAT = 1
SHARED = "shared"
CONFIG = "config.json"
MAX_SHARD = "5GB"


@contextmanager
def whole_directory(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A directory to write into that takes its name only when the block ends well.

    Raises:
        FileExistsError: if the target exists and ``overwrite`` is false; nothing is touched.
    """
    target = Path(target).absolute()
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"{target} exists. Choose another directory, or pass overwrite=True "
            "(merged_model_save_kwargs.overwrite=true on the command line)."
        )
    if target.exists() and any(target.iterdir()) and not (target / CONFIG).is_file():
        raise FileExistsError(
            f"{target} exists and is no saved model (it holds no {CONFIG}), so it is not overwritten. Choose another directory."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(
        tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    )
    try:
        yield beside
        _open_up(beside)
        old = None
        if target.exists():
            old = beside.with_suffix(".old")
            os.rename(target, old)
        try:
            os.rename(beside, target)
        except BaseException:
            if old is not None:
                os.rename(old, target)
            raise
        if old is not None:
            shutil.rmtree(old)
    finally:
        if beside.exists():
            shutil.rmtree(beside)


def _open_up(directory: Path) -> None:
    """Temporary files are private; what they become has the rights of any new file."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(directory, 0o777 & ~umask)
    for file in directory.rglob("*"):
        os.chmod(file, (0o777 if file.is_dir() else 0o666) & ~umask)


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write tensors as they are; nothing is written for none.

    Returns:
        SHA-256 by file name, for :func:`open_tensors`.
    """
    save_torch_state_dict(
        {name: independent(value) for name, value in tensors.items()},
        directory,
        max_shard_size=MAX_SHARD,
    )
    files = sorted(directory.glob("*.safetensors"))
    return {file.name: file_digest(file) for file in files}


def open_tensors(directory: Path, files: Mapping[str, str]) -> dict[str, Any]:
    """What :func:`write_tensors` wrote: by tensor name the open file, whose ``get_tensor(name)`` reads it.

    Raises:
        CheckpointMismatchError: for a missing, truncated or altered file.
    """
    where: dict[str, Any] = {}
    for file, digest in files.items():
        path = directory / file
        if not path.is_file():
            raise CheckpointMismatchError(
                f"{path} is missing; config.json lists it. Copy the whole directory."
            )
        try:
            handle = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CheckpointMismatchError(
                f"{path} is not a whole safetensors file ({error}). Copy or write it again."
            ) from error
        if file_digest(path) != digest:
            raise CheckpointMismatchError(
                f"{path} was altered after it was written: its SHA-256 differs from config.json's. Copy or write it again."
            )
        where.update(dict.fromkeys(handle.keys(), handle))
    return where


def independent(value: Tensor) -> Tensor:
    """On the CPU, contiguous, and no view: a view of a larger tensor would be written with the whole."""
    value = value.detach().contiguous().cpu()
    whole = value.untyped_storage().nbytes() == value.nbytes
    return value if whole else value.clone()


def write_deltas(
    directory: Path,
    shared: Mapping[str, Delta],
    experts: Mapping[str, Mapping[str, Delta]],
) -> dict[str, Any]:
    """Write all deltas; returns the manifest for :func:`read_deltas`."""
    tensors: dict[str, Tensor] = {}
    entries = []
    for task, deltas in ((None, shared), *experts.items()):
        for name, delta in deltas.items():
            entry = entry_of(task, name, delta)
            entries.append(entry)
            for part, value in delta.tensors().items():
                tensors[f"{entry['key']}.{part}"] = value
    return {
        "tasks": list(experts),
        "deltas": entries,
        "files": write_tensors(directory, tensors),
    }


def entry_of(task: str | None, name: str, delta: Delta) -> dict[str, Any]:
    """A delta in the manifest; its tensors are found under ``key`` and the name of the part."""
    # tensor names hold dots, tasks may; a slash keeps "t" + "a.b" and "t.a" + "b" apart
    prefix = SHARED if task is None else f"experts/{task}"
    without = [part for part in delta.parts if getattr(delta, part) is None]
    return {
        "task": task,
        "tensor": name,
        "kind": delta.kind,
        "shape": list(delta.shape),
        "key": f"{prefix}/{name}",
        "options": delta.options(),
        **({"without": without} if without else {}),
    }


def read_deltas(
    directory: Path, manifest: Mapping[str, Any]
) -> tuple[dict[str, Delta], dict[str, dict[str, Delta]]]:
    """Read back what :func:`write_deltas` wrote.

    Raises:
        CheckpointMismatchError: for a missing, truncated or altered file.
    """
    where = open_tensors(directory, manifest["files"])
    shared: dict[str, Delta] = {}
    experts: dict[str, dict[str, Delta]] = {task: {} for task in manifest["tasks"]}
    for entry in manifest["deltas"]:
        cls = KINDS[entry["kind"]]
        parts = {}
        for part in cls.parts:
            key = f"{entry['key']}.{part}"
            if part in entry.get("without", ()):
                parts[part] = None
                continue
            if key not in where:
                raise CheckpointMismatchError(
                    f"{directory}: tensor {key} is listed in config.json and in no file. Write the model again."
                )
            parts[part] = where[key].get_tensor(key)
        delta = cls(tuple(entry["shape"]), **parts, **entry["options"])
        owner = shared if entry["task"] is None else experts[entry["task"]]
        owner[entry["tensor"]] = delta
    return shared, experts


def read_config(directory: str | Path) -> dict[str, Any]:
    """The configuration of a saved model.

    Raises:
        FileNotFoundError: if the directory holds none.
        DiDiError: if it is of a later format.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; {directory} is not a merged model saved by fusion_bench_didi."
        )
    config = json.loads(path.read_text())
    if config.get("format") != FORMAT:
        raise DiDiError(
            f"{path} is of format {config.get('format')}, this version reads {FORMAT}. Update fusion-bench-didi."
        )
    return config


def write_json(path: Path, value: Any) -> None:
    """Written beside and renamed."""
    beside = path.with_suffix(path.suffix + ".tmp")
    beside.write_text(json.dumps(value, indent=1, sort_keys=False) + "\n")
    os.replace(beside, path)


def versions() -> dict[str, str]:
    """Versions of what takes part in a result."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("fusion-bench-didi", "fusion-bench", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
