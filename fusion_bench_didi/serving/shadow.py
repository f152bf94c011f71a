"""Second networks over the tensors of a backbone: trees of modules that share everything but the modules themselves."""

import copy
from collections.abc import Callable, Mapping

from torch import Tensor, nn

#: what is done to the copy of a module
Change = Callable[[nn.Module], None]


def shadowed(module: nn.Module, changes: Mapping[nn.Module, Change]) -> nn.Module:
    """A copy that shares tensors, hooks and configurations; copies of the modules in ``changes`` are changed."""
    made: dict[nn.Module, nn.Module] = {}

    def twin_of(module: nn.Module) -> nn.Module:
        if module not in made:
            twin = made[module] = copy.copy(module)
            children = module._modules.items()
            twin._modules = {name: child and twin_of(child) for name, child in children}
            if module in changes:
                changes[module](twin)
        return made[module]

    return twin_of(module)


def network_with(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The backbone with other parameters: ``functional_call`` without its cost per call.

    Args:
        tensors: by parameter name; none that several modules own.
    """
    by_module: dict[nn.Module, dict[str, nn.Parameter]] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        leaves = by_module.setdefault(backbone.get_submodule(owner), {})
        leaves[leaf] = nn.Parameter(tensor, requires_grad=False)

    def change(leaves: dict[str, nn.Parameter]) -> Change:
        def put(twin: nn.Module) -> None:
            twin._parameters = {**twin._parameters, **leaves}

        return put

    return shadowed(backbone, {m: change(leaves) for m, leaves in by_module.items()})
