"""What ``adapter_config.json`` tells of a LoRA adapter: rank and scale per module, and whether it is one that is read."""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import regex

from ..errors import CheckpointMismatchError
from .file_sources import read_settings

CONFIG = "adapter_config.json"

#: Variants of LoRA whose change of a weight is neither ``scale * B A`` nor DoRA's, by the setting that turns them on.
VARIANTS = (
    *("lora_bias", "alora_invocation_tokens", "arrow_config"),
    *("enable_lora", "kasa_config", "layer_replication", "monteclora_config"),
    *("target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora"),
)

#: Others that are turned on as variants are, and are read, or change nothing about a trained adapter.
PLAIN = (
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
    *("megatron_config", "runtime_config", "use_dora", "use_rslora"),
    *("velora_config",),
)

#: Kinds of adapters that learn inputs of the model, or of its layers, beside the weights.
PROMPTS = (
    *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"),
    *("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"),
)

#: Last parts of names by which PEFT knows the modules that ``ensure_weight_tying`` is about.
EMBEDDINGS = ("embed_tokens", "lm_head")

#: Starts that leave the base model's weights alone; others (PiSSA, OLoRA, ...) take part of them into the adapter.
STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")

#: Matching a pattern with a name takes microseconds, or for ever; so long may all slow ones of an adapter take.
MATCH_SECONDS = 2.0
_SLOW = 0.005
_LONGEST_PATTERN = 1000
#: Counted repetitions are written out in memory, nested ones by their product.
_MOST_REPETITIONS = 10**4


@dataclass(frozen=True)
class LoraSettings:
    """The arithmetic of a LoRA adapter: ``W + scale * B A``, whose rows DoRA gives other norms.

    Args:
        rank, alpha: of a module that no pattern names.
        root: scale is ``alpha / sqrt(rank)`` (rank-stabilised LoRA) and not ``alpha / rank``.
        ranks, alphas: by pattern, a regular expression for the end of a module's name; the first that matches counts.
        fan_in_first: weights are (in, out), as in GPT-2, where their shape does not tell.
        dora: rows have norms of their own (``use_dora``).
        ties: a change of an embedding is one of the head that is tied to it (``ensure_weight_tying``).
        modules: what is changed, ``target_modules``: ends of names, or a regular expression for a whole one; all if None.
        left_out: of those, ``exclude_modules``.
        layers: of those, ``layers_to_transform``: numbers that stand in their names, after one of ``before``; all if None.
        label: of the adapter, for messages.
    """

    rank: int
    alpha: float
    root: bool = False
    ranks: Mapping[str, int] | None = None
    alphas: Mapping[str, float] | None = None
    fan_in_first: bool = False
    dora: bool = False
    ties: bool = False
    modules: str | Sequence[str] | None = None
    left_out: str | Sequence[str] = ()
    layers: Sequence[int] | None = None
    before: Sequence[str] = ()
    label: str = ""
    _left: list[float] = field(  # seconds for slow patterns
        default_factory=lambda: [MATCH_SECONDS], init=False, repr=False, compare=False
    )

    @classmethod
    def of(cls, config: Mapping[str, Any], label: str = "") -> "LoraSettings":
        return cls(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            root=bool(config.get("use_rslora")),
            ranks=config.get("rank_pattern"),
            alphas=config.get("alpha_pattern"),
            fan_in_first=bool(config.get("fan_in_fan_out")),
            dora=bool(config.get("use_dora")),
            ties=bool(config.get("ensure_weight_tying")),
            modules=config.get("target_modules"),
            left_out=config.get("exclude_modules") or (),
            layers=_as_list(config.get("layers_to_transform")) or None,
            before=_as_list(config.get("layers_pattern") or ()),
            label=label,
        )

    def rank_of(self, module: str) -> int:
        return self._matched(self.ranks, module, self.rank)

    def of_module(self, module: str) -> tuple[int, float]:
        """Rank and scale."""
        rank = self.rank_of(module)
        alpha = self._matched(self.alphas, module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.root else rank)

    def targets_embedding(self, config: Mapping[str, Any]) -> bool:
        """Whether PEFT finds, by their names, an embedding or a head among the modules that the adapter changes."""
        targets, whole = config.get("target_modules"), config.get("modules_to_save")
        names = [m for some in (targets, whole) if isinstance(some, list) for m in some]
        if any(str(name).rpartition(".")[2] in EMBEDDINGS for name in names):
            return True
        if not isinstance(targets, str) or _fault_of(targets):
            return False
        return any(self._matched({targets: True}, name, False) for name in EMBEDDINGS)

    def targets(self, module: str) -> bool:
        """Whether PEFT puts its factors on a module of this name, or may put them where it ties modules that are not named."""
        if self.ties:
            return True
        if self._is_of(self.left_out, module):
            return False
        if self.modules is None or self.modules == "all-linear":
            return True
        if not self._is_of(self.modules, module):
            return False
        by_end = not isinstance(self.modules, str) and module not in self.modules
        if not by_end or self.layers is None:
            return True
        starts = [rf"(?:.*?\.)?(?:{name})" for name in self.before] or [r".*?\.[^.]*"]
        # of several numbers in a name PEFT has taken the last one, and takes the first one
        starts += [start.replace(".*?", ".*") for start in starts]
        found = (self._match(_start_of_name, start, module) for start in starts)
        return any(one and int(one[1]) in self.layers for one in found)

    def _is_of(self, names: str | Sequence[str], module: str) -> bool:
        """Whether a module is among those with such ends, or wholly of a pattern."""
        if isinstance(names, str):
            return self._match(_whole_name, names, module) is not None
        return module in names or module.endswith(tuple(f".{name}" for name in names))

    def _matched(
        self, patterns: Mapping[str, Any] | None, module: str, default: Any
    ) -> Any:
        for pattern, value in (patterns or {}).items():
            if self._match(_end_of_name, pattern, module):
                return value
        return default

    def _match(self, compiled: Callable[[str], Any], pattern: str, module: str) -> Any:
        """The match of a name with what a pattern is compiled to."""
        started, limit = time.perf_counter(), max(self._left[0], _SLOW)
        try:
            found = compiled(pattern).match(module, timeout=limit)
        except TimeoutError as error:
            raise CheckpointMismatchError(
                f"{self.label}: matching {pattern!r} of {CONFIG} with {module!r}, and what was slow before, takes more than "
                f"{MATCH_SECONDS} s. Write a pattern without nested repetitions, or leave the adapter out."
            ) from error
        took = time.perf_counter() - started
        self._left[0] -= took if took > _SLOW else 0
        return found


