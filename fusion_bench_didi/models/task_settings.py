"""Names of classes, and settings of losses and of generation, that tasks have of their own, of which the base model has others."""

import copy
import math
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

from torch import nn
from transformers import GenerationConfig

from ..errors import DiDiError
from ..pools.carried import MULTI_LABEL, PROBLEM
from ..pools.task_settings import CONFIGURATION, GENERATION, LABELS
from ..serving.own_settings import put
from ..serving.shapes import ends_of
from .interface import Merged

#: settings of generation that change no text, and those of sampling alone
_SAME_TEXT = {"pad_token_id", "bos_token_id", "use_cache", "return_dict_in_generate"}
_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "typical_p"}


def told_of(info: Mapping[str, Any], kind: str, task: str | None) -> dict[str, Any]:
    """What a task's checkpoint said of a kind of settings otherwise than the base model."""
    return info.get(kind, {}).get(task, {})


def labels_of(info: Mapping[str, Any], task: str | None) -> dict[int, str]:
    """Names of a task's classes by position; empty where they are the base model's."""
    told = told_of(info, LABELS, task)
    return {int(place): name for place, name in told.items()}


def generation_of(
    info: Mapping[str, Any], task: str | None, backbone: nn.Module
) -> GenerationConfig | None:
    """A task's settings of generation; None where they are the base model's."""
    told = told_of(info, GENERATION, task)
    if not told:
        return None
    config = copy.deepcopy(backbone.generation_config)
    known = config.to_dict()
    config.update(**{key: value for key, value in told.items() if key in known})
    return config


def with_own_vocabulary(model: Merged) -> list[str]:
    """Tasks whose first or last layer has another number of rows than the base model's, so that its tokenizer is not theirs."""
    rows = _rows_of_ends(model, nn.Module)
    return [
        task
        for task, deltas in model._stored[1].items()
        if any(deltas[n].shape[0] != rows[n] for n in deltas.keys() & rows)
    ]


def known_tokens(model: Merged) -> dict[str | None, float]:
    """How many tokens the first layer of each task knows, and under None that of the base model; infinity where it is no table."""
    rows = _rows_of_ends(model, nn.Embedding)
    base = min(rows.values(), default=math.inf)
    own = {
        task: min((deltas[n].shape[0] for n in deltas.keys() & rows), default=base)
        for task, deltas in model._stored[1].items()
    }
    return {None: base, **own}


def _rows_of_ends(model: Merged, kind: type[nn.Module]) -> dict[str, int]:
    """Rows of the weights of first and last layers, under every name that they have.

    Args:
        kind: of layers.
    """
    layers = [end for end in ends_of(model.backbone) if isinstance(end, kind)]
    ends = {id(layer) for layer in layers if hasattr(layer, "weight")}
    return {
        f"{name}.weight": len(module.weight)
        for name, module in model.backbone.named_modules(remove_duplicate=False)
        if id(module) in ends
    }


def problem_of(
    info: Mapping[str, Any], task: str | None, config: Any, classes: int
) -> str | None:
    """What kind of problem a task is, as ``transformers`` calls it; None where that is not said.

    Args:
        config: of the base model, whose kind that of a task with as many classes is.
        classes: of the task.
    """
    told = told_of(info, CONFIGURATION, task)
    problem = told.get(PROBLEM, getattr(config, PROBLEM, None))
    if PROBLEM in told or classes == config.num_labels or problem == MULTI_LABEL:
        return problem
    return None


def settings_of(info: Mapping[str, Any], task: str, model: nn.Module) -> dict[str, Any]:
    """What the configuration of a model says under a task, where that is another's than the task's; and what forwards find out of
    labels and note there."""
    config, names = getattr(model, "config", None), labels_of(info, task)
    found = {PROBLEM: config.problem_type} if hasattr(config, PROBLEM) else {}
    found |= told_of(info, CONFIGURATION, task)
    if names and getattr(config, "num_labels", None) == len(names):
        found["id2label"] = names
        found["label2id"] = {name: place for place, name in names.items()}
    return found


def settle(plain: nn.Module, info: Mapping[str, Any], task: str) -> None:
    """Give a task's plain model what its checkpoint said."""
    put(plain, settings_of(info, task, plain))
    if generation := generation_of(info, task, plain):
        plain.generation_config = generation


def greedy_settings(info: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    """A task's settings of generation, other than the base model's, that change what is written greedily, ends and length aside."""
    others = {*_SAME_TEXT, *_SAMPLING, "do_sample", "eos_token_id", "max_length"}
    told = told_of(info, GENERATION, task)
    return {key: value for key, value in told.items() if key not in others}


def generation_for(
    info: Mapping[str, Any],
    tasks: Iterable[str | None],
    backbone: nn.Module,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of ``generate`` by which tasks write as their checkpoints say, as far as none are given.

    Args:
        tasks: of the prompts; None is the shared model, which writes as the base model does.
        given: arguments of the call.

    Raises:
        DiDiError: for tasks that have other settings than one another, which one batch cannot have.
    """
    if GENERATION not in info or given.get("generation_config") is not None:
        return {}
    tasks = list(tasks)
    told = [told_of(info, GENERATION, task) for task in tasks]
    keys = set().union(*told) - set(given) - _SAME_TEXT
    if given.get("do_sample") is False:
        keys -= _SAMPLING
    if "max_new_tokens" in given:
        keys -= {"max_length"}
    said = [{key: one.get(key, ...) for key in keys} for one in told]
    if differing := sorted(k for k in keys if any(s[k] != said[0][k] for s in said)):
        raise DiDiError(
            f"The tasks of these prompts are generated from with other settings than one another ({', '.join(differing)}). Give "
            "them to generate for all, or a generation_config, or generate for each task by itself."
        )
    found = generation_of(info, tasks[0], backbone) if tasks else None
    if found is None:
        return {}
    settings: dict[str, Any] = {"generation_config": found}
    # transformers 4 would put the base model's values in place of defaults
    if "use_model_defaults" in signature(backbone.generate).parameters:
        settings["use_model_defaults"] = False
    return settings
