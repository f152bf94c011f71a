"""Prompts and conversations continued greedily, each by its own task, in one batch."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..models import DynamicModel
from ..models.task_settings import (
    generation_for,
    generation_of,
    greedy_settings,
    known_tokens,
)
from .batching import Row
from .layouts import laid_out
from .limits import Limits, Refused
from .messages import Message
from .tasks import answered, by_key, check_tokens, tasks_of

log = logging.getLogger(__name__)
#: relative difference of two passes that rounding does not make
_ROUNDING = 0.1
#: Settings of generation that read a prompt, or count its tokens, with what pads it; and their values that do nothing.
_READ_PADDING = {
    "repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "bad_words_ids": (None, []),
    "sequence_bias": (None, {}),
}


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt.

    Args:
        text: without special tokens.
        prompt_tokens, tokens: how many.
        finish: ``stop`` at the end of the text, ``length`` where that did not come.
    """

    text: str
    prompt_tokens: int
    tokens: int
    finish: str


class Language:
    """A merged causal language model.

    Args:
        model: on its device.
        tokenizers: by task, the base model's by None.
        limits: of prompts.
    """

    def __init__(
        self,
        model: DynamicModel,
        tokenizers: Mapping[str | None, PreTrainedTokenizerBase],
        limits: Limits,
    ):
        self.model, self.tokenizers, self.limits = model, tokenizers, limits
        self.known = known_tokens(model)
        places = getattr(model.backbone.config, "max_position_embeddings", None)
        self.places = places or limits.prompt_tokens + limits.tokens

    def row(self, task: str | None, prompt: str, tokens: int) -> Row:
        """A prompt as a row of a batch.

        Raises:
            Refused: 400 for prompts that are empty or too long.
        """
        return self._row(task, self.tokenizers[task](prompt, verbose=False), tokens)

    def turn(
        self, task: str | None, messages: Sequence[Message], tokens: int | None
    ) -> Row:
        """A conversation, to be continued by the next message, as a row of a batch.

        Args:
            tokens: at most; as many as are allowed and have room if None.

        Raises:
            Refused: 400 for conversations that are too long, and that the task's tokenizer has no layout for.
        """
        tokenizer = self.tokenizers[task]
        if not tokenizer.chat_template:
            raise Refused(400, "The model's tokenizer has no layout of conversations (chat_template); send a prompt to /v1/completions.")  # fmt: skip
        try:
            text = laid_out(tokenizer, messages)
            # its first token is there already, where the layout has it
            encoded = tokenizer(text, add_special_tokens=False, verbose=False)
        except Exception as error:  # of any type, for a layout is a program
            raise Refused(
                400, f"The model's layout of conversations refuses these: {error}"
            ) from error
        return self._row(task, encoded, tokens)

    def _row(
        self, task: str | None, encoded: Mapping[str, Any], tokens: int | None
    ) -> Row:
        ids, least = encoded["input_ids"], tokens or 1
        most = min(self.limits.prompt_tokens, self.places - least)
        if not 0 < len(ids) <= most:
            raise Refused(
                400,
                f"A prompt is of {len(ids)} tokens, expected 1 to {most} before {least} more.",
            )
        check_tokens(self.tokenizers[task], ids, self.known[task])
        room = min(self.limits.tokens, self.places - len(ids))
        return Row(task, ids, tokens or room)

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row]) -> list[Completion]:
        return answered(self.model, rows, self._by_settings)

    def _ends_of(self, task: str | None) -> frozenset[int]:
        """Tokens that end a text of a task: by its settings of generation, the base model's, or the tokenizer; of any task where
        the router finds it."""
        if task is None:
            return frozenset().union(*map(self._ends_of, self.model.tasks))
        backbone = self.model.backbone
        own = generation_of(self.model.info, task, backbone)
        ends = (own or backbone.generation_config).eos_token_id
        ends = self.tokenizers[task].eos_token_id if ends is None else ends
        return frozenset([ends] if isinstance(ends, int) else ends or ())

    def _by_settings(self, rows: Sequence[Row]) -> list[Completion]:
        """Texts that end by the same tokens, and are written by the same settings, are one batch; what the router finds the task of is
        written by the base model's."""
        info = self.model.info
        told = [json.dumps(greedy_settings(info, r.task), sort_keys=True) for r in rows]
        keys = [(self._ends_of(row.task), one) for row, one in zip(rows, told)]
        return by_key(rows, keys, lambda some, key: self._continued(some, key[0]))

    def _continued(self, rows: Sequence[Row], ends: frozenset[int]) -> list[Completion]:
        longest, pad = max(len(row.content) for row in rows), self._padding
        more, backbone = max(row.tokens for row in rows), self.model.backbone
        settings = {"generation_config": backbone.generation_config}
        settings |= generation_for(self.model.info, [rows[0].task], backbone, {})
        if len(rows) > 1 and (
            # each has room by itself, a short prompt that goes on for long beside a long one has not
            longest + more > self.places
            or not self._are_one_batch(rows, settings["generation_config"])
        ):
            return [self._continued([row], ends)[0] for row in rows]
        ids = [[pad] * (longest - len(r.content)) + r.content for r in rows]
        mask = [[0] * (longest - len(r.content)) + [1] * len(r.content) for r in rows]
        inputs = _inputs(ids, mask, backbone.device)
        found = self.model.generate(
            **inputs,
            **tasks_of(self.model, rows, inputs),
            max_new_tokens=more,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
            **settings,
        )
        return [
            self._told(row, ends, out[longest:].tolist())
            for row, out in zip(rows, found)
        ]

    def _are_one_batch(self, rows: Sequence[Row], config: GenerationConfig) -> bool:
        """Whether each is continued as by itself beside the others."""
        lengths = {len(row.content) for row in rows}
        if config.forced_eos_token_id is not None and len({r.tokens for r in rows}) > 1:
            return False  # it comes where the longest has to end
        reads = any(
            getattr(config, name, None) not in idle
            for name, idle in _READ_PADDING.items()
        )
        return len(lengths) == 1 or (not reads and self.skips_padding)

    @cached_property
    def skips_padding(self) -> bool:
        """Whether a prompt goes on as it would by itself where padding is in front of it; models with a state may read that too,
        RWKV at once, Mamba where a short prompt leaves it in the window of its convolution.
        """
        by_itself = self._logits([self._probe], [1])
        padded = self._logits([self._padding] * 4 + [self._probe], [0] * 4 + [1])
        found = bool((padded - by_itself).norm() <= _ROUNDING * by_itself.norm())
        if not found:
            log.warning(
                "%s reads what pads prompts: prompts of several lengths are continued one by one.",
                type(self.model.backbone).__name__,
            )
        return found

    @property
    def _probe(self) -> int:
        """A token that pads nothing."""
        return 0 if self._padding else 1

    def _logits(self, ids: list[int], mask: list[int]) -> Tensor:
        """Of the two tokens after a prompt, by the base model."""
        backbone = self.model.backbone
        found = backbone.generate(
            **_inputs([ids], [mask], backbone.device),
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            num_beams=1,
            pad_token_id=self._padding,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(found.logits).float()

    @cached_property
    def _padding(self) -> int:
        """A token that every vocabulary has: one that pads, else one that ends a text, else the first."""
        pads = [tokenizer.pad_token_id for tokenizer in self.tokenizers.values()]
        known = min(self.known.values())
        asked = (*pads, *self._ends_of(None))
        return next((one for one in asked if one is not None and one < known), 0)

    def _told(self, row: Row, ends: frozenset[int], found: list[int]) -> Completion:
        found, finish = found[: row.tokens], "length"
        for place, token in enumerate(found):
            if token in ends:
                found, finish = found[:place], "stop"
                break
        text = self.tokenizers[row.task].decode(found, skip_special_tokens=True)
        return Completion(text, len(row.content), len(found), finish)


def _inputs(
    ids: list[list[int]], mask: list[list[int]], device: torch.device
) -> dict[str, Tensor]:
    pairs = {"input_ids": ids, "attention_mask": mask}
    return {name: torch.tensor(rows, device=device) for name, rows in pairs.items()}