def read_config(directory: Path, label: str) -> dict[str, Any]:
    """The configuration of an adapter.

    Raises:
        CheckpointMismatchError: if the file cannot be read.
    """
    return read_settings(directory / CONFIG, label, "the configuration of an adapter")


def variants(config: Mapping[str, Any]) -> list[str]:
    """Settings that make an adapter another one than LoRA or DoRA: what was found, and what is expected."""
    kind = config.get("peft_type")
    if kind in PROMPTS:
        return [f"{CONFIG} has peft_type={kind!r}, which learns inputs and changes no weight; leave it out"]  # fmt: skip
    if kind != "LORA":
        return [f"{CONFIG} has peft_type={kind!r}, expected 'LORA'"]
    found = [
        f"{CONFIG} has {name}={value!r}, expected none of it (LoRA or DoRA)"
        for name, value in config.items()
        if value and (name in VARIANTS or _turns_on(name) and name not in PLAIN)
    ]
    start = config.get("init_lora_weights", True)
    if str(start).lower() not in STARTS:
        found.append(
            f"{CONFIG} has init_lora_weights={start!r}, expected one that leaves the base model as it is "
            f"({', '.join(STARTS)})"
        )
    return found + _malformed(config) + [*_malformed_places(config)]


def _turns_on(name: str) -> bool:
    """Whether settings of this name turn on a variant, perhaps of a release of PEFT to come."""
    return name.startswith("use_") or name.endswith("_config")


def _malformed(config: Mapping[str, Any]) -> list[str]:
    """Settings of the arithmetic that are none: what was found, and what is expected."""
    found = [
        f"{CONFIG} has {key}={value!r}, expected true or false"
        for key in ("use_rslora", "use_dora", "fan_in_fan_out", "ensure_weight_tying")
        if not isinstance(value := config.get(key) or False, bool)
    ]
    for key, patterns, fits, expected in (
        ("r", "rank_pattern", _is_rank, "a whole number above 0"),
        ("lora_alpha", "alpha_pattern", _is_number, "a number"),
    ):
        value = config.get(key, 8)
        if not fits(value):
            found.append(f"{CONFIG} has {key}={value!r}, expected {expected}")
        table = config.get(patterns) or {}
        if not isinstance(table, Mapping):
            found.append(f"{CONFIG} has {patterns}={table!r}, expected an object")
            continue
        for pattern, own in table.items():
            if not fits(own):
                found.append(
                    f"{CONFIG} has {patterns}[{pattern!r}]={own!r}, expected {expected}"
                )
            if fault := _fault_of(pattern):
                found.append(
                    f"{CONFIG} has {patterns}[{pattern!r}], expected a regular expression ({fault})"
                )
    return found


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**63


def _fault_of(pattern: str) -> str | None:
    """Fault of a regular expression; None if it is one."""
    if len(pattern) > _LONGEST_PATTERN:
        return f"of {_LONGEST_PATTERN} characters at most"
    ranges = re.findall(r"\{[\d\s,]*\}", pattern)
    counts = [max(map(int, re.findall(r"\d+", text)), default=1) for text in ranges]
    if math.prod(count or 1 for count in counts) > _MOST_REPETITIONS:
        return f"that repeats nothing more than {_MOST_REPETITIONS} times"
    try:
        re.compile(pattern)  # as PEFT does; regex knows more, such as recursion
        _end_of_name(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        return str(error)
    return None


def _malformed_places(config: Mapping[str, Any]) -> Iterator[str]:
    """Settings of what is changed that are none: what was found, and what is expected."""
    for key in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):  # fmt: skip
        value = config.get(key) or []
        one = isinstance(value, str) and key != "modules_to_save"
        if not one and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):  # fmt: skip
            yield f"{CONFIG} has {key}={value!r}, expected names"
        elif one or key == "layers_pattern":
            for fault in filter(None, map(_fault_of, _as_list(value))):
                yield f"{CONFIG} has {key}={value!r}, expected a regular expression ({fault})"
    layers = config.get("layers_to_transform")
    if not all(type(layer) is int for layer in _as_list(layers) or ()):
        yield f"{CONFIG} has layers_to_transform={layers!r}, expected whole numbers"


def _as_list(value: Any) -> Any:
    """One value as a list of it; none, and several, as they are."""
    return value if value is None or isinstance(value, (list, tuple)) else [value]


@cache
def _whole_name(pattern: str) -> Any:
    return regex.compile(rf"(?:{pattern})\Z", regex.V0)


@cache
def _start_of_name(pattern: str) -> Any:
    """What stands before the number of a layer."""
    return regex.compile(rf"{pattern}\.(\d+)\.", regex.V0)


@cache
def _end_of_name(pattern: str) -> Any:
    """As PEFT matches names: the pattern stands for their end, after a dot."""
    return regex.compile(rf"(.*\.)?({pattern})$", regex.V0)
