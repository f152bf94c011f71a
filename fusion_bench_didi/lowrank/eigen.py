"""Gram matrices: eigenvectors, also where float32 finds none, and inverses."""

import logging
from contextlib import suppress

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
    with suppress(torch.linalg.LinAlgError):
        values, vectors = torch.linalg.eigh(gram)
        if _finite(values, vectors):
            return values, vectors
    log.warning("The eigensolver did not converge on %s; trying in float64.", name)
    values, vectors = (x.to(gram.dtype) for x in torch.linalg.eigh(gram.double()))
    if not _finite(values, vectors):
        raise DiDiError(
            f"There is no decomposition of {name or 'a matrix'} in {str(gram.dtype).removeprefix('torch.')}: squares of its entries "
            f"leave the type's range. Leave it out with {spelled('exclude', '[...]')}."
        )
    return values, vectors


def lifted_inverse(gram: Tensor, ridge: float) -> Tensor:
    """The inverse (r, r) of a Gram matrix whose diagonal is lifted, so that rows may be alike; worked out in float64."""
    eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return torch.linalg.inv(gram.double() + ridge * eye).to(gram.dtype)


def _finite(*parts: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for part in parts)
