"""What modules work out of their weights and keep, such as tables of attention biases: forgotten where the weights become others."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..task_vectors.live_models import OF_ALL_MODULES
from .copies import references
from .trees import first_tensor, is_own_cache

#: where methods come from that only note that a module is trained
_TRAIN = (nn.Module.__module__, "transformers.modeling_utils")


class Derived:
    """Which modules keep something that they work out of their tensors, those of modules inside, or others that they refer to.

    It is dropped as such modules do it themselves, on the way to training and back; what a module had not worked out yet when it
    was loaded is to be worked out again; and caches that an architecture keeps of its results are as they were then.

    Args:
        model: as it was loaded. Copies of it may be given to the methods.
    """

    def __init__(self, model: nn.Module):
        self._unset: dict[str, dict[str, type]] = {}
        self._caches: dict[str, dict[str, Any]] = {}
        keeping: dict[int, list[str]] = {}
        referred: dict[str, list[nn.Module | Tensor]] = {}
        for name, part in references(model):
            referred.setdefault(name, []).append(part)
        for name, module in model.named_modules():
            _through_training(module)
            found = {k: v for k, v in vars(module).items() if is_own_cache(v)}
            if found:
                self._caches[name] = copy.deepcopy(found)
            unset = _unset(module)
            if unset or _has_own_train(module):
                self._unset[name] = unset
                for tensor in _tensors([module, *referred.get(name, ())]):
                    keeping.setdefault(id(tensor), []).append(name)
        state = model.state_dict(keep_vars=True).items() if keeping else ()
        self._keeping = {n: keeping[id(t)] for n, t in state if id(t) in keeping}

    @property
    def of_results(self) -> bool:
        """Whether something is kept of what samples gave, which is not another task's, nor a network's over the same modules."""
        return bool(self._caches)

    def forget(
        self, model: nn.Module, names: Iterable[str], *, for_a_while: bool = False
    ) -> None:
        """Forget what was worked out of tensors.

        Args:
            names: of them.
            for_a_while: what modules hold is put back afterwards, so that nothing of it may be filled in its place.
        """
        for name, caches in self._caches.items():
            vars(model.get_submodule(name)).update(copy.deepcopy(caches))
        for owner in {owner for name in names for owner in self._keeping.get(name, ())}:
            module = model.get_submodule(owner)
            for key, kind in self._unset[owner].items():
                value = vars(module).get(key)
                empty = for_a_while and type(value) is kind and not value
                if empty or first_tensor(value) is not None:
                    vars(module)[key] = kind()
            _through_training(module)
        torch.clear_autocast_cache()  # of casts of tensors as they were


def _tensors(parts: Iterable[nn.Module | Tensor]) -> Iterator[Tensor]:
    """Tensors, and those of modules with all that is inside."""
    for part in parts:
        if isinstance(part, Tensor):
            yield part
            continue
        for module in part.modules():
            held = (*module._parameters.values(), *module._buffers.values())
            yield from (tensor for tensor in held if tensor is not None)


def _unset(module: nn.Module) -> dict[str, type]:
    """Attributes that hold nothing yet, and what kind of nothing."""
    return {
        key: type(value)
        for key, value in vars(module).items()
        if type(value) in (type(None), dict, list)
        and not value
        and key not in OF_ALL_MODULES
    }


def _has_own_train(module: nn.Module) -> bool:
    return type(module).train.__module__ not in _TRAIN


@torch.no_grad()
def _through_training(module: nn.Module) -> None:
    """Let a module that keeps something for evaluation only work it out anew."""
    if module.training or not _has_own_train(module):
        return
    modes = [(inner, inner.training) for inner in module.modules()]
    with suppress(NotImplementedError):  # of what cannot be trained
        module.train(True)
        module.train(False)
    for inner, training in modes:
        inner.training = training
