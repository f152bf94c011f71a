"""Errors weighed by direction: what a layer's usual inputs do not see of an error costs little.

With R the root of the second moment C of a matrix's inputs, ``||(tau^ - tau) R||_F^2`` is the mean squared error of the layer's
output. Merging models of task vectors ``tau R`` and multiplying what is merged by ``R^-1`` makes every step (sharing, ranks,
refinement) serve that error. Measured to be no better than plain errors (``objectives.py``), so no option. Letters: ``n`` in.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Added to the eigenvalues of a second moment of mean eigenvalue 1: how much of the plain error is kept.
DAMPING = 1.0


@dataclass(frozen=True)
class Metric:
    """The root of a damped second moment, and its inverse.

    Args:
        root, inverse: (n, n), symmetric.
    """

    root: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, moment: Tensor) -> "Metric":
        """From C (n, n), of any size; the mean squared root is 1."""
        values, vectors = torch.linalg.eigh(moment.double())
        values = values.clamp(min=0)
        values = values / values.mean().clamp(min=1e-300) + DAMPING
        values = values / values.mean()
        return cls(
            ((vectors * values.sqrt()) @ vectors.mT).float(),
            ((vectors / values.sqrt()) @ vectors.mT).float(),
        )


@torch.no_grad()
def input_moments(
    model: nn.Module, names: Sequence[str], inputs: Sequence[Tensor]
) -> dict[str, Tensor]:
    """E[x x^T] (n, n) over the vectors x that each named weight is multiplied with.

    Args:
        model: run once per input.
        names: of weights; those that belong to no linear layer or ungrouped convolution that is called are left out.
        inputs: batches.
    """
    modules = dict(model.named_modules())
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, module: nn.Module, x: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            x = F.unfold(
                x.float(),
                module.kernel_size,
                dilation=module.dilation,
                padding=module.padding,
                stride=module.stride,
            ).mT
        rows = x.reshape(-1, x.shape[-1]).double()
        sums[name] = sums.get(name, 0) + rows.mT @ rows
        counts[name] = counts.get(name, 0) + len(rows)

    handles = []
    for name in names:
        module = modules.get(name.removesuffix(".weight"))
        grouped = isinstance(module, nn.Conv2d) and module.groups > 1
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not grouped:
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, name=name: see(name, m, args[0])
                )
            )
    model.eval()
    try:
        for x in inputs:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def weighed(
    base: nn.Module, tuned: nn.Module, metrics: Mapping[str, Metric]
) -> nn.Module:
    """A fine-tuned model whose task vectors are ``tau R`` where a matrix has a metric."""
    return _turned(base, tuned, {name: m.root for name, m in metrics.items()})


def unweighed(
    base: nn.Module, tuned: nn.Module, metrics: Mapping[str, Metric]
) -> nn.Module:
    """The inverse of :func:`weighed`."""
    return _turned(base, tuned, {name: m.inverse for name, m in metrics.items()})


@torch.no_grad()
def _turned(
    base: nn.Module, tuned: nn.Module, right: Mapping[str, Tensor]
) -> nn.Module:
    made, start = copy.deepcopy(tuned), dict(base.named_parameters())
    for name, value in made.named_parameters():
        if name in right:
            change = (value - start[name]).flatten(1) @ right[name]
            value.copy_(start[name] + change.view_as(value))
    return made
