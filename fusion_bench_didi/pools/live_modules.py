"""What live modules compute with their tensors: the base model runs all tasks, so that a fine-tuned module must compute the same.

Models of transformers say it in their configurations, see ``configurations.py``; of other modules it is found out here.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..errors import CheckpointMismatchError, some
from ..task_vectors.code_names import read_by_forward
from ..task_vectors.live_models import OF_ALL_MODULES, all_tensors
from .configurations import COMPUTED
from .live_functions import hooks, replaced

log = logging.getLogger(__name__)

#: Where classes come from all of whose settings are known.
_LIBRARY = "torch.nn.modules."
#: Settings of such classes that shapes of tensors tell.
_SIZES = {
    *("in_features", "out_features", "in_channels", "out_channels", "num_features"),
    *("num_embeddings", "embedding_dim", "normalized_shape", "num_channels"),
    *("embed_dim", "kdim", "vdim", "in1_features", "in2_features"),
}
#: And those that matter to training alone.
_TRAINING = {
    *("training", "momentum", "inplace", "padding_idx", "sparse", "p"),
    *("scale_grad_by_freq", "dropout", "track_running_stats", "label_smoothing"),
}
_SCALARS = (bool, int, float, str, type(None))
#: Words in the name of a number or tensor of any class that matters to training alone, or was found in it.
_ONLY_TRAINED = (
    *("drop", "lr", "learning_rate", "loss", "decay", "momentum"),
    *("acc", "accuracy", "best", "epoch", "f1", "metric", "perplexity", "score"),
)


def check_modules(base: nn.Module, tuned: Mapping[str, nn.Module]) -> None:
    """Fine-tuned modules must compute what the base model's do.

    Args:
        tuned: by task, modules in memory.

    Raises:
        CheckpointMismatchError: listing what tasks would lose: other classes, settings, replaced functions, and tensors that no
            state dict holds.
    """
    matched = {task: _matched(base, module) for task, module in tuned.items()}
    faults, left = [], {}
    for task, pair in matched.items():
        lost, left[task] = _differing_beside(*pair)
        told = _configured(base) and _configured(tuned[task])
        found = lost if told else [*_differing(*pair), *lost]
        faults += [f"{task}: {fault}" for fault in found]
    if faults:
        raise CheckpointMismatchError(
            "Fine-tuned modules compute something else with their tensors than the base model, which runs all tasks (base model's != "
            "fine-tuned model's):\n  "
            + "\n  ".join(faults)
            + "\nGive the base model what they have in common, let what differs be registered (register_buffer, nn.Parameter, "
            "nn.ModuleList), which each task keeps, delete what forwards only left there, or take these models out of the pool."
        )
    for task, pair in matched.items():
        if hooked := _hooked(*pair):
            log.warning("%s has other hooks than the base model, with whose hooks all tasks run, on %s.", task, some(hooked))  # fmt: skip
        if unlike := [*left[task], *_unlike_values(*pair)]:
            log.warning(
                "%s differs from the base model in what its forward reads and no state dict holds (base model's != fine-tuned model's): "
                "%s. All tasks will run with the base model's; let it be a buffer if a task depends on it.",
                task,
                "; ".join(unlike[:4]),
            )


def _matched(base: nn.Module, tuned: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The two, or what one of them is wrapped in or part of (DataParallel, averages of weights, a tower of a whole model)."""
    inside = ((base, m) for m in tuned.modules() if type(m) is type(base))
    around = ((m, tuned) for m in base.modules() if type(m) is type(tuned))
    return next(chain(inside, around), (base, tuned))


def _configured(module: nn.Module) -> bool:
    return isinstance(getattr(module, "config", None), PretrainedConfig)


