"""Which modules of a model take a low-rank adapter, and how the factors of their weight are laid out in it.

A weight is changed by ``up @ down`` as the merged model has it: (m, r) and (r, n), m the weight's first side.
"""

import dis
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from ..lowrank.factors import LowRankFactors
from ..task_vectors.layers import as_plain, computed_otherwise, is_conv1d

#: Part of a PEFT file's name of a tensor -> tensor.
Parts = dict[str, Tensor]
#: What these layers tell of themselves, and PEFT's in their places do not.
_TOLD = {*nn.Embedding.__constants__, *nn.Conv2d.__constants__}


@dataclass(frozen=True)
class Site:
    """A weight that an adapter changes by two factors.

    Args:
        module: its name.
        kind: ``linear``; or ``convolution`` or ``embedding``, which PEFT reads and servers do not.
    """

    module: str
    kind: str
    layout: Callable[[LowRankFactors], Parts]


@dataclass(frozen=True)
class Refusal:
    """A weight of such a layer that takes no factors.

    Args:
        together: modules that hold it, which an adapter can hold whole instead; none where it cannot.
    """

    why: str
    together: tuple[str, ...] = ()


def sites(model: nn.Module) -> tuple[dict[str, Site], dict[str, Refusal]]:
    """The weights that take an adapter, by tensor name, and those of the same layers that do not."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    asked = _asked(model)
    inside = {
        f"{name}.{child}"
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for child, _ in module.named_modules()
    }
    found: dict[str, Site] = {}
    refused: dict[str, Refusal] = {}
    for name, module in model.named_modules():
        layout, tensor = _layout(module), f"{name}.weight"
        # of weights that are computed (weight_norm), what they are computed from is no layer's weight
        together = owners.get(id(getattr(module, "weight", None)))
        if layout is None or not name or together is None:
            continue
        if len(together) > 1:
            others = ", ".join(sorted(together - {tensor}))
            modules = tuple(sorted(t.rpartition(".")[0] for t in together))
            refused[tensor] = Refusal(f"tied to {others}", modules)
        elif why := (
            _refused_by_peft(model, name)
            or _computed_otherwise(module)
            or _asked_of(name, module, asked)
        ):
            refused[tensor] = Refusal(why, (name,))
        elif name in inside:
            refused[tensor] = Refusal("in fused attention, which does not run its output layer's forward")  # fmt: skip
        else:
            found[tensor] = Site(name, *layout)
    return found, refused


def _refused_by_peft(model: nn.Module, name: str) -> str:
    """Why PEFT puts no factors on a module of this name, as in Mamba, whose kernels run no layer; empty where it does."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTuner

    # spelled so, and older releases have none; it does not look at the tuner
    check = getattr(BaseTuner, "_check_target_module_compatiblity", None)
    leaf, kind = name.rpartition(".")[2], type(model).__name__
    try:
        if check is not None:
            check(None, LoraConfig(), model, leaf)
    except ValueError:
        return f"PEFT refuses factors of {leaf} in {kind}, which does not run its forward"  # fmt: skip
    return ""


def _computed_otherwise(module: nn.Module) -> str:
    """Why factors that PEFT puts on a module do not change its weight alone; empty where they do."""
    kind = type(module)
    if isinstance(module, nn.Linear) and kind.forward is not nn.Linear.forward:
        return as_plain(kind, nn.Linear)
    return computed_otherwise(module)


def _asked_of(name: str, module: nn.Module, asked: set[str]) -> str:
    """Why PEFT's layer lacks what the model reads of a module beside its weight; empty where it does not."""
    if name.rpartition(".")[2] in asked and isinstance(module, (nn.Embedding, nn.Conv2d)):  # fmt: skip
        return "the model reads settings of it, which PEFT's layer does not tell"
    return ""


def _asked(model: nn.Module) -> set[str]:
    """Last names of modules that some forward of a model reads such settings of (``self.NAME.num_embeddings``)."""
    found = set()
    for kind in {type(module) for module in model.modules()}:
        code = getattr(inspect.unwrap(kind.forward), "__code__", None)
        for owner, read in pairwise(dis.get_instructions(code) if code else ()):
            if owner.opname == read.opname == "LOAD_ATTR" and read.argval in _TOLD:
                found.add(owner.argval)
    return found


def _layout(
    module: nn.Module,
) -> tuple[str, Callable[[LowRankFactors], Parts]] | None:
    if isinstance(module, nn.Linear):
        return "linear", _linear
    if is_conv1d(module):
        return "linear", lambda factors: _linear(factors.mT)
    if isinstance(module, nn.Embedding):
        return "embedding", _embedding
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        sides = module.weight.shape[1:]
        return "convolution", lambda factors: _convolution(factors, tuple(sides))
    return None


def _linear(factors: LowRankFactors) -> Parts:
    return {"lora_A.weight": factors.down, "lora_B.weight": factors.up}


def _embedding(factors: LowRankFactors) -> Parts:
    return {"lora_embedding_A": factors.up.mT, "lora_embedding_B": factors.down.mT}


def _convolution(factors: LowRankFactors, sides: tuple[int, ...]) -> Parts:
    return {
        "lora_A.weight": factors.down.unflatten(1, sides),
        "lora_B.weight": factors.up[:, :, None, None],
    }
