"""Directories and files that appear whole or not at all.

A merged model is a directory: ``model.safetensors`` (in shards above some size, with an index), ``config.json`` and a model
card.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIG = "config.json"


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


def write_json(path: Path, value: Any) -> None:
    """Written beside and renamed."""
    beside = path.with_suffix(path.suffix + ".tmp")
    beside.write_text(json.dumps(value, indent=1, sort_keys=False) + "\n")
    os.replace(beside, path)
