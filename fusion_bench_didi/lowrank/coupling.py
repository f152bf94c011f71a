"""Cross terms of the truncation error between the shared matrix and the experts, Eq. 6 and 11.

Letters: ``m`` out, ``n`` in, ``T`` tasks, ``q`` kept singular values; ``tau_t`` task vectors, ``S`` the shared matrix,
``E_t = tau_t - S`` the experts.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from .factored import inner
from .factors import Matrix, Spectrum


@dataclass(frozen=True)
class Coupling:
    """Inner products between the directions of ``S`` and of each ``E_t``.

    With ``u, v`` singular vectors: ``head[t, i, j] = (u0_i . ut_j)(v0_i . vt_j)``; ``shared_tail[t, i] = u0_i^T E_t' v0_i``
    and ``expert_tail[t, j] = ut_j^T S' vt_j`` where a prime marks the part beyond the kept directions;
    ``tail[t] = <S', E_t'>``.
    """

    head: Tensor  # (T, q, q)
    shared_tail: Tensor  # (T, q)
    expert_tail: Tensor  # (T, q)
    tail: Tensor  # (T,)

    def reduced(self) -> "Coupling":
        """With its large part in bfloat16: half the memory, cross terms to about 0.4 %."""
        return replace(self, head=self.head.bfloat16())


def _couple(
    first: Spectrum, expert: Spectrum, shared: Matrix, residual: Matrix
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of :class:`Coupling` for one task."""
    head = (first.U.mT @ expert.U) * (first.Vh @ expert.Vh.mT)  # (q, q)
    on_shared = ((first.U.mT @ residual) * first.Vh).sum(1)  # u0_i^T E v0_i
    on_expert = ((expert.U.mT @ shared) * expert.Vh).sum(1)  # ut_j^T S vt_j
    shared_tail = on_shared - head @ expert.S
    expert_tail = on_expert - first.S @ head
    tail = (
        inner(shared, residual)
        - first.S @ head @ expert.S
        - first.S @ shared_tail
        - expert_tail @ expert.S
    )
    return head, shared_tail, expert_tail, tail
