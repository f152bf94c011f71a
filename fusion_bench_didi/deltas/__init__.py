"""Stored forms of one task's change of one tensor, their precision, and the one storage account, in bits.

A delta holds exactly the tensors that are written to the file. A new stored form is a ``Delta`` with a ``kind`` of its own.
"""

from ..compat import lazy

__getattr__ = lazy(
    __name__,
    {
        "Delta": "base",
        "DenseDelta": "plain",
        "LowRankDelta": "plain",
        "SpectralDelta": "plain",
        "MaskedDelta": "masks",
        "SparseDelta": "masks",
    },
)
