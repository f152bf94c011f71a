"""Decisions as integers, and what crossover and mutation do to them.

A genome is an array (C, 2, T): per component ``labels``, the group of each task as a restricted growth string
(``labels[0] = 0``, ``labels[t] <= 1 + max(labels[:t])``), and ``operators``, where entry j is the operator of group j and
entries beyond the last group are 0. Every partition has exactly one such string, so that equal decisions are equal
arrays. Letters: ``C`` components, ``T`` tasks, ``O`` operators.
"""

from collections.abc import Iterator

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Genome = NDArray[np.int64]


def canonical(genome: Genome, alone: NDArray) -> Genome:
    """The one array that stands for a decision.

    Args:
        genome: any group numbers below T, with the operator of each.
        alone: (O,) the operator that stands for each one where a group has one task.
    """
    out = np.zeros_like(genome)
    for row, (labels, operators) in zip(out, genome):
        seen: dict[int, int] = {}
        for t, label in enumerate(labels):
            row[0, t] = seen.setdefault(int(label), len(seen))
        for old, new in seen.items():
            operator = operators[old]
            one = (labels == old).sum() == 1
            row[1, new] = alone[operator] if one else operator
    return out


def groups(row: NDArray) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(operator, tasks) of each group of one component (2, T)."""
    labels, operators = row
    for j in range(labels.max() + 1):
        yield int(operators[j]), tuple(np.flatnonzero(labels == j).tolist())


def together(genomes: NDArray) -> NDArray:
    """(..., C, T, T): whether two tasks are in one group. Takes any number of genomes (..., C, 2, T)."""
    labels = genomes[..., 0, :]
    return labels[..., :, None] == labels[..., None, :]


def operator_of_task(genomes: NDArray) -> NDArray:
    """(..., C, T): the operator of each task's group."""
    return np.take_along_axis(genomes[..., 1, :], genomes[..., 0, :], -1)


def one_group(C: int, T: int, operator: int) -> Genome:
    """The genome with all tasks together, everywhere."""
    genome = np.zeros((C, 2, T), dtype=np.int64)
    genome[:, 1, 0] = operator
    return genome


def no_merging(C: int, T: int, operator: int) -> Genome:
    """Every task for itself, everywhere."""
    genome = np.zeros((C, 2, T), dtype=np.int64)
    genome[:, 0], genome[:, 1] = np.arange(T), operator
    return genome


def random_genome(rng: Generator, C: int, T: int, operators: int) -> Genome:
    """Tasks one after the other found a group with a probability drawn per genome, or join a random one.

    Operators are drawn with weights that are drawn per genome too, so that draws spread over the whole range of storage.
    """
    found = rng.random()
    weights = rng.dirichlet(np.ones(operators))
    genome = np.zeros((C, 2, T), dtype=np.int64)
    for row in genome:
        count = 1
        for t in range(1, T):
            new = rng.random() < found
            row[0, t] = count if new else rng.integers(count)
            count += new
        row[1, :count] = rng.choice(operators, size=count, p=weights)
    return genome


def crossover(a: Genome, b: Genome, rng: Generator) -> tuple[Genome, Genome]:
    """Each component from one parent, whole, and from the other in the second child."""
    pick = rng.random(len(a)) < 0.5
    where = pick[:, None, None]
    return np.where(where, a, b), np.where(where, b, a)


def mutate(genome: Genome, rng: Generator, *, operators: int, rate: float) -> Genome:
    """In each component with probability ``rate``: move a task to another or a new group, join two groups, draw another
    operator for a group, or copy the decision of another component. The result has still to be made canonical.
    """
    out = genome.copy()
    C, _, T = out.shape
    chosen = rng.random(C) < rate
    chosen[rng.integers(C)] = True
    for c in np.flatnonzero(chosen):
        labels, used = out[c, 0], int(out[c, 0].max()) + 1
        kind = rng.choice(
            ["move", "operator", "join", "copy"], p=[0.4, 0.35, 0.1, 0.15]
        )
        if kind == "copy":
            out[c] = out[rng.integers(C)]
        elif kind == "operator" or (kind == "join" and used == 1):
            out[c, 1, rng.integers(used)] = rng.integers(operators)
        elif kind == "join":
            first, second = rng.choice(used, size=2, replace=False)
            labels[labels == second] = first
        else:
            t, target = rng.integers(T), rng.integers(used + 1)
            if target == used:
                # a group number that is free once the task has left
                target = next(j for j in range(T + 1) if j not in np.delete(labels, t))
                out[c, 1, target] = rng.integers(operators)
            labels[t] = target
    return out
