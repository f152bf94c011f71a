"""LoRA adapters in place of fine-tuned checkpoints: what they change of the base model, described by their headers.

An adapter is a directory with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``), as PEFT writes it.
Two tensors ``lora_A`` (r, ...) and ``lora_B`` (m, r) of a module change its weight by ``scale * B A``, which is never
multiplied out here; biases and ``modules_to_save`` are there as a whole. Everything else is as in the base model.

With ``use_dora`` there is ``lora_magnitude_vector`` (m) beside them, the norms that the m rows of ``W + scale * B A`` get. What
that changes is not of low rank, so that such a weight is given by its value, which takes the base model's.

``B A`` has the layout of ``nn.Linear``, (out, in). It is transposed for weights that are (in, out), as those of
transformers' ``Conv1D`` and of embeddings, whose pair is called ``lora_embedding_A`` (r, entries) and ``lora_embedding_B``
(width, r); for a convolution it is (out, in * kh * kw), which is how a convolution is viewed anyway.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointMismatchError
from ..lowrank.factors import LowRankFactors
from .file_sources import PickleSource, SafetensorsSource
from .lora_config import CONFIG, LoraSettings, read_config, variants
from .renaming import renaming
from .sources import TensorInfo, TensorSource, digest_of

FILES = ("adapter_model.safetensors", "adapter_model.bin")

#: What PEFT puts around the names of the base model.
PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")
_PAIR = re.compile(
    r".+\.lora_(?:([AB])\.weight|(embedding_[AB])|(magnitude_vector)(?:\.weight)?)"
)
_MAGNITUDE = "magnitude_vector"

#: Names of the base model by names in a file, as far as the model's class has given tensors others since.
Layout = Callable[[Sequence[str]], Mapping[str, str]]

#: The base model's values by name.
Values = Callable[[str], Tensor]

#: For the end of the error that lists what is wrong with adapters.
WAY_OUT = (
    "An adapter that changes weights and cannot be read as LoRA or DoRA can be put into its base model with peft "
    "(merge_and_unload) and saved as a whole model."
)


@dataclass(frozen=True)
class Pair:
    """The two tensors that change one weight, and with DoRA a third.

    Args:
        a, b: their names in the file, of ``lora_A`` and ``lora_B``.
        turned: the weight is (in, out), ``(scale * B A)^T``.
        magnitude: name in the file of the norms of the changed weight's rows, of its columns where it is turned; None
            without DoRA.
    """

    a: str
    b: str
    rank: int
    scale: float
    turned: bool
    magnitude: str | None = field(
        default=None, repr=False
    )  # so that identities of plain LoRA are those of earlier releases


class AdapterSource(TensorSource):
    """The tensors of the base model that an adapter changes; a :class:`~.sources.TensorSource` of those it holds whole.

    Args:
        source: the adapter's tensors by their names in the file.
        config: of the adapter.
        base: the base model's tensors as its checkpoint stores them.
        fan_in_first: names of weights that are (in, out); None where the modules are not known, shapes and configuration
            then tell.
        layout: of the base model's class, for adapters from before it was rearranged.
        values: of the base model, without which DoRA is a fault; read one at a time, when they are asked for.
        unlike: by the name of a weight, why PEFT computes something else with factors of it than with the changed weight, empty
            where it does not.
    """

    partial = True

    def __init__(
        self,
        source: TensorSource,
        config: Mapping,
        base: Mapping[str, TensorInfo],
        fan_in_first: frozenset[str] | None = None,
        layout: Layout | None = None,
        values: Values | None = None,
        unlike: Callable[[str], str] = lambda _: "",
    ):
        self.label, self.watched = source.label, source.watched
        #: What cannot be merged, by name of the base model's tensor, or "" where it is about the whole adapter.
        self.faults: dict[str, str] = {}
        self._source, self._base = source, base
        self._settings = LoraSettings.of(config, source.label)
        self._fan_in_first, self._layout = fan_in_first, layout
        self._values, self._unlike = values, unlike
        self._pairs: dict[str, Pair] = {}
        self._whole: dict[str, str] = {}
        #: Pairs that change a tensor which is held whole beside them.
        self._on_own: dict[str, Pair] = {}
        #: Names in the base model by those in the file, of tensors that its class has rearranged.
        self._later: Mapping[str, str] = {}
        self._infos: dict[str, TensorInfo] = {}
        if found := variants(config):
            self.faults[""] = "; ".join(found)
        elif not source.infos():
            self.faults[""] = "it holds no tensors, expected lora_A and lora_B"
        else:
            self._sort()
            self._check_complete(config)
        ties = self._settings.ties
        self._ties_by_name = ties and self._settings.targets_embedding(config)
        #: The base model that it was trained on, as PEFT calls it.
        self.trained_on = config.get("base_model_name_or_path")

    @classmethod
    def of_directory(
        cls, directory: Path, label: str, base: Mapping[str, TensorInfo], **known: Any
    ) -> "AdapterSource":
        """The adapter in a directory.

        Args:
            known: of the base model, as for the class.

        Raises:
            CheckpointMismatchError: if one of its files is missing or broken.
        """
        file = next((f for n in FILES if (f := directory / n).is_file()), None)
        if file is None:
            raise CheckpointMismatchError(
                f"{label}: {directory} has {CONFIG} but neither {FILES[0]} nor {FILES[1]}. Download or write it again."
            )
        kind = PickleSource if file.suffix == ".bin" else SafetensorsSource
        source = kind([file], label)
        source.watched.opened(directory / CONFIG)
        return cls(source, read_config(directory, label), base, **known)

    @property
    def identity(self) -> dict[str, str]:
        pairs = sorted({**self._pairs, **self._on_own}.items())
        pairs = digest_of(repr(pairs).encode())
        return {**self._source.identity, "configuration": pairs}

    def _glimpsed(self) -> tuple[str, str]:
        return self._source.glimpse(), self.identity["configuration"]

    def read(self, name: str) -> Tensor:
        """The fine-tuned value of a tensor that it holds whole, or changes by DoRA."""
        if name in self._pairs:
            value = self._sum(self._values(name).float(), self._pairs[name])
            return value.to(self._infos[name].dtype)
        value = self._source.read(self._whole[name])
        if name not in self._on_own:
            return value
        return self._sum(value, self._on_own[name]).to(self._infos[name].dtype)

    def rank(self, name: str) -> int | None:
        """Rank of the change of a tensor: 0 for none, None where the adapter holds the tensor whole, or changes it by DoRA."""
        if name in self._whole or self._by_dora(name):
            return None
        return self._pairs[name].rank if name in self._pairs else 0

    def _by_dora(self, name: str) -> bool:
        """Whether a pair with magnitudes changes the base model's value."""
        return name in self._pairs and self._pairs[name].magnitude is not None

    def rests_on_base(self, name: str) -> bool:
        """Whether it holds a pair for the base model's value, and no value."""
        return name in self._pairs

    def factors(self, name: str) -> LowRankFactors:
        """Its change of a matrix in float32, ``(m, r) (r, n)``; not for tensors whose :meth:`rank` is None."""
        return self._product(self._pairs[name])

    def _product(self, pair: Pair) -> LowRankFactors:
        up, down = (
            self._source.read(key).flatten(1).float() for key in (pair.b, pair.a)
        )
        product = LowRankFactors(up, down).balanced() * pair.scale
        return product.mT if pair.turned else product

    def _sum(self, base: Tensor, pair: Pair) -> Tensor:
        """What a pair makes of a value, in that one's type."""
        change = self._product(pair).to(base.device).dense()
        total = base.float() + change.view(base.shape)
        if pair.magnitude is not None:
            lengths = self._source.read(pair.magnitude).to(total)
            total *= stretch(total, lengths, axis=1 if pair.turned else 0)
        return total.to(base.dtype)

    def applied(self, name: str, base: Tensor) -> Tensor:
        """The fine-tuned value of a tensor whose value in the base model is ``base``; sums in the base model's type."""
        if name in self._pairs:
            return self._sum(base, self._pairs[name])
        return self.read(name) if name in self._whole else base

    def apart(self, tied: Mapping[str, str], tying: bool = True) -> set[str]:
        """Tied names of the base model that differ from the others with this adapter: PEFT changes a tensor by one name only.

        Args:
            tied: other names of tied tensors -> their first name.
            tying: the base model's configuration lets PEFT tie them again.
        """
        changed = set(self._infos)
        return {
            name
            for name, first in tied.items()
            if {name, first} & changed
            and not self._kept_tied(name, first, tying and self._ties_by_name)
        }

    def _kept_tied(self, name: str, first: str, by_name: bool) -> bool:
        """Whether ``ensure_weight_tying`` has tied two names: both are in the file then, or PEFT knows the head by its name, which it
        looks for at the top of a model only; DoRA gives either norms of its own."""
        if not self._settings.ties or self._by_dora(name) or self._by_dora(first):
            return False
        at_top = "." not in name.removesuffix(".weight")
        return by_name and at_top or self._is_copy(name, first)

    def leave_out_copies(self, tied: Mapping[str, str]) -> None:
        """Take once what PEFT has written by each of its names, as it does for ``ensure_weight_tying``.

        Args:
            tied: other names of tensors that the base model ties -> their first name.
        """
        for name, first in tied.items():
            if self._settings.ties and self._is_copy(name, first):
                del self._infos[name]
                self._whole.pop(name, None)
                self._pairs.pop(name, None)
                self.unused = {**self.unused, name: f"tied to {first}, and equal"}

    def _is_copy(self, name: str, first: str) -> bool:
        """Whether one tensor is held by both names: whole, or as the same pair of factors, which a head has the other way round."""
        if {name, first} <= set(self._whole):
            return self.read(name).equal(self.read(first))
        pairs = self._pairs.get(name), self._pairs.get(first)
        if None in pairs or pairs[0].scale != pairs[1].scale or self._by_dora(name):
            return False
        one, other = map(self._raw, pairs)
        return all(half.equal(same) for half, same in zip(one, other))

    def _raw(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """The two factors of a matrix, (m, r) and (r, n), as they are stored; without their scale."""
        up, down = self._source.read(pair.b), self._source.read(pair.a)
        return (down.mT, up.mT) if pair.turned else (up, down)

    def _sort(self) -> None:
        """Which tensor of the file belongs to which of the base model."""
        halves: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        beside: dict[str, str] = {}
        for key in sorted(self._source.infos()):
            name = key.removeprefix(PREFIX)
            owner, lora, _ = name.partition(".lora_")
            if ".original_module." in name:
                beside[key] = "the base model's value beside the one that was trained"
            elif not lora:
                plain = _WRAPPERS.sub("", name)
                other = whole.setdefault(plain, key)
                if other != key and self._are_one(other, key):
                    beside[key] = f"the same as {other}"
                elif other != key:
                    self.faults[plain] = (
                        f"{other} and {key} are both {plain}, expected one of them"
                    )
            elif ".base_layer." in owner:
                self.faults.setdefault(
                    owner.partition(".base_layer.")[0] + ".weight",
                    f"{key} belongs to an nn.MultiheadAttention, whose output projection PEFT may add twice; expected "
                    "nn.Linear, Conv1D or a convolution",
                )
            elif found := _PAIR.fullmatch(name):
                half = next(filter(None, found.groups()))
                other = halves.setdefault(f"{owner}.weight", {}).setdefault(half, key)
                if other != key:
                    self.faults.setdefault(
                        f"{owner}.weight",
                        f"{other} and {key} are both lora_{half}, expected one of them",
                    )
            else:
                self.faults.setdefault(
                    f"{owner}.weight",
                    f"{key} is of neither LoRA nor DoRA, expected lora_A.weight and lora_B.weight",
                )
        for name in self.faults:
            halves.pop(name, None)
        # of a targeted embedding or head
        changed = {name: whole.pop(name) for name in set(halves) & set(whole)}
        for name, old in self._renamed(halves, whole).items():
            if old in whole:
                self._whole[name] = whole[old]
                self._infos[name] = self._source.infos()[whole[old]]
            else:
                module = old.removesuffix(".weight")
                if fault := self._added(name, module, halves[old]):
                    self.faults[name] = fault
                if old in changed and not self._is_another(name, changed[old]):
                    beside[changed[old]] = "the base model's value beside its pair"
        self.unused = {**self._source.unused, **beside}

    def _are_one(self, key: str, other: str) -> bool:
        """Whether two tensors of the file are equal, as the biases of a trained module are with ``bias="all"``."""
        infos, read = self._source.infos(), self._source.read
        return infos[key] == infos[other] and read(key).equal(read(other))

    def _renamed(
        self, halves: Mapping[str, Mapping[str, str]], whole: Mapping[str, str]
    ) -> dict[str, str]:
        """Names as above by those of the base model; what has no such name keeps its own.

        Args:
            halves, whole: tensors of the file, by those names.
        """
        names = [*halves, *whole]
        self._later = self._rearranged(names)
        placed: dict[str, str] = {}
        for name in sorted(names, key=self._later.__contains__):
            placed.setdefault(self._later.get(name, name), name)

        def alike(old: str, new: str) -> bool:
            keys = halves.get(placed[old]) or {"": whole[placed[old]]}
            return self._numel(keys) == self._base[new].numel

        known = renaming(placed, self._base, self.label, alike)
        known = {new: placed[old] for new, old in known.items()}
        return known | {name: name for name in names if name not in known.values()}

    def _numel(self, keys: Mapping[str, str]) -> int:
        """Entries of what a pair changes, or of a whole tensor; magnitudes, and what stands alone, are none of a pair."""
        infos = self._source.infos()
        shapes = [infos[key].shape for half, key in keys.items() if half != _MAGNITUDE]
        if len(shapes) != 2:
            return math.prod(shapes[0]) if shapes else 0
        a, b = shapes
        return math.prod((*b[:1], *a[1:]))

    def _rearranged(self, names: Iterable[str]) -> Mapping[str, str]:
        """What the base model's class calls tensors that adapters of its older layout have under other names."""
        if self._layout is None:
            return {}
        old = [name for name in names if name not in self._base]
        return {n: new for n, new in self._layout(old).items() if new != n}

    def _added(self, name: str, module: str, keys: Mapping[str, str]) -> str | None:
        """Take a pair, or tell what is wrong with it."""
        halves = sorted({*keys} - {_MAGNITUDE})
        embedding = halves == ["embedding_A", "embedding_B"]
        if not embedding and halves != ["A", "B"]:
            stand = "stands" if len(keys) == 1 else "stand"
            return (
                f"{', '.join(keys.values())} {stand} alone, expected lora_A.weight and lora_B.weight, or lora_embedding_A and "
                "lora_embedding_B"
            )
        down, up = (keys[half] for half in halves)
        later = self._later.get(f"{module}.weight", "").removesuffix(".weight")
        if not any(map(self._settings.targets, filter(None, (module, later)))):
            return (
                f"{down} is of a module that {CONFIG} leaves out (target_modules, exclude_modules, layers_to_transform), and so does "
                "PEFT; expected one of those that it names"
            )
        if why := self._unlike(name):
            return f"{down} changes {why}, so that the adapter computes something else than the changed weight would"
        a, b = (self._source.infos()[key] for key in (down, up))
        if not a.floating or not b.floating:
            return (
                f"{down} is of {a.dtype} and {up} of {b.dtype}, expected floating point"
            )
        rank, scale = settings = self._settings.of_module(module)
        if later and self._settings.of_module(later) != settings:
            return (
                f"{down} has rank and scale {settings} by the patterns of {CONFIG}, and {self._settings.of_module(later)} as "
                f"{later}, the name that the base model's class has for {module} now; expected patterns that mean both alike"
            )
        ones = (1,) * (len(b.shape) - 2)  # a convolution's kernel is all in lora_A
        if a.shape[:1] != (rank,) or b.shape[1:] != (rank, *ones):
            return f"{down} is {a.shape} and {up} {b.shape}, expected rank {rank} of {CONFIG}"
        if fault := self._fault_of_magnitude(keys.get(_MAGNITUDE), up):
            return fault
        shape, want = (b.shape[0], *a.shape[1:]), self._base.get(name)
        if want is not None and not want.floating:
            return f"{down} changes {name}, which the base model has in {want.dtype}, expected floating point"
        turned = embedding or (
            want is not None and self._turned(name, shape, want.shape)
        )
        shape = shape[::-1] if turned else shape
        # the fine-tuned model would be saved in the base model's type
        self._infos[name] = TensorInfo(shape, (want or a).dtype)
        self._pairs[name] = Pair(down, up, rank, scale, turned, keys.get(_MAGNITUDE))
        return None

    def _fault_of_magnitude(self, key: str | None, up: str) -> str | None:
        """What is wrong with the magnitudes that DoRA has beside a pair.

        Args:
            key, up: names in the file, of the magnitudes, if there are any, and of ``lora_B``.
        """
        if key is None:
            if not self._settings.dora:
                return None
            return f"{up} has no lora_magnitude_vector beside it, expected one with use_dora of {CONFIG}"
        if not self._settings.dora:
            return f"{key} is a magnitude of DoRA, expected none of it, or use_dora in {CONFIG}"
        if self._values is None:
            return f"{key} gives the base model's rows other norms, expected a base model whose values are read"
        info = self._source.infos()[key]
        rows, _, *kernel = self._source.infos()[up].shape
        want = (1, rows, *kernel) if kernel else (rows,)
        if not info.floating or info.shape != want:
            return f"{key} is {info.shape} in {info.dtype}, expected {want} in floating point"
        return None

    def _is_another(self, name: str, key: str) -> bool:
        """Take the value beside a pair where it is not the base model's, as of a vocabulary that has grown or rows that were set before
        the training; whether it is another."""
        info, want = self._infos.get(name), self._base.get(name)
        if info is None or want is None or self._source.infos()[key].shape != info.shape:  # fmt: skip
            return False
        if info.shape == want.shape and self._is_base_value(name, key):
            return False
        self._whole[name], self._on_own[name] = key, self._pairs.pop(name)
        return True

    def _is_base_value(self, name: str, key: str) -> bool:
        """Whether a tensor of the file is the base model's, in the narrower of their types; so it is where that one is not read."""
        if self._values is None:
            return True
        one, other = self._source.read(key), self._values(name).cpu()
        narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        return one.to(narrow).equal(other.to(narrow))

    def _check_complete(self, config: Mapping) -> None:
        """What the configuration says that the file holds is there; PEFT would leave it at the base model's, or not load the adapter."""
        if config.get("target_modules") and not any(map(_PAIR.fullmatch, self._source.infos())):  # fmt: skip
            self.faults.setdefault("", f"it holds no lora_A and lora_B, expected those of target_modules of {CONFIG}")  # fmt: skip
        held = {*self._infos, *self.faults}
        for module in config.get("modules_to_save") or ():
            under = sorted(n for n in self._base if f".{module}." in f".{n}")
            if under and held.isdisjoint(under):
                self.faults[under[0]] = f"it holds no tensor of {module}, expected it by modules_to_save of {CONFIG}"  # fmt: skip

    def _turned(self, name: str, shape: tuple, want: tuple) -> bool:
        """Whether the base model's weight is (in, out); ``shape`` is (out, in)."""
        if len(shape) != 2 or shape[::-1] != want:
            return False
        if shape != want:
            return True
        if self._fan_in_first is None:
            return self._settings.fan_in_first
        return name in self._fan_in_first


def stretch(weight: Tensor, lengths: Tensor, axis: int) -> Tensor:
    """Factors that give the slices of a weight along an axis other norms, with a dimension of 1 for each other axis.

    Args:
        lengths: the norms, as many as there are slices, in any shape.
    """
    rest = [other for other in range(weight.dim()) if other != axis]
    norms = torch.linalg.vector_norm(weight, dim=rest, keepdim=True)
    return lengths.view(norms.shape) / norms
