"""CAT-Merging (Sun et al., ICML 2025): task vectors without the directions in which they disturb other tasks.

Letters: ``m`` out, ``n`` in, ``N`` rows (tokens) of layer inputs, ``c`` removed directions, ``T`` tasks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def removal_basis(
    vector: Tensor, inputs: Sequence[Tensor], task: int, *, count: int, weight: float
) -> Tensor:
    """Output directions in which ``tau_k`` disturbs other tasks more than it serves its own.

    The top eigenvectors of ``G_k = sum_{i != k} tau_k C_i tau_k^T - lambda tau_k C_k tau_k^T`` with ``C_i = X_i^T X_i / N_i``;
    those of eigenvalues that are not positive are left, for their removal would lose more than it gains.

    Args:
        vector: (m, n) of task ``task``.
        inputs: per task, (N_i, n).
        count: c.
        weight: lambda.

    Returns:
        (m, at most c), orthonormal columns.
    """
    outputs = [x @ vector.mT / len(x) ** 0.5 for x in inputs]  # (N_i, m)
    rows = torch.cat(outputs).double()  # (N, m)
    signs = torch.cat(
        [
            torch.full((len(x),), -weight if i == task else 1.0)
            for i, x in enumerate(inputs)
        ]
    ).to(rows)
    # the eigenvectors lie in the span of the rows: work in it where that is smaller
    span, coordinates = torch.linalg.qr(rows.mT)  # (m, p), (p, N)
    form = (coordinates * signs) @ coordinates.mT  # (p, p)
    values, vectors = torch.linalg.eigh(form)  # ascending
    top = vectors[:, -count:][:, values[-count:] > 0] if count else vectors[:, :0]
    return (span @ top).to(vector.dtype)


def without_directions(vector: Tensor, basis: Tensor) -> Tensor:
    """``(I - B B^T) tau``."""
    return vector - basis @ (basis.mT @ vector)


def without_conflicts(
    vector: Tensor, energies: Tensor, task: int, *, count: int, weight: float
) -> Tensor:
    """The diagonal case, for scales and shifts: zero the ``count`` coordinates that disturb others most.

    Coordinate j disturbs by ``g[j] = (sum_{i != k} e_i[j] - lambda e_k[j]) dv_k[j]^2``; as above only where positive.

    Args:
        vector: (n,) change of a scale or shift by task ``task``.
        energies: (T, n) mean square of what each task multiplies it with; ones for shifts.
    """
    own = energies[task]
    conflict = (energies.sum(0) - own - weight * own) * vector.square()
    top = conflict.topk(min(count, len(conflict)))
    return vector.index_fill(0, top.indices[top.values > 0], 0.0)


def normalised_inputs(inputs: Tensor, eps: float) -> Tensor:
    """What a layer norm multiplies its scale with."""
    return torch.nn.functional.layer_norm(inputs, inputs.shape[-1:], eps=eps)