def _pairs(
    base: nn.Module, tuned: nn.Module
) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Modules of both by name."""
    there = dict(tuned.named_modules())
    for name, module in base.named_modules():
        if name in there:
            yield name, module, there[name]


def _differing(base: nn.Module, tuned: nn.Module) -> Iterator[str]:
    for first, second, which in ((base, tuned, "base"), (tuned, base, "fine-tuned")):
        known = dict(second.named_modules())
        for name, module in first.named_modules():
            # what holds tensors is found by those
            if name not in known and _acts(module) and not module.state_dict():
                yield f"{name} ({_class(module)}) is in the {which} model only"
    for name, here, there in _pairs(base, tuned):
        yield from _unlike(name or "the model", here, there)


def _unlike(shown: str, here: nn.Module, there: nn.Module) -> Iterator[str]:
    """How two modules compute something else with the tensors of a state dict."""
    kinds = (_class(here), _class(there))
    if kinds[0] != kinds[1] and type(here).forward is not type(there).forward:
        yield "{} is {} != {}".format(shown, *kinds)
        return
    mine, theirs = replaced(here), replaced(there)
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            yield f"{shown} has a {key} of its own in one of them, or another"
    mine, theirs = _settings(here), _settings(there)
    for key in sorted(mine.keys() & theirs.keys()):
        if mine[key] != theirs[key]:
            yield f"{shown}: {key} {mine[key]!r} != {theirs[key]!r}"
    unsaved = here._non_persistent_buffers_set & there._non_persistent_buffers_set
    for leaf in sorted(unsaved):
        if not _same(here._buffers.get(leaf), there._buffers.get(leaf)):
            yield f"{shown}: the buffer {leaf}, which is in no state dict, is another"


def _differing_beside(base: nn.Module, tuned: nn.Module) -> tuple[list[str], list[str]]:
    """What differs of what forwards of the two read and no state dict holds: what tasks would lose, and what may only be left there.

    Tensors that one of two holds, or of other sizes, are of the latter kind: what forwards work out, or keep of their inputs.
    """
    lost, left = [], []
    here, there = _beside(base), _beside(tuned)
    for place in sorted(here.keys() | there.keys()):
        mine, theirs = here.get(place), there.get(place)
        parts = [part for part in (mine, theirs) if part is not None]
        if all(isinstance(part, nn.Module) for part in parts):
            if len(parts) == 2:
                lost += _unlike(place, *parts)
            else:
                which = "base" if theirs is None else "fine-tuned"
                lost.append(f"{place} ({_class(parts[0])}) is in the {which} model only")  # fmt: skip
        elif len(parts) == 1:
            sides = ("none" if one is None else "a tensor" for one in (mine, theirs))
            left.append("{} {} != {}".format(place, *sides))
        elif not all(isinstance(part, Tensor) for part in parts):
            lost.append(f"{place} is a tensor in one of them only")
        elif not _same(mine, theirs) or (
            isinstance(mine, nn.Parameter) and mine.shape != theirs.shape
        ):
            lost.append(f"the tensor {place}, which is in no state dict, is another")
        elif mine.shape != theirs.shape:
            left.append(f"{place} of shape {tuple(mine.shape)} != {tuple(theirs.shape)}")  # fmt: skip
    return lost, left


def _unlike_values(base: nn.Module, tuned: nn.Module) -> Iterator[str]:
    """What differs of other values that forwards of classes of the user's own read: numbers, texts, functions, and lists of them."""
    for name, here, there in _pairs(base, tuned):
        if _is_known(here) or _configured(here) or type(here) is not type(there):
            continue
        settings = _settings(here)
        mine, theirs = vars(here), vars(there)
        for key in sorted(read_by_forward(type(here)) & mine.keys() & theirs.keys()):
            if key in OF_ALL_MODULES or key in settings or _trained(key.strip("_")):
                continue
            told = _told(mine[key]), _told(theirs[key])
            if None not in told and told[0] != told[1]:
                yield "{}{} {:.60} != {:.60}".format(name and f"{name}.", key, *told)


def _told(value: Any) -> str | None:
    """A value as text that is equal for equal ones; None for what has none."""
    if isinstance(value, (list, tuple)):
        parts = [*map(_told, value)]
        return None if None in parts else f"[{', '.join(parts)}]"
    if isinstance(value, dict):
        told = {repr(key): _told(one) for key, one in value.items()}
        if None in told.values():
            return None
        return f"{{{', '.join(f'{key}: {one}' for key, one in told.items())}}}"
    if isinstance(value, _SCALARS):
        return repr(value)
    name = getattr(value, "__name__", None)
    return name if callable(value) and isinstance(name, str) else None


