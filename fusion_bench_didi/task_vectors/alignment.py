"""Whether fine-tuned checkpoints and adapters line up with the base model, from their headers alone."""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import torch

from ..errors import CheckpointMismatchError, some, spelled
from .lora_adapter import WAY_OUT
from .sources import TensorInfo, TensorSource

Infos = Mapping[str, TensorInfo]
_KEEP = " Tensors of another shape or kind than the base model's are kept as each task has them with {}."
_NO_PLACE = " The base model has no place for {}, which {} is to keep."
#: Names in models in memory that PEFT has put layers, or itself, around.
_WRAPPED = re.compile(
    r"^base_model\.model\.|(^|\.)(base_layer|lora_[AB]|modules_to_save)\."
)
#: So many kinds of faults are told of a task.
_MOST = 8

#: How the names of quanto's codes end, which may be in float8.
_FLOAT8_TOO = "._data"

#: Names of the last layers of classifiers: where their shapes differ, tasks have heads of their own.
HEADS = (
    *("*classifier*", "*qa_outputs*", "*_head.*", "score.*", "*.score.*"),
    *("head.*", "*.head.*", "heads.*", "fc.*", "*logits_proj*"),
)


def check_alignment(
    base: TensorSource,
    tuned: Mapping[str, TensorSource],
    *,
    exclude: Iterable[str] = (),
    own: Iterable[str] = (),
    fresh: frozenset[str] = frozenset(),
    buffers: frozenset[str] = frozenset(),
    ignored: Infos = MappingProxyType({}),
    loaded: bool = True,
) -> None:
    """Every tensor of every source has a counterpart in the base model, and every one of the base model in every whole source.

    Args:
        tuned: by task, under the base model's names; an adapter holds what it changes.
        exclude: glob patterns of tensors that need not line up.
        own: glob patterns of tensors that each task has for itself, for which the base model has a place.
        fresh: tensors that the base model's own checkpoint does not hold.
        buffers: names of the base model's buffers, which each task has for itself where they differ in kind; headers alone do
            not tell them from parameters.
        ignored: tensors that the base model does not load.
        loaded: the base model's tensors are those that it has in memory, not just all of its checkpoint.

    Raises:
        CheckpointMismatchError: listing all faults of all sources.
    """
    reference = floating(base)
    infos = {task: source.infos() for task, source in tuned.items()}
    held = set().union(*infos.values())
    adapters = {t: s for t, s in tuned.items() if s.partial}
    by_peft = f" {WAY_OUT}" if adapters else ""
    faults = [*_faults_of_sources(base, tuned, exclude)]
    if not held & set(reference) and not faults:
        raise CheckpointMismatchError(
            f"{', '.join(tuned)}: no tensor is one of the base model's: expected names like {some(reference)}, found {some(held)}. "
            + (
                _unwrapped(base, tuned)
                or f"Use models of the base model's architecture.{by_peft}"
            )
        )
    # what is in no checkpoint at all is new in every model
    expected = {n for n in reference if n in held or (loaded and n not in fresh)}
    expected = {n for n in expected if not matches(n, exclude)}
    keepable, placeless = False, set[str]()
    fitting = {
        n: i
        for n, i in base.infos().items()
        if i.floating or (loaded and n not in buffers)
    }
    for task, found in infos.items():
        missing = expected - set(found)
        if task in adapters:
            missing &= fresh
        left_out = {*ignored, *(n for n in found if matches(n, exclude))}
        found = {n: i for n, i in found.items() if n not in left_out}
        foreign = set(found) - set(base.infos())
        kept = {n for n in foreign if matches(n, own)}
        if loaded:  # headers alone do not tell all that the base model has
            placeless |= kept - buffers
            kept &= buffers
        foreign -= kept
        misfits = [*_misfits(found, fitting, own, fresh)]
        keepable |= len(misfits) > len([*_misfits(found, fitting, ("*",), fresh)])
        told = _faults_of_names(missing, foreign, _alike(misfits))
        faults += [f"{task}: {fault}" for fault in told]
    faults += _without_value(adapters, reference, exclude, own, fresh)
    faults += _left_out(infos, reference, exclude, fresh)
    nowhere = (n for n in fresh - held if not matches(n, exclude))
    faults += _packed(base, nowhere, ignored)
    if faults:
        way_out = _unwrapped(base, tuned)
        if not way_out:
            way_out = f"Use models of one architecture, or leave tensors out with {spelled('exclude', '[...]')}."
            if keepable:
                way_out += _KEEP.format(spelled("own", "[...]"))
            if placeless:
                way_out += _NO_PLACE.format(some(placeless), spelled("own"))
        raise CheckpointMismatchError(
            "The fine-tuned models do not line up with the base model:\n  "
            + "\n  ".join(faults)
            + f"\n{way_out}{by_peft}"
        )


def _unwrapped(base: TensorSource, tuned: Mapping[str, TensorSource]) -> str:
    """The way out where PEFT's layers are in some of the models; empty where they are in none."""
    wrapped = [
        label
        for label, source in {base.label: base, **tuned}.items()
        if any(map(_WRAPPED.search, source.infos()))
    ]
    if not wrapped:
        return ""
    return (
        f"Layers of PEFT are in {', '.join(wrapped)}: give the plain model that merge_and_unload() returns, or, of a fine-tuned one, "
        "the directory to which save_pretrained(...) wrote its adapter."
    )


