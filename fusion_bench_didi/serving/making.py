"""The bank of one tensor, out of the base model's and what is stored of it."""

from collections.abc import Callable, Sequence
from typing import Union

import torch
from torch import Tensor

from ..deltas.base import Delta
from ..deltas.plain import OwnDelta
from ..lowrank.arithmetic import without_autocast
from ..lowrank.factors import LowRankFactors
from ..lowrank.row_blocks import wide
from .banks import Factors, MatrixBank, OwnBank, Serving, ValueBank, laid_out
from .held import Held
from .stored import StoredBank

AnyBank = Union[ValueBank, MatrixBank, StoredBank, OwnBank]


@torch.no_grad()
@without_autocast()
def bank_of(
    given: Callable[[], Tensor],
    shared: Delta | None,
    deltas: Sequence[Delta | None],
    *,
    shared_scale: float = 1.0,
    turned: bool | None,
    serving: Serving,
    held: Held | None = None,
    name: str = "",
    tasks: Sequence[str] = (),
) -> AnyBank:
    """The bank of one tensor, in its data type and on its device, computed in float32.

    Args:
        given: gives the base model's tensor wherever it is at the time; banks may keep no copy.
        shared: the change that all tasks share, counted ``shared_scale`` times for the shared model.
        deltas: per task.
        turned: for a matrix, whether (m, n) is what the backbone holds; None for a bank of values.
        held: what is held within a limit of memory, where there is one.
        name: of the tensor.
        tasks: their names.
    """
    base = given()
    own = [d.applied(base) for d in deltas if isinstance(d, OwnDelta)]
    if any(value.shape != base.shape for value in own) or not base.is_floating_point():
        base = base.clone()
        start = base
        if shared is not None:
            start = wide(base) + shared_scale * shared.change()
        found = [start if d is None else d.applied(base, shared) for d in deltas]
        return OwnBank(name, [value.to(base) for value in (*found, start)], tasks)
    if turned is not None and serving.memory_limit_gb is not None:
        return StoredBank(
            name,
            given,
            shared,
            deltas,
            shared_scale=shared_scale,
            turned=turned,
            serving=serving,
            held=held,
        )
    decoded = None if shared is None else shared.decoded()
    start = base.float()
    if decoded is not None:
        start = start + shared_scale * decoded.change()

    def whole(delta: Delta | None) -> Tensor:
        if isinstance(delta, OwnDelta):
            return delta.applied(base).to(start)
        return start if delta is None else start + delta.beyond(decoded)

    if turned is None:
        values = [*map(whole, deltas), start]
        return ValueBank(torch.stack(values).to(base.dtype))

    def kept(delta: Delta | None) -> Factors | Tensor | None:
        if delta is None:
            return None
        factors = _worthwhile_factors(delta, decoded, serving)
        if factors is None:
            return _laid_out(whole(delta), base, turned)
        factors = (factors.mT if turned else factors).to(base.dtype)
        return factors.up, factors.down

    of_shared = _laid_out(start, base, turned)
    parts = [kept(delta) for delta in deltas]
    return MatrixBank(tuple(base.shape), of_shared, parts, turned=turned)


def _worthwhile_factors(
    delta: Delta, shared: Delta | None, serving: Serving
) -> LowRankFactors | None:
    """Factors of a task's change, where it is a product and costs less than the whole matrix."""
    factors = delta.beyond_product(shared)
    if factors is None or delta.numel < serving.small:
        return None
    size = factors.up.numel() + factors.down.numel()
    return factors if size <= serving.dense_above * delta.numel else None


def _laid_out(matrix: Tensor, base: Tensor, turned: bool) -> Tensor:
    """A matrix as (in, out), of the base tensor's type, in memory of its own."""
    matrix = matrix.flatten(1).to(base.dtype)
    matrix = laid_out(matrix.mT, turned) if turned else matrix.contiguous()
    return matrix.clone() if matrix.data_ptr() == base.data_ptr() else matrix
