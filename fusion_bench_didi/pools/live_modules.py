"""What live modules compute with their tensors: the base model runs all tasks, so that a fine-tuned module must compute the same.

Models of transformers say most of it in their configurations, see ``configurations.py``; what was changed since, and all of other
modules, is found out here.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import CheckpointMismatchError, some
from ..task_vectors.code_names import read_by_forward, set_by_forward
from ..task_vectors.live_models import OF_ALL_MODULES, all_tensors, of_peft
from .configurations import COMPUTED, is_unrelated
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
#: Where transformers puts code of the hub, anew for each directory.
_REMOTE = "transformers_modules."
_SCALARS = (bool, int, float, str, type(None))
#: Parts of names of such numbers in transformers' own modules that outputs depend on, beside settings.
_SCALES = ("eps", "scal")
#: Kinds of rotary positions that are worked out anew for longer inputs.
_BY_LENGTH = ("dynamic", "longrope")
#: What functions of attention read of the module that they are given.
_OF_ATTENTION = {"is_causal", "num_key_value_groups"}
#: Faults that are told of a task.
_MOST = 8
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
    faults, switched, left = [], [], {}
    for task, pair in matched.items():
        lost, left[task] = _differing_beside(*pair)
        alike = _configured(base) and _configured(tuned[task])
        learned = _learned_inputs(tuned[task], pair[1])
        found = [*learned, *_differing(*pair, alike), *lost]
        faults += [f"{task}: {fault}" for fault in found[:_MOST]]
        faults += [f"{task}: and {len(found) - _MOST} more"] if found[_MOST:] else []
        if unlike := [*_unlike_values(*pair, True)]:
            switched.append(f"{task}: {some(unlike)}")
    if switched:
        raise CheckpointMismatchError(
            "Layers of PEFT run otherwise in fine-tuned models than in the base model, which runs all tasks (base model's != fine-tuned "
            "model's):\n  "
            + "\n  ".join(switched)
            + "\nGive plain models, which merge_and_unload() returns, or the plain base model and the directories to which "
            "save_pretrained(...) wrote the adapters."
        )
    if faults:
        raise CheckpointMismatchError(
            "Fine-tuned modules compute something else with their tensors than the base model, which runs all tasks (base model's != "
            "fine-tuned model's):\n  "
            + "\n  ".join(faults)
            + "\nGive the base model what they have in common, let what differs be registered (register_buffer, nn.Parameter, "
            "nn.ModuleList), which each task keeps, delete what forwards only left there, or take these models out of the pool."
        )
    for task, pair in matched.items():
        if around := [*_around(tuned[task], pair[1])]:
            log.warning(
                "%s (%s) runs %s beside what the base model has, and no task will. Put the base model into the same wrapper if tasks depend on it.",
                task,
                type(tuned[task]).__name__,
                some(around),
            )
        if hooked := _hooked(*pair):
            log.warning("%s has other hooks than the base model, with whose hooks all tasks run, on %s.", task, some(hooked))  # fmt: skip
        if unlike := [*left[task], *_unlike_values(*pair, False)]:
            log.warning(
                "%s differs from the base model in what its forward reads and no state dict holds (base model's != fine-tuned model's): "
                "%s. All tasks will run with the base model's; let it be a buffer, or give the base model the same, if a task depends on it.",
                task,
                "; ".join(unlike[:4]),
            )


def _matched(base: nn.Module, tuned: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The two, or what one of them is wrapped in or part of (DataParallel, averages of weights, a tower of a whole model)."""
    inside = ((base, m) for m in tuned.modules() if type(m) is type(base))
    around = ((m, tuned) for m in base.modules() if type(m) is type(tuned))
    return next(chain(inside, around), (base, tuned))


def _learned_inputs(model: nn.Module, inner: nn.Module) -> Iterator[str]:
    """What PEFT puts in front of the inputs of a model."""
    inside = {id(module) for module in inner.modules()}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "prompt_encoder" and id(module) not in inside:
            yield f"{name} learns inputs and changes no weight; leave this model out"


def _around(model: nn.Module, inner: nn.Module) -> Iterator[str]:
    """What the forward of a model runs around the one inside, by which tasks are run; heads of transformers' classes are no part of it."""
    known = {id(one) for one in (*inner.modules(), *all_tensors(inner).values())}
    outer, path = model, next(n for n, m in model.named_modules() if m is inner)
    before = ""
    for part in path.split(".") if path else ():
        held = {**outer._parameters, **outer._buffers, **outer._modules}
        read = read_by_forward(type(outer))
        for name, one in held.items() if not _of_transformers(outer) else ():
            runs = name in read or isinstance(outer, nn.Sequential)
            acts = one is not None and (isinstance(one, Tensor) or _acts(one))
            if runs and acts and name != part and id(one) not in known:
                yield before + name
        outer, before = outer._modules[part], f"{before}{part}."


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


def _differing(base: nn.Module, tuned: nn.Module, alike: bool) -> Iterator[str]:
    """What differs in the computation of what the two have registered.

    Args:
        alike: whether both have configurations, which were found to say the same.
    """
    for first, second, which in ((base, tuned, "base"), (tuned, base, "fine-tuned")):
        known = dict(second.named_modules())
        for name, module in first.named_modules():
            # what holds tensors is found by those
            if name in known or not _acts(module) or module.state_dict():
                continue
            outer = first.get_submodule(name.rpartition(".")[0])
            # classes of transformers run what they made themselves
            if not alike or type(outer).__module__.startswith("torch.nn."):
                yield f"{name} ({_class(module)}) is in the {which} model only"
    for name, here, there in _pairs(base, tuned):
        yield from _unlike(name or "the model", here, there, alike)


