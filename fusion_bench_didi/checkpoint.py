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
from torch import Tensor, nn

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


def write_deltas(
    directory: Path,
    shared: Mapping[str, Delta],
    experts: Mapping[str, Mapping[str, Delta]],
) -> dict[str, Any]:
    """Write all deltas; returns the manifest for :func:`read_deltas`."""
    tensors: dict[str, Tensor] = {}
    entries = []
    owners = [(None, SHARED, shared)]
    owners += [(task, f"experts/{task}", deltas) for task, deltas in experts.items()]
    for task, prefix, deltas in owners:
        for name, delta in deltas.items():
            # tensor names hold dots, tasks may; a slash keeps "t" + "a.b" and "t.a" + "b" apart
            key = f"{prefix}/{name}"
            entries.append(
                {
                    "task": task,
                    "tensor": name,
                    "kind": delta.kind,
                    "shape": list(delta.shape),
                    "key": key,
                    "options": delta.options(),
                }
            )
            for part, value in delta.tensors().items():
                tensors[f"{key}.{part}"] = value.contiguous().cpu()
    save_torch_state_dict(tensors, directory, max_shard_size=MAX_SHARD)
    files = sorted(directory.glob("*.safetensors"))
    return {
        "tasks": list(experts),
        "deltas": entries,
        "files": {f.name: _sha256(f) for f in files},
    }


def read_deltas(
    directory: Path, manifest: Mapping[str, Any]
) -> tuple[dict[str, Delta], dict[str, dict[str, Delta]]]:
    """Read back what :func:`write_deltas` wrote.

    Raises:
        CheckpointMismatchError: for a missing, truncated or altered file.
    """
    where: dict[str, Any] = {}
    for file, digest in manifest["files"].items():
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
        if _sha256(path) != digest:
            raise CheckpointMismatchError(
                f"{path} was altered after it was written: its SHA-256 differs from config.json's. Copy or write it again."
            )
        where.update(dict.fromkeys(handle.keys(), handle))
    shared: dict[str, Delta] = {}
    experts: dict[str, dict[str, Delta]] = {task: {} for task in manifest["tasks"]}
    for entry in manifest["deltas"]:
        cls = KINDS[entry["kind"]]
        parts = {}
        for part in cls.parts:
            key = f"{entry['key']}.{part}"
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


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, shapes and up to 256 evenly spaced values per tensor: tells backbones apart at no cost."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)][:256].double().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def load_backbone(reference: Mapping[str, Any]) -> nn.Module:
    """The base model that a saved configuration names.

    Raises:
        DiDiError: if the reference tells no place to load it from.
    """
    from fusion_bench.utils import import_object, instantiate

    source = reference["source"]
    if isinstance(source, str):
        return import_object(reference["class"]).from_pretrained(source)
    if isinstance(source, Mapping):
        return instantiate(source)
    raise DiDiError(
        f"The saved model does not say where its backbone ({reference['class']}) lies: it was merged from modules in "
        "memory. Pass backbone=<the base model> to from_pretrained."
    )


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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
