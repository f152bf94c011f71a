"""The manifest of a merged model: every stored delta by kind, shape and place, and the SHA-256 of every weight file.

Nothing is parsed out of tensor names, and a damaged file is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..deltas.base import Delta
from ..deltas.kinds import KINDS
from ..errors import CheckpointMismatchError, DiDiError
from .directory import CONFIG
from .tensors import open_tensors

FORMAT = 1


SHARED = "shared"


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
    directory: Path, manifest: Mapping[str, Any], *, verify: bool = True
) -> tuple[dict[str, Delta], dict[str, dict[str, Delta]]]:
    """Read back what a :class:`~.stream.DeltaWriter` wrote.

    Args:
        verify: hold every file against its SHA-256.

    Raises:
        CheckpointMismatchError: for a missing, truncated or altered file.
    """
    where = open_tensors(directory, manifest["files"], verify=verify)
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