def _faults_of_sources(
    base: TensorSource, tuned: Mapping[str, TensorSource], exclude: Iterable[str]
) -> Iterator[str]:
    """Faults that each source tells of itself, and state beside tensors that is not the base model's."""
    for task, source in {base.label: base, **tuned}.items():
        for name, fault in source.faults.items():
            if not matches(name, exclude):
                yield f"{task}: {fault if source.partial else f'{name} {fault}'}"
    for task, source in tuned.items():
        for name, state in source.extra.items():
            if state != base.extra.get(name) and not matches(name, exclude):
                yield f"{task}: {name} is another than the base model's, and no tensor that could be kept; excluded, it is the base model's"


def _faults_of_names(
    missing: set[str], foreign: set[str], misfits: list[str]
) -> Iterator[str]:
    if missing:
        yield f"{len(missing)} tensors missing: {some(missing)}"
    if foreign:
        yield f"{len(foreign)} tensors that the base model does not have: {some(foreign)}"
    yield from misfits[:_MOST]
    if len(misfits) > _MOST:
        yield f"and {len(misfits) - _MOST} more kinds of tensors"


def _without_value(
    adapters: Mapping[str, TensorSource],
    reference: Infos,
    exclude: Iterable[str],
    own: Iterable[str],
    fresh: frozenset[str],
) -> Iterator[str]:
    """Factors of adapters that belong to a tensor whose value is nowhere: the base model's is random, or of another size."""
    for task, source in adapters.items():
        for name, info in sorted(source.infos().items()):
            if not source.rests_on_base(name) or matches(name, exclude):
                continue
            want = reference.get(name, info).shape
            if name in fresh:
                yield (
                    f"{task}: {name} is changed by an adapter's factors, and the base model's is random at every load; give a base "
                    "model whose files hold it, or adapters that hold it whole (modules_to_save)"
                )
            if info.shape != want and matches(name, (*own, *HEADS)):
                yield (
                    f"{task}: {name} is {info.shape}, the base model has {want}, and the adapter does not hold the value that its "
                    "factors change; save it with save_embedding_layers=True"
                )


def _packed(base: TensorSource, random: Iterable[str], ignored: Infos) -> Iterator[str]:
    """Tensors that no checkpoint holds, where the base model's has codes in the same layer that its class does not load."""
    beside: dict[str, list[str]] = {}
    for name in sorted(n for n, info in ignored.items() if _is_code(n, info)):
        beside.setdefault(name.rpartition(".")[0], []).append(name)
    found = {}
    for name in random:
        layer, _, last = name.rpartition(".")
        start = "" if last == "weight" else f"{name}_"
        within = [n for n in beside.get(layer, ()) if n.startswith(start)]
        if others := [*beside.get(name, ()), *within]:
            found[name] = others[0]
    if found:
        yield (
            f"{base.label}: {some(found)} are in no checkpoint, and random at every load; it holds {some(found.values())} instead, which "
            "its class does not load. If these are quantized, give the model before that"
        )


def floating(source: TensorSource) -> dict[str, TensorInfo]:
    """The tensors of a source that can be merged."""
    return {n: i for n, i in source.infos().items() if i.floating}


def codes(source: TensorSource) -> list[str]:
    """Tensors of a source that stand for other numbers by their headers; tables of positions are none."""
    return [name for name, info in source.infos().items() if _is_code(name, info)]


def _is_code(name: str, info: TensorInfo) -> bool:
    if name.endswith(_FLOAT8_TOO):
        return True
    if info.floating or len(info.shape) < 2 or info.dtype in (None, torch.bool):
        return False
    position = info.dtype == torch.int64 and not name.endswith("weight")
    return not (position or info.dtype.is_complex)


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for p in patterns)


def _alike(faults: Iterable[tuple[str, str]]) -> list[str]:
    """Names and what is wrong with them, in one line for the tensors of all layers that are wrong alike."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, fault in faults:
        kinds.setdefault((of_all_layers(name), fault), []).append(name)
    return [
        (
            f"{names[0]} {fault}"
            if len(names) == 1
            else f"{kind}, {len(names)} tensors: {fault}"
        )
        for (kind, fault), names in kinds.items()
    ]


def of_all_layers(name: str) -> str:
    """A name with ``*`` for the numbers of layers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _misfits(
    found: Infos, reference: Infos, own: Iterable[str], fresh: frozenset[str]
) -> Iterator[tuple[str, str]]:
    """Tensors of the base model's name and another shape or kind, and what is wrong."""
    for name in sorted(set(found) & set(reference)):
        have, want = found[name], reference[name]
        theirs = want.dtype or "one that torch does not have"
        if have.dtype is None:
            yield name, f"is of a type that torch does not have, the base model has {theirs}"
        elif have.floating != want.floating:
            if want.floating or not matches(name, own):
                yield name, f"is of {have.dtype}, the base model has {theirs}"
        elif want.floating and have.shape != want.shape and name not in fresh:
            if not matches(name, (*own, *HEADS)):
                yield name, f"is {have.shape}, the base model has {want.shape}"


def _left_out(
    infos: Mapping[str, Infos],
    reference: Infos,
    exclude: Iterable[str],
    fresh: frozenset[str],
) -> Iterator[str]:
    """Excluded tensors without which a task could not run on the base model."""
    for task, found in infos.items():
        for name in sorted(set(found) & set(reference)):
            if not matches(name, exclude):
                continue
            if name in fresh:
                yield f"{task}: {name} is excluded, and the base model's is random at every load; keep it ({spelled('own')})"
            elif found[name].shape != reference[name].shape and matches(name, HEADS):
                yield (
                    f"{task}: {name} is excluded, and is {found[name].shape} where the base model has {reference[name].shape}; "
                    f"keep it ({spelled('own')})"
                )
