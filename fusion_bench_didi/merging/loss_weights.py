"""How much an error counts, by matrix and task: the weights of the objective."""

import re

import torch
from torch import Tensor

from ..lowrank.factors import energy_of
from ..task_vectors.reader import TaskVectors
from ..task_vectors.scan import Scan
from .inventory import Inventory
from .settings import MergeSettings


def loss_weights(
    task_vectors: TaskVectors, scan: Scan, inventory: Inventory, settings: MergeSettings
) -> dict[str, Tensor]:
    """(T,) weight of each task's squared error, per matrix; ``MergeSettings`` says what the choices are.

    ``root`` weighs by 1 / ||tau||: plain MSE spends everything on the matrices of most energy, the relative error as
    much on those that hardly moved; the mean of the two (in the exponent) kept most accuracy where it was measured.
    """
    energies = {name: scan.energy[name] for name in inventory.matrices}
    how = settings.normalization
    if how == "none":
        return {name: torch.ones_like(e).float() for name, e in energies.items()}
    if how == "sensitivity":
        known = settings.sensitivity or {}
        if not known:
            raise ValueError("normalization=sensitivity needs settings.sensitivity.")
        average = sum(known.values()) / len(known)
        return {
            name: torch.full_like(e, known.get(name, average) / average).float()
            for name, e in energies.items()
        }
    if how == "task":
        total = torch.stack(list(energies.values())).sum(0)
        energies = {name: total for name in energies}
    if how == "base":
        size = {n: energy_of(task_vectors.read_base(n).float()) for n in energies}
        energies = {
            name: torch.full_like(e, float(size[name].clamp(min=1e-12)))
            for name, e in energies.items()
        }
    power = 0.5 if how in ("root", "depth") else 1.0
    weights = {}
    for name, e in energies.items():
        # a task that leaves the matrix alone is disturbed by a shared change as much as the average task
        e = torch.where(e > 0, e, e[e > 0].mean())
        weights[name] = e.pow(-power).float()
        if how == "depth":
            weights[name] /= block_of(name)
    return weights


def block_of(name: str) -> int:
    """1 for the first block and for what stands outside the blocks, 2 for the second, and so on."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return 1 if found is None else int(found[1]) + 1
