"""How much an error counts, by matrix and task: the weights of the objective."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .settings import Normalization

#: Powers of a task vector's energy that its error is divided by.
POWERS: dict[Normalization, float] = {"none": 0.0, "root": 0.5, "matrix": 1.0}


def loss_weights(
    energies: Mapping[str, Tensor], normalization: Normalization
) -> dict[str, Tensor]:
    """(T,) weight of each task's squared error, per matrix: ``||tau||^(-2 p)``.

    ``root`` weighs by 1 / ||tau||: plain MSE spends everything on the matrices of most energy, the relative error as
    much on those that hardly moved; the mean of the two (in the exponent) kept most accuracy where it was measured.

    Args:
        energies: (T,) squared norms of the task vectors, per matrix.
    """
    power, weights = POWERS[normalization], {}
    for name, e in energies.items():
        # a task that leaves the matrix alone is disturbed by a shared change as much as the average task
        e = torch.where(e > 0, e, e[e > 0].mean())
        weights[name] = e.pow(-power).float()
    return weights
