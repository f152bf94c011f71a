"""The forms in which models that are not our own are written: whole tensors, per task or once, and the host's mixtures.

Writers take the directory, what is to be written, the base model's tensors, and the data type of each tensor that some
task changed; they return what the reader of the same kind needs beside the files, JSON-plain.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.fields import Field, inside
from ..checkpoint.parts import TYPES, read_header
from ..checkpoint.tensors import open_tensors, write_tensors
from ..errors import CheckpointMismatchError
from ..serving.weights import BackboneWeights
from ..task_vectors.sources import ModuleSource
from ..task_vectors.tower_names import Spelling
from .host_moe import MIXTURES, HostParts, Tensors, check_mixtures, put_together

BACKBONE, EXPERTS = "backbone", "experts"
Types = Mapping[str, torch.dtype]
Config = Mapping[str, Any]


def write_static(
    place: Path, model: nn.Module, base: Mapping[str, Tensor], types: Types
) -> dict[str, Any]:
    """Write the changed tensors of a static merge, once for all tasks."""
    state = tensors_of(model)
    _check_elsewhere(state, base, types, type(model).__name__)
    return {"kind": "static", "files": _written(place, state, types)}


def write_individuals(
    place: Path,
    models: Iterable[tuple[str, nn.Module]],
    base: Mapping[str, Tensor],
    types: Types,
) -> dict[str, Any]:
    """The changed tensors of every model, given as (task, model), each in a directory of its own.

    Those that only a task has in its size, such as heads, are named beside the files.
    """
    entries = []
    for i, (task, model) in enumerate(models):
        inside, state = Path(EXPERTS) / str(i), tensors_of(model)
        own = [n for n in types if n in state and state[n].shape != base[n].shape]
        _check_elsewhere(state, base, types, type(model).__name__, own)
        files = _written(place / inside, state, types)
        entry = {"task": task, "directory": str(inside), "files": files}
        entries.append({**entry, "own": own} if own else entry)
    return {"kind": "individuals", "experts": entries}


def write_mixtures(
    place: Path, parts: HostParts, base: Mapping[str, Tensor], types: Types
) -> dict[str, Any]:
    """Experts and gates; and the backbone, where it is not the base model's."""
    state = {name: parts.backbone[name] for name in base}
    _check_elsewhere(state, base, types, parts.kind)
    config: dict[str, Any] = {"kind": parts.kind, "mixtures": parts.mixtures}
    config["files"] = write_tensors(place, parts.beyond)
    if any(not torch.equal(state[name].to(base[name]), base[name]) for name in types):
        config["backbone_files"] = _written(place / BACKBONE, state, types)
    return config


def _written(place: Path, state: Mapping[str, Tensor], types: Types) -> dict[str, str]:
    """Write tensors in their types to a directory, which is made; SHA-256 by file."""
    place.mkdir(parents=True, exist_ok=True)
    return write_tensors(place, {n: state[n].to(dtype) for n, dtype in types.items()})


