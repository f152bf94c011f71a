"""Patches: the positions of a base model's tensors at which a task's differ, and the values there.

One safetensors file per task. For a tensor ``NAME`` it holds ``NAME.indices`` (int32 positions in the flattened tensor,
ascending; int64 beyond 2^31 entries) and ``NAME.values`` in the base model's type, or the whole tensor as ``NAME`` where
that is smaller. Names are those of the base model's state dict, tied tensors under their first. Values take the place of the
base model's, nothing is added, so that the result is exact. The header says ``sparse``, ``sparsity``, ``changed_params``
(JSON), ``own`` (JSON, whole tensors of another shape or type than the base model's), ``tied`` (JSON, the other names of tensors
among them), ``base``, ``base_digest`` of the tensors that are patched, and ``digest`` of those in the file.
This is the form of delta weight updates that TRL describes and vLLM's ``load_checkpoint_weight_patches`` takes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint.tensors import independent
from ..errors import CheckpointMismatchError
from ..models.dynamic import DynamicModel
from ..pools.file_layouts import holds_other_names
from ..task_vectors.digests import digests
from ..task_vectors.ties import tied_names
from .checks import bits, check_equal
from .common import (
    asked_tasks,
    base_model,
    export_directory,
    folder,
    source_of,
    write_report,
)
from .plain import untied
from .report import Carried, ExportReport

INDICES, VALUES = ".indices", ".values"
_TRANSLATED = "names are those of the state dict of {}; its checkpoints hold tensors under others, which readers of checkpoint names need."
_LARGEST = torch.iinfo(torch.int32).max
_INTEGERS = (torch.int32, torch.int64)


def to_patch(
    model: DynamicModel,
    directory: str | Path,
    *,
    tasks: Sequence[str] | str | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a patch per task, ``directory/TASK.safetensors``.

    Each is applied to the base model again and gives, bit for bit, ``materialize``.

    Args:
        tasks: all if None.
        base: the name that patches give the base model; where the merge took it from if None.

    Raises:
        UnknownTaskError: for tasks that the model does not hold.
        FileExistsError: if the directory exists and ``overwrite`` is false, or it is no export, or other weights lie in it.
    """
    asked, source = asked_tasks(model, tasks), source_of(model, base)
    plain = base_model(model)
    before, aliases = untied(plain), tied_names(plain)
    tensors: dict[str, dict[str, Carried]] = {}
    sizes = {}
    with export_directory(directory, overwrite=overwrite) as (place, final):
        sums = digests({name: before[name] for name in model.touched})
        for task in asked:
            whole = model.materialize(task)
            file = place / f"{folder(task)}.safetensors"
            after = whole.state_dict()
            tensors[task] = _write(file, before, after, sums, source, aliases)
            found = patched(file, plain.state_dict(), sums=sums)
            check_equal(found, whole, f"The patch of {task}")
            sizes[task] = file.stat().st_size
        notes = ()
        if holds_other_names(plain):
            notes = (_TRANSLATED.format(type(model.backbone).__name__),)
        report = ExportReport("patch", str(final), tensors, sizes, notes=notes)
        return write_report(place, report)


def _write(
    file: Path,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    sums: Mapping[str, str],
    source: Mapping[str, str],
    aliases: Mapping[str, str],
) -> dict[str, Carried]:
    found: dict[str, Tensor] = {}
    carried: dict[str, Carried] = {}
    changed, entries = 0, sum(after[name].numel() for name in sums)
    for name in sorted(sums):
        part, count = _difference(name, before[name], after[name])
        found |= part
        changed += count
        how = "base" if not part else "whole" if name in part else "sparse"
        carried[name] = Carried(how)
    names = [name for name, one in carried.items() if one.how != "base"]
    own = [name for name in names if not _alike(before[name], after[name])]
    tied = {n: [a for a, first in aliases.items() if first == n] for n in names}
    header = {
        "format": "pt",
        "sparse": "True",
        "sparsity": f"{1 - changed / max(entries, 1):.6f}",
        "changed_params": json.dumps(names),
        "own": json.dumps(own),
        "tied": json.dumps({name: others for name, others in tied.items() if others}),
        "base": source.get("place", ""),
        "base_digest": digest_of({name: sums[name] for name in names}),
        "digest": digest_of(digests(found)),
    }
    save_file(found, file, metadata=header)
    return carried


def _difference(
    name: str, before: Tensor, after: Tensor
) -> tuple[dict[str, Tensor], int]:
    """Tensors that a patch holds for one tensor, and how many of its entries change."""
    if not _alike(before, after):
        return {name: independent(after)}, after.numel()
    different = (bits(before) != bits(after)).flatten()
    index = different.nonzero().squeeze(1)
    if not len(index):
        return {}, 0
    index = index.to(torch.int32) if after.numel() <= _LARGEST else index
    sparse = len(index) * (index.element_size() + after.element_size())
    if sparse >= after.numel() * after.element_size():
        return {name: independent(after)}, len(index)
    values = after.detach().cpu().flatten()[index.long()]
    return {name + INDICES: index, name + VALUES: values}, len(index)


