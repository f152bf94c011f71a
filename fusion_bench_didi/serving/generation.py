"""Text for prompts of several tasks: every sample continued by its own task's model, in one batch.

The prompts are sorted by task once and generated from together in the network of per-sample layers, caches and all; where
there is none, task by task through the backbone.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DiDiError, some
from .calls import Call, parameter_names
from .forward import MixedForward
from .layers import UnsupportedShape
from .mixtures import Mix
from .outputs import reordered, rows_of_samples

GENERATE = "generate"
#: What is asked row by row of the batch, whose rows are sorted here.
BY_ROW = ("prefix_allowed_tokens_fn", "streamer", "assistant_model")
#: Lists of what is asked about all rows in every step.
EVERY_STEP = ("logits_processor", "stopping_criteria")
#: Of those, what transformers has that does the same to a row wherever it stands.
_BY_ITSELF = frozenset(
    "MinLengthLogitsProcessor MinNewTokensLengthLogitsProcessor TemperatureLogitsWarper RepetitionPenaltyLogitsProcessor "
    "TopPLogitsWarper TopKLogitsWarper MinPLogitsWarper TypicalLogitsWarper EpsilonLogitsWarper EtaLogitsWarper "
    "NoRepeatNGramLogitsProcessor SequenceBiasLogitsProcessor NoBadWordsLogitsProcessor ForcedBOSTokenLogitsProcessor "
    "ForcedEOSTokenLogitsProcessor InfNanRemoveLogitsProcessor ExponentialDecayLengthPenalty LogitNormalization "
    "SuppressTokensAtBeginLogitsProcessor SuppressTokensLogitsProcessor WatermarkLogitsProcessor "
    "MaxLengthCriteria MaxTimeCriteria StopStringCriteria EosTokenCriteria".split()
)
#: Arguments of ``generate`` that are no samples beside the settings.
OTHERS = (
    *EVERY_STEP,
    "generation_config",
    "stop_strings",
    "tokenizer",
    "use_model_defaults",
)


def call_of(forward: MixedForward, args: tuple, kwargs: Mapping[str, Any]) -> Call:
    """A call of the backbone's ``generate``."""
    settings = _settings(getattr(forward.backbone, "generation_config", None))
    call = forward.call(args, kwargs, GENERATE)
    return replace(call, also_for_all=frozenset((*settings, *OTHERS)))


def prompt_of(forward: MixedForward, call: Call) -> dict[str, Any]:
    """Arguments of the backbone's forward that the prompts amount to."""
    backbone, given = forward.backbone, call.given
    taken = set(parameter_names(backbone.forward)) - {"past_key_values", "labels"}
    prompt = {k: v for k, v in given.items() if k in taken and v is not None}
    name, samples = call.samples
    prompt[backbone.main_input_name if name == "inputs" else name] = samples
    if backbone.config.is_encoder_decoder and "decoder_input_ids" not in prompt:
        start = backbone.generation_config.decoder_start_token_id or 0
        prompt["decoder_input_ids"] = torch.full(
            (call.size, 1), start, device=samples.device
        )
    return prompt


def generate(forward: MixedForward, mix: Mix, call: Call) -> Any:
    """Continue every prompt under its own task.

    Raises:
        DiDiError: for options that are asked row by row.
    """
    groups = list(mix.groups())
    asked = [name for name in BY_ROW if call.given.get(name) is not None]
    if asked and len(groups) > 1:
        raise DiDiError(
            f"{asked[0]} is not for prompts of several tasks; generate for each task by itself."
        )
    network = forward.network
    if network is not None and not mix.uniform:
        probe = forward.call((), prompt_of(forward, call))
        try:
            if forward.verify(mix, probe):
                given = call if mix.in_order else _sorted(call, mix.order)
                return _as_given(forward.passed(network, mix, given), mix)
        except UnsupportedShape as reason:
            forward.give_up(reason)
    if len(groups) == 1 and mix.in_order:
        return forward.alone(mix, call)
    if by_place := _by_place(call):
        raise DiDiError(
            f"Prompts of several tasks are continued task by task with this model, and {some(by_place)} may go by the place of a prompt "
            "among all of them; generate for each task by itself."
        )
    parts = [forward.alone(group, call.picked(group.order)) for group in groups]
    if not all(isinstance(part, Tensor) for part in parts):
        raise DiDiError(
            "Prompts of several tasks are continued task by task with this model, of which only the tokens are put together; "
            "leave return_dict_in_generate out, or generate for each task by itself."
        )
    longest, fill = max(part.shape[1] for part in parts), _padding(forward, call)
    rows = [F.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts]
    order = torch.cat([group.order for group in groups])
    return reordered(torch.cat(rows), order, None)


def _by_place(call: Call) -> set[str]:
    """Classes of what may do to a row what it would not do elsewhere in the batch."""
    asked = (one for name in EVERY_STEP for one in call.given.get(name) or ())
    return {type(one).__name__ for one in asked if not _is_by_itself(one)}


def _is_by_itself(one: Any) -> bool:
    kind = type(one)
    ours = kind.__module__.startswith("transformers.generation.")
    return ours and kind.__name__ in _BY_ITSELF


def _sorted(call: Call, order: Tensor) -> Call:
    """The call with its prompts sorted, while what is asked in every step goes on seeing them as they were given."""
    others = {
        name: type(given)(
            one if _is_by_itself(one) else _AsGiven(one, order) for one in given
        )
        for name in EVERY_STEP
        if (given := call.given.get(name))
    }
    return call.picked(order).changed(lambda name, value: others.get(name, value))


class _AsGiven:
    """A logits processor, or a criterion for stopping, of prompts that are sorted: it sees their rows, and answers, in the order in
    which they were given.

    Args:
        order: (B,) where the sorted prompts are in the batch as given; each has one row or, of several beams, several.
    """

    def __init__(self, inner: Any, order: Tensor):
        self._inner, self._order, self._back = inner, order, order.argsort()

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        rows = len(input_ids)

        def moved(value: Any, order: Tensor) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(moved(one, order) for one in value)
            if not isinstance(value, Tensor) or not value.ndim or len(value) != rows:
                return value
            index = rows_of_samples(order, rows // len(order))
            return value.index_select(0, index.to(value.device))

        given = (moved(value, self._back) for value in (input_ids, scores))
        return moved(self._inner(*given), self._order)


def _as_given(output: Any, mix: Mix) -> Any:
    """Outputs of sorted prompts in the order of the prompts."""
    if mix.in_order:
        return output
    if getattr(output, "beam_indices", None) is not None:
        raise DiDiError(
            "The positions of beams are those of prompts that are sorted by task; sort them before, or leave "
            "return_dict_in_generate out."
        )
    return reordered(output, mix.order, None)


def _padding(forward: MixedForward, call: Call) -> int:
    """Token that shorter rows end with, as ``generate`` itself pads."""
    asked = call.given
    own = getattr(forward.backbone, "generation_config", None)
    settings = (asked, _settings(asked.get("generation_config")), _settings(own))
    keys = ("pad_token_id", "eos_token_id")
    told = (held.get(key) for key in keys for held in settings)
    found = next((value for value in told if value is not None), 0)
    return int(torch.as_tensor(found).flatten()[0])


def _settings(config: Any) -> dict[str, Any]:
    return {} if config is None else vars(config)
