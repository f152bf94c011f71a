"""Storage forms of a matrix, one file each; they compete for every matrix in one Lagrangian choice (``choice.py``)."""

from .base import Choice, Decision, Form, Look
from .coded import CODED
from .experts import EXPERTS
from .given_bases import GIVEN_BASES
from .shared_mean import SHARED_MEAN
from .tucker import TUCKER

#: What competes with experts alone.
FORMS: tuple[Form, ...] = (SHARED_MEAN, TUCKER, GIVEN_BASES, CODED)

__all__ = ["EXPERTS", "FORMS", "Choice", "Decision", "Form", "Look"]
