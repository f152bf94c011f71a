"""The same tensors under other names: those of the base model, with a prefix added or dropped."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from ..errors import CheckpointMismatchError
from .sources import TensorInfo, TensorSource, WrappedSource

#: Names that are looked for at the ends of others.
_ENDS = 8


class RenamedSource(WrappedSource):
    """A source under other names.

    Args:
        names: new name -> name in the source; several may mean one tensor.
        unused: tensors of the source that have no new name, and why.
    """

    def __init__(
        self,
        source: TensorSource,
        names: Mapping[str, str],
        unused: Mapping[str, str] = MappingProxyType({}),
    ):
        infos = source.infos()
        super().__init__(source, {new: infos[old] for new, old in names.items()})
        self.unused = {**source.unused, **unused}
        faults = source.faults
        self.faults = {new: faults[old] for new, old in names.items() if old in faults}
        self._names = names

    def read(self, name: str) -> Tensor:
        return self._source.read(self._names[name])


def aligned(source: TensorSource, reference: Mapping[str, TensorInfo]) -> TensorSource:
    """The source under the reference's names, if a prefix added or dropped makes more of them meet.

    Raises:
        CheckpointMismatchError: as :func:`renaming`.
    """
    found = source.infos()

    def alike(old: str, new: str) -> bool:
        return found[old].shape == reference[new].shape

    names = renaming(found, reference, source.label, alike)
    if all(new == old for new, old in names.items()) and len(names) == len(found):
        return source
    dropped = set(found) - set(names.values())
    return RenamedSource(source, names, dict.fromkeys(dropped, "of another part"))


def renaming(
    found: Iterable[str],
    reference: Iterable[str],
    label: str,
    alike: Callable[[str, str], bool] = lambda old, new: True,
) -> dict[str, str]:
    """The names found, by what the reference calls them: with the prefix added or dropped that makes most of them meet.

    transformers writes ``vision_model.`` in front of a CLIP tower's names in some versions and not in others; a
    checkpoint of a whole CLIPModel also holds the text tower.

    Args:
        label: of what holds the names found, for messages.
        alike: whether a tensor found could be one of the reference, by their names; of prefixes that make as many meet, the one counts
            that makes more alike meet.

    Raises:
        CheckpointMismatchError: if several do equally well with different tensors.
    """
    found, wanted = list(found), set(reference)

    def meeting(names: Mapping[str, str]) -> dict[str, str]:
        return {new: old for new, old in names.items() if new in wanted}

    same = {name: name for name in found}
    there = len(meeting(same))
    if there == min(len(wanted), len(found)):
        return same
    ways = []
    for prefix in sorted(_prefixes(found, wanted)):
        dropped = {n.removeprefix(prefix): n for n in found if n.startswith(prefix)}
        added = {prefix + name: name for name in found}
        ways += [(meeting(names), names) for names in (dropped, added)]
    ways = [(met, names) for met, names in ways if len(met) > there]
    if not ways:
        return same
    fits = [(len(m), sum(alike(old, new) for new, old in m.items())) for m, _ in ways]
    most = max(fits)
    (met, names), *others = [way for way, fit in zip(ways, fits) if fit == most]
    rivals = [its for its, _ in others if its != met]
    if rivals and most[0] == most[1]:  # else it is another model, as will be told
        one, other = next(iter(met)), next(iter(rivals[0]))
        raise CheckpointMismatchError(
            f"{label}: its tensors fit {one} and {other} of the base model, and what goes with either, alike. Save them under the names "
            "that they have in the whole model (of an adapter: train it on that one), or give that part as the base model."
        )
    return names


def _prefixes(found: Sequence[str], wanted: Collection[str]) -> set[str]:
    """What may stand in front of names on one side and not on the other."""
    firsts = {name.split(".", 1)[0] + "." for name in (*found, *wanted)}
    return firsts | {  # of layers deep within a model
        name.removesuffix(end)
        for end in sorted(wanted)[:_ENDS]
        for name in found
        if name.endswith(f".{end}")
    }