def _is_known(module: nn.Module) -> bool:
    """Whether a class is known to keep nothing of a task's beside its tensors, but caches, or counts and states of a metric."""
    kinds = [kind.__module__ for kind in type(module).__mro__]
    metric = any(place.startswith("torchmetrics.") for place in kinds)
    return metric or kinds[0].startswith("transformers.")


def _beside(model: nn.Module) -> dict[str, Tensor | nn.Module]:
    """Tensors and modules that forwards read of plain attributes, also in lists, tuples and dictionaries, by where they are.

    Those that the model has registered elsewhere are left out, and what is worked out anew.
    """
    own = (*model.modules(), *model.parameters(), *model.buffers())
    known = {id(part) for part in own}

    def walk(place: str, value: Any) -> Iterator[tuple[str, Tensor | nn.Module]]:
        if id(value) in known:
            return
        if isinstance(value, Tensor):
            yield place, value
        elif isinstance(value, nn.Module):
            for name, tensor in all_tensors(value).items():
                yield from walk(f"{place}.{name}", tensor)
            for name, module in value.named_modules(prefix=place):
                if id(module) not in known:
                    known.add(id(module))
                    yield name, module
                    yield from attributes(f"{name}.", module)
        elif isinstance(value, (list, tuple, dict)):
            known.add(id(value))
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            for key, part in parts:
                yield from walk(f"{place}[{key!r}]", part)

    def attributes(
        prefix: str, module: nn.Module
    ) -> Iterator[tuple[str, Tensor | nn.Module]]:
        if _is_known(module):
            return
        for key, value in vars(module).items():
            if key in OF_ALL_MODULES or key not in read_by_forward(type(module)):
                continue
            found = list(walk(prefix + key, value))
            if _trained(key.lower().strip("_")):
                found = [pair for pair in found if isinstance(pair[1], nn.Module)]
            if found and not _worked_out(module, key):
                yield from found

    return {
        place: part
        for name, module in model.named_modules()
        for place, part in attributes(f"{name}." if name else "", module)
    }


def _worked_out(module: nn.Module, key: str) -> bool:
    """Whether an attribute is worked out before every forward, as by hooks of weight norms, or for evaluation only."""
    if module._forward_pre_hooks:
        if any(name.startswith(f"{key}_") for name in module._parameters):
            return True
    if module.training or type(module).train is nn.Module.train:
        return False
    try:
        twin = copy.deepcopy(module)
        twin.train()
    except Exception:  # tensors with gradients, locks, whatever a class does there
        return False
    left = vars(twin).get(key)
    return left is None or (isinstance(left, (list, tuple, dict)) and not left)


def _acts(module: nn.Module) -> bool:
    """Whether a module without tensors may do something once a model is trained."""
    name = type(module).__name__.lower()
    return not isinstance(module, nn.Identity) and "drop" not in name


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _settings(module: nn.Module) -> dict[str, Any]:
    """Settings of a module that its outputs may depend on; nan is itself."""
    library = type(module).__module__.startswith(_LIBRARY)

    def counts(key: str, value: Any) -> bool:
        if library:
            return key not in _SIZES | _TRAINING
        return key in COMPUTED or (type(value) is float and not _trained(key.lower()))

    return {
        key: repr(value) if value != value else value
        for key, value in vars(module).items()
        if not key.startswith("_") and _plain(value) and counts(key, value)
    }


def _trained(key: str) -> bool:
    """Whether a number of that name matters to training alone."""
    words = key.split("_")
    return any(part in words or key.startswith(part) for part in _ONLY_TRAINED)


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    return isinstance(value, _SCALARS)


def _same(left: Tensor | None, right: Tensor | None) -> bool:
    """Equal, or of other sizes, as what is worked out for the longest input so far; in the smaller type where those differ."""
    if left is None or right is None or left.shape != right.shape:
        return True
    if left.is_meta or right.is_meta:
        return True
    small = min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
    left, right = (x.cpu().to_dense().to(small) for x in (left, right))
    odd = left != left
    return torch.equal(odd, right != right) and torch.equal(left[~odd], right[~odd])


def _hooked(base: nn.Module, tuned: nn.Module) -> list[str]:
    """Modules on which the two have other hooks."""
    return [
        name or "the model"
        for name, here, there in _pairs(base, tuned)
        if hooks(here) != hooks(there)
    ]
