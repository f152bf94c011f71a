"""The base model that a saved model refers to instead of containing it: named, told apart, found again."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fusion_bench.models.modulator import ModulatedModel
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..errors import CheckpointMismatchError, DiDiError, some, spelled
from ..files import from_home
from ..pools.configurations import computing, unequal
from ..pools.entries import PLACE
from ..task_vectors.digests import digests
from ..task_vectors.live_models import check_values, uncompiled
from ..task_vectors.sources import ModuleSource
from ..task_vectors.ties import taken_apart, untie
from ..task_vectors.tower_names import Spelling, spelling, spelling_beside
from . import loaders
from .fields import Field

#: what of an entry lists tensors, beside their digests
_LISTS = ("fresh", "untied")


def describe(
    backbone: nn.Module,
    tensors: Mapping[str, Tensor],
    known: Mapping[str, Any],
    *,
    replaced: Collection[str] = (),
    taken: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """The entry of a saved configuration.

    Args:
        backbone: the tensors that the saved model does not touch are as in the base model.
        tensors: base values of what the saved model changes.
        known: what the merge knew of the backbone: its ``source``, and ``fresh``, names of tensors that its checkpoint does
            not hold, so that they are others every time it is loaded, if that could be told; see
            :func:`~fusion_bench_didi.pools.opening.backbone_reference`.
        replaced: names of tensors that every task has as its own, so that the base model's values do not matter.
        taken: checksums of base values that were taken before, which are not taken again.
    """
    cls = type(backbone)
    floating = (p.dtype for p in backbone.parameters() if p.is_floating_point())
    dtype = next(floating, None)
    fresh = sorted(known.get("fresh") or ())
    covered = {**_untouched(backbone, {*tensors, *replaced}), **tensors}
    covered = {n: v for n, v in covered.items() if n not in fresh}
    new = digests({n: v for n, v in covered.items() if n not in taken})
    apart, computes = taken_apart(backbone), _computing(backbone)
    return {
        "class": known.get("class") or f"{cls.__module__}.{cls.__qualname__}",
        "source": loaders.described(known.get("source")),
        "dtype": dtype and str(dtype).removeprefix("torch."),
        "tensors": {n: taken[n] if n in taken else new[n] for n in covered},
        **({"fresh": fresh} if "fresh" in known else {}),
        **({"untied": apart} if apart else {}),
        **({} if computes is None else {"computes": computes}),
    }


def check_entry(entry: Field) -> None:
    """The entry of a configuration must be what :func:`describe` gives, or gave in format 1.

    Raises:
        CheckpointMismatchError: naming the field that is not.
    """
    entry["class"].text()
    source = entry["source"]
    if not isinstance(source.value, (str, Mapping, type(None))):
        source.fail("a place, arguments of from_pretrained, or null")
    if isinstance(source.value, str):
        source.text()
    if "fingerprint" in entry:
        entry["fingerprint"].digest()
        return
    if entry["dtype"].value is not None:
        entry["dtype"].text()
    for _, digest in entry["tensors"].entries():
        digest.digest()
    for key in _LISTS:
        if key in entry:
            entry[key].texts()
    if "computes" in entry:
        entry["computes"].mapping()


def check(
    directory: str | Path,
    entry: Mapping[str, Any],
    backbone: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    fresh: Collection[str] = (),
) -> None:
    """The backbone given must be the one of the merge.

    Args:
        entry: from :func:`describe`.
        tensors: as there, of the backbone given.
        fresh: names of tensors that its checkpoint does not hold; they count where the entry tells of none, as where the
            merge could not know.

    Raises:
        CheckpointMismatchError: if it is another one, in any value or in what is computed with them.
    """
    if "fingerprint" in entry:  # format 1
        differ = [] if fingerprint(tensors) == entry["fingerprint"] else ["its weights"]
    else:
        expected = entry["tensors"]
        here = {**_untouched(backbone, tensors), **tensors}
        found = digests({n: v for n, v in here.items() if n in expected})
        differ = [n for n, d in expected.items() if found.get(n) != d]
        if "fresh" not in entry:
            differ = [n for n in differ if n not in fresh]
        else:  # more layers than those of the merge, at random values
            known = {*entry["fresh"], *expected, *tensors}
            differ += [n for n, _ in backbone.named_parameters() if n in fresh and n not in known]  # fmt: skip
    if differ:
        raise CheckpointMismatchError(
            f"The backbone given is not the one that {directory} was merged from ({entry['class']} from {entry['source']}, in "
            f"{entry.get('dtype') or 'its own type'}): its weights differ ({some(differ, 3)}). Pass the base model "
            "of the merge, in the type that it was merged in."
        )
    if differ := differing_computation(entry, {"computes": _computing(backbone)}):
        raise CheckpointMismatchError(
            f"The backbone given computes something else with its weights than the one that {directory} was merged from (of the merge != "
            f"given): {some(differ)}. Pass the base model of the merge, with the config.json that it had."
        )


def differing_computation(
    entry: Mapping[str, Any], other: Mapping[str, Any]
) -> list[str]:
    """Settings by which two backbones compute something else, as far as both entries tell of them, each with both values."""
    here, there = (one.get("computes") or {} for one in (entry, other))
    return unequal(here, there, _as_good)


def _as_good(one: Any, other: Any) -> bool:
    """Whether two values mean the same: releases of transformers differ in what stands for none, and in lists that they fill in."""
    filled_in = None in (one, other) and list in map(type, (one, other))
    return one == other or not (one or other) or filled_in


def _computing(backbone: nn.Module) -> dict[str, Any] | None:
    """What outputs depend on beside the weights; None for a model that does not say."""
    config = getattr(backbone, "config", None)
    return computing(config) if isinstance(config, PretrainedConfig) else None


def _untouched(backbone: nn.Module, touched: Collection[str]) -> dict[str, Tensor]:
    """Tensors of a backbone beside those named, and beside those that are tied to them."""
    state = backbone.state_dict(keep_vars=True)
    taken = {id(state[name]) for name in touched if name in state}
    source = ModuleSource(backbone, type(backbone).__name__)
    left = {*touched, *source.faults}
    return {
        name: source.read(name)
        for name in source.infos()
        if name not in left and id(state[name]) not in taken
    }


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Format 1's digest, of names, shapes and up to 256 evenly spaced values per tensor."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)][:256].double().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _resolved(
    entry: Mapping[str, Any], directory: Path, given: nn.Module | str | Path | None
) -> tuple[nn.Module, frozenset[str]]:
    """The base model given, or loaded from the place given, or from where the entry says.

    Returns:
        the model, and the names of tensors that its checkpoint does not hold.

    Raises:
        CheckpointMismatchError: if weights of the model given are not in memory, or not those of its checkpoint.
        DiDiError: for what is neither, and for a merged model; if the entry tells no place, or loading it might run code.
    """
    if isinstance(given, nn.Module):
        given = uncompiled(given)
    if isinstance(given, ModulatedModel):
        raise DiDiError(
            "backbone is a merged model itself, expected the base model of the merge. Pass a copy of that model's own: "
            "backbone=copy.deepcopy(model.backbone), with no task set."
        )
    if given is not None and not isinstance(given, (nn.Module, str, Path)):
        raise DiDiError(
            f"backbone is a {type(given).__name__}, expected a module, or where the base model lies."
        )
    if isinstance(given, nn.Module):
        check_values(given, "The base model")
        return given, frozenset()
    source = entry["source"]
    if given is not None:
        place = str(given)
        if from_home(place).is_dir():
            place = str(from_home(place).absolute())
        source = {**source, PLACE: place} if isinstance(source, Mapping) else place
    if not source:
        raise DiDiError(
            f"The saved model does not say where its backbone ({entry['class']}) lies: it was merged from modules in memory. "
            f"Pass {spelled('backbone', '<the base model>')}."
        )
    return loaders.load(
        entry["class"], source, directory=directory, dtype=entry.get("dtype")
    )


def opened(
    entry: Mapping[str, Any],
    directory: Path,
    given: nn.Module | str | Path | None,
    names: Iterable[str] = (),
) -> tuple[nn.Module, dict[str, Any], Spelling, frozenset[str]]:
    """The base model of a saved model: given, or loaded from the place given, or from where the entry says.

    Args:
        directory: of the saved model, for relative paths.
        names: of tensors that the saved model changes.

    Returns:
        the model, in which tied tensors are apart as they were for the merge; the entry with tensors named as this transformers
        names them; how it names others; and the names of tensors that the model's checkpoint does not hold.

    Raises:
        CheckpointMismatchError: if weights of the model given are not in memory, or not those of its checkpoint; if it lacks a
            tensor that the merge took apart from others.
        DiDiError: for what is neither, and for a merged model; if the entry tells no place, or loading it might run code.
    """
    backbone, fresh = _resolved(entry, directory, given)
    spell = spelling({*names, *_named_in(entry)}, backbone)
    entry = _respelled(entry, spell)
    apart = set(entry.get("untied", ())) - set(taken_apart(backbone))
    known = dict(backbone.named_parameters(remove_duplicate=False))
    if unknown := sorted(apart - set(known)):
        raise CheckpointMismatchError(
            f"The backbone ({type(backbone).__name__}) has no parameter {unknown[0]!r}, which the merge took apart from others. "
            "Pass the base model of the merge."
        )
    untie(backbone, apart)
    return backbone, entry, spell, fresh


def spelled_beside(
    entry: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[dict[str, Any], Spelling]:
    """The entry with tensors named as another entry names them, if both are of one tower; and how it spells others."""
    spell = spelling_beside(_named_in(entry), _named_in(other))
    return _respelled(entry, spell), spell


def _named_in(entry: Mapping[str, Any]) -> set[str]:
    return set(entry.get("tensors", ())).union(*(entry.get(k, ()) for k in _LISTS))


def _respelled(entry: Mapping[str, Any], spell: Spelling) -> dict[str, Any]:
    told: dict[str, Any] = {
        key: [*map(spell, entry[key])] for key in _LISTS if key in entry
    }
    if tensors := entry.get("tensors"):
        told["tensors"] = {spell(name): digest for name, digest in tensors.items()}
    return {**entry, **told}
