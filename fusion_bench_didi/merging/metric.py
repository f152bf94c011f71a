"""Errors weighed by direction: what a layer's usual inputs do not see of an error costs little.

With R the root of the second moment C of a matrix's inputs, ``||(tau^ - tau) R||_F^2`` is the mean squared error of the layer's
output. Decomposing ``tau R`` in place of ``tau`` and multiplying the right factors by ``R^-1`` afterwards makes every step
(sharing, ranks, refinement) serve that error, still in closed form. Letters: ``n`` in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..lowrank.factors import LowRankFactors, Matrix
from ..lowrank.refinement import FactorSet

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

    def weighed(self, task_vectors: Sequence[Matrix]) -> Sequence[Matrix]:
        """``tau R`` of T (m, n)."""
        if isinstance(task_vectors, Tensor):
            return task_vectors @ self.root.to(task_vectors)
        return [
            (
                replace(tau, down=tau.down @ self.root.to(tau.down))
                if isinstance(tau, LowRankFactors)
                else tau @ self.root.to(tau)
            )
            for tau in task_vectors
        ]

    def plain(self, modules: FactorSet) -> FactorSet:
        """The same modules for ``tau`` itself."""

        def back(factors: LowRankFactors | None) -> LowRankFactors | None:
            if factors is None:
                return None
            inverse = self.inverse.to(factors.down)
            return replace(factors, down=factors.down @ inverse)

        return FactorSet(back(modules.shared), tuple(map(back, modules.experts)))


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


def metrics_of(moments: Mapping[str, Tensor] | None) -> dict[str, Metric]:
    """By matrix name."""
    return {name: Metric.of(c) for name, c in (moments or {}).items()}