def _alike(before: Tensor, after: Tensor) -> bool:
    return before.shape == after.shape and before.dtype == after.dtype


def digest_of(sums: Mapping[str, str]) -> str:
    """SHA-256 of tensors, of which there are checksums by name."""
    return hashlib.sha256(json.dumps(sorted(sums.items())).encode()).hexdigest()


def patched(
    file: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    sums: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """A state dict with a patch applied; tensors that it does not change are the same objects.

    Args:
        tensors: of the base model; where it has other names of a tied tensor, they are given the same values.
        sums: their checksums, where they were taken before.

    Raises:
        CheckpointMismatchError: if they are not those that the patch is of, or the file is no patch, or not as it was written.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            parts = {name: opened.get_tensor(name) for name in opened.keys()}
        names = _texts("changed_params", json.loads(header["changed_params"]))
        own = _texts("own", json.loads(header.get("own", "[]")))
        tied = _texts_by_name("tied", json.loads(header.get("tied", "{}")))
        digest = header["base_digest"]
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise CheckpointMismatchError(
            f"{file} is no patch as to_patch writes it ({type(error).__name__}: {error}). Export it again."
        ) from error
    if fault := _form_fault(names, parts):
        raise _damaged(file, fault)
    missing = [name for name in names if name not in tensors]
    if not missing and sums is None:
        sums = digests({name: tensors[name] for name in names})
    if missing or digest_of({name: sums[name] for name in names}) != digest:
        what = f"they lack {missing[0]}" if missing else "their values differ"
        raise CheckpointMismatchError(
            f"{file} is a patch of {header.get('base') or 'another base model'}, not of the tensors given: {what}. Give that "
            "model's, in the type that it was exported with."
        )
    for name in names:
        if name in own and name in parts:
            continue
        given, kept = tensors[name], parts.get(name, parts.get(name + VALUES))
        if kept.dtype != given.dtype:
            raise CheckpointMismatchError(
                f"{file} holds {name} in {kept.dtype}, and the tensor given is in {given.dtype}. Give the base model's tensors in "
                f"{kept.dtype} if that is the type that it was exported with; otherwise export it again."
            )
        if fault := _fault(name, given, parts):
            raise _damaged(file, fault)
    if "digest" in header and digest_of(digests(parts)) != header["digest"]:
        raise _damaged(file, "its values are not those of the digest in its header")
    found = {name: _patched(name, tensors[name], parts) for name in names}
    others = {o: found[n] for n in names for o in tied.get(n, ()) if o in tensors}
    return {**tensors, **found, **others}


def _damaged(file: str | Path, fault: str) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"{file} is not as to_patch wrote it: {fault}. Export it again."
    )


def _texts(key: str, value: Any) -> list[str]:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    raise ValueError(f"{key} is {value!r:.80}, expected a list of texts")


def _texts_by_name(key: str, value: Any) -> dict[str, list[str]]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r:.80}, expected lists of texts by name")
    return {name: _texts(f"{key} of {name}", one) for name, one in value.items()}


def _form_fault(names: Sequence[str], parts: Mapping[str, Tensor]) -> str:
    """What keeps parts from being one form of every tensor, and nothing else; empty if nothing does."""
    left = set(parts)
    for name in names:
        sparse = {name + INDICES, name + VALUES}
        found = parts.keys() & {name, *sparse}
        if found not in ({name}, sparse):
            return f"of {name} it holds {sorted(found)}, expected [{name!r}] or {sorted(sparse)}"
        left -= found
    return f"{min(left)} is of none of changed_params" if left else ""


def _fault(name: str, before: Tensor, parts: Mapping[str, Tensor]) -> str:
    """What keeps the parts of one tensor from taking the place of the base model's; empty if nothing does."""
    if name in parts:
        found, expected = tuple(parts[name].shape), tuple(before.shape)
        if found == expected:
            return ""
        return f"{name} has the shape {found}, the base model's tensor {expected}"
    index, values = parts[name + INDICES], parts[name + VALUES]
    if index.dtype not in _INTEGERS or index.dim() != 1:
        return f"{name}{INDICES} is {index.dtype} with {index.dim()} dimensions, expected whole numbers with one"
    if values.shape != index.shape:
        return f"{name}{VALUES} has the shape {tuple(values.shape)}, its indices {tuple(index.shape)}"
    if not bool((index[1:] > index[:-1]).all()):
        return f"{name}{INDICES} do not ascend"
    if len(index) and not 0 <= int(index[0]) <= int(index[-1]) < before.numel():
        return f"{name}{INDICES} go from {int(index[0])} to {int(index[-1])}, the base model's tensor has {before.numel()} entries"
    return ""


def _patched(name: str, before: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    if name in parts:
        return parts[name].to(before.device)
    after = before.detach().clone().flatten()
    index, values = (parts[name + part].to(after.device) for part in (INDICES, VALUES))
    after[index.long()] = values
    return after.view(before.shape)
