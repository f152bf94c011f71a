"""Methods of the backbone, called on the merged model: they run as the current task, or for tasks given, or are refused.

Attributes of the backbone are the merged model's too. What runs the network must not do so as the base model unasked.
"""

import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import DiDiError, UnknownTaskError
from ..serving.calls import check_meant
from ..serving.generation import GENERATE, call_of, generate, prompt_of
from ..serving.shadow import shallow
from .interface import Merged
from .task_settings import generation_for

#: Where classes come from whose methods look at a model, or prepare it, and do not run it.
_LOOKING = (
    "torch.",
    "transformers.modeling_",
    "transformers.utils.",
    "transformers.integrations.",
)
#: Methods that model classes define to be looked at through.
_SEEN = ("get_input_embeddings", "get_output_embeddings", "get_position_embeddings")
#: Methods of such classes that hand on what runs, or the weights as they are.
_HANDING_ON = ("get_encoder", "get_decoder")
#: Methods that change how the network runs, or the shapes of its tensors.
_CHANGING = (
    "resize_token_embeddings",
    "resize_position_embeddings",
    "prune_heads",
    "gradient_checkpointing_enable",
    "gradient_checkpointing_disable",
    "set_attn_implementation",
    "set_input_embeddings",
    "set_output_embeddings",
)


def no_task(model: Merged) -> UnknownTaskError:
    """The error for a model that is run without a task."""
    return UnknownTaskError(
        f"No task is set. Call set_task(...) with one of {model.tasks}, evaluate with a task-aware pool, or attach "
        "a router."
    )


def attribute(model: Merged, name: str, value: Any) -> Any:
    """An attribute of the backbone as one of the merged model.

    Args:
        value: the backbone's.
    """
    if isinstance(value, nn.Module):
        runs_alone = model.current_task is None and any(
            True for _ in value.parameters()
        )
        return _guarded(model, value) if runs_alone else value
    if name in _CHANGING:
        return _changing(model, value)
    if not runs(model.backbone, name, value):
        return value
    return _method(model, name, value)


def _changing(model: Merged, value: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(value)
    def method(*args: Any, **kwargs: Any) -> Any:
        found = value(*args, **kwargs)
        model.backbone_changed()
        return found

    return method


def runs(backbone: nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute is a function that may run the network."""
    if isinstance(value, (types.FunctionType, functools.partial)):
        return name in vars(backbone)
    if not isinstance(getattr(value, "__self__", None), nn.Module):
        return False
    if name in _HANDING_ON or name in vars(backbone) or value.__self__ is not backbone:
        return True
    if name in _SEEN or name.replace("set_", "get_", 1) in _SEEN:
        return False
    home = next((c for c in type(backbone).__mro__ if name in vars(c)), None)
    return home is None or not f"{home.__module__}.".startswith(_LOOKING)


def _guarded(model: Merged, module: nn.Module) -> nn.Module:
    """A part of the backbone that is looked at as it is, and refuses to run while no task is set."""

    def refuse(*_: Any) -> None:
        if model.current_task is None:
            raise no_task(model)

    twin = shallow(module)
    # what torch.compile wraps a module in would set these on that
    vars(twin).update(_forward_pre_hooks=OrderedDict(module._forward_pre_hooks))
    twin.register_forward_pre_hook(refuse, prepend=True)
    return twin


def _method(model: Merged, name: str, value: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(value)
    def method(
        *args: Any, task_ids: Any = None, task_weights: Any = None, **kwargs: Any
    ) -> Any:
        if task_ids is not None or task_weights is not None:
            check_meant(value, args, task_ids, task_weights)
            if name == GENERATE:
                return _generated(model, args, kwargs, task_ids, task_weights)
            forward = model.mixed_for(task_weights)
            return forward(task_ids, task_weights, args, kwargs, name)
        if model.current_task is not None:
            if name == GENERATE:
                tasks = [model.current_task]
                kwargs |= generation_for(model.info, tasks, model.backbone, kwargs)
            return model.run_alone(value, *args, **kwargs)
        if model.router is None:
            raise no_task(model)
        if name != GENERATE:
            raise DiDiError(
                f"{name} is no forward that a router could look at. Give task_ids, or set a task with set_task(...)."
            )
        return _generated(model, args, kwargs)

    return method


@torch.no_grad()
def _generated(
    model: Merged,
    args: tuple,
    kwargs: dict,
    task_ids: Any = None,
    task_weights: Any = None,
) -> Any:
    """Continue prompts with the settings of generation of their tasks: those given, or those that the router finds."""
    routed = task_ids is None and task_weights is None
    forward = model.mixed if routed else model.mixed_for(task_weights)
    call = call_of(forward, args, kwargs)
    if routed:
        task_weights = model.router.route(model, **prompt_of(forward, call))
    mix = forward.mix(task_ids, task_weights, call)
    names = [*model.tasks, None]
    tasks = [names[place] for place in mix.asked]
    settings = generation_for(model.info, tasks, model.backbone, call.kwargs)
    return generate(forward, mix, replace(call, kwargs={**call.kwargs, **settings}))