def _unlike(
    shown: str, here: nn.Module, there: nn.Module, alike: bool = False
) -> Iterator[str]:
    """How two modules compute something else with the tensors of a state dict."""
    kinds = (_class(here), _class(there))
    if _of_other_forwards(here, there):
        if _is_whole(here) and _is_whole(there):
            return
        yield "{} is {} != {}".format(shown, *kinds)
        return
    mine, theirs = replaced(here), replaced(there)
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            yield f"{shown} has a {key} of its own in one of them, or another"
    alike = alike and _of_transformers(here)
    mine, theirs = _settings(here, alike), _settings(there, alike)
    for key in sorted(mine.keys() & theirs.keys()):
        if mine[key] != theirs[key]:
            yield f"{shown}: {key} {mine[key]!r} != {theirs[key]!r}"
    unsaved = here._non_persistent_buffers_set & there._non_persistent_buffers_set
    for leaf in () if alike else sorted(unsaved):
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


def _unlike_values(base: nn.Module, tuned: nn.Module, peft: bool) -> Iterator[str]:
    """What differs of other values that forwards read: numbers, texts, functions, and lists of them.

    Args:
        peft: of PEFT's layers, or of all others.
    """
    for name, here, there in _pairs(base, tuned):
        kind = type(here).__module__  # all settings of torch's own are known
        if of_peft(here) != peft or kind.startswith(_LIBRARY) or not _acts(here):
            continue
        shown, ours = name and f"{name}.", _of_transformers(here)
        if _is_whole(here) and _is_whole(there):
            if _of_other_forwards(here, there) and not (
                ours and _of_transformers(there)
            ):
                yield f"{name or 'the model'} is {_class(here)} != {_class(there)}"
            if ours or _of_transformers(there):
                continue
        if type(here) is not type(there):
            continue
        settings = _settings(here, ours)
        mine, theirs = vars(here), vars(there)
        read = read_by_forward(type(here)) & mine.keys() & theirs.keys()
        if ours:
            read |= _OF_ATTENTION & mine.keys() & theirs.keys()
            read -= {k for k in read if is_unrelated(k)} | set_by_forward(type(here))
            yield from (
                f"the buffer {shown}{leaf}" for leaf in _other_buffers(here, there)
            )
        for key in sorted(read):
            if key in OF_ALL_MODULES or key in settings or _trained(key.strip("_")):
                continue
            told = _told(mine[key]), _told(theirs[key])
            if None not in told and told[0] != told[1]:
                yield "{}{} {:.60} != {:.60}".format(shown, key, *told)


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


def _is_metric(module: nn.Module) -> bool:
    return any(k.__module__.startswith("torchmetrics.") for k in type(module).__mro__)


def _of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def _is_whole(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, or PEFT's around one: heads and wrappings of the same layers are of many classes."""
    return isinstance(module, PreTrainedModel) or type(module).__module__ == "peft.peft_model"  # fmt: skip


def _of_other_forwards(here: nn.Module, there: nn.Module) -> bool:
    """Whether two modules are of classes that compute something else."""
    kinds = type(here), type(there)
    if _class(here) == _class(there) or kinds[0].forward is kinds[1].forward:
        return False
    places = [kind.__module__ for kind in kinds]
    if kinds[0].__qualname__ == kinds[1].__qualname__ and all(
        place.startswith(_REMOTE) for place in places
    ):
        return False
    if _of_transformers(here) and _of_transformers(there):
        # of one layer, by attn_implementation or the length of inputs
        if all("Attention" in kind.__name__ for kind in kinds):
            return False
    return _acts(here) or _acts(there)


def _other_buffers(here: nn.Module, there: nn.Module) -> list[str]:
    """Buffers that no state dict holds and that are others, by more than devices differ."""
    both = here._non_persistent_buffers_set & there._non_persistent_buffers_set
    if getattr(here, "rope_type", None) in _BY_LENGTH:
        return []
    return [
        leaf
        for leaf in sorted(both)
        if not _same(here._buffers.get(leaf), there._buffers.get(leaf), rtol=1e-2)
    ]


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
        if _is_metric(module) or _of_transformers(module):
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
    kind = type(module)
    lost = isinstance(module, nn.Identity) or "drop" in kind.__name__.lower()
    judges = kind.__module__ == "torch.nn.modules.loss" or _is_metric(module)
    return not lost and not judges


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _settings(module: nn.Module, alike: bool = False) -> dict[str, Any]:
    """Settings of a module that its outputs may depend on; nan is itself.

    Args:
        alike: whether it is one of transformers' own, of a model whose configuration says the same as the other's.
    """
    library = type(module).__module__.startswith(_LIBRARY)

    def counts(key: str, value: Any) -> bool:
        if library:
            return key not in _SIZES | _TRAINING
        if alike:
            scale = key in COMPUTED or any(part in key for part in _SCALES)
            return scale and type(value) is float and not is_unrelated(key)
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


def _same(left: Tensor | None, right: Tensor | None, rtol: float = 0.0) -> bool:
    """Equal, or of other sizes, as what is worked out for the longest input so far; in the smaller type where those differ."""
    if left is None or right is None or left.shape != right.shape:
        return True
    if left.is_meta or right.is_meta:
        return True
    small = min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
    left, right = (x.cpu().to_dense().to(small) for x in (left, right))
    odd = left != left
    return torch.equal(odd, right != right) and torch.allclose(
        left[~odd], right[~odd], rtol, 0
    )


def _hooked(base: nn.Module, tuned: nn.Module) -> list[str]:
    """Modules on which the two have other hooks."""
    return [
        name or "the model"
        for name, here, there in _pairs(base, tuned)
        if hooks(here) != hooks(there)
    ]
