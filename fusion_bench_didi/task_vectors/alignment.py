"""Whether fine-tuned checkpoints and adapters line up with the base model, from their headers alone."""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping

from ..errors import CheckpointMismatchError
from .lora_adapter import WAY_OUT
from .sources import TensorInfo, TensorSource

Infos = Mapping[str, TensorInfo]


def check_alignment(
    base: TensorSource,
    tuned: Mapping[str, TensorSource],
    *,
    exclude: Iterable[str] = (),
    ignored: frozenset[str] = frozenset(),
) -> None:
    """Every tensor of every source has a counterpart of its shape in the base model.

    What no source holds is untouched by every task; of the rest a checkpoint holds all, an adapter what it changes.

    Args:
        tuned: by task, under the base model's names.
        exclude: glob patterns of tensors that need not line up.
        ignored: tensors that the base model does not load.

    Raises:
        CheckpointMismatchError: listing all faults of all sources.
    """
    reference = floating(base)
    infos = {task: source.infos() for task, source in tuned.items()}
    held = set().union(*infos.values())
    expected = {n for n in reference if n in held and not matches(n, exclude)}
    adapters = {t: s for t, s in tuned.items() if s.partial}
    faults = [
        f"{task}: {fault}"
        for task, adapter in adapters.items()
        for name, fault in adapter.faults.items()
        if not matches(name, exclude)
    ]
    if not held & set(reference) and not faults:
        raise CheckpointMismatchError(
            f"No tensor of {base.label} appears in any fine-tuned checkpoint: expected names like {_some(reference)}, "
            f"found {_some(held)}. The models are of another architecture."
        )
    for task, found in infos.items():
        found = {n: i for n, i in found.items() if not matches(n, exclude)}
        if task not in adapters and (missing := expected - set(found)):
            faults.append(f"{task}: {len(missing)} tensors missing: {_some(missing)}")
        foreign = {
            name
            for name, info in found.items()
            if info.dtype is not None and name not in reference and name not in ignored
        }
        if foreign:
            faults.append(
                f"{task}: {len(foreign)} tensors that the base model {base.label} does not have: {_some(foreign)}"
            )
        faults += [f"{task}: {fault}" for fault in _misfits(found, reference)]
    if faults:
        raise CheckpointMismatchError(
            "The fine-tuned models do not line up with the base model:\n  "
            + "\n  ".join(faults)
            + "\nUse models of one architecture, or leave tensors out with method.exclude=[...]."
            + (f" {WAY_OUT}" if adapters else "")
        )


def floating(source: TensorSource) -> dict[str, TensorInfo]:
    """The tensors of a source that can be merged."""
    return {n: i for n, i in source.infos().items() if i.dtype is not None}


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for p in patterns)


def _misfits(found: Infos, reference: Infos) -> Iterator[str]:
    """Tensors of the base model's name and another shape or kind."""
    for name in sorted(set(found) & set(reference)):
        have, want = found[name], reference[name]
        if have.shape != want.shape:
            yield f"{name} is {have.shape}, the base model has {want.shape}"
        elif have.dtype is None:
            yield f"{name} is of an integer type, the base model has {want.dtype}"


def _some(names: Iterable[str], count: int = 4) -> str:
    names = sorted(names)
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest
