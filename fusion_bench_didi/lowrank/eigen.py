"""Eigenvectors of Gram matrices, also where float32 finds none."""

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def eigen_of(gram: Tensor, name: str = "a Gram matrix") -> tuple[Tensor, Tensor]:
    """Eigenvalues (s,), ascending, and vectors (s, s) of a symmetric matrix.

    Where the solver does not converge, or gives no numbers (values that lie farther apart than float32 reaches), in float64.

    Args:
        name: of what it is of, for the log.
    """
    try:
        values, vectors = torch.linalg.eigh(gram)
        if bool(values.isfinite().all()) and bool(vectors.isfinite().all()):
            return values, vectors
    except torch.linalg.LinAlgError:
        pass
    log.warning("The eigensolver did not converge on %s; trying in float64.", name)
    values, vectors = torch.linalg.eigh(gram.double())
    return values.to(gram.dtype), vectors.to(gram.dtype)
