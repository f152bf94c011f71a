"""The same tensors under other names: those of the base model, with a prefix added or dropped."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from torch import Tensor

from .sources import TensorSource, WrappedSource

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


def aligned(source: TensorSource, reference: Iterable[str]) -> TensorSource:
    """The source under the reference's names, if a prefix added or dropped makes more of them meet."""
    found = source.infos()
    names = renaming(found, reference)
    if all(new == old for new, old in names.items()) and len(names) == len(found):
        return source
    dropped = set(found) - set(names.values())
    return RenamedSource(source, names, dict.fromkeys(dropped, "of another part"))


def renaming(found: Iterable[str], reference: Iterable[str]) -> dict[str, str]:
    """The names found, by what the reference calls them: with the prefix added or dropped that makes most of them meet.

    transformers writes ``vision_model.`` in front of a CLIP tower's names in some versions and not in others; a
    checkpoint of a whole CLIPModel also holds the text tower.
    """
    found, wanted = list(found), set(reference)

    def meeting(names: Mapping[str, str]) -> int:
        return len(wanted & set(names))

    best = {name: name for name in found}
    if meeting(best) == min(len(wanted), len(found)):
        return best
    prefixes = {name.split(".", 1)[0] + "." for name in (*found, *sorted(wanted))}
    prefixes |= {  # of layers deep within a model
        name.removesuffix(end)
        for end in sorted(wanted)[:_ENDS]
        for name in found
        if name.endswith(f".{end}")
    }
    for prefix in sorted(prefixes):
        dropped = {n.removeprefix(prefix): n for n in found if n.startswith(prefix)}
        added = {prefix + name: name for name in found}
        best = max(best, dropped, added, key=meeting)
    return best
