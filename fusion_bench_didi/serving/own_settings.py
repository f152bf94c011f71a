"""Settings of a backbone's configuration that tasks have of their own: put there while a task runs, and back afterwards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ..pools.carried import OF_DECODERS, OF_LOSSES, PADDING
from .calls import Call

_UNSET = object()


def put(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Set what a model's configuration says; what it said before.

    Args:
        settings: by name, those of parts as ``decoder.pad_token_id``; what the configuration has no place for is left out.
    """
    before = {}
    for name, value in settings.items():
        *parts, key = name.split(".")
        holder = getattr(model, "config", None)
        for part in parts:
            holder = getattr(holder, part, None)
        if isinstance(holder, PretrainedConfig):
            before[name] = getattr(holder, key, None)
            setattr(holder, key, value)
    return before


class OwnSettings:
    """Settings of tasks for mixed batches.

    Args:
        backbone: that is run.
        told: by name, for each task in their order.
        base: gives what the base model says of those that are another task's just now.
    """

    def __init__(
        self,
        backbone: nn.Module,
        told: Sequence[Mapping[str, Any]],
        base: Callable[[], Mapping[str, Any]],
    ):
        self._backbone, self._told, self._base = backbone, told, base
        self._names = {name for settings in told for name in settings}

    def read_by(self, call: Call) -> bool:
        """Whether a call depends on settings of which some task has its own."""
        return any(self._reads(name, call) for name in self._names)

    @contextmanager
    def of(self, tasks: Sequence[int], call: Call) -> Iterator[Mapping[str, Any]]:
        """While the block runs, what the call reads is as tasks have it that all have the same, which is given; else as the base
        model."""
        own, others, base = {}, {}, self._base()
        told = [self._told[task] if task < len(self._told) else {} for task in tasks]
        for name in self._names:
            if self._reads(name, call):
                values = [one.get(name, _UNSET) for one in told]
                if values and values[0] is not _UNSET and all(v == values[0] for v in values):  # fmt: skip
                    own[name] = values[0]
                elif name in base:
                    others[name] = base[name]
        before = put(self._backbone, {**others, **own})
        try:
            yield own
        finally:
            put(self._backbone, before)

    def _reads(self, name: str, call: Call) -> bool:
        key = name.rpartition(".")[2]
        given = [name for name, value in call.given.items() if value is not None]
        labeled = any("labels" in name for name in given)
        if key in OF_LOSSES:
            return labeled
        decoded = any(name.startswith("decoder_input") for name in given)
        if self._writes and decoded and not labeled:
            return False
        if key in OF_DECODERS:
            return self._decodes
        return key == PADDING and (self._decodes or not self._writes)

    @property
    def _decodes(self) -> bool:
        config = getattr(self._backbone, "config", None)
        return bool(getattr(config, "is_encoder_decoder", False))

    @property
    def _writes(self) -> bool:
        """Whether it is a language model, whose forward knows nothing of padding."""
        asked = getattr(self._backbone, "can_generate", bool)
        return bool(asked())
