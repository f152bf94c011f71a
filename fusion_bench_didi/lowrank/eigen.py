"""Eigenvectors of Gram matrices, also where float32 finds none."""

import logging

import torch
from torch import Tensor

from ..errors import DiDiError, spelled

log = logging.getLogger(__name__)


def eigen_of(gram: Tensor, name: str = "a Gram matrix") -> tuple[Tensor, Tensor]:
    """Eigenvalues (s,), ascending, and vectors (s, s) of a symmetric matrix.

    Where the solver does not converge, or gives no numbers (values that lie farther apart than float32 reaches), in float64.

    Args:
        name: of what it is of, for the log and the error.

    Raises:
        DiDiError: where float64 gives no numbers either.
    """
    try:
        values, vectors = torch.linalg.eigh(gram)
        if bool(values.isfinite().all()) and bool(vectors.isfinite().all()):
            return values, vectors
    except torch.linalg.LinAlgError:
        pass
    log.warning("The eigensolver did not converge on %s; trying in float64.", name)
    values, vectors = (x.to(gram.dtype) for x in torch.linalg.eigh(gram.double()))
    if not bool(values.isfinite().all()) or not bool(vectors.isfinite().all()):
        raise DiDiError(
            f"There is no decomposition of {name or 'a matrix'} in {str(gram.dtype).removeprefix('torch.')}: squares of its entries "
            f"leave the type's range. Leave it out with {spelled('exclude', '[...]')}."
        )
    return values, vectors