def _check_elsewhere(
    state: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    types: Types,
    what: str,
    own: Collection[str] = (),
) -> None:
    """A state must be one of the base model's tensors, and equal to it but for ``types`` and rounding.

    Args:
        own: tensors that may be of another size.
    """
    given, needed = (
        {n: v.dim() if n in own else v.shape for n, v in tensors.items()}
        for tensors in (state, base)
    )
    if given != needed:
        raise TypeError(
            f"{what} cannot be saved as an artifact: it is neither a dynamic model of this package nor the host's SMILE or "
            "WEMoE, and its tensors are not those of the base model."
        )
    for name in set(base) - set(types):
        given, own = state[name].to(base[name]), base[name]
        if not (torch.equal(given, own) or torch.allclose(given, own)):
            raise CheckpointMismatchError(
                f"{what} differs from the base model in {name}, which no task changed; as an artifact it would not come "
                "back the same."
            )


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones once, as checkpoints are read."""
    source = ModuleSource(module, type(module).__name__)
    return {name: source.read(name) for name in source.infos()}


def open_forms(place: Path, config: Mapping[str, Any]) -> None:
    """Hold every file of an artifact against its SHA-256.

    Raises:
        CheckpointMismatchError: for a missing, truncated or altered file.
    """
    for entry in config.get("experts", ()):
        open_tensors(place / entry["directory"], entry["files"])
    open_tensors(place, config.get("files", {}))
    open_tensors(place / BACKBONE, config.get("backbone_files", {}))


def check_forms(config: Field, place: Path) -> None:
    """The manifest of an artifact must say all that its reader takes from it.

    Raises:
        CheckpointMismatchError: naming the field that does not, or what leads out of the directory.
    """
    kind = config["kind"].one_of(READERS)
    if kind == "individuals":
        tasks, names = set[str](), config["names"].texts()
        for expert in config["experts"].elements():
            task, directory = expert["task"].text(), expert["directory"]
            if task in tasks:
                expert["task"].fail("every task once")
            tasks.add(task)
            parts = Path(directory.text()).parts
            if len(parts) != 2 or parts[0] != EXPERTS:
                directory.fail(f"a directory in {EXPERTS}")
            inside(inside(place, EXPERTS), parts[1])
            expert["files"].files()
            if "own" in expert and set(expert["own"].texts()) - set(names):
                expert["own"].fail("some of names")
        return
    config["files"].files()
    if kind in MIXTURES:
        for _, facts in config["mixtures"].entries():
            MIXTURES[kind].check(facts)
        if "backbone_files" in config:
            inside(place, BACKBONE)
            config["backbone_files"].files()


def _read(
    directory: Path,
    files: Mapping[str, str],
    spell: Spelling,
    named: Tensors | None = None,
    own: Collection[str] = (),
) -> dict[str, Tensor]:
    """The tensors of files, by the names and in the shapes of those given, if any are.

    Args:
        spell: names as the backbone has them.
        own: tensors of which only the number of sides is as of those given.

    Raises:
        CheckpointMismatchError: if they are others.
    """
    handles = open_tensors(directory, files)
    found = {spell(name): read_header(file, name) for name, file in handles.items()}
    here = {name: header.shape for name, header in found.items()}
    asked = found if named is None else named
    expected = {name: tuple(value.shape) for name, value in asked.items()}
    for name in own:
        if len(here.get(name, ())) == len(expected[name]):
            expected[name] = here[name]
    for name in sorted(expected.keys() | here.keys()):
        if here.get(name) != expected.get(name) or found[name].dtype not in TYPES:
            raise CheckpointMismatchError(
                f"{directory}: tensor {name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none of it')}. "
                "Pass the base model of the merge, or write the model again."
            )
    return {spell(name): file.get_tensor(name) for name, file in handles.items()}


@torch.no_grad()
def _read_static(
    place: Path, config: Config, backbone: nn.Module, named: Tensors, spell: Spelling
) -> nn.Module:
    for name, value in _read(place, config["files"], spell, named).items():
        named[name].copy_(value)
    return backbone


def _read_individuals(
    place: Path, config: Config, backbone: nn.Module, named: Tensors, spell: Spelling
) -> dict[str, nn.Module]:
    weights, models = BackboneWeights(backbone), {}
    for entry in config["experts"]:
        home, own = place / entry["directory"], map(spell, entry.get("own", ()))
        models[entry["task"]] = model = weights.copied()
        found = _read(home, entry["files"], spell, named, [*own])
        for name, value in found.items():
            weights.put(model, name, value)
        weights.forget_derived(model, found)
    return models


def _read_mixtures(
    place: Path, config: Config, backbone: nn.Module, named: Tensors, spell: Spelling
) -> nn.Module:
    beyond, folded = _read(place, config["files"], spell), {}
    if "backbone_files" in config:
        files = config["backbone_files"]
        folded = _read(place / BACKBONE, files, spell, named)
    mixtures = {spell(name): facts for name, facts in config["mixtures"].items()}
    parts = HostParts(config["kind"], mixtures, beyond, folded)
    check_mixtures(parts, backbone)
    return put_together(parts, backbone)


#: By kind: the model of a directory, its configuration, the base model, the tensors of that which were merged, and how it spells names.
READERS = {
    "static": _read_static,
    "individuals": _read_individuals,
    **dict.fromkeys(MIXTURES, _read_mixtures),
}
