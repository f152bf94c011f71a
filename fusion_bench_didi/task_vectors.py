"""Aligned, lazy, checked reading of a base model and its T fine-tuned models, one tensor at a time.

A *source* gives tensors by the names of the base model's parameters. ``TaskVectors`` lines T sources up with the base,
finds every fault from shapes and dtypes alone, and sorts the tensors into classes:

- ``matrices``: two sides of at least 2 (a convolution is viewed as out x (in * kh * kw));
- ``vectors``: everything else that some task changed (biases, norms, class embeddings);
- ``untouched``: what no task changed; costs nothing.
"""

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .errors import CheckpointMismatchError, ModelPoolError, NonFiniteError

#: safetensors' names of floating-point types
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header tells of one tensor; ``dtype`` is None for integer and boolean types."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class TensorSource(Protocol):
    """Named tensors that are described without being read."""

    label: str

    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> Tensor: ...


class ModuleSource:
    """The parameters and floating-point buffers of a live module; tied parameters appear once."""

    def __init__(self, module: nn.Module, label: str):
        self.label = label
        kept = set(module.state_dict(keep_vars=True))
        self._tensors = {
            name: tensor.detach()
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if name in kept
        }

    def infos(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(
                tuple(t.shape), t.dtype if t.dtype.is_floating_point else None
            )
            for name, t in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class SafetensorsSource:
    """One or several safetensors files, read tensor by tensor.

    Raises:
        CheckpointMismatchError: if a file is no whole safetensors file.
    """

    def __init__(self, files: Sequence[Path], label: str):
        from safetensors import SafetensorError, safe_open

        self.label = label
        self._files: dict[str, Path] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._open = {}
        for file in files:
            try:
                self._open[file] = handle = safe_open(file, framework="pt")
                names = list(handle.keys())
            except (SafetensorError, OSError) as error:
                raise CheckpointMismatchError(
                    f"{label}: {file} is not a whole safetensors file ({error}). Download or write it again."
                ) from error
            for name in names:
                view = handle.get_slice(name)
                self._files[name] = file
                self._infos[name] = TensorInfo(
                    tuple(view.get_shape()), _DTYPES.get(view.get_dtype())
                )

    @classmethod
    def of_directory(cls, directory: Path, label: str) -> "SafetensorsSource | None":
        """The weights of a ``save_pretrained`` directory, or None if it holds no safetensors."""
        import json

        index = directory / "model.safetensors.index.json"
        if index.is_file():
            parts = set(json.loads(index.read_text())["weight_map"].values())
            return cls([directory / p for p in sorted(parts)], label)
        single = directory / "model.safetensors"
        return cls([single], label) if single.is_file() else None

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> Tensor:
        return self._open[self._files[name]].get_tensor(name)


class RenamedSource:
    """A source whose names differ from the base model's by one prefix (``vision_model.`` and the like)."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]):
        self.label = source.label
        self._source, self._names = source, names

    def infos(self) -> Mapping[str, TensorInfo]:
        infos = self._source.infos()
        return {name: infos[inner] for name, inner in self._names.items()}

    def read(self, name: str) -> Tensor:
        return self._source.read(self._names[name])


def aligned(source: TensorSource, reference: Iterable[str]) -> TensorSource:
    """The source under the reference's names, if a prefix added or dropped makes more of them meet.

    transformers writes ``vision_model.`` in front of a CLIP tower's names in some versions and not in others; a
    checkpoint of a whole CLIPModel also holds the text tower.
    """
    wanted = set(reference)
    found = list(source.infos())

    def meeting(names: Mapping[str, str]) -> int:
        return len(wanted & set(names))

    best = {name: name for name in found}
    if meeting(best) == len(wanted):
        return source
    some_wanted = sorted(wanted)
    prefixes = {name.split(".", 1)[0] + "." for name in (*found, *some_wanted)}
    for prefix in sorted(prefixes):
        dropped = {
            name.removeprefix(prefix): name for name in found if name.startswith(prefix)
        }
        added = {prefix + name: name for name in found}
        best = max(best, dropped, added, key=meeting)
    return RenamedSource(source, best)


@dataclass(frozen=True)
class Scan:
    """What one read of every tensor tells.

    Args:
        energy: per tensor, (T,) squared norms of the task vectors.
        changed: names that at least one task changed.
    """

    energy: Mapping[str, Tensor]

    @property
    def changed(self) -> list[str]:
        return [name for name, e in self.energy.items() if bool((e > 0).any())]


@dataclass(frozen=True)
class TaskVectors:
    """A base model and T fine-tuned models, aligned.

    Args:
        base: source of the base model.
        tuned: source per task.
        exclude: glob patterns of tensors left at the base model's value.
        as_vectors: glob patterns of 2-D tensors stored whole like vectors.
        ignored: tensors that the base checkpoint holds but the base model does not load (the text tower of a whole
            CLIPModel, say); fine-tuned checkpoints may hold them too.

    Raises:
        ModelPoolError: for fewer than two tasks.
        CheckpointMismatchError: listing every missing, extra, wrongly shaped or wrongly typed tensor of every
            checkpoint; nothing but headers has been read then.
    """

    base: TensorSource
    tuned: Mapping[str, TensorSource]
    exclude: tuple[str, ...] = ()
    as_vectors: tuple[str, ...] = ()
    ignored: frozenset[str] = frozenset()
    _sources: Mapping[str, TensorSource] = field(init=False, repr=False)

    def __post_init__(self):
        if len(self.tuned) < 2:
            raise ModelPoolError(
                f"Merging needs at least two fine-tuned models, the pool has {len(self.tuned)}: "
                f"{list(self.tuned)}. Add models to modelpool.models."
            )
        reference = self._floating(self.base)
        sources = {
            task: aligned(source, reference) for task, source in self.tuned.items()
        }
        object.__setattr__(self, "_sources", sources)
        self._check(reference)

    @property
    def tasks(self) -> list[str]:
        return list(self.tuned)

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """The mergeable tensors: floating point, not excluded, held by the fine-tuned checkpoints; sorted by name."""
        held = set().union(*(source.infos() for source in self._sources.values()))
        return {
            name: info
            for name, info in sorted(self._floating(self.base).items())
            if name in held and not _matches(name, self.exclude)
        }

    def ordered(self, tasks: Sequence[str]) -> "TaskVectors":
        """The same with tasks in the given order."""
        return replace(self, tuned={task: self.tuned[task] for task in tasks})

    def tuned_dtype(self, name: str) -> torch.dtype:
        """The type in which the first fine-tuned checkpoint that holds the tensor stores it."""
        for task in self.tasks:
            info = self._sources[task].infos().get(name)
            if info is not None and info.dtype is not None:
                return info.dtype
        return self.infos[name].dtype

    def is_matrix(self, name: str) -> bool:
        m, n = matrix_shape(self.infos[name].shape)
        return min(m, n) >= 2 and not _matches(name, self.as_vectors)

    def read_base(self, name: str) -> Tensor:
        return self.base.read(name)

    def read_tuned(self, name: str, task: str) -> Tensor:
        return self._sources[task].read(name)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """All task vectors of one tensor in float32, (T, *shape)."""
        base = self.base.read(name).to(device, torch.float32)
        return torch.stack(
            [
                self.read_tuned(name, task).to(device, torch.float32) - base
                for task in self.tasks
            ]
        )

    def scan(self, device: torch.device | str = "cpu") -> Scan:
        """Read everything once: finite? changed? how much?

        Raises:
            NonFiniteError: naming every task and tensor with NaN or infinity.
            ModelPoolError: if no task differs from the base model.
        """
        energy, faults = {}, []
        for name in self.infos:
            task_vectors = self.read(name, device)
            flat = task_vectors.reshape(len(task_vectors), -1)
            energy[name] = flat.double().square().sum(1).cpu()
            if not bool(energy[name].isfinite().all()):
                faults += self._non_finite(name)
        if faults:
            raise NonFiniteError(
                "Some checkpoints hold NaN or infinity:\n  "
                + "\n  ".join(faults)
                + "\nFix or leave out these models; a single tensor can be left out with method.exclude=[...]."
            )
        scan = Scan(energy)
        if not scan.changed:
            raise ModelPoolError(
                f"All task vectors are zero: {', '.join(self.tasks)} equal the base model {self.base.label} in every "
                "tensor. Check that the pool does not load the base weights for every task."
            )
        return scan

    def _non_finite(self, name: str) -> list[str]:
        if not bool(self.read_base(name).float().isfinite().all()):
            return [f"the base model {self.base.label}: {name}"]
        faults = []
        for task in self.tasks:
            bad = ~self.read_tuned(name, task).float().isfinite()
            if bool(bad.any()):
                faults.append(f"{task}: {name} ({int(bad.sum())} entries)")
        return faults or [f"{name}: differences to the base model overflow float32"]

    @staticmethod
    def _floating(source: TensorSource) -> dict[str, TensorInfo]:
        return {n: i for n, i in source.infos().items() if i.dtype is not None}

    def _check(self, reference: Mapping[str, TensorInfo]) -> None:
        infos = {task: s.infos() for task, s in self._sources.items()}
        # what no checkpoint holds is untouched by every task
        expected = set(reference) & set().union(*infos.values())
        if not expected:
            raise CheckpointMismatchError(
                f"No tensor of {self.base.label} appears in any fine-tuned checkpoint: expected names like "
                f"{_some(reference)}, found {_some(set().union(*infos.values()))}. The models are of another architecture."
            )
        faults = [
            f"{task}: {fault}"
            for task, found in infos.items()
            for fault in self._faults(expected, reference, found)
        ]
        if faults:
            raise CheckpointMismatchError(
                "The fine-tuned models do not line up with the base model:\n  "
                + "\n  ".join(faults)
                + "\nUse models of one architecture, or leave tensors out with method.exclude=[...]."
            )

    def _faults(
        self,
        expected: set[str],
        reference: Mapping[str, TensorInfo],
        found: Mapping[str, TensorInfo],
    ) -> Iterator[str]:
        missing = {n for n in expected - set(found) if not _matches(n, self.exclude)}
        extra = {
            name
            for name, info in found.items()
            if info.dtype is not None
            and name not in reference
            and name not in self.ignored
            and not _matches(name, self.exclude)
        }
        if missing:
            yield f"{len(missing)} tensors missing: {_some(missing)}"
        if extra:
            yield (
                f"{len(extra)} tensors that the base model {self.base.label} does not have: {_some(extra)}"
            )
        for name in sorted(expected & set(found)):
            have, want = found[name], reference[name]
            if _matches(name, self.exclude):
                continue
            if have.shape != want.shape:
                yield f"{name} is {have.shape}, the base model has {want.shape}"
            elif have.dtype is None:
                yield f"{name} is of an integer type, the base model has {want.dtype}"


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor viewed as out x everything else; vectors are 1 x n."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for p in patterns)


def _some(names: Iterable[str], count: int = 4) -> str:
    names = sorted(names)
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest
